"""AdamW with a sparse gradient of the embedding, and the norm of gradients, compared with torch on dense gradients."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import optimizer as optimizers
from lumina_mgpt.training.distributed import clip_gradients
from lumina_mgpt.training.optimizer import BETAS, AdamW, use_sparse_embedding

VOCAB, WIDTH = 203, 16


class Small(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH, sparse=sparse)
        self.embedding.weight.data.normal_(generator=generator)
        self.head = nn.Parameter(torch.randn(WIDTH, 3, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.embedding(ids) @ self.head).square().mean()


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of 7 rows: the last one is shorter."""
    monkeypatch.setattr(optimizers, "SLAB", 7 * WIDTH)


def groups(model: Small) -> list[dict]:
    return [
        {"params": [model.embedding.weight], "weight_decay": 0.1},
        {"params": [model.head], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.05])
def test_a_sparse_gradient_gives_the_steps_of_the_dense_one(small_slabs, limit):
    """Four steps with two micro-batches each; ids repeat, slabs without a gradient occur, and the rate changes."""
    ours, theirs = Small(sparse=True), Small(sparse=False)
    one = AdamW(groups(ours), lr=1e-2, betas=BETAS, fused=True)
    other = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for _ in range(2):
            ids = torch.randint(0, 60 if step else VOCAB, (3, 9), generator=generator)
            ours(ids).backward()
            theirs(ids).backward()
        assert ours.embedding.weight.grad.is_sparse
        norm = clip_gradients(ours, limit)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
        torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
        for optimizer in (one, other):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)
    state, wanted = one.state_dict()["state"], other.state_dict()["state"]
    assert [set(values) for values in state.values()] == [set(values) for values in wanted.values()]
    for values, expected in zip(sorted(state.items()), sorted(wanted.items()), strict=True):
        torch.testing.assert_close(values[1], expected[1], rtol=1e-5, atol=1e-9)


def test_a_state_that_was_written_goes_on_bit_for_bit(small_slabs):
    """The state of a sparse run loads into a new optimizer, whose step is that of the first one."""
    model, copy = Small(sparse=True), Small(sparse=True)
    first, second = (AdamW(groups(one), lr=1e-2, betas=BETAS, fused=True) for one in (model, copy))
    ids = torch.arange(30).view(3, 10)
    model(ids).backward()
    first.step()
    first.zero_grad()
    copy.load_state_dict(model.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))  # loading alone would share the tensors
    for one, optimizer in ((model, first), (copy, second)):
        one(ids + 9).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name


def test_only_large_embeddings_of_their_own_are_sparse(monkeypatch):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_image_codes": 8, "image_code_offset": 20}

    def sparse(frozen: bool = False, **options) -> bool:
        model = Transformer(ModelConfig(**sizes, **options))
        model.embed_tokens.weight.requires_grad_(not frozen)
        use_sparse_embedding(model)
        return model.embed_tokens.sparse

    assert not sparse()
    monkeypatch.setattr(optimizers, "SPARSE_WEIGHTS", 40 * 16)
    assert sparse()
    assert not sparse(frozen=True)
    assert not sparse(tie_word_embeddings=True)
