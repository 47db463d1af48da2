"""What a command imports besides torch: few modules."""

import json
import subprocess
import sys

import pytest
import torch
from commands import PATIENCE, ROOT, environment
from torch import nn

from lumina_mgpt.kernels import dispatch
from lumina_mgpt.meta import on_meta

# Libraries that a run of `generate` needs besides torch, numpy and Python's own: pictures, tokenizers, weights,
# rearranging tensors, the bar.
NEEDED = {"PIL", "einops", "safetensors", "tokenizers", "tqdm"}
OTHERS = 30  # modules of torch, numpy and Python that may come in addition; 17 when this was written

CODE = """
import json, sys, torch
before = set(sys.modules)
from lumina_mgpt.cli.main import main
status = main(sys.argv[1:])
print(json.dumps({"status": status, "modules": sorted(set(sys.modules) - before)}))
"""


@pytest.mark.parametrize("extra", [[], ["--speculative_jacobi", "--coupling", "maximal"]], ids=["plain", "maximal"])
def test_generate_imports_few_modules(tiny_checkpoint, tmp_path, extra):
    """Not torch's compiler, which alone has 1,100 modules and takes longer to import than torch."""
    line = ["generate", "--device", "cpu", "--width", "32", "--height", "32", "--prompt", "a cat", *extra]
    line += ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", CODE, *line],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["status"] == 0 and (tmp_path / "0_0.png").exists()
    modules = [name for name in found["modules"] if name.partition(".")[0] not in NEEDED | {"lumina_mgpt"}]
    tops = {name.partition(".")[0] for name in modules} - {"torch", "numpy"} - sys.stdlib_module_names
    installed = {top for top in tops if not top.startswith(("_cython", "cython"))}  # what compiled modules register
    assert not installed, installed
    assert "torch._dynamo" not in modules and len(modules) <= OTHERS, modules


def test_the_mark_of_a_constant_result_is_that_of_torch():
    """`dispatch` sets it itself, because the decorator imports torch's compiler."""

    def function() -> bool:
        return True

    torch.compiler.assume_constant_result(function)
    assert vars(function).items() <= vars(dispatch.ready).items() and vars(function)


def test_modules_on_meta_have_shapes_only_within_the_block():
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))

    with on_meta():
        inside = make()
    torch.manual_seed(0)
    after = make()
    torch.manual_seed(0)
    before = make()
    assert all(parameter.is_meta for parameter in inside.parameters())
    assert [p.shape for p in inside.parameters()] == [p.shape for p in after.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(after.parameters(), before.parameters(), strict=True))
    assert after[0].weight.std() > 0.5  # initialized
