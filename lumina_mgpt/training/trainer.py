"""The training loop, the same for one process and for many."""

import contextlib
import logging
import signal
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import BatchSize, Feed, MicroBatch, corrupt
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.seeding import seed_of
from lumina_mgpt.data.sources import read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import alone_in
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.reading import load_model, require_plain_weights
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import base, checkpoint, lineage
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.distributed import Processes, clip_gradients, place
from lumina_mgpt.training.guard import Guard
from lumina_mgpt.training.loss import LossModel
from lumina_mgpt.training.metrics import Metrics, batch_flops, peak_flops
from lumina_mgpt.training.optimizer import Ema, build_optimizers, schedule, set_lr
from lumina_mgpt.training.options import Settings
from lumina_mgpt.training.sample_images import Sampler
from lumina_mgpt.training.saver import Saver
from lumina_mgpt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def build_model(settings: Settings) -> tuple[Transformer, Path, dict]:
    """The model to train, on the CPU, in float32 (what adapters leave alone, in bf16), its tokenizer's folder, and what
    the run keeps about the checkpoint that it begins with."""
    if settings.init_from:
        folder = resolve(settings.init_from)
        require_plain_weights(folder, "init_from", "trained")
        # What is not trained need not be held wider than it is multiplied.
        dtype = torch.bfloat16 if settings.lora_rank and settings.precision == "bf16" else torch.float32
        model = load_model(folder, dtype, torch.device("cpu"), "sdpa")
    else:
        path = str(settings.model_config)
        config = ModelConfig.from_json(path) if path.endswith(".json") else ModelConfig.from_yaml(path)
        folder = Path(str(settings.tokenizer_path))
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(settings.seed))
    described = base.describe(settings, folder)
    folder = Path(settings.tokenizer_path) if settings.tokenizer_path else folder
    model.config = replace(model.config, dropout=settings.dropout, z_loss_weight=settings.z_loss_weight)
    model.dropout, model.gradient_checkpointing = settings.dropout, settings.checkpointing
    return model, folder, described


