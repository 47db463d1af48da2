"""Sharding: dtypes of parameters, products and gradients in FSDP; and memory returned to the system."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from training_runs import ONE, ROOT, environment

from lumina_mgpt.model.reading import load_model
from lumina_mgpt.training.distributed import place
from lumina_mgpt.training.loss import LossModel


@pytest.fixture
def group():
    """A process group of one process, in which FSDP works as with many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("narrow", [False, True])
def test_products_are_narrow_and_shards_are_float32(group, tiny_checkpoint, narrow):
    """Weights are multiplied in bfloat16, RoPE's angles stay float32; shards and gradients are float32 and close to
    those of an unsharded model."""
    plain, sharded = (LossModel(load_model(tiny_checkpoint, torch.float32, "cpu").train(), 0.1) for _ in range(2))
    place(sharded, ONE, narrow=narrow)
    seen = set()

    def note(layer, inputs):
        seen.update({(layer.mlp.up_proj.weight.dtype, inputs[1][0].dtype), (sharded.model.lm_head.weight.dtype, None)})

    for layer in sharded.model.layers:
        layer.register_forward_pre_hook(note)
    ids = torch.arange(7, 47).view(1, 40)
    batch = ids, torch.arange(39), ids[0, 1:]
    for module in (plain, sharded):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow and module is sharded):
            module(*batch)[0].backward()
    wanted = torch.bfloat16 if narrow else torch.float32
    assert seen == {(wanted, torch.float32), (wanted, None)}
    for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        gradient = other.grad.full_tensor()
        assert other.dtype == gradient.dtype == torch.float32
        assert (gradient - one.grad).norm() <= (0.05 if narrow else 1e-5) * one.grad.norm(), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("called", [False, True])
def test_freed_memory_is_returned_to_the_system(called):
    """Every second of 64 tensors of 8 MB is freed; glibc returns them only after the call."""
    program = f"""
import torch
from lumina_mgpt.training.distributed import return_freed_memory
if {called}: return_freed_memory()
torch.ones(1 << 21)  # freed at once: from this, glibc learns to keep blocks of this size
tensors = [torch.ones(1 << 21) for _ in range(64)]
def resident(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before = resident()
del tensors[::2]
print((before - resident()) / (32 * 8192))
"""
    clean = {name: value for name, value in environment().items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean, capture_output=True, text=True)
    returned = float(done.stdout)
    assert (returned > 0.9) == called, (returned, done.stderr)
