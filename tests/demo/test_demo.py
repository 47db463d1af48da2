"""The demo's scenes, captions, maps and measures, its checkpoint, and the commands of the README."""

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import documents
import emoji
import evaluation
import numpy as np
import pytest
import scenes
from commands import environment, line_of
from emoji import CELL, COLORS
from PIL import Image
from scenes import Scene

from lumina_mgpt import maps
from lumina_mgpt.images import psnr

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """Discs of different colours and sizes with three real names; the emoji are not part of the repository."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    made = {}
    for n, name in enumerate(["hedgehog", "owl", "grapes"]):
        rgba = np.zeros((CELL, CELL, 4), np.float32)
        rgba[..., n] = 0.8
        rgba[..., 3] = np.hypot(x, y) < 20 + 8 * n
        made[name] = rgba
    return made


def test_captions_name_every_object_and_the_colour():
    rng = random.Random(0)
    for scene in (Scene(("hedgehog",), "orange"), Scene(("owl", "grapes"), "sky blue", "beside")):
        captions = {scenes.caption(scene, rng) for _ in range(100)}
        assert len(captions) > 5
        for text in captions:
            assert all(part in text.lower() for part in (scene.color, *scene.names)), text
            assert " a o" not in f" {text.lower()}" and "a grapes" not in text, text


def test_captions_give_the_right_arrangement(pictures):
    beside = scenes.render(Scene(("owl", "hedgehog"), "white", "beside"), pictures)
    above = scenes.render(Scene(("owl", "hedgehog"), "white", "above"), pictures)
    assert beside.size == (2 * CELL, CELL) and above.size == (CELL, 2 * CELL)
    middle = CELL // 2
    owl, hedgehog = (0, 204, 0), (204, 0, 0)
    assert [beside.getpixel(p) for p in ((middle, middle), (CELL + middle, middle))] == [owl, hedgehog]
    assert [above.getpixel(p) for p in ((middle, middle), (middle, CELL + middle))] == [owl, hedgehog]
    rng = random.Random(0)
    for _ in range(50):
        text = scenes.caption(Scene(("owl", "hedgehog"), "white", "beside"), rng).lower()
        first, second = ("hedgehog", "owl") if "right of" in text else ("owl", "hedgehog")
        assert text.index(first) < text.index(second)


def test_training_has_no_held_out_scenes():
    names = emoji.known_names()
    rng = random.Random(0)
    training, held = scenes.random_pairs(names, 500, False, rng), scenes.random_pairs(names, 200, True, rng)
    pairs = [{frozenset(scene.names) for scene in part} for part in (training, held)]
    assert not pairs[0] & pairs[1]
    singles = scenes.all_singles(names)
    share = sum(scene.held_out for scene in singles) / len(singles)
    assert 0.08 < share < 0.12
    trained, (evaluated, _) = scenes.training_scenes(names, 50, rng), scenes.evaluation_scenes(names, 300, rng)
    assert not set(trained) & set(evaluated) and len(evaluated) == 300
    assert len({scene.key for scene in singles}) == len(singles)


def test_maps_show_the_objects(pictures):
    scene = Scene(("hedgehog", "grapes"), "white", "beside")
    depth = np.asarray(scenes.depth(scene, pictures))[..., 0]
    middle, rim = CELL // 2, CELL // 2 - 18
    assert depth[0, 0] == 0 and depth[middle, middle] > depth[middle, rim] > 0  # rounded, on a distant background
    assert depth[middle, middle] > depth[middle, CELL + middle] > 0  # the first object is nearer
    segmented = np.asarray(scenes.segmentation(scene, pictures))
    colors = [tuple(segmented[middle, x]) for x in (middle, CELL + middle)]
    assert colors == list(scenes.OBJECT_COLORS) and not segmented[0, 0].any()
    edges = np.asarray(maps.canny(scenes.render(scene, pictures)))[..., 0]
    assert set(np.unique(edges)) == {0, 255}
    distance = np.abs(np.hypot(*(np.argwhere(edges[:, :CELL]) - (CELL - 1) / 2).T) - 20)
    assert len(distance) > 50 and distance.max() < 3  # the outline of the first disc, and nothing else


def test_measures_recognize_rendered_scenes(pictures):
    for name in pictures:
        for color in COLORS:
            scene = Scene((name,), color)
            image = scenes.render(scene, pictures)
            noisy = np.asarray(image) + np.random.default_rng(0).normal(0, 12, (CELL, CELL, 3))
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            assert evaluation.nearest_color(image) == color
            (cell,) = evaluation.cells(image, scene)
            assert evaluation.nearest_emoji(cell, color, pictures) == name
    assert psnr(image, image) == 100 and psnr(image, scenes.render(scene, pictures)) < 30
    assert str(evaluation.Share(150, 300)) == "50.0 ± 2.9 %"


def test_loose_pictures_depend_on_the_seed_only(pictures):
    first, again, other = (scenes.loose(random.Random(seed), pictures) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


# -- the shipped checkpoint --------------------------------------------------------------------------------------------


def test_checkpoint_is_complete_and_small():
    names = (DEMO / "names.txt").read_text().split("\n")[:-1]
    assert set(emoji.known_names()) <= set(names)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 40e6
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "chameleon" and config["base_size"] == CELL


def test_checkpoint_draws_the_prompt():
    """The background is right, and pictures of one prompt are nearer to each other than to those of other prompts."""
    from lumina_mgpt import Pipeline

    pipeline = Pipeline.from_pretrained(DEMO)
    prompts = {
        "a hedgehog on a sky blue background": "sky blue",
        "an owl on a black background": "black",
        "a cactus on a pink background": "pink",
    }
    results = pipeline.generate(list(prompts), n=2, seed=3)
    images = [[r.image for r in results if r.job.prompt_index == n] for n in range(len(prompts))]
    for (first, second), color in zip(images, prompts.values(), strict=True):
        assert evaluation.nearest_color(first) == color
        assert evaluation.nearest_color(second) == color
    centre = [[np.asarray(i, float)[24:72, 24:72] for i in pair] for pair in images]
    for n, (first, second) in enumerate(centre):
        others = [((first - other[0]) ** 2).mean() for m, other in enumerate(centre) if m != n]
        assert ((first - second) ** 2).mean() < 0.7 * min(others)


_MAKERS = (
    ["lumina-mgpt", "generate"],
    ["lumina-mgpt", "generate-with-image"],
    ["lumina-mgpt", "edit"],
    ["lumina-mgpt", "reconstruct"],
    ["lumina-mgpt", "attention"],
    ["python", "generate_examples/generate.py"],
)


def _documented_commands(*starts: list[str]) -> list[list[str]]:
    """The different commands of README.md and docs/ that begin so and use the demo checkpoint."""
    found = {tuple(sorted(words)): words for words in documents.commands(documents.guide_text())}
    return [
        words
        for words in found.values()
        if words[:2] in starts
        and not {"--movqgan_path", "--rewrite"} & set(words)
        and not any("Alpha-VLLM/" in word for word in words)
    ]


def _documented_python() -> list[str]:
    """The Python of README.md and docs/ that runs by itself.

    The blocks of docs/transformers.md need each other, and those of docs/server.md a server;
    tests/hf/test_transformers_document.py and tests/server/test_command.py run them.
    """
    paths = (path for path in documents.GUIDE if path.stem not in ("transformers", "server"))
    return documents.blocks("".join(path.read_text(encoding="utf-8") for path in paths), "python")


def test_the_documents_have_commands_and_python():
    assert len(_documented_commands(*_MAKERS)) >= 12
    assert len(_documented_commands(["lumina-mgpt", "describe"])) >= 2
    assert len(_documented_python()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("words", _documented_commands(*_MAKERS), ids=shlex.join)
def test_documented_commands_run(words, tmp_path):
    program, name, *options = words
    start = [str(ROOT / name)] if program == "python" else ["-m", "lumina_mgpt", name]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    done = subprocess.run(
        [sys.executable, *start, *options], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "assets")
    plain = "generate" in name and "--task" not in options
    written = [folder / "0_0.png"] if plain else list(folder.glob("*.png"))
    assert len(written) > 0
    for path in written:
        Image.open(path).verify()


@pytest.mark.parametrize("words", _documented_commands(["lumina-mgpt", "describe"]), ids=shlex.join)
def test_documented_descriptions_are_right(words, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    command = [sys.executable, "-m", "lumina_mgpt", *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "captions.jsonl").read_text() if "--save_path" in words else done.stdout
    answer = "white" if "--question" in words else "a penguin on a white background"
    assert [json.loads(line)["answer"].strip() for line in lines.splitlines()] == [answer]


@pytest.mark.parametrize("block", _documented_python())
def test_documented_python_runs(block, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = list(tmp_path.glob("*.png"))
    assert written
    for path in written:
        Image.open(path).verify()


def _generate(folder: Path, *options: str) -> None:
    command = [*line_of("generate"), "--task", "i2i", "--save_path", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _silhouette(picture: Image.Image) -> np.ndarray:
    """Mask of pixels that differ from the median colour of the rim."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    rim = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
    return np.abs(pixels - np.median(rim, axis=0)).sum(-1) > 60


