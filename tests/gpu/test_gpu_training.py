"""Training as on a GPU: how often the host waits, and which device each process takes."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pretend_gpu import pretend
from safetensors.torch import load_file
from training_runs import ONE, changed, metrics_of

from lumina_mgpt.errors import InputError
from lumina_mgpt.training import distributed, loss
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.image_tokenizer import ImageTokenizerTrainer, MoVQGANTrainingConfig, Pictures, export
from lumina_mgpt.training.sample_images import SampleImages
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.vqgan.model import VQGAN, VQGANConfig

PACKAGE = "lumina_mgpt/"
VARIANTS = [
    pytest.param(dict(optimizer="muon", ema=0.99, checkpointing=True), id="Muon and checkpointing"),
    pytest.param(dict(lora_rank=4), id="adapters", marks=pytest.mark.slow),
    pytest.param({}, id="AdamW", marks=pytest.mark.slow),
    pytest.param(dict(batch_size=0, max_tokens=200, pack=True), id="packed", marks=pytest.mark.slow),
    pytest.param(dict(freeze_embeddings=True), id="frozen embeddings", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_the_host_waits_once_a_step(settings, options):
    """For the losses and the norm, which decide whether the gradient is used. Every upload is pinned, none waits."""
    if "lora_rank" in options:
        pytest.importorskip("peft")  # before torch.cuda is replaced
    run = changed(settings, device="cuda", precision="bf16", accum_iter=2, max_steps=2, **options)
    with pretend(PACKAGE, "h100") as seen:
        trainer = Trainer(run, Processes.start("cuda"))
        step, waits, uploads = trainer._step, [], []

        def counted(began: float) -> None:
            seen.reset()
            step(began)
            waits.append(dict(seen.syncs))
            uploads.append(sum(n for (kind, *_), n in seen.copies.items() if kind == "pinned"))

        trainer._step = counted
        trainer.run()
    assert [sum(count.values()) for count in waits] == [1, 1], waits
    assert uploads == [6, 6], "ids, positions of labels and labels of two micro-batches"


@pytest.mark.parametrize("few", [False, pytest.param(True, marks=pytest.mark.slow)], ids="loss in parts: {}".format)
def test_losses_are_those_of_a_cpu(settings, tmp_path, monkeypatch, few):
    if few:
        monkeypatch.setattr(loss, "WHOLE_LOGITS", 0)
        monkeypatch.setattr(loss, "SUM_LOGITS", 10_000)
    on_cpu = changed(settings, dropout=0.0, max_steps=3, accum_iter=2)
    on_gpu = changed(on_cpu, device="cuda", output_dir=str(tmp_path / "gpu"))
    Trainer(on_cpu, ONE).run()
    with pretend(PACKAGE, "h100"):
        Trainer(on_gpu, Processes.start("cuda")).run()
    for one, other in zip(metrics_of(on_cpu.output_dir), metrics_of(on_gpu.output_dir), strict=True):
        assert [one[key] for key in ("loss", "z_loss", "grad_norm")] == pytest.approx(
            [other[key] for key in ("loss", "z_loss", "grad_norm")], rel=1e-5
        )


def test_a_bad_step_is_left_out_on_a_gpu(settings, monkeypatch):
    """The guard sees the loss before the optimizers run, although it is read only once."""
    run = changed(settings, device="cuda", max_steps=3, on_nonfinite="skip")
    with pretend(PACKAGE, "h100"):
        trainer = Trainer(run, Processes.start("cuda"))
        backward, update, updates = trainer._backward, trainer._update, []

        def damaged(batch, labelled):
            cross, z = backward(batch, labelled)
            return (cross * torch.nan if trainer.at == 1 else cross), z

        monkeypatch.setattr(trainer, "_backward", damaged)
        monkeypatch.setattr(trainer, "_update", lambda: (updates.append(trainer.at), update()))
        trainer.run()
    assert updates == [0, 2] and "skipped" in metrics_of(run.output_dir)[1]


@pytest.mark.parametrize("local", [0, 1])
def test_each_process_takes_its_own_gpu(monkeypatch, local):
    joined, chosen = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: joined.append((backend, timeout)))
    variables = dict(RANK=2 + local, LOCAL_RANK=local, WORLD_SIZE=4, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pretend(PACKAGE, "h100", count=2):
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        processes = Processes.start("auto")
        assert processes == Processes(2 + local, 4, torch.device("cuda", local)) and chosen == [processes.device]
        assert joined == [("cpu:gloo,cuda:nccl", distributed.TIMEOUT)]
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(InputError, match="LOCAL_RANK must be below 2, the number of GPUs"):
            Processes.start("auto")


def test_offload_uses_the_named_gpu(monkeypatch):
    """Bug: FSDP puts shards on torch's current GPU, which was the first one."""
    chosen = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with pretend(PACKAGE, "h100", count=2):
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        Processes.start("cuda", cpu_offload=True)
        assert not chosen
        assert Processes.start("cuda:1", cpu_offload=True).device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]


