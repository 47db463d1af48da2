"""Int4 weights: the arithmetic, the kernels, loading and saving, and what a user meets."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import main_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lumina_mgpt.config import INT4_GROUPS, ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import int4, quantization
from lumina_mgpt.model.int4 import Int4, dequantize, quantize
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Head, Transformer
from lumina_mgpt.model.writing import save_model
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.trainer import build_model

ROOT = Path(__file__).parents[2]
IDS = torch.arange(40)[None]
GROUP = 32  # the only one that divides the tiny checkpoint's 96


@pytest.fixture(scope="module")
def tiny_int4(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "tiny"
    main = main_of("quantize")
    assert main(["--model_path", str(tiny_checkpoint), "--save_path", str(folder), "--group", str(GROUP)]) == 0
    return folder


@pytest.fixture
def damaged(tiny_int4, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(tiny_int4, tmp_path / "damaged"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.project(model(IDS)).float()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_rounding(weight: torch.Tensor, group: int) -> torch.Tensor:
    """To sixteen levels from the least to the greatest weight of each group, in float64."""
    groups = weight.double().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).flatten(1)


def linear(weight: torch.Tensor, group: int, dtype: torch.dtype, bias: torch.Tensor | None = None) -> Int4Linear:
    module = Int4Linear(weight.shape[1], len(weight), group, None if bias is None else nn.Parameter(bias.to(dtype)))
    module.load("weight", weight, "cpu")
    return module


# The numbers


@pytest.mark.parametrize(("group", "gain", "error"), [(32, 0.83, 0.0052), (64, 0.84, 0.0073), (128, 0.86, 0.0087)])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_the_search_beats_plain_rounding(group, gain, error, tails):
    """In squared error, and in absolute terms too: sixteen levels on normal weights can do no wonders."""
    weight = normal(256, 512)
    if tails == "heavy":
        weight = weight * weight.abs().sqrt() + 0.3
    found = dequantize(quantize(weight, group), torch.float64)
    ours = (found - weight).square().sum()
    assert ours < gain * (plain_rounding(weight, group) - weight).square().sum()
    if tails == "normal":
        assert 0.5 * error < ours / weight.square().sum() < error


def test_the_portable_form_is_what_the_docstring_says():
    weight = normal(3, 64)
    packed, scale, zero = quantize(weight, 32)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 32))
    assert scale.dtype == zero.dtype == torch.bfloat16 and scale.shape == zero.shape == (3, 2)
    for row in range(3):
        for k in range(64):
            byte = int(packed[row, k // 2])
            q = byte & 15 if k % 2 else byte >> 4
            expected = (q - 8) * scale[row, k // 32].double() + zero[row, k // 32].double()
            assert abs(dequantize(Int4(packed, scale, zero), torch.float64)[row, k] - expected) < 1e-12
            assert abs(expected - weight[row, k]) < 0.51 * scale[row, k // 32].double() + 0.2


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-35])
def test_equal_weights(value):
    """Such groups have no range to divide by."""
    weight = torch.full((2, 64), value).bfloat16().float()
    assert torch.equal(dequantize(quantize(weight, 64)), weight)


def test_sixteen_even_levels_are_kept_exactly():
    """Nothing has to be given up here, so nothing may be."""
    weight = (torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0)) - 8) * 0.25 + 0.5
    weight[:, :2] = torch.tensor([-1.5, 2.25])  # the ends of the range
    assert torch.equal(dequantize(quantize(weight, 128)), weight)


def test_large_matrices_are_worked_on_in_parts_that_do_not_show(monkeypatch):
    weight = normal(37, 128)
    whole = quantize(weight, 64)
    monkeypatch.setattr(int4, "CHUNK", 5 * 128)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(weight, 64), strict=True))


# The kernel


@pytest.mark.parametrize("group", INT4_GROUPS)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.006), (torch.float16, 0.001), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("shape", [(64, 256), (48, 128), (20, 384)], ids=str)
def test_kernel_and_fallback_give_the_same(group, dtype, limit, shape):
    """Against a product in float64; 20 outputs are no multiple of 16, and float64 has no kernel."""
    weight, bias = normal(*shape), normal(shape[0], seed=1).to(dtype)
    fallback, packed = linear(weight, group, dtype, bias), linear(weight, group, dtype, bias)
    packed.pack(dtype)
    assert packed.kernel == ("cpu" if dtype != torch.float64 and shape[0] % 16 == 0 else None)
    for rows in ((1,), (2, 7), (1, 40)):
        x = normal(*rows, shape[1], seed=2).to(dtype)
        expected = x.double() @ dequantize(fallback.matrix, torch.float64).T + bias.double()
        for module in (fallback, packed):
            y = module(x)
            assert y.dtype == dtype and y.shape == (*rows, shape[0])
            assert (y.double() - expected).norm() < limit * expected.norm()


def test_inputs_need_not_be_contiguous():
    module = linear(normal(32, 64), 32, torch.float32)
    module.pack(torch.float32)
    x = normal(64, 3).T
    assert torch.equal(module(x), module(x.contiguous()))


def test_a_build_without_the_kernel_is_refused(tiny_int4, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(quantization, "_CPU_OPS", ("_convert_weight_to_int4pack_for_cpu", "_no_such_operator"))
    for folder, quant in ((tiny_int4, None), (tiny_checkpoint, GROUP)):
        with pytest.raises(InputError, match="_no_such_operator, which torch .* lacks; install"):
            load_model(folder, torch.float32, "cpu", quant=quant)
    load_model(tiny_checkpoint, torch.float32, "cpu")


# The head


@pytest.mark.parametrize("size", [1, 0.02])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_a_head_in_int8(dtype, limit, size):
    """The kernel's result is that of the rounded weights; a step is 1/127 of the largest weight of an output."""
    head = Head(96, 80, bias=False).requires_grad_(False)
    weight = torch.cat([normal(79, 96), torch.zeros(1, 96)]).mul(size).to(dtype)
    head.weight.data, columns = weight, slice(8, 80)
    x = normal(2, 3, 96, seed=1).to(dtype)
    plain = head(x, columns).float()
    head.slice_columns(columns, int8=True)
    assert head.weight.dtype == torch.int8 and head.weight.shape == (72, 96)
    stored = head.weight.float() * head.scale.float()[:, None]
    steps = weight[columns].float().abs().amax(1, keepdim=True) / 127
    assert ((stored - weight[columns].float()).abs() <= (0.5 + 127 * limit) * steps).all()
    exact = x.float() @ stored.T
    assert (head(x, columns).float() - exact).norm() < limit * exact.norm()
    assert 1e-3 < (exact - plain).norm() / plain.norm() < 1e-2
    assert not head(x, columns)[..., -1].any(), "weights that are all zero stay so"


