"""Messages distinguish a package that is missing from one whose import fails."""

import sys
from pathlib import Path

import pytest
import torch
from commands import main_of
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.maps import canny
from lumina_mgpt.model.attention import backend
from lumina_mgpt.training.metrics import Metrics


def broken(folder: Path, name: str, monkeypatch) -> None:
    """Puts a package first on the path whose import raises what a missing dependency of it does."""
    for module in [module for module in sys.modules if module == name or module.startswith(name + ".")]:
        monkeypatch.delitem(sys.modules, module)
    (folder / f"{name}.py").write_text("import a_dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_broken_peft_is_not_reported_as_missing(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """`pip install peft` was the advice, which does nothing where it is installed."""
    broken(tmp_path, "peft", monkeypatch)
    (tmp_path / "adapter").mkdir()
    line = ["--model_path", str(tiny_checkpoint), "--adapter", str(tmp_path / "adapter")]
    assert main_of("merge_lora")([*line, "--save_path", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "its import fails (No module named 'a_dependency_that_is_missing'); repair or reinstall peft" in error


def test_a_training_with_a_broken_peft(settings, tmp_path, capsys, monkeypatch):
    broken(tmp_path, "peft", monkeypatch)
    line = [
        "--data_config",
        settings.data.data_config,
        "--output_dir",
        settings.output_dir,
        "--init_from",
        settings.model.init_from,
        "--lora_rank",
        "2",
        "--max_steps",
        "1",
        "--batch_size",
        "1",
    ]
    assert main_of("finetune")(line) == 2
    error = capsys.readouterr().err
    assert "--lora_rank 2" in error and "a_dependency_that_is_missing" in error and "pip install" not in error


def test_merging_without_peft_names_it(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = ["--model_path", str(tiny_checkpoint), "--adapter", str(tmp_path), "--save_path", str(tmp_path / "out")]
    assert main_of("merge_lora")(line) == 2
    assert "pip install peft" in capsys.readouterr().err


def test_broken_opencv_flash_attn_and_tensorboard(tmp_path, monkeypatch):
    """Reached from Python: a command meets the last two on a GPU or after seconds of work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cv2", "flash_attn", "tensorboard"):
        broken(tmp_path, name, monkeypatch)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    uses = {
        "opencv-python-headless": lambda: canny(Image.new("RGB", (8, 8))),
        "flash-attn": lambda: backend("flash"),
        "tensorboard": lambda: Metrics(tmp_path, 0, 0.0, True, tensorboard=True),
    }
    for package, use in uses.items():
        with pytest.raises(InputError, match=f"a_dependency_that_is_missing.*reinstall {package}"):
            use()
