"""Commands on checkpoints of the first generation: images of every task, edits, reconstruction and attention."""

import json
from pathlib import Path

import pytest
from command_checks import names, refused
from commands import main_of
from PIL import Image, ImageChops

from lumina_mgpt.prompts import FIRST_I2I_TASKS

GREEDY = ("--top_k", "1", "--device", "cpu", "--target_size", "64")


@pytest.fixture
def given(oracle_v1_checkpoint, tmp_path) -> list[str]:
    return ["--model_path", str(oracle_v1_checkpoint("image")), "--save_path", str(tmp_path / "out")]


@pytest.fixture
def generate(given):
    main = main_of("generate")
    return lambda *options: main([*GREEDY, *given, *options])


@pytest.fixture
def wide(oracle_v1_dir) -> str:
    return str(oracle_v1_dir / "a_96x32.png")


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return image.text


# -- generate ----------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_released_code(given, oracle_v1_dir, tmp_path):
    """Greedy images at guidance 3 and 1; the released code cuts off fractions of colors, which are rounded here."""
    size, words = ["--width", "96", "--height", "64"], "A dog is playing in the water"
    for number, cfg in enumerate(("3", "1")):
        options = [*GREEDY, *given[:3], str(tmp_path / cfg), "--prompt", words, *size, "--cfg", cfg]
        assert main_of("generate")(options) == 0
        found, expected = Image.open(tmp_path / cfg / "0_0.png"), Image.open(oracle_v1_dir / f"gen_{number}_0.png")
        largest = max(high for _, high in ImageChops.difference(found, expected.convert("RGB")).getextrema())
        assert found.size == (96, 64) and largest <= 1


def test_an_edited_picture_is_that_of_the_released_code(generate, oracle_v1_dir, tmp_path, wide):
    options = ("--task", "i2i", "--i2i_task", "edit", "--image_path", wide, "--prompt", "Add a spoon.")
    assert generate(*options, "--cfg", "3", "--width", "96", "--height", "64") == 0
    found, expected = Image.open(tmp_path / "out" / "edit.png"), Image.open(oracle_v1_dir / "gen_2_0.png")
    assert max(high for _, high in ImageChops.difference(found, expected.convert("RGB")).getextrema()) <= 1


def test_sampling_defaults_are_those_of_family_and_task(given, tmp_path, wide):
    main = main_of("generate")
    small = ["--device", "cpu", "--target_size", "64", *given]
    assert main([*small, "--prompt", "a cat", "--width", "32", "--height", "32"]) == 0
    found = text_of(tmp_path / "out" / "0_0.png")
    assert {"cfg": "4.0", "top_k": "2000", "temperature": "1.0", "task": "t2i"}.items() <= found.items()
    assert main([*small, "--task", "i2i", "--i2i_task", "predict_depth", "--image_path", wide]) == 0
    found = text_of(tmp_path / "out" / "predict_depth.png")
    assert {"cfg": "1.0", "top_k": "200", "width": "96", "height": "32"}.items() <= found.items()
    assert {"image_path": wide, "task": "i2i predict_depth"}.items() <= found.items()
    assert main([*small, "--task", "i2i", "--i2i_task", "predict_normal", "--image_path", wide, "--cfg", "2"]) == 0
    assert {"cfg": "2.0", "top_k": "200"}.items() <= text_of(tmp_path / "out" / "predict_normal.png").items()


@pytest.mark.parametrize("task", FIRST_I2I_TASKS)
def test_every_task_with_a_picture(generate, tmp_path, wide, task, monkeypatch, capsys):
    from lumina_mgpt.vocabulary import Vocabulary

    texts, encode = [], Vocabulary.encode_text
    monkeypatch.setattr(Vocabulary, "encode_text", lambda self, text: texts.append(text) or encode(self, text))
    words = [] if FIRST_I2I_TASKS[task].wordless else ["--prompt", "the red apple"]
    assert generate("--task", "i2i", "--i2i_task", task, "--image_path", wide, *words) == 0
    assert names(tmp_path / "out") == [f"{task}.png", f"{task}_ref_center_crop.png"]
    with Image.open(tmp_path / "out" / f"{task}.png") as image:
        assert image.size == (96, 32), "the size of the given picture"
        assert ("box" in image.text) == (task == "detect")
    before, _ = FIRST_I2I_TASKS[task].instruction("the red apple", 96, 32).split("<|image|>")
    assert before in texts
    assert ("box not found" in capsys.readouterr().out) == (task == "detect")


