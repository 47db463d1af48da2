"""Proactive drafting: a window of drafts with a tree of alternatives where drafts are likely to be rejected.

Each position of the window has candidates: its draft, and siblings drawn without replacement from the same proposal
distribution. A path names a candidate of each position from the first of the window on, by rank: 0 is the draft, 1 the
first sibling. The window itself is the paths (0,), (0, 0), ... A tree has further paths. One forward reads all of them.
Where a draft is rejected and a sibling is accepted in its place, verification goes on along the path of the sibling.

The result has the distribution of the plain sampler. A candidate is accepted with probability min(1, p/q). After a
rejection, p becomes the residual, and q becomes the proposal without the candidate, normalized. The candidates that
exist at a position never depend on the drafts of this position or of later ones.

Source: SJD-PAC (arXiv 2603.18599); recursive rejection of siblings: arXiv 2402.14160; trees that fit measured
acceptance rates: Sequoia (arXiv 2402.12374).
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling import couplings
from lumina_mgpt.sampling.autoregressive import Call, Kept, OnRow, Step, check_given, collect
from lumina_mgpt.sampling.jacobi import _State, jacobi_codes
from lumina_mgpt.sampling.noise import Key, uniform_rows
from lumina_mgpt.unirep import ImageLayout

Path = tuple[int, ...]  # rank of the candidate of each position from the first of the window on
Tree = tuple[Path, ...]  # paths that are not those of the window

SIBLINGS = 2**32  # added to a position for the random numbers of siblings: those of drafts use positions below

# Acceptance rates on the demo checkpoint at guidance 4, for `grow`: of drafts by the number of codes since the last
# replaced one, and of siblings by rank if all candidates before are rejected.
DRAFT_RATES = (0.67, 0.83, 0.91, 0.93)
SIBLING_RATES = (0.37, 0.29, 0.26, 0.2)


def regular(children: int, levels: int) -> Tree:
    """Returns the paths of a tree whose root is the last final code: each node has `children`, in `levels` levels.

    The root is one level. Three children and three levels are 13 nodes, 3 of which are in the window.
    """
    paths: list[Path] = [()]
    for path in paths:
        if len(path) < levels - 1:
            paths += [(*path, rank) for rank in range(children)]
    return tuple(path for path in paths if any(path))


def chains(siblings: int, length: int) -> Tree:
    """Returns the paths of `siblings` of the first draft, each of them followed by `length` - 1 drafts."""
    return tuple((rank, *[0] * more) for rank in range(1, siblings + 1) for more in range(length))


def grow(count: int) -> Tree:
    """Returns the `count` paths that are the most likely to be accepted, by the measured acceptance rates."""
    paths: list[Path] = []
    heap: list[tuple[float, Path, int]] = [(-1.0, (), 0)]  # probability, path, codes since the last replaced one
    while len(paths) < count:
        log, path, since = heapq.heappop(heap)
        if any(path):
            paths.append(path)
        accepted = DRAFT_RATES[min(since, len(DRAFT_RATES) - 1)]
        heapq.heappush(heap, (log * accepted, (*path, 0), since + 1))
        rest = log * (1 - accepted)
        for rank, rate in enumerate(SIBLING_RATES, start=1):
            heapq.heappush(heap, (rest * rate, (*path, rank), 0))
            rest *= 1 - rate
    return tuple(sorted(paths, key=lambda path: (len(path), path)))


class TreeStep(Step, Protocol):
    """A `Step` that can also read a tree, whose nodes have slots of their own.

    Args:
        cache_positions: position of each id in its path. It determines the rotary angles.
        slots: cache slot of each id, (R, T).
        seen: whether each id attends to each of the first S slots, (R, T, S) bool.

    The arguments are on the CPU, except for the ids.
    """

    def __call__(
        self,
        ids: Tensor,
        cache_positions: Tensor,
        read: Tensor,
        slots: Tensor | None = None,
        seen: Tensor | None = None,
        /,
    ) -> Tensor: ...

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies slot `source[i]` of row `rows[i]` to slot `target[i]`, for every i. Shapes: each (n,) on the CPU."""


