"""merge_lora.py gives the weights that peft's own merge gives, or refuses an adapter by the name of its field."""

import json
import re
from pathlib import Path

import pytest
import torch
from commands import main_of
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")

LAYERS = r".*layers\.[01]\.(self_attn\.q_proj|mlp\.down_proj)"
MATRICES = ["q_proj", "v_proj", "down_proj"]


class Scale(nn.Module):
    """A substitute for a norm: a weight, and optionally a bias."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def plain_modules(folder: Path) -> nn.Module:
    """The weights of a checkpoint as modules of torch under the names on disk; nothing of this project is used."""
    tensors = load_file(folder / "model.safetensors")
    root = nn.Module()
    for owner in sorted({name.rpartition(".")[0] for name in tensors}):
        own = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == owner}
        if owner.endswith(("_proj", "lm_head")):
            module = nn.Linear(*reversed(own["weight"].shape), bias="bias" in own)
            module.load_state_dict(own)
        elif owner.endswith("embed_tokens"):
            module = nn.Embedding.from_pretrained(own["weight"])
        else:
            module = Scale(own)
        at = root
        *path, leaf = owner.split(".")
        for part in path:
            at = getattr(at, part, None) or at.register_module(part, nn.Module()) or getattr(at, part)
        at.register_module(leaf, module)
    return root


def trained(base: Path, folder: Path, **settings) -> dict[str, torch.Tensor]:
    """Writes an adapter of random values to `folder` by peft; returns the weights that peft merges it into."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": MATRICES} | settings)
    model = peft.get_peft_model(plain_modules(base), config)
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = re.sub(r"\.(default|modules_to_save|original_module)(?=\.|$)", "", name)
            if plain in saved and "original_module" not in name:
                parameter.add_(torch.randn(parameter.shape) * (0.02 if "modules_to_save" in name else 0.1))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in model.merge_and_unload().named_parameters()}


def merge(base: Path, adapter: Path, out: Path) -> int:
    return main_of("merge_lora")(["--model_path", str(base), "--adapter", str(adapter), "--save_path", str(out)])


