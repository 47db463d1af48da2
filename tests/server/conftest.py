"""Engines and running servers of the tiny checkpoint."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from server_runs import PATIENCE, Gate, Served, serving

from lumina_mgpt import Pipeline
from lumina_mgpt.server.engine import Engine


@pytest.fixture(scope="session")
def exact(tiny_checkpoint) -> Pipeline:
    """The tiny checkpoint in float64, where a batch of another size rounds to the same code."""
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)


@pytest.fixture
def engine_of() -> Iterator[Callable[..., Engine]]:
    """Makes engines, and closes them at the end of the test."""
    engines = []

    def make(pipeline: Pipeline, **options: object) -> Engine:
        engines.append(Engine(pipeline, "tiny", **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def served(exact, engine_of) -> Iterator[Served]:
    with serving(engine_of(exact)) as running:
        yield running


@pytest.fixture
def gate(exact, monkeypatch) -> Iterator[Gate]:
    """Closed before the third forward. `rows` has the number of rows of each forward."""
    gate, forward = Gate(threading.Event(), threading.Event(), []), exact.model.forward

    def held(ids, **arguments):
        gate.rows.append(len(ids))
        if len(gate.rows) == 3:
            gate.reached.set()
            assert gate.opened.wait(PATIENCE)
        return forward(ids, **arguments)

    monkeypatch.setattr(exact.model, "forward", held)
    yield gate
    gate.open()