class TreeCall(NamedTuple):
    """The arguments of a call of a `TreeStep`."""

    ids: Tensor
    cache_positions: Tensor
    read: Tensor
    slots: Tensor
    seen: Tensor


def sample_tree(
    step: TreeStep,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[Key],
    speculation: Speculation,
    tree: Tree,
    on_row: OnRow | None = None,
    *,
    given: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Samples the codes of one image per prompt, as `jacobi.sample_jacobi`, with a tree of any shape.

    `Speculation.tree` chooses the tree `grow` instead.

    Args:
        speculation: coupling `maximal`. Its window is the number of codes that a forward reads of each image: drafts
            and nodes of the tree together.
        tree: from `regular`, `chains` or `grow`.

    Raises:
        InputError: the window has no place for the tree, or the coupling is not `maximal`.
    """
    assert speculation.window is not None
    if speculation.coupling != "maximal":
        raise InputError(f"must be maximal with a tree, got {speculation.coupling}", "coupling")
    if speculation.window <= len(tree):
        raise InputError(f"must exceed the {len(tree)} nodes of the tree, got {speculation.window}", "window")
    given = check_given(given, keys, layout, len(prompts))
    if layout.given == layout.num_codes:
        return given.view(len(prompts), layout.rows, layout.cols).clone()
    drafts = replace(speculation, window=speculation.window - len(tree))
    make_state = partial(TreeState, step=step, tree=tree)
    codes = jacobi_codes(step, prompts, layout, settings, keys, drafts, given=given, kept=kept, make_state=make_state)
    return collect(codes, layout, on_row)


class Nodes:
    """The nodes that a forward reads: W of the window, then X of the tree. Node 0 is the last final code.

    Attributes:
        depth: number of codes of each node's path, (W + X,). The target distribution after a node is that of the
            position with this index in the window.
        rank, branch: of the tree's nodes: rank of the last candidate, and number of drafts before the first sibling.
        children: node after each rank, or -1, (W + X, ranks).
        tries: number of candidates of the position after a node, (W + X,). At least 1: the draft.
        before: whether a node of the tree is another one or follows it, (X, X).
        siblings: number of siblings of each position of the window, (W,).
    """

    def __init__(self, tree: Tree, window: int) -> None:
        self.W = window
        inside = sorted((path for path in tree if len(path) < window), key=lambda path: (len(path), path))
        paths = [(0,) * depth for depth in range(window)] + inside
        index = {path: node for node, path in enumerate(paths)}
        assert len(index) == len(paths) and all(path[:-1] in index for path in inside), "a path lacks its parent"
        self.X, ranks = len(inside), 1 + max((path[-1] for path in inside), default=0)
        self.depth = torch.tensor([len(path) for path in paths])
        self.rank = torch.tensor([path[-1] for path in inside], dtype=torch.long)
        self.branch = torch.tensor(
            [next(at for at, rank in enumerate(path) if rank) for path in inside], dtype=torch.long
        )
        self.children = torch.tensor([[index.get((*path, rank), -1) for rank in range(ranks)] for path in paths])
        known = self.children[:, 1:] >= 0
        assert torch.equal(known.int().cumprod(1).bool(), known), "a sibling lacks one of a lower rank"
        self.tries = 1 + known.sum(1)
        before = [[path[: len(other)] == other for other in inside] for path in inside]
        self.before = torch.tensor(before, dtype=torch.bool).view(self.X, self.X)
        self.siblings = torch.zeros(window, dtype=torch.long)
        self.siblings.scatter_reduce_(0, self.depth, self.tries - 1, "amax")


class TreeState(_State):
    """The state of `jacobi._State` with a tree beside the window.

    Shapes: candidates (B, W, ranks) on the CPU.
    """

    def __init__(self, *args, step: TreeStep, tree: Tree) -> None:
        super().__init__(*args)
        self.step, self.tree = step, tree
        self.nodes = Nodes(tree, self.W)
        self.siblings = int(self.nodes.siblings.max())

    def window_call(self) -> Call | TreeCall:  # type: ignore[override]
        """The call of a round: what `_State` feeds, and then the nodes of the tree with the row ends after them."""
        ids, positions, read = super().window_call()
        if read.shape[1] != self.nodes.W:
            self.nodes = Nodes(self.tree, read.shape[1])
        self.candidates = self._draw_candidates()
        if not self.nodes.X:
            return Call(ids, positions, read)
        layout, nodes = self.layout, self.nodes
        B, T, copies = len(self.keys), ids.shape[1], len(self.origin) // len(self.keys)
        depth = nodes.depth[nodes.W :]
        place = self.final[:, None] + depth - 1  # (B, X) of each node's code; after the image: read, unused
        ends = ((place + 1) % layout.cols == 0).long()
        self.node_columns = columns = (1 + ends).cumsum(1) - (1 + ends)  # (B, X)
        length = int((columns + ends).max()) + 1
        owner = torch.arange(length).expand(B, -1).contiguous()
        owner = torch.searchsorted(columns, owner, right=True) - 1  # (B, length) node of each column
        at_code = columns.gather(1, owner) == torch.arange(length)
        place_of = self._offsets(place).gather(1, owner) + (~at_code).long()
        code = self.candidates[:, depth - 1, nodes.rank].gather(1, owner) + layout.vocabulary.code_slice.start
        fed = torch.where(at_code, code, layout.vocabulary.row_end_id).to(ids.device, non_blocking=True)
        self.tree_base = self._offsets(self.final - 1) + T  # (B,) slot of the first column, counted from image start
        branch = self._offsets(self.final[:, None] + nodes.branch).gather(1, owner)
        slots = self.origin[:, None] + (self.tree_base[:, None] + torch.arange(length)).repeat(copies, 1)
        below = torch.cat([positions, self.origin[:, None] + branch.repeat(copies, 1) - 1], 1)
        seen = torch.arange(int(slots.max()) + 1) <= below[..., None]  # (R, T + length, S)
        ancestors = nodes.before[owner[:, :, None], owner[:, None, :]].tril()  # (B, length, length)
        row, column = torch.arange(len(slots))[:, None, None], T + torch.arange(length)[:, None]
        seen[row, column, slots[:, None, :]] = ancestors.repeat(copies, 1, 1)
        return TreeCall(
            torch.cat([ids, fed.repeat(copies, 1)], 1),
            torch.cat([positions, self.origin[:, None] + place_of.repeat(copies, 1)], 1),
            torch.cat([read, T + (columns + ends).repeat(copies, 1)], 1),
            torch.cat([positions, slots], 1),
            seen,
        )

    def _offsets(self, places: Tensor) -> Tensor:
        """Offsets of codes, also of those that would follow the image if it had more rows."""
        return self.layout.code_offsets[0] + places + places // self.layout.cols

    def _draw_candidates(self) -> Tensor:
        """Draws siblings without replacement: each from the proposal without the candidates before it."""
        W, siblings = self.nodes.W, self.nodes.siblings
        positions = self.final[:, None] + torch.arange(W)
        drafts = self.codes.gather(1, positions.clamp(max=self.N).to(self.codes.device, non_blocking=True))
        candidates = [drafts]
        where = siblings.nonzero().flatten()
        if len(where):
            uniforms = self.sibling_uniforms(0)[..., where]
            ring = self._ring_index(positions[:, where], self.proposals)
            probs = couplings.to_probs(self.proposals[self.rows, ring])  # (B, n, C)
            for rank in range(1, int(siblings.max()) + 1):
                probs.scatter_(-1, candidates[-1][:, where, None], 0.0)
                drawn = couplings.sample_by_inversion(probs, uniforms[:, rank - 1])
                candidates.append(torch.zeros_like(drafts).index_copy_(1, where.to(drafts.device), drawn))
        return torch.stack(candidates, -1).cpu()

    def sibling_uniforms(self, use: int) -> Tensor:
        """Uniform numbers of this round, to draw siblings (0) or to accept them (1). Shapes: -> (B, siblings, W)."""
        positions = [SIBLINGS + final for final in self.final.tolist()]
        numbers = uniform_rows(self.keys, positions, self.round, 2 * self.siblings * self.W)
        return numbers.unflatten(1, (2, self.siblings, self.W))[:, use]

    def verify(self, target: Tensor) -> None:
        """Verifies drafts and, at the first rejected one, siblings. Moves accepted nodes in the cache.

        Shapes: target (B, W + X, C) log-probabilities.
        """
        W = self.nodes.W
        positions = self.final[:, None] + torch.arange(W)
        columns = positions.clamp(max=self.N).to(target.device, non_blocking=True)
        proposal = self.proposals[self.rows, self._ring_index(positions, self.proposals)]
        drafts = self.candidates[..., 0].to(target.device)
        numbers = uniform_rows(self.keys, self.final.tolist(), self.round, 2 * self.W)
        uniforms = numbers.unflatten(1, (2, self.W)).movedim(1, 0)[..., :W]  # (2, B, W): acceptance, residual
        accepted = couplings.accepts(target[:, :W], proposal, drafts, uniforms[0])
        first = accepted.int().cumprod(1).sum(1)  # (B,) the first rejected draft, or W
        walk = _Walk(self, target, proposal, uniforms, first)
        self._move(walk.nodes_at, first, walk.last)
        followed = target[self.rows, walk.nodes_at.to(target.device)] if walk.found.any() else target[:, :W]
        codes = couplings.maximal(followed, proposal, drafts, uniforms).codes
        codes = torch.where(walk.found.to(codes.device), walk.codes.to(codes.device), codes)
        self.codes[self.rows, columns] = codes
        self.proposals[self.rows, self._ring_index(positions, self.proposals)] = followed
        advance = torch.minimum((walk.last + 1).clamp(max=W), self.N - self.final)
        self._draft(self.final + W, advance, followed[:, -1])
        self.final = self.final + advance
        self.round += 1

    def _move(self, nodes_at: Tensor, first: Tensor, last: Tensor) -> None:
        """Moves keys and values of accepted nodes, and of row ends after them, to the slots of their positions.

        Args:
            nodes_at: node whose distribution each position has, (B, W).
            first, last: the first rejected draft, and the last verified position, (B,).
        """
        depth = torch.arange(self.nodes.W)
        image, depth = ((depth > first[:, None]) & (depth <= last[:, None])).nonzero(as_tuple=True)
        if not len(image):
            return
        place = self.final[image] + depth - 1
        source = self.tree_base[image] + self.node_columns[image, nodes_at[image, depth] - self.nodes.W]
        target = self._offsets(place)
        ends = ((place + 1) % self.layout.cols == 0).nonzero().flatten()
        image, source, target = (
            torch.cat([part, part[ends] + more]) for part, more in ((image, 0), (source, 1), (target, 1))
        )
        for copy in range(len(self.origin) // len(self.keys)):  # conditional rows, then unconditional ones
            row = image + copy * len(self.keys)
            self.step.move(row, self.origin[row] + source, self.origin[row] + target)


class _Walk:
    """Verifies siblings of the first rejected drafts, and follows the paths of accepted ones.

    Attributes:
        last: the last verified position of each image, (B,).
        nodes_at: node whose target distribution applies at each position of the window, (B, W).
        codes, found: codes from the first rejected draft on, and which of them this class verified, (B, W).
    """

    def __init__(self, state: TreeState, target: Tensor, proposal: Tensor, uniforms: Tensor, first: Tensor) -> None:
        self.nodes, self.candidates, self.left = state.nodes, state.candidates, state.N - state.final
        self.target, self.proposal, self.uniforms = target, proposal, uniforms
        B, W = len(first), state.nodes.W
        self.last, self.nodes_at = first.clone(), torch.arange(W).repeat(B, 1)
        self.codes, self.found = torch.zeros((B, W), dtype=torch.long), torch.zeros((B, W), dtype=torch.bool)
        rejected = first + 1 < self.left.clamp(max=W)  # a sibling of the last position gives no further code
        images = (rejected & (self.nodes.tries[first.clamp(max=W - 1)] > 1)).nonzero().flatten()
        if len(images):
            self.siblings = state.sibling_uniforms(1)
            self._follow(images, first[images])
            self._follow_drafts(images)

    def _follow(self, image: Tensor, at: Tensor) -> None:
        """Verifies the candidates after the rejected drafts at `at`, until none is accepted that is a node."""
        nodes, node, rank, known = self.nodes, at, torch.zeros_like(at), True
        p, q = self._probs(image, at, node)
        while len(image):
            code = self.candidates[image, at, rank]  # (n,) for n images that go on
            uniform = torch.where(
                rank == 0, self.uniforms[0, image, at], self.siblings[image, (rank - 1).clamp(min=0), at]
            )
            chances = torch.stack([each.gather(1, code.to(p.device)[:, None])[:, 0] for each in (p, q)]).cpu()
            accepted = (uniform * chances[1] < chances[0]) & (not known)
            known = False  # only the first candidate is known to be rejected
            p, q = _residual(p, q, code.to(p.device))
            accepted |= (p.sum(1) == 0).cpu()  # p and q are equal up to rounding
            tries = torch.where(at + 1 < self.left[image], nodes.tries[node], 1)
            exhausted = ~accepted & (rank + 1 >= tries)
            if exhausted.any():
                uniform = self.uniforms[1, image[exhausted], at[exhausted]].to(p.device)
                code = code.clone()
                code[exhausted] = couplings.sample_by_inversion(p[exhausted.to(p.device)], uniform).cpu()
            done = accepted | exhausted
            self.codes[image[done], at[done]] = code[done]
            self.found[image[done], at[done]] = True
            self.last[image[done]] = at[done]
            child = torch.where(accepted, nodes.children[node, rank], -1)
            deeper = (child >= 0) & (at + 1 < self.left[image].clamp(max=nodes.W))
            at, node, rank = at + deeper.long(), torch.where(deeper, child, node), torch.where(deeper, 0, rank + 1)
            self.nodes_at[image[deeper], at[deeper]] = node[deeper]
            if deeper.any():
                where = deeper.nonzero().flatten().to(p.device)
                p[where], q[where] = self._probs(image[deeper], at[deeper], node[deeper])
            goes_on = deeper | ~done
            image, at, node, rank = (each[goes_on] for each in (image, at, node, rank))
            p, q = (each[goes_on.to(p.device)] for each in (p, q))

    def _follow_drafts(self, image: Tensor) -> None:
        """Lets the drafts after the last verified position follow the accepted path, as far as the tree does."""
        at, node = self.last[image], self.nodes_at[image, self.last[image]]
        while len(image):
            at, node = at + 1, self.nodes.children[node, 0]
            goes_on = (node >= 0) & (at < self.nodes.W)
            image, at, node = image[goes_on], at[goes_on], node[goes_on]
            self.nodes_at[image, at] = node

    def _probs(self, image: Tensor, at: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """Returns target and proposal of a position of each image. Shapes: (n,) each -> two of (n, C)."""
        image, at, node = (index.to(self.target.device) for index in (image, at, node))
        wide = torch.float32 if self.target.device.type == "mps" else torch.float64
        return couplings.to_probs(self.target[image, node]).to(wide), couplings.to_probs(self.proposal[image, at]).to(
            wide
        )


def _residual(p: Tensor, q: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p and q after `code` is rejected: the residual, and the proposal without the code, both normalized.

    Shapes: p, q (n, C), code (n,) -> two of (n, C).
    """
    p, q = (p - q).clamp_(min=0), q.scatter(1, code[:, None], 0.0)
    tiny = torch.finfo(p.dtype).tiny
    return p / p.sum(1, keepdim=True).clamp(min=tiny), q / q.sum(1, keepdim=True).clamp(min=tiny)
