"""Contact sheets of the evaluation, and the row of conversations, which shows pictures with their edits."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import reading
import talk_rows
import talks
from emoji import CELL
from evaluation import contact_sheet
from finder import Finder
from PIL import Image
from row_tools import Share

NAMES = ["fox", "owl", "key", "bell", "cactus"]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """Simple shapes in place of the emoji, which are not part of the repository."""
    y, x = (np.mgrid[:CELL, :CELL] - (CELL - 1) / 2) / (CELL / 2)
    disc, bar, pole = np.hypot(x, y) < 0.8, (abs(x) < 0.7) & (abs(y) < 0.4), (abs(x) < 0.25) & (abs(y) < 0.9)
    shapes = disc, bar, pole, abs(x) < (y + 0.9) / 2, abs(x) + abs(y) < 0.8
    made = {}
    for n, (name, inside) in enumerate(zip(NAMES, shapes, strict=True)):
        made[name] = np.zeros((CELL, CELL, 4), np.float32)
        made[name][..., :3], made[name][..., 3] = (0.2 * n, 0.5, 1 - 0.2 * n), inside
    return made


def test_captions_are_never_cut():
    image = Image.new("RGB", (64, 64), "red")
    short, long = (contact_sheet([image, image], ["a fox", words], 2) for words in ("an owl", "an owl " * 30))
    assert short.width == long.width and long.height > short.height + 100
    dark = np.asarray(long.convert("L")) < 100
    assert dark[-20:].any() and not dark[-3:].any()  # the last line is there, and whole


@pytest.mark.parametrize("right", [True, False])
def test_the_row_of_conversations(pictures, right):
    """Answers of the first turns are right; those after the edit are either right or those before it."""
    told = [example.about for example in talks.examples("talk", NAMES, 8, random.Random("talk"), held_out=True)]
    after = [talk.after if right else talk.before for talk in told]

    def drawn(asked, sizes, label):
        scenes = after if label == "edit" else [talk.before for talk in told]
        assert [len(turns) for turns in asked] == [5 if label == "edit" else 1] * 8
        assert sizes == [(talk.after if label == "edit" else talk.before).size for talk in told]
        return [scene.draw(pictures) for scene in scenes]

    def said(asked, label):
        return [reading.described(scene) for scene in ([talk.before for talk in told], after)[label != "describe"]]

    sheets: list = []
    bench = SimpleNamespace(
        names=NAMES,
        count=8,
        rng=random.Random,
        finder=Finder(pictures),
        answered_in_pictures=drawn,
        answered_in_words=said,
        shown=lambda image: image,
        sheet=lambda *sheet, most: sheets.append(sheet),
    )
    figures = talk_rows.ROWS["talk"](bench)
    every, changed = Share(8, 8), Share(8 if right else 0, 8)
    assert figures["drawn right"] == figures["first description right"] == every
    assert figures["edited right"] == figures["second description right"] == changed
    ((row, images, captions),) = sheets
    assert row == "talk" and all(talk.instruction in text for talk, text in zip(told, captions, strict=True))
    for image, talk in zip(images, told, strict=True):
        assert image.height == talk.before.size[1] + talk.after.size[1] + 4
