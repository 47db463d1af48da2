"""Detection and normal maps of the demo: examples, pictures, measures and rows of the evaluation."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import emoji
import marks
import marks_rows
import normals
import normals_rows
import numpy as np
import pytest
from composed import Item, Picture
from emoji import CELL
from evaluation import Share
from normals import NormalMap
from PIL import Image
from scenes import to_image

from lumina_mgpt.boxes import find_box
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

DEMO = Path(__file__).parents[2] / "assets" / "demo"
NAMES = emoji.known_names()


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """For each name, an ellipse with stripes, of a random form and colour; the emoji are not in the repository."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    made = {}
    for name in NAMES:
        rgba = np.zeros((CELL, CELL, 4), np.float32)
        rgba[..., :3] = rng.random(3)
        rgba[np.sin(y / rng.uniform(2, 6)) > 0.5, :3] = rng.random(3)
        rgba[..., 3] = np.hypot(x / rng.uniform(36, 46), y / rng.uniform(36, 46)) < 1
        made[name] = rgba
    return made


# -- marks -------------------------------------------------------------------------------------------------------------


def test_the_box_is_inside_of_the_square_of_the_object(pictures):
    for example in marks.examples("detect", NAMES, 40, random.Random(1)):
        marked = example.about
        plain, drawn = (np.asarray(part.draw(pictures), np.int16) for part in (marked.picture, marked))
        rows, columns = np.nonzero((plain != drawn).any(-1))
        item = marked.item
        assert (columns.min(), columns.max()) == (item.left + 4, item.left + item.side - 5)
        assert (rows.min(), rows.max()) == (item.top + 4, item.top + item.side - 5)
        inner = np.s_[rows.min() + 4 : rows.max() - 3, columns.min() + 4 : columns.max() - 3]
        assert np.array_equal(drawn[inner], plain[inner])


def test_the_least_box_holds_the_shape(pictures):
    shape = np.zeros((CELL, CELL, 4), np.float32)
    shape[20:70, 30:81] = 1
    item = Item("owl", CELL, 32, 8)
    marked = marks.Marked(Picture((128, 128), "navy", (item,)), item)
    assert marked.box({"owl": shape}) == (62, 28, 113, 78)


def test_boxes_of_examples_are_found_by_difference(pictures):
    for example in marks.examples("detect", NAMES, 10, random.Random(2), held_out=True):
        marked = example.about
        plain = marked.picture.draw(pictures)
        assert marks.found_overlap(marked, marked.draw(pictures), plain, pictures) > marks.RIGHT
        assert marks.found_overlap(marked, plain, plain, pictures) == 0
        assert marks.found_overlap(marked, marked.draw(pictures).resize((32, 32)), plain, pictures) == 0
        for other in marked.picture.items[1:]:
            wrong = marks.Marked(marked.picture, other).draw(pictures)
            assert marks.found_overlap(marked, wrong, plain, pictures) < marks.RIGHT


def test_boxes_are_found_after_the_image_tokenizer(pictures):
    tokenizer = ImageTokenizer.from_checkpoint(DEMO / "movqgan.safetensors")
    found = []
    for example in marks.examples("detect", NAMES, 8, random.Random(3), held_out=True):
        plain, drawn = (
            tokenizer.decode(tokenizer.encode([part.draw(pictures)]))[0]
            for part in (example.about.picture, example.about)
        )
        found.append(marks.found_overlap(example.about, drawn, plain, pictures) > marks.RIGHT)
    assert sum(found) >= 6


def test_overlap_of_boxes():
    assert marks.overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert marks.overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(8 / 24)
    assert marks.overlap((0, 0, 4, 4), (5, 5, 9, 9)) == 0


@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_asked_for_has_no_equal(held_out):
    twins = 0
    for example in marks.examples("detect", NAMES, 300, random.Random(0), held_out):
        picture, item = example.about.picture, example.about.item
        assert picture.held_out == held_out and item in picture.items
        assert [other.what for other in picture.items].count(item.what) == 1
        text = example.turns[0]
        assert text.startswith("Detect: ") and text.endswith(f" {PICTURE}") and example.turns[1] == PICTURE
        assert marks.word_for(item.name) in text.lower() or item.name in text.lower()
        if picture.names.count(item.name) > 1:
            twins += 1
            assert item.color and item.color in text, text
        if held_out:
            assert text.startswith("Detect: The ") and text.endswith(f". {PICTURE}")
    assert twins > 10


