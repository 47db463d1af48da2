"""Ids of images and conversations: against sequences of the released code, round trips, and damaged ids."""

import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import text_to_image
from lumina_mgpt.unirep import (
    ImageLayout,
    Status,
    UniRepError,
    decode_image,
    drop_context,
    encode_conversation,
    encode_image,
    generation_prompt,
    image_length,
    split,
    status,
)
from lumina_mgpt.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(oracle_dir):
    config = ModelConfig(171520, 64, 64, 1, 2, 2)
    return Vocabulary.from_folder(oracle_dir / "tokenizer", config)


@pytest.fixture(scope="module")
def load(oracle_dir):
    return lambda name: json.loads((oracle_dir / name).read_text())


def random_codes(grid_rows, grid_cols, seed=0):
    return torch.randint(0, 16384, (4 * grid_rows, 4 * grid_cols), generator=torch.Generator().manual_seed(seed))


def image_of(token, vocabulary):
    start, end = token.index(vocabulary.image_start_id), token.index(vocabulary.image_end_id)
    return decode_image(token[start : end + 1], vocabulary)


# -- against the released code -----------------------------------------------------------------------------------------


def test_prompt_ids_equal_the_released_ones(vocabulary, load):
    cases = {name: case for name, case in load("prompts.json").items() if not name.startswith("_")}
    assert len(cases) == 10
    for name, case in cases.items():
        panels = 2 if "ref_tokens" in case else 1
        layout = ImageLayout.from_pixels(
            vocabulary, case["width"], case["height"], panels=panels, given_panels=panels - 1
        )
        ids = generation_prompt(case["question"], vocabulary)
        if panels == 2:
            panel = torch.tensor(case["ref_tokens"])
            panel = vocabulary.id_to_code(panel[vocabulary.is_code(panel)]).view(layout.rows // 2, layout.cols)
            prefix = layout.fill(panel.flatten()).tolist()
            assert prefix == case["ref_tokens"], name
            assert layout.given == panel.numel() and layout.prefix_length == len(prefix), name
            ids += prefix
        else:
            assert layout.ids[: layout.prefix_length].tolist() == case["prefix"], name
        assert ids == case["prompt"], name


def test_training_sequences_equal_the_released_ones(vocabulary, load):
    items = load("pre_tokenize.json")
    assert len(items) == 12 and {item["plain"] for item in items} == {True, False}
    for item in items:
        codes = image_of(item["token"], vocabulary)
        height, width = (8 * side for side in codes.shape)
        text = text_to_image(item["prompt"], width, height)
        if item["plain"]:
            text = text.replace(f" of {width}x{height}", "")
        ids, labels = encode_conversation([("human", [text]), ("assistant", [codes])], vocabulary)
        assert (ids, labels) == (item["token"], item["label"])


def test_dropped_context_equals_the_released_one(vocabulary, load):
    items, sources = load("finetune_items.json"), load("pre_tokenize.json")
    assert {item["dropped"] for item in items} == {True, False}
    for item in items:
        ids, labels = sources[item["item"]]["token"], sources[item["item"]]["label"]
        if item["dropped"]:
            ids, labels = drop_context(ids, labels, vocabulary)
        assert (ids, labels) == (item["token"], item["label"])


def test_greedy_images_decode(vocabulary, load):
    for case in load("generation_greedy.json").values():
        assert decode_image(case["decode_ids_input"], vocabulary).shape == (case["height"] // 8, case["width"] // 8)


# -- round trips -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 10**9))
@example(1, 1, 0)
@example(1, 64, 0)
@example(64, 1, 0)
@example(64, 64, 0)
def test_codes_to_ids_to_codes(vocabulary, grid_rows, grid_cols, seed):
    codes = random_codes(grid_rows, grid_cols, seed)
    ids = encode_image(codes, vocabulary)
    layout = ImageLayout(vocabulary, grid_rows, grid_cols)
    assert len(ids) == layout.length == 4 + 4 * grid_rows * (4 * grid_cols + 1)
    assert ids[:3] == [vocabulary.image_start_id, vocabulary.grid_id(grid_rows), vocabulary.grid_id(grid_cols)]
    assert all(ids[3 + row * (layout.cols + 1) + layout.cols] == vocabulary.row_end_id for row in range(layout.rows))
    assert ids[-1] == vocabulary.image_end_id
    assert torch.equal(decode_image(ids, vocabulary), codes)


def test_every_grid_is_restored(vocabulary):
    """All 4,096 grids."""
    codes = torch.randint(0, 16384, (256 * 256,))
    for grid_rows in range(1, 65):
        for grid_cols in range(1, 65):
            layout = ImageLayout(vocabulary, grid_rows, grid_cols)
            ids = layout.fill(codes[: layout.num_codes])
            assert len(ids) == layout.length
            assert torch.equal(decode_image(ids, vocabulary).flatten(), codes[: layout.num_codes])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_fill_with_some_codes_is_a_prefix_of_the_whole_image(vocabulary, grid_rows, grid_cols, data):
    """The prefix ends at the next unknown code and includes the row end of a complete row."""
    layout = ImageLayout(vocabulary, grid_rows, grid_cols)
    n = data.draw(st.integers(0, layout.num_codes))
    codes = random_codes(grid_rows, grid_cols).flatten()
    whole, known = layout.fill(codes).tolist(), layout.fill(codes[:n]).tolist()
    assert known == whole[: len(known)]
    assert len(known) == (int(layout.code_offsets[n]) if n < layout.num_codes else layout.length)
    assert ImageLayout(vocabulary, grid_rows, grid_cols, given=n).prefix_length == len(known)
    batch = layout.fill(torch.stack([codes[:n], codes[:n]]))
    assert batch.tolist() == [known, known]


def test_layout_of_the_released_size(vocabulary):
    layout = ImageLayout.from_pixels(vocabulary, 768, 768)
    assert (layout.rows, layout.cols, layout.length) == (96, 96, 9316)
    assert (layout.ids < 0).sum() == 9216 == len(layout.code_offsets)
    assert [layout.offset_of(n) for n in range(9216)] == layout.code_offsets.tolist()
    wide = ImageLayout.from_pixels(vocabulary, 64, 32)
    assert (wide.rows, wide.cols) == (4, 8)  # height before width
    assert wide.ids[1:3].tolist() == [vocabulary.grid_id(1), vocabulary.grid_id(2)]


@pytest.mark.parametrize(
    "width, height, panels, message",
    [
        (512, 500, 1, "height must be a multiple of 32, got 500; try 480 or 512"),
        (33, 32, 1, "width must be a multiple of 32, got 33; try 32 or 64"),
        (10, 32, 1, "width must be a multiple of 32, got 10; try 32"),
        (64, 96, 2, "height must be a multiple of 64, got 96; try 64 or 128"),
        (0, 32, 1, "width must be 32 to 6368 pixels, got 0; try 32"),
        (-64, 32, 1, "width must be 32 to 6368 pixels, got -64; try 32"),
        (32, 6400, 1, "height must be 32 to 6368 pixels, got 6400; try 6368"),
        (32, 6400, 2, "height must be 64 to 6336 pixels, got 6400; try 6336"),
    ],
)
def test_invalid_sizes_are_refused(vocabulary, width, height, panels, message):
    with pytest.raises(InputError) as caught:
        ImageLayout.from_pixels(vocabulary, width, height, panels=panels)
    assert str(caught.value) == message


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(ids, at, *replacement, remove=1):
    return ids[:at] + list(replacement) + ids[at + remove :]


def test_damaged_ids_are_reported_with_position_and_reason(vocabulary):
    v, ids = vocabulary, encode_image(random_codes(1, 2), vocabulary)  # 4 rows of 8; row r is at offset 3 + 9r
    code, row_end = v.code_slice.start, v.row_end_id
    cases = [
        ([], 0, "incomplete: expected image start"),
        (ids[1:], 0, "expected image start, found grid size 1"),
        (ids[:2], 2, "incomplete: expected grid columns"),
        (damaged(ids, 1, code), 1, "expected grid rows, found image code 0"),
        (damaged(ids, 1, v.grid_id(2)), 39, "expected an image code, found image end"),
        (damaged(ids, 2, v.grid_id(3)), 11, "fewer than 12 codes"),
        (damaged(ids, 2, v.grid_id(1)), 7, "more than 4 codes"),
        (ids[:-1], 39, "incomplete: expected image end"),
        (ids[:20], 20, "incomplete: expected row end"),
        (ids[:21], 21, "incomplete: expected an image code"),
        (damaged(ids, 14), 19, "row 1, column 7: expected an image code, found row end; the row has fewer than 8"),
        (damaged(ids, 14, code, code), 20, "row 1, column 8: expected row end, found image code"),
        (damaged(ids, 5, code - 1), 5, f"row 0, column 2: expected an image code, found id {code - 1}"),
        (damaged(ids, 5, v.code_slice.stop), 5, f"found id {v.code_slice.stop}"),
        (damaged(ids, 5, v.image_end_id), 5, "found image end; the row has fewer"),
        (damaged(ids, 39, row_end), 39, "expected image end after 4 rows, found row end"),
        ([*ids, v.turn_end_id], 40, "turn end after the image's end"),
        ([*ids, *ids], 40, "image start after the image's end"),
        (damaged(ids, 5, -1), 5, "found id -1"),
    ]
    for sequence, position, words in cases:
        with pytest.raises(UniRepError) as caught:
            decode_image(sequence, vocabulary)
        assert caught.value.position == position, caught.value
        assert str(caught.value).startswith(f"position {position}: ") and words in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_single_change_raises(vocabulary, data):
    """Except for the replacement of a code by another code, which is a valid image."""
    grid_rows, grid_cols = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ids = encode_image(random_codes(grid_rows, grid_cols), vocabulary)
    at = data.draw(st.integers(0, len(ids) - 1))
    id_ = data.draw(st.sampled_from([0, vocabulary.bos_id, 155000, 171384, *ids[:4], *ids[-3:]]))
    how = data.draw(st.sampled_from(["replace", "insert", "remove", "cut"]))
    sequence = {
        "replace": damaged(ids, at, id_),
        "insert": damaged(ids, at, id_, remove=0),
        "remove": damaged(ids, at),
        "cut": ids[:at],
    }[how]
    both_codes = bool(vocabulary.is_code(torch.tensor([id_, ids[at]])).all())
    assume(how != "replace" or (id_ != ids[at] and not both_codes))
    with pytest.raises(UniRepError) as caught:
        decode_image(sequence, vocabulary)
    assert 0 <= caught.value.position <= len(sequence)
    if how in ("replace", "cut") and at not in (1, 2):
        assert caught.value.position == at


@pytest.mark.parametrize("shape", [(3, 4), (4, 6), (0, 4), (16,), (1, 4, 4), (4, 800)])
def test_grids_of_another_shape_are_refused(vocabulary, shape):
    with pytest.raises(UniRepError):
        encode_image(torch.zeros(shape, dtype=torch.long), vocabulary)


def test_codes_out_of_range_are_refused(vocabulary):
    codes = random_codes(1, 1)
    codes[2, 3] = 16384
    with pytest.raises(UniRepError, match=r"got 16384 at \[2, 3\]"):
        encode_image(codes, vocabulary)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_several_turns(vocabulary):
    first, second = random_codes(1, 1, 1), random_codes(1, 2, 2)
    turns = [("human", ["draw ", first, " again"]), ("assistant", ["here: ", second]), ("human", ["thanks"])]
    ids, labels = encode_conversation(turns, vocabulary)
    text, close = vocabulary.encode_text, [vocabulary.turn_end_id]
    human = [vocabulary.bos_id, *text("draw "), *encode_image(first, vocabulary), *text(" again"), *close]
    assistant = [*text("here: "), *encode_image(second, vocabulary), *close]
    last = [*text("thanks"), *close]
    assert ids == human + assistant + last == generation_prompt(turns, vocabulary)
    assert labels == [-100] * len(human) + assistant + [-100] * len(last)


def test_roles_must_alternate(vocabulary):
    for roles in (["assistant"], ["human", "human"], ["human", "gpt"], ["human", "assistant", "assistant"]):
        with pytest.raises(InputError, match=f"turn {len(roles)} must be"):
            encode_conversation([(role, ["x"]) for role in roles], vocabulary)
    with pytest.raises(InputError, match="must end with a turn of the human"):
        generation_prompt([("human", ["x"]), ("assistant", ["y"])], vocabulary)


def test_context_is_dropped_only_before_a_single_final_image(vocabulary):
    image = random_codes(1, 1)

    def kept(*turns):
        ids, labels = encode_conversation(turns, vocabulary)
        return drop_context(ids, labels, vocabulary) == (ids, labels)

    alone = encode_image(image, vocabulary)
    ids, labels = encode_conversation([("human", ["a cat"]), ("assistant", [image])], vocabulary)
    assert drop_context(ids, labels, vocabulary) == (alone, alone)
    assert kept(("human", ["a cat"]), ("assistant", ["a cat"]))
    assert kept(("human", [image]), ("assistant", ["a cat"]))
    assert kept(("human", [image]), ("assistant", [image]))
    assert kept(("human", ["a cat"]), ("assistant", [image, " is a cat"]))
    assert kept(("human", ["a cat"]), ("assistant", ["here: ", image]))
    assert kept(("human", ["a cat"]), ("assistant", [image]), ("human", ["thanks"]))
    assert kept(("human", [image]))


def test_context_before_the_last_of_several_images_is_dropped_on_request(vocabulary):
    """Hand-made ids: B bos, T text, < image start, > image end, / turn end. Small letters are codes."""
    ids_of = dict(
        B=vocabulary.bos_id,
        T=vocabulary.encode_text("a")[0],
        **{"<": vocabulary.image_start_id, ">": vocabulary.image_end_id, "/": vocabulary.turn_end_id},
    )

    def dropped(human: str, *others: str) -> str | None:
        """What remains of turns without their ends; None if all of it does."""
        turns = [f"B{human}/", *(f"{turn}/" for turn in others)]
        text = "".join(turns)
        ids = [ids_of.get(letter, vocabulary.code_slice.start + ord(letter)) for letter in text]
        answers = [n % 2 == 1 for n, turn in enumerate(turns) for _ in turn]
        labels = [id_ if answer else -100 for id_, answer in zip(ids, answers, strict=True)]
        assert drop_context(ids, labels, vocabulary) == (ids, labels)
        kept, targets = drop_context(ids, labels, vocabulary, several=True)
        assert kept == targets or kept == ids
        return None if kept == ids and targets == labels else text[text.rindex("<") : len(text) - 1]

    assert dropped("T<ab>", "<cd>") == "<cd>"  # an edit
    assert dropped("T", "<ab><cd><ef>") == "<ef>"  # views
    assert dropped("T<ab>T", "<cd>", "T<ef>", "TT<gh>") == "<gh>"  # text before the last image
    assert dropped("T<ab>", "<cd>", "T", "T") is None  # ends in text
    assert dropped("T<ab>", "<cd>T") is None
    assert dropped("T<ab>", "T<cd>", "T<ef>") is None  # ends in an image of the human
    assert dropped("T<ab><cd>", "T") is None


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_status_of_each_id_of_an_answer(vocabulary):
    image, text = encode_image(random_codes(1, 1), vocabulary), vocabulary.encode_text("a hedgehog")
    answer = [*text, *image, *image, *text, vocabulary.turn_end_id]
    found = [status(answer[:length], vocabulary) for length in range(len(answer) + 1)]
    of_image = [Status.HEADER] * 2 + [Status.IMAGE] * (len(image) - 3) + [Status.TEXT]
    assert found == [Status.TEXT] * (len(text) + 1) + of_image * 2 + [Status.TEXT] * (len(text) + 1)


def test_answers_split_into_texts_and_code_grids(vocabulary):
    one, two = random_codes(1, 2, 1), random_codes(2, 1, 2)
    text, ends = vocabulary.encode_text("a hedgehog"), [vocabulary.turn_end_id]
    images = [encode_image(codes, vocabulary) for codes in (one, two)]
    parts = split([*images[0], *text, *images[1], *ends], vocabulary)
    assert torch.equal(parts[0], one) and torch.equal(parts[2], two) and parts[1::2] == [text, ends]
    assert split([], vocabulary) == [] and split(text, vocabulary) == [text]
    with pytest.raises(UniRepError) as caught:
        split([*text, *images[0][:-1]], vocabulary)
    assert caught.value.position == len(text) + len(images[0]) - 1
    with pytest.raises(UniRepError, match=f"position {len(text) + 1}: expected grid rows"):
        split([*text, images[0][0], *images[0][3:]], vocabulary)


def test_the_length_of_an_image_is_that_of_its_ids(vocabulary):
    for rows, cols in ((1, 1), (2, 3)):
        assert image_length(rows, cols, vocabulary) == len(encode_image(random_codes(rows, cols), vocabulary))