def test_a_pipeline_of_int4_weights_has_an_int8_head(tiny_checkpoint):
    heads = [Pipeline.from_pretrained(tiny_checkpoint, "cpu", quant=quant).model.lm_head for quant in (None, GROUP)]
    assert [head.weight.dtype == torch.int8 for head in heads] == [False, True]


# Loading


def test_only_matrices_of_the_layers_become_int4(tiny_checkpoint):
    model = load_model(tiny_checkpoint, torch.float32, "cpu", quant=GROUP)
    plain = load_model(tiny_checkpoint, torch.float32, "cpu")
    assert model.config.int4_group == GROUP and plain.config.int4_group is None
    replaced = {name for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    matrices = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert replaced == matrices - {"lm_head"}
    assert len(replaced) == 14
    parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters.pop(name))
    assert {name.removesuffix(".weight") for name in parameters} == replaced


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, None)])
def test_saved_and_loaded_is_the_same_as_quantized_while_loading(tiny_checkpoint, tiny_int4, dtype, kernel, caplog):
    caplog.set_level("WARNING", "lumina_mgpt")
    fresh = load_model(tiny_checkpoint, dtype, "cpu", quant=GROUP)
    again = load_model(tiny_int4, dtype, "cpu")
    asked = load_model(tiny_int4, dtype, "cpu", quant=GROUP)
    assert all(model.layers[1].mlp.up_proj.kernel == kernel for model in (fresh, again, asked))
    assert torch.equal(logits(fresh), logits(again)) and torch.equal(logits(fresh), logits(asked))
    assert ("dequantized at every step" in caplog.text) == (kernel is None), "without a kernel, a warning is logged"
    exact = logits(load_model(tiny_checkpoint, dtype, "cpu"))
    error = (logits(fresh) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.25, "int4 shows, and does not drown the model"


def test_the_saved_form(tiny_checkpoint, tiny_int4):
    config = json.loads((tiny_int4 / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lumina_mgpt_int4", "bits": 4, "group_size": GROUP}
    assert "quantization_config" not in json.loads((tiny_checkpoint / "config.json").read_text())
    tensors, before = load_file(tiny_int4 / "model.safetensors"), load_file(tiny_checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj."
    found = {
        leaf: (tensors[name + leaf].dtype, tuple(tensors[name + leaf].shape))
        for leaf in ("weight_int4", "weight_scale", "weight_zero")
    }
    parts = (torch.bfloat16, (64, 3))
    assert found == {"weight_int4": (torch.uint8, (64, 48)), "weight_scale": parts, "weight_zero": parts}
    assert name + "weight" not in tensors
    kept = before.keys() & tensors.keys()
    assert all(torch.equal(before[key], tensors[key]) for key in kept) and len(before) - len(kept) == 14
    companions = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    companions |= {"names.txt", "prompts.txt", "examples.json"}
    files = {path.name for path in tiny_int4.iterdir()}
    assert files == companions | {"config.json", "model.safetensors", "movqgan_270M.ckpt"}
    assert [path.name for path in tiny_int4.parent.iterdir()] == ["tiny"], "nothing temporary stays"


def test_biases_and_a_tied_head(tmp_path):
    """In either order of weight and bias on disk, and saved and loaded."""
    config = ModelConfig(
        48,
        32,
        64,
        2,
        4,
        2,
        image_code_offset=32,
        num_image_codes=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    save_model(model, tmp_path / "a")
    fresh = load_model(tmp_path / "a", torch.float32, "cpu", quant=32)
    save_model(load_model(tmp_path / "a", None, "cpu", quant=32), tmp_path / "b", max_shard_bytes=2000)
    again = load_model(tmp_path / "b", torch.float32, "cpu")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3, "parts of one matrix lie in several shards"
    assert torch.equal(logits(fresh), logits(again))
    assert torch.equal(again.layers[0].self_attn.q_proj.bias, model.layers[0].self_attn.q_proj.bias)
    assert again.config == dataclasses.replace(config, quantization_config=fresh.config.quantization_config)
    for group in INT4_GROUPS[1:]:
        with pytest.raises(InputError, match=f"the 32 inputs of layers.0.self_attn.q_proj, got {group}; try quant=32"):
            load_model(tmp_path / "a", torch.float32, "cpu", quant=group)


def test_the_whole_model_never_exists_unquantized(tmp_path):
    """Peak of memory torch asked for while eight equal layers are loaded, against their size in float32.

    In small shards, since a file counts as memory while it is open.
    """
    config = ModelConfig(64, 128, 256, 8, 4, 4, image_code_offset=32, num_image_codes=32)
    model = Transformer(config)
    save_model(model, tmp_path, max_shard_bytes=400_000)
    full = sum(parameter.nbytes for parameter in model.parameters())

    def peak(**options) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loaded = load_model(tmp_path, torch.float32, "cpu", **options)
        held = highest = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        del loaded  # not before: what is freed while watched must have been made while watched
        return highest

    assert peak() > full, "the measure works"
    assert peak(quant=128) < 0.75 * full


# What a user can correct


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(f"{NAME}_zero"), ["1 missing keys", f"{NAME}_zero"]),
        (lambda t: t.update({NAME: torch.zeros(32, 64)}), ["1 unknown keys", NAME]),
        (lambda t: t.update({f"{NAME}_int4": torch.zeros(32, 64).byte()}), ["(32, 64) instead of (32, 32)"]),
        (lambda t: t.update({f"{NAME}_int4": torch.zeros(32, 32)}), [f"{NAME}_int4 must hold torch.uint8"]),
        (lambda t: t.update({f"{NAME}_scale": torch.zeros(32, 2)}), [f"{NAME}_scale must hold torch.bfloat16"]),
        (lambda t: t.update({f"{NAME}_scale": torch.zeros(32, 2).char()}), [f"{NAME}_scale must hold"]),
    ],
)
def test_damaged_weights_are_named(damaged, change, parts):
    edit(damaged, change)
    with pytest.raises(InputError) as caught:
        load_model(damaged, torch.float32, "cpu")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_file_cut_short(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or cut short"):
        load_model(damaged, torch.float32, "cpu")


@pytest.mark.parametrize(
    "recipe",
    [None, {"quant_method": "bitsandbytes"}, 4, {"quant_method": "lumina_mgpt_int4", "bits": 4, "group_size": 256}],
)
def test_another_recipe_is_refused(damaged, recipe):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"quantization_config": recipe}))
    with pytest.raises(InputError, match="quantization_config must be" if recipe else "missing keys.*unknown keys"):
        load_model(damaged, torch.float32, "cpu")


