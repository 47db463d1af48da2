"""ComfyUI's nodes: the contract, the pictures of the command line, progress, stops, memory and errors."""

import gc
import importlib.util
import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from commands import ROOT, main_of
from fake_comfyui import ComfyUI, InterruptProcessingException, call, installed, loaded_image
from PIL import Image

from lumina_mgpt.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, checkpoints, host
from lumina_mgpt.comfyui.nodes import Describe, Edit, ImageTask, LoadCheckpoint, TextToImage
from lumina_mgpt.comfyui.pictures import to_batch, to_pictures
from lumina_mgpt.errors import InputError
from lumina_mgpt.pipeline import Pipeline

SIZES = {"width": 64, "height": 32}
PAIR = {"width": 32, "height": 64}
SAMPLING = {
    "seed": ("INT", 0, 2**53 - 1),
    "cfg": ("FLOAT", -1.0, 1000.0),
    "temperature": ("FLOAT", 0.01, 100.0),
    "top_k": ("INT", 0, 1 << 20),
    "speculative": ("off", "noise", "maximal", "independent"),
    "window": ("INT", 0, 1024),
    "preview": ("BOOLEAN", None, None),
}
SIZE = {"width": ("INT", 0, 8192), "height": ("INT", 0, 8192)}
PICTURES = {"image": ("IMAGE", None, None)}
MODEL = {"model": ("LUMINA_MGPT", None, None)}
COUNT = {"count": ("INT", 1, 64)}
MAPS = ("depth", "canny", "hed", "openpose", "normal", "segmentation")
PREDICTED = tuple(f"predict_{name}" for name in MAPS)
CONTRACT = {
    "LuminaMGPTLoadCheckpoint": (
        {
            "checkpoint": ("demo",),
            "device": ("auto", "cpu", "cuda", "mps"),
            "dtype": ("auto", "fp32", "bf16", "fp16"),
            "quant": ("off", "128", "64", "32"),
            "cache": ("auto", "int8"),
        },
        {"model": "LUMINA_MGPT"},
    ),
    "LuminaMGPTTextToImage": (
        MODEL | {"prompt": ("STRING", None, None), "task": ("t2i", *MAPS)} | SIZE | COUNT | SAMPLING,
        {"image": "IMAGE", "result": "IMAGE"},
    ),
    "LuminaMGPTImageTask": (
        MODEL
        | PICTURES
        | {"task": (*MAPS, "subject", "edit", *PREDICTED, "no_edit", "detect"), "prompt": ("STRING", None, None)}
        | SIZE
        | COUNT
        | SAMPLING
        | {"shown": ("STRING", None, None)},
        {"result": "IMAGE", "panels": "IMAGE"},
    ),
    "LuminaMGPTEdit": (
        MODEL | PICTURES | {"instructions": ("STRING", None, None)} | SIZE | SAMPLING,
        {"image": "IMAGE", "turns": "IMAGE"},
    ),
    "LuminaMGPTDescribe": (
        MODEL
        | PICTURES
        | {
            "question": ("STRING", None, None),
            "max_new_tokens": ("INT", 1, 8192),
            "seed": SAMPLING["seed"],
            "temperature": SAMPLING["temperature"],
            "top_k": ("INT", 1, 1 << 20),
        },
        {"text": "STRING"},
    ),
}


@pytest.fixture
def ui(tmp_path, monkeypatch, tiny_checkpoint) -> ComfyUI:
    """A ComfyUI with the tiny checkpoint in its models."""
    folder = tmp_path / "models" / "lumina_mgpt"
    folder.mkdir(parents=True)
    (folder / "tiny").symlink_to(tiny_checkpoint)
    return installed(ComfyUI(tmp_path / "models"), monkeypatch)


@pytest.fixture
def model(ui) -> checkpoints.Model:
    (model,) = call(LoadCheckpoint, checkpoint="tiny", device="cpu")
    return model


def command(name: str, folder, *options: object) -> None:
    assert main_of(name)([*map(str, options), "--save_path", str(folder)]) == 0


def same(batch: torch.Tensor, *paths) -> None:
    """Asserts that a batch has the pixels of these files and ComfyUI's form."""
    assert batch.dtype == torch.float32 and batch.ndim == 4 and batch.shape[3] == 3 and len(batch) == len(paths)
    for picture, path in zip(batch, paths, strict=True):
        assert np.array_equal((picture * 255).round().numpy(), np.array(Image.open(path)))
        assert torch.equal(picture, loaded_image(path)[0])


