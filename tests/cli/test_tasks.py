"""Pairs, given panels, editing and reconstruction: files, messages and exit statuses of the commands."""

import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_checks import ENVIRONMENT, PATIENCE, names, refused
from commands import main_of
from PIL import Image

from lumina_mgpt import Checkpoint, GenerationRequest, Pipeline, maps
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import crop_panel, psnr
from lumina_mgpt.panels import given_size
from lumina_mgpt.prompts import I2I_TASKS, MAPS, TASKS
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

ROOT = Path(__file__).parents[2]
SMALL = ("--device", "cpu", "--width", "32", "--height", "64")


@pytest.fixture
def given(tiny_checkpoint, tmp_path) -> tuple[str, ...]:
    return "--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")


@pytest.fixture
def generate(given):
    main = main_of("generate")
    return lambda *options: main([*SMALL, *given, *options])


@pytest.fixture
def single(given):
    main = main_of("generate_with_image")
    return lambda *options: main([*SMALL, *given, *options])


@pytest.fixture
def edit(given):
    main = main_of("edit")
    return lambda *options: main([*SMALL, *given, *options])


@pytest.fixture
def reconstruct(given):
    main = main_of("reconstruct")
    return lambda *options: main(["--device", "cpu", *given, *options])


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A disc on a gradient, 80 x 70."""
    y, x = np.mgrid[:70, :80]
    pixels = np.stack([3 * x, 3 * y, np.full_like(x, 90)], -1).astype(np.uint8)
    pixels[np.hypot(x - 40, y - 35) < 20] = 250
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def no_weights(monkeypatch):
    for loader in ("lumina_mgpt.pipeline.load_model", "lumina_mgpt.vqgan.tokenizer.load_state_dict"):
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture(scope="module")
def exact(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)


# -- from Python -------------------------------------------------------------------------------------------------------


def test_a_panel_for_each_prompt(exact, photo):
    """Images are the same in a batch and alone, for a picture and for its codes; the given panel is unmodified."""
    pictures = [Image.open(photo), Image.new("L", (50, 40), 90)]
    settings = dict(width=32, height=64, seed=2, task=I2I_TASKS["canny"])
    together = exact.generate(["a cat", "a dog"], n=2, panel=pictures, **settings)
    assert [result.image.size for result in together] == [(32, 64)] * 4
    for index, picture in enumerate(pictures):
        grid = exact.image_tokenizer.encode([crop_panel(picture, (32, 32))])[0]
        alone = exact.generate(["a cat", "a dog"][index], n=2, panel=grid, batch_size=1, **settings)
        for one, other in zip(together[2 * index : 2 * index + 2], alone, strict=True):
            assert torch.equal(one.codes, other.codes) and torch.equal(one.codes[:4], grid)
            assert torch.equal(one.panel_codes, one.codes[4:])
            assert one.panel.tobytes() == one.image.crop((0, 32, 32, 64)).tobytes()
    assert not torch.equal(together[0].panel_codes, together[2].panel_codes)


def test_the_panel_matters(exact):
    white, black = (
        exact.generate("a cat", 32, 64, task=I2I_TASKS["depth"], panel=Image.new("RGB", (32, 32), color), top_k=1)[0]
        for color in ("white", "black")
    )
    assert not torch.equal(white.panel_codes, black.panel_codes)


@pytest.mark.parametrize(
    ("task", "panel", "parts"),
    [
        (I2I_TASKS["depth"], None, ["panel must be 1 picture, or 2, one for each prompt", "got 0"]),
        (I2I_TASKS["depth"], [Image.new("L", (32, 32))] * 3, ["got 3"]),
        (TASKS["depth"], Image.new("L", (32, 32)), ["panel must be left out", "got 1"]),
        (I2I_TASKS["depth"], torch.zeros(4, 8, dtype=torch.long), ["32x32", "(4, 4)", "(4, 8)"]),
        (I2I_TASKS["depth"], torch.full((4, 4), 64), ["int64 in 0 ... 63", "got torch.int64 in 64 ... 64"]),
        (I2I_TASKS["depth"], torch.zeros(4, 4), ["int64 in 0 ... 63", "got torch.float32"]),
    ],
)
def test_invalid_panels(exact, task, panel, parts):
    with pytest.raises(InputError) as error:
        exact.stream(GenerationRequest.of(["a cat", "a dog"], 32, 64, task=task, panel=panel))
    assert all(part in str(error.value) for part in parts), error.value


def test_sizes_of_dual_panel_images(tiny_checkpoint):
    """Panels have the base size, or less if they exceed the context, as in the released examples."""
    from dataclasses import replace

    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert checkpoint.base_size() == (64, 64) and checkpoint.base_size(2) == (64, 128)
    released = replace(checkpoint, config=replace(checkpoint.config, base_size=768, max_position_embeddings=10240))
    assert released.base_size() == (768, 768) and released.base_size(2) == (512, 1024)
    layout = checkpoint.layout(768, 768, I2I_TASKS["depth"])
    assert given_size(layout) == (768, 384) and given_size(checkpoint.layout()) == (64, 0)
    with pytest.raises(InputError, match="^height must be a multiple of 64, got 96"):
        checkpoint.layout(64, 96, TASKS["depth"])


# -- pairs and given panels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_pair(generate, tmp_path, task):
    assert generate("--task", task, "--prompt", "a cat", "-n", "2") == 0
    assert names(tmp_path / "out") == ["0_0.png", "0_0_result.png", "0_1.png", "0_1_result.png"]
    with Image.open(tmp_path / "out" / "0_1.png") as whole, Image.open(tmp_path / "out" / "0_1_result.png") as result:
        assert whole.size == (32, 64) and result.size == (32, 32)
        assert whole.crop((0, 32, 32, 64)).tobytes() == result.tobytes()
        assert whole.text["task"] == task and whole.text["prompt"] == "a cat"


@pytest.mark.parametrize("task", ["depth", "openpose", "subject", "edit"])
def test_a_given_panel(generate, tmp_path, photo, capsys, task):
    options = ("--task", "i2i", "--i2i_task", task, "--image_path", str(photo), "--image_prompt", "a cat")
    before = photo.read_bytes()
    assert generate(*options, "--preview") == 0
    out = tmp_path / "out"
    assert names(out) == [f"{task}.png", f"{task}_ref_center_crop.png", f"{task}_result.png"]
    panel = Image.open(out / f"{task}_ref_center_crop.png")
    assert panel.tobytes() == crop_panel(Image.open(photo), (32, 32)).tobytes()
    with Image.open(out / f"{task}.png") as image:
        assert image.text["task"] == f"i2i {task}" and image.text["image_path"] == str(photo)
    assert "16/16 codes" in capsys.readouterr().err, "given codes do not count"
    assert photo.read_bytes() == before


@pytest.mark.parametrize("name", MAPS)
def test_prediction_needs_no_prompt(generate, tmp_path, photo, name):
    assert generate("--task", "i2i", "--i2i_task", f"predict_{name}", "--image_path", str(photo)) == 0
    assert f"predict_{name}_result.png" in names(tmp_path / "out")


def test_several_images_of_one_panel_are_numbered(generate, tmp_path, photo):
    options = ("--task", "i2i", "--i2i_task", "subject", "--image_path", str(photo))
    assert generate(*options, "--prompt", "a cat", "--prompt", "a dog", "--speculative_jacobi") == 0
    assert [name for name in names(tmp_path / "out") if "_0_0" in name] == ["subject_0_0.png", "subject_0_0_result.png"]
    assert len(names(tmp_path / "out")) == 5


def test_panel_prompt_goes_into_the_instruction(generate, tmp_path, photo, monkeypatch):
    asked = []
    prompt_ids = Checkpoint.prompt_ids
    monkeypatch.setattr(Checkpoint, "prompt_ids", lambda *given: asked.append(given) or prompt_ids(*given))
    options = ("--task", "i2i", "--i2i_task", "subject", "--image_path", str(photo), "--prompt", "a cat")
    assert generate(*options, "--panel_prompt", "a red cat") == 0
    assert {given[4] for given in asked} == {"a red cat"}
    with Image.open(tmp_path / "out" / "subject.png") as image:
        assert image.text["panel_prompt"] == "a red cat"


def test_the_same_with_the_script_for_one_picture(generate, single, tmp_path, photo):
    common = ("--prompt", "a cat", "--save_path")
    options = ("--task", "i2i", "--i2i_task", "depth", "--image_path", str(photo))
    assert generate(*options, *common, str(tmp_path / "one")) == 0
    assert single("--task", "depth", "--input_image_path", str(photo), *common, str(tmp_path / "other")) == 0
    assert names(tmp_path / "one") == names(tmp_path / "other")
    first, second = (Image.open(tmp_path / folder / "depth.png") for folder in ("one", "other"))
    assert first.tobytes() == second.tobytes()


def test_extract_computes_the_control_panel(single, tmp_path, photo):
    assert single("--task", "canny", "--extract", "--input_image_path", str(photo), "--prompt", "a cat") == 0
    panel = Image.open(tmp_path / "out" / "canny_ref_center_crop.png")
    assert panel.tobytes() == maps.canny(crop_panel(Image.open(photo), (32, 32))).tobytes()
    assert {color for _, color in panel.getcolors()} == {(0, 0, 0), (255, 255, 255)}


def test_extract_without_opencv(single, tmp_path, photo, capsys, no_weights, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    code = single("--task", "canny", "--extract", "--input_image_path", str(photo), "--prompt", "a cat")
    refused(capsys, code, "OpenCV", "pip install opencv-python-headless")
    assert not (tmp_path / "out").exists()


# -- editing -----------------------------------------------------------------------------------------------------------


def test_each_turn_edits_the_codes_of_the_last(edit, tmp_path, photo, monkeypatch):
    done, stream = [], Pipeline.stream

    def watch(self, request, on_row=None):
        for result in stream(self, request, on_row):
            done.append((request.panels[0], result))
            yield result

    monkeypatch.setattr(Pipeline, "stream", watch)
    turns = ["make it red", "no edit", "remove the cat"]
    assert edit("--image_path", str(photo), *(part for turn in turns for part in ("--instruction", turn))) == 0
    for (_, before), (panel, after) in zip(done, done[1:], strict=False):
        assert torch.equal(panel, before.codes[4:]) and torch.equal(after.codes[:4], panel)
    out = tmp_path / "out"
    numbered = sorted(f"edit_{turn}{kind}.png" for turn in (1, 2, 3) for kind in ("", "_result"))
    assert names(out) == sorted([*numbered, "edit_ref_center_crop.png", "edit_strip.png"])
    strip = Image.open(out / "edit_strip.png")
    assert strip.size == (128, 32)
    for turn, name in enumerate(["edit_ref_center_crop", "edit_1_result", "edit_2_result", "edit_3_result"]):
        assert strip.crop((32 * turn, 0, 32 * turn + 32, 32)).tobytes() == Image.open(out / f"{name}.png").tobytes()
    with Image.open(out / "edit_3.png") as image:
        assert {"instruction": "remove the cat", "turn": "3", "seed": "2"}.items() <= image.text.items()


@pytest.mark.parametrize("stop, done", [("one", 0), ("two", 1)])
def test_ctrl_c_keeps_finished_turns_and_nothing_else(edit, tmp_path, photo, capsys, monkeypatch, stop, done):
    stream = Pipeline.stream

    def stopping(self, prepared, on_row=None):
        if prepared.request.prompts == (stop,):
            raise KeyboardInterrupt
        return stream(self, prepared, on_row)

    monkeypatch.setattr(Pipeline, "stream", stopping)
    assert edit("--image_path", str(photo), "--instruction", "one", "--instruction", "two") == 130
    assert f"{done} of 2 turns" in capsys.readouterr().err
    kept = ["edit_1.png", "edit_1_result.png", "edit_ref_center_crop.png", "edit_strip.png"]
    assert names(tmp_path / "out") == (kept if done else [])


# -- reconstruction ----------------------------------------------------------------------------------------------------


def test_reconstruction_and_its_codes(reconstruct, tiny_checkpoint, tmp_path, photo, capsys):
    assert reconstruct(str(photo)) == 0
    out = tmp_path / "out"
    assert names(out) == ["photo_codes.png", "photo_reconstruction.png"]
    tokenizer = ImageTokenizer.from_checkpoint(Checkpoint.open(tiny_checkpoint).movqgan_path)
    crop = crop_panel(Image.open(photo), (64, 64))
    codes = tokenizer.encode([crop])
    assert np.array_equal(np.asarray(Image.open(out / "photo_codes.png")), codes[0].numpy())
    with Image.open(out / "photo_reconstruction.png") as image:
        assert image.tobytes() == tokenizer.decode(codes)[0].tobytes()
        expected = f"{psnr(image, crop):.2f} dB"
        assert image.text["psnr"] == expected
    assert f"| photo | 64x64 | 8 rows of 8 | {len(codes.unique())} | {expected} |" in capsys.readouterr().out


@pytest.mark.parametrize("sampling", ["", "--speculative_jacobi", "--fast"])
def test_reconstruction_through_the_model(reconstruct, tmp_path, photo, capsys, sampling):
    assert reconstruct(str(photo), "--target_size", "32", "--through_model", *sampling.split()) == 0
    assert names(tmp_path / "out") == ["photo_codes.png", "photo_no_edit.png", "photo_reconstruction.png"]
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.endswith("| no edit | codes kept |") and row.count("dB") == 2 and row.endswith("% |")


def test_keep_size(reconstruct, tmp_path):
    Image.new("RGB", (96, 32), "red").save(tmp_path / "wide.png")
    assert reconstruct(str(tmp_path / "wide.png"), "--keep_size") == 0
    assert Image.open(tmp_path / "out" / "wide_reconstruction.png").size == (96, 32)


# -- invalid input -----------------------------------------------------------------------------------------------------


def header_only(width: int, height: int) -> bytes:
    """Returns a PNG of that size with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(size: tuple[int, int], path: Path) -> bytes:
    Image.effect_noise(size, 80).save(path)
    return path.read_bytes()


