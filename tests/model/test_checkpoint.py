"""Loading and saving: strict, nothing trusted, nothing half written; every error is one line that names its cause."""

import dataclasses
import json
import os
import re
import shutil
import sys
import types

import pytest
import torch
from peers import IMAGE_TOKENIZER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import reading, writing
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.model.writing import save_model

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    model_parallel_size=2,
    image_code_offset=32,
    num_image_codes=16,
)
IDS = torch.arange(20)[None]


def make(**changes) -> Transformer:
    model = Transformer(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(make(), tmp_path / "model")
    return tmp_path / "model"


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype, "cpu")


def change(folder, edit) -> None:
    """Rewrites the weights after `edit(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def error_of(action, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@torch.no_grad()
def same(a: Transformer, b: Transformer) -> bool:
    return torch.equal(a.project(a(IDS)), b.project(b(IDS)))


# What works


@pytest.mark.parametrize(
    "changes",
    [{}, dict(tie_word_embeddings=True), dict(attention_bias=True, mlp_bias=True)],
    ids=["plain", "tied", "biases"],
)
@pytest.mark.parametrize("limit", [10**9, 3000], ids=["one file", "shards"])
def test_what_is_saved_is_what_is_loaded(tmp_path, changes, limit):
    model = make(**changes)
    save_model(model, tmp_path, max_shard_bytes=limit)
    again = load(resolve(tmp_path))
    assert again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert same(model, again)


def test_the_released_layout(tmp_path):
    """Names, shapes and files as other programs expect them."""
    save_model(make(), tmp_path, torch.bfloat16, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    total = 0
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
        assert all(index["weight_map"][key] == name for key in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    assert "model.layers.1.self_attn.q_norm.bias" in index["weight_map"] and "lm_head.weight" in index["weight_map"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "chameleon"
    assert sorted(os.listdir(tmp_path)) == sorted([*files, "config.json", "model.safetensors.index.json"])


def test_transformers_chameleon_reads_what_is_saved(tmp_path):
    """No key is missing but the old image tokenizer's, and the logits are equal."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    model = make(model_parallel_size=1, num_key_value_heads=4)
    with torch.no_grad():  # transformers holds a row a head; equal rows are the same model
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(owner, leaf, torch.nn.Parameter(parameter.repeat(4, 1)))
    save_model(model, tmp_path)
    config = ChameleonConfig.from_pretrained(tmp_path, vocabulary_map={"<image>": 47}, vq_config=dict(IMAGE_TOKENIZER))
    theirs, report = ChameleonForConditionalGeneration.from_pretrained(
        tmp_path, config=config, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not report["unexpected_keys"] and all("vqmodel" in key for key in report["missing_keys"])
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(tmp_path / "config.json", tmp_path / "theirs" / "config.json")
    again = load(tmp_path / "theirs")  # with their model.vqmodel.* keys, which are ignored
    assert again.layers[0].self_attn.q_norm.weight.shape == (1, 8)  # repeated rows become one again
    with torch.no_grad():
        expected = theirs.eval()(input_ids=IDS).logits
        for ours in (model, again):
            torch.testing.assert_close(ours.project(ours(IDS)), expected, rtol=1e-5, atol=1e-3)  # logits up to 100


@pytest.mark.parametrize("leaves", [("weight", "bias"), ("weight",), ("bias",)])
def test_head_norms_with_a_row_a_head(folder, leaves):
    """A different row for each head stays as it is, is used by that head, and is saved so; weight and bias each."""
    names = [f"q_norm.{leaf}" for leaf in leaves]
    change(folder, lambda t: t.update({k: torch.randn(4, 8) for k in t if k.endswith(tuple(names))}))
    model = load(folder)
    norm = model.layers[1].self_attn.q_norm
    for leaf in leaves:
        assert getattr(norm, leaf).shape == (4, 8)
    x = torch.randn(2, 3, 4, 8)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    weight, bias = (p.repeat_interleave(4 // len(p), 0) for p in (norm.weight, norm.bias))
    torch.testing.assert_close(norm(x), plain * weight + bias)
    save_model(model, folder)
    assert same(model, load(folder))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights(folder, sharded):
    tensors = load_file(folder / "model.safetensors")
    expected = load(folder)
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        shards = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
        for file, keys in shards.items():
            torch.save({key: tensors[key] for key in keys}, folder / file)
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    assert same(expected, load(resolve(folder)))


def test_old_image_tokenizer_keys_are_passed_over(folder):
    expected = load(folder)
    change(folder, lambda t: t.update({"model.vqmodel.codes": torch.ones(3, dtype=torch.int64)}))
    assert same(expected, load(folder))


def test_shards_without_an_index(tmp_path):
    save_model(make(), tmp_path, max_shard_bytes=4000)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert same(make(), load(resolve(tmp_path)))


def test_a_tied_head_may_be_written_twice(tmp_path):
    model = make(tie_word_embeddings=True)
    save_model(model, tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(model, load(tmp_path))
    change(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight" in error_of(load, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_arrive_one_at_a_time_in_the_wanted_dtype(folder, dtype, monkeypatch):
    order, expected, assign = [], make(), reading.assign_parameter

    def watch(model, name, tensor):
        assert tensor.dtype == dtype and model.get_parameter(name).device.type == "meta"
        order.append(name)
        assign(model, name, tensor)

    monkeypatch.setattr(reading, "assign_parameter", watch)
    model = load_model(folder, dtype, "cpu")
    assert sorted(order) == sorted(name for name, _ in expected.named_parameters())
    assert all(torch.equal(p, expected.get_parameter(name).to(dtype)) for name, p in model.named_parameters())


def test_loaded_weights_do_not_lean_on_the_file(folder):
    model = load(folder)
    before = model.embed_tokens.weight.clone()
    os.truncate(folder / "model.safetensors", 10)
    assert torch.equal(model.embed_tokens.weight, before)


# What the user can correct


def test_places_that_are_no_checkpoint(tmp_path, folder):
    assert "is not a checkpoint folder: it holds no config.json" in error_of(resolve, tmp_path)
    assert "is a file; give the checkpoint folder" in error_of(resolve, folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in error_of(resolve, folder)
    for path in ("nowhere", "/no/such/folder", "./a/b", "a/b/c", "../x", "-a/b"):
        assert f"{path}: no such folder, and not a hub id" in error_of(resolve, path)


def test_missing_unknown_and_misshapen_keys_are_named_together(folder):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(49, 32)

    change(folder, edit)
    message = error_of(load, folder)
    assert "1 missing keys: model.norm.weight;" in message
    assert "1 unknown keys: model.layers.2.mlp.up_proj.weight;" in message
    assert "1 wrong shapes: lm_head.weight (49, 32) instead of (48, 32);" in message
    change(folder, lambda t: t.update({f"extra.{i}": torch.zeros(1) for i in range(99)}))
    assert re.search(r"100 unknown keys: (\S+, ){4}\S+ and 95 more;", error_of(load, folder))


def test_a_head_norm_of_the_wrong_shape(folder):
    name = "model.layers.0.self_attn.q_norm.weight"
    change(folder, lambda t: t.update({name: torch.zeros(3, 8)}))
    assert f"{name} (3, 8) instead of (2, 8) or (4, 8)" in error_of(load, folder)


def test_no_weight_is_read_before_names_and_shapes_are_checked(folder, monkeypatch):
    monkeypatch.setattr(reading, "assign_parameter", lambda *_: pytest.fail("a weight was read"))
    change(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(InputError, match="missing keys"):
        load(folder)


def test_whole_numbers_are_no_weights(folder):
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    assert "model.norm.weight must hold floating-point numbers, got torch.int8" in error_of(load, folder)


@pytest.mark.parametrize("content", ["half", "empty", "text", "pointer"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_damaged_weights(folder, content, suffix):
    path = folder / "model.safetensors"
    if suffix == "bin":
        torch.save(load_file(path), folder / "pytorch_model.bin")
        path.unlink()
        path = folder / "pytorch_model.bin"
    good = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14\n"
    path.write_bytes({"half": good[: len(good) // 2], "empty": b"", "text": b"hello", "pointer": pointer}[content])
    message = error_of(load, folder)
    assert f"{path} is damaged or cut short" in message and "fetch it again" in message


def test_a_pickle_runs_no_code(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    assert "is damaged" in error_of(load, folder)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    assert "it holds something else than named tensors" in error_of(load, folder)
    assert not (folder / "owned").exists()


UNTRUSTED = ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", "", 3, None, ["x"]]


@pytest.mark.parametrize("name", UNTRUSTED)
def test_an_index_is_not_trusted(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "model.safetensors.index.json" in error_of(resolve, folder)
    assert "model.safetensors.index.json" in error_of(load, folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "\xff"])
def test_a_damaged_index(folder, text):
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert "model.safetensors.index.json" in error_of(load, folder)


def test_missing_and_repeated_shards(tmp_path):
    save_model(make(), tmp_path, max_shard_bytes=4000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    kept = second.read_bytes()
    second.unlink()
    assert f"names shards that are missing: {second.name};" in error_of(resolve, tmp_path)
    shutil.copy(first, second)
    message = error_of(load, tmp_path)
    assert f"{second} repeats keys of another shard" in message
    second.write_bytes(kept)
    assert same(make(), load(tmp_path))


# The hub


def hub(monkeypatch, answer):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return answer(allow_patterns)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_fetched(monkeypatch, folder):
    calls = hub(monkeypatch, lambda patterns: str(folder))
    assert resolve("owner/name") == folder
    assert [name for name, _ in calls] == ["owner/name"]
    assert not any(pattern.endswith(".bin") for pattern in calls[0][1])  # no second copy of the weights as pickles


def test_pickles_are_fetched_where_there_is_nothing_else(monkeypatch, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def answer(patterns):
        if any(pattern.endswith(".bin") for pattern in patterns):
            torch.save(tensors, folder / "pytorch_model.bin")
        return str(folder)

    calls = hub(monkeypatch, answer)
    assert same(make(), load(resolve("owner/name")))
    assert len(calls) == 2  # pickles are asked for only once there proved to be nothing safer


def test_a_local_folder_is_preferred_to_the_hub(monkeypatch, tmp_path):
    calls = hub(monkeypatch, lambda patterns: pytest.fail("the hub was asked"))
    save_model(make(), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").is_dir() and not calls


def failing(kind):
    from huggingface_hub import errors

    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    return {
        "unknown": (errors.RepositoryNotFoundError("404\nmore", response=response), "the hub knows no such model"),
        "invalid": (errors.HFValidationError("Repo id must\nuse"), "the hub knows no such model"),
        "offline": (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids"),
        "uncached": (errors.LocalEntryNotFoundError("cannot reach\nthe hub"), "cannot be fetched (cannot reach)"),
        "network": (errors.HTTPError("connection broken"), "cannot be fetched (connection broken)"),
        "disk": (OSError(28, "No space left on device"), "No space left on device"),
    }[kind]


@pytest.mark.parametrize("kind", ["unknown", "invalid", "offline", "uncached", "network", "disk"])
def test_a_hub_that_does_not_answer(monkeypatch, kind):
    error, expected = failing(kind)

    def answer(patterns):
        raise error

    hub(monkeypatch, answer)
    message = error_of(resolve, "owner/name")
    assert message.startswith("owner/name: no such folder, and ") and expected in message


def test_a_hub_model_of_another_kind(monkeypatch, tmp_path):
    hub(monkeypatch, lambda patterns: str(tmp_path))
    assert "holds no config.json" in error_of(resolve, "owner/name")


def test_local_folders_do_not_need_the_hub(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve(folder) == folder


# Saving


@pytest.mark.parametrize("limits", [(10**9, 4000), (4000, 10**9), (4000, 9000)], ids=str)
def test_saving_over_another_model_leaves_nothing_of_it(tmp_path, limits):
    """An index or a shard left over would be read in place of the new file."""
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(make(), tmp_path, max_shard_bytes=limits[0])
    newer = make(hidden_size=64)
    save_model(newer, tmp_path, max_shard_bytes=limits[1])
    assert same(newer, load(tmp_path))
    listed = tmp_path / "model.safetensors.index.json"
    expected = set(json.loads(listed.read_text())["weight_map"].values()) if listed.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == expected
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("call", [0, 2])
def test_a_save_that_fails_leaves_the_old_model_whole(tmp_path, monkeypatch, call):
    """A full disk at the first or a later shard: the old weights load, and no temporary file is left."""
    model = make()
    save_model(model, tmp_path, max_shard_bytes=4000)
    before = sorted(os.listdir(tmp_path))
    calls = []

    def full(path, tensors):
        calls.append(path)
        if len(calls) > call:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(writing, "write_tensors", full)
    message = error_of(lambda: save_model(make(hidden_size=64), tmp_path, max_shard_bytes=4000))
    assert "cannot be written" in message and "No space left on device" in message
    assert sorted(os.listdir(tmp_path)) == before
    assert same(model, load(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(save_model, make(), tmp_path / "file" / "model")
