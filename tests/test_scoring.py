"""Scores of images, the best of N, and functions of users."""

import math
import sys

import numpy as np
import pytest
import torch

from lumina_mgpt import GenerationRequest, Pipeline, scoring
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FIRST, SECOND
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.scoring import Scorer, best_of, make_scorer, scores_of
from lumina_mgpt.unirep import encode_conversation

PLAIN = SamplingConfig(cfg=1.0)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64, text=True)


def prepared_of(pipeline: Pipeline, prompts="a cat", **settings):
    return pipeline.checkpoint.prepare(GenerationRequest.of(prompts, 32, settings.pop("height", 32), **settings))


@torch.no_grad()
def step_by_step(pipeline: Pipeline, ids: list[int], first: int, columns: slice | None) -> list[torch.Tensor]:
    """log P of every id at each position from `first` on, one id a forward with a cache."""
    found = []
    layout = pipeline.checkpoint.layout(32, 64)
    step = pipeline.make_step([ids], layout, PLAIN, None)
    step.columns = columns
    for position, id_ in enumerate(ids):
        logits = step(torch.tensor([[id_]]), torch.tensor([[position]]), torch.tensor([[0]]))[0, 0]
        if position + 1 >= first:
            found.append(logits.log_softmax(-1))
    return found


@pytest.mark.parametrize("given", [False, True])
def test_bayes_is_the_difference_of_two_likelihoods(pipeline, given):
    """With the cached step as the second computation. Codes of a given panel do not count."""
    settings = {"height": 64, "task": I2I_TASKS["depth"], "panel": torch.zeros(4, 4, dtype=torch.long)} if given else {}
    prepared = prepared_of(pipeline, **settings)
    (result,) = pipeline.stream(prepared)
    start, columns = list(prepared.starts[0]), pipeline.checkpoint.vocabulary.code_slice
    total = 0.0
    for sign, before in ((1, start), (-1, [])):
        ids = [*before, *result.ids]
        log_probs = step_by_step(pipeline, ids, 1, columns)
        for offset in prepared.layout.code_offsets.tolist()[prepared.layout.given :]:
            at = len(before) + offset
            total += sign * float(log_probs[at - 1][ids[at] - columns.start])
    assert scoring.bayes_score(pipeline, prepared, result) == pytest.approx(total, abs=1e-9)
    assert abs(total) > 0.01


def test_reading_is_the_likelihood_of_the_prompt(pipeline):
    prepared = prepared_of(pipeline, "a red apple")
    (result,) = pipeline.stream(prepared)
    vocabulary = pipeline.checkpoint.vocabulary
    turns = [("human", [scoring.QUESTION, result.codes]), ("assistant", ["a red apple"])]
    ids, _ = encode_conversation(turns, vocabulary)
    answer = [*vocabulary.encode_text("a red apple"), vocabulary.turn_end_id]
    assert ids[-len(answer) :] == answer
    first = len(ids) - len(answer)
    log_probs = step_by_step(pipeline, ids, first, None)
    expected = sum(float(row[id_]) for row, id_ in zip(log_probs, answer, strict=False))
    assert scoring.read_score(pipeline, prepared, result) == pytest.approx(expected, abs=1e-9)


def test_likelihoods_of_all_next_ids_sum_to_one(pipeline):
    at = torch.tensor([3])
    whole = pipeline.checkpoint.config.vocab_size
    total = sum(math.exp(scoring.log_likelihood(pipeline, [1, 5, 9, id_], at, None)) for id_ in range(whole))
    assert total == pytest.approx(1, abs=1e-9)


def test_own_depends_on_the_family():
    assert (Scorer("own").kind(FIRST), Scorer("own").kind(SECOND)) == ("reading", "bayes")
    assert (Scorer("bayes").kind(FIRST), Scorer("reading").kind(SECOND)) == ("bayes", "reading")


def test_reading_needs_the_whole_head(tiny_checkpoint):
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu")
    with pytest.raises(InputError, match="text=True"):
        next(best_of(pipeline, prepared_of(pipeline), 2, Scorer("reading")))


def test_own_reads_images_of_the_first_generation(oracle_v1_checkpoint):
    """The whole way with the family's own scorer: reading, with a head for text by default."""
    pipeline = Pipeline.from_pretrained(oracle_v1_checkpoint("image"), "cpu")
    prepared = prepared_of(pipeline, "a cat")
    (choice,) = best_of(pipeline, prepared, 2, Scorer("own"))
    assert choice.scores == tuple(scoring.read_score(pipeline, prepared, one) for one in choice.candidates)
    assert all(score < 0 for score in choice.scores)


