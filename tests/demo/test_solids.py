"""The renderer of solids, their eight views, and the measure of views."""

import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import meshes
import numpy as np
import pytest
import solids
import torch
import views
import views_rows
from evaluation import Share
from meshes import about_x, about_y, ball, box, fitted, joined, rendered
from views import Turn, View

from lumina_mgpt import Checkpoint
from lumina_mgpt.images import psnr
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.unirep import encode_conversation
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

DEMO = Path(__file__).parents[2] / "assets" / "demo"


# -- renderer ----------------------------------------------------------------------------------------------------------


def test_a_ball_has_the_outline_normals_and_depth_of_a_sphere():
    side, distance = 120, 5.0
    seen = rendered(fitted(ball(3.0)), 0, side)
    radius = 0.94 * side / 2
    assert (seen.material >= 0).sum() == pytest.approx(math.pi * radius**2, rel=0.02)
    rows, columns = np.nonzero(seen.material >= 0)
    # Points where the rays of the pixels meet a sphere of radius 1.
    x, y = (columns + 0.5 - side / 2), (side / 2 - rows - 0.5)
    rays = np.stack([x, y, np.full(len(x), -radius * math.sqrt(distance**2 - 1))], 1)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    along = -rays[:, 2] * distance
    reach = along - np.sqrt(np.clip(along**2 - distance**2 + 1, 0, None))
    points = rays * reach[:, None] + (0, 0, distance)
    angles = np.degrees(np.arccos(np.clip((points * seen.normal[rows, columns]).sum(1), -1, 1)))
    assert np.median(angles) < 2
    assert np.abs(points[:, 2] - seen.nearness[rows, columns]).mean() < 0.02
    assert seen.nearness.max() == pytest.approx(1, abs=0.02) and seen.nearness[0, 0] == -1


def test_the_nearer_part_hides_the_other_in_any_order():
    front, back = box((1, 1, 0.2), (0, 0, 0.5), material=1), box((1, 1, 0.2), (0, 0, -0.5), material=2)
    for parts in ((front, back), (back, front)):
        mesh = fitted(joined(parts))
        assert rendered(mesh, 0, 60).material[30, 30] == 1
        assert rendered(mesh, 180, 60).material[30, 30] == 2


def test_turning_by_90_degrees_moves_the_front_to_the_right():
    marked = fitted(joined([box((1, 1, 1)), box((0.2, 0.2, 0.6), (0, 0, 0.8), material=1)]))
    columns = {turn: np.nonzero(rendered(marked, turn, 60).material == 1)[1] for turn in (0, 90, 270)}
    assert columns[270].max() < 30 < columns[90].min() and columns[0].mean() == pytest.approx(29.5, abs=0.5)


def test_rotations_are_named_by_where_axes_go():
    x, y, z = np.eye(3)
    assert (
        np.allclose(about_x(90) @ y, z) and np.allclose(about_y(90) @ z, x) and np.allclose(meshes.about_z(90) @ x, y)
    )


@pytest.mark.parametrize("solid", solids.SOLIDS)
def test_normals_point_outwards(solid):
    """Corners are counter-clockwise as seen from the side that the normals point to; else faces would be invisible."""
    mesh = solids.SOLIDS[solid]()
    first, second, third = (mesh.corners[:, n] for n in range(3))
    planes = np.cross(second - first, third - first)
    size = np.linalg.norm(planes, axis=1)
    real = size > 1e-9  # a cone has triangles without an area at its tip
    planes = planes[real] / size[real, None]
    assert (np.einsum("tcx,tx->tc", mesh.normals[real], planes) > 0.3).all()
    assert np.allclose(np.linalg.norm(mesh.normals[real], axis=-1), 1)


# -- solids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solid", solids.SOLIDS)
def test_eight_views_of_a_solid_differ_and_fit(solid):
    drawn = np.stack([solids.cutout(solid, "red", number) for number in range(solids.VIEWS)])
    differences = ((drawn[:, None] - drawn) ** 2).mean((2, 3, 4))
    assert differences[~np.eye(len(drawn), dtype=bool)].min() > 0.006
    assert not drawn[:, [0, -1]].any() and not drawn[:, :, [0, -1]].any(), "a view is cut off"
    assert (solids.view_of(solid, 0).own.sum((0, 1)) > 100).all()


@pytest.mark.parametrize("solid", solids.SOLIDS)
def test_every_view_shows_the_named_color(solid):
    for number in range(solids.VIEWS):
        red, blue = (solids.cutout(solid, color, number) for color in ("red", "blue"))
        assert ((red - blue) ** 2).sum() > 20, number
        assert np.array_equal(red[..., 3], blue[..., 3])


