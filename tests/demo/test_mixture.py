"""The demo's second training: scenes, words, questions, conversations, their files, and the search for emoji."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import coloring
import composed
import drawing
import examples
import marks
import mixture
import numpy as np
import pytest
import questions
import reading
import reading_rows
import talk_rows
import talks
import words
from composed import SMALL, Item, Picture
from emoji import CELL, known_names
from finder import Finder, background_right, in_words
from PIL import Image
from row_tools import most_frequent, share

from lumina_mgpt.data.records import parse_record
from lumina_mgpt.images import best_size, candidate_sizes, crop_panel
from lumina_mgpt.prompts import PICTURE, text_to_image

ROOT = Path(__file__).parents[2]
NAMES = known_names()
UNKNOWN = ["walrus", "abacus", "harp"]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """Simple shapes in place of the emoji, which are not part of the repository."""
    y, x = (np.mgrid[:CELL, :CELL] - (CELL - 1) / 2) / (CELL / 2)
    shapes = {
        "fox": np.hypot(x, y) < 0.8,
        "owl": (abs(x) < 0.7) & (abs(y) < 0.4),
        "key": (abs(x) < 0.25) & (abs(y) < 0.9),
        "bell": abs(x) < (y + 0.9) / 2,
        "walrus": abs(x) + abs(y) < 0.8,
    }
    made = {}
    for n, (name, inside) in enumerate(shapes.items()):
        rgba = np.zeros((CELL, CELL, 4), np.float32)
        rgba[..., n % 3] = 0.5 + 0.4 * y
        rgba[..., (n + 1) % 3] = 0.3 * (n % 2)
        rgba[..., 3] = inside & (abs(y) < 0.9)
        made[name] = rgba
    return made


def every_picture(made: list[examples.Example]) -> list[Picture]:
    return [panel for example in made for panels in example.images for panel in panels]


@pytest.mark.parametrize("kind", mixture.kinds())
def test_examples_keep_to_their_side_of_the_held_out_combinations(kind):
    source = mixture.kinds()[kind]
    made = source.examples(NAMES, 40, random.Random(1), UNKNOWN)
    assert made == source.examples(NAMES, 40, random.Random(1), UNKNOWN) and len(made) == 40
    assert {example.kind for example in made} == {kind}
    shown = [picture for picture in every_picture(made) if isinstance(picture, Picture)]
    assert not any(picture.held_out for picture in shown)
    if kind == "unknown":
        return
    if source.module in (drawing, reading, talks, marks):
        tested = source.module.examples(kind, NAMES, 20, random.Random(2), held_out=True)
        groups = [every_picture([example]) for example in tested]
        assert all(any(picture.held_out for picture in group) for group in groups)


def test_objects_are_inside_apart_and_on_the_grid_of_codes():
    rng = random.Random(3)
    for count in (1, 2, 3, 4):
        sizes = set()
        for _ in range(60):
            picture = composed.arranged([(name, None) for name in rng.sample(NAMES, count)], rng)
            sizes.add(picture.size)
            assert all(side % 32 == 0 for side in picture.size)
            boxes = np.zeros(picture.size[::-1], int)
            for item in picture.items:
                assert item.left % 8 == item.top % 8 == 0 and item.side in (SMALL, CELL)
                assert item.left + item.side <= picture.size[0] and item.top + item.side <= picture.size[1]
                boxes[item.top : item.top + item.side, item.left : item.left + item.side] += 1
            assert boxes.max() == 1
        assert len(sizes) >= 3 or count == 4
    places = {composed.arranged([("fox", None)], rng, size=(96, 96)).items[0].middle for _ in range(60)}
    assert len(places) > 10  # not always in the middle


def test_a_colour_keeps_shape_and_shading(pictures):
    for bright in (0.4, 0.6):
        shaded = pictures["fox"].copy()
        shaded[..., :3] = (bright + 0.3 * np.linspace(-1, 1, CELL))[:, None, None]
        for color, rgb in coloring.OBJECT_COLORS.items():
            made, inside = coloring.colored(shaded, color), shaded[..., 3] > 0.5
            assert made.dtype == np.float32 and np.array_equal(made[..., 3], shaded[..., 3])
            assert np.abs(np.median(made[inside][:, :3], 0) - np.array(rgb) / 255).max() < 0.05
            column = made[:, CELL // 2, :3][inside[:, CELL // 2]].sum(1)
            assert (np.diff(column) >= -1e-5).all() and column[-1] > column[0] + 0.3  # from dark to bright, as before
    white = np.ones((CELL, CELL, 4), np.float32)
    white[::7, :, :3] = 0.95
    blue = coloring.colored(white, "blue")[..., :3].mean((0, 1))
    assert blue[2] > blue[0] + 0.2  # a white object becomes blue, too


def test_plurals_and_articles():
    expected = {
        "fox": "foxes",
        "maple leaf": "maple leaves",
        "ear of corn": "ears of corn",
        "cherry": "cherries",
        "mouse": "mice",
        "toy": "toys",
        "church": "churches",
        "tomato": "tomatoes",
        "snowman": "snowmen",
    }
    assert {name: words.plural(name) for name in expected} == expected
    assert words.thing(("owl", "orange")) == "an orange owl" and words.thing(("grapes", "red")) == "red grapes"
    assert words.thing(("dog face", None)) == "a dog" and words.several(3, "mouse face", "red") == "three red mice"
    assert words.listed(["a", "b", "c"]) == "a, b and c" and words.listed(["a"]) == "a"
    wishes = {words.request("White background, a fox.", random.Random(n)) for n in range(20)}
    assert "Draw white background, a fox." in wishes and not any(text.endswith("..") for text in wishes)


def test_captions_can_be_understood():
    """What a caption says is what the scene shows, and another scene's caption says something else."""
    rng = random.Random(4)
    scenes = [reading.random_picture(NAMES, rng) for _ in range(300)]
    for picture, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        text = reading.described(picture)
        said = words.parsed(text)
        ordered = composed.in_reading_order(picture)
        assert said == words.Said.of(ordered) or (said and len(set(picture.names)) == 1), text
        assert said and said.objects == words.Said.of(picture).objects and said.background == picture.background
        if picture.background != other.background:
            assert said != words.parsed(reading.described(other))
    fox = Picture((128, 64), "red", (Item("fox", 64, 0, 0), Item("owl", 64, 64, 0)))
    assert reading.described(fox) == "a fox to the left of an owl on a red background"
    swapped = replace(fox, items=fox.items[::-1])
    assert reading.described(swapped) == reading.described(fox)
    assert words.caption(swapped) == "an owl to the right of a fox on a red background"
    assert words.caption(swapped, related=False) == "a fox and an owl on a red background"
    for wrong in ("", "a fox", "a fax on a red background", "three fox on a red background", "a fox and on red"):
        assert words.parsed(wrong) is None, wrong