def edit(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def error_of(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


SETTINGS = {
    "plain": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 20}},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression": {"target_modules": LAYERS},
    "exclude_modules": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "trainable tokens": {"trainable_token_indices": {"embed_tokens": [3, 570]}},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_merged_as_peft_does(settings, tiny_checkpoint, tmp_path):
    """Bug: the fields were ignored: rslora was 50 % wrong, DoRA 86 %, modules_to_save 83 %, embeddings 99 %."""
    wanted = trained(tiny_checkpoint, tmp_path / "adapter", **settings)
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys() == wanted.keys()
    change = torch.cat([(wanted[name] - before[name]).flatten() for name in before]).norm()
    error = torch.cat([(wanted[name] - after[name]).flatten() for name in before]).norm()
    assert change > 0.1 and error < 1e-5 * change, (error / change).item()


def test_biases_that_were_trained_are_merged(tiny_checkpoint, tmp_path):
    """The biases of a model that has them in its attention."""
    base = with_biases(tiny_checkpoint, tmp_path / "base")
    for number, settings in enumerate(({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True})):
        settings |= {"target_modules": ["q_proj", "v_proj"]}
        wanted = trained(base, tmp_path / f"adapter{number}", **settings)
        assert merge(base, tmp_path / f"adapter{number}", tmp_path / f"out{number}") == 0
        after = load_file(tmp_path / f"out{number}" / "model.safetensors")
        assert all((wanted[name] - after[name]).abs().max() < 1e-6 for name in after), settings


def with_biases(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with small biases in its attention."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"attention_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if re.search(r"self_attn\.[qkvo]_proj\.weight", name)]:
        shape = tensors[name].shape[:1]
        tensors[name.replace(".weight", ".bias")] = torch.randn(shape, generator=random) / 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_bfloat16_weights_are_rounded_once(tiny_checkpoint, tmp_path):
    """The change is added in float32, then the sum is rounded."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    tensors = {name: x.bfloat16() for name, x in load_file(tiny_checkpoint / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file({name: x.float() for name, x in tensors.items()}, wide / "model.safetensors", {"format": "pt"})
    wanted = trained(wide, tmp_path / "adapter", use_dora=True, modules_to_save=["norm"])
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in after.values()} == {torch.bfloat16}
    different = sum((wanted[name].bfloat16() != after[name]).sum().item() for name in after)
    assert different < 1e-4 * sum(x.numel() for x in after.values())  # float32 products in another order


FIELDS = {
    "peft_type": {"peft_type": "LOHA"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "arrow_config": {"arrow_config": {"arrow_top_k": 2}},
    "init_lora_weights": {"init_lora_weights": "loftq"},
    "lora_scheme_of_next_year": {"lora_scheme_of_next_year": {"order": 2}},
    "lora_alpha": {"lora_alpha": float("nan")},
    "r": {"r": True},
}


@pytest.mark.parametrize("field", FIELDS)
def test_what_cannot_be_merged_is_refused_by_its_name(field, tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", **FIELDS[field])
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 2
    assert field in error_of(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["corda", "lora_ga", "pissa_niter_4", "mica", ["pissa"], 3])
def test_starts_that_need_more_than_the_file_are_refused(start, tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=start)
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 2
    assert "init_lora_weights" in error_of(capsys)


def test_unset_fields_of_a_newer_peft_are_allowed(tiny_checkpoint, tmp_path):
    trained(tiny_checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", next_year=None, use_next_year=False, peft_version="99.0")
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 0


def test_biases_of_adapters_need_biases_in_the_model(tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", lora_bias=True)
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 2
    assert "bias" in error_of(capsys)


CHANGES = {
    "no tensors": (lambda tensors: {}, "holds no tensors"),
    "no LoRA key": (lambda tensors: {"a.weight": torch.ones(2)}, "lacks tensors"),
    "half of a pair": (lambda tensors: dict(list(tensors.items())[1:]), "lacks tensors"),
    "one more": (lambda tensors: tensors | {"base_model.model.model.other.lora_A.weight": torch.ones(4, 4)}, "unknown"),
    "another width": (lambda tensors: {name: x[:, :2].contiguous() for name, x in tensors.items()}, "size mismatch"),
    "not a number": (lambda tensors: {name: x * float("nan") for name, x in tensors.items()}, "not a number"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_a_file_that_does_not_fit_is_refused(change, words, tiny_checkpoint, tmp_path, capsys):
    """A file without any LoRA key ended in "merged"."""
    trained(tiny_checkpoint, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 2
    assert words in error_of(capsys) and not (tmp_path / "out").exists()


def test_a_tied_embedding_is_not_parted(tiny_checkpoint, tmp_path, capsys):
    """Embedding and head would both get what was trained for one of them."""
    trained(tiny_checkpoint, tmp_path / "adapter", target_modules=["embed_tokens"])
    base = tmp_path / "tied"
    base.mkdir()
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 2
    assert "tie_word_embeddings" in error_of(capsys)


def test_another_base_is_a_hint(tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="Alpha-VLLM/Lumina-mGPT-2.0")
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 0
    assert "hint: the adapter was trained on Alpha-VLLM/Lumina-mGPT-2.0" in capsys.readouterr().err
    edit(tmp_path / "adapter", base_model_name_or_path=f"/elsewhere/{tiny_checkpoint.name}")
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "again") == 0
    assert "hint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("\ufeff{}", "peft_type"),
        ("[]", "JSON object"),
        ('{"r": ' + "9" * 5000 + "}", "not JSON"),
        ('{"r": ' * 20000 + "1" + "}" * 20000, "nested"),
        ('{"peft_type": "LORA", "r": "x"}', "r must be a finite number"),
    ],
    ids=["mark", "list", "digits", "deep", "text"],
)
def test_a_damaged_adapter_config_is_one_line(text, words, tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text, encoding="utf-8")
    assert merge(tiny_checkpoint, tmp_path / "adapter", tmp_path / "out") == 2
    assert words in error_of(capsys)
