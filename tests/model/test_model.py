"""The transformer against the released code's logits, transformers' Chameleon, and itself with a cache."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from peers import IMAGE_ID, chameleon, copy_weights
from safetensors.torch import load_file
from torch import nn

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.linear import Linear
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import HeadNorm, SwiGLU, Transformer

IMAGE_START = 151665
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    image_code_offset=64,
    num_image_codes=32,
)


def tiny(dtype=torch.float64, seed=0, **changes) -> Transformer:
    """A small model whose every parameter matters, norms and biases too."""
    model = Transformer(dataclasses.replace(TINY, **changes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            else:
                noise = noise if "embed" in name else 1.5 * noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(noise)
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def through_cache(model: Transformer, ids: list[torch.Tensor], chunks: list[int]) -> list[torch.Tensor]:
    """Hidden states of ragged rows (T_row,), fed `chunks` ids at a time and padded on the right with junk."""
    rows, longest = len(ids), max(map(len, ids))
    slots = longest + max(chunks)
    dtype = model.norm.weight.dtype
    cache = KVCache(model.config, rows, slots, dtype, "cpu")
    for tensor in cache.tensors():
        tensor.fill_(1e3)  # what an earlier sequence left behind must not be seen
    out = [[] for _ in ids]
    start, turn = [0] * rows, 0
    while any(s < len(row) for s, row in zip(start, ids, strict=True)):
        T = chunks[min(turn, len(chunks) - 1)]
        turn += 1
        counts = [min(T, len(row) - s) for s, row in zip(start, ids, strict=True)]
        fed = torch.full((rows, T), 7)
        for r, (row, s, n) in enumerate(zip(ids, start, counts, strict=True)):
            fed[r, :n] = row[s : s + n]
        positions = torch.tensor(start)[:, None] + torch.arange(T)
        hidden = model(fed, positions=positions, cache=cache, filled=min(slots, int(positions.max()) + 1))
        for r, n in enumerate(counts):
            out[r].append(hidden[r, :n])
            start[r] += n
    return [torch.cat(parts) for parts in out]


@pytest.mark.parametrize("variant", ["mha256", "mp2gqa256"])
@torch.no_grad()
def test_logits_equal_the_released_code(oracle_dir, oracle_checkpoint, variant):
    """Every stored logit, without a cache, and with one: conditional and unconditional rows side by side."""
    model = load_model(oracle_checkpoint(variant), torch.float32, "cpu")
    stored = load_file(oracle_dir / f"logits_{variant}.safetensors")
    for kind in ("t2i", "i2i"):
        if f"{kind}.ids" not in stored:
            continue
        ids = stored[f"{kind}.ids"]
        rows = {"cond": ids, "uncond": ids[int((ids == IMAGE_START).nonzero()[0]) :]}
        cached = through_cache(model, list(rows.values()), [len(ids) - 9, 2, 1])
        for (name, row), from_cache in zip(rows.items(), cached, strict=True):
            wanted = (stored[f"{kind}.{name}.{key}"] for key in ("cols", "top_ids", "top_values", "lse"))
            cols, top_ids, top_values, lse = wanted
            close = dict(rtol=0, atol=1e-4)
            torch.testing.assert_close(F.linear(from_cache, model.lm_head.weight[stored["COLS"]]), cols, **close)
            logits = model.project(model(row[None])[0])
            torch.testing.assert_close(logits[:, stored["COLS"]], cols, **close)
            torch.testing.assert_close(logits.gather(1, top_ids), top_values, **close)
            torch.testing.assert_close(logits.logsumexp(-1), lse, **close)
            if name == "cond":
                torch.testing.assert_close(logits[-1], stored[f"{kind}.cond.last_row_full"], **close)


CHAMELEONS = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "swin": dict(swin_norm=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "eps and theta": dict(rms_norm_eps=1e-2, rope_theta=500.0),
    "linear rope": dict(rope_scaling={"type": "linear", "factor": 4.0}),
    "dynamic rope, not yet needed": dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "dynamic rope": dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=16),
}


@pytest.mark.parametrize("changes", CHAMELEONS.values(), ids=CHAMELEONS.keys())
@torch.no_grad()
def test_logits_equal_transformers_chameleon(changes):
    config = dataclasses.replace(TINY, **changes)
    theirs = chameleon(config, attn_implementation="eager").eval()
    # One row a head, as transformers has it; ours may hold as many.
    ours = Transformer(config).eval()
    for layer in ours.layers:
        layer.self_attn.q_norm = HeadNorm(config.num_attention_heads, config.num_attention_heads, config.head_dim)
        layer.self_attn.k_norm = HeadNorm(config.num_key_value_heads, config.num_key_value_heads, config.head_dim)
    state = tiny(torch.float32, **changes).state_dict()
    generator = torch.Generator().manual_seed(5)
    for name in state:
        if "q_norm" in name or "k_norm" in name:
            state[name] = torch.rand(ours.get_parameter(name).shape, generator=generator) + 0.3
    ours.load_state_dict(state)
    copy_weights(ours, theirs)
    ids = random_ids(2, 40)
    ids = ids.where(ids != IMAGE_ID, IMAGE_ID + 1)
    expected = theirs(input_ids=ids, use_cache=False).logits
    logits = ours.project(ours(ids))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize("chunks", [[1], [2], [5], [11, 1], [3, 8, 2, 5, 1]], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, dict(num_key_value_heads=2, model_parallel_size=2), dict(swin_norm=True)],
    ids=["mha", "gqa", "swin"],
)
@torch.no_grad()
def test_a_cache_changes_nothing(changes, chunks):
    """Ragged rows in any chunks, float64: equal to each row alone without a cache."""
    model = tiny(**changes)
    rows = [random_ids(1, n, seed=n)[0] for n in (23, 9, 14)]
    for row, hidden in zip(rows, through_cache(model, rows, chunks), strict=True):
        torch.testing.assert_close(hidden, model(row[None])[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunks", [[20], [12, 1], [7, 4, 1]], ids=str)
@torch.no_grad()
def test_rows_that_start_alike_need_no_positions(chunks):
    """An int instead of a tensor of positions takes the cheap path, to the same result."""
    model, ids = tiny(), random_ids(2, 20)
    cache = KVCache(model.config, 2, 32, torch.float64, "cpu")
    for tensor in cache.tensors():
        tensor.fill_(1e3)
    start, parts = 0, []
    while start < 20:
        T = chunks.pop(0) if len(chunks) > 1 else chunks[0]
        parts.append(model(ids[:, start : start + T], positions=start, cache=cache))
        start += parts[-1].shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_rejected_draft_leaves_no_trace():
    """Slots written by a draft that was not kept are overwritten before anything sees them."""
    model, ids = tiny(), random_ids(1, 12)
    cache = KVCache(model.config, 1, 16, torch.float64, "cpu")
    at = torch.arange(16)[None]
    model(ids[:, :6], positions=at[:, :6], cache=cache, filled=6)
    model(random_ids(1, 9, seed=8), positions=at[:, 6:15], cache=cache, filled=15)
    hidden = model(ids[:, 6:], positions=at[:, 6:12], cache=cache, filled=15)
    torch.testing.assert_close(hidden, model(ids)[:, 6:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_dynamic_rope_agrees_with_and_without_a_cache():
    """Past the trained length the angles depend on the whole length; with a cache that is its number of slots."""
    model = tiny(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=16)
    ids = random_ids(1, 24)
    cache = KVCache(model.config, 1, 24, torch.float64, "cpu")
    parts = [model(ids[:, i : i + 1], positions=i, cache=cache) for i in range(24)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=1e-11)


@torch.no_grad()
def test_nothing_is_read_back_to_the_host():
    """On the meta device every tensor is without values, so reading one back would raise."""
    with torch.device("meta"):
        model = Transformer(TINY)
    cache = KVCache(TINY, 2, 32, torch.float32, "meta")
    positions = torch.zeros(2, 3, dtype=torch.long, device="meta")
    hidden = model(positions, positions=positions, cache=cache, filled=9)
    assert model.project(hidden, slice(64, 96)).shape == (2, 3, 32)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_slice_of_the_head(tied):
    model = tiny(tie_word_embeddings=tied)
    hidden = model(random_ids(2, 5))
    whole, part = model.project(hidden), model.project(hidden, slice(64, 96))
    torch.testing.assert_close(part, whole[..., 64:96], rtol=0, atol=1e-12)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@torch.no_grad()
def test_low_precision_stays_near():
    """bfloat16 weights and cache: as near as 8 bits of mantissa allow, over three layers."""
    model, rows = tiny(torch.float32), [random_ids(1, 20)[0], random_ids(1, 12)[0]]
    exact = [model(row[None])[0] for row in rows]
    for hidden, expected in zip(through_cache(model.bfloat16(), rows, [9, 2, 1]), exact, strict=True):
        assert hidden.dtype == torch.bfloat16
        assert F.cosine_similarity(hidden.float(), expected, dim=-1).min() > 0.99


@torch.no_grad()
def test_norm_weights_are_applied_after_the_cast_back():
    model = tiny(torch.bfloat16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + TINY.rms_norm_eps)).bfloat16()
    assert torch.equal(model.norm(x), normed * model.norm.weight)


def test_head_norm_rows_must_fit_the_heads():
    with pytest.raises(InputError, match="model_parallel_size must divide the 2 heads"):
        Transformer(dataclasses.replace(TINY, num_key_value_heads=2, model_parallel_size=4))


# Training


@pytest.mark.parametrize("swin", [False, True])
def test_dropout_is_on_both_branches_in_training_only(swin):
    """With nearly everything dropped, what is left is the embedding: no branch goes around the dropout."""
    model, ids = tiny(swin_norm=swin, dropout=0.3), random_ids(2, 9)
    still = model(ids)
    assert torch.equal(still, model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.dropout = 1 - 1e-12
    torch.testing.assert_close(model(ids), model.norm(model.embed_tokens(ids)))
    model.dropout = 0.0
    torch.testing.assert_close(model(ids), still)


def test_dropout_keeps_the_mean_of_a_branch():
    model, ids = tiny(num_hidden_layers=1, dropout=0.25), random_ids(1, 4)
    model.norm, model.layers[0].mlp.down_proj.weight.data[:] = nn.Identity(), 0
    exact = model(ids)
    model.train()
    torch.manual_seed(0)
    many = torch.stack([model(ids) for _ in range(2000)])
    branch = (exact - model.embed_tokens(ids)).abs()
    # One entry is branch/0.75 with probability 0.75: the mean of 2000 deviates by branch/sqrt(3 * 2000).
    assert ((many.mean(0) - exact).abs() < 5.5 * branch / math.sqrt(6000)).all()
    assert (many == model.embed_tokens(ids)).float().mean().item() == pytest.approx(0.25, abs=0.01)


def gradients(model: Transformer, ids: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    F.cross_entropy(model.project(model(ids[:, :-1])).flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient():
    """With dropout: the recomputed forward must draw the same mask."""
    model, ids = tiny(dropout=0.2).train(), random_ids(3, 12)
    plain = gradients(model, ids)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12, msg=name)


def test_autocast_training_has_the_gradients_of_float32():
    """The path for training on a CPU, attention written out, over more than one block of queries."""
    model, ids = tiny(torch.float32).train(), random_ids(2, 150)
    exact = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, ids)
    for name, gradient in low.items():
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.97, name


def test_a_training_forward_is_one_graph():
    """torch.compile finds no graph break, with and without autocast."""
    model, ids = tiny(torch.float32, dropout=0.1).train(), random_ids(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(ids).sum().backward()
    torch._dynamo.reset()


def test_an_overfitted_batch():
    model = Transformer(dataclasses.replace(TINY, num_hidden_layers=2))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = random_ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    for step in range(200):
        loss = F.cross_entropy(model.project(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
        if step == 0:
            assert abs(loss.item() - math.log(TINY.vocab_size)) < 0.5  # untrained: the loss of the uniform distribution
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # the first id of a row is a guess only where two rows begin alike


def test_init_weights_fills_every_parameter():
    """From `to_empty` on: no value survives, the scale is as documented, and the seed decides."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(TINY, attention_bias=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(3))
    D, L = TINY.hidden_size, TINY.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            std = 2 / (L * D**0.5) if "o_proj" in name or "down_proj" in name else (2 / (5 * D)) ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
    again = Transformer(dataclasses.replace(TINY, attention_bias=True))
    again.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("rows", [(2,), (3, 1), (4,), (2, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [80, 12_000])
def test_the_product_without_gradients_is_the_one_with_them(rows, bias, outputs):
    """Two libraries (see linear): equal but for the order of sums, in every case where the quicker one is taken."""
    layer = Linear(48, outputs, bias)
    x = torch.randn(*rows, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        quick = layer(x)
    assert layer(x).requires_grad and not quick.requires_grad
    torch.testing.assert_close(quick, x @ layer.weight.T + (layer.bias if bias else 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_the_mlp_has_the_gradients_of_its_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up, outward = (torch.randn(5, 7, generator=generator).to(dtype) for _ in range(3))
    results = []
    for product in (SwiGLU.apply, lambda gate, up: F.silu(gate) * up):
        inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
        value = product(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs, outward)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