def test_colors_and_backgrounds():
    picture = np.asarray(solids.draw("duck", "green", 2, "navy"))
    assert picture.shape == (64, 64, 3) and tuple(picture[0, 0]) == (0, 0, 128)
    most = Counter(map(tuple, picture.reshape(-1, 3)[(picture.reshape(-1, 3) != (0, 0, 128)).any(1)]))
    red, green, blue = most.most_common(1)[0][0]
    assert green > 1.5 * max(red, blue)
    for color in solids.SOLID_COLORS:
        assert len(solids.backdrops(color)) >= 12 and color not in solids.backdrops(color)


def test_depth_and_normals_of_a_view():
    near = np.asarray(solids.depth_map("arrow", 0).convert("L"))
    assert near[0, 0] == 0 and near[near > 0].max() > 150
    rows = np.nonzero(near)[0]
    top, bottom = near[rows.min() + 2], near[rows.max() - 3]
    assert top[top > 0].mean() < bottom[bottom > 0].mean(), "the tip is nearer than the end"
    view = solids.view_of("cube", 0)
    inside = view.opacity > 0.99
    assert np.allclose(np.linalg.norm(view.normal[inside], axis=-1), 1, atol=1e-5)
    assert not view.normal[view.opacity == 0].any()
    elevation = meshes.ELEVATION
    top, front = view.normal[inside][0], view.normal[inside][-1]  # of the first and the last pixel
    assert top == pytest.approx((0, math.cos(elevation), math.sin(elevation)), abs=1e-4)
    assert front == pytest.approx((0, -math.sin(elevation), math.cos(elevation)), abs=1e-4)


# -- examples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, count", [("views", 8), ("views_given", 7)])
def test_held_out_pairs_are_evaluated_and_never_trained_on(kind, count):
    trained = views.examples(kind, [], 3000, random.Random(0))
    evaluated = views.examples(kind, [], 300, random.Random(0), held_out=True)
    assert evaluated == views.examples(kind, [], 300, random.Random(0), held_out=True)
    pairs = [{(e.about.solid, e.about.color) for e in part} for part in (trained, evaluated)]
    assert not pairs[0] & pairs[1] and len(pairs[1]) == len({solid for solid, _ in pairs[1]}) == len(solids.SOLIDS)
    assert len(pairs[0] | pairs[1]) == len(solids.SOLIDS) * len(solids.SOLID_COLORS)
    for example in trained[:200] + evaluated:
        assert example.turns[1] == PICTURE * count and len(example.images) == 8
        shown = [view for (view,) in example.images]
        numbers = [view.number for view in shown]
        assert numbers == [(numbers[0] + n) % 8 for n in range(8)]
        assert {(v.solid, v.color, v.backdrop) for v in shown} == {
            (example.about.solid, example.about.color, example.about.backdrop)
        }
    assert {e.about.first for e in evaluated} == {0}
    assert {e.about.first for e in trained} == (set(range(8)) if kind == "views_given" else {0})


def test_prompts_of_views_name_solid_color_and_background():
    found = views.examples("views", [], 1500, random.Random(1))
    assert found[0].turns[0].startswith("Generate 8 object views of 64x64 according to the following prompt:\n")
    plain = 0
    for example in found:
        text, turn = example.turns[0].partition("\n")[2].lower(), example.about
        assert turn.solid in text and turn.color in text and " a o" not in f" {text}", text
        plain += turn.backdrop not in text
        assert turn.backdrop in text or turn.backdrop == "white", text
    assert 0 < plain < 100
    asked = {example.turns[0] for example in views.examples("views_given", [], 200, random.Random(1))}
    assert len(asked) == 5 and all(text.count(PICTURE) == 1 for text in asked)


def test_equal_keys_are_equal_pictures():
    every = [view for turn in views.turns(held_out=True)[:20] for view in turn.views]
    drawn = {view.key: view.draw().tobytes() for view in every}
    assert len(drawn) == len(every) == len(set(drawn.values()))


# -- measure -----------------------------------------------------------------------------------------------------------

TURN = Turn("mug", "green", "navy")


