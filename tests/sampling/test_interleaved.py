"""Answers in text and images against a reference that keeps lists and draws one id at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remembering_step import RememberingStep, logits_of

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling.interleaved import AnswerSampler, Plan, sample_texts
from lumina_mgpt.sampling.noise import IDS, gumbel, stream
from lumina_mgpt.unirep import ImageLayout, Status, generation_prompt, image_length, split, status

LIKELY = 8.0  # added to the logits of the ids below, so that random answers have images and ends


def bias(v, end: float = 4.0) -> np.ndarray:
    values = np.zeros(v.vocab_size)
    values[v.image_start_id], values[v.turn_end_id] = LIKELY, end
    values[[v.bos_id, v.image_end_id, v.row_end_id, v.grid_id(3)]] = LIKELY  # to be banned
    values[v.code_slice] += 3
    return values


class TextStep(RememberingStep):
    """Logits of the whole vocabulary, with the biases above."""

    def __init__(self, v, slots, end: float = 4.0):
        super().__init__(v.vocab_size)
        self.bias, self.slots = torch.from_numpy(bias(v, end)), slots

    def _logits(self, row, position):
        return super()._logits(row, position) + self.bias


def sampler(v, prompt, plan, config, *, slots=None, held=0, turn=0, speculation=None) -> AnswerSampler:
    slots = {} if slots is None else slots
    images = RememberingStep(v.num_image_codes)
    images.slots = slots
    return AnswerSampler(TextStep(v, slots), lambda: images, v, prompt, held, plan, config, turn, speculation)


def finish(one: AnswerSampler) -> list[int]:
    fed = [id_ for ids in one.run() for id_ in ids]
    assert fed == one.answer
    return fed


def pick(logits: np.ndarray, allowed: list[int], temperature: float, top_k: int, noise: np.ndarray) -> int:
    kept = sorted(allowed, key=lambda id_: (-logits[id_], id_))[:top_k]
    return max(kept, key=lambda id_: logits[id_] / temperature + (noise[id_] if top_k > 1 else 0))


def plain_answer(v, prompt, plan: Plan, config: SamplingConfig, turn: int = 0) -> tuple[list[int], str]:
    """The rules of the module, one id at a time."""
    answer: list[int] = []
    images = 0

    def draw(allowed, temperature, top_k):
        logits = logits_of(prompt + answer, v.vocab_size).numpy() + bias(v)
        noise = gumbel(config.seed, 0, len(answer), v.vocab_size, IDS, stream=turn << 32).numpy()
        return pick(logits, allowed, temperature, top_k, noise)

    grids = {v.grid_id(size): size for size in range(1, v.max_grid + 1)}
    codes = range(v.code_slice.start, v.code_slice.stop)
    never = {v.bos_id, v.image_end_id, v.row_end_id, *grids, *codes}
    while len(answer) < min(plan.limit, plan.context - len(prompt)):
        begin = max((n for n, id_ in enumerate(answer) if id_ == v.image_start_id), default=None)
        if begin is None or v.image_end_id in answer[begin:]:  # text
            fits = len(prompt) + len(answer) + image_length(1, 1, v) <= plan.context
            if plan.images:
                id_ = v.image_start_id if images < plan.images else v.turn_end_id
            else:
                banned = never | (set() if fits and not plan.text_only else {v.image_start_id})
                allowed = [id_ for id_ in range(v.vocab_size) if id_ not in banned]
                id_ = draw(allowed, config.text_temperature, config.text_top_k)
            answer.append(id_)
            if id_ == v.turn_end_id:
                return answer, "turn end"
            continue
        at = len(answer) - begin
        room = plan.context - len(prompt) - begin
        if at < 3:
            if plan.layout:
                id_ = v.grid_id([plan.layout.grid_rows, plan.layout.grid_cols][at - 1])
            else:
                size = [(lambda n: (n, 1)), (lambda n: (grids[answer[-1]], n))][at - 1]
                allowed = [id_ for id_, n in grids.items() if image_length(*size(n), v) <= room]
                id_ = draw(allowed, config.temperature, config.top_k)
            answer.append(id_)
            continue
        layout = ImageLayout(v, grids[answer[begin + 1]], grids[answer[begin + 2]])
        forced = int(layout.ids[at])
        if forced < 0:
            position = int((layout.code_offsets < at).sum())
            logits = logits_of(prompt + answer, v.num_image_codes).numpy()
            if config.cfg != 1:
                uncond = logits_of(answer[begin:], v.num_image_codes).numpy()
                logits = uncond + config.cfg * (logits - uncond)
            key = (config.seed, 0, position, v.num_image_codes)
            noise = gumbel(*key, stream=turn << 32 | images).numpy()
            forced = v.code_slice.start + pick(logits, list(range(64)), config.temperature, config.top_k, noise)
        answer.append(forced)
        images += forced == v.image_end_id
    return answer, "length"


CASES = {
    "any": dict(images=0, text_only=False, layout=None, limit=150, context=190),
    "text": dict(images=0, text_only=True, layout=None, limit=12, context=60),
    "image of any size": dict(images=1, text_only=False, layout=None, limit=150, context=150),
    "images": dict(images=3, text_only=False, layout=(1, 1), limit=500, context=500),
    "cut in an image": dict(images=2, text_only=False, layout=(1, 2), limit=57, context=500),
    "cut in a header": dict(images=2, text_only=False, layout=(1, 1), limit=26, context=500),
}


def plan_of(v, images, text_only, layout, limit, context) -> Plan:
    return Plan(images, text_only, layout and ImageLayout(v, *layout), limit, context)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_answers_equal_the_reference(vocabulary, name, cfg):
    plan, prompt = plan_of(vocabulary, **CASES[name]), generation_prompt("a cat", vocabulary)
    found = set()
    for seed in range(3):
        config = SamplingConfig(cfg=cfg, top_k=9, temperature=0.8, text_top_k=5, text_temperature=1.5, seed=seed)
        one = sampler(vocabulary, prompt, plan, config, turn=seed)
        assert (finish(one), one.reason) == plain_answer(vocabulary, prompt, plan, config, turn=seed)
        found |= {vocabulary.image_start_id in one.answer, one.reason}
    reasons = {"any": "length", "text": "length"}.get(name, "length" if "cut" in name else "turn end")
    assert ("text" == name) != (True in found) and reasons in found


def test_text_has_its_own_settings_where_images_are_allowed(vocabulary):
    logits = 3 * torch.randn(1, 1, vocabulary.vocab_size, generator=torch.Generator().manual_seed(0))
    logits[..., vocabulary.image_start_id] = -100.0
    drawn = set()
    for seed in range(10):
        config = SamplingConfig(temperature=0.1, top_k=1, text_temperature=5.0, text_top_k=50, seed=seed)
        plans = [Plan(0, text_only, None, 1, 99) for text_only in (False, True)]
        ids = [AnswerSampler(lambda *_: logits, None, vocabulary, [1], 0, plan, config) for plan in plans]
        assert finish(ids[0]) == finish(ids[1])
        drawn.add(ids[0].answer[0])
    assert len(drawn) > 5


def test_an_image_begins_where_it_fits_the_context(vocabulary):
    """The context holds prompt and answer. The biases favor image starts, and grid size 3."""
    v, prompt, greedy = vocabulary, generation_prompt("a cat", vocabulary), SamplingConfig(1.0, 1, text_top_k=1)
    for missing in (0, 1):
        context = len(prompt) + image_length(1, 1, v) - missing
        first, *_ = finish(sampler(v, prompt, Plan(0, False, None, 3, context), greedy))
        assert (first == v.image_start_id) == (missing == 0)
        context = len(prompt) + image_length(3, 3, v) - missing
        start, rows, cols = finish(sampler(v, prompt, Plan(1, False, None, 3, context), greedy))
        assert (start, rows) == (v.image_start_id, v.grid_id(3)) and (cols == v.grid_id(3)) == (missing == 0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63 - 1), st.booleans(), st.sampled_from([1, 3, 1000]), st.sampled_from([0.3, 1.0, 9.0]))
def test_banned_ids_are_never_drawn(vocabulary, seed, text_only, top_k, temperature):
    """Whatever the logits, an answer splits into text without control ids and whole images; only the last may break."""
    v, prompt = vocabulary, generation_prompt(f"{seed}", vocabulary)
    plan = Plan(0, text_only, None, 70, 140)
    config = SamplingConfig(seed=seed, text_top_k=top_k, text_temperature=temperature, top_k=top_k)
    answer = finish(sampler(v, prompt, plan, config))
    if status(answer, v) is not Status.TEXT:
        answer = answer[: len(answer) - 1 - answer[::-1].index(v.image_start_id)]
    banned = {v.bos_id, v.image_end_id, v.row_end_id, v.image_start_id, *map(v.grid_id, range(1, v.max_grid + 1))}
    for part in split(answer, v):
        if isinstance(part, list):
            assert not banned & set(part) and not v.is_code(torch.tensor(part)).any()
            assert v.turn_end_id not in part[:-1]
        else:
            assert not text_only


@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("name", ["any", "images", "cut in an image"])
def test_speculation_gives_the_plain_answer(vocabulary, window, name):
    """The remembering model raises if a slot that an earlier window left is read; ids are equal over two turns."""
    plan, prompt = plan_of(vocabulary, **CASES[name]), generation_prompt("a cat", vocabulary)
    config = SamplingConfig(cfg=2.0, top_k=9, text_top_k=5)
    answers = []
    for speculation in (None, Speculation("noise", window)):
        slots: dict = {}
        first = sampler(vocabulary, prompt, plan, config, slots=slots, speculation=speculation)
        ids = prompt + finish(first) + [vocabulary.turn_end_id, 5, 6, vocabulary.turn_end_id]
        wider = Plan(plan.images, plan.text_only, plan.layout, plan.limit, plan.context + len(ids))
        second = sampler(vocabulary, ids, wider, config, slots=slots, held=first.held, turn=1, speculation=speculation)
        finish(second)
        assert plain_answer(vocabulary, ids, wider, config, turn=1) == (second.answer, second.reason)
        answers.append((first.answer, second.answer))
    assert answers[0] == answers[1]


def test_a_second_turn_feeds_its_own_ids_only(vocabulary):
    v, config, plan = vocabulary, SamplingConfig(cfg=2.0), plan_of(vocabulary, **CASES["images"])
    slots: dict = {}
    first = sampler(v, generation_prompt("a cat", v), plan, config, slots=slots)
    finish(first)
    new = [*v.encode_text("a dog"), v.turn_end_id]
    prompt, step = first.prompt + first.answer + new, RememberingStep(v.num_image_codes)
    step.slots = slots
    second = AnswerSampler(None, lambda: step, v, prompt, first.held, plan, config, 1)
    finish(second)
    ids, positions, read = step.calls[0]
    fed = len(prompt) + 3 - first.held
    pending = 4  # last code, row end, image end and turn end of the first answer
    assert fed == pending + len(new) + 3 and ids.shape == (2, fed)
    assert ids[0].tolist() == prompt[first.held :] + step.calls[0][0][1, :3].tolist()
    assert positions[:, 0].tolist() == [first.held, 0] and read.tolist() == [[fed - 1], [2]]


def test_forced_ids_cost_no_step(vocabulary):
    plan = plan_of(vocabulary, **CASES["images"])
    step = RememberingStep(vocabulary.num_image_codes)
    one = AnswerSampler(None, lambda: step, vocabulary, [1, 2], 0, plan, SamplingConfig(cfg=1.0))
    finish(one)
    assert len(step.calls) == 3 * 16  # one forward a code; no text step at all
    assert one.answer[-1] == vocabulary.turn_end_id and len(split(one.answer, vocabulary)) == 4


def test_images_of_an_answer_and_answers_of_a_conversation_have_their_own_noise(vocabulary):
    """With equal logits at all positions, only the noise differs."""
    logits = torch.zeros(2, 1, 64, dtype=torch.float64)
    drawn = []
    for turn in (0, 1):
        plan, config = plan_of(vocabulary, **CASES["images"]), SamplingConfig(cfg=2.0, seed=3)
        one = AnswerSampler(None, lambda: lambda *call: logits, vocabulary, [1], 0, plan, config, turn)
        finish(one)
        drawn += [part.flatten().tolist() for part in split(one.answer, vocabulary) if not isinstance(part, list)]
    assert len({tuple(codes) for codes in drawn}) == 6
    fresh = [int(gumbel(3, 0, position, 64).argmax()) for position in range(16)]
    assert drawn[0] == fresh  # as a request of one image
    assert len({stream(answer, image) for answer in range(5) for image in range(5)}) == 25 and stream(0, 0) == 0
    assert not torch.equal(gumbel(3, 0, 0, 64), gumbel(3, 0, 0, 64, IDS))


def test_a_batch_of_texts_equals_single_answers(vocabulary):
    v = vocabulary
    prompts = [generation_prompt("a" * n, v) for n in (1, 9, 4, 40)]
    config, limits = SamplingConfig(text_top_k=20, text_temperature=1.2, seed=8), [30, 30, 2, 30]
    together = sample_texts(TextStep(v, {}, end=3.0), prompts, v, config, [(8, 0)] * 4, limits)
    assert {answer[-1] == v.turn_end_id for answer in together} == {True, False} and len(set(map(len, together))) > 2
    for prompt, limit, answer in zip(prompts, limits, together, strict=True):
        assert sample_texts(TextStep(v, {}, end=3.0), [prompt], v, config, [(8, 0)], [limit]) == [answer]
        one = sampler(v, prompt, Plan(0, True, None, limit, 1000), config)
        one._text_step = TextStep(v, {}, end=3.0)
        assert finish(one) == answer


def test_logits_that_are_not_numbers_are_refused(vocabulary):
    def broken(ids, positions, read):
        return torch.full((len(ids), 1, vocabulary.vocab_size), torch.nan)

    one = AnswerSampler(broken, lambda: broken, vocabulary, [1], 0, Plan(0, False, None, 9, 99), SamplingConfig())
    with pytest.raises(InputError, match="^dtype gives logits"):
        next(one.run())
