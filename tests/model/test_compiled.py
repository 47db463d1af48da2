"""Compiled steps: the choice between them and eager steps, their shapes, and recompilation."""

import logging
import shutil
import time

import pytest
import torch
from step_calls import CONFIG
from torch import Tensor
from torch._dynamo.utils import counters

from lumina_mgpt import GenerationRequest, Pipeline
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import compiled as module
from lumina_mgpt.model.compiled import CompiledForward, compiled_spare, limited, require_compiler
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer

PROMPT = torch.arange(18).view(2, 9)


class Forward:
    """A model's forward that takes some time longer, and keeps the number of ids and of slots of each call."""

    def __init__(self, model: Transformer, longer: float) -> None:
        self.model, self.longer = model, longer
        self.calls: list[tuple[int, int]] = []

    def __call__(self, ids: Tensor, *, positions: Tensor, cache: KVCache, filled: int) -> Tensor:
        self.calls.append((ids.shape[1], filled))
        time.sleep(self.longer)
        return self.model(ids, positions=positions, cache=cache, filled=filled)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
def run(model: Transformer, compiled: CompiledForward | None, steps: list[tuple[int, int]]) -> list[Tensor]:
    """Logits of steps after a prompt of 9 ids: each has a first position and a number of ids."""
    cache = KVCache(CONFIG, 2, 48, torch.float32, "cpu", spare=compiled_spare(48))
    step = CachedStep(model, cache, slice(64, 96), compiled)
    step(PROMPT, torch.arange(9).expand(2, 9), torch.full((2, 1), 8))
    return [
        step(torch.full((2, T), 64 + at % 32), torch.arange(at, at + T).expand(2, T), torch.arange(T).expand(2, T))
        for at, T in steps
    ]


# -- the choice --------------------------------------------------------------------------------------------------------


def test_steps_stay_eager_where_compiled_ones_are_slower(model, caplog):
    """One id is faster compiled, and eleven are not. The cache of 64 slots is read in parts of 16."""
    quick, slow = Forward(model, 0.0), Forward(model, 0.06)
    compiled = CompiledForward(
        Forward(model, 0.03), lambda ids, **given: (slow if ids.shape[1] > 1 else quick)(ids, **given)
    )
    steps = [(9, 1), (10, 11), (12, 1), (13, 11), (14, 1), (17, 11), (20, 11)]
    with caplog.at_level(logging.INFO):
        made = run(model, compiled, steps)
    for mine, expected in zip(made, run(model, None, steps), strict=True):
        torch.testing.assert_close(mine, expected)
    assert set(slow.calls) == {(16, 32)}, "a larger part of the cache is not tried again"
    assert len(slow.calls) == 1 + module._ROUNDS
    assert quick.calls == [(1, 16)] * (1 + module._ROUNDS + 2)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("steps of 2 x 16 ids stay eager: compiled steps are slower, ")


def test_steps_stay_eager_if_the_compiler_fails(model, caplog):
    calls = []

    def fails(ids: Tensor, **given) -> Tensor:
        calls.append(ids.shape[1])
        raise RuntimeError("the compiler has no OpenMP\nand more lines")

    compiled = CompiledForward(model, fails)
    steps = [(9, 1), (10, 11), (12, 1)]
    for mine, expected in zip(run(model, compiled, steps), run(model, None, steps), strict=True):
        assert torch.equal(mine, expected)
    assert calls == [1], "no other shape is tried"
    (record,) = caplog.records
    assert record.getMessage() == "compilation failed, steps stay eager: the compiler has no OpenMP"


def test_a_faster_compiled_step_is_timed_once_for_each_part_of_the_cache(model, caplog):
    eager, quick = Forward(model, 0.03), Forward(model, 0.0)
    compiled = CompiledForward(eager, quick)
    with caplog.at_level(logging.INFO):
        run(model, compiled, [(9, 1), (10, 1), (20, 1), (21, 1)])
        run(model, compiled, [(9, 1), (10, 1)])  # of another image
    assert eager.calls == [(1, 10)] * module._ROUNDS + [(1, 21)] * module._ROUNDS
    assert len(quick.calls) == len(eager.calls) + 2 + 4 and not caplog.records


def test_timing_ends_after_two_rounds_of_slow_steps(model, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    quick = Forward(model, 0.0)
    run(model, CompiledForward(Forward(model, 0.03), quick), [(9, 1)])
    assert len(quick.calls) == 1 + module._LEAST_ROUNDS


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_shapes_above_the_limit_stay_eager(model, monkeypatch, caplog):
    """They ended in an error of torch."""
    monkeypatch.setattr(module, "SHAPES", 2)
    quick = Forward(model, 0.0)
    compiled = CompiledForward(Forward(model, 0.03), quick)
    with caplog.at_level(logging.INFO):
        run(model, compiled, [(9, 1), (10, 2), (12, 8), (20, 8), (28, 1), (9, 1)])
    assert set(quick.calls) == {(1, 16), (2, 16)}
    assert [record.getMessage() for record in caplog.records] == [
        "2 shapes of steps are compiled; steps of other shapes stay eager"
    ]


def test_caches_of_similar_lengths_have_the_same_slots():
    assert {length + compiled_spare(length, 3) for length in range(55, 119)} == {128}
    for length in range(1, 300):
        slots = length + compiled_spare(length, 40)
        assert slots % 64 == 0 and 47 <= slots - length < 47 + 64


@pytest.mark.parametrize("speculation", [None, Speculation("maximal", 8)])
def test_a_second_image_never_recompiles(always_compiled, monkeypatch, tiny_checkpoint, speculation):
    """Nor does a prompt of another length. torch's own count of graphs is compared; the backend does not matter."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **rest: compile(function, backend="eager", **rest))
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", compile=True)

    def graphs_of(prompt: str) -> int:
        before = counters["stats"]["unique_graphs"]
        request = GenerationRequest.of(prompt, 32, 64, cfg=4.0, speculation=speculation)
        assert len(list(pipeline.stream(request))) == 1
        return counters["stats"]["unique_graphs"] - before

    assert graphs_of("a cat") >= 2
    assert [graphs_of(prompt) for prompt in ("a cat", "a cat", "a hedgehog")] == [0, 0, 0]
    assert len(pipeline.compiled._shapes) < 10


def test_the_limit_of_recompilations_holds_during_calls_only():
    """It was set for the whole process. With fullgraph, the ninth shape is an error under torch's default of eight."""
    compiled = limited(torch.compile(lambda x: x + 1, backend="eager", dynamic=False, fullgraph=True), 64)
    with torch._dynamo.config.patch(recompile_limit=8):
        for size in range(2, 12):
            assert compiled(torch.ones(size)).shape == (size,)
        assert torch._dynamo.config.recompile_limit == 8


def test_a_missing_compiler_is_an_input_error(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"compile needs a C\+\+ compiler .* install g\+\+, or leave it out"):
        require_compiler(torch.device("cpu"))
