"""Heads with a fixed distance: against attention computed from the formula, and as a command."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import main_of
from pointed import Pointer, loss_without, point
from safetensors.torch import load_file, save_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "image_code_offset": 0,
    "num_image_codes": 32,
}


@pytest.fixture(params=[1, 2], ids=["one norm", "a norm a head"])
def model(request):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES, model_parallel_size=request.param))
    model.init_weights()
    for name, parameter in model.named_parameters():  # like a trained model, whose head norms are not the identity
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.normal_(parameter, 1.2 if "weight" in name else 0.0, 0.3)
    # Hidden states have a common component, like those of trained models.
    model.embed_tokens.weight.data += model.embed_tokens.weight.data.std() * torch.randn(96)
    return model


def attention_of(model: Transformer, layer: int, head: int, ids: torch.Tensor) -> torch.Tensor:
    """Attention probabilities (T, T), computed with complex rotations."""
    seen = {}
    module = model.layers[layer].self_attn
    handles = [
        getattr(module, name).register_forward_hook(lambda _, given, out, name=name: seen.update({name: out}))
        for name in ("q_norm", "k_norm")
    ]
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    T, H = len(ids), module.head_dim
    turn = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, H, 2) / H)
    q, k = (
        torch.complex(*seen[name][0, :, head].chunk(2, -1)) * torch.polar(torch.ones(1), turn)
        for name in ("q_norm", "k_norm")
    )
    scores = (q @ k.conj().mT).real / H**0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)


def test_pointed_head_attends_to_its_distance(model):
    ids = list(torch.randint(64, (4, 120)))
    others = torch.randint(64, (120,))  # not used by `point`
    assert attention_of(model, 0, 1, others).diagonal(-30).mean() < 0.1
    point(model, [Pointer(0, 1, 30), Pointer(1, 0, 7)], ids)
    assert attention_of(model, 0, 1, others).diagonal(-30).min() > 0.7
    assert attention_of(model, 1, 0, others).diagonal(-7).min() > 0.7


def test_pointing_changes_no_other_weights_and_starts_with_zero_output(model):
    ids = list(torch.randint(64, (2, 60)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    without = loss_without(model, (1, 0), ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert abs(without - loss_without(model, None, ids)) > 1e-4
    point(model, [Pointer(1, 0, 30)], ids)
    assert loss_without(model, None, ids) == pytest.approx(without, abs=1e-6)
    for name, tensor in model.state_dict().items():
        changed = (before[name] != tensor).nonzero()
        if name.startswith("layers.1.self_attn.") and "proj" in name and "v_proj" not in name:
            assert changed[:, 1 if "o_proj" in name else 0].unique().tolist() == list(range(48))
        else:
            assert not len(changed), name


def test_head_with_least_effect_on_the_loss_is_replaced(model):
    ids = list(torch.randint(64, (3, 60)))
    first, second = sorted(range(2), key=lambda head: loss_without(model, (1, head), ids))
    asked = [Pointer.parse("1:9"), Pointer.parse("0.1:5")]
    assert [str(made) for made in point(copy.deepcopy(model), asked, ids)] == ["0.1:5", f"1.{first}:9"]
    asked = [Pointer.parse(f"1.{first}:9"), Pointer.parse("1:5")]
    assert [str(made) for made in point(model, asked, ids)] == [f"1.{first}:9", f"1.{second}:5"]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["1.5"], "LAYER:DISTANCE"),
        (["1.:5"], "LAYER:DISTANCE"),
        (["1:5"] * 3, "layer 1 has 2 heads"),
        (["2.0:5"], "layers 0 to 1"),
        (["0.0:5", "0.0:6"], "given twice"),
        (["0.0:200"], "must be below 60, the longest sequence"),
    ],
)
def test_invalid_pointers_are_refused(model, heads, message):
    with pytest.raises(InputError, match=message):
        point(model, [Pointer.parse(head) for head in heads], list(torch.randint(64, (2, 60))))


@pytest.fixture
def own_keys(tiny_checkpoint, tmp_path) -> Path:
    """The tiny checkpoint with separate keys for each head."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    share = config["num_attention_heads"] // config["num_key_value_heads"]
    H = config["hidden_size"] // config["num_attention_heads"]
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = tensors[name].unflatten(0, (-1, H)).repeat_interleave(share, 0).flatten(0, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": config["num_attention_heads"]}))
    return folder


def test_heads_that_share_keys_are_refused(tokens, tiny_checkpoint, tmp_path, capsys):
    line = ["--model_path", str(tiny_checkpoint), "--data_config", str(tokens), "--save_path", str(tmp_path / "no")]
    assert main_of("point_heads")([*line, "--heads", "0.1:9"]) == 2
    assert "got 4 heads that share 2" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_command_writes_a_checkpoint(tokens, own_keys, tmp_path, capsys):
    line = ["--model_path", str(own_keys), "--data_config", str(tokens)]
    main, out = main_of("point_heads"), tmp_path / "out"
    config = ModelConfig.from_json(own_keys / "config.json")
    assert main([*line, "--heads", "0.1:9", "--save_path", str(out)]) == 0
    made = load_model(out, torch.float32, "cpu")
    H = config.head_dim
    assert not made.layers[0].self_attn.o_proj.weight[:, H : 2 * H].any()
    assert {file.name for file in own_keys.glob("*.json")} <= {file.name for file in out.iterdir()}
    assert "pointed 0.1:9" in capsys.readouterr().out
    for bad in (
        ["--heads", "0.9:9", "--save_path", str(tmp_path / "no")],
        ["--heads", "0.1:9", "--save_path", str(out)],
    ):
        assert main([*line, *bad]) == 2
    assert not (tmp_path / "no").exists()