def test_what_is_not_there_gets_no_box(pictures):
    for example in marks.examples("detect_absent", NAMES, 30, random.Random(0)):
        (given,), (answer,) = example.images
        assert given == answer == example.about
        assert example.extra["starts"] == [(item.left, item.top) for item in given.items]
        assert not any(f" {name}" in example.turns[0].lower() for name in given.names if " " in name)
    assert find_box(answer.draw(pictures), given.draw(pictures)) is None


# -- normals -----------------------------------------------------------------------------------------------------------


def disc() -> tuple[Picture, dict[str, np.ndarray]]:
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    shape = np.ones((CELL, CELL, 4), np.float32)
    shape[..., 3] = np.hypot(x, y) < 40
    return Picture((CELL, CELL), "navy", (Item("owl", CELL, 0, 0),)), {"owl": shape}


def test_normals_of_a_disc_point_outwards():
    vectors = normals.normals(*disc())
    assert vectors.shape == (CELL, CELL, 3) and not vectors[0].any()
    inside = vectors.any(-1)
    assert inside.sum() == pytest.approx(math.pi * 40**2, rel=0.01)
    assert np.allclose(np.linalg.norm(vectors[inside], axis=-1), 1, atol=1e-5)
    middle = CELL // 2
    assert vectors[middle, middle] == pytest.approx((0, 0, 1), abs=0.01)
    right, up = vectors[middle, middle + 36], vectors[middle - 36, middle]
    assert right[0] > 0.6 and abs(right[1]) < 0.1 and up[1] > 0.6 and abs(up[0]) < 0.1
    assert np.allclose(vectors[:, ::-1] * (-1, 1, 1), vectors, atol=0.02)
    assert np.allclose(vectors[::-1] * (1, -1, 1), vectors, atol=0.02)
    assert np.degrees(np.arccos(vectors[inside][:, 2])).max() < 85


def test_maps_do_not_depend_on_colors(pictures):
    item = Item("owl", 64, 16, 24)
    first, second = (
        NormalMap(Picture((CELL, CELL), ground, (Item("owl", 64, 16, 24, color),)))
        for ground, color in (("navy", None), ("white", "pink"))
    )
    assert first.key == second.key and first.draw(pictures).tobytes() == second.draw(pictures).tobytes()
    assert first.key != NormalMap(Picture((CELL, CELL), "navy", (Item("owl", 64, 8, 24),))).key
    drawn = np.asarray(first.draw(pictures))
    outside = np.ones((CELL, CELL), bool)
    outside[item.top : item.top + 64, item.left : item.left + 64] = False
    assert drawn[outside].max() == 0 < drawn[~outside].max()


def test_angle_error_is_that_of_a_known_turn():
    picture, shape = disc()
    truth = normals.normals(picture, shape)
    assert normals.angle_error(normals.encoded(truth), picture, shape) < 0.5
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    turned = to_image((np.where(truth.any(-1, keepdims=True), truth @ about_z.T, 0) + 1) / 2)
    tilt = np.arccos(truth[truth.any(-1)][:, 2])  # two normals of one tilt, 20 degrees apart about z
    wanted = np.degrees(np.arccos(np.cos(tilt) ** 2 + np.sin(tilt) ** 2 * c)).mean()
    assert normals.angle_error(turned, picture, shape) == pytest.approx(wanted, abs=0.5)
    facing = Image.new("RGB", (CELL, CELL), (128, 128, 255))
    assert normals.angle_error(facing, picture, shape) == pytest.approx(np.degrees(tilt).mean(), abs=0.5)


def test_the_right_emoji_is_recognized_in_its_place(pictures):
    examples = normals.examples("normal", NAMES, 12, random.Random(4), held_out=True)
    shown = [example.about.picture for example in examples]
    assert {picture.items[0].side for picture in shown} == {64, 96}
    few = {name: pictures[name] for name in NAMES[::8]} | {p.names[0]: pictures[p.names[0]] for p in shown}
    for picture, other in zip(shown, shown[1:] + shown[:1], strict=True):
        assert normals.right_emoji(picture.draw(pictures), picture, few)
        assert not normals.right_emoji(other.draw(pictures), picture, few)


