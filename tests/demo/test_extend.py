"""More text pieces and rows for a trained checkpoint: what it could do stays the same."""

import json
from pathlib import Path

import emoji
import extend
import more_pieces
import publish
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lumina_mgpt.model.reading import load_model
from lumina_mgpt.pipeline import Checkpoint
from lumina_mgpt.prompt_files import example_prompts, other_examples

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo"
KNOWN = ["a hedgehog on a sky blue background", "Generate an image of 96x96 according to the following prompt:\nan owl"]
NEW = ["How many hedgehogs are there?", "three owls", "I don't know.", "How many owls are there?", "three hedgehogs"]


@pytest.fixture(scope="module")
def extended(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    rows = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]} for text in NEW * 2]
    (folder / "records").mkdir()
    (folder / "records" / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": ""}]} for text in KNOWN]
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    arguments = ["--model_path", tiny_checkpoint, "--known", folder / "known.jsonl", "--records", folder / "records"]
    assert extend.main([*map(str, arguments), "--save_path", str(folder / "start")]) == 0
    return folder / "start"


def test_known_texts_keep_their_ids_and_new_ones_become_shorter(tiny_checkpoint, extended):
    before, after = Checkpoint.open(tiny_checkpoint).vocabulary, Checkpoint.open(extended).vocabulary
    assert (before.bos_id, before.turn_end_id, before.code_slice) == (after.bos_id, after.turn_end_id, after.code_slice)
    assert [before.grid_id(n) for n in (1, 3, 64)] == [after.grid_id(n) for n in (1, 3, 64)]
    for text in KNOWN:
        assert before.encode_text(text) == after.encode_text(text)
    for text in NEW:
        ids = after.encode_text(text)
        assert len(ids) < len(before.encode_text(text)) and after.decode_text(ids) == text
        assert all(id_ < before.vocab_size or id_ >= after.code_slice.stop for id_ in ids)
    assert max(after.encode_text(NEW[0])) >= before.vocab_size


def test_the_extended_model_computes_the_same(tiny_checkpoint, extended):
    from lumina_mgpt.model.reading import load_model

    old, new = (load_model(folder, torch.float32, "cpu") for folder in (tiny_checkpoint, extended))
    vocabulary = Checkpoint.open(tiny_checkpoint).vocabulary
    codes = range(vocabulary.code_slice.start, vocabulary.code_slice.start + 3)
    ids = torch.tensor([[*vocabulary.encode_text(KNOWN[1]), *codes]])
    with torch.no_grad():
        before, after = (model.project(model(ids)) for model in (old, new))
    assert after.shape[-1] == old.config.vocab_size + extend.PIECES
    assert torch.equal(before, after[..., : before.shape[-1]])
    rows = new.embed_tokens.weight[old.config.vocab_size :]
    assert rows.isfinite().all() and rows.norm(dim=1).max() < 2 * old.embed_tokens.weight.norm(dim=1).max()


def test_the_extended_checkpoint_names_its_abilities(tiny_checkpoint, extended):
    family = Checkpoint.open(extended).config.family
    assert family.answers_in_text and not Checkpoint.open(tiny_checkpoint).config.family.answers_in_text
    assert family.task("multiview").views == 8 and family.task("detect", i2i=True).box
    assert family.task("edit", i2i=True).panels == 2  # the tasks of the family stay


def test_an_extended_checkpoint_is_copied(extended, tmp_path):
    options = ["--model_path", str(extended), "--known", "none", "--records", "none"]
    assert extend.main([*options, "--save_path", str(tmp_path / "s")]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "s" / name).read_bytes() == (extended / name).read_bytes(), name


def test_the_published_checkpoint_has_small_files(tmp_path):
    options = ["--model_path", str(DEMO), "--movqgan_path", str(DEMO / "movqgan.safetensors")]
    assert publish.main([*options, "--save_path", str(tmp_path / "demo")]) == 0
    assert len(list((tmp_path / "demo").glob("model*.safetensors"))) > 1
    assert all(file.stat().st_size < 16e6 for file in (tmp_path / "demo").iterdir())


def test_the_published_checkpoint_has_examples_of_all_it_can_do(extended, tmp_path):
    assert publish.main(["--model_path", str(extended), "--save_path", str(tmp_path / "demo")]) == 0
    checkpoint = Checkpoint.open(tmp_path / "demo")
    assert example_prompts(checkpoint.folder) == list(publish.PROMPTS)
    examples = other_examples(checkpoint.folder)
    assert set(examples) == set(publish.EXAMPLES) and "chat" in examples
    assert dict(other_examples(ROOT / "assets" / "demo")) == {
        name: tuple(some) for name, some in publish.EXAMPLES.items()
    }
    assert all(checkpoint.vocabulary.encode_text(text) for texts in examples.values() for text in texts)


def test_the_published_weights_are_the_mean_of_several_checkpoints(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for file in DEMO.iterdir():
        if not file.name.startswith("model"):
            (tmp_path / "other" / file.name).symlink_to(file)
    first = load_model(DEMO, None, "cpu").state_dict()
    tensors = {name: 3 * weight for file in DEMO.glob("model*.safetensors") for name, weight in load_file(file).items()}
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    shares = [f"{DEMO}=3", f"{tmp_path / 'other'}=1"]
    assert publish.main(["--model_path", *shares, "--save_path", str(tmp_path / "mean")]) == 0
    for name, weight in load_model(tmp_path / "mean", None, "cpu").state_dict().items():
        assert weight.dtype == first[name].dtype
        torch.testing.assert_close(weight.float(), 1.5 * first[name].float(), rtol=2e-3, atol=1e-6)
    for name, old, new in (("tokenizer.json", "}", "} "), ("config.json", "1e-05", "1e-06")):
        file = tmp_path / "other" / name
        text = file.read_text()
        file.unlink()
        file.write_text(text.replace(old, new))
        assert publish.main(["--model_path", *shares, "--save_path", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert f"but {name} of" in error and "leave one of them out" in error and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "text, both", [("runs/a", ("runs/a", 1)), ("a=2", ("a", 2)), ("lr=3/export", ("lr=3/export", 1))]
)
def test_shares_of_checkpoints(text, both):
    assert publish.weighted(text) == both


@pytest.mark.parametrize("text", ["a=0", "a=-1", "=2", "a=nan", "a=inf"])
def test_wrong_shares_are_refused(text, capsys):
    assert publish.main(["--model_path", text, "--save_path", "none"]) == 2
    assert "must be CHECKPOINT or CHECKPOINT=SHARE" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", publish.PROMPTS)
def test_example_prompts_have_known_names_and_colors(prompt):
    shown, ground = prompt.removesuffix(" background").rsplit(" on a ", 1)
    names = emoji.known_names()
    assert ground in emoji.COLORS
    assert shown.endswith(tuple(f" {name}" for name in names)), shown


def test_a_merge_that_changes_a_known_text_is_not_learned():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    fixed = tokenizer.encode(" fox").tokens
    assert len(fixed) == 2  # so that there is a pair
    merges = more_pieces.learned(tokenizer, [" fox"], [" foxes"] * 5, 10)
    assert tuple(fixed) not in merges and merges == more_pieces.learned(tokenizer, [" fox"], [" foxes"] * 5, 10)
    assert tuple(fixed) in more_pieces.learned(tokenizer, [], [" foxes"] * 5, 10)
    assert more_pieces.learned(tokenizer, [], ["once"], 10) == []  # too rare