def test_relations_and_places_are_clear_or_none():
    owl = Item("owl", 64, 64, 64)
    sides = {(0, 64): "left", (128, 64): "right", (64, 0): "above", (64, 128): "below", (0, 0): None, (64, 32): None}
    assert {corner: composed.relation(Item("fox", 64, *corner), owl) for corner in sides} == sides
    places = {(16, 16): "middle", (0, 16): "left", (32, 16): "right", (16, 0): "top", (16, 32): "bottom"}
    places |= {(0, 0): "top left", (32, 32): "bottom right", (24, 16): None, (24, 0): None}
    assert {corner: composed.place(Item("fox", 64, *corner), (96, 96)) for corner in places} == places


def test_questions_are_true_and_their_answers_balanced():
    rng = random.Random(5)
    for kind in questions.QUESTIONS:
        asked = [questions.QUESTIONS[kind](NAMES, rng) for _ in range(200)]
        shares = Counter(question.answer for question in asked)
        assert max(shares.values()) < 200 * 0.65 and len(shares) > 1, (kind, shares)
        if kind in ("count", "where", "color", "background"):
            assert max(shares.values()) < 2.2 * 200 / len(shares), (kind, shares)
    count = questions._count(Picture((128, 128), "red", tuple(Item("fox", 64, 0, 0) for _ in range(3))), rng, "fox")
    assert count.answer == "three" and questions._count(count.picture, rng, "owl").answer == "none"
    pair = Picture((128, 64), "red", (Item("fox", 64, 0, 0, "green"), Item("owl", 64, 64, 0)))
    found = {(q.text, q.answer) for _ in range(60) for q in questions.fitting(pair, ["fox", "owl", "key"], rng)}
    answers = dict(found)
    assert answers["What is to the left of the owl?"] == "a green fox"
    assert answers["What is to the right of the owl?"] == "nothing"
    assert answers["What is to the left of the green fox?"] == "nothing"
    assert answers["What colour is the fox?"] == "green" and answers["What colour is the background?"] == "red"
    assert answers["Is there a fox?"] == "yes" and answers["Is there a key?"] == "no"