def test_weights_that_are_no_numbers(tiny_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    edit(folder, lambda t: t[NAME][5].fill_(float("nan")))
    with pytest.raises(InputError, match=f"{NAME} holds weights that are infinite or not a number"):
        load_model(folder, torch.float32, "cpu", quant=GROUP)


def test_int4_weights_are_not_trained(tiny_int4, tmp_path):
    settings = TrainingConfig.of(
        data_config="none.yaml", output_dir=str(tmp_path), init_from=str(tiny_int4), max_steps=1
    )
    with pytest.raises(InputError, match="init_from .* int4 weights, which cannot be trained"):
        build_model(settings)


# Commands


def refused(capsys, code: int, *parts: str) -> None:
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


def test_generate(tiny_checkpoint, tiny_int4, tmp_path, capsys):
    """The same picture from weights quantized while loading and before, with everything about them inside."""
    main = main_of("generate")
    options = ["--prompt", "a cat", "--device", "cpu", "--width", "64", "--height", "32", "--save_path"]
    runs = {
        "while": [str(tiny_checkpoint), "--quant", "--quant_group", "32"],
        "before": [str(tiny_int4)],
        "again": [str(tiny_int4), "--quant"],
        "plain": [str(tiny_checkpoint)],
    }
    pictures = {}
    for name, more in runs.items():
        assert main([*options, str(tmp_path / name), "--model_path", *more]) == 0
        with Image.open(tmp_path / name / "0_0.png") as image:
            said = (image.text.get("quant"), image.text.get("quant_group"))
            assert said == ((None, None) if name == "plain" else ("int4", "32"))
            pictures[name] = image.tobytes()
    assert pictures["while"] == pictures["before"] == pictures["again"] != pictures["plain"]
    assert capsys.readouterr().err.count("making int4 weights in groups of 32") == 1


@pytest.mark.parametrize(
    ("quantized", "options", "parts"),
    [
        (False, ["--quant"], ["--quant_group must divide the 64 inputs of layers.0.self_attn", "128; try", "64"]),
        (False, ["--quant", "--quant_group", "64"], ["the 96 inputs of layers.0.mlp.down_proj, got 64", "try", "32"]),
        (False, ["--quant", "--quant_group", "48"], ["--quant_group", "48", "32, 64, 128"]),
        (False, ["--quant_group", "32"], ["--quant_group 32 has no effect without --quant"]),
        (True, ["--quant", "--quant_group", "64"], ["--quant_group must be 32", "got 64", "made from"]),
    ],
)
def test_options_that_do_not_fit(tiny_checkpoint, tiny_int4, tmp_path, capsys, quantized, options, parts):
    folder = tiny_int4 if quantized else tiny_checkpoint
    main = main_of("generate")
    code = main(
        [
            "--prompt",
            "a cat",
            "--device",
            "cpu",
            "--save_path",
            str(tmp_path / "out"),
            "--model_path",
            str(folder),
            *options,
        ]
    )
    refused(capsys, code, *parts)
    assert not (tmp_path / "out").exists()


def test_the_pipeline_takes_known_groups_only(tiny_checkpoint):
    with pytest.raises(InputError, match="quant must be 32, 64 or 128, got 16"):
        Pipeline.from_pretrained(tiny_checkpoint, "cpu", quant=16)


def test_quantize_refuses_what_it_cannot_do(tiny_checkpoint, tiny_int4, tmp_path, capsys):
    main, out = main_of("quantize"), tmp_path / "new" / "folder"
    tiny, save = ["--model_path", str(tiny_checkpoint)], ["--save_path", str(out)]
    refused(capsys, main([*tiny, *save]), "--group must divide the 64 inputs", "got 128")
    refused(capsys, main([*tiny, *save, "--group", "16"]), "--group", "16", "32, 64, 128")
    refused(capsys, main(["--model_path", str(tiny_int4), *save]), "--model_path", "which cannot be quantized again")
    refused(capsys, main(["--model_path", str(tmp_path), *save]), "--model_path", "no config.json")
    refused(capsys, main([*tiny, "--save_path", str(tiny_checkpoint)]), "--save_path", "already exists")
    assert not any(tmp_path.iterdir()), "nothing stays of a failure"


@pytest.mark.parametrize("how", ["full disk", "Ctrl-C"])
def test_a_conversion_that_ends_early_leaves_nothing(tiny_checkpoint, tmp_path, capsys, monkeypatch, how):
    def end(*_):
        raise OSError(28, "No space left on device") if how == "full disk" else KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", end)  # by then the weights are written
    (tmp_path / "empty").mkdir()
    target = tmp_path / "empty" if how == "Ctrl-C" else tmp_path / "new" / "folder"
    main = main_of("quantize")
    code = main(["--model_path", str(tiny_checkpoint), "--save_path", str(target), "--group", "32"])
    last = capsys.readouterr().err.splitlines()[-1]
    if how == "Ctrl-C":
        assert code == 130 and "nothing was written" in last
    else:
        assert code == 2 and f"--save_path {target} cannot be written (No space left on device)" in last
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())
