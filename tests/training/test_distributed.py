"""Sharding: dtypes of parameters, products and gradients in FSDP; and memory returned to the system."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training_runs import ONE, ROOT, environment

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import distributed
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


@pytest.mark.parametrize("tied", [False, True])
def test_processes_receive_the_weights_of_the_first(monkeypatch, tied):
    """From the meta device, with another number of rows in the head norms, and with a head that may be tied."""
    config = ModelConfig(48, 32, 64, 1, 4, 4, image_code_offset=32, num_image_codes=16, tie_word_embeddings=tied)
    sent: list[torch.Tensor] = []
    models = {rank: LossModel(Transformer(config)) for rank in (0, 1)}
    attention = models[0].model.layers[0].self_attn
    attention.q_norm.weight = nn.Parameter(torch.rand(4, 8))
    models[0].model.embed_tokens.weight.requires_grad_(False)
    models[1].to("meta")
    if tied:
        models[1].model.lm_head.weight = models[1].model.embed_tokens.weight
    models[1].model.embed_tokens.weight.requires_grad_(False)

    def broadcast(tensor: torch.Tensor, source: int) -> None:
        assert source == 0
        sent.append(tensor.clone()) if rank == 0 else tensor.copy_(sent.pop(0))

    monkeypatch.setattr(dist, "broadcast", broadcast)
    for rank, module in models.items():
        distributed._receive(module, distributed.Processes(rank, 2, torch.device("cpu")))
    assert not sent
    first, second = (dict(module.named_parameters()) for module in models.values())
    assert first.keys() == second.keys() and second["model.layers.0.self_attn.q_norm.weight"].shape == (4, 8)
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]) and parameter.requires_grad == second[name].requires_grad
    assert (models[1].model.lm_head.weight is models[1].model.embed_tokens.weight) == tied


def test_an_error_of_one_process_ends_all(monkeypatch):
    """Else the others would wait for its weights."""
    here, elsewhere = distributed.Processes(1, 2, torch.device("cpu")), [1]
    monkeypatch.setattr(dist, "all_reduce", lambda faults: faults.add_(elsewhere[0]))
    with pytest.raises(InputError, match="another process cannot load; it names the reason"), here.together("load"):
        pass
    elsewhere[0] = 0
    with pytest.raises(InputError, match="^no weights$"), here.together("load"):
        raise InputError("no weights")
    with here.together("load"):
        pass


@pytest.mark.parametrize("fingerprint", [None, "0123456789abcdef" * 4])
def test_the_fingerprint_of_the_first_process_is_that_of_all(monkeypatch, fingerprint):
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(
        dist, "broadcast", lambda tensor, source: tensor.copy_(sent[0]) if sent else sent.append(tensor)
    )
    first, second = (distributed.Processes(rank, 2, torch.device("cpu")) for rank in (0, 1))
    assert first.of_first(fingerprint) == fingerprint and second.of_first(None) == fingerprint


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("called", ["", "return_freed_memory()", "return_freed_memory(); keep_freed_memory()"])
def test_freed_memory_is_returned_to_the_system_or_kept(called):
    """Every second of 64 tensors of 8 MB is freed; glibc returns them only after return_freed_memory()."""
    program = f"""
import torch
from lumina_mgpt.training.distributed import keep_freed_memory, return_freed_memory
{called}
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
    assert (returned > 0.9) == (called == "return_freed_memory()"), (returned, done.stderr)