@pytest.mark.parametrize("kind", normals.KINDS)
def test_examples_of_normals(kind):
    for held_out in (False, True):
        found = normals.examples(kind, NAMES, 200, random.Random(5), held_out)
        assert all(example.about.picture.held_out == held_out for example in found)
        for example in found:
            (panels,) = example.images
            maps = [isinstance(panel, NormalMap) for panel in panels]
            assert maps == [kind == "normal", kind != "normal"]
            assert "<normal map>" in example.turns[0] and "96x192" in example.turns[0]
            assert example.turns[0].endswith("\n" + example.about.prompt) and example.turns[1] == PICTURE
        named = [
            any(
                w in e.about.prompt.lower()
                for w in (e.about.picture.names[0], marks.word_for(e.about.picture.names[0]))
            )
            for e in found
        ]
        share = sum(named) / len(named)
        assert share == (1 if kind == "pair_normal" or (held_out and kind == "normal") else share)
        if kind == "predict_normal" and held_out:
            assert {example.about.prompt for example in found} == {""}
        if not held_out and kind != "pair_normal":
            assert 0.2 < share < 0.4
    unnamed = normals.examples("normal_unnamed", NAMES, 50, random.Random(5), held_out=True)
    assert all(e.about.picture.background in e.about.prompt for e in unnamed)
    assert not any(f" {e.about.picture.names[0]} " in f" {e.about.prompt} " for e in unnamed)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(pictures) -> SimpleNamespace:
    """A stand-in for Bench whose image tokenizer changes nothing; codes are pictures."""
    made = SimpleNamespace(count=6, names=NAMES, pictures=pictures, sheets=[])
    made.rng = lambda row: random.Random(row)
    made.through_tokenizer = lambda image, panels=1: image
    made.codes_of = made.shown = lambda image: image
    made.sheet = lambda row, images, words: made.sheets.append((row, len(images), len(words)))
    return made


@pytest.mark.parametrize("right", [True, False])
def test_rows_of_detection(bench, right):
    def answered(asked, sizes, label, cfg, top_k):
        assert (cfg, top_k) == (1, 200) and [size for size in sizes] == [turns[0][1][-1].size for turns in asked]
        if right and label == "detect":
            todo = marks.examples("detect", NAMES, 6, random.Random("detect"), held_out=True)
            return [example.about.draw(bench.pictures) for example in todo]
        given = [turns[0][1][-1] for turns in asked]
        if label == "detect_absent" and not right:
            for image in given:
                image.paste("magenta", (8, 8, 56, 12)), image.paste("magenta", (8, 52, 56, 56))
                image.paste("magenta", (8, 8, 12, 56)), image.paste("magenta", (52, 8, 56, 56))
        return given

    bench.answered_in_pictures = answered
    found = marks_rows.ROWS["detect"](bench)
    assert found["box right (tokenizer)"] == Share(6, 6)
    assert found["box right"] == found["box found"] == Share(6 if right else 0, 6)
    assert found["overlap"].value > 0.6 if right else found["overlap"].value == 0
    assert marks_rows.ROWS["detect_absent"](bench) == {"unchanged": Share(6 if right else 0, 6)}
    assert bench.sheets == [("detect", 6, 6), ("detect_absent", 6, 6)]


@pytest.mark.parametrize("right", [True, False])
def test_rows_of_normals(bench, right, monkeypatch):
    def lower(bench, todo, given, label):
        assert [image.size for image in given] == [(CELL, CELL)] * 6
        true = [example.images[0][1].draw(bench.pictures) for example in todo]
        return true if right else true[1:] + true[:1]

    monkeypatch.setattr(normals_rows, "lower_panels", lower)
    found = normals_rows.ROWS["predict_normal"](bench)
    assert found["angle error (tokenizer)"].value < 1 < 8 < found["towards the viewer"].value
    assert found["angle error"].value < 1 if right else found["angle error"] == found["another object"]
    assert found["another object"].value > 15
    for kind in ("normal", "normal_unnamed"):
        assert normals_rows.ROWS[kind](bench) == {
            "right emoji": Share(6 if right else 0, 6),
            "right emoji (tokenizer)": Share(6, 6),
        }
    assert [sheet[0] for sheet in bench.sheets] == ["predict_normal", "normal", "normal_unnamed"]