def test_true_views_are_right_and_others_are_not():
    drawn = [view.draw() for view in TURN.views]
    right = [[True], [True] * 8, [True], [True], [True]]
    assert views.scores(TURN.views, drawn) == right
    assert views.scores(TURN.views[1:], drawn[1:]) == [[True], [True] * 7, *right[2:]]
    turned = views.scores(TURN.views, drawn[1:] + drawn[:1])
    assert turned == [[False], [False] * 8, *right[2:]]
    one = views.scores(TURN.views, [*drawn[:7], drawn[0]])
    assert one == [[False], [True] * 7 + [False], *right[2:]]
    other = [View("mug", "blue", n, "navy").draw() for n in range(8)]
    assert views.scores(TURN.views, other) == [[False], [False] * 8, [True], [False], [True]]
    other = [View("duck", "green", n, "navy").draw() for n in range(8)]
    assert views.scores(TURN.views, other) == [[False], [False] * 8, [False], [True], [True]]
    other = [View("mug", "green", n, "white").draw() for n in range(8)]
    assert views.scores(TURN.views, other)[4] == [False]
    assert views.scores(TURN.views, drawn[:7]) == [[False], [False] * 8, [False], [False], [False]]
    with pytest.raises(ValueError, match="64 x 64"):
        views.nearest_views([drawn[0].resize((96, 96))], "navy")


def test_all_solids_in_all_colors_are_told_apart():
    drawn = {
        view: view.draw()
        for solid in solids.SOLIDS
        for color in ("red", "pink", "purple")
        for view in Turn(solid, color, "white").views
    }
    assert views.nearest_views(list(drawn.values()), "white") == list(drawn)


def test_views_are_recognized_after_the_image_tokenizer():
    tokenizer = ImageTokenizer.from_checkpoint(DEMO / "movqgan.safetensors")
    for turn in (Turn("airplane", "yellow", "gray"), Turn("teapot", "pink", "olive")):
        drawn = [view.draw() for view in turn.views]
        again = tokenizer.decode(tokenizer.encode(drawn))
        assert views.scores(turn.views, again)[0] == [True], turn
        assert min(psnr(*pair) for pair in zip(again, drawn, strict=True)) > 17


# -- rows --------------------------------------------------------------------------------------------------------------


def bench_of(answers) -> SimpleNamespace:
    """A stand-in for Bench whose image tokenizer changes nothing, and whose codes are numbers of `answers`."""
    checkpoint = Checkpoint.open(DEMO)
    rng = np.random.default_rng(0)
    bench = SimpleNamespace(count=2, names=[], pictures={}, args=SimpleNamespace(cfg=1.0, seed=5), sheets=[], starts=[])
    bench.rng = lambda row: random.Random(row)
    bench.through_tokenizer = lambda image: image
    bench.sheet = lambda row, images, words, most: bench.sheets.append((row, len(images), most))
    coded = {}

    def codes_of(image):
        codes = torch.from_numpy(rng.integers(0, 2048, (8, 8)))
        coded[codes.numpy().tobytes()] = image
        return codes

    def sample(starts, layout, settings, repeats):
        bench.starts.append((settings.seed, [list(ids) for ids in starts]))
        assert layout.size == (64, 64) and list(repeats) == [0, 1]
        return [codes_of(image) for image in answers[len(bench.starts) - 1]]

    bench.codes_of = codes_of
    bench.shown = lambda codes: coded[codes.numpy().tobytes()]
    bench.pipeline = SimpleNamespace(checkpoint=checkpoint, sample=sample)
    return bench


@pytest.mark.parametrize("kind, shift", [("views", 0), ("views_given", 1)])
def test_rows_score_answers_that_are_sampled_image_by_image(kind, shift):
    """Right answers have 100 %, turned ones 0 %. The ids before each image are those of a training record."""
    todo = sorted(
        views.examples(kind, [], 2, random.Random(kind), held_out=True), key=lambda example: example.about.backdrop
    )
    count = todo[0].turns[1].count(PICTURE)
    wanted = [example.about.views[-count:] for example in todo]
    answers = [[v[(n + shift) % count].draw() for v in wanted] for n in range(count)]
    bench = bench_of(answers)
    figures = views_rows.ROWS[kind](bench)
    assert figures["all views right"] == Share(0 if shift else 2, 2)
    assert figures["each view right"] == Share(0 if shift else 2 * count, 2 * count)
    assert figures["all views right (tokenizer)"] == Share(2, 2) and figures["solid right in all"] == Share(2, 2)
    assert bench.sheets == [(kind, 16, 16)]
    assert len({seed for seed, _ in bench.starts}) == count, "images of an answer have different noise"
    vocabulary = bench.pipeline.checkpoint.vocabulary
    for number, example in enumerate(todo):
        starts = [found[number] for _, found in bench.starts]
        assert all(long[: len(short)] == short for short, long in zip(starts, starts[1:], strict=False))
        assert [len(b) - len(a) for a, b in zip(starts, starts[1:], strict=False)] == [8 * 9 + 4] * (count - 1)
        text = [part for part in example.turns[0].split(PICTURE) if part]
        if kind == "views":
            assert starts[0] == encode_conversation([("human", text)], vocabulary)[0]
