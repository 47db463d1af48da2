"""Tensors in large pages: ordinary tensors to everyone who uses them."""

import copy
import sys

import pytest
import torch

from lumina_mgpt.measure import anonymous_bytes
from lumina_mgpt.model import pages

MB = 1 << 20


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (9 * MB,), (33, 3, 100_003)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_numbers_stay(shape, dtype):
    tensor = pages.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    numbers = torch.arange(tensor.numel()).remainder(97).to(dtype)
    tensor.view(-1).copy_(numbers)
    again = pages.copied(tensor.transpose(0, -1))
    assert torch.equal(again, tensor.transpose(0, -1)) and again.is_contiguous()
    assert torch.equal(copy.deepcopy(tensor).view(-1), numbers)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_memory_is_aligned_and_freed_with_the_last_view():
    tensor = pages.empty((64 * MB,), torch.uint8).fill_(1)
    assert tensor.data_ptr() % (2 * MB) == 0
    part = tensor[5 * MB :].view(-1, MB)
    used = anonymous_bytes()
    del tensor
    assert anonymous_bytes() > used - MB and part.eq(1).all()
    del part
    assert anonymous_bytes() < used - 63 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_ordinary_memory_where_the_system_refuses(monkeypatch):
    def refuse(*args, **options):
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    assert pages.empty((8 * MB,), torch.int8).fill_(3).eq(3).all()
