"""The step function of samplers: compiled steps against the uncompiled model."""

import shutil
from dataclasses import replace

import pytest
import torch
from step_calls import CALLS, CONFIG

from lumina_mgpt.model.compiled import COMPILED_SPARE, compile_forward
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_steps_give_the_same_logits(always_compiled):
    """Steps of one id, two ids, and padded windows, with different positions in each row.

    An earlier compiled layer was wrong for padded windows.
    """
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval()
    compiled, columns, answers = compile_forward(model), slice(64, 96), []
    calls = [(torch.randint(0, 96, (2, 9)), torch.arange(9).expand(2, 9), torch.tensor([[8], [6]]))]
    for starts, T in CALLS:
        positions = torch.tensor(starts)[:, None] + torch.arange(T)
        calls.append((torch.randint(0, 96, (2, T)), positions, torch.arange(T).expand(2, T)))
    with torch.no_grad():
        for forward in (None, compiled):
            cache = KVCache(CONFIG, 2, 32, torch.float32, "cpu", spare=COMPILED_SPARE)
            step = CachedStep(model, cache, columns, forward)
            answers.append([step(*call) for call in calls])
    for eager, quick in zip(*answers, strict=True):
        torch.testing.assert_close(quick, eager, rtol=1e-5, atol=1e-5)
    assert len({T for _, T in CALLS}) == 3 and not torch.equal(answers[0][1], answers[0][3])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_models_do_not_share_compiled_code(always_compiled):
    """Inputs and caches have the same shapes; only settings and weights differ."""
    torch.manual_seed(0)
    prompt, code = torch.randint(0, 96, (2, 9)), torch.randint(0, 96, (2, 1))
    for swin_norm in (False, True):
        config, answers = replace(CONFIG, swin_norm=swin_norm), []
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.eval()
        for forward in (None, compile_forward(model)):
            cache = KVCache(config, 2, 32, torch.float32, "cpu", spare=COMPILED_SPARE)
            step = CachedStep(model, cache, slice(64, 96), forward)
            with torch.no_grad():
                step(prompt, torch.arange(9).expand(2, 9), torch.full((2, 1), 8))
                answers.append(step(code, torch.full((2, 1), 9), torch.zeros(2, 1, dtype=torch.long)))
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-5)
