"""The base checkpoint of a run, on the command line: where it is found, and whether it has changed."""

import json
import shutil
from pathlib import Path

import pytest
from commands import main_of, options_of
from safetensors.torch import load_file, save_file

from lumina_mgpt.model.reading import load_model
from lumina_mgpt.training.base import fingerprint

finetune, export = main_of("finetune"), main_of("export")


@pytest.fixture
def began(tokens, tiny_checkpoint, tmp_path, monkeypatch):
    """Trains one step in a folder, from a checkpoint named by a relative path; then another working folder is set."""

    def begin(*options: str, base: str = "base/tiny") -> Path:
        start = tmp_path / "start"
        if not start.exists():
            shutil.copytree(tiny_checkpoint, start / "base" / "tiny")
        monkeypatch.chdir(start)
        line = [
            "--data_config",
            str(tokens),
            "--output_dir",
            "../run",
            "--batch_size",
            "4",
            "--precision",
            "fp32",
            "--max_steps",
            "1",
            "--init_from",
            base,
            *options,
        ]
        assert finetune(line) == 0
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tmp_path / "run"

    return begin


def exchange(folder: Path, only: str = "") -> None:
    """Changes weights of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: value * 1.1 if only in name else value for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def test_export_from_another_folder_finds_base_and_image_tokenizer(began, tmp_path, capsys):
    """At b0c7d2f the export had no MoVQGAN, without a word; with frozen weights the hub was asked for `base/tiny`."""
    folder = began("--freeze_embeddings")
    assert export(["--output_dir", str(folder), "--save_path", "out"]) == 0
    assert (tmp_path / "elsewhere" / "out" / "movqgan_270M.ckpt").is_file()
    state = json.loads((folder / "checkpoints" / "step-00000001" / "trainer.json").read_text())
    assert state["settings"]["init_from"] == str(tmp_path / "start" / "base" / "tiny")
    assert "MoVQGAN" not in capsys.readouterr().err


def test_a_missing_companion_is_logged(began, tmp_path, capsys):
    folder = began()
    shutil.rmtree(folder / "tokenizer")
    (tmp_path / "start" / "base" / "tiny" / "movqgan_270M.ckpt").unlink()
    capsys.readouterr()
    assert export(["--output_dir", str(folder), "--save_path", "out"]) == 0
    said = capsys.readouterr().err
    assert "no MoVQGAN beside" in said and "holds no tokenizer" in said
    shutil.rmtree(tmp_path / "start")
    assert export(["--output_dir", str(folder), "--save_path", "again"]) == 0
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--freeze_embeddings"], ["--lora_rank", "2"]])
def test_a_changed_base_is_refused(began, tokens, tmp_path, capsys, options):
    """At b0c7d2f the run went on, and was exported, with the weights of another checkpoint."""
    if "--lora_rank" in options:
        pytest.importorskip("peft")
    folder, tiny = began(*options), tmp_path / "start" / "base" / "tiny"
    start = {"data_config": tokens, "output_dir": folder, "init_from": tiny}
    again = [*options_of(**start, batch_size=4, max_steps=2, resume="auto", precision="bf16"), *options]
    shutil.copytree(tiny, tmp_path / "original")
    exchange(tiny, only="embed_tokens")
    capsys.readouterr()
    assert finetune(again) == 2
    assert f"--init_from {tiny} holds other weights" in capsys.readouterr().err.splitlines()[-1]
    for more in [[], ["--adapter"]]:
        assert export(["--output_dir", str(folder), "--save_path", "out", *more]) == 2
        assert f"--init_from {tiny} holds other weights" in capsys.readouterr().err.splitlines()[-1]
    shutil.copy(tmp_path / "original" / "model.safetensors", tiny)
    if "--freeze_embeddings" in options:  # what is trained comes from the run's checkpoint, whatever the base holds
        exchange(tiny, only="q_proj")
    assert finetune(again) == 0  # in another precision, too
    assert export(["--output_dir", str(folder), "--save_path", "out"]) == 0


def test_an_adapter_is_not_merged_into_other_weights(began, tmp_path, capsys):
    """At b0c7d2f it was merged into any weights of the same shapes."""
    pytest.importorskip("peft")
    folder, tiny = began("--lora_rank", "2"), tmp_path / "start" / "base" / "tiny"
    assert export(["--output_dir", str(folder), "--save_path", "adapter", "--adapter"]) == 0
    merge = ["--model_path", str(tiny), "--adapter", "adapter", "--save_path"]
    assert main_of("merge_lora")([*merge, "merged"]) == 0
    exchange(tiny, only="down_proj")
    assert main_of("merge_lora")([*merge, "again"]) == 2
    assert f"--model_path {tiny} holds other weights" in capsys.readouterr().err and not Path("again").exists()


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(began, tokens, tmp_path, capsys):
    folder, tiny = began("--freeze_embeddings"), tmp_path / "start" / "base" / "tiny"
    checkpoint = folder / "checkpoints" / "step-00000001"
    (checkpoint / "SHA256SUMS").unlink()
    state = json.loads((checkpoint / "trainer.json").read_text())
    del state["base"], state["checksums"], state["identity"]["frozen"]
    state["settings"]["init_from"] = "base/tiny"
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert export(["--output_dir", str(folder), "--save_path", "out"]) == 2
    assert "a relative path holds in the folder where the run was started" in capsys.readouterr().err
    line = options_of(data_config=tokens, output_dir=folder, batch_size=4, max_steps=2, init_from=tiny, resume="auto")
    assert finetune([*line, "--freeze_embeddings"]) == 0
    assert "what its frozen weights were" in capsys.readouterr().err


def test_the_revision_of_a_hub_id_is_recorded(began, tiny_checkpoint, tmp_path, monkeypatch):
    """At b0c7d2f a run with frozen weights was exported with whatever the hub's main branch held by then."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--owner--tiny"
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_checkpoint, model / "snapshots" / revision)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    folder = began("--freeze_embeddings", base="owner/tiny")
    state = json.loads((folder / "checkpoints" / "step-00000001" / "trainer.json").read_text())
    assert (state["settings"]["init_from"], state["base"]["revision"]) == ("owner/tiny", "a" * 40)
    (model / "refs" / "main").write_text("b" * 40)
    exchange(model / "snapshots" / ("b" * 40))
    assert export(["--output_dir", str(folder), "--save_path", "out", "--dtype", "fp32"]) == 0
    name = "model.embed_tokens.weight"
    one, other = (load_file(path / "model.safetensors")[name] for path in (tiny_checkpoint, Path("out")))
    assert (one == other).all() and Path("out/movqgan_270M.ckpt").is_file()
    shutil.rmtree(model / "snapshots" / ("a" * 40))
    assert export(["--output_dir", str(folder), "--save_path", "again"]) == 2


