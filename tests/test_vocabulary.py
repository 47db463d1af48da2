"""Ids of the released tokenizer, of a tokenizer trained here, and errors for tokenizers that do not fit."""

import json
import pickle
import shutil
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.vocabulary import END_OF_TEXT, IMAGE_PLACEHOLDER, Vocabulary, grid_name, special_names

SIZES = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
RELEASED = ModelConfig(vocab_size=171385, **SIZES)


@pytest.fixture(scope="module")
def released(oracle_dir):
    return Vocabulary.from_folder(oracle_dir / "tokenizer", RELEASED)


def own_tokenizer(names, texts=256):
    """A byte-level BPE; the text pieces have the ids before the special names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=texts, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a hedgehog"], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def own_folder(folder, names=None, **settings):
    own_tokenizer(special_names() if names is None else names).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": END_OF_TEXT} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def own_config(offset=512, codes=64, vocab_size=576):
    return ModelConfig(vocab_size=vocab_size, image_code_offset=offset, num_image_codes=codes, **SIZES)


# -- the released tokenizer --------------------------------------------------------------------------------------------


def test_special_ids_equal_those_of_the_released_code(released, oracle_dir):
    prompts = json.loads((oracle_dir / "prompts.json").read_text())
    ids = prompts["_special"]
    assert released.bos_id == prompts["_bos_id"]
    assert released.image_start_id == ids["<racm3:break>"]
    assert released.image_end_id == ids["<eoss>"]
    assert released.row_end_id == ids["<reserved08799>"]
    assert released.turn_end_id == ids["<reserved08706>"]
    assert released.grid_id(2) == ids["<reserved08802>"] and released.grid_id(24) == ids["<reserved08824>"]
    assert released.code_slice == slice(155000, 171384)
    assert released.max_grid >= 64


@pytest.mark.parametrize("size", [1, 2, 9, 24, 63, 64])
def test_grid_size_round_trip(released, size):
    assert released.grid_size(released.grid_id(size)) == size


@pytest.mark.parametrize(
    "text", ["a hedgehog", "", "cafe\u0301 in 東京, “neon”\n\n two  spaces ", "{braces} 100% \x00"]
)
def test_text_round_trip_up_to_unicode_normalization(released, text):
    assert released.decode_text(released.encode_text(text)) == unicodedata.normalize("NFC", text)


def test_added_names_that_are_not_special_are_text(released):
    assert released.decode_text(released.encode_text("<tool_call> a cat")) == "<tool_call> a cat"


@pytest.mark.parametrize(
    "name",
    ["<eoss>", "<racm3:break>", "<reserved08799>", "<reserved08706>", grid_name(24), "<|im_end|>", IMAGE_PLACEHOLDER],
)
def test_control_names_in_text_are_refused(released, name):
    with pytest.raises(InputError, match=r"must not contain .*remove") as caught:
        released.encode_text(f"a dog{name}and a cat")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_text_that_is_not_unicode_is_refused(released):
    with pytest.raises(InputError, match="UTF-8"):
        released.encode_text("a \udcff cat")


# -- codes and grids ---------------------------------------------------------------------------------------------------


def test_code_round_trip_and_ranges(released):
    codes = torch.tensor([[0, 1, 16383], [5, 6, 7]])
    ids = released.code_to_id(codes)
    assert ids.tolist() == [[155000, 155001, 171383], [155005, 155006, 155007]]
    assert torch.equal(released.id_to_code(ids), codes)
    assert released.is_code(torch.tensor([154999, 155000, 171383, 171384])).tolist() == [False, True, True, False]
    for wrong in (-1, 16384):
        with pytest.raises(ValueError, match=rf"got {wrong} at \[1, 2\]"):
            released.code_to_id(torch.tensor([[0, 1, 2], [3, 4, wrong]]))
    for wrong in (154999, 171384):
        with pytest.raises(ValueError, match=rf"got {wrong} at \[0\]"):
            released.id_to_code(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="155000 is an image code"):
        released.decode_text([100, 155000])


def test_sizes_without_a_name_are_refused(released):
    for size in (0, -1, released.max_grid + 1):
        with pytest.raises(InputError, match=f"got {size}"):
            released.grid_id(size)
    with pytest.raises(ValueError, match="not a grid size"):
        released.grid_size(released.row_end_id)


# -- a tokenizer trained here ------------------------------------------------------------------------------------------


def test_special_names_are_sufficient(tmp_path):
    vocabulary = Vocabulary.from_folder(own_folder(tmp_path), own_config())
    assert vocabulary.max_grid == 64
    ids = [vocabulary.grid_id(size) for size in range(1, 65)]
    ids += [vocabulary.bos_id, vocabulary.image_start_id, vocabulary.image_end_id, vocabulary.row_end_id]
    assert len({*ids, vocabulary.turn_end_id}) == 69 and max(ids) < 512
    again = pickle.loads(pickle.dumps(vocabulary))  # data loading workers unpickle it
    assert again.encode_text("a hedgehog") == vocabulary.encode_text("a hedgehog")


def test_tiny_checkpoint_has_a_valid_vocabulary(tiny_checkpoint):
    vocabulary = Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))
    assert vocabulary.code_slice == slice(512, 576)


@pytest.mark.parametrize("missing", ["<eoss>", "<reserved08706>", grid_name(1), grid_name(64)])
def test_missing_name_is_refused(tmp_path, missing):
    folder = own_folder(tmp_path, [name for name in special_names() if name != missing])
    with pytest.raises(InputError, match="tokenizer.json has no token named") as caught:
        Vocabulary.from_folder(folder, own_config())
    assert missing in str(caught.value)


def test_text_and_control_ids_among_image_codes_are_refused(tmp_path):
    folder = own_folder(tmp_path)
    with pytest.raises(InputError, match="not among the image codes 200 ... 263"):  # text ids are 0 ... 255
        Vocabulary.from_folder(folder, own_config(offset=200))
    with pytest.raises(InputError, match="not among the image codes 320 ... 383"):  # special ids are 256 ...
        Vocabulary.from_folder(folder, own_config(offset=320))
    with pytest.raises(InputError, match="below vocab_size = 300"):
        Vocabulary.from_folder(folder, own_config(offset=0, codes=1, vocab_size=300))


def test_unused_names_may_have_any_id_but_are_refused_in_text(tmp_path):
    """A tokenizer may have names for unused ids, even among the image codes."""
    folder = own_folder(tmp_path, [*special_names(), "<unused0>", "<unused1>"])
    first_unused = 256 + len(special_names())
    vocabulary = Vocabulary.from_folder(folder, own_config(offset=first_unused, codes=1, vocab_size=first_unused + 1))
    for name in ("<unused0>", "<unused1>"):
        with pytest.raises(InputError, match=name):
            vocabulary.encode_text(f"a {name}")


def test_bos_defaults_to_eos(tmp_path):
    names = special_names() + ["<s>"]
    no_bos = Vocabulary.from_folder(own_folder(tmp_path, names), own_config())
    with_bos = Vocabulary.from_folder(own_folder(tmp_path, names, bos_token={"content": "<s>"}), own_config())
    assert with_bos.bos_id == 256 + len(names) - 1 and no_bos.bos_id == 256
    with pytest.raises(InputError, match="neither bos_token nor eos_token"):
        Vocabulary.from_folder(own_folder(tmp_path, names, eos_token=None), own_config())


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    tokenizer = own_tokenizer(special_names())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(own_folder(tmp_path) / "tokenizer.json"))
    vocabulary = Vocabulary.from_folder(tmp_path, own_config())
    assert vocabulary.decode_text(vocabulary.encode_text("a hedgehog on white")) == "a hedgehog on white"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_damaged_files_are_refused(tmp_path, name, content):
    (own_folder(tmp_path) / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        Vocabulary.from_folder(tmp_path, own_config())
    assert "\n" not in str(caught.value)


def test_folder_without_tokenizer_is_refused(tmp_path, oracle_dir):
    shutil.copy(oracle_dir / "tokenizer" / "tokenizer_config.json", tmp_path)
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        Vocabulary.from_folder(tmp_path, RELEASED)


# -- generated text ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.binary().map(lambda some: some.decode("latin-1"))), st.data())
def test_streamed_text_has_whole_characters_and_is_the_decoded_text(released, text, data):
    """Of ids that encode a text: each piece is whole. Of any ids: the pieces together are the text of all ids."""
    text = "".join(char for char in text if not "\ud800" <= char <= "\udfff" and char != "\ufffd")
    ids = released._tokenizer.encode(text, add_special_tokens=False).ids
    stream = released.text_stream()
    pieces = [stream.feed(id_) for id_ in ids]
    assert "\ufffd" not in "".join(pieces) and stream.end() == "" == stream.end()
    assert "".join(pieces) == released.decode_text(ids)
    shuffled = data.draw(st.permutations(ids + [ids[0]] if ids else ids))
    stream = released.text_stream()
    assert "".join(stream.feed(id_) for id_ in shuffled) + stream.end() == released.decode_text(shuffled)


def test_a_character_over_several_ids_is_given_out_once_it_is_complete(tmp_path):
    vocabulary = Vocabulary.from_folder(own_folder(tmp_path), own_config())
    ids = vocabulary.encode_text("aé🦔")  # one id a byte
    assert len(ids) == 7
    stream = vocabulary.text_stream()
    assert [stream.feed(id_) for id_ in ids] == ["a", "", "é", "", "", "", "🦔"] and stream.end() == ""
    broken = vocabulary.text_stream()
    assert [broken.feed(id_) for id_ in ids[:5]] == ["a", "", "é", "", ""]
    assert broken.end() == "\ufffd"
    control = vocabulary.text_stream()
    assert [control.feed(id_) for id_ in (ids[0], vocabulary.turn_end_id, ids[0])] == ["a", "", "a"]


def test_ids_of_texts_and_of_grids(released):
    v = released
    allowed = v.text_mask(images=True)
    banned = {v.bos_id, v.image_end_id, v.row_end_id, *map(v.grid_id, range(1, v.max_grid + 1))}
    banned |= set(range(v.code_slice.start, v.code_slice.stop))
    assert set((~allowed).nonzero().flatten().tolist()) == banned
    without = v.text_mask(images=False)
    assert (allowed ^ without).nonzero().flatten().tolist() == [v.image_start_id]
    assert allowed[v.turn_end_id] and len(allowed) == v.vocab_size
    assert v.grid_mask([2, 5]).nonzero().flatten().tolist() == sorted([v.grid_id(2), v.grid_id(5)])
