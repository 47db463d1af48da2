"""The memory that is reckoned, against what training takes on a CPU."""

import json
import subprocess
import sys

import pytest
import torch
from commands import module_of
from training_runs import ROOT, environment

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.memory import Plan
from lumina_mgpt.training.options import ModelOptions

IDS = 1100  # over the length up to which attention is written out on a CPU, unlike on a GPU


def config_of(hidden: int = 128, inner: int = 320, layers: int = 2, vocab: int = 200) -> ModelConfig:
    heads = hidden // 64
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, num_image_codes=8, image_code_offset=100,
    )  # fmt: skip


def saved_bytes(plan: Plan) -> int:
    """What autograd keeps of one forward up to the last norm, but for weights and their narrow copies."""
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


@pytest.mark.parametrize("way", [
    {"wide": True}, {}, {"devices": 2}, {"lora_rank": 2}, {"wide": True, "lora_rank": 2},
    {"wide": True, "checkpointing": True}, {"checkpointing": True}, {"devices": 2, "checkpointing": True},
], ids=str)  # fmt: skip
def test_layers_save_what_is_reckoned(way):
    """Of two layers more; rather a little more is reckoned than is kept."""
    if way.get("lora_rank"):
        pytest.importorskip("peft")
    few, many = (Plan(config_of(layers=n), IDS, gpu=False, **({"checkpointing": False} | way)) for n in (2, 4))
    kept = saved_bytes(many) - saved_bytes(few)
    reckoned = many.saved()[0] - few.saved()[0]
    assert kept <= 1.03 * reckoned and kept >= 0.8 * reckoned, (kept, reckoned)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("side", ["ours", "checkpointing"])
def test_the_peak_of_a_step_is_what_is_reckoned(side):
    """In a process of its own, float32; the peak is measured by the system, beyond what was there before training."""
    sizes = {"vocab": 30_000, "hidden": 512, "layers": 6, "length": 1500, "steps": 2, "threads": 1}
    line = [sys.executable, "scripts/benchmarks/bench_train.py", "--side", side]
    line += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    config = config_of(sizes["hidden"], sizes["hidden"] * 11 // 4, sizes["layers"], sizes["vocab"])
    plan = Plan(config, sizes["length"], wide=True, checkpointing=side == "checkpointing", gpu=False)
    assert plan.weights == pytest.approx(found["parameters"], rel=1e-3)
    peak = 1e9 * found["beyond_gb"] + 16 * found["parameters"]
    assert peak == pytest.approx(plan.peak(), rel=0.1), plan.moments()


def test_sizes_of_the_7b():
    plan = Plan(ModelConfig.from_yaml(ROOT / "configs/model/7B.yaml"), 9406)
    assert plan.weights == pytest.approx(7.88e9, rel=1e-3)  # 15.8 GB in bf16, as the README says
    assert Plan(plan.config, 9406, 8).state(True) == plan.state(True) / 8
    assert Plan(plan.config, 9406, 4, lora_rank=16).peak() < Plan(plan.config, 9406, 4).peak() < plan.peak()


def test_the_text_holds_the_table(capsys):
    assert module_of("memory_table").main([]) == 0
    assert capsys.readouterr().out in (ROOT / "TRAIN.md").read_text()


def test_the_table_says_what_fits(capsys):
    table = module_of("memory_table")
    assert table.main(["--gpus", "1", "8", "--gb", "24", "80"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 3 * 2 and {len(row) for row in rows} == {5}
    assert rows[2][3:] == [" no ", " no "]  # all weights on one GPU
    plan = Plan(ModelConfig.from_yaml(ROOT / "configs/model/7B.yaml"), 9406, 8)
    count = table.most(plan, 9406, 80)
    assert rows[3][4] == f" {count} "
    assert Plan(plan.config, count * 9406, 8).peak() <= 80e9 < Plan(plan.config, (count + 1) * 9406, 8).peak()