def test_samples_come_from_the_own_gpu_and_wait_for_a_day(settings, tiny_checkpoint, vocabulary, monkeypatch):
    """The second of two processes: its share of the five prompts, a bf16 copy, and a group with its own timeout."""
    groups, places, generated = [], [], []
    monkeypatch.setattr(dist, "new_group", lambda **options: groups.append(options))
    with pretend(PACKAGE, "h100", count=2):
        model = Trainer(changed(settings, device="cuda"), Processes.start("cuda")).model
        samples = SampleImages(settings, tiny_checkpoint, model, vocabulary, Processes(1, 2, torch.device("cuda", 1)))
        monkeypatch.setattr(
            "lumina_mgpt.training.sample_images.plain_copy",
            lambda model, dtype, device, keep: places.append((dtype, device, keep)),
        )

        class Stub:
            def __init__(self, *parts):
                pass

            def generate(self, prompts, *size, **settings):
                generated.extend(prompts)
                return []

        monkeypatch.setattr("lumina_mgpt.training.sample_images.Pipeline", Stub)
        samples._generate()
    assert generated == samples.prompts[1::2] and len(samples.prompts) == 5
    assert places == [(torch.bfloat16, torch.device("cuda", 1), True)]
    assert groups == [{"backend": "gloo", "timeout": timedelta(days=1)}]


@pytest.mark.parametrize("decoder_alone", [True, False])
def test_image_tokenizers_train_as_on_a_cpu(tmp_path, monkeypatch, decoder_alone):
    """The losses are the same, also after codes have begun and moved; with `decoder_of`, only the decoder changes."""
    monkeypatch.setattr("time.monotonic", lambda: 0.0)  # the learning rate follows the clock
    torch.manual_seed(0)
    config = VQGANConfig(ch=32, blocks=1, mult=(1, 1), num_codes=16, attention_levels=(1,))
    export(VQGAN(config), tmp_path / "start.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    settings = MoVQGANTrainingConfig(
        minutes=1e6, pixels=2 * 32 * 32, continuous_steps=1, warmup_steps=1, revive_every=2, lr=3e-3
    )
    if decoder_alone:
        settings = replace(settings, decoder_of=str(tmp_path / "start.safetensors"))

    def trained(device: str) -> list[float]:
        pictures, out = Pictures({tmp_path: 1.0}), tmp_path / device
        trainer = ImageTokenizerTrainer(config, replace(settings, device=torch.device(device)), pictures, out)
        losses = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            trainer._start_codes(generator)
            batch = pictures.batch(np.random.default_rng(step), settings.pixels)
            losses.append(trainer._train_step(batch, generator)[0])
            trainer.step += 1
        assert trainer.quantizing
        trainer.save()
        return losses

    expected = trained("cpu")
    with pretend(PACKAGE, "h100"):
        got = trained("cuda")
    assert got == pytest.approx(expected, rel=0.02)
    assert max(got) > 1.04 * min(got)  # the weights move
    start, end = (load_file(tmp_path / name) for name in ("start.safetensors", "cuda/movqgan.safetensors"))
    changed_parts = {name.split(".")[0] for name, weight in end.items() if not torch.equal(weight, start[name])}
    others = set() if decoder_alone else {"encoder", "quant_conv", "quantize"}
    assert changed_parts == {"decoder", "post_quant_conv"} | others