def test_training_answers_need_the_picture():
    """No name in an earlier text answers a question, and no answer is too frequent."""
    answers: dict[str, Counter] = {}
    for example in reading.examples("question", NAMES, 600, random.Random(9)):
        asked = [text.replace(PICTURE, "").strip() for text in example.turns[::2]]
        assert len(set(asked)) == len(asked)
        assert sum("background" in text for text in asked) < 2, asked  # not in two wordings
        assert not any(text.startswith(("What is it", "What is this")) for text in asked[1:]), asked
        assert asked[0].startswith("Is there") or not any(text.startswith("Is there") for text in asked), asked
        for text, answer in zip(asked, example.turns[1::2], strict=True):
            kind = "count" if text.startswith("How many") else text.split()[0]
            answers.setdefault(kind, Counter())[answer] += 1
    for kind, most in (("count", 0.4), ("Is", 0.6), ("Where", 0.3)):
        assert max(answers[kind].values()) < most * answers[kind].total(), (kind, answers[kind])


def test_held_out_questions_have_the_numbers_of_objects_and_answers_of_the_others():
    for kind in questions.QUESTIONS:
        held, kept = (
            [questions.balanced(kind, NAMES, random.Random(n), held_out) for n in range(150)]
            for held_out in (True, False)
        )
        assert all(question.picture.held_out for question in held)
        assert not any(question.picture.held_out for question in kept)
        numbers = [Counter(len(question.picture.items) for question in made) for made in (held, kept)]
        assert numbers[0] == numbers[1]
        if kind in ("count", "exists", "where", "color", "background"):
            assert Counter(q.answer for q in held) == Counter(q.answer for q in kept)


def test_pictures_are_told_apart_by_what_they_show():
    for example in reading.examples("pictures", NAMES, 120, random.Random(6), held_out=True):
        text, answer = example.turns
        both = [name for name in NAMES if text.endswith(f" {words.thing((name, None))}?")]
        aliases = [name for name in NAMES if text.endswith(f" {words.with_article(name)}?")]
        shown = [any(name in panels[0].names for name in {*both, *aliases}) for panels in example.images]
        expected = {(True, False): "the first", (False, True): "the second", (True, True): "both"}
        assert answer == expected.get((shown[0], shown[1]), "neither"), example


def test_unknown_names_are_refused_and_known_ones_are_not():
    chains = 0
    for example in reading.examples("unknown", NAMES, 200, random.Random(7), unknown=UNKNOWN):
        texts, answers = example.turns[::2], example.turns[1::2]
        assert example.about.name in (NAMES if example.about.known else UNKNOWN)
        if texts[0].startswith("Do you know") or PICTURE in texts[0]:
            assert (answers[0] == words.UNKNOWN) == (not example.about.known)
            continue
        chains += len(answers) > 2
        assert all(answer == words.UNKNOWN for answer in answers[:-1]) and len(answers) <= 6
        assert answers[-1] == (PICTURE if example.about.known else words.UNKNOWN)
    assert chains > 20


