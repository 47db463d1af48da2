"""A tree of alternatives beside the drafts, against enumerated probabilities of images and forwards of single paths."""

import numpy as np
import pytest
import torch
from test_jacobi import TableStep, exact_probs

from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.sampling import tree
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.jacobi import spare_slots
from lumina_mgpt.unirep import ImageLayout, generation_prompt


def stop_of(read, layout):
    """Position of the last code of each row, from the columns of the last known ids. Shapes: read (R, 1) -> (R, 1)."""
    return read + 1 - layout.prefix_length + layout.offset_of(layout.num_codes - 1)


SAMPLED, KEPT = 6, 3  # sampled positions of a 4 x 4 image, with a row end between them; top-k


class TreeTableStep(TableStep):
    """A model whose logits depend on the last two ids that a query sees: those at its position and the one before.

    It keeps the position of each slot, so that a wrong mask, a wrong position or a slot that was not moved changes what
    a query sees. A query of the image that sees several ids at one position, or none, is an error of the caller.
    """

    strict = True

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def __call__(self, ids, positions, read, slots=None, seen=None):
        if not len(self.slots):
            self.slots, self.places = (torch.full((len(ids), 400), -1) for _ in range(2))
            self.stop = stop_of(read, self.layout)
        self.forwards += 1
        slots = positions if slots is None else slots
        self.slots.scatter_(1, slots, ids)
        self.places.scatter_(1, slots, positions)
        if seen is None:
            seen = torch.arange(400) <= slots[..., None]
        rows = torch.arange(len(ids))[:, None]
        at, seen = positions.gather(1, read), seen[rows, read]  # (R, Q), (R, Q, S)
        ids_at = []
        for back in (0, 1):
            here = seen & (self.places[:, None, : seen.shape[-1]] == at[..., None] - back)  # (R, Q, S)
            if self.strict:
                assert (here.sum(-1) == 1)[at < self.stop].all()
            ids_at.append(self.slots.gather(1, here.int().argmax(-1)))
        return self.logits(*ids_at)

    def move(self, rows, source, target):
        self.slots[rows, target] = self.slots[rows, source]
        self.places[rows, target] = self.places[rows, source]


def misfit(vocabulary, shape, drafts=4, proposal="above", *, draws) -> float:
    """Standard deviations of chi-squared above its mean, by the Wilson-Hilferty approximation."""
    config = SamplingConfig(cfg=1.0, top_k=KEPT)
    layout = ImageLayout(vocabulary, 1, 1, given=16 - SAMPLED)
    probs = exact_probs(vocabulary, layout, config)
    counts = dict.fromkeys(probs, 0)
    batch, prompt = 2000, generation_prompt("a cat", vocabulary)
    for start in range(0, draws, batch):
        keys = [(23, start + b) for b in range(batch)]
        known = torch.zeros((batch, layout.given), dtype=torch.long)
        speculation = Speculation("maximal", len(shape) + drafts, proposal)
        codes = tree.sample_tree(
            TreeTableStep(layout), [prompt] * batch, layout, config, keys, speculation, shape, given=known
        )
        for outcome in map(tuple, codes.view(batch, -1)[:, layout.given :].tolist()):
            if outcome not in counts:
                return float("inf")
            counts[outcome] += 1
    expected, observed = np.array(list(probs.values())) * draws, np.array(list(counts.values()))
    rare = expected < 5  # pooled in one outcome
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    observed = np.append(observed[~rare], observed[rare].sum())
    freedom = len(expected) - 1
    chi = ((observed - expected) ** 2 / expected).sum()
    return ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))


REGULAR, CHAINS = tree.regular(3, 3), tree.chains(2, 4)
WIDE = tuple(sorted({*REGULAR, (0, 0, 1), (1, 0, 0)}, key=len))


@pytest.mark.parametrize("shape", [tree.regular(2, 3), tree.chains(1, 3)], ids=["regular", "chain"])
def test_images_have_the_distribution_of_the_model(vocabulary, shape):
    assert abs(misfit(vocabulary, shape, draws=6_000)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [REGULAR, CHAINS, tree.chains(4, 1), tree.grow(12)])
def test_many_images_have_the_distribution_of_the_model(vocabulary, shape):
    assert abs(misfit(vocabulary, shape, draws=40_000)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["above", "uniform"])
@pytest.mark.parametrize("drafts", [2, 3, 6])
def test_wide_trees_have_the_distribution_of_the_model(vocabulary, proposal, drafts):
    assert abs(misfit(vocabulary, WIDE, drafts, proposal, draws=24_000)) < 4


def plant_independent_siblings(monkeypatch):
    """Each sibling is verified as if no candidate had been rejected before it."""
    monkeypatch.setattr(tree, "_residual", lambda p, q, code: (p.clone(), q.clone()))