def test_a_whole_instruction(generate, tmp_path, wide, monkeypatch):
    from lumina_mgpt.vocabulary import Vocabulary

    texts, encode = [], Vocabulary.encode_text
    monkeypatch.setattr(Vocabulary, "encode_text", lambda self, text: texts.append(text) or encode(self, text))
    instruction = "Semantic segmentation {0}.<|image|> please"
    options = ("--task", "i2i", "--i2i_task", "predict_segmentation", "--image_path", wide)
    assert generate(*options, "--instruction", instruction) == 0
    assert {"Semantic segmentation {0}.", " please"} <= set(texts)
    found = text_of(tmp_path / "out" / "predict_segmentation.png")
    assert found["instruction"] == instruction and found["cfg"] == "1.0"


@pytest.mark.parametrize("sampling", [[], ["--speculative_jacobi", "--window", "4"]])
def test_views_of_an_object(generate, tmp_path, sampling):
    options = ("--task", "multiview", "--views", "3", "--width", "64", "--height", "32", "--prompt", "a hat, 3d asset")
    assert generate(*options, "--preview", *sampling) == 0
    out = tmp_path / "out"
    assert names(out) == ["0_0.png", "0_0_view_0.png", "0_0_view_1.png", "0_0_view_2.png"]
    sheet = Image.open(out / "0_0.png")
    assert sheet.size == (128, 64)
    for view, place in enumerate([(0, 0), (64, 0), (0, 32)]):
        with Image.open(out / f"0_0_view_{view}.png") as image:
            assert sheet.crop((*place, place[0] + 64, place[1] + 32)).tobytes() == image.tobytes()
            assert image.text["view"] == str(view) and image.text["views"] == "3"


def test_ctrl_c_keeps_finished_views(generate, tmp_path, capsys, monkeypatch):
    from lumina_mgpt.outputs import OutputFolder

    save = OutputFolder.save

    def stopping(self, name, *args, **settings):
        if name == "0_0_view_1.png":
            raise KeyboardInterrupt
        return save(self, name, *args, **settings)

    monkeypatch.setattr(OutputFolder, "save", stopping)
    options = ("--task", "multiview", "--views", "3", "--width", "32", "--height", "32", "--prompt", "a hat")
    assert generate(*options, "--preview") == 130
    assert "1 of 3 images are in" in capsys.readouterr().err and names(tmp_path / "out") == ["0_0_view_0.png"]


def test_sixteen_views_of_384_pixels_by_default(oracle_v1_checkpoint):
    from lumina_mgpt.preparation import Checkpoint
    from lumina_mgpt.prompts import FIRST_TASKS
    from lumina_mgpt.request import GenerationRequest

    checkpoint = Checkpoint.open(oracle_v1_checkpoint("image"))
    prepared = checkpoint.prepare(GenerationRequest("a hat", task=FIRST_TASKS["multiview"]))
    assert prepared.layout.size == (384, 384) and prepared.request.task.views == 16
    assert checkpoint.layout().size == (768, 768)


