"""Speculative sampling against the plain sampler, and against enumerated probabilities of whole images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remembering_step import RememberingStep

from lumina_mgpt.config import COUPLINGS, PROPOSALS, ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.sampling import couplings, jacobi, sample
from lumina_mgpt.sampling.jacobi import sample_jacobi
from lumina_mgpt.sampling.proposals import PROPOSAL_FUNCTIONS
from lumina_mgpt.unirep import ImageLayout, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

PROMPTS = ("a cat", "a hedgehog on a sky blue background", "")


@pytest.fixture(scope="module")
def vocabulary(tiny_checkpoint):
    return Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))


class LastIdStep(RememberingStep):
    """A model whose logits depend on the last id only, so that drafts are often accepted."""

    def _logits(self, row, position):
        values = np.random.default_rng(self.slots[row, position]).normal(size=self.codes) * 3
        return torch.from_numpy(values).to(self.dtype)


images = st.fixed_dictionaries(
    {
        "grid": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "given": st.integers(0, 1),
        "cfg": st.sampled_from([0.5, 1.0, 4.0]),
        "top_k": st.sampled_from([1, 2, 7, 4096]),
        "temperature": st.sampled_from([0.2, 1.0, 3.0]),
        "batch": st.integers(1, 3),
        "seed": st.integers(0, 2**40),
        "window": st.sampled_from([1, 2, 5, 16, 33, 200]),
        "proposal": st.sampled_from(sorted(PROPOSALS)),
        "last_id": st.booleans(),
    }
)


@pytest.mark.slow
@given(images)
@settings(max_examples=60, deadline=None)
def test_common_noise_gives_identical_images_to_the_plain_sampler(vocabulary, drawn):
    rows, cols = drawn["grid"]
    layout = ImageLayout(vocabulary, rows, cols, given=drawn["given"] * 4 * cols * rows)
    prompts = [generation_prompt(text, vocabulary) for text in PROMPTS[: drawn["batch"]]]
    config = SamplingConfig(cfg=drawn["cfg"], top_k=drawn["top_k"], temperature=drawn["temperature"])
    keys = [(drawn["seed"], repeat) for repeat in range(len(prompts))]
    known = torch.randint(0, 64, (len(prompts), layout.given), generator=torch.Generator().manual_seed(0))
    kind = LastIdStep if drawn["last_id"] else RememberingStep
    plain = sample(kind(64), prompts, layout, config, keys, given=known)
    speculation = Speculation("noise", drawn["window"], drawn["proposal"])
    step = kind(64)
    assert torch.equal(sample_jacobi(step, prompts, layout, config, keys, speculation, given=known), plain)
    assert len(step.calls) <= layout.num_codes - layout.given


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_images_are_independent_of_batch_composition(vocabulary, coupling):
    layout, config = ImageLayout(vocabulary, 2, 1), SamplingConfig(cfg=2.0)
    prompts, keys = [generation_prompt(text, vocabulary) for text in PROMPTS], [(5, 0), (5, 1), (6, 0)]
    speculation = Speculation(coupling, 11)
    batch = sample_jacobi(LastIdStep(64), prompts, layout, config, keys, speculation)
    for b in range(3):
        alone = sample_jacobi(LastIdStep(64), prompts[b : b + 1], layout, config, keys[b : b + 1], speculation)
        assert torch.equal(alone[0], batch[b])


@pytest.mark.parametrize("given", [0, 16])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_each_sampled_row_is_reported_once_and_final(vocabulary, coupling, given):
    layout, seen = ImageLayout(vocabulary, 1, 2, given=given), []
    prompts = [generation_prompt(text, vocabulary) for text in PROMPTS]
    keys = [(1, n) for n in range(3)]
    codes = sample_jacobi(
        LastIdStep(64),
        prompts,
        layout,
        SamplingConfig(cfg=1.0),
        keys,
        Speculation(coupling, 9),
        lambda row, codes: seen.append((row, codes)),
        given=torch.ones((3, given), dtype=torch.long),
    )
    assert [row for row, _ in seen] == list(range(given // layout.cols, layout.rows))
    assert all(torch.equal(part, codes[:, : row + 1]) for row, part in seen)


# -- distribution of images, against enumeration -----------------------------------------------------------------------


class TableStep:
    """A fast model of many rows whose logits depend on the last two ids.

    The same few codes are probable everywhere, so that a draft may be accepted after its context has changed.
    """

    def __init__(self, codes: int = 64):
        self.table = torch.from_numpy(np.random.default_rng(3).normal(size=(97, codes)) * 1.5)
        self.table[:, :KEPT] += 20
        self.slots, self.forwards = torch.zeros(0), 0

    def __call__(self, ids, positions, read):
        if not len(self.slots):
            self.slots = torch.zeros((len(ids), 400), dtype=torch.long)
        self.forwards += 1
        self.slots.scatter_(1, positions, ids)
        at = positions.gather(1, read)
        return self.logits(self.slots.gather(1, at), self.slots.gather(1, at - 1))

    def logits(self, last, before):
        return self.table[(last * 7 + before * 3) % 97]


KEPT = 3  # top-k
SAMPLED = 5  # sampled positions of a 4 x 4 image; a row end lies between them
DRAWS = 24_000


def exact_probs(vocabulary, layout, config) -> dict[tuple, float]:
    """Probability of every sequence of sampled codes, by the chain rule."""
    step = TableStep()
    probs: dict[tuple, float] = {(): 1.0}
    for _ in range(layout.given, layout.num_codes):
        longer = {}
        for codes, probability in probs.items():
            ids = layout.fill(torch.tensor([0] * layout.given + list(codes)))
            logits = step.logits(ids[-1], ids[-2]) / config.temperature
            top = logits.topk(config.top_k)
            for code, p in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[(*codes, code)] = probability * p
        probs = longer
    return probs


def misfit(vocabulary, coupling, window, proposal, sampled=SAMPLED, kept=KEPT) -> float:
    """Standard deviations of chi-squared above its mean, by the Wilson-Hilferty approximation."""
    config = SamplingConfig(cfg=1.0, top_k=kept)
    layout = ImageLayout(vocabulary, 1, 1, given=16 - sampled)
    probs = exact_probs(vocabulary, layout, config)
    counts = dict.fromkeys(probs, 0)
    stray, batch = 0, 2000
    for start in range(0, DRAWS, batch):
        keys = [(17, start + b) for b in range(batch)]
        known = torch.zeros((batch, layout.given), dtype=torch.long)
        prompt = generation_prompt("a cat", vocabulary)
        codes = sample_jacobi(
            TableStep(), [prompt] * batch, layout, config, keys, Speculation(coupling, window, proposal), given=known
        )
        for outcome in map(tuple, codes.view(batch, -1)[:, layout.given :].tolist()):
            stray += outcome not in counts
            counts[outcome] = counts.get(outcome, 0) + 1
    if stray:
        return float("inf")
    expected, observed = np.array(list(probs.values())) * DRAWS, np.array(list(counts.values()))
    rare = expected < 5  # pooled in one outcome
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    observed = np.append(observed[~rare], observed[rare].sum())
    freedom = len(expected) - 1
    chi = ((observed - expected) ** 2 / expected).sum()
    return ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("window", "proposal"), [(4, "uniform"), (3, "above"), (5, "above")])
def test_images_have_the_distribution_of_the_model(vocabulary, coupling, window, proposal):
    assert abs(misfit(vocabulary, coupling, window, proposal)) < 4


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "window"), [("maximal", 2), ("independent", 3)])
def test_images_longer_than_the_ring_buffers_have_the_distribution_of_the_model(vocabulary, coupling, window):
    """Ten positions of two codes; the ring buffer holds a row of four and the window."""
    assert abs(misfit(vocabulary, coupling, window, "above", sampled=10, kept=2)) < 4


@pytest.mark.slow
def test_too_short_ring_buffer_is_detected(vocabulary, monkeypatch):
    ring = jacobi._State._ring_index
    monkeypatch.setattr(
        jacobi._State,
        "_ring_index",
        lambda self, positions, held: torch.where(positions < self.N, positions % 3, ring(self, positions, held)),
    )
    assert misfit(vocabulary, "maximal", 5, "above", sampled=10, kept=2) > 8


def plant_target_for_residual(monkeypatch):
    def sample_target(target, proposal, drafts, uniform):
        return couplings.sample_by_inversion(target.exp(), uniform)

    monkeypatch.setattr(couplings, "sample_residual", sample_target)


def plant_old_proposal(monkeypatch):
    verify = jacobi._State.verify

    def keep_old(self, target):
        positions = self.final[:, None] + torch.arange(target.shape[1])
        columns, ring = positions.clamp(max=self.N), self._ring_index(positions, self.proposals)
        drafts, proposal = self.codes.gather(1, columns), self.proposals[self.rows, ring]
        verify(self, target)
        same = self.codes.gather(1, columns) == drafts
        rows = self.rows.expand_as(columns)[same]
        self.proposals[rows, ring[same]] = proposal[same]

    monkeypatch.setattr(jacobi._State, "verify", keep_old)


def plant_filter(monkeypatch):
    original = jacobi.code_log_probs

    def filtered(logits, config):
        log_probs = original(logits, config)
        unlikely = log_probs < log_probs.amax(-1, keepdim=True) - 1.0
        return log_probs.masked_fill(unlikely, -torch.inf).log_softmax(-1)

    monkeypatch.setattr(jacobi, "code_log_probs", filtered)


def plant_one_too_many(monkeypatch):
    original = couplings.maximal

    def one_more(*args):
        codes, accepted = original(*args)
        before = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], 1).cumprod(-1).bool()
        return couplings.Verified(codes, accepted | before)

    monkeypatch.setattr(couplings, "maximal", one_more)


@pytest.mark.parametrize("plant", [plant_target_for_residual, plant_old_proposal, plant_filter, plant_one_too_many])
def test_planted_faults_are_detected(vocabulary, monkeypatch, plant):
    plant(monkeypatch)
    assert misfit(vocabulary, "maximal", 5, "above") > 8


@pytest.mark.parametrize("count", [1, 5, 128, 129, 300, 1024])
def test_inversion_in_blocks_equals_inversion(count):
    """Against one cumulative sum over all codes; a code of weight 0 is never sampled, even at the ends of (0, 1)."""
    weights = torch.rand(400, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    weights[weights < 0.3] = 0
    weights[weights.sum(-1) == 0] = 1
    uniform = torch.linspace(0, 1, 402, dtype=torch.float64)[1:-1]
    uniform[:2], uniform[-2:] = 2.0**-53, 1 - 2.0**-53
    found = couplings.sample_by_inversion(weights, uniform)
    assert (weights.gather(-1, found[:, None]) > 0).all()
    sums = weights.cumsum(-1)
    target = uniform * sums[:, -1]
    below = torch.where(found > 0, sums.gather(-1, (found - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (below <= target + 1e-9).all() and (target <= sums.gather(-1, found[:, None])[:, 0] + 1e-9).all()
    single = couplings.sample_by_inversion(weights.float(), uniform)
    assert (weights.gather(-1, single[:, None]) > 0).all()


class FlatStep(TableStep):
    """The same logits everywhere."""

    def logits(self, last, before):
        return self.table[torch.zeros_like(last)]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_drafts_that_are_always_sometimes_and_never_accepted(vocabulary, coupling, monkeypatch):
    layout, config = ImageLayout(vocabulary, 2, 2), SamplingConfig(cfg=1.0, top_k=5)
    outside = int(FlatStep().table[0].argmin())

    def forwards(window: int, right: float) -> int:
        """Forwards of an image whose proposal is the target with probability `right`, else an impossible code."""

        def propose(above):
            impossible = torch.zeros_like(above).index_fill(-1, torch.tensor([outside]), 1.0)
            return torch.lerp(impossible, above.exp(), right).log()

        monkeypatch.setitem(PROPOSAL_FUNCTIONS, "uniform", propose)
        step = FlatStep()
        codes = sample_jacobi(
            step,
            [generation_prompt("a cat", vocabulary)],
            layout,
            config,
            [(1, 0)],
            Speculation(coupling, window, "uniform"),
        )
        assert (codes != outside).all()
        return step.forwards - 1

    assert forwards(7, right=1.0) == 63 / 7
    assert 63 / 7 < forwards(7, right=0.8) < 63
    assert forwards(1, right=0.0) == 63