def plant_siblings_with_replacement(monkeypatch):
    """Siblings are drawn with replacement and verified as if without."""
    zeroed = torch.Tensor.scatter_

    def leave(self, dim, index, value):
        return self if isinstance(value, float) else zeroed(self, dim, index, value)

    monkeypatch.setattr(torch.Tensor, "scatter_", leave)


def plant_old_distribution(monkeypatch):
    """A draft that survives keeps the distribution that it was drawn from."""
    verify = tree.TreeState.verify

    def keep_old(self, target):
        positions = self.final[:, None] + torch.arange(self.nodes.W)
        columns, ring = positions.clamp(max=self.N), self._ring_index(positions, self.proposals)
        drafts, proposal = self.codes.gather(1, columns), self.proposals[self.rows, ring]
        verify(self, target)
        same = self.codes.gather(1, columns) == drafts
        rows = self.rows.expand_as(columns)[same]
        self.proposals[rows, ring[same]] = proposal[same]

    monkeypatch.setattr(tree.TreeState, "verify", keep_old)


def plant_distribution_of_the_window(monkeypatch):
    """Later drafts that follow an accepted sibling keep the distributions of the window."""
    verify = tree.TreeState.verify

    def keep_old(self, target):
        W, final = self.nodes.W, self.final
        verify(self, target)
        positions = final[:, None] + torch.arange(W)
        later = (positions >= self.final[:, None]) & (positions < self.N)
        rows = self.rows.expand_as(positions)[later]
        self.proposals[rows, self._ring_index(positions, self.proposals)[later]] = target[:, :W][later]

    monkeypatch.setattr(tree.TreeState, "verify", keep_old)


def plant_wrong_mask(monkeypatch):
    """A node sees the last node fed before it at each position, instead of its ancestors."""
    monkeypatch.setattr(TreeTableStep, "strict", False)
    nodes = tree.Nodes.__init__

    def all_before(self, *args):
        nodes(self, *args)
        self.before = torch.ones_like(self.before)

    monkeypatch.setattr(tree.Nodes, "__init__", all_before)


def plant_cache_not_moved(monkeypatch):
    monkeypatch.setattr(TreeTableStep, "move", lambda *_: None)
    monkeypatch.setattr(TreeTableStep, "strict", False)


PLANTS = [
    (plant_independent_siblings, REGULAR, 4_000),
    (plant_siblings_with_replacement, REGULAR, 4_000),
    (plant_old_distribution, CHAINS, 16_000),
    pytest.param(plant_distribution_of_the_window, CHAINS, 80_000, marks=pytest.mark.slow),
    (plant_wrong_mask, REGULAR, 4_000),
    (plant_cache_not_moved, REGULAR, 4_000),
]


@pytest.mark.parametrize(("plant", "shape", "draws"), PLANTS)
def test_planted_faults_are_detected(vocabulary, monkeypatch, plant, shape, draws):
    plant(monkeypatch)
    assert misfit(vocabulary, shape, draws=draws) > 8


class CheckedStep(CachedStep):
    """A step that compares the logits of each node with a forward of its path alone."""

    checked = moved = 0

    def __call__(self, ids, positions, read, *branches):
        logits = super().__call__(ids, positions, read, *branches)
        slots, seen = branches or (positions, torch.arange(self.cache.slots) <= positions[..., None])
        if self.calls == 1:
            self.ids = torch.full((len(ids), self.cache.slots), -1)
            self.places, self.stop = self.ids.clone(), stop_of(read, self.layout)
        self.ids.scatter_(1, slots, ids)
        self.places.scatter_(1, slots, positions)
        for row in range(len(ids)):
            for column, query in enumerate(read[row].tolist()):
                if positions[row, query] >= self.stop[row, 0]:
                    continue  # after the image
                visible = seen[row, query].nonzero().flatten()
                order = self.places[row, visible].argsort()
                assert self.places[row, visible][order].tolist() == list(range(len(visible)))
                path = self.ids[row, visible][order]
                alone = self.model.project(self.model(path[None]), self.columns)[0, -1]
                assert torch.allclose(logits[row, column], alone, rtol=0, atol=1e-9)
                self.checked += bool(branches)
        return logits

    def move(self, rows, source, target):
        super().move(rows, source, target)
        self.moved += len(rows)
        for kept in (self.ids, self.places):
            kept[rows, target] = kept[rows, source]