BAD_PICTURES = {
    "text": (lambda path: b"no picture at all", ["is not a picture"]),
    "empty": (lambda path: b"", ["is not a picture"]),
    "truncated": (lambda path: saved((60, 60), path)[:900], ["cannot be read as a picture", "truncated"]),
    "broken": (lambda path: saved((60, 60), path)[:40] + b"\0" * 4000, ["picture"]),
    "tiny": (lambda path: saved((60, 31), path), ["at least 32 pixels", "60x31"]),
    "thread": (lambda path: saved((32, 600), path), ["16 times as long", "32x600"]),
    "large": (lambda path: header_only(15000, 15000), ["178956970", "shrink"]),
    "bomb": (lambda path: header_only(60000, 60000), ["178956970", "shrink"]),
}


@pytest.mark.parametrize("kind", [*BAD_PICTURES, "missing", "folder"])
@pytest.mark.parametrize("command", ["generate", "single", "edit", "reconstruct"])
def test_bad_pictures(request, command, kind, tmp_path, capsys, no_weights):
    path = tmp_path / "given.png"
    make, parts = BAD_PICTURES.get(kind, (None, ["given.png"]))
    if make is not None:
        path.write_bytes(make(path))
    elif kind == "folder":
        path.mkdir()
    before = path.read_bytes() if path.is_file() else None
    option, rest = {
        "generate": ("--image_path", ["--task", "i2i", "--i2i_task", "depth", "--prompt", "a cat"]),
        "single": ("--input_image_path", ["--task", "canny", "--extract", "--prompt", "a cat"]),
        "edit": ("--image_path", ["--instruction", "make it red"]),
        "reconstruct": (None, []),
    }[command]
    code = request.getfixturevalue(command)(*([option] if option else []), str(path), *rest)
    refused(capsys, code, option or "image", "given.png", *parts)
    assert not (tmp_path / "out").exists(), "nothing is written"
    assert (path.read_bytes() if path.is_file() else None) == before


