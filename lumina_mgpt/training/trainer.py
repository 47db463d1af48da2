"""Runs the training loop, in the same way on one process and on many."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import BatchSize, Feed, MicroBatch, corrupt
from lumina_mgpt.data.dataset import CONTEXT_DROPOUT, TokenDataset
from lumina_mgpt.data.seeding import seed_of
from lumina_mgpt.data.sources import read_sources, require_known_panels
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import alone_in
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import base, identity, loading, run_folder
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.distributed import Processes, clip_gradients, place, read
from lumina_mgpt.training.export import keep_companions
from lumina_mgpt.training.guard import Guard
from lumina_mgpt.training.loading import build_model
from lumina_mgpt.training.loss import LossModel
from lumina_mgpt.training.metrics import Metrics, batch_flops, peak_flops
from lumina_mgpt.training.optimizer import Ema, build_optimizers, schedule, set_lr, use_sparse_embedding
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.sample_images import SampleImages
from lumina_mgpt.training.saver import Saver
from lumina_mgpt.training.tensors import tensors_of
from lumina_mgpt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model in one run. Construct it on every process, then call `run`.

    Raises:
        InputError: settings, data or checkpoint cannot be used. Nothing has been trained then.
    """

    context_dropout = CONTEXT_DROPOUT
    measured = "loss", "z_loss"  # names in the metrics of what `module` returns after the loss to minimize

    def __init__(self, settings: TrainingConfig, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        if settings.logging.sample_prompts and not settings.logging.sample_every:
            raise InputError("needs sample_every=N, the steps between the pictures", "sample_prompts")
        self.output_dir = Path(settings.output_dir)
        if settings.runtime.threads:
            torch.set_num_threads(settings.runtime.threads)
        self.start, sources = self._checkpoint_to_resume(), self._read_sources()
        # The other processes get the weights in `place`: only the first holds a whole copy in the CPU's memory.
        with processes.together("load the model"):
            model, self.tokenizer_folder, self.base = build_model(settings, weights=processes.first)
        vocabulary = Vocabulary.from_folder(self.tokenizer_folder, model.config)
        self.dataset, self.feed = self._read_data(sources, vocabulary, model.config)
        longer = self.dataset.lengths.max() > model.config.context
        if longer and not model.config.rope_scaling:  # the exported model must accept the lengths it was trained on
            model.config = replace(model.config, max_position_embeddings=settings.data.max_seq_len)
        self._prepare_model(model)
        self.at, self.elapsed, self.tokens = 0, 0.0, 0
        # `stop`: the signal that this process received. `leave`: whether any process received one.
        self.stop, self.leave = 0, False
        optimizer, logs, checkpoints = settings.optimizer, settings.logging, settings.checkpoints
        self.guard = Guard(optimizer.on_nonfinite, optimizer.spike, self.output_dir, processes.first)
        self.peak_flops = processes.world * peak_flops(processes.device, logs.peak_tflops)
        self.saver = Saver(self.output_dir, processes, checkpoints.keep_checkpoints, checkpoints.save_beside)
        self.samples = None
        if logs.sample_every:
            self.samples = self._sample_images(model, vocabulary)
        if self.start is not None:
            self._resume(self.start)
        self.metrics = Metrics(self.output_dir, self.at, self.progress, processes.first, logs.tensorboard)

    # -- what a training of another kind replaces ----------------------------------------------------------------------

    def _read_sources(self) -> list:
        """Returns what `_read_data` reads. It is checked before the model is loaded."""
        return read_sources(self.settings.data.data_config)

    def _sample_images(self, model: Transformer, vocabulary: Vocabulary) -> SampleImages:
        return SampleImages(self.settings, self.tokenizer_folder, model, vocabulary, self.processes)

    def _read_data(self, sources: list, vocabulary: Vocabulary, config: ModelConfig) -> tuple[Any, Any]:
        """Returns the data, and the feed, whose position is part of a checkpoint."""
        data, processes = self.settings.data, self.processes
        require_known_panels(sources, config.family)
        longest = data.max_seq_len if data.overlong == "drop" else 0
        seed, several = self.settings.runtime.seed, config.family.drops_earlier_images
        dataset = TokenDataset(sources, vocabulary, seed, longest, several, self.context_dropout)
        dataset.check(data.max_seq_len)
        size = BatchSize(data.batch_size, data.max_tokens, data.pad_multiple, data.pack)
        size.check(int(dataset.lengths.max()))
        return dataset, Feed(dataset, size, data.accum_iter, processes.rank, processes.world)

    def _prepare_model(self, model: Transformer) -> None:
        """Freezes, compiles and places the model, and makes its optimizers."""
        settings, runtime = self.settings, self.settings.runtime
        module = self._make_module(model)
        choose_trained(model, settings.model, settings.runtime.seed)
        self.frozen = self.processes.of_first(base.frozen(model) if self.processes.first else None)
        self.module = module
        self.model = model.train()
        if runtime.compile:
            self.module.compile_parts()
        place(self.module, self.processes, runtime.cpu_offload, runtime.precision == "bf16")
        use_sparse_embedding(model)
        self.optimizers = build_optimizers(model, settings.optimizer)
        self.ema = Ema(model, settings.regularization.ema) if settings.regularization.ema else None

    def _make_module(self, model: Transformer) -> LossModel:
        """Returns the module that computes the loss. The weights of `model` are those that the run starts from."""
        regularization = self.settings.regularization
        return LossModel(model, regularization.z_loss_weight, regularization.tail_weight)

    # -- position ------------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Fraction of the run that has passed."""
        length = self.settings.schedule
        if length.max_minutes:
            return self.elapsed / (60 * length.max_minutes)
        return self.at / length.max_steps if length.max_steps else self.feed.epochs / length.epochs

    def _checkpoint_to_resume(self) -> Path | None:
        """Returns the checkpoint that `resume` names, None for a new run.

        Raises:
            InputError: the folder holds a run and `resume` is empty, or it names a checkpoint of another run.
        """
        resume = self.settings.checkpoints.resume
        self.newest = found = run_folder.newest(self.output_dir)
        if resume not in ("", "auto"):
            chosen = Path(resume)
            if not chosen.is_dir():
                raise InputError(
                    f"must be auto or the folder of a checkpoint, got {chosen}; it is in OUTPUT_DIR/checkpoints",
                    "resume",
                )
            if found is not None and not run_folder.belongs(chosen, self.output_dir):
                raise InputError(
                    f"{chosen} is not one of the checkpoints of output_dir={self.output_dir}, which holds another run "
                    f"({found.name}); use resume=auto to go on with that run, or another output folder",
                    "resume",
                )
            return chosen
        if found is not None and not resume:
            raise InputError(
                f"{self.output_dir} holds a run already ({found.name}); use resume=auto to go on with it, or another "
                "folder",
                "output_dir",
            )
        return found

    def _identity(self) -> dict:
        return identity.of(self.settings, self.model.config, self.dataset.fingerprint(), self.frozen)

    def _state(self) -> dict:
        return {
            "step": self.at,
            "epoch": self.feed.epoch,
            "done": self.feed.done,
            "elapsed": self.elapsed,
            "tokens": self.tokens,
            "ema": self.ema.updates if self.ema else 0,
            "world": self.processes.world,
            "guard": self.guard.state(),
            "identity": self._identity(),
            "model": asdict(self.model.config),
            "settings": base.lasting(self.settings),
            "base": self.base,
        }

    def _resume(self, path: Path) -> None:
        state = loading.verified_state(path, self.processes)
        self._check_identity(path, state["identity"])
        if run_folder.belongs(path, self.output_dir) and run_folder.step_of(path.resolve()) != state["step"]:
            raise InputError(f"{path} holds step {state['step']}, which is not its name; give an unmodified checkpoint")
        loading.load(path, self.model, self.optimizers, self.ema, self.processes)
        self.at, self.elapsed, self.tokens = state["step"], state["elapsed"], state["tokens"]
        self.feed.epoch, self.feed.done = state["epoch"], state["done"]
        if self.feed.done >= len(self.feed.plan):
            raise InputError(
                f"{path}: 'done' must be below the {len(self.feed.plan)} batches of an epoch, got {self.feed.done}; "
                "remove the checkpoint to go on from the one before"
            )
        self.guard.load(state.get("guard", {}))
        if self.ema:
            self.ema.updates = state["ema"]

    def _check_identity(self, path: Path, stored: dict) -> None:
        """Raises InputError if the checkpoint is of a run with other data, weights or options."""
        wanted = stored.get("frozen")
        if self.frozen and not wanted and self.processes.first:
            logger.warning("%s does not say what its frozen weights were: they cannot be compared", path)
        identity.require_same(path, stored, self._identity())
        base.check(self.frozen, wanted, self.settings.model.init_from)

    def save(self) -> None:
        """Writes a checkpoint of the current step.

        Raises:
            InputError: this or the previous checkpoint cannot be written. Earlier checkpoints are complete.
        """
        self.saver.save(tensors_of(self.model, self.optimizers, self.ema), self._state())

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Trains to the end or until a signal arrives, then writes a checkpoint. Returns the signal's number, or 0.

        Raises:
            InputError: Guard refuses a step, data cannot be read, the disk fails, or another run uses the folder. The
                checkpoints that are already written are complete.
        """
        alone = alone_in(self.output_dir, "output_dir") if self.processes.first else contextlib.nullcontext()
        with alone, self._signals():
            self.saver.begin(self.start, self.newest)
            if self.processes.first:  # not earlier: a run that is refused must not change the folder
                keep_companions(self.tokenizer_folder, self.output_dir)
            self.metrics.begin(self.at)
            self.guard.begin()
            try:
                self._loop()
            except InputError:
                with contextlib.suppress(InputError):  # report the first error only
                    self.saver.finish()
                raise
            finally:
                self.metrics.close()
        return self.stop or (signal.SIGTERM if self.leave else 0)

    def _loop(self) -> None:
        began = time.monotonic() - self.elapsed
        saved_at, saved_elapsed = self.at, self.elapsed
        if self.samples and not self.at:
            self.metrics.pictures(0, self.samples.draw(0))
        while self.progress < 1 and not self.leave:
            self._step(began)
            if self.samples and not self.at % self.settings.logging.sample_every:
                self.metrics.pictures(self.at, self.samples.draw(self.at))
            if self._due(saved_at, saved_elapsed) and self.progress < 1 and not self.leave:
                self.metrics.flush()
                self.save()
                saved_at, saved_elapsed = self.at, self.elapsed
        if self.at != saved_at:
            self.metrics.flush()
            self.save()
        self.saver.finish()

    def _due(self, saved_at: int, saved_elapsed: float) -> bool:
        """Returns whether a checkpoint is due, by steps or by minutes."""
        options = self.settings.checkpoints
        by_steps = options.save_iteration_interval and self.at - saved_at >= options.save_iteration_interval
        by_time = options.save_minutes and self.elapsed - saved_elapsed >= 60 * options.save_minutes
        return bool(by_steps or by_time)

    def _step(self, began: float) -> None:
        """One step: batches, gradient, guard, update, metrics. `began` is the clock at elapsed time 0."""
        started, processes = time.monotonic(), self.processes
        rate = self._set_learning_rate()
        batches = self._next_batches()
        counts = [(batch.labelled, batch.tokens, batch_flops(self.model.config, batch)) for batch in batches]
        labelled, tokens, flops = processes.sum(*map(sum, zip(*counts, strict=True)))
        losses = [part for batch in batches for part in self._backward(batch, max(1.0, labelled))]
        clipped = clip_gradients(self.module, self.settings.optimizer.clip_grad)
        *parts, norm = read(processes.device, *losses, clipped)  # the only time that the host waits for a GPU
        cross, z = self._agree(began, sum(parts[::2]), sum(parts[1::2]))
        loss, z = cross / max(1.0, labelled), z / max(1.0, labelled)
        fault = self._update_unless_bad(loss + self.settings.regularization.z_loss_weight * z, norm)
        self.at, self.tokens = self.at + 1, self.tokens + int(tokens)
        seconds = time.monotonic() - started
        row = {
            "step": self.at,
            "epoch": round(self.feed.epochs, 4),
            "progress": self.progress,
            **dict(zip(self.measured, (loss, z), strict=True)),
            "grad_norm": norm,
            "lr": rate,
            "tokens": self.tokens,
            "elapsed": round(self.elapsed, 3),
            "tokens_per_second": tokens / seconds,
        }
        if self.peak_flops:
            row["peak_share"] = flops / seconds / self.peak_flops
        self.metrics.step(row | ({"skipped": fault} if fault else {}))

    def _agree(self, began: float, *values: float) -> list[float]:
        """Returns the sums of values over all processes; sets `elapsed`, and `leave` if a process received a signal.

        The sums are the same everywhere: all processes leave the loop after the same step.

        Args:
            began: clock at elapsed time 0.

        Raises:
            InputError: a checkpoint cannot be written.
        """
        elapsed = time.monotonic() - began if self.processes.first else 0.0
        *sums, stop, failed, self.elapsed = self.processes.sum(*values, self.stop, self.saver.poll(), elapsed)
        if failed:  # on every process; raises the error on the one that writes
            self.saver.finish()
        self.leave = stop > 0
        return sums

    def _update_unless_bad(self, loss: float, norm: float) -> str | None:
        """Applies the gradients and clears them, if the guard accepts them. Returns why it does not, or None."""
        fault = self.guard.fault(loss, norm)
        if fault:
            self.guard.refuse(self.at + 1, fault, self._located())
        else:
            self._update()
        self.module.zero_grad()
        return fault

    def _located(self) -> list[dict]:
        """Returns the records of this step, for the file of bad steps."""
        return [self.dataset.locate(sample) for sample in self.feed.samples]

    def _set_learning_rate(self) -> float:
        """Sets the learning rates of this step; returns that of AdamW."""
        options = self.settings.optimizer
        factor = schedule(self.progress, self.settings.schedule.warmup, options.min_lr / options.lr)
        set_lr(self.optimizers, factor)
        return options.lr * factor

    def _next_batches(self) -> list[MicroBatch]:
        """Returns the micro-batches of this step, with noise in their codes.

        Random numbers depend on seed, step and process only, so that a resumed run needs no stored generator.
        """
        torch.manual_seed(seed_of(self.settings.runtime.seed, "step", self.at, self.processes.rank))
        batches, noise = self.feed.next_step(), self.settings.regularization
        if noise.code_noise:
            codes, rates = self.dataset.vocabulary.code_slice, (noise.code_noise, noise.spare_panel)
            batches = [replace(batch, ids=corrupt(batch.ids, codes, *rates, batch.unlabelled)) for batch in batches]
        return batches

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema:
            self.ema.update(self.model)

    def _backward(self, batch: MicroBatch, labelled: float) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one micro-batch; returns its sums of cross-entropy and z-loss, on the device.

        Args:
            labelled: number of labels of the step, over all micro-batches and processes; the loss is their mean.
        """
        kind, narrow = self.processes.device.type, self.settings.runtime.precision == "bf16"
        with torch.autocast(kind, torch.bfloat16, enabled=narrow):
            total, cross, z = self._losses(batch)
        # FSDP averages gradients over the processes; the factor `world` makes that a sum.
        (total * (self.processes.world / labelled)).backward()
        return cross, z

    def _losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss of a micro-batch to minimize and its parts, all three as sums over the labels."""
        return self.module(*self.processes.upload(batch.ids, batch.index, batch.targets), batch.documents)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP end the run after the current step; a second one raises KeyboardInterrupt.

        A second SIGHUP does not: when a terminal closes, both the kernel and the shell send it. If SIGHUP was ignored
        before (`nohup`), it stays ignored.
        """
        handlers = {}
        hangup = getattr(signal, "SIGHUP", None)  # None on Windows

        def note(number, frame) -> None:
            if self.stop and number != hangup:
                raise KeyboardInterrupt
            self.stop = self.stop or number

        for number in filter(None, (signal.SIGINT, signal.SIGTERM, hangup)):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                if number != hangup or signal.getsignal(number) != signal.SIG_IGN:
                    handlers[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
