"""A checkpoint that cannot be read is reported by its cause, and a file of another program by what it asks for."""

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import main_of
from safetensors.torch import load_file, save_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import load_state_dict

NOBODY = 65534


@pytest.fixture
def copy(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def locked():
    """A folder in which this process is an ordinary user, also when root runs the tests."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        with suppress(OSError):
            path.chmod(0o700)
    shutil.rmtree(folder)


def as_ordinary_user(action):
    """What `action` returns; while it runs, root gives up its right to read everything."""
    if os.geteuid() != 0:
        return action()
    os.seteuid(NOBODY)
    try:
        return action()
    finally:
        os.seteuid(0)


def quantize(folder: Path, out: Path) -> int:
    return main_of("quantize")(["--model_path", str(folder), "--save_path", str(out), "--group", "32"])


def rewrite(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- causes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "pytorch_model.bin"])
def test_weights_without_permission_are_not_called_damaged(name, tiny_checkpoint, locked):
    """The advice was to fetch them again. Reached from Python: commands import code that root alone may read here."""
    shutil.copy(tiny_checkpoint / "config.json", locked)
    path = locked / name
    if name.endswith(".bin"):
        torch.save(load_file(tiny_checkpoint / "model.safetensors"), path)
    else:
        shutil.copy(tiny_checkpoint / "model.safetensors", path)
    load_model(locked, torch.float32, "cpu")
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); change its permissions"):
        as_ordinary_user(lambda: load_model(locked, torch.float32, "cpu"))


def test_an_image_tokenizer_without_permission_is_not_called_damaged(tiny_checkpoint, locked):
    path = locked / "movqgan_270M.ckpt"
    shutil.copy(tiny_checkpoint / path.name, path)
    load_state_dict(path)
    path.chmod(0)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); change its permissions"):
        as_ordinary_user(lambda: load_state_dict(path))


def test_a_folder_without_permission_is_not_called_missing(tiny_checkpoint, locked):
    """Bug: the message was "no such folder, and no hub id"."""
    (locked / "private").mkdir()
    shutil.copytree(tiny_checkpoint, locked / "private" / "model")
    (locked / "private").chmod(0)
    with pytest.raises(InputError, match=r"private/model cannot be read \(Permission denied\)"):
        as_ordinary_user(lambda: resolve(locked / "private" / "model"))


def test_a_folder_in_the_place_of_weights(copy, tmp_path, capsys):
    (copy / "model.safetensors").unlink()
    (copy / "model-00001-of-00002.safetensors").mkdir()
    assert quantize(copy, tmp_path / "out") == 2
    assert "cannot be read (Is a directory)" in capsys.readouterr().err


def test_too_many_open_files(copy, monkeypatch):
    """Reached from Python: a limit of the process would hit the test runner too."""
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()

    def load(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch, "load", load)
    for action in (lambda: load_model(copy, None, "cpu"), lambda: load_state_dict(copy / "movqgan_270M.ckpt")):
        with pytest.raises(InputError, match=r"cannot be read \(Too many open files\); raise the limit of open files"):
            action()


@pytest.mark.parametrize("path", ["x" * 300, "a\x00b"], ids=["long", "null"])
def test_a_path_that_no_system_takes(path, tmp_path, capsys):
    assert quantize(Path(path), tmp_path / "out") == 2
    assert "cannot be read" in capsys.readouterr().err


# -- small files -------------------------------------------------------------------------------------------------------

SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DAMAGE = {
    "deep": '{"vocab_size": ' * 20000 + "1" + "}" * 20000,
    "digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "list": "[]",
    "zero bytes": "\x00" * 100,
    "empty": "",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", [*SMALL, "model.safetensors.index.json"])
def test_damaged_small_files_are_one_line(name, content, copy, tmp_path, capsys):
    """Deep nesting and long numbers ended in tracebacks."""
    (copy / name).write_text(content)
    line = ["--model_path", str(copy), "--prompt", "a cat", "--save_path", str(tmp_path / "out")]
    assert main_of("generate")([*line, "--width", "64", "--height", "64"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and name in error and len(error) < 600


def test_a_byte_order_mark_is_accepted_in_all_of_them(copy, tmp_path):
    """Windows editors write it."""
    index = {"weight_map": dict.fromkeys(load_file(copy / "model.safetensors"), "model.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*SMALL, "model.safetensors.index.json"):
        (copy / name).write_bytes(b"\xef\xbb\xbf" + (copy / name).read_bytes())
    assert quantize(copy, tmp_path / "out") == 0
    config = ModelConfig.from_json(copy / "config.json")
    assert Vocabulary.from_folder(copy, config).encode_text("a cat")


def test_a_name_with_lone_surrogates(copy, capsys, tmp_path):
    (copy / "special_tokens_map.json").write_text('{"bos_token": "\\ud800"}')
    line = ["--model_path", str(copy), "--prompt", "a cat", "--save_path", str(tmp_path / "out")]
    assert main_of("generate")([*line, "--width", "64", "--height", "64"]) == 2
    assert "has no token named" in capsys.readouterr().err


# -- settings of other models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope_type": "default"},
        {"type": "default"},
        {"type": None},
        {"rope_type": "default", "factor": 1.0},
    ],
)
def test_no_scaling_in_every_spelling(scaling, copy, tmp_path):
    """`{}` and `{"rope_type": "default"}` were refused."""
    rewrite(copy, rope_scaling=scaling)
    assert quantize(copy, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] is None


REFUSED = {
    "original_max_position_embeddings": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    },
    "attention_factor": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}},
    "must have a factor": {"rope_scaling": {"type": "linear"}},
    "must be null, default, linear or dynamic": {"rope_scaling": {"type": "linear", "rope_type": "dynamic"}},
    "rope_scaling must be null": {"rope_scaling": {"factor": 2.0}},
    "rope_parameters must be an object": {"rope_parameters": ["default"]},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    "must equal rope_scaling": {
        "rope_parameters": {"rope_type": "default"},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "partial_rotary_factor": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "partial_rotary_factor must": {"partial_rotary_factor": 0.25},
    "head_dim": {"head_dim": 32},
    "sliding_window": {"sliding_window": 256},
    "attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
    "num_local_experts": {"num_local_experts": 8},
    "quant_method 'gptq'": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "quant_method 'awq'": {"quantization_config": {"quant_method": "awq"}},
    "no quant_method": {"quantization_config": {"load_in_4bit": True}},
    "must not have desc_act": {
        "quantization_config": {"quant_method": "lumina_mgpt_int4", "bits": 4, "group_size": 32, "desc_act": True}
    },
    "vocab_size": {"vocab_size": True},
    "hidden_size": {"hidden_size": 64.0},
    "intermediate_size": {"intermediate_size": 10**30},
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "rope_theta must": {"rope_theta": float("nan")},
    "rms_norm_eps": {"rms_norm_eps": "1e-5"},
    "image_code_offset": {"image_code_offset": 512.5},
    "attention_bias": {"attention_bias": "false"},
    "dropout": {"dropout": 10**4000},
    "max_position_embeddings": {"max_position_embeddings": 2**63},
    "tie_word_embeddings": {"tie_word_embeddings": 1},
    "swin_norm": {"swin_norm": "no"},
    "z_loss_weight": {"z_loss_weight": -1.0},
    "hidden_act": {"hidden_act": ["silu"]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_change_the_result_is_refused_by_its_name(words, copy, tmp_path, capsys):
    """Bug: these settings were ignored, or gave a traceback."""
    rewrite(copy, **REFUSED[words])
    assert quantize(copy, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and "config.json" in error and len(error) < 700


def test_what_changes_nothing_is_allowed(copy, tmp_path):
    rewrite(
        copy,
        attention_dropout=0.1,
        head_dim=16,
        sliding_window=None,
        partial_rotary_factor=1.0,
        use_cache=False,
        vq_config={"a": 1},
        vocabulary_map={"<image>": 1},
        mask_image_logits=True,
        attention_bias=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    assert quantize(copy, tmp_path / "out") == 0


@pytest.mark.parametrize(
    "text, words",
    [
        ("\ufeffvocab_size: 4", "lacks hidden_size"),
        ("{a: " * 900 + "1" + "}" * 900, "nested"),
        ("a: \u0000", "zero byte"),
        ("hidden_size: 4\nhidden_sise: 4", "unknown keys hidden_sise"),
        ("vocab_size: yes", "vocab_size must be"),
    ],
    ids=["mark", "deep", "zero", "spelling", "kind"],
)
def test_model_yaml_of_another_editor_or_damaged(text, words, tmp_path):
    """Bug: deep nesting gave a traceback. Training from scratch reads the YAML with the same function."""
    (tmp_path / "model.yaml").write_text(text, encoding="utf-8")
    if words.startswith("vocab_size"):
        sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
        (tmp_path / "model.yaml").write_text("".join(f"{name}: 4\n" for name in sizes) + text)
    with pytest.raises(InputError, match=words):
        ModelConfig.from_yaml(tmp_path / "model.yaml")


def test_sizes_that_are_missing_are_named(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    del config["hidden_size"]
    (copy / "config.json").write_text(json.dumps(config))
    assert quantize(copy, tmp_path / "out") == 2
    assert "config.json lacks hidden_size" in capsys.readouterr().err


def test_int4_scales_that_are_not_numbers(copy, tmp_path):
    """They were loaded without an error."""
    assert quantize(copy, tmp_path / "int4") == 0
    path = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{name} holds values that are infinite or not a number"):
        load_model(tmp_path / "int4", torch.float32, "cpu")