def test_a_detected_box_is_found(generate, tmp_path, wide, monkeypatch, capsys):
    """The model draws nothing here, so the test draws the box."""
    from dataclasses import replace

    from lumina_mgpt.pipeline import Pipeline

    stream = Pipeline.stream

    def drawn(self, prepared, on_row=None, jobs=None):
        from PIL import ImageDraw

        for result in stream(self, prepared, on_row, jobs):
            codes = self.image_tokenizer.encode([prepared.picture])
            (image,) = self.image_tokenizer.decode(codes)
            inverse = ImageChops.invert(image).point(lambda value: 255 * (value > 127))
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).rectangle((20, 6, 59, 25), outline=255, width=3)
            yield replace(result, image=Image.composite(inverse, image, mask))

    monkeypatch.setattr(Pipeline, "stream", drawn)
    options = ("--task", "i2i", "--i2i_task", "detect", "--image_path", wide, "--prompt", "The red apple.")
    assert generate(*options) == 0
    assert "box 20 6 60 26" in capsys.readouterr().out
    assert text_of(tmp_path / "out" / "detect.png")["box"] == "20 6 60 26"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--task", "depth", "--prompt", "x"], ["--task must be a task of Lumina-mGPT: t2i, multiview; got depth"]),
        (
            ["--task", "i2i", "--i2i_task", "canny", "--image_path", "PICTURE", "--prompt", "x"],
            ["--i2i_task must be a task of Lumina-mGPT: depth, normal", "no_edit, detect", "got canny"],
        ),
        (["--prompt", "x", "--views", "4"], ["--views must be left out", "got 4", "-n 4"]),
        (["--task", "multiview", "--prompt", "x", "--views", "0"], ["--views", "got 0"]),
        (["--task", "multiview", "--prompt", "x", "--views", "999"], ["--views 999 of --width 64", "10240"]),
        (
            ["--task", "i2i", "--i2i_task", "edit", "--image_path", "PICTURE", "--prompt", "x", "--panel_prompt", "y"],
            ["--panel_prompt must be left out", "got 'y'", "--instruction TEXT"],
        ),
        (["--prompt", "x", "--instruction", "y"], ["--instruction replaces --prompt"]),
        (["--instruction", " "], ["--instruction must not be empty"]),
        (["--instruction", "a <|image|>"], ["--instruction must have no mark <|image|>"]),
        (
            ["--task", "i2i", "--i2i_task", "edit", "--image_path", "PICTURE", "--instruction", "<|image|> <|image|>"],
            ["--instruction must have one mark <|image|>", "got 2"],
        ),
        (
            ["--task", "i2i", "--i2i_task", "no_edit", "--image_path", "PICTURE", "--prompt", "x"],
            ["--prompt has no effect on the task no_edit of Lumina-mGPT"],
        ),
        (
            ["--task", "multiview", "--prompt", "x", "--batch_size", "2"],
            ["--batch_size 2 has no effect with --task multiview"],
        ),
        (["--instruction", "a <eoss>"], ["--instruction", "<eoss>"]),
        (["--prompt", "x", "--dtype", "fp16"], ["--dtype must be bf16 or fp32", "overflows fp16"]),
        (["--prompt", "x", "--target_size", "65"], ["--target_size must be a multiple of 32, got 65"]),
        (["--prompt", "x", "--vqgan_path", "/no/such.ckpt"], ["--vqgan_path /no/such.ckpt"]),
    ],
)
def test_what_is_refused(generate, tmp_path, wide, capsys, no_weights, options, parts):
    refused(capsys, generate(*(wide if option == "PICTURE" else option for option in options)), *parts)
    assert not (tmp_path / "out").exists()


def test_tasks_of_the_first_generation_alone_are_refused_by_the_second(tiny_checkpoint, tmp_path, capsys, no_weights):
    main, picture = main_of("generate"), tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(picture)
    common = ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")]
    refused(capsys, main([*common, "--task", "multiview", "--prompt", "x"]), "Lumina-mGPT 2.0: t2i, depth", "multiview")
    options = ["--task", "i2i", "--i2i_task", "detect", "--image_path", str(picture), "--prompt", "x"]
    refused(capsys, main([*common, *options]), "--i2i_task", "Lumina-mGPT 2.0: depth", "got detect")
    single = main_of("generate_with_image")
    words = ["--instruction", "a red <|image|>"]
    edit = ["--task", "i2i", "--i2i_task", "edit", "--image_path", str(picture), *words]
    refused(capsys, main([*common, *edit]), "--instruction must have no mark")
    options = ["--task", "no_edit", "--input_image_path", str(picture)]
    refused(capsys, single([*common, *options]), "--task must be a task of Lumina-mGPT 2.0", "got no_edit")


def test_a_checkpoint_without_its_vqgan_makes_no_image(oracle_v1_checkpoint, tmp_path, capsys, no_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in oracle_v1_checkpoint("image").iterdir():
        if not path.name.startswith("vqgan"):
            (folder / path.name).symlink_to(path)
    code = main_of("generate")(["--model_path", str(folder), "--prompt", "x", "--save_path", str(tmp_path / "out")])
    refused(capsys, code, "no VQGAN weights in", "vqgan_path")


def test_fp16_is_never_chosen_or_taken(oracle_v1_checkpoint, monkeypatch):
    import torch

    from lumina_mgpt.devices import resolve_dtype
    from lumina_mgpt.errors import InputError
    from lumina_mgpt.preparation import Checkpoint

    config = Checkpoint.open(oracle_v1_checkpoint("image")).config
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: False)
    for device in ("mps", "cuda", "cpu"):
        assert resolve_dtype("auto", torch.device(device), config) == torch.float32
    for name in ("fp16", torch.float16):
        with pytest.raises(InputError, match="dtype must be bf16 or fp32 .* overflows fp16"):
            resolve_dtype(name, torch.device("cpu"), config)


