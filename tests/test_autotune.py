"""The choice of `--fast`: accepted codes are counted right, and they decide."""

import itertools

import pytest
import torch

from lumina_mgpt import Pipeline, autotune
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.sampling.jacobi import sample_jacobi


class FlatStep:
    """The same logits everywhere, so that drafts are accepted; or, if `changing`, other ones in each forward."""

    def __init__(self, changing: bool) -> None:
        self.changing, self.forwards = changing, 0

    def __call__(self, ids, positions, read):
        self.forwards += 1
        logits = torch.zeros(*read.shape, 64)
        if self.changing:
            logits.scatter_(-1, ((positions.gather(1, read) + 7 * self.forwards) % 64)[..., None], 1000.0)
        return logits


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu")


def trial(pipeline, images: int, goal: int) -> autotune._Trial:
    layout = pipeline.checkpoint.layout(32, 64)
    start = pipeline.checkpoint.prompt_ids(["a cat"], layout)[0]
    return autotune._Trial([start] * images, layout, SamplingConfig(), torch.zeros((images, 0), dtype=torch.long), goal)


@pytest.mark.parametrize(("changing", "window", "codes"), [(False, 3, 3.0), (False, 5, 5.0), (True, 5, 1.0)])
def test_accepted_codes_are_counted(pipeline, changing, window, codes):
    measured = autotune._sampled(FlatStep(changing), trial(pipeline, 2, 14), Speculation("maximal", window))
    assert measured.codes == codes and measured.seconds > 0


def test_a_trial_counts_as_the_whole_image_does(pipeline):
    """With the model itself: nearly the codes over the forwards of an image that is sampled to its end."""
    speculation, whole = Speculation("maximal", 4), trial(pipeline, 1, 32)
    prompts, layout, settings, given, _ = whole
    made = lambda: pipeline.make_step(prompts, layout, settings, speculation)  # noqa: E731
    step = made()
    sample_jacobi(step, prompts, layout, settings, [(0, 0)], speculation, given=given)
    found = autotune._sampled(made(), whole, speculation).codes
    assert found == pytest.approx((layout.num_codes - 1) / (step.calls - 1), abs=0.3)


def test_a_trial_ends_at_its_goal(pipeline):
    step = FlatStep(True)
    autotune._sampled(step, trial(pipeline, 1, 12), Speculation("maximal", 4))
    assert step.forwards == 12  # the prompt gives the first code, and each window one more; the next is not run


@pytest.mark.parametrize(("changing", "window"), [(False, 64), (True, None)])
def test_acceptance_decides(pipeline, monkeypatch, changing, window):
    """All forwards take one second."""
    clock = itertools.count()
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(pipeline, "make_step", lambda *args: FlatStep(changing))
    monkeypatch.setattr(autotune, "_COMPILING_MAY_PAY", 1e9)
    prepared = pipeline.checkpoint.prepare(GenerationRequest.of(["a cat"], 64, 64))
    choice = autotune.fastest(pipeline, prepared)
    assert (choice.window if choice else None) == window


@pytest.mark.parametrize(
    ("seconds", "window"),
    [
        ({None: 1.0, 8: 10.0, 16: 1.5, 32: 9.0, 64: 0.5}, 16),  # the narrowest may be slow; after 32, none is tried
        ({None: 1.0, 8: 1.5, 16: 1.2, 32: 0.9, 64: 1.0}, 32),
    ],
)
def test_wider_windows_are_tried_until_one_is_slow(pipeline, monkeypatch, seconds, window):
    """Two codes a forward with each window."""
    measure = lambda _, trial, choice: autotune.Measured(  # noqa: E731
        seconds[choice and choice.window], 2.0 if choice else 1.0
    )
    monkeypatch.setattr(autotune, "_measure", measure)
    prepared = pipeline.checkpoint.prepare(GenerationRequest.of(["a cat"], 64, 256))
    choice = autotune.fastest(pipeline, prepared)
    assert choice is not None and choice.window == window


@pytest.mark.parametrize(("images", "compiled"), [(2, False), (5, True)])
def test_compilation_is_tried_if_all_batches_take_long(pipeline, monkeypatch, images, compiled):
    """32 codes of one second each: two images of a batch take 32 seconds, and five take three batches."""
    tried = []
    monkeypatch.setattr(autotune, "_measure", lambda _, trial, choice: autotune.Measured(1.0, 1.0))
    monkeypatch.setattr(autotune, "_COMPILING_MAY_PAY", 50)
    monkeypatch.setattr(autotune, "has_compiler", lambda device: True)
    monkeypatch.setattr(autotune, "_compile_if_faster", lambda *args: tried.append(args[-1]))
    prepared = pipeline.checkpoint.prepare(GenerationRequest.of(["a cat"], 32, 64, n=images, batch_size=2))
    autotune.fastest(pipeline, prepared)
    assert tried == ([96.0] if compiled else [])