# -- the contract ------------------------------------------------------------------------------------------------------


def described(node: type) -> dict:
    types = node.INPUT_TYPES()
    assert set(types) <= {"required", "optional"}
    return {**types["required"], **types.get("optional", {})}


@pytest.mark.parametrize("name", CONTRACT)
def test_inputs_and_outputs_are_those_of_the_contract(name, tmp_path, monkeypatch):
    installed(ComfyUI(tmp_path), monkeypatch)
    node, (inputs, outputs) = NODE_CLASS_MAPPINGS[name], CONTRACT[name]
    found = described(node)
    assert list(found) == list(inputs)
    for key, (kind, options) in found.items():
        if isinstance(kind, list):
            assert tuple(kind) == inputs[key] and options["default"] in kind
        else:
            assert (kind, options.get("min"), options.get("max")) == inputs[key]
            if "min" in options:
                assert options["min"] <= options["default"] <= options["max"]
        if key in ("width", "height"):
            assert options["step"] == 32
        assert options.get("control_after_generate", False) == (key == "seed")
    assert dict(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)) == outputs
    assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY == "Lumina-mGPT" and node.DESCRIPTION
    assert getattr(node, "OUTPUT_IS_LIST", None) == ((True,) if name == "LuminaMGPTDescribe" else None)
    assert json.dumps(node.INPUT_TYPES())  # ComfyUI sends them to its page


def test_every_node_has_a_name_and_is_in_the_contract():
    assert CONTRACT.keys() == NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()


