"""Decides in float64 whether two images differ at a near tie only."""

from dataclasses import replace

import torch

from lumina_mgpt import Pipeline
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.sampling.autoregressive import first_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import gumbel
from lumina_mgpt.unirep import ImageLayout

PROMPTS = ["a cat", "a hedgehog on a sky blue background", "", "a very long list of words: " + "snow " * 30]


def margin(exact: Pipeline, prompt: str, codes: torch.Tensor, at: int, rival: int, key: tuple[int, int], **settings):
    """How much the code at index `at` exceeds its rival in log-probability plus noise, in float64.

    For top_k 1, where the most probable code is chosen, it is the difference in log-probability alone.
    """
    vocabulary, flat = exact.checkpoint.vocabulary, codes.flatten()
    config = SamplingConfig(seed=key[0], **settings)
    greedy = config.top_k == 1
    config = replace(config, top_k=vocabulary.num_image_codes) if greedy else config
    layout = ImageLayout(vocabulary, codes.shape[0] // 4, codes.shape[1] // 4, given=at)
    starts = exact.checkpoint.prompt_ids([prompt], layout)
    call, _ = first_call(starts, layout, flat[None, :at], guided=config.cfg != 1.0)
    cache = KVCache(exact.checkpoint.config, len(call.ids), call.ids.shape[1], torch.float64, "cpu")
    with torch.no_grad():
        log_probs = code_log_probs(CachedStep(exact.model, cache, vocabulary.code_slice)(*call), config)[0, 0]
    scores = log_probs if greedy else log_probs + gumbel(*key, at, len(log_probs))
    return float(scores[flat[at]] - scores[rival])


def near_tie(exact, prompt, ours, theirs, key, limit=1e-3, **settings) -> bool:
    """Whether the first code in which two images differ was a toss-up; equal images are."""
    differs = (ours != theirs).flatten().nonzero().flatten()
    if not len(differs):
        return True
    at = int(differs[0])
    return abs(margin(exact, prompt, ours, at, int(theirs.flatten()[at]), key, **settings)) < limit