def test_an_edit_changes_what_it_says_and_nothing_else():
    rng, seen = random.Random(8), Counter()
    for _ in range(300):
        before = reading.random_picture(NAMES, rng)
        operation, instruction, after = talks.edited(before, NAMES, rng)
        seen[operation] += 1
        kept = {item for item in before.items if item in after.items}
        assert after.size == before.size and after != before
        if operation == "background":
            assert after.items == before.items and after.background in instruction
        else:
            assert after.background == before.background and len(kept) == len(before.items) - 1
        if operation == "remove":
            assert len(after.items) == len(before.items) - 1
        if operation == "recolor":
            (new,) = set(after.items) - kept
            assert instruction.endswith(new.color)
    assert set(seen) == set(talks.EDITS)


def test_conversations_are_records(tmp_path, pictures):
    fox = Picture((96, 96), "red", (Item("fox", 64, 8, 16, "blue"),))
    owl = replace(fox, background="white")
    made = [
        examples.Example("talk", ("Draw it.", PICTURE, "make the background white", PICTURE), ((fox,), (owl,))),
        examples.Example("caption", (f"{reading.DESCRIBE} {PICTURE}", "a blue fox on a red background"), ((fox,),)),
    ]
    examples.write(tmp_path / "records" / "few.jsonl", made, tmp_path / "drawn", pictures)
    rows = [json.loads(line) for line in (tmp_path / "records" / "few.jsonl").read_text().splitlines()]
    talk, caption = map(parse_record, rows)
    assert [role for role, _ in talk.turns] == ["human", "assistant"] * 2 and talk.turns[3][1] == (1,)
    assert caption.turns[0][1] == (f"{reading.DESCRIBE} ", 0)
    assert talk.images[0] == caption.images[0] != talk.images[1]  # equal pictures share a file
    with Image.open(talk.images[1][0]) as image:
        assert image.size == (96, 96) and image.getpixel((95, 95)) == (255, 255, 255)
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 2
    assert sorted(examples.texts(tmp_path / "records" / "few.jsonl"))[0].strip() == ""
    (tmp_path / "short.jsonl").write_text('{"image_path": "a.png", "prompt": "a fox"}\n')
    assert examples.texts(tmp_path / "short.jsonl") == [text_to_image("a fox", CELL, CELL)]
    whole = examples.joined(*made)
    assert whole.kind == "caption" and len(whole.turns) == 6 and len(whole.images) == 3


def test_some_pictures_to_read_have_the_size_of_a_file(pictures):
    """They are what `describe` makes of a file of the whole picture."""
    made = reading.examples("caption", NAMES, 200, random.Random(10))
    scaled = [panel for panel in every_picture(made) if isinstance(panel, reading.Scaled)]
    assert scaled and len(scaled) < 60
    whole = Picture((192, 96), "red", (Item("fox", 96, 0, 0), Item("owl", 96, 96, 0)))
    image = whole.draw(pictures)
    assert best_size(image.size, candidate_sizes(96)) == (128, 64)
    small = reading.Scaled(whole)
    assert small.key != whole.key and small.draw(pictures) == crop_panel(image, (128, 64))


# -- measures ----------------------------------------------------------------------------------------------------------