PANEL = ["--task", "i2i", "--i2i_task", "depth", "--image_path", "PHOTO", "--prompt", "a cat"]
SINGLE = ["--task", "depth", "--input_image_path", "PHOTO", "--prompt", "a cat"]
EDIT = ["--image_path", "PHOTO", "--instruction", "make it red"]


@pytest.mark.parametrize(
    ("command", "options", "parts"),
    [
        ("generate", ["--task", "i2v", "--prompt", "x"], ["--task", "'i2v'"]),
        ("generate", ["--task", "i2i", "--prompt", "x"], ["--task i2i needs --i2i_task", "predict_depth"]),
        ("generate", PANEL[:4] + PANEL[6:], ["depth needs --image_path"]),
        ("generate", PANEL[:6], ["depth needs --prompt"]),
        ("generate", PANEL[:2] + ["--i2i_task", "predict_mood"], ["--i2i_task", "'predict_mood'"]),
        ("generate", ["--prompt", "x", "--image_path", "PHOTO"], ["--image_path", "without --task i2i"]),
        ("generate", ["--prompt", "x", "--i2i_task", "depth"], ["--i2i_task depth", "without --task i2i"]),
        ("generate", ["--prompt", "x", "--panel_prompt", "y"], ["--panel_prompt y", "without --task i2i"]),
        ("generate", [*PANEL, "--panel_prompt", " "], ["--panel_prompt must not be empty"]),
        ("generate", [*PANEL, "--panel_prompt", "a <eoss>"], ["--panel_prompt", "<eoss>"]),
        ("generate", [*PANEL, "--height", "96"], ["--height must be a multiple of 64, got 96; try 64 or 128"]),
        ("generate", [*PANEL, "--width", "1024", "--height", "1024"], ["--width 1024 --height 1024", "smaller"]),
        ("generate", ["--task", "depth", "--prompt", "x", "--height", "32"], ["--height must be", "got 32; try 64"]),
        ("single", SINGLE[2:], ["--task"]),
        ("single", SINGLE[:2] + SINGLE[4:], ["--input_image_path"]),
        ("single", SINGLE[:4], ["depth needs --prompt"]),
        ("single", [*SINGLE, "--extract"], ["--extract", "canny", "got depth"]),
        ("single", SINGLE[:4] + ["--prompt", ""], ["--prompt must not be empty"]),
        ("edit", EDIT[:2], ["--instruction"]),
        ("edit", EDIT[:2] + ["--instruction", " "], ["--instruction must not be empty"]),
        ("edit", EDIT[:2] + ["--instruction", "<eoss>"], ["--instruction (number 0)", "<eoss>"]),
        ("edit", [*EDIT, "--height", "32"], ["--height", "got 32"]),
        ("reconstruct", [], ["images"]),
        ("reconstruct", ["PHOTO", "PHOTO"], ["different names", "photo"]),
        ("reconstruct", ["PHOTO", "--target_size", "40"], ["--target_size must be a multiple of 32, got 40"]),
        ("reconstruct", ["PHOTO", "--target_size", "512", "--through_model"], ["--through_model", "--target_size"]),
        ("reconstruct", ["PHOTO", "--cfg", "2"], ["--cfg", "without --through_model"]),
        ("reconstruct", ["PHOTO", "--quant"], ["--quant", "without --through_model"]),
    ],
)
def test_bad_options(request, command, options, parts, tmp_path, photo, capsys, no_weights):
    options = [str(photo) if option == "PHOTO" else option for option in options]
    refused(capsys, request.getfixturevalue(command)(*options), *parts)
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.parametrize("command", ["generate", "edit", "reconstruct"])
def test_nothing_is_overwritten_unless_asked(request, command, tmp_path, photo, capsys, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    options, name = {
        "generate": (PANEL, "depth_result.png"),
        "edit": (EDIT, "edit_strip.png"),
        "reconstruct": (["PHOTO"], "photo_codes.png"),
    }[command]
    (out / name).write_bytes(b"existing")
    code = request.getfixturevalue(command)(*(str(photo) if option == "PHOTO" else option for option in options))
    refused(capsys, code, "--save_path", name, "--overwrite")
    assert names(out) == [name] and (out / name).read_bytes() == b"existing"


@pytest.mark.parametrize("command", ["generate", "edit", "reconstruct"])
def test_an_input_file_is_never_replaced(request, command, tmp_path, photo, capsys, no_weights):
    """It is kept with --overwrite, and if it is given by a link."""
    out = tmp_path / "out"
    out.mkdir()
    before, option, name = {
        "generate": (PANEL, "--image_path", "depth.png"),
        "edit": (EDIT, "--image_path", "edit_1.png"),
        "reconstruct": (["PHOTO", "LINK"], None, "photo_codes.png"),
    }[command]
    (out / name).write_bytes(photo.read_bytes())
    link = tmp_path / "link.png"
    link.symlink_to(out / name)
    names_of = {"PHOTO": str(link) if option else str(photo), "LINK": str(link)}
    code = request.getfixturevalue(command)(*(names_of.get(part, part) for part in before), "--overwrite")
    refused(capsys, code, "--save_path", "link.png", "another folder")
    assert (out / name).read_bytes() == photo.read_bytes()


# -- the shipped checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "folder", "options"),
    [("sample.sh", "t2i", []), ("sample_i2i.sh", "i2i", [str(ROOT / "assets" / "demo"), "--seed", "1"])],
)
def test_sample_scripts_run(script, folder, options, tmp_path):
    """Runs from a folder whose name needs quotes; the model path is the optional first argument."""
    place = tmp_path / "a folder"
    place.mkdir()
    command = ["bash", str(ROOT / "scripts" / script), *options]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = names(place / "outputs" / folder)
    expected = {"t2i": ["0_0.png", "4_0.png"], "i2i": ["depth.png", "depth_result.png", "subject_ref_center_crop.png"]}
    assert set(expected[folder]) <= set(found)