# -- edit and reconstruct ----------------------------------------------------------------------------------------------


def test_turns_of_an_edit_are_one_conversation(given, tmp_path, wide, monkeypatch):
    from lumina_mgpt.conversation import Conversation

    said, say = [], Conversation.say

    def watch(self, text, pictures=(), **settings):
        said.append((text, len(pictures), settings["seed"], settings["want"], settings["size"]))
        return say(self, text, pictures, **settings)

    monkeypatch.setattr(Conversation, "say", watch)
    options = ["--image_path", wide, "--instruction", "Add a spoon.", "--instruction", "Remove it.", "--seed", "5"]
    assert main_of("edit")([*GREEDY, *given, *options]) == 0
    assert said == [
        ("Add a spoon. <|image|>", 1, 5, "image", (96, 32)),
        ("Remove it.", 0, 6, "image", (96, 32)),
    ]
    out = tmp_path / "out"
    assert names(out) == ["edit_1.png", "edit_2.png", "edit_ref_center_crop.png", "edit_strip.png"]
    assert Image.open(out / "edit_strip.png").size == (3 * 96, 32)
    assert text_of(out / "edit_2.png")["seed"] == "6"


def test_an_edit_with_too_many_turns_is_refused(given, tmp_path, wide, capsys, no_weights):
    turns = [part for _ in range(5) for part in ("--instruction", "x")]
    options = ["--image_path", wide, "--width", "768", "--height", "768", *turns]
    refused(capsys, main_of("edit")([*GREEDY, *given, *options]), "--instruction 5 turns", "10240")


def test_reconstruction_through_the_model(given, tmp_path, wide, capsys):
    code = main_of("reconstruct")([*GREEDY, *given, wide, "--through_model", "--keep_size"])
    assert code == 0
    assert names(tmp_path / "out") == ["a_96x32_codes.png", "a_96x32_no_edit.png", "a_96x32_reconstruction.png"]
    assert "| a_96x32 | 96x32 | 2 rows of 6 |" in capsys.readouterr().out
    found = text_of(tmp_path / "out" / "a_96x32_no_edit.png")
    assert found["instruction"] == "no edit" and found["top_k"] == "1"


# -- attention ---------------------------------------------------------------------------------------------------------


def test_attention(given, tmp_path, oracle_v1_dir, capsys):
    main, size = main_of("attention"), ["--width", "96", "--height", "64"]
    assert main([*GREEDY, *given, "--prompt", "a cat", *size]) == 0
    out = tmp_path / "out"
    assert names(out) == ["attention.json", "attention.png", "image.png"]
    found = json.loads((out / "attention.json").read_text())
    assert sum(found["shares"].values()) == pytest.approx(1) and found["counts"]["codes"] == 24
    assert [len(row) for row in found["codes"]] == [6] * 4 and len(found["layers"]) == 2
    assert sum(map(sum, found["codes"])) == pytest.approx(found["shares"]["codes"])
    assert "text " in capsys.readouterr().out
    picture = str(oracle_v1_dir / "b_64x64.png")
    shown = [*given, "--device", "cpu", "--target_size", "64", "--prompt", "a cat", "--image_path", picture]
    assert main([*shown, "--overwrite"]) == 0
    text = text_of(out / "image.png")
    assert text["image_path"] == picture and not {"seed", "cfg", "top_k"} & text.keys()
    for option in (["--cfg", "2"], ["--top_k", "1"], ["--fast"], ["--speculative_jacobi"]):
        refused(capsys, main([*shown, *option]), f"{option[0]}", "has no effect with --image_path")
    assert Image.open(out / "image.png").tobytes() == Image.open(picture).convert("RGB").tobytes()
    refused(capsys, main([*GREEDY, *given, "--prompt", "a cat"]), "--save_path", "image.png", "--overwrite")
