"""What the package chooses on a GPU: its number format, batch sizes, convolutions, and the device of each process."""

from dataclasses import replace

import pytest
import torch
from commands import ROOT, main_of
from PIL import Image
from pretend_gpu import pretend
from records import picture, write_records

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.data.image_codes import ImageCodes
from lumina_mgpt.data.inputs import read_input
from lumina_mgpt.data.job import PreTokenizeConfig
from lumina_mgpt.data.records import parse_record
from lumina_mgpt.devices import default_window, own_device, resolve_dtype
from lumina_mgpt.errors import InputError
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.unirep import ImageLayout
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer, full_precision

DEMO, PACKAGE = ROOT / "assets" / "demo", "lumina_mgpt/"
SEVEN_B = ModelConfig.from_yaml(ROOT / "configs" / "model" / "7B.yaml")


def captioned(path: str) -> dict:
    return {"image_path": path, "prompt": "noise"}


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", torch.float16), ("a100", torch.bfloat16), ("h100", torch.bfloat16)])
def test_auto_dtype_is_one_that_the_gpu_computes(gpu, dtype):
    """Bug: a T4 emulates bf16, which counted as support."""
    with pretend(PACKAGE, gpu):
        assert resolve_dtype("auto", torch.device("cuda"), SEVEN_B) == dtype


# Batches


@pytest.fixture(scope="module")
def demo() -> Pipeline:
    return Pipeline.from_pretrained(DEMO, "cpu")


@pytest.fixture
def seven_b(demo, monkeypatch) -> Pipeline:
    """A pipeline that takes itself for the 7B in bf16 on a GPU, with the released image tokenizer."""
    monkeypatch.setattr(demo, "checkpoint", replace(demo.checkpoint, config=SEVEN_B))
    monkeypatch.setattr(demo, "device", torch.device("cuda", 0))
    monkeypatch.setattr(demo, "cache_dtype", torch.bfloat16)
    monkeypatch.setattr(demo, "dtype", torch.bfloat16)
    tokenizer_config = replace(demo.image_tokenizer.model.config, ch=256)
    monkeypatch.setattr(demo.image_tokenizer.model, "config", tokenizer_config)
    return demo