def test_each_node_has_the_logits_of_its_path(vocabulary, tiny_checkpoint):
    """With guidance, prompts of different lengths and images at different positions, across ends of rows."""
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    model = Transformer(config).double().eval()
    model.init_weights(torch.Generator().manual_seed(1))
    layout = ImageLayout(vocabulary, 1, 2, given=8)
    prompts = [generation_prompt(text, vocabulary) for text in ("a cat", "a hedgehog on blue")]
    shape = tuple(sorted({*tree.regular(3, 3), *tree.chains(2, 6)}, key=len))
    window = len(shape) + 7
    length = max(map(len, prompts)) + layout.length
    cache = KVCache(config, 4, length, torch.float64, "cpu", spare_slots(layout, window, len(shape)))
    step = CheckedStep(model, cache, vocabulary.code_slice)
    step.layout = layout
    settings, speculation = SamplingConfig(cfg=2.0, temperature=0.1), Speculation("maximal", window)
    known = torch.zeros((2, 8), dtype=torch.long)
    with torch.no_grad():
        tree.sample_tree(step, prompts, layout, settings, [(1, 0), (1, 1)], speculation, shape, given=known)
    assert step.checked > 100 and step.moved


def test_images_are_independent_of_batch_composition(vocabulary):
    layout, config = ImageLayout(vocabulary, 1, 1, given=4), SamplingConfig(cfg=1.0, top_k=5)
    prompts, keys = [generation_prompt("a cat", vocabulary)] * 30, [(5, repeat) for repeat in range(30)]
    known = torch.zeros((30, 4), dtype=torch.long)
    shape, speculation = tree.regular(3, 3), Speculation("maximal", 15)
    batch = tree.sample_tree(TreeTableStep(layout), prompts, layout, config, keys, speculation, shape, given=known)
    for b in range(30):
        one = slice(b, b + 1)
        arguments = TreeTableStep(layout), prompts[one], layout, config, keys[one], speculation, shape
        assert torch.equal(tree.sample_tree(*arguments, given=known[one])[0], batch[b])


def test_no_draft_survives_yet_each_position_is_sampled_once(vocabulary):
    """With greedy sampling, all samplers give the same image."""
    layout, config = ImageLayout(vocabulary, 2, 1), SamplingConfig(cfg=1.0, top_k=1)
    prompts = [generation_prompt("a cat", vocabulary)]
    plain = sample(TreeTableStep(layout), prompts, layout, config, [(1, 0)])
    for shape in (tree.regular(3, 3), tree.grow(9)):
        found = tree.sample_tree(
            TreeTableStep(layout), prompts, layout, config, [(1, 0)], Speculation("maximal", 20), shape
        )
        assert torch.equal(found, plain)


def test_shapes_of_trees():
    assert tree.regular(2, 3) == ((1,), (0, 1), (1, 0), (1, 1))
    assert len(tree.regular(3, 3)) == 13 - 3
    assert tree.chains(2, 2) == ((1,), (1, 0), (2,), (2, 0))
    for count in (1, 7, 40):
        grown = tree.grow(count)
        assert len(set(grown)) == count and all(any(path) for path in grown)
        tree.Nodes(grown, 64)  # each parent and each sibling of a lower rank is there


@pytest.mark.parametrize(("coupling", "window"), [("noise", 16), ("independent", 16), ("maximal", 10)])
def test_unusable_settings_are_refused(vocabulary, coupling, window):
    layout, prompt = ImageLayout(vocabulary, 1, 1), generation_prompt("", vocabulary)
    arguments = [prompt], layout, SamplingConfig(), [(0, 0)], Speculation(coupling, window), tree.regular(3, 3)
    with pytest.raises(InputError, match="must"):
        tree.sample_tree(TreeTableStep(layout), *arguments)
    with pytest.raises(InputError, match="--tree|tree"):
        Speculation(coupling, window, tree=10)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_pipeline_samples_with_a_tree(tiny_checkpoint, cache_dtype):
    """Greedy images are those of the plain sampler; nodes are moved across row ends, in an int8 cache with scales."""
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, device="cpu", cache_dtype=cache_dtype)
    layout = pipeline.checkpoint.layout(32, 64)
    starts = pipeline.checkpoint.prompt_ids(["a cat", "a hedgehog on blue"], layout)
    greedy = SamplingConfig(cfg=2.0, top_k=1)
    plain = pipeline.sample(starts, layout, greedy, [0, 1])
    assert torch.equal(
        pipeline.sample(starts, layout, greedy, [0, 1], speculation=Speculation("maximal", 20, tree=9)), plain
    )
    warm = SamplingConfig(cfg=2.0, temperature=0.3)
    codes = pipeline.sample(starts, layout, warm, [0, 1], speculation=Speculation("maximal", 20, tree=9))
    again = pipeline.sample(starts[1:], layout, warm, [1], speculation=Speculation("maximal", 20, tree=9))
    assert torch.equal(again[0], codes[1]) and pipeline.forwards < 32
