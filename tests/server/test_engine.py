"""The engine: batches, cancelling, the queue and its end."""

import threading

import pytest
import torch
from server_runs import PATIENCE

from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.server.engine import Observer
from lumina_mgpt.server.tickets import Busy, Closing, Finished, Progress

REQUESTS = [
    dict(prompts="a hedgehog", n=3, seed=5, width=32, height=64),
    dict(prompts="a cat on a white background", seed=5, width=32, height=64),
    dict(prompts="a snowman", n=2, seed=6, width=32, height=64),
]


class Noted(Observer):
    """Remembers the sizes of batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def batch(self, images: int) -> None:
        self.batches.append(images)


def codes_of(ticket) -> list[torch.Tensor]:
    found = {event.image: event.result.codes for event in ticket if isinstance(event, Finished)}
    return [found[image] for image in sorted(found)]


@pytest.mark.parametrize("speculation", [None, Speculation("noise", 5), Speculation("maximal", 5)])
def test_requests_share_a_batch_and_get_their_own_images(exact, engine_of, speculation):
    engine = engine_of(exact, gather=0.1)
    engine.observer = noted = Noted()
    requests = [GenerationRequest.of(**values, speculation=speculation) for values in REQUESTS]
    tickets = [engine.submit(request) for request in requests]
    shared = [codes_of(ticket) for ticket in tickets]
    assert noted.batches == [6]
    for request, codes in zip(requests, shared, strict=True):
        alone = [result.codes for result in exact.stream(request)]
        assert len(codes) == len(alone) and all(map(torch.equal, codes, alone))


def test_other_settings_or_sizes_do_not_share_a_batch(exact, engine_of):
    engine = engine_of(exact, gather=0.1)
    engine.observer = noted = Noted()
    variants = [{}, {"cfg": 2.0}, {"top_k": 7}, {"temperature": 0.5}, {"width": 32}, {"speculation": Speculation()}]
    twice = [{"width": 64, "height": 32, "seed": 1} | values for values in (*variants, *variants)]
    tickets = [engine.submit(GenerationRequest.of("a cat", **values)) for values in twice]
    for ticket in tickets:
        assert len(codes_of(ticket)) == 1
    assert noted.batches == [2] * len(variants)


def test_a_request_larger_than_a_batch_is_split(exact, engine_of):
    engine = engine_of(exact, batch_size=2, gather=0.2)
    engine.observer = noted = Noted()
    request = GenerationRequest.of("a cat", 32, 32, n=5, seed=1)
    codes = codes_of(engine.submit(request))
    assert noted.batches == [2, 2, 1]
    assert all(map(torch.equal, codes, [result.codes for result in exact.stream(request)]))


@pytest.mark.parametrize(("previews", "rows"), [(0, []), (1, [4]), (3, [2, 4, 6]), (99, [1, 2, 3, 4, 5, 6, 7])])
def test_previews_come_after_evenly_spaced_rows(exact, engine_of, previews, rows):
    request = GenerationRequest.of("a cat", 32, 64, seed=1)
    events = list(engine_of(exact).submit(request, previews))
    shown = [event for event in events if isinstance(event, Progress) and event.picture]
    assert [event.rows for event in shown if event.rows < 8] == rows
    assert [event.rows for event in events if isinstance(event, Progress)] == list(range(1, 9))
    codes = next(event.result.codes for event in events if isinstance(event, Finished))
    for event in shown:
        expected = exact.preview(codes[None, : event.rows], exact.checkpoint.layout(32, 64))[0]
        assert event.picture.tobytes() == expected.tobytes()


def test_a_cancelled_request_leaves_its_batch_at_the_next_step(exact, engine_of, gate):
    engine = engine_of(exact, gather=0.1)
    leaving, staying = (engine.submit(GenerationRequest.of(**values)) for values in REQUESTS[:2])
    assert gate.reached.wait(PATIENCE)
    leaving.cancel()
    gate.open()
    assert not codes_of(leaving)
    (codes,) = codes_of(staying)
    assert gate.rows[2:4] == [8, 2]  # two rows an image, one with the prompt and one without
    assert torch.equal(codes, next(exact.stream(GenerationRequest.of(**REQUESTS[1]))).codes)


def test_a_batch_ends_when_all_have_left(exact, engine_of, gate):
    engine = engine_of(exact)
    ticket = engine.submit(GenerationRequest.of("a cat", 32, 32))
    assert gate.reached.wait(PATIENCE)
    ticket.cancel()
    gate.open()
    assert codes_of(engine.submit(GenerationRequest.of("a cat", 32, 32)))  # the engine goes on
    assert len(gate.rows) <= 3 + 16  # the second image has 4 x 4 codes


def test_a_full_queue_refuses_and_cancelling_makes_room(exact, engine_of, gate):
    engine = engine_of(exact, queue_limit=2)
    running = engine.submit(GenerationRequest.of("a cat", 32, 32))
    assert gate.reached.wait(PATIENCE)
    waiting = engine.submit(GenerationRequest.of("a cat", 32, 32, n=2))
    with pytest.raises(Busy) as full:
        engine.submit(GenerationRequest.of("a cat", 32, 32))
    assert full.value.retry_after >= 1
    waiting.cancel()
    assert engine.waiting == 0
    later = engine.submit(GenerationRequest.of("a cat", 32, 32))
    gate.open()
    assert codes_of(running) and codes_of(later) and not codes_of(waiting)


def test_draining_refuses_what_waits_and_finishes_what_runs(exact, engine_of, gate):
    engine = engine_of(exact)
    running = engine.submit(GenerationRequest.of("a cat", 32, 32))
    assert gate.reached.wait(PATIENCE)
    waiting = engine.submit(GenerationRequest.of("a cat", 32, 32))
    engine.drain()
    with pytest.raises(Closing):
        list(waiting)
    with pytest.raises(Closing):
        engine.submit(GenerationRequest.of("a cat", 32, 32))
    gate.open()
    assert codes_of(running)
    engine.close()


def test_a_failure_reaches_all_requests_of_its_batch_and_no_other(exact, engine_of, monkeypatch):
    engine = engine_of(exact, gather=0.1)
    monkeypatch.setattr(exact, "sample", lambda *_, **__: 1 // 0)
    tickets = [engine.submit(GenerationRequest.of("a cat", 32, 32, seed=seed)) for seed in range(2)]
    for ticket in tickets:
        with pytest.raises(ZeroDivisionError):
            list(ticket)
    monkeypatch.undo()
    assert codes_of(engine.submit(GenerationRequest.of("a cat", 32, 32)))


def test_a_wrong_request_is_refused_by_submit(exact, engine_of):
    with pytest.raises(InputError, match="width"):
        engine_of(exact).submit(GenerationRequest.of("a cat", 33))


def test_events_before_the_first_listener_are_kept(exact, engine_of):
    ticket = engine_of(exact).submit(GenerationRequest.of("a cat", 32, 32))
    while not ticket.ended:
        threading.Event().wait(0.01)
    assert len(codes_of(ticket)) == 1
