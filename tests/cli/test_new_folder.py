"""Commands that write a folder write all of it or nothing."""

import errno
import json
import os
import shutil

import pytest
from commands import main_of

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import new_folder


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def adapter(tmp_path):
    """An adapter file that peft wrote for one matrix of the tiny checkpoint."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(str(folder))
    names = [f"base_model.model.model.layers.{n}.self_attn.q_proj.lora" for n in range(2)]
    random = torch.Generator().manual_seed(0)
    parts = {
        f"{name}_{x}.weight": torch.randn(shape, generator=random)
        for name in names
        for x, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(parts, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("command", ["merge_lora", "quantize"])
def test_a_full_disk_leaves_no_half_checkpoint(command, tiny_checkpoint, adapter, tmp_path, capsys, monkeypatch):
    """merge_lora.py wrote into its folder, and left weights without a tokenizer there."""
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    target = tmp_path / "new" / "merged"
    options = ["--model_path", str(tiny_checkpoint), "--save_path", str(target)]
    options += ["--adapter", str(adapter)] if command == "merge_lora" else ["--group", "32"]
    assert main_of(command)(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--save_path {target} cannot be written (No space left on device); free some space" in error
    assert not (tmp_path / "new").exists()


def test_adapters_on_a_full_disk_are_one_line(settings, tmp_path, capsys, monkeypatch):
    """`export --adapter` printed a traceback, because safetensors raises its own error class."""
    pytest.importorskip("peft")
    import safetensors.torch
    from safetensors import SafetensorError
    from training_runs import ONE, changed

    import lumina_mgpt.training.adapters as adapters
    from lumina_mgpt.training.trainer import Trainer

    Trainer(changed(settings, lora_rank=2, max_steps=1), ONE).run()

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(adapters, "save_file", full, raising=False)
    target = tmp_path / "adapter"
    assert main_of("export")(["--output_dir", settings.output_dir, "--save_path", str(target), "--adapter"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "No space left on device" in error and "free some space" in error


def test_a_name_that_is_too_long_is_refused_before_the_work(tiny_checkpoint, adapter, tmp_path, capsys, monkeypatch):
    """A long name had "free some space" as its remedy."""
    from lumina_mgpt.model import convert

    monkeypatch.setattr(convert, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    line = ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / ("n" * 300)), "--group", "32"]
    assert main_of("quantize")(line) == 2
    assert "File name too long); use a shorter name" in capsys.readouterr().err


def test_a_name_of_the_longest_length_is_written(tmp_path):
    with new_folder(tmp_path / ("n" * 255), "save_path") as folder:
        (folder / "a").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]
    assert (tmp_path / ("n" * 255) / "a").read_text() == "a"


def test_an_empty_folder_is_filled_and_keeps_its_identity(tmp_path):
    """A mount point cannot be replaced; it was found out after the work."""
    (tmp_path / "there").mkdir()
    before = os.stat(tmp_path / "there").st_ino
    os.symlink(tmp_path / "there", tmp_path / "link")
    with new_folder(tmp_path / "link", "save_path") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "there" / "a").exists()
    assert os.stat(tmp_path / "there").st_ino == before
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a"] and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError(), InputError("refused")], ids=repr)
def test_whatever_ends_the_block_leaves_nothing(end, tmp_path):
    with pytest.raises(type(end)):
        with new_folder(tmp_path / "a" / "b" / "c", "save_path") as folder:
            (folder / "a").write_text("a")
            raise end
    assert not any(tmp_path.iterdir())


def test_what_others_write_beside_it_is_kept(tmp_path):
    with pytest.raises(RuntimeError):
        with new_folder(tmp_path / "a" / "b", "save_path"):
            (tmp_path / "a" / "other").write_text("of another program")
            raise RuntimeError
    assert (tmp_path / "a" / "other").exists()


def test_an_unreadable_source_is_not_reported_as_the_target(tmp_path):
    source = tmp_path / "missing.json"
    with pytest.raises(FileNotFoundError, match="missing.json"):
        with new_folder(tmp_path / "new", "save_path"):
            json.loads(source.read_text())


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_what_is_there_is_kept(taken, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept") if taken == "file" else (target / "kept").mkdir(parents=True)
    with pytest.raises(InputError, match=f"save_path {target} already exists"):
        with new_folder(target, "save_path"):
            pytest.fail("the block was entered")
    assert target.exists()
