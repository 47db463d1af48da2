"""The pretended GPU itself: it raises and counts on code that is wrong on purpose, and leaves nothing behind."""

import shutil

import pretend_gpu
import pytest
import torch
import torch.nn.functional as F
from pretend_gpu import OnGpu, flash_attn_with_kvcache, pretend

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def seen():
    with pretend("test_pretend_gpu", gpu="h100") as seen:
        yield seen


def flash_lengths(g, c):
    lengths = torch.tensor([3], dtype=torch.int32, device="cuda")
    return flash_attn_with_kvcache(*(g.half().view(1, 2, 2, 4),) * 3, causal=True, cache_seqlens=lengths)


def mask_dtype(g, c):
    return F.scaled_dot_product_attention(*(g.half()[None, None],) * 3, attn_mask=torch.zeros(4, 4, device="cuda"))


WRONG = {
    "two devices": lambda g, c: g + c,
    "matmul": lambda g, c: g @ c,
    "cat": lambda g, c: torch.cat([g, c]),
    "into the CPU": lambda g, c: c.add_(g),
    "gather": lambda g, c: g.gather(0, torch.zeros(4, 4, dtype=torch.long)),
    "index the CPU": lambda g, c: c[torch.zeros(2, dtype=torch.long, device="cuda")],
    "cat a number": lambda g, c: torch.cat([g, torch.tensor(1.0)[None, None]]),
    "numpy": lambda g, c: g.numpy(),
    "half norm": lambda g, c: F.layer_norm(g.half(), (4,), *torch.ones(2, 4, device="cuda")),
    "put values": lambda g, c: g.index_put_((torch.zeros(2, dtype=torch.long, device="cuda"),), torch.ones(2, 4)),
    "flash lengths": flash_lengths,
    "mask dtype": mask_dtype,
}


@pytest.mark.parametrize("name", WRONG)
def test_raises_where_cuda_does(seen, name):
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        WRONG[name](torch.ones(4, 4, device="cuda"), torch.ones(4, 4))


WAITING = {
    "item": lambda g: g[0, 0].item(),
    "int": lambda g: int(g[0, 0]),
    "bool": lambda g: bool(g.any()),
    "cpu": lambda g: g.cpu(),
    "tolist": lambda g: g.tolist(),
    "nonzero": lambda g: g.nonzero(),
    "mask": lambda g: g[g > 0],
    "equal": lambda g: torch.equal(g, g),
    "upload": lambda g: torch.ones(3).to("cuda"),
    "cpu index": lambda g: g[torch.zeros(2, dtype=torch.long)],
    "print": lambda g: f"{g[0, 0]}",
    "large": lambda g: torch.ones(1 << 15).to("cuda", non_blocking=True),
    "unique": lambda g: g.unique(),
    "tensor": lambda g: torch.tensor([1.0], device="cuda"),
    "set": lambda g: g.__setitem__(slice(0, 2), torch.ones(2, 4)),
    "list index": lambda g: g[[0, 1]],
    "assign mask": lambda g: g.__setitem__(g > 0, 0.0),
}


@pytest.mark.parametrize("name", WAITING)
def test_counts_waits_of_the_host(seen, name):
    g = torch.ones(4, 4, device="cuda")
    seen.reset()
    WAITING[name](g)
    assert seen.syncs.total() >= 1, seen.table()
    assert all(key[-1].startswith(".py:") for key in seen.syncs), seen.syncs  # a line of this file


FREE = {
    "add": lambda g: g + 1,
    "number": lambda g: g * torch.tensor(2.0),
    "where": lambda g: torch.where(g > 0, g, 0.0),
    "new": lambda g: g.new_zeros(3),
    "small": lambda g: torch.ones(3).to("cuda", non_blocking=True),
    "pinned": lambda g: torch.ones(1 << 15).pin_memory().to("cuda", non_blocking=True),
    "index": lambda g: g[torch.arange(2, device="cuda")],
    "set": lambda g: g.__setitem__((slice(None), 0), 3.0),
    "view": lambda g: g.view(2, 8).mT[0],
}


@pytest.mark.parametrize("name", FREE)
def test_counts_no_wait_where_there_is_none(seen, name):
    g = torch.ones(4, 4, device="cuda")
    seen.reset()
    out = FREE[name](g)
    assert not seen.syncs, seen.table()
    if name == "view":
        assert not seen.launches and isinstance(out, OnGpu)


@torch.no_grad()
def test_a_graph_reads_and_writes_fixed_memory(seen):
    """A replay uses what is in the tensors of the capture, and the capture itself computes nothing."""
    x, total = torch.full((2, 8), 1.0, device="cuda"), torch.zeros(2, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = F.rms_norm(x.T.reshape(2, 8), (8,)) * 0 + x * 2
        total.add_(doubled[:, :8])
    assert doubled.isnan().all() and total.sum() == 0
    seen.reset()
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert (doubled.cpu() == 2 * value).all()
    assert (total.cpu() == 16).all()
    assert seen.replays == 2 and seen.launches[("graph", "elsewhere")] == 0 and not seen.captured
    assert sum(n for key, n in seen.launches.items() if key[0] == "graph") == 2


@pytest.mark.parametrize("name", ["item", "tolist", "nonzero", "upload", "large", "cpu index"])
def test_a_capture_refuses_waits_and_uploads(seen, name):
    g = torch.ones(4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            WAITING[name](g)
    assert seen.captures == 0 and g.sum().item() == 16


def test_counts_attention_kernels_and_their_shapes(seen):
    q = torch.ones(1, 4, 2, 16, device="cuda", dtype=torch.bfloat16)
    for S, heads, allowed in ((16, 4, True), (16, 4, False), (24, 4, False), (24, 2, False)):
        k = q.new_ones(1, heads, S, 16)
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        try:
            mask = q.new_zeros(1, 1, 2, S)
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=heads == 2)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
    assert {key[0]: n for key, n in seen.sdpa.items()} == {"cudnn": 1, "efficient": 2, "math": 1}
    assert len(seen.shapes) == 3 and len(seen.plans) == 1


def test_another_version_of_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(RuntimeError, match=r"torch 2\.13, and this is 2\.12\.1.*install torch 2\.13, or check"):
        with pretend("x"):
            pass
    assert pretend_gpu.TORCH == "2.13"


def test_nothing_of_it_remains():
    with pretend("x"):
        assert torch.cuda.is_available() and torch.ones(1, device="cuda").is_cuda
    assert not torch.cuda.is_available() and torch._C._get_accelerator().type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda")
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