@pytest.mark.parametrize(
    ("free", "settings", "speculation", "size"),
    [
        (60, SamplingConfig(), None, 5),
        (60, SamplingConfig(), Speculation("maximal", 64), 5),
        (60, SamplingConfig(cfg=1.0), None, 8),  # the limit; memory would hold 11
        (16, SamplingConfig(), None, 1),
        (3, SamplingConfig(), None, 1),  # never 0: the error of the allocation says what is missing
    ],
)
def test_batches_of_the_7b_fill_the_free_memory(seven_b, monkeypatch, free, settings, speculation, size):
    """Of 80 GiB, `free` GiB are free; a 768 x 768 image takes 9.2 GiB of cache with guidance, 4.6 without."""
    layout = ImageLayout(seven_b.checkpoint.vocabulary, 24, 24)
    with pretend(PACKAGE, "h100"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
        assert seven_b.batch_size(60, layout, settings, speculation) == size


def test_memory_that_torch_holds_in_its_cache_is_free(seven_b, monkeypatch):
    layout = ImageLayout(seven_b.checkpoint.vocabulary, 24, 24)
    with pretend(PACKAGE, "h100"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
        assert seven_b.batch_size(60, layout, SamplingConfig()) == 1
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 56 << 30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16 << 30)
        assert seven_b.batch_size(60, layout, SamplingConfig()) == 5


def test_default_windows_on_a_gpu():
    cuda = torch.device("cuda")
    assert (default_window(cuda, int4=False), default_window(cuda, int4=True)) == (64, 8)


def test_pictures_are_encoded_in_batches_that_fit(tiny_checkpoint, tmp_path, monkeypatch):
    """Five equal pictures, memory for two: batches of 2, 2 and 1, with the codes of a CPU."""
    paths = [picture(tmp_path / f"{n}.png", seed=n) for n in range(5)]
    file = tiny_checkpoint / "movqgan_270M.ckpt"
    expected = ImageTokenizer.from_checkpoint(file).encode([Image.open(path) for path in paths])
    with pretend(PACKAGE, "h100"):
        tokenizer = ImageTokenizer.from_checkpoint(file, "cuda")
        free = int(2.5 * tokenizer.working_bytes(64 * 64) / 0.9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
        encode, sizes = tokenizer.encode, []
        monkeypatch.setattr(tokenizer, "encode", lambda images: sizes.append(len(images)) or encode(images))
        source = read_input(write_records(tmp_path, [captioned(path) for path in paths]))
        records = [parse_record(row) for row in source.rows]
        codes = ImageCodes(tokenizer, PreTokenizeConfig(str(tmp_path), target_size=64), source, records)
        codes.encode(records)
        found = torch.stack([codes.of(one.images[0])[0] for one in records])
    assert sizes == [2, 2, 1] and torch.equal(found, expected)


# Convolutions


def test_codes_are_computed_without_tf32(tiny_checkpoint):
    """cuDNN's convolutions are full float32 within encode and decode, and the process's setting is unchanged."""
    convolutions, seen = torch.backends.cudnn.conv, []
    assert convolutions.fp32_precision == "tf32"
    with pretend(PACKAGE, "h100"):
        tokenizer = ImageTokenizer.from_checkpoint(tiny_checkpoint / "movqgan_270M.ckpt", "cuda")
        for part in (tokenizer.model.encoder.conv_in, tokenizer.model.decoder.conv_in):
            part.register_forward_pre_hook(lambda *_: seen.append(convolutions.fp32_precision))
        codes = tokenizer.encode([Image.new("RGB", (32, 32))])
        tokenizer.decode(codes)
        assert seen == ["ieee", "ieee"] and convolutions.fp32_precision == "tf32" and torch.backends.cudnn.allow_tf32
        with pytest.raises(ZeroDivisionError), full_precision(tokenizer.model):
            _ = 1 // 0
        assert convolutions.fp32_precision == "tf32"
    on_cpu = ImageTokenizer.from_checkpoint(tiny_checkpoint / "movqgan_270M.ckpt")
    with full_precision(on_cpu.model):
        assert convolutions.fp32_precision == "tf32", "a CPU has no such setting to change"


# Devices of several processes


def test_a_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    with pretend(PACKAGE, "h100", count=2):
        for local in (0, 1):
            monkeypatch.setenv("LOCAL_RANK", str(local))
            assert own_device("auto") == own_device("cuda") == torch.device("cuda", local)
        assert own_device("cpu") == torch.device("cpu")
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(InputError, match="cuda:2 needs a CUDA GPU, but .* finds 2"):
            own_device("auto")


@pytest.mark.parametrize("local", [0, 1])
def test_generation_on_several_gpus_loads_the_model_on_each(tmp_path, monkeypatch, local):
    loaded = []

    def load(args, checkpoint, device, *_):
        loaded.append(device)
        raise InputError("that is all")

    monkeypatch.setattr(cli, "load_pipeline", load)
    for variable, value in dict(RANK=local, LOCAL_RANK=local, WORLD_SIZE=2).items():
        monkeypatch.setenv(variable, str(value))
    with pretend(PACKAGE, "h100", count=2):
        line = ["--model_path", str(DEMO), "--prompt", "an owl", "-n", "2", "--save_path", str(tmp_path / "out")]
        assert main_of("generate")(line) == 2
    assert loaded == [torch.device("cuda", local)]


@pytest.mark.parametrize(("rank", "local", "name"), [(0, None, 0), (1, None, 1), (3, None, 1), (3, "0", 0)])
def test_ranks_of_pre_tokenization_take_gpus_in_turn(
    tiny_checkpoint, tmp_path, monkeypatch, caplog, capsys, rank, local, name
):
    """Bug: every rank took the first GPU. A launcher's choice has precedence, and so has an index in --device."""
    rows = write_records(tmp_path, [captioned(picture(tmp_path / "a.png"))] * 4)
    load, devices = ImageTokenizer.from_checkpoint, []
    monkeypatch.setattr(
        ImageTokenizer,
        "from_checkpoint",
        lambda path, device, *rest: devices.append(device) or load(path, device, *rest),
    )
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    caplog.set_level("INFO", "lumina_mgpt")
    options = ["--in_filename", rows, "--model_path", tiny_checkpoint, "--target_size", 64, "--splits", 4]
    with pretend(PACKAGE, "h100", count=2):
        line = [*options, "--rank", rank, "--out_dir", tmp_path / "out"]
        assert main_of("pre_tokenize")([str(word) for word in line]) == 0
        assert own_device("cuda:0", rank=1) == torch.device("cuda", 0)
    assert devices == [torch.device("cuda", name)]
    assert "1 records in" in capsys.readouterr().out
    assert f"rank {rank} of 4 encodes on cuda:{name}" in caplog.text
