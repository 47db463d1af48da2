"""Images that leave a running batch: the others do not change, and the model computes fewer rows."""

import pytest
import torch

from lumina_mgpt import Pipeline
from lumina_mgpt.config import SamplingConfig, Speculation

KEYS = [(3, 0), (4, 0), (4, 1), (2**40, 7)]
PROMPTS = ["a hedgehog", "a cat on a white background", "a cat on a white background", "an apple"]


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint):
    """In float64, where a batch of another size rounds to the same code; and with keys and values in int8."""
    exact = Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)
    return {
        "float64": exact,
        "int8": Pipeline(exact.checkpoint, exact.model, exact.image_tokenizer, torch.int8),
    }


def run(pipeline, settings, speculation, kept=None):
    """Codes of the batch, and the number of rows of each forward of the model."""
    rows, forward = [], pipeline.model.forward
    layout = pipeline.checkpoint.layout(32, 64)
    starts = pipeline.checkpoint.prompt_ids(PROMPTS, layout)

    def counted(ids, **arguments):
        rows.append(len(ids))
        return forward(ids, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.model, "forward", counted)
        codes = pipeline.sample(starts, layout, settings, [0] * 4, keys=KEYS, speculation=speculation, kept=kept)
    return codes, rows


@pytest.mark.parametrize("cache", ["float64", "int8"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("speculation", [None, Speculation("noise", 6), Speculation("maximal", 6)])
def test_the_others_keep_their_codes(pipelines, cache, cfg, speculation):
    pipeline, settings = pipelines[cache], SamplingConfig(cfg=cfg, seed=99)
    whole, _ = run(pipeline, settings, speculation)
    calls = iter(range(10**6))
    kept = {2: [0, 2, 3], 5: [1, 2]}  # the second image leaves before the third step, then the first
    codes, rows = run(pipeline, settings, speculation, lambda: kept.get(next(calls)))
    assert torch.equal(codes, whole[[2, 3]])
    images = 1 if cfg == 1.0 else 2
    assert rows[1:3] == [4 * images] * 2 and rows[3] == 3 * images and rows[-1] == 2 * images


def test_each_image_has_the_noise_of_its_own_key(pipelines):
    pipeline, layout = pipelines["float64"], pipelines["float64"].checkpoint.layout(32, 64)
    codes, _ = run(pipeline, SamplingConfig(seed=99), None)
    for prompt, (seed, repeat), grid in zip(PROMPTS, KEYS, codes, strict=True):
        starts = pipeline.checkpoint.prompt_ids([prompt], layout)
        assert torch.equal(pipeline.sample(starts, layout, SamplingConfig(seed=seed), [repeat])[0], grid)


def test_an_exception_of_kept_ends_the_batch(pipelines):
    class Left(Exception):
        pass

    def kept():
        raise Left

    with pytest.raises(Left):
        run(pipelines["float64"], SamplingConfig(), None, kept)


def test_dropped_rows_free_their_memory(pipelines):
    pipeline, layout = pipelines["int8"], pipelines["int8"].checkpoint.layout(32, 64)
    starts = pipeline.checkpoint.prompt_ids(PROMPTS, layout)
    step = pipeline.make_step(starts, layout, SamplingConfig(), None)
    before = sum(tensor.nbytes for tensor in step.cache.tensors())
    step.dropping(4, lambda: [3])()
    assert sum(tensor.nbytes for tensor in step.cache.tensors()) == before / 4
