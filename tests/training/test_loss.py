"""The chunked loss: equal to the whole one, with few logits in memory, and under autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import loss
from lumina_mgpt.training.loss import ChunkedLoss, LossModel, token_losses


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 4 rows, so that small tensors need several."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 128)
    monkeypatch.setattr(loss, "CHUNK_LOGITS_ON_CPU", 128)
    monkeypatch.setattr(loss, "MIN_ROWS", 4)
    monkeypatch.setattr(loss, "WHOLE_LOGITS", 0)


def example(L: int = 11, D: int = 8, V: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, D, generator=generator).requires_grad_() for n in (L, V))
    targets = torch.randint(0, V, (L,), generator=generator)
    targets[[2, L - 1]] = -100
    return rows, weight, targets


@pytest.mark.parametrize("cached", [1, 150, 1 << 19], ids="{} logits at once".format)
@pytest.mark.parametrize("z_weight, tail_weight", [(0.0, 0.0), (0.3, 0.0), (1e-5, 0.5)])
def test_the_chunked_loss_equals_the_whole_loss(small_chunks, monkeypatch, z_weight, tail_weight, cached):
    """Compared with torch's cross_entropy and logsumexp on all logits, with a scaled incoming gradient."""
    monkeypatch.setattr(loss, "CACHE_LOGITS", cached)
    rows, weight, targets = example()
    total, cross, z = ChunkedLoss.apply(rows, weight, targets, z_weight, tail_weight)
    got = torch.autograd.grad(2.5 * total, (rows, weight))
    logits, counted = rows @ weight.T, targets >= 0
    plain_z = logits.logsumexp(-1)[counted].square().sum()
    plain = F.cross_entropy(logits, targets, reduction="sum")
    if tail_weight:
        plain = token_losses(logits, targets, tail_weight)[0]
    wanted = torch.autograd.grad(2.5 * (plain + z_weight * plain_z), (rows, weight))
    for one, other in zip((total, cross, z, *got), (plain + z_weight * plain_z, plain, plain_z, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not cross.requires_grad and not z.requires_grad


def test_gradients_have_the_dtype_of_the_weights_under_autocast(small_chunks):
    rows, weight, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _ = ChunkedLoss.apply(rows, weight, targets, 1e-5, 0.0)
        plain, z = token_losses(F.linear(rows, weight), targets)
    got, wanted = (torch.autograd.grad(value, (rows, weight)) for value in (total, plain + 1e-5 * z))
    torch.testing.assert_close(total, plain + 1e-5 * z, rtol=1e-5, atol=1e-4)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_a_frozen_head_gets_no_gradient(small_chunks):
    rows, weight, targets = example()
    total, _, _ = ChunkedLoss.apply(rows, weight.detach(), targets, 0.0, 0.0)
    total.backward()
    assert rows.grad is not None
    total, _, _ = ChunkedLoss.apply(rows.detach(), weight, targets, 0.0, 0.0)
    total.backward()
    assert weight.grad is not None


def test_the_logits_of_one_chunk_at_a_time_are_in_memory(small_chunks, monkeypatch):
    """Forward computes the logits of each row once, and backward none."""
    seen = []
    real = loss._with_gradient
    monkeypatch.setattr(loss, "_with_gradient", lambda logits, *rest: seen.append(logits.shape) or real(logits, *rest))
    rows, weight, targets = example()
    total, _, _ = ChunkedLoss.apply(rows, weight, targets, 0.0, 0.0)
    assert seen == [(4, 50), (4, 50), (3, 50)]
    total.backward()
    assert len(seen) == 3


def test_the_gradient_of_the_head_is_not_copied(small_chunks):
    """A second copy would be 2.8 GB for the 7B."""
    rows, weight, targets = example()
    total, _, _ = ChunkedLoss.apply(rows, weight, targets, 0.0, 0.0)
    address = total.grad_fn.gradients[1].data_ptr()
    total.backward()
    assert weight.grad.data_ptr() == address and total.grad_fn.gradients is None


def test_large_logits_do_not_overflow(small_chunks):
    rows, weight, targets = example()
    rows = (1e3 * rows).detach().requires_grad_()
    total, _, _ = ChunkedLoss.apply(rows, weight, targets, 0.0, 0.0)
    wanted = F.cross_entropy(rows @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-3)
    got, wanted = (torch.autograd.grad(value, weight)[0] for value in (total, wanted))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_memory_of_the_heads_gradient_is_used_again(small_chunks, monkeypatch, narrow):
    """The second gradient is in the memory of the first, with the values of a model without such memory."""
    config = ModelConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_image_codes=8,
        image_code_offset=30,
    )
    model = Transformer(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    ids, index = torch.arange(12).view(1, 12), torch.arange(11)

    def gradient(module: LossModel, shift: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = module((ids + shift) % 60, index, ids[0, 1:])[0]
        loss.backward()
        return model.lm_head.weight.grad

    module = LossModel(model)
    address = gradient(module, 0).data_ptr()
    module.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    again = gradient(module, 5)
    assert again.data_ptr() == address
    accumulated = gradient(module, 7).clone()  # a second micro-batch must not overwrite the first
    module.zero_grad()
    fresh = LossModel(model)
    first = gradient(fresh, 5).clone()
    torch.testing.assert_close(gradient(fresh, 7), accumulated)
    assert not torch.equal(first, accumulated)
    fresh.zero_grad()
    assert fresh._memory is not None
    monkeypatch.setattr(loss, "WHOLE_LOGITS", 1 << 20)
    gradient(fresh, 5)
    assert fresh._memory is None  # a loss that needs no memory gives it back