@pytest.mark.slow
def test_control_panel_determines_the_outline(tmp_path):
    """Given one of two depth maps, each result has the outline of its map and the background of the prompt."""
    shown = _silhouette(Image.open(ROOT / "assets/subject.png").resize((CELL, CELL))).astype(np.uint8)
    outline, _ = cv2.findContours(shown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    penguin = cv2.drawContours(shown, outline, -1, 1, cv2.FILLED)  # its belly is as white as the background
    rounded = np.sqrt(np.clip(cv2.distanceTransform(penguin, cv2.DIST_L2, 5) / (CELL / 4), 0, 1))
    near = np.where(penguin > 0, 0.45 + 0.55 * rounded, 0)  # as in scenes.depth
    Image.fromarray((near * 255).astype(np.uint8)).save(tmp_path / "penguin.png")
    panels = {"hedgehog": str(ROOT / "assets/depth.png"), "penguin": str(tmp_path / "penguin.png")}
    small = {name: Image.open(path).convert("L").resize((CELL, CELL)) for name, path in panels.items()}
    shapes = {name: np.asarray(panel) > 60 for name, panel in small.items()}
    for name, path in panels.items():
        words = ("--image_path", path, "--image_prompt", "on a sky blue background", "-n", "4")
        _generate(tmp_path / name, "--i2i_task", "depth", *words)
        results = [Image.open(tmp_path / name / f"depth_0_{n}_result.png") for n in range(4)]
        assert all(evaluation.nearest_color(result) == "sky blue" for result in results)
        found = {
            other: np.mean([_overlap(_silhouette(result), shape) for result in results])
            for other, shape in shapes.items()
        }
        assert max(found, key=found.get) == name, found


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return (one & other).sum() / (one | other).sum()


@pytest.mark.slow
def test_subject_is_repeated_on_another_background(tmp_path):
    """In the centre, the result is much nearer to the panel than to the panel upside down."""
    words = ("--image_path", "assets/subject.png", "--image_prompt", "the same on a navy background")
    _generate(tmp_path, "--i2i_task", "subject", *words)
    result, given = (Image.open(tmp_path / f"subject_{name}.png") for name in ("result", "ref_center_crop"))
    assert evaluation.nearest_color(result) == "navy"
    middles = [np.asarray(image, np.float32)[24:72, 24:72] for image in (result, given)]
    assert np.abs(middles[0] - middles[1]).mean() < 0.7 * np.abs(middles[0] - middles[1][:, ::-1, ::-1]).mean()


@pytest.mark.slow
def test_a_segmentation_has_the_colours_of_the_training(tmp_path):
    _generate(tmp_path, "--i2i_task", "predict_segmentation", "--image_path", "assets/subject.png")
    pixels = np.asarray(Image.open(tmp_path / "predict_segmentation_result.png"), np.float32)
    known = np.array([(0, 0, 0), scenes.OBJECT_COLORS[0]], np.float32)
    distances = np.abs(pixels[..., None, :] - known).sum(-1)
    assert (distances.min(-1) < 120).mean() > 0.9 and 0.1 < (distances.argmin(-1) == 1).mean() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["", "--speculative_jacobi", "--speculative_jacobi --quant --cache_dtype int8"])
def test_edit_changes_the_background_with_every_sampler(sampling, tmp_path):
    command = ["--image_path", "assets/subject.png", "--save_path", str(tmp_path), *sampling.split()]
    turns = ["--instruction", "make the background red", "--instruction", "make the background navy"]
    command = [*line_of("edit"), *command, *turns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    strip = Image.open(tmp_path / "edit_strip.png")
    assert strip.size == (3 * CELL, CELL)
    for turn, color in ((1, "red"), (2, "navy")):
        result = Image.open(tmp_path / f"edit_{turn}_result.png")
        assert evaluation.nearest_color(result) == color
        assert strip.crop((CELL * turn, 0, CELL * turn + CELL, CELL)).tobytes() == result.tobytes()