def test_true_pictures_are_right_and_others_wrong(pictures):
    finder, rng = Finder({name: pictures[name] for name in ("fox", "owl", "key", "bell")}), random.Random(9)
    known = ["fox", "owl", "key", "bell"]
    for n in range(40):
        colors = [None, *coloring.OBJECT_COLORS]
        what = [(rng.choice(known), rng.choice(colors)) for _ in range(1 + n % 4)]
        picture = composed.arranged(what, rng)
        image = picture.draw(pictures)
        found = finder.find(image)
        assert sorted((i.name, i.left, i.top, i.side) for i in found) == sorted(
            (i.name, i.left, i.top, i.side) for i in picture.items
        ), (picture, in_words(found))
        assert finder.right(image, picture) and background_right(image, picture)
        other = known[(known.index(what[0][0]) + 1) % 4]
        assert not finder.right(image, reading.replaced(picture, 0, (other, what[0][1])))
        assert not finder.right(image, replace(picture, items=picture.items * 2))  # one object is missing
        assert len(what) == 1 or not finder.right(image, replace(picture, items=picture.items[1:]))  # one too many
        assert not background_right(
            image, replace(picture, background="navy" if picture.background == "red" else "red")
        )
        green = reading.replaced(picture, 0, (what[0][0], "green" if what[0][1] != "green" else "pink"))
        looks_the_same = finder.alike(picture.items[0], green.items[0])
        assert finder.right(image, green) == looks_the_same or len({*what}) < len(what)


def test_the_side_of_an_object_counts_where_it_is_asked_for(pictures):
    finder = Finder({name: pictures[name] for name in ("fox", "owl")})
    pair = Picture((128, 64), "white", (Item("fox", 64, 0, 0), Item("owl", 64, 64, 0)))
    swapped = replace(pair, items=(Item("fox", 64, 64, 0), Item("owl", 64, 0, 0)))
    image = pair.draw(pictures)
    assert finder.right(image, pair, related=True) and not finder.right(image, swapped, related=True)
    assert finder.right(image, swapped)


def test_an_empty_or_noisy_picture_shows_nothing(pictures):
    finder, noise = Finder(pictures), np.random.default_rng(0)
    for _ in range(5):
        pixels = np.full((96, 96, 3), 128) + noise.normal(0, 12, (96, 96, 3))
        assert finder.find(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))) == []


def test_the_most_frequent_answer_and_shares():
    assert most_frequent(["yes", "no", "yes", "none"]).value == 0.5
    assert share(ours == "yes" for ours in ("yes", "no")).value == 0.5


def test_a_conversation_becomes_one_picture():
    """Each turn has its words and its pictures, none of them cut off or on top of another."""
    import one_conversation

    colors = ["red", "green", "blue"]
    turns = [
        ("Draw it.", "", [Image.new("RGB", (128, 64), "red")]),
        ("What is it?", "a fox", []),
        ("Turn it.", "", [Image.new("RGB", (64, 64), color) for color in colors[1:] * 4]),
    ]
    sheet = np.asarray(one_conversation.drawn(turns))
    for color, count in zip(colors, (128 * 64, 4 * 64 * 64, 4 * 64 * 64), strict=True):
        assert (sheet == np.asarray(Image.new("RGB", (1, 1), color))[0, 0]).all(-1).sum() == count
    assert [step.want for step in one_conversation.STEPS].count("image") == 2
    assert {step.want for step in one_conversation.STEPS} == {"image", "text", "images"}


@pytest.mark.parametrize("refuses_all", [True, False])
def test_refusing_known_names_is_not_right(refuses_all):
    def refused(turns):
        return refuses_all or not any(f" {words.word_for(name)}" in turns[0][1][0] for name in NAMES)

    bench = SimpleNamespace(names=NAMES, unknown=UNKNOWN, rng=random.Random)
    bench.answered_in_words = lambda asked, label: [words.UNKNOWN if refused(turns) else "Yes." for turns in asked]
    bench.begins_with_picture = lambda asked: [
        turns[0][1][0].startswith("Draw") and not refused(turns) for turns in asked
    ]
    found = reading_rows.ROWS["unknown"](bench)
    assert found["refused"].value == 1
    assert found["known: yes, or drawn"].value == (0 if refuses_all else 1)


def test_places_count_in_conversations_where_a_caption_states_them():
    pair = Picture((128, 64), "red", (Item("fox", 64, 0, 0), Item("owl", 64, 64, 0)))
    same = replace(pair, items=(pair.items[0], replace(pair.items[1], name="fox")))
    for picture in (pair, same, replace(pair, items=pair.items[:1])):
        assert talk_rows._related(picture) == (" left of " in reading.described(picture)), picture