def module_at(path):
    spec = importlib.util.spec_from_file_location(str(path).replace(".", "_x_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_or_a_file_in_custom_nodes_is_enough(tmp_path):
    """ComfyUI runs `__init__.py` of each folder, and each .py file, under a name of its own."""
    (tmp_path / "lumina_mgpt").symlink_to(ROOT / "lumina_mgpt" / "comfyui")
    (line,) = re.findall(
        r"^ *(from lumina_mgpt\.comfyui import .*)$", (ROOT / "docs/comfyui.md").read_text(), re.MULTILINE
    )
    (tmp_path / "lumina_mgpt_nodes.py").write_text(line + "\n")
    for path in ("lumina_mgpt/__init__.py", "lumina_mgpt_nodes.py"):
        module = module_at(tmp_path / path)
        assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
        assert module.NODE_DISPLAY_NAME_MAPPINGS is NODE_DISPLAY_NAME_MAPPINGS


def test_checkpoints_are_folders_of_the_model_folders_alone(ui, tmp_path, tiny_checkpoint):
    other = tmp_path / "elsewhere"
    (other / "owner").mkdir(parents=True)
    (other / "owner" / "name").symlink_to(tiny_checkpoint)
    (other / "empty").mkdir()
    host.model_folders()
    ui.folders["lumina_mgpt"][0].append(str(other))  # as extra_model_paths.yaml does
    assert LoadCheckpoint.INPUT_TYPES()["required"]["checkpoint"][0] == ["demo", "owner/name", "tiny"]
    assert checkpoints.folder_of("owner/name") == other / "owner" / "name"
    for name in (str(tiny_checkpoint), "../models/lumina_mgpt/tiny", "Alpha-VLLM/Lumina-mGPT-2.0", "empty", ""):
        with pytest.raises(InputError, match="^checkpoint must be one of demo, owner/name, tiny, got"):
            call(LoadCheckpoint, checkpoint=name)


# -- the pictures of the command line ----------------------------------------------------------------------------------


def test_text_to_image_gives_the_pictures_of_the_command_line(ui, model, tiny_checkpoint, tmp_path):
    options = ["--model_path", tiny_checkpoint, "--device", "cpu", "--seed", 5, "--width", 64, "--height", 32, "-n", 2]
    command("generate", tmp_path, *options, "--prompt", "a cat")
    image, result = call(TextToImage, model=model, prompt="a cat", seed=5, count=2, **SIZES)
    same(image, tmp_path / "0_0.png", tmp_path / "0_1.png")
    assert torch.equal(image, result)


def test_speculative_and_map_give_the_pictures_of_the_command_line(ui, model, tiny_checkpoint, tmp_path):
    options = ["--model_path", tiny_checkpoint, "--device", "cpu", "--cfg", 2, "--top_k", 30, "--temperature", 0.9]
    options += ["--width", 32, "--height", 64, "--speculative_jacobi", "--coupling", "maximal", "--window", 5]
    command("generate", tmp_path, *options, "--prompt", "a cat", "--task", "depth")
    sampling = {"cfg": 2.0, "top_k": 30, "temperature": 0.9, "speculative": "maximal", "window": 5}
    image, result = call(TextToImage, model=model, prompt="a cat", task="depth", **sampling, **PAIR)
    same(image, tmp_path / "0_0.png")
    same(result, tmp_path / "0_0_result.png")


def test_an_image_task_gives_the_pictures_of_the_command_line(ui, model, tiny_checkpoint, tmp_path):
    """A batch of two pictures gives what two commands give."""
    pictures = []
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        path = tmp_path / f"given_{number}.png"
        Image.fromarray(values).save(path)
        options = ["--model_path", tiny_checkpoint, "--device", "cpu", "--width", 32, "--height", 64, "--seed", 2]
        options += ["--task", "i2i", "--i2i_task", "depth", "--image_path", path, "--prompt", "a cat"]
        command("generate", tmp_path / str(number), *options, "--panel_prompt", "depth drawing")
        pictures.append(loaded_image(path))
    result, panels = call(
        ImageTask,
        model=model,
        image=torch.cat(pictures),
        task="depth",
        prompt="a cat",
        shown="depth drawing",
        seed=2,
        **PAIR,
    )
    same(result, tmp_path / "0" / "depth_result.png", tmp_path / "1" / "depth_result.png")
    same(panels, tmp_path / "0" / "depth.png", tmp_path / "1" / "depth.png")


def test_an_edit_gives_the_pictures_of_the_command_line(ui, model, tiny_checkpoint, tmp_path):
    path = tmp_path / "given.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    options = ["--model_path", tiny_checkpoint, "--device", "cpu", "--width", 32, "--height", 64, "--image_path", path]
    options += ["--instruction", "make it red", "--instruction", "remove the cat", "--seed", 7]
    command("edit", tmp_path / "edited", *options)
    lines = "make it red\n\n  remove the cat \n"
    image, turns = call(Edit, model=model, image=loaded_image(path), instructions=lines, seed=7, **PAIR)
    results = [tmp_path / "edited" / f"edit_{turn}_result.png" for turn in (1, 2)]
    same(turns, *results)
    same(image, results[1])


def first_generation(ui, oracle_v1_checkpoint, name: str) -> checkpoints.Model:
    """A model whose pictures have about the area of 64 × 64 pixels."""
    folder = shutil.copytree(oracle_v1_checkpoint(name), ui.models / "lumina_mgpt" / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_size": 64}))
    return call(LoadCheckpoint, checkpoint=name, device="cpu")[0]


def test_the_first_generation_edits_in_a_conversation(ui, oracle_v1_checkpoint):
    model = first_generation(ui, oracle_v1_checkpoint, "image")
    given = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    lines = ["make it red", "remove the cat"]
    settings = {"image": given, "seed": 4, "cfg": 1.0, "width": 64, "height": 32}
    image, turns = call(Edit, model=model, instructions="\n".join(lines), **settings)
    conversation, expected = model.pipeline().conversation(), []
    (picture,) = to_pictures(given)
    for turn, line in enumerate(lines):
        text, pictures = (line, []) if turn else (f"{line} <|image|>", [picture])
        stream = conversation.say(text, pictures, want="image", size=(64, 32), seed=4 + turn, cfg=1.0)
        list(stream)
        expected.append(stream.answer.images[0].image)
    assert torch.equal(turns, to_batch(expected)) and torch.equal(image, turns[1:])
    result, panels = call(ImageTask, model=model, task="edit", prompt=lines[0], **settings)
    assert torch.equal(result, panels) and torch.equal(result, turns[:1])


def test_describe_gives_the_answers_of_the_pipeline(ui, oracle_v1_checkpoint):
    model = first_generation(ui, oracle_v1_checkpoint, "text")
    given = torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    (texts,) = call(Describe, model=model, image=given, question="What is it?", max_new_tokens=6, seed=3, top_k=50)
    settings = {"max_new_tokens": 6, "seed": 3, "text_top_k": 50}
    assert texts == [a.text for a in model.pipeline().describe(to_pictures(given), "What is it?", **settings)]
    assert len(texts) == 2 and any(texts)
    values = [value for value, _, _ in ui.bars[-6:]]
    assert values == sorted(values) and ui.bars[-1][:2] == (12, 12)


# -- progress, previews and stops --------------------------------------------------------------------------------------


def test_the_bar_counts_rows_and_shows_them(ui, model, monkeypatch):
    monkeypatch.setattr(host, "_PREVIEW_PAUSE", 0.0)
    image, _ = call(TextToImage, model=model, count=2, **SIZES)
    rows = [bar for bar in ui.bars if bar[1] == 2 * 4]  # two images of four rows of codes
    assert [value for value, _, _ in rows] == [2, 4, 6, 8]
    for number, (_, _, (kind, preview, side)) in enumerate(rows, start=1):
        assert kind == "JPEG" and preview.size == (64, 32) and side == 512
        grey = np.all(np.array(preview) == 128, axis=(1, 2))
        assert not grey[: 8 * number].any() and grey[8 * number :].all()
    assert np.array_equal(np.array(rows[-1][2][1]), (image[0] * 255).round().numpy())  # the first image of the batch


def test_previews_are_rare_and_can_be_off(ui, model):
    call(TextToImage, model=model, **SIZES)
    shown = [preview for _, total, preview in ui.bars if total == 4]
    assert len(shown) == 4 and shown[0] is not None and shown.count(None) >= 2
    ui.bars.clear()
    call(TextToImage, model=model, preview=False, **SIZES)
    assert [preview for *_, preview in ui.bars] == [None] * 4


@pytest.mark.parametrize("node", [TextToImage, Edit, Describe])
def test_a_stop_ends_the_run_at_the_next_step(node, ui, model, oracle_v1_checkpoint, monkeypatch):
    given = {} if node is TextToImage else {"image": torch.rand(1, 64, 64, 3)}
    if node is Describe:
        model = first_generation(ui, oracle_v1_checkpoint, "text")
    transformer, forwards = model.pipeline().model, []
    transformer.register_forward_hook(lambda *_: forwards.append(1))
    ui.checks, ui.stop_at = 0, 3
    with pytest.raises(InterruptProcessingException):
        call(node, model=model, **given)
    assert len(forwards) <= 2
    ui.stop_at, before = 0, len(forwards)
    small = PAIR if node is not Describe else {"max_new_tokens": 4}
    call(node, model=model, **given, **small)  # the next run works
    assert len(forwards) > before
    assert not transformer._forward_pre_hooks


def test_a_stop_ends_the_reading_of_weights(ui, model):
    ui.stop_at = ui.checks + 2
    with pytest.raises(InterruptProcessingException):
        call(TextToImage, model=model, **SIZES)
    assert not model.loaded
    ui.stop_at = 0
    call(TextToImage, model=model, **SIZES)
    assert model.loaded


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list:
    """One entry for each time that weights are read."""
    found, read = [], Pipeline.from_pretrained
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **more: found.append(args) or read(*args, **more))
    return found


def test_a_model_stays_loaded_and_leaves_when_asked(ui, reads):
    (model,) = call(LoadCheckpoint, checkpoint="tiny", device="cpu")
    assert not model.loaded and not reads
    first = call(TextToImage, model=model, **SIZES)
    assert call(LoadCheckpoint, checkpoint="tiny", device="auto")[0] is model  # the same settings
    call(TextToImage, model=model, **SIZES)
    assert len(reads) == 1
    pipeline = weakref.ref(model.pipeline())
    weight = weakref.ref(pipeline().model.lm_head)
    gc.disable()
    ui.unload_all_models()
    assert not model.loaded and pipeline() is None
    gc.enable()
    gc.collect()
    assert weight() is None
    again = call(TextToImage, model=model, **SIZES)
    assert len(reads) == 2 and torch.equal(first[0], again[0])


def test_a_model_is_gone_once_comfyui_drops_the_output_of_its_node(ui):
    (model,) = call(LoadCheckpoint, checkpoint="tiny", device="cpu")
    weight = weakref.ref(model.pipeline().model.lm_head)
    del model
    gc.collect()
    assert weight() is None and not checkpoints._models and not ui._live()


def test_other_settings_are_another_model(ui, model):
    (other,) = call(LoadCheckpoint, checkpoint="tiny", device="cpu", dtype="bf16", cache="int8")
    assert other is not model
    pipeline = other.pipeline()
    assert (pipeline.dtype, pipeline.cache_dtype) == (torch.bfloat16, torch.int8)
    (image, _) = call(TextToImage, model=other, **SIZES)
    assert image.shape == (1, 32, 64, 3)


def test_models_make_room_for_each_other(ui, model):
    (other,) = call(LoadCheckpoint, checkpoint="tiny", device="cpu", dtype="bf16")
    model.pipeline()
    ui.memory = host._WORKING_MEMORY + model._weights.size + other._weights.size // 2
    other.pipeline()
    assert other.loaded and not model.loaded
    model.pipeline()
    assert model.loaded and not other.loaded


def test_int4_weights_from_demo(ui):
    (model,) = call(LoadCheckpoint, checkpoint="demo", device="cpu", quant="64")
    estimate = model._weights.size
    assert model.pipeline().model.config.int4_group == 64
    assert 0.5 < estimate / model._weights.size < 2
    ui.unload_all_models()


def test_changed_files_are_another_model(ui, model, tiny_checkpoint):
    copy = ui.models / "lumina_mgpt" / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    (first,) = call(LoadCheckpoint, checkpoint="copy", device="cpu")
    before = LoadCheckpoint.IS_CHANGED(checkpoint="copy", device="cpu", dtype="auto", quant="off", cache="auto")
    assert before == LoadCheckpoint.IS_CHANGED(checkpoint="copy")
    weights = copy / "model.safetensors"
    shutil.copyfile(weights, copy / "new")
    (copy / "new").replace(weights)
    assert LoadCheckpoint.IS_CHANGED(checkpoint="copy") != before
    assert call(LoadCheckpoint, checkpoint="copy", device="cpu")[0] is not first


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "values", "message"),
    [
        (TextToImage, {"width": 100}, "width must be a multiple of 32"),
        (TextToImage, {"window": 3}, "window has no effect with speculative=off"),
        (TextToImage, {"temperature": 0.0}, "temperature must be a finite number > 0"),
        (TextToImage, {"prompt": "a <reserved08706>"}, "prompt .*number 0"),
        (TextToImage, {"task": "multiview"}, "task must be a task of Lumina-mGPT 2.0"),
        (ImageTask, {"task": "detect", "prompt": "a cat"}, "must be a task of Lumina-mGPT 2.0"),
        (ImageTask, {"task": "depth"}, "prompt must not be empty for the task depth"),
        (ImageTask, {"task": "depth", "prompt": "a cat", "image": torch.rand(64, 64, 3)}, "image must have the shape"),
        (
            ImageTask,
            {"task": "depth", "prompt": "a cat", "image": torch.rand(1, 16, 64, 3)},
            "got 64x16; give a larger",
        ),
        (Edit, {"instructions": " \n "}, "instructions must not be empty"),
        (Edit, {"seed": 2**63 - 1, "instructions": "a\nb"}, "seed must be at most 2"),
        (Describe, {}, "model must be trained to write text, but Lumina-mGPT 2.0 is not"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(node, values, message, ui, model):
    given = {} if node is TextToImage else {"image": torch.rand(1, 64, 64, 3)}
    with pytest.raises(InputError, match=message) as caught:
        call(node, **({"model": model} | given | values))
    assert "\n" not in str(caught.value) and not model.loaded


def test_bad_settings_of_a_checkpoint_are_refused(ui):
    for values, message in (
        ({"quant": "16"}, "quant must be one of off, 128, 64, 32"),
        ({"cache": "fp8"}, "cache must be one of auto, int8"),
        ({"dtype": "fp8"}, "dtype must be auto, fp32, bf16 or fp16"),
        ({"device": "cuda"}, "cuda needs a CUDA GPU") if not torch.cuda.is_available() else ({"device": "x"}, "device"),
    ):
        with pytest.raises(InputError, match=message):
            call(LoadCheckpoint, **({"checkpoint": "tiny"} | values))


def test_comfyui_learns_of_bad_values_before_it_runs():
    assert TextToImage.VALIDATE_INPUTS(width=0, height=8192) is True
    assert TextToImage.VALIDATE_INPUTS(width=None, height=None) is True  # from other nodes
    for bad in (100, -32, 8224):
        assert TextToImage.VALIDATE_INPUTS(width=bad, height=64).startswith("width must be a multiple of 32")
        assert ImageTask.VALIDATE_INPUTS(width=64, height=bad).startswith("height must be a multiple of 32")
    assert Edit.VALIDATE_INPUTS(width=64, height=64, instructions=" ").startswith("instructions must not be empty")
    assert Edit.VALIDATE_INPUTS(width=64, height=64, instructions="a") is True
    assert Edit.VALIDATE_INPUTS(width=64, height=64, instructions=None) is True


def test_pictures_go_both_ways_unchanged():
    values = np.arange(256, dtype=np.uint8).repeat(32 * 3).reshape(256, 32, 3)
    picture = Image.fromarray(values)
    batch = to_batch([picture, picture])
    assert batch.shape == (2, 256, 32, 3) and batch.min() == 0 and batch.max() == 1
    assert all(np.array_equal(np.array(back), values) for back in to_pictures(batch))
    assert to_pictures(torch.full((1, 32, 32, 3), 0.999))[0].getpixel((0, 0)) == (255, 255, 255)  # rounds
    odd = torch.full((1, 32, 32, 4), 2.0)
    odd[..., 0], odd[..., 1] = float("nan"), -1.0
    (rgba,) = to_pictures(odd)
    assert rgba.mode == "RGBA" and rgba.getpixel((0, 0)) == (0, 0, 255, 255)
    assert to_pictures(torch.ones(1, 32, 32, 1))[0].mode == "L"


# -- the example -------------------------------------------------------------------------------------------------------


def workflow() -> dict:
    return json.loads((ROOT / "assets" / "comfyui_workflow.json").read_text(encoding="utf-8"))


def values_of(node: dict) -> dict:
    """The values of a node's widgets by name; a seed is followed by what the page does to it after a run."""
    sockets, values, left = ("IMAGE", "LUMINA_MGPT"), {}, list(node["widgets_values"])
    for name, (kind, options) in described(NODE_CLASS_MAPPINGS[node["type"]]).items():
        if kind in sockets:
            continue
        value = values[name] = left.pop(0)
        if isinstance(kind, list):
            assert value in kind, name
        else:
            assert isinstance(value, {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool}[kind]), name
            assert options.get("min", value) <= value <= options.get("max", value), name
        if options.get("control_after_generate"):
            assert left.pop(0) in ("fixed", "increment", "decrement", "randomize")
    assert not left
    return values


def test_the_example_fits_the_nodes_and_runs(ui):
    graph, results = workflow(), {}
    links = {link[0]: link for link in graph["links"]}
    for node in graph["nodes"]:  # in the order of their runs
        given = {}
        for place, socket in enumerate(node["inputs"]):
            _, origin, slot, target, to, kind = links[socket["link"]]
            source = next(one for one in graph["nodes"] if one["id"] == origin)
            assert (target, to) == (node["id"], place) and source["outputs"][slot]["type"] == kind == socket["type"]
            assert socket["link"] in source["outputs"][slot]["links"]
            given[socket["name"]] = results[origin][slot]
        if node["type"] not in NODE_CLASS_MAPPINGS:
            assert node["type"] in ("SaveImage", "PreviewImage") and list(given) == ["images"]
            results[node["id"]] = given["images"]
            continue
        cls = NODE_CLASS_MAPPINGS[node["type"]]
        sockets = [name for name, (kind, _) in described(cls).items() if kind in ("IMAGE", "LUMINA_MGPT")]
        assert [socket["name"] for socket in node["inputs"]] == sockets
        found = [(output["name"], output["type"]) for output in node["outputs"]]
        assert found == list(zip(cls.RETURN_NAMES, cls.RETURN_TYPES, strict=True))
        values = values_of(node)
        assert values.pop("speculative", None) in (None, "off")
        fast = {} if cls is LoadCheckpoint else {"speculative": "noise"}  # the same picture, sooner
        results[node["id"]] = call(cls, **given, **values, **fast)
    assert [tuple(results[number].shape) for number in (3, 5, 7)] == [(1, 96, 96, 3), (1, 96, 96, 3), (2, 96, 96, 3)]
