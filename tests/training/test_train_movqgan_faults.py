"""`train-movqgan` with unusable pictures, options and files of an earlier run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import main_of
from pictures import in_mode
from PIL import Image
from safetensors import safe_open

from lumina_mgpt.errors import InputError
from lumina_mgpt.training.image_tokenizer import ImageTokenizerTrainer, MoVQGANTrainingConfig, Pictures
from lumina_mgpt.vqgan.model import VQGANConfig

CONFIG = VQGANConfig(ch=32, blocks=1, num_codes=16)  # of the command's --num_codes 16
SETTINGS = MoVQGANTrainingConfig(minutes=1.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    in_mode("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    return tmp_path / "pictures"


@pytest.fixture
def train(tmp_path, folder, capsys):
    """Runs the command on `folder`; returns the exit status and the last line on stderr."""

    def run(*options: str) -> tuple[int, str]:
        own = ["--out_dir", str(tmp_path / "out"), "--num_codes", "16", "--threads", str(torch.get_num_threads())]
        status = main_of("train_movqgan")(["--images", str(folder), *own, *options])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1]

    return run


def finished(folder: Path, out: Path) -> Path:
    """The files of a run that has used its minute; returns its state."""
    trainer = ImageTokenizerTrainer(CONFIG, SETTINGS, Pictures({folder: 1.0}), out)
    trainer.step, trainer.elapsed, trainer.quantizing = 20, 60.0, True
    trainer.save()
    return out / "training.pt"


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_opened_by_the_shared_function(folder):
    """Transparent pixels were black, 16-bit grey was white from 256 on, EXIF orientation was not applied."""
    (folder / "a.png").unlink()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.fromarray(np.full((40, 32), 20000, np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), "red").save(folder / "turned.png", exif=exif)
    pictures = Pictures({folder: 1.0})
    found = {images.shape[2:0:-1]: images[0, 0, 0].tolist() for _, images in pictures.groups}
    assert found == {(32, 32): [255] * 3, (32, 40): [78] * 3, (48, 64): [255, 0, 0]}


def test_pictures_of_all_formats_are_read(folder):
    """Only *.png was read; a folder of JPEG files had no picture."""
    for name in ("b.JPG", "c.webp", "d.bmp", "e.tif", "f.gif"):
        in_mode("RGB", (32, 32)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (_, images), *others = Pictures({folder: 1.0}).groups
    assert images.shape == (6, 32, 32, 3) and not others


def test_what_is_no_picture_is_counted(folder, caplog):
    """A folder of which half had another format was read in silence; captions are expected there."""
    for name in ("a.txt", "b.heic", "c.raw"):
        (folder / name).write_text("no picture")
    (folder / "below").mkdir()
    Pictures({folder: 1.0})
    assert f"images {folder}: entries left out, as they have no extension of a picture: 3" in caplog.text


def test_a_damaged_picture_is_refused_by_name(train, folder, tmp_path):
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    status, error = train()
    assert status == 2 and f"--images {folder / 'b.png'}" in error and not (tmp_path / "out").exists()


def test_sides_that_do_not_fit_the_codes_are_refused_before_the_training(train, folder, tmp_path):
    """Bug: the training gave a traceback when a batch contained that picture."""
    Image.new("RGB", (36, 32)).save(folder / "odd.png")
    status, error = train()
    assert status == 2 and "odd.png: width and height must be multiples of 8, got 36x32" in error
    assert not (tmp_path / "out").exists()


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", "12345678901234567890123"),
        ("seed", "-1"),
        ("minutes", "inf"),
        ("minutes", "nan"),
        ("lr", "nan"),
        ("lr", "inf"),
        ("ch", "32000000000"),
        ("blocks", "1000000"),
        ("num_codes", "100000000000000"),
        ("threads", "0"),
        ("threads", "99999999999"),
        ("pixels", "0"),
        ("device", "gpu"),
    ],
)
def test_settings_out_of_range_are_refused(train, tmp_path, name, value):
    """A seed of 23 digits, endless minutes and sizes beyond any memory gave a traceback."""
    status, error = train(f"--{name}", value)
    assert status == 2 and error.startswith(f"error: --{name} must be") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        ("--norms plain --decoder_of x.safetensors", "--norms plain means nothing with --decoder_of"),
        ("--mult 1 2 2 4 --decoder_of x.safetensors", "--mult 1 2 2 4 means nothing with --decoder_of"),
        ("--norms plain --mult 1 2 2 4", "--mult must be 5 numbers in 1 ... 16 for plain norms (16 x 16 pixels"),
        ("--mult 1 2 0 4", "--mult must be 4 numbers in 1 ... 16 for spatial norms (8 x 8 pixels a code), got 1 2 0 4"),
        ("--mult 1 2 4 99", "got 1 2 4 99; try 1 2 2 4"),
        ("--z_channels 0", "--z_channels must be above 0 and at most 1024, got 0; leave it out"),
        ("--norms batch", "--norms"),
    ],
)
def test_levels_and_norms_that_no_model_has_are_refused(folder, tmp_path, capsys, options, named):
    out = tmp_path / "out"
    assert main_of("train_movqgan")(["--images", str(folder), "--out_dir", str(out), *options.split()]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1] and not out.exists()


def test_pictures_must_fit_the_cells_of_plain_norms(train, folder, tmp_path):
    Image.new("RGB", (40, 32)).save(folder / "odd.png")
    status, error = train("--norms", "plain")
    assert status == 2 and "odd.png: width and height must be multiples of 16, got 40x32" in error


def test_weights_of_folders_are_refused_that_are_not_finite_or_given_twice(folder, tmp_path, capsys):
    main, out = main_of("train_movqgan"), ["--out_dir", str(tmp_path / "out")]
    for images in ([f"{folder}=inf"], [f"{folder}=nan"], [f"{folder}=2", str(folder)]):
        assert main(["--images", *images, *out]) == 2
        assert "--images" in capsys.readouterr().err.splitlines()[-1]


# -- files of an earlier run -------------------------------------------------------------------------------------------


def test_a_log_with_a_damaged_end_is_resumed(train, folder, tmp_path):
    """A power loss leaves zero bytes or half a line."""
    finished(folder, tmp_path / "out")
    log = tmp_path / "out" / "log.jsonl"
    log.write_bytes(b'{"step": 20, "loss": 1.0}\n{"step": 40, "loss": 1.0}\n{"st' + bytes(40))
    assert train("--minutes", "1")[0] == 0
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"step": 20, "loss": 1.0}]
    with safe_open(tmp_path / "out" / "movqgan.safetensors", "pt") as file:
        assert file.keys()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _without_sizes(path: Path) -> None:
    state = torch.load(path)
    del state["sizes"]
    torch.save(state, path)


def _other_sizes(path: Path) -> None:
    state = torch.load(path)
    state["sizes"] = torch.zeros(3)
    torch.save(state, path)


@pytest.mark.parametrize("damage", [_cut, _flip, _without_sizes, _other_sizes])
def test_a_damaged_state_is_refused(train, folder, tmp_path, damage):
    """A flipped byte was not noticed; a missing key ended in KeyError."""
    path = finished(folder, tmp_path / "out")
    damage(path)
    status, error = train("--minutes", "1")
    assert status == 2 and f"{path} is damaged or of another size" in error and "remove it" in error


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_an_out_dir_that_cannot_be_a_folder_is_refused(train, tmp_path, place):
    (tmp_path / "file").write_text("")
    status, error = train("--out_dir", str(tmp_path / place))
    assert status == 2 and str(tmp_path / "file") in error


def test_a_full_disk_leaves_no_partial_file(folder, tmp_path, monkeypatch):
    """Half a `movqgan.part` stayed, and the message asked to free space whatever the cause."""
    trainer = ImageTokenizerTrainer(CONFIG, SETTINGS, Pictures({folder: 1.0}), tmp_path / "out")

    def write(path, tensors):
        Path(path).write_bytes(b"half")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lumina_mgpt.training.image_tokenizer.write_tensors", write)
    with pytest.raises(InputError, match="Input/output error.*use another one"):
        trainer.save()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training.pt"]


def test_a_lack_of_memory_names_the_size_of_a_batch(train, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pictures, "batch", full)
    status, error = train("--pixels", "500000000")
    assert status == 2 and error.endswith("error: out of memory; try a smaller --pixels")
