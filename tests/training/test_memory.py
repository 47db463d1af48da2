"""The estimate of training memory, compared with measurements on a CPU and with sizes counted by hand."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from commands import module_of
from training_runs import ROOT, environment

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.memory import Plan, layer_weights
from lumina_mgpt.training.options import ModelOptions

IDS = 1100  # above the length up to which attention on a CPU materializes its scores, unlike on a GPU


def config_of(hidden: int = 128, inner: int = 320, layers: int = 2, vocab: int = 200) -> ModelConfig:
    heads = hidden // 64
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_image_codes=8,
        image_code_offset=100,
    )


def saved_bytes(plan: Plan) -> int:
    """Bytes that autograd saves in one forward up to the last norm, without weights and their bfloat16 copies."""
    model = Transformer(plan.config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    model.dropout, model.gradient_checkpointing = 0.0, plan.checkpointing
    if not plan.wide and (plan.lora_rank or plan.sharded):
        model.to(torch.bfloat16)
    if plan.lora_rank:
        choose_trained(model, ModelOptions(init_from="x", lora_rank=plan.lora_rank))
    held = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if IDS in tensor.shape:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=not plan.wide):
            model(torch.zeros(1, plan.ids, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize(
    "way",
    [
        {"wide": True},
        {},
        {"devices": 2},
        {"lora_rank": 2},
        {"wide": True, "lora_rank": 2},
        {"wide": True, "checkpointing": True},
        {"checkpointing": True},
        {"devices": 2, "checkpointing": True},
    ],
    ids=str,
)
def test_saved_tensors_of_a_layer_match_the_estimate(way):
    """Difference of models with four and two layers; the estimate may be up to a quarter higher."""
    if way.get("lora_rank"):
        pytest.importorskip("peft")
    few, many = (Plan(config_of(layers=n), IDS, gpu=False, **({"checkpointing": False} | way)) for n in (2, 4))
    kept = saved_bytes(many) - saved_bytes(few)
    estimate = many.saved()[0] - few.saved()[0]
    assert kept <= 1.03 * estimate and kept >= 0.8 * estimate, (kept, estimate)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("side", ["ours", "checkpointing"])
def test_the_peak_of_a_step_matches_the_estimate(side):
    """In float32, in a new process; the system measures the peak, without what was in use before training."""
    sizes = {"vocab": 30_000, "hidden": 512, "layers": 6, "length": 1500, "steps": 2, "threads": 1}
    line = [sys.executable, "scripts/benchmarks/bench_train.py", "--side", side]
    line += ["--freed", "returned"]  # memory that is kept is no tensor of the estimate
    line += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    config = config_of(sizes["hidden"], sizes["hidden"] * 11 // 4, sizes["layers"], sizes["vocab"])
    plan = Plan(config, sizes["length"], wide=True, checkpointing=side == "checkpointing", gpu=False)
    assert plan.weights == pytest.approx(found["parameters"], rel=1e-3)
    peak = 1e9 * found["beyond_gb"] + 16 * found["parameters"]
    assert peak == pytest.approx(plan.peak(), rel=0.1), plan.moments()


@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_weights_are_those_of_the_modules(tied):
    """Compared with the matrices of a model, and with the adapters that peft adds."""
    config = replace(config_of(hidden=256, inner=320, layers=3), num_key_value_heads=2, tie_word_embeddings=tied)
    model = Transformer(config)
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() == 2 and min(p.shape) > 4}
    assert Plan(config, IDS).weights == sum(matrices.values())
    layers = [p.numel() for p in model.layers.parameters() if p.dim() == 2 and min(p.shape) > 4]
    assert layer_weights(config) == sum(layers)
    if importlib.util.find_spec("peft"):
        choose_trained(model, ModelOptions(init_from="x", lora_rank=3))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert Plan(config, IDS, lora_rank=3).adapters == trained


def test_sizes_of_the_7b():
    """Counted by hand: 2 * 171,385 * 4,096 weights in embedding and head, 32 * 202,375,168 in the layers."""
    plan = Plan(ModelConfig.from_yaml(ROOT / "configs/model/7B.yaml"), 9406)
    assert plan.weights == 1_403_985_920 + 6_476_005_376  # 15.8 GB in bf16, as the README says
    assert plan.state(True) == 126_079_860_736  # 16 bytes a weight
    assert Plan(plan.config, 9406, 8).state(True) == 15_759_982_592
    adapters = Plan(plan.config, 9406, 4, lora_rank=16)
    assert adapters.adapters == 39_976_960  # 32 layers * 16 * (4 * 8,192 + 3 * 15,104)
    assert adapters.peak() < Plan(plan.config, 9406, 4).peak() < plan.peak()
    distills = Plan(plan.config, 9406, 4, distills=True)  # the teacher: 7,879,991,296 weights less 155,001 * 4,096
    assert distills.teacher == 2 * (7_879_991_296 - 634_884_096) / 4
    assert distills.peak() > Plan(plan.config, 9406, 4).peak() + 3e9
    assert replace(adapters, distills=True).teacher == 0


def test_the_table_in_the_guide_is_up_to_date(capsys):
    assert module_of("memory_table").main([]) == 0
    assert capsys.readouterr().out in (ROOT / "TRAIN.md").read_text()


def test_the_table_shows_how_many_pictures_fit(capsys):
    """Every device has 12 GB with no picture and 7 GB more for each: 24 GB hold one, 80 GB nine, 10 GB none."""
    table = module_of("memory_table")

    @dataclass(frozen=True)
    class Fixed:
        ids: int

        def peak(self) -> float:
            return 12e9 + 7e9 * self.ids / 100

    assert [table.most(Fixed(100), 100, gb) for gb in (10, 24, 80)] == [0, 1, 9]
    assert table.main(["--gpus", "1", "8", "--gb", "24", "80"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 3 * 2 and {len(row) for row in rows} == {5}
    assert rows[2][3:] == [" no ", " no "]  # all weights on one GPU