def test_the_fingerprint_is_the_same_in_every_precision(tiny_checkpoint):
    import torch

    models = [load_model(tiny_checkpoint, dtype, "cpu") for dtype in (None, torch.float32, torch.bfloat16)]
    assert len({fingerprint(model.named_parameters()) for model in models}) == 1
    with torch.no_grad():
        models[0].layers[1].mlp.up_proj.weight[0, 0] += 0.1
    assert fingerprint(models[0].named_parameters()) != fingerprint(models[1].named_parameters())


# -- where an export goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["file", "file/below", "x" * 300])
@pytest.mark.parametrize("option", ["--export_dir", "--output_dir"])
def test_a_folder_that_no_export_can_use_is_refused_before_the_training(began, tmp_path, capsys, folder, option):
    """An --export_dir that is a file or has a too long name was noticed after the last step."""
    run = began()
    Path("file").write_text("")
    line = ["--data_config", str(tmp_path / "none.yaml"), "--init_from", str(tmp_path / "start" / "base" / "tiny")]
    values = {"--output_dir": str(run), option: folder}
    options = [part for pair in values.items() for part in pair]
    assert finetune([*line, "--batch_size", "4", "--max_steps", "2", "--resume", "auto", *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith(f"error: {option} {folder}"), error


@pytest.mark.parametrize("options", [[], ["--lora_rank", "2"]], ids=["whole", "adapters"])
def test_an_export_does_not_replace_the_weights_that_the_run_began_with(began, tmp_path, capsys, options):
    """`--export_dir` with the folder of `--init_from` overwrote the user's checkpoint."""
    base = tmp_path / "start" / "base" / "tiny"
    run = began(*options)
    before = (base / "model.safetensors").read_bytes()
    line = ["--output_dir", str(run), "--export_dir", str(base)]
    assert finetune([*line, "--export_only"]) == 2
    assert "is the folder of --init_from" in capsys.readouterr().err
    assert (
        finetune(
            [
                *line,
                "--data_config",
                "none.yaml",
                "--init_from",
                str(base),
                "--batch_size",
                "4",
                "--max_steps",
                "2",
                "--resume",
                "auto",
                *options,
            ]
        )
        == 2
    )
    assert "is the folder of --init_from" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == before