class Trainer:
    """One run: construct it on every process, then `run()`.

    Raises:
        InputError: settings, data or a checkpoint do not fit; nothing has been trained then.
    """

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.output_dir = Path(settings.output_dir)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        start, sources = self._checkpoint_to_resume(), read_sources(settings.data_config)
        model, folder, self.base = build_model(settings)
        vocabulary = Vocabulary.from_folder(folder, model.config)
        longest = settings.max_seq_len if settings.overlong == "drop" else 0
        self.dataset = TokenDataset(sources, vocabulary, settings.seed, longest)
        self.dataset.check(settings.max_seq_len)
        size = BatchSize(settings.batch_size, settings.max_tokens, settings.pad_multiple, settings.pack)
        size.check(int(self.dataset.lengths.max()))
        longer = self.dataset.lengths.max() > model.config.max_position_embeddings
        if longer and not model.config.rope_scaling:  # the export is to draw what it has seen
            model.config = replace(model.config, max_position_embeddings=settings.max_seq_len)
        self.feed = Feed(self.dataset, size, settings.accum_iter, processes.rank, processes.world)
        choose_trained(model, settings)
        self.frozen = base.frozen(model)
        self.module = LossModel(model, settings.z_loss_weight, settings.tail_weight)
        self.model = model.train()
        if settings.compile:
            self.module.compile_parts()
        place(self.module, processes, settings.cpu_offload, settings.precision == "bf16")
        self.optimizers = build_optimizers(model, settings)
        self.ema = Ema(model, settings.ema) if settings.ema else None
        self.guard = Guard(settings.on_nonfinite, settings.spike, self.output_dir, processes.first)
        self.peak_flops = processes.world * peak_flops(processes.device, settings.peak_tflops)
        self.saver = Saver(self.output_dir, processes, settings.keep_checkpoints, settings.save_beside)
        self.sampler = Sampler(settings, folder, model, vocabulary, processes) if settings.sample_every else None
        self.at, self.elapsed, self.tokens = 0, 0.0, 0
        self.stop, self.leave = 0, False  # the signal that came here; whether one came anywhere
        self.start, self.tokenizer_folder = start, folder
        if start is not None:
            self._resume(start)
        self.metrics = Metrics(self.output_dir, self.at, self.progress, processes.first, settings.tensorboard)

    # -- position ------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Fraction of the run that has passed."""
        settings = self.settings
        if settings.max_minutes:
            return self.elapsed / (60 * settings.max_minutes)
        return self.at / settings.max_steps if settings.max_steps else self.feed.epochs / settings.epochs

    def _checkpoint_to_resume(self) -> Path | None:
        """Raises: InputError: the folder holds a run, and nothing says to go on with it; or another run is named."""
        self.newest = found = checkpoint.newest(self.output_dir)
        if self.settings.resume not in ("", "auto"):
            chosen = Path(self.settings.resume)
            if not chosen.is_dir():
                raise InputError(f"--resume must be auto or the folder of a checkpoint, got {chosen}; it lies in "
                                 "OUTPUT_DIR/checkpoints")  # fmt: skip
            if found is not None and not lineage.belongs(chosen, self.output_dir):
                raise InputError(f"--resume {chosen} is not one of the checkpoints of --output_dir {self.output_dir}, "
                                 f"which holds a run of its own ({found.name}); --resume auto goes on with that, "
                                 "another --output_dir begins with the other")  # fmt: skip
            return chosen
        if found is not None and not self.settings.resume:
            raise InputError(f"--output_dir {self.output_dir} holds a run already ({found.name}); --resume auto goes "
                             "on with it, another folder starts anew")  # fmt: skip
        return found

    def _identity(self) -> dict:
        """What must be the same for a position to mean the same data, and the weights the same model."""
        names = ("seed", "batch_size", "max_tokens", "pad_multiple", "pack", "optimizer", "lora_rank",
                 "lora_alpha", "freeze_embeddings")  # fmt: skip
        model = asdict(self.model.config) | {"dropout": 0, "z_loss_weight": 0}
        return {name: getattr(self.settings, name) for name in names} | {
            "data_config": self.dataset.fingerprint(), "ema": self.ema is not None, "model_config": model,
            "frozen": self.frozen,
        }  # fmt: skip

    def _state(self) -> dict:
        return {
            "step": self.at, "epoch": self.feed.epoch, "done": self.feed.done, "elapsed": self.elapsed,
            "tokens": self.tokens, "ema": self.ema.updates if self.ema else 0, "world": self.processes.world,
            "guard": self.guard.state(), "identity": self._identity(), "model": asdict(self.model.config),
            "settings": base.lasting(self.settings), "base": self.base,
        }  # fmt: skip

    def _resume(self, path: Path) -> None:
        state = checkpoint.verified_state(path, self.processes)
        mine, its = self._identity(), state["identity"]
        its = {field.name: field.default for field in fields(Settings)} | its  # options younger than the checkpoint
        wanted = its.get("frozen")
        if self.frozen and not wanted and self.processes.first:
            logger.warning("%s does not say what its frozen weights were: they cannot be compared", path)
        differs = [f"--{key} (was {its.get(key)})" for key in mine if key != "frozen" and its.get(key) != mine[key]]
        if differs:
            raise InputError(f"--resume {path} is of a run with another {', '.join(differs)}; use the same, or a new "
                             "--output_dir")  # fmt: skip
        base.check(self.frozen, wanted, f"--init_from {self.settings.init_from}")
        if lineage.belongs(path, self.output_dir) and lineage.step_of(path.resolve()) != state["step"]:
            raise InputError(f"{path} holds step {state['step']}, which is not its name; give an "
                             "unmodified checkpoint")  # fmt: skip
        checkpoint.load(path, self.model, self.optimizers, self.ema, self.processes)
        self.at, self.elapsed, self.tokens = state["step"], state["elapsed"], state["tokens"]
        self.feed.epoch, self.feed.done = state["epoch"], state["done"]
        if self.feed.done >= len(self.feed.plan):
            raise InputError(f"{path}: 'done' must be below the {len(self.feed.plan)} batches of an epoch, got "
                             f"{self.feed.done}; remove the checkpoint to go on from the one before")  # fmt: skip
        self.guard.load(state.get("guard", {}))
        if self.ema:
            self.ema.updates = state["ema"]

    def save(self) -> None:
        self.saver.save(checkpoint.tensors_of(self.model, self.optimizers, self.ema), self._state())

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Trains to the end, or until a signal; a checkpoint is written either way. Returns the signal, or 0.

        Raises:
            InputError: a step is bad by rule (see Guard), or data or disk fail; the last checkpoint is whole then. Or
                another run is at work in the folder.
        """
        alone = alone_in(self.output_dir, "--output_dir") if self.processes.first else contextlib.nullcontext()
        with alone, self._signals():
            self.saver.begin(self.start, self.newest)
            if self.processes.first:  # only now: a refused run leaves what is there in place
                checkpoint.keep_companions(self.tokenizer_folder, self.output_dir)
            self.metrics.begin(self.at)
            self.guard.begin()
            try:
                self._loop()
            except InputError:
                with contextlib.suppress(InputError):  # one error is enough
                    self.saver.finish()
                raise
            finally:
                self.metrics.close()
        return self.stop or (signal.SIGTERM if self.leave else 0)

    def _loop(self) -> None:
        settings, began = self.settings, time.monotonic() - self.elapsed
        saved_at, saved_elapsed = self.at, self.elapsed
        if self.sampler and not self.at:
            self.metrics.pictures(0, self.sampler.draw(0))
        while self.progress < 1 and not self.leave:
            self._step(began)
            if self.sampler and not self.at % settings.sample_every:
                self.metrics.pictures(self.at, self.sampler.draw(self.at))
            due = settings.save_iteration_interval and self.at - saved_at >= settings.save_iteration_interval
            due = due or settings.save_minutes and self.elapsed - saved_elapsed >= 60 * settings.save_minutes
            if due and self.progress < 1 and not self.leave:
                self.metrics.flush()
                self.save()
                saved_at, saved_elapsed = self.at, self.elapsed
        if self.at != saved_at:
            self.metrics.flush()
            self.save()
        self.saver.finish()

    def _step(self, began: float) -> None:
        started, settings, processes = time.monotonic(), self.settings, self.processes
        factor = schedule(self.progress, settings.warmup, settings.min_lr / settings.lr)
        set_lr(self.optimizers, factor)
        # Random numbers are a function of the step: nothing of them needs to be kept for a resumed run to be the same.
        torch.manual_seed(seed_of(settings.seed, "step", self.at, processes.rank))
        batches = self.feed.next_step()
        if settings.code_noise:
            codes, rates = self.dataset.vocabulary.code_slice, (settings.code_noise, settings.spare_panel)
            batches = [replace(b, ids=corrupt(b.ids, codes, *rates)) for b in batches]
        counts = [(b.labelled, b.tokens, batch_flops(self.model.config, b)) for b in batches]
        labelled, tokens, flops = processes.sum(*map(sum, zip(*counts, strict=True)))
        losses = [self._backward(batch, max(1.0, labelled)) for batch in batches]
        norm = clip_gradients(self.module, settings.clip_grad)
        elapsed = time.monotonic() - began if processes.first else 0.0
        sums = *(sum(loss) for loss in zip(*losses, strict=True)), self.stop, self.saver.poll(), elapsed
        cross, z, stop, failed, elapsed = processes.sum(*sums)
        if failed:  # on all processes alike
            self.saver.finish()
        loss, z = cross / max(1.0, labelled), z / max(1.0, labelled)
        fault = self.guard.fault(loss + settings.z_loss_weight * z, norm)
        if fault:
            self.guard.refuse(self.at + 1, fault, [self.dataset.locate(sample) for sample in self.feed.samples])
        else:
            self._update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.at, self.tokens, self.elapsed = self.at + 1, self.tokens + int(tokens), elapsed
        # Processes leave the loop together, at the step where the sum has told all of them.
        self.leave = stop > 0
        seconds = time.monotonic() - started
        self.metrics.step({
            "step": self.at, "epoch": round(self.feed.epochs, 4), "progress": self.progress, "loss": loss, "z_loss": z,
            "grad_norm": norm, "lr": settings.lr * factor, "tokens": self.tokens, "elapsed": round(elapsed, 3),
            "tokens_per_second": tokens / seconds,
        } | ({"peak_share": flops / seconds / self.peak_flops} if self.peak_flops else {})
          | ({"skipped": fault} if fault else {}))  # fmt: skip

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema:
            self.ema.update(self.model)

    def _backward(self, batch: MicroBatch, labelled: float) -> tuple[float, float]:
        """Adds this micro-batch's share of the gradient of the mean over all labels of the step, wherever they lie."""
        device, settings = self.processes.device, self.settings
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        with autocast:
            parts = (part.to(device) for part in (batch.ids, batch.index, batch.targets))
            total, cross, z = self.module(*parts, batch.documents)
        # FSDP averages gradients over the processes; the sum is wanted.
        (total * (self.processes.world / labelled)).backward()
        return cross.item(), z.item()

    @contextlib.contextmanager
    def _signals(self):
        """Ctrl-C, SIGTERM and SIGHUP end the run after the step at hand; a second one ends it at once.

        Not a second SIGHUP: at the end of a terminal both the kernel and the shell send it. One that was ignored before
        (`nohup`) stays ignored.
        """
        handlers, hangup = {}, getattr(signal, "SIGHUP", None)  # None on Windows

        def note(number, frame) -> None:
            if self.stop and number != hangup:
                raise KeyboardInterrupt
            self.stop = self.stop or number

        for number in filter(None, (signal.SIGINT, signal.SIGTERM, hangup)):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller has the signals
                if number != hangup or signal.getsignal(number) != signal.SIG_IGN:
                    handlers[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
