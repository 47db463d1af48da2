"""Sampling against reference formulations: one image at a time by lists, probabilities in NumPy, and statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remembering_step import RememberingStep, logits_of

from lumina_mgpt.config import ModelConfig, SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling import sample
from lumina_mgpt.sampling.logits import code_log_probs, guide, log_probs, truncate
from lumina_mgpt.sampling.noise import CODES, IDS, gumbel, gumbel_rows, stream
from lumina_mgpt.unirep import ImageLayout, decode_image, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(tiny_checkpoint):
    return Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))


def plain_probs(cond: np.ndarray, uncond: np.ndarray | None, cfg: float, temperature: float, top_k: int) -> np.ndarray:
    """Reference probabilities in NumPy float64; of ties at the border, the lower index remains."""
    logits = cond if uncond is None else uncond + cfg * (cond - uncond)
    scaled = logits / temperature
    kept = sorted(range(len(scaled)), key=lambda c: (-scaled[c], c))[:top_k]
    probs = np.zeros(len(scaled))
    probs[kept] = np.exp(scaled[kept] - scaled[kept].max())
    return probs / probs.sum()


def plain_image(prompt, layout, config, key, given=()):
    """Reference for `sample`: one image, one id at a time, with lists."""
    vocabulary, codes = layout.vocabulary, list(given)
    image = [vocabulary.image_start_id, vocabulary.grid_id(layout.grid_rows), vocabulary.grid_id(layout.grid_cols)]
    for index in range(layout.num_codes):
        if index >= len(given):
            cond = logits_of(list(prompt) + image, vocabulary.num_image_codes).numpy()
            uncond = logits_of(image, vocabulary.num_image_codes).numpy() if config.cfg != 1 else None
            probs = plain_probs(cond, uncond, config.cfg, config.temperature, config.top_k)
            with np.errstate(divide="ignore"):
                codes.append(int(np.argmax(np.log(probs) + gumbel(*key, index, len(probs)).numpy())))
        image.append(vocabulary.code_slice.start + codes[index])
        if (index + 1) % layout.cols == 0:
            image.append(vocabulary.row_end_id)
    image.append(vocabulary.image_end_id)
    return decode_image(image, vocabulary)


PROMPTS = ("a hedgehog", "a slice of pizza on a white background", "")
KEYS = ((7, 0), (7, 1), (123456789012345, 0))


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("given_panels", [0, 1])
def test_batch_of_different_lengths_equals_single_images(vocabulary, cfg, given_panels):
    layout = ImageLayout.from_pixels(vocabulary, 32, 64, panels=2, given_panels=given_panels)
    prompts = [generation_prompt(text, vocabulary) for text in PROMPTS]
    known = torch.randint(0, vocabulary.num_image_codes, (len(prompts), layout.given))
    config = SamplingConfig(cfg=cfg, top_k=20, temperature=0.7)
    step = RememberingStep(vocabulary.num_image_codes)
    codes = sample(step, prompts, layout, config, KEYS, given=known)
    expected = [plain_image(p, layout, config, k, g.tolist()) for p, k, g in zip(prompts, KEYS, known, strict=True)]
    assert codes.tolist() == torch.stack(expected).tolist()
    alone = sample(
        RememberingStep(vocabulary.num_image_codes), prompts[1:2], layout, config, KEYS[1:2], given=known[1:2]
    )
    assert torch.equal(alone[0], codes[1])
    assert len({tuple(image.flatten().tolist()) for image in codes}) == len(prompts)


def test_any_number_of_codes_may_be_given(vocabulary):
    """A prefix may end inside a row, at the end of a row, or be the whole image."""
    prompt, config = generation_prompt("a cat", vocabulary), SamplingConfig(cfg=3.0, top_k=64)
    whole = sample(RememberingStep(64), [prompt], ImageLayout(vocabulary, 1, 1), config, KEYS[:1])
    for n in (0, 1, 3, 4, 5, 15, 16):
        step, layout = RememberingStep(64), ImageLayout(vocabulary, 1, 1, given=n)
        again = sample(step, [prompt], layout, config, KEYS[:1], given=whole.flatten(1)[:, :n])
        assert torch.equal(again, whole)  # the noise of a code does not depend on the prefix
        assert len(step.calls) == 16 - n


def test_row_ends_are_fed_with_the_code_before_them(vocabulary):
    layout = ImageLayout.from_pixels(vocabulary, 64, 32)  # 4 rows of 8
    prompt = generation_prompt("a cat", vocabulary)
    step = RememberingStep(vocabulary.num_image_codes)
    codes = sample(step, [prompt], layout, SamplingConfig(cfg=4.0), KEYS[:1])
    first, *after = step.calls
    assert len(after) == layout.rows * layout.cols - 1
    assert first[0].shape == (2, len(prompt) + 3) and first[2].tolist() == [[len(prompt) + 2], [2]]
    assert [ids.shape[1] for ids, _, _ in after] == [2 if n % 8 == 0 else 1 for n in range(1, 32)]
    fed = first[0][0].tolist() + [id_ for ids, _, _ in after for id_ in ids[0].tolist()]
    end = [vocabulary.code_slice.start + int(codes.flatten()[-1]), vocabulary.row_end_id, vocabulary.image_end_id]
    assert torch.equal(decode_image(fed[len(prompt) :] + end, vocabulary), codes[0])  # the image end was never fed


def test_no_unconditional_row_without_guidance(vocabulary):
    layout, prompts = ImageLayout(vocabulary, 1, 1), [generation_prompt(text, vocabulary) for text in PROMPTS]
    for cfg, rows in ((1.0, 3), (4.0, 6)):
        step = RememberingStep(vocabulary.num_image_codes)
        sample(step, prompts, layout, SamplingConfig(cfg=cfg), KEYS)
        assert {ids.shape[0] for ids, _, _ in step.calls} == {rows}
    unconditional = step.calls[0][0][3:, :3]
    assert unconditional.tolist() == [layout.ids[:3].tolist()] * 3  # from image start on
    assert step.calls[0][1][3:, :3].tolist() == [[0, 1, 2]] * 3  # at positions from 0


def test_callback_sees_each_row_once(vocabulary):
    layout = ImageLayout.from_pixels(vocabulary, 32, 64, panels=2, given_panels=1)
    seen = []
    known = torch.randint(0, 64, (2, layout.given))
    codes = sample(
        RememberingStep(64),
        [[1], [2, 3]],
        layout,
        SamplingConfig(),
        KEYS[:2],
        on_row=lambda row, so_far: seen.append((row, so_far)),
        given=known,
    )
    assert [row for row, _ in seen] == [4, 5, 6, 7]
    assert all(torch.equal(so_far, codes[:, : row + 1]) for row, so_far in seen)


def test_greedy_sampling_draws_no_noise(vocabulary, monkeypatch):
    monkeypatch.setattr("lumina_mgpt.sampling.autoregressive.gumbel_like", None)
    layout, config = ImageLayout(vocabulary, 1, 1), SamplingConfig(cfg=4.0, top_k=1)
    codes = sample(RememberingStep(64), [[5, 6]], layout, config, KEYS[:1])
    assert torch.equal(codes[0], plain_image([5, 6], layout, config, KEYS[0]))


def test_nan_logits_are_refused(vocabulary):
    def broken(ids, positions, read):
        return torch.full((len(ids), 1, 64), math.inf)

    with pytest.raises(InputError, match="^dtype gives logits"):
        sample(broken, [[1]], ImageLayout(vocabulary, 1, 1), SamplingConfig(), KEYS[:1])


def test_codes_follow_the_processed_distribution(vocabulary):
    """Chi-square of codes, and of pairs of neighbours, against the reference probabilities."""
    codes, config = vocabulary.num_image_codes, SamplingConfig(cfg=2.0, temperature=1.3, top_k=5)
    cond, uncond = logits_of([1], codes), logits_of([2], codes)
    images = 32
    logits = torch.stack([cond] * images + [uncond] * images)[:, None]

    def step(ids, positions, read):
        return logits

    layout = ImageLayout(vocabulary, 4, 4)
    drawn = sample(step, [[1]] * images, layout, config, [(5, repeat) for repeat in range(images)]).flatten().numpy()
    probs = plain_probs(cond.numpy(), uncond.numpy(), 2.0, 1.3, 5)
    support = probs.nonzero()[0]
    counts = np.bincount(drawn, minlength=codes)
    assert counts[probs == 0].sum() == 0
    expected = probs[support] * len(drawn)
    assert (((counts[support] - expected) ** 2) / expected).sum() < 23.5  # chi-square, 4 degrees, p = 1e-4
    left, right = drawn[:-1:2], drawn[1::2]
    pairs = np.array([[((left == a) & (right == b)).sum() for b in support] for a in support])
    expected = np.outer(probs[support], probs[support]) * len(left)
    assert (((pairs - expected) ** 2) / expected).sum() < 60.1  # 24 degrees, p = 6e-5


# -- logits ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5, 2.5, 4.0, 10.0]),
    st.floats(0.05, 20.0),
    st.integers(1, 40),
    st.booleans(),
)
def test_probabilities_equal_the_reference(seed, cfg, temperature, top_k, coarse):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 3, 30)) * 4
    if coarse:  # many ties
        logits = np.round(logits)
        temperature = 0.5
    found = code_log_probs(torch.from_numpy(logits), SamplingConfig(cfg=cfg, temperature=temperature, top_k=top_k))
    assert found.shape == (2, 3, 30) and found.dtype == torch.float64
    for row in range(2):
        for at in range(3):
            plain = plain_probs(logits[row, at], logits[row + 2, at], cfg, temperature, top_k)
            np.testing.assert_allclose(found[row, at].exp().numpy(), plain, atol=1e-12)


def test_half_precision_is_processed_in_float32():
    logits = torch.randn(2, 1, 50).to(torch.bfloat16)
    assert guide(logits, 4.0).dtype == log_probs(logits, 1.0, 9).dtype == torch.float32
    expected = logits[1].float() + 4 * (logits[0].float() - logits[1].float())
    assert torch.equal(guide(logits, 4.0)[0], expected)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 7, 8, 100])
def test_exactly_k_logits_remain_and_ties_go_to_the_lower_index(top_k):
    logits = torch.tensor([2.0, 5.0, 2.0, 2.0, 5.0, 0.0, 2.0, 1.0])
    order = [1, 4, 0, 2, 3, 6, 7, 5]
    kept = truncate(logits, top_k).isfinite().nonzero().flatten().tolist()
    assert kept == sorted(order[:top_k])
    assert truncate(torch.zeros(3, 4, 50), top_k).isfinite().sum(-1).unique().tolist() == [min(top_k, 50)]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3, 1e30])
def test_extreme_temperatures_give_distributions(temperature):
    probs = log_probs(torch.tensor([1.0, 80000.0, 3.0, -80000.0]), temperature, 4).exp()
    assert torch.isfinite(probs).all() and probs.sum().item() == pytest.approx(1)
    assert probs[1] == (0.25 if temperature == 1e30 else 1)


# -- noise -------------------------------------------------------------------------------------------------------------


def philox(key, counter):
    """Philox4x64-10 in Python integers. Source: Salmon et al. 2011."""
    mask, (a, b, c, d), (k0, k1) = 2**64 - 1, counter, key
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (high >> 64) ^ b ^ k0, high & mask, (low >> 64) ^ d ^ k1, low & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


@pytest.mark.parametrize("seed, repeat, position", [(0, 0, 0), (7, 1, 9215), (2**63 - 1, 12, 3)])
def test_noise_is_philox_at_its_counter(seed, repeat, position):
    bits = [word for block in (1, 2) for word in philox((seed, repeat), (block, 0, position, 0))]
    expected = [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in bits]
    np.testing.assert_allclose(gumbel(seed, repeat, position, 8).numpy(), expected, rtol=1e-12)
    assert torch.equal(gumbel(seed, repeat, position, 3), gumbel(seed, repeat, position, 8)[:3])


@pytest.mark.parametrize("answer, image, purpose", [(0, 1, CODES), (3, 2, CODES), (3, 0, IDS)])
def test_images_and_texts_of_a_conversation_have_counters_of_their_own(answer, image, purpose):
    key = (7, 1, stream(answer, image))
    bits = philox((7, 1), (1, answer * 2**32 + image, 5, purpose))
    expected = [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in bits]
    (noise,) = gumbel_rows([key], [5], 4, purpose)
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-12)
    assert IDS == 2**64 - 1  # more than 1 + round of any verification


def test_philox_of_this_module_gives_the_published_answer():
    """Known-answer test of Random123, with a key and a counter of zeros."""
    assert philox((0, 0), (0, 0, 0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


def test_noise_is_gumbel_and_independent_across_seeds_repeats_and_positions():
    keys = [(seed, repeat) for seed in range(3) for repeat in range(3)] * 3
    positions = [position for position in range(3) for _ in range(9)]
    noise = gumbel_rows(keys, positions, 4096)
    values = np.sort(noise.flatten().numpy())
    cdf = np.exp(-np.exp(-values))
    assert np.abs(cdf - np.arange(len(cdf)) / len(cdf)).max() < 2.2 / math.sqrt(
        len(cdf)
    )  # Kolmogorov-Smirnov, p = 1e-4
    correlation = np.corrcoef(noise.numpy())
    assert np.abs(correlation - np.eye(27)).max() < 5.5 / math.sqrt(4096)


def test_noise_of_a_row_does_not_depend_on_other_rows():
    keys, positions = [(3, 0), (3, 1), (3, 0), (4, 0), (3, 0)], [8, 8, 8, 8, 9]
    noise = gumbel_rows(keys, positions, 33)
    for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
        assert torch.equal(noise[row], gumbel(*key, position, 33))


def test_equal_rows_of_noise_are_drawn_once(monkeypatch):
    """Prompts of one seed share their noise: one draw of 16,384 random words for both."""
    drawn, philox_of_numpy = [], np.random.Philox

    class CountingPhilox:
        def __init__(self, **options):
            self.generator = philox_of_numpy(**options)

        def random_raw(self, size):
            drawn.append(size)
            return self.generator.random_raw(size)

    monkeypatch.setattr(np.random, "Philox", CountingPhilox)
    noise = gumbel_rows([(1, 0), (1, 0)], [5, 5], 16384)
    assert drawn == [16384] and torch.equal(noise[0], noise[1])
    gumbel_rows([(1, 0), (2, 0)], [5, 5], 64)
    assert drawn == [16384, 64, 64]