def test_own_prefers_the_prompt_of_the_image():
    """The demo checkpoint: for each of two images, its own prompt is the more probable one by far."""
    pipeline = Pipeline.from_pretrained("assets/demo", "cpu")
    prompts = ["a hedgehog on a sky blue background", "a cactus on a pink background"]
    prepared = pipeline.checkpoint.prepare(GenerationRequest.of(prompts))
    images = list(pipeline.stream(prepared))
    swapped = pipeline.checkpoint.prepare(GenerationRequest.of(prompts[::-1]))
    for image in images:
        right, wrong = (scoring.bayes_score(pipeline, request, image) for request in (prepared, swapped))
        assert right > wrong + 20


def test_candidates_are_images_of_a_larger_run(pipeline):
    """Candidates of image r are the repeats r · N ... r · N + N - 1, in every share."""
    prompts = ["a cat", "a snowman"]
    every = {(r.job.prompt_index, r.job.repeat): r.ids for r in pipeline.generate(prompts, 32, 32, n=6, seed=4)}
    seen = {}
    for share in ((0, 2), (1, 2)):
        prepared = prepared_of(pipeline, prompts, n=2, seed=4, share=share, batch_size=3)
        for choice in best_of(pipeline, prepared, 3, Scorer("bayes")):
            assert [c.job.repeat for c in choice.candidates] == [3 * choice.job.repeat + k for k in range(3)]
            assert choice.scores[choice.index] == max(choice.scores)
            assert choice.result.ids == choice.candidates[choice.index].ids and choice.result.job == choice.job
            seen |= {(c.job.prompt_index, c.job.repeat): c.ids for c in choice.candidates}
    assert seen == every


def test_a_function_chooses(pipeline):
    calls = []

    def darkness(images, prompts):
        calls.append((len(images), prompts))
        return np.array([-np.asarray(image).mean() for image in images])

    prepared = prepared_of(pipeline, ["expanded a", "expanded b"])
    choices = list(best_of(pipeline, prepared, 4, Scorer("my:darkness", darkness), prompts=["a", "b"]))
    assert calls == [(4, ["a"] * 4), (4, ["b"] * 4)]
    for choice in choices:
        means = [np.asarray(candidate.image).mean() for candidate in choice.candidates]
        assert choice.index == int(np.argmin(means)) and len(set(means)) > 1


def test_a_function_gets_the_lowest_panel(pipeline):
    sizes = []
    settings = {"height": 64, "task": I2I_TASKS["depth"], "panel": torch.zeros(4, 4, dtype=torch.long)}
    scorer = Scorer("my:sizes", lambda images, prompts: sizes.extend(i.size for i in images) or [0.0] * len(images))
    (choice,) = best_of(pipeline, prepared_of(pipeline, **settings), 2, scorer)
    assert sizes == [(32, 32)] * 2 and choice.index == 0  # the first of equal ones


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ([1.0], "[1.0]"),
        ([1.0, math.nan], "nan"),
        ([math.inf, 1], "inf"),
        ([True, 1], "nan"),
        (["1", 2], "nan"),
        (None, "None"),
        (3.5, "3.5"),
        (torch.tensor([1.0, -math.inf]), "-inf"),
    ],
)
def test_wrong_scores_are_refused(returned, shown):
    with pytest.raises(InputError, match="my:score must return 2 finite numbers") as error:
        scores_of(lambda images, prompts: returned, "my:score", [None, None], ["", ""])
    assert shown in str(error.value)


@pytest.mark.parametrize("returned", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([[1.0], [2.5]])])
def test_numbers_of_many_kinds_are_scores(returned):
    assert scores_of(lambda images, prompts: returned, "my:score", [None, None], ["", ""]) == (1.0, 2.5)


def test_a_function_that_raises_is_an_error():
    with pytest.raises(InputError, match=r"my:score raised ZeroDivisionError: .*; correct the function"):
        scores_of(lambda images, prompts: 1 / 0, "my:score", [None], [""])
    with pytest.raises(InputError, match="my:score raised SystemExit: 3"):
        scores_of(lambda images, prompts: sys.exit(3), "my:score", [None], [""])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("best", "must be own, reading, bayes or module:function"),
        ("a b:c", "must be module:function"),
        ("no_such_module_of_mine:f", "cannot import no_such_module_of_mine"),
        ("math:no_such", "math has no no_such"),
        ("math:pi", "must be a function, got a float"),
        ("broken_scores:f", "RuntimeError: no weights"),
    ],
)
def test_functions_that_cannot_be_loaded(name, part, tmp_path, monkeypatch):
    (tmp_path / "broken_scores.py").write_text("raise RuntimeError('no weights')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(InputError) as error:
        make_scorer(name)
    assert part in str(error.value) and str(error.value).startswith("scorer ")


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, True])
def test_counts_out_of_range(pipeline, count):
    with pytest.raises(InputError, match="best_of must be a whole number"):
        next(best_of(pipeline, prepared_of(pipeline), count, Scorer("bayes")))
