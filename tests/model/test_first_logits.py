"""Logits of the first generation's models against the released code and, for grouped heads, transformers."""

import pytest
import torch
from peers import chameleon, copy_weights
from safetensors.torch import load_file
from torch import Tensor

from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer

CLOSE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def models(oracle_v1_checkpoint, oracle_v1_dir):
    """Name -> the model and its stored logits. The tiny model's file holds the weights without a script."""
    loaded: dict[str, tuple[Transformer, dict[str, Tensor]]] = {}

    def get(name: str) -> tuple[Transformer, dict[str, Tensor]]:
        if name not in loaded:
            model = load_model(oracle_v1_checkpoint("text" if name == "tiny" else name), torch.float32, "cpu")
            if name == "tiny":
                state = load_file(oracle_v1_dir / "tiny.safetensors")
                model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
            loaded[name] = model, load_file(oracle_v1_dir / f"logits_{name}.safetensors")
        return loaded[name]

    return get


def in_turns(model: Transformer, ids: Tensor, dtype=torch.float32) -> Tensor:
    """Logits (T, V) of one sequence from a cache that goes on: a prefill, single ids, then a longer turn."""
    cache = KVCache(model.config, 1, len(ids), dtype, "cpu")
    step, parts, start = CachedStep(model, cache, None), [], 0
    for stop in (len(ids) // 3, len(ids) // 3 + 1, len(ids) // 3 + 2, len(ids)):
        positions = torch.arange(start, stop)[None]
        parts.append(step(ids[None, start:stop], positions, positions - start)[0])
        start = stop
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["tiny", "mha128"])
@pytest.mark.parametrize("kind", ["t2i", "chat"])
@torch.no_grad()
def test_logits_equal_the_released_code(models, name, kind):
    """Every stored logit, without a cache and with one; the unconditional row begins at the last image's start."""
    model, stored = models(name)
    for row in ("cond", "uncond"):
        ids = stored[f"{kind}.{row}.ids"]
        for logits in (model.project(model(ids[None])[0]), in_turns(model, ids)):
            wanted = {key: stored[f"{kind}.{row}.{key}"] for key in ("cols", "top", "lse", "last")}
            torch.testing.assert_close(logits[:, stored["cols"]], wanted["cols"], **CLOSE)
            top = logits.gather(1, stored[f"{kind}.{row}.top_ids"].long())
            torch.testing.assert_close(top, wanted["top"], **CLOSE)
            torch.testing.assert_close(logits.logsumexp(-1), wanted["lse"], **CLOSE)
            torch.testing.assert_close(logits[-1, : len(wanted["last"])], wanted["last"], **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_logits_of_the_34b_layout_equal_transformers(oracle_v1_checkpoint, oracle_v1_dir):
    """Norms after the branches, 8 heads, 4 key and value heads and 4 rows of head norms, which transformers repeats."""
    ours = load_model(oracle_v1_checkpoint("swin128"), torch.float32, "cpu")
    ids = load_file(oracle_v1_dir / "logits_mha128.safetensors")["chat.cond.ids"]
    before = ours.project(ours(ids[None])[0])
    torch.testing.assert_close(in_turns(ours, ids), before, **CLOSE)
    theirs = chameleon(ours.config, attn_implementation="eager").eval()
    copy_weights(ours, theirs)
    torch.testing.assert_close(theirs(input_ids=ids[None], use_cache=False).logits[0], before, **CLOSE)


@pytest.mark.parametrize("name", ["tiny", "mha128"])
@torch.no_grad()
def test_an_int8_cache_changes_logits_little(models, name):
    model, stored = models(name)
    ids = stored["chat.cond.ids"]
    exact, rounded = in_turns(model, ids), in_turns(model, ids, torch.int8)
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.02
