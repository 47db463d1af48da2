"""Which samples go into which batch, and batches as tensors.

The plan of an epoch is one list of micro-batches, a function of (seed, epoch) and the batch size alone: any number of
processes walks the same list, each taking every world-th entry.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.seeding import generator
from lumina_mgpt.errors import InputError
from lumina_mgpt.unirep import IGNORED

_OPEN_ROWS = 16  # more fill rows a little better, and make the plan slower


@dataclass(frozen=True)
class BatchSize:
    """A fixed number of `rows`, or as many rows as fit into `tokens`; widths are multiples of `multiple`.

    `packed`: one row of at most `tokens`, in which whole sequences lie one after another.
    """

    rows: int = 0
    tokens: int = 0
    multiple: int = 32
    packed: bool = False

    def __post_init__(self) -> None:
        if (self.rows > 0) == (self.tokens > 0) or min(self.rows, self.tokens) < 0:
            raise InputError(f"give one of --batch_size and --max_tokens, above 0; got {self.rows} and {self.tokens}")
        if self.packed and not self.tokens:
            raise InputError(f"--pack needs --max_tokens, the ids of a packed row, got --batch_size {self.rows}")
        if self.multiple < 1:
            raise InputError(f"--pad_multiple must be at least 1, got {self.multiple}")

    def width(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def rows_of(self, width: int) -> int:
        return self.rows or max(1, self.tokens // width)

    def check(self, longest: int) -> None:
        """Raises: InputError: the longest sequence alone is more than `tokens`."""
        if 0 < self.tokens < self.width(longest):
            raise InputError(f"--max_tokens must be at least {self.width(longest)}, the longest sequence with its "
                             f"padding, got {self.tokens}")  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One micro-batch of the plan: its samples, and the shape it is padded to; `packed`: all samples in one row."""

    samples: np.ndarray
    rows: int
    width: int
    packed: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Shapes: ids (B, T) long; index (L,) positions in the flattened ids whose successor has a label; targets (L,)
    that successor, -100 where `index` is padding. `labelled` counts the real ones, `tokens` the ids without padding.
    `documents` are the lengths of the sequences in a packed row, its padding being the last; empty where not packed."""

    ids: Tensor
    index: Tensor
    targets: Tensor
    labelled: int
    tokens: int
    documents: tuple[int, ...] = ()


def plan_epoch(dataset: TokenDataset, epoch: int, size: BatchSize) -> list[Planned]:
    """Batches of samples of one type, in random order; of about one length, unless packed."""
    samples = dataset.epoch(epoch)
    random = generator(dataset.seed, "plan", epoch)
    lengths, kinds = dataset.length(samples), dataset.kind(samples)
    if size.packed:
        order = np.lexsort((random.random(len(samples)), kinds))
        rows = pack(lengths[order], kinds[order], size.tokens)
        batches = [Planned(samples[order[row]], 1, size.width(int(lengths[order[row]].sum())), True) for row in rows]
        return [batches[n] for n in random.permutation(len(batches))]
    widths = -(-lengths // size.multiple) * size.multiple
    # Within one width the order is random, so that an epoch's batches differ from the last one's.
    order = np.lexsort((random.random(len(samples)), -widths, kinds))
    batches, at = [], 0
    while at < len(order):
        width = int(widths[order[at]])
        rows = size.rows_of(width)
        chosen = order[at : at + rows]
        chosen = chosen[kinds[chosen] == kinds[order[at]]]
        batches.append(Planned(samples[chosen], rows, width))
        at += len(chosen)
    return [batches[n] for n in random.permutation(len(batches))]


def pack(lengths: np.ndarray, kinds: np.ndarray, tokens: int) -> list[list[int]]:
    """Numbers of the sequences in each row of at most `tokens` ids; kinds come one after another, and do not mix.

    Best fit: each goes to the fullest of a few open rows that still takes it. Shapes: lengths, kinds (N,).
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # ids that an open row, by its number, still takes
    for n, length in enumerate(lengths.tolist()):
        if n and kinds[n] != kinds[n - 1]:
            room.clear()
        fitting = [row for row, left in room.items() if left >= length]
        if not fitting:
            if len(room) == _OPEN_ROWS:
                del room[min(room, key=room.__getitem__)]
            fitting = [len(rows)]
            room[len(rows)] = tokens
            rows.append([])
        best = min(fitting, key=room.__getitem__)
        rows[best].append(n)
        room[best] -= length
    return rows


def collate(dataset: TokenDataset, planned: Planned, epoch: int, multiple: int, pad_id: int = 0) -> MicroBatch:
    """Reads a planned micro-batch; rows are padded on the right, where nothing attends to it, and so are missing rows.

    `index` is padded to a multiple of 8 * `multiple` (at most B * T), so that few shapes occur.
    """
    B, T = planned.rows, planned.width
    ids, successors = torch.full((B * T,), pad_id), torch.full((B * T,), IGNORED)
    lengths: list[int] = []
    for row, sample in enumerate(planned.samples):
        own_ids, own_labels = dataset.read(int(sample), epoch)
        start = sum(lengths) if planned.packed else row * T
        stop = start + len(own_ids)
        ids[start:stop], successors[start : stop - 1] = own_ids, own_labels[1:]
        lengths.append(len(own_ids))
    tokens = sum(lengths)
    documents = tuple(n for n in (*lengths, T - tokens) if n) if planned.packed else ()
    index = (successors != IGNORED).nonzero().flatten()
    labelled = len(index)
    L = min(B * T, max(1, -(-labelled // (8 * multiple))) * 8 * multiple)
    targets = torch.full((L,), IGNORED)
    targets[:labelled] = successors[index]
    index = torch.cat([index, index.new_zeros(L - labelled)])
    return MicroBatch(ids.view(B, T), index, targets, labelled, tokens, documents)


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A batch of the same shape without any label: what a process computes when an epoch leaves it nothing."""
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED), labelled=0, tokens=0)


class Feed:
    """Hands out the micro-batches of each step to one of `world` processes; its position is (epoch, done).

    A step takes `accum` * `world` micro-batches of the plan, process r those at r, r + world, ...; at the end of an
    epoch fewer may be left, and the step is a smaller one. Epochs without any sample are passed over: they count as
    walked.
    """

    def __init__(self, dataset: TokenDataset, size: BatchSize, accum: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.size, self.accum, self.rank, self.world = dataset, size, accum, rank, world
        self.epoch, self.done = 0, 0
        self.samples: list[int] = []  # of the last step, on all processes
        self._plan: tuple[int, list[Planned]] | None = None

    @property
    def plan(self) -> list[Planned]:
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, plan_epoch(self.dataset, self.epoch, self.size)
        return self._plan[1]

    @property
    def epochs(self) -> float:
        """Epochs walked so far, with their fraction."""
        return self.epoch + self.done / len(self.plan)

    def next_step(self) -> list[MicroBatch]:
        """This process's micro-batches of the next step, at least one; the position moves on."""
        plan, multiple = self.plan, self.size.multiple
        step = plan[self.done : self.done + self.accum * self.world]
        self.samples = [int(sample) for planned in step for sample in planned.samples]
        mine = step[self.rank :: self.world]
        batches = [collate(self.dataset, planned, self.epoch, multiple) for planned in mine]
        for _ in range(len(range(0, len(step), self.world)) - len(mine)):  # all processes do equally many forwards
            batches.append(empty_like(batches[-1] if batches else collate(self.dataset, step[0], self.epoch, multiple)))
        self.done += len(step)
        if self.done == len(plan):
            self.epoch, self.done = self.epoch + 1, 0
            while not self.plan:  # a small source at a small ratio gives nothing to most epochs
                self.epoch += 1
        return batches


def corrupt(ids: Tensor, codes: slice, rate: float, spared: float = 0.0) -> Tensor:
    """Replaces image codes in what the model reads, never in what it is to say; about `rate` of them.

    Where pictures are few and always the same, a model reads off the codes so far which one it is, and a single code
    drawn wrong leads it astray. Half of the new codes are of another row at the same place, half any code; each row has
    a rate of its own between 0 and twice the mean. A share `spared` of the rows keeps its first half, a given panel
    where there are two: so the panel is what can be relied on, not what was drawn below it. Draws from torch's global
    generator.

    Shapes: ids (B, T), and so is what it returns. `codes` are the ids of image codes.
    Source: the aim is that of scheduled sampling (arXiv 1506.03099), without a second forward.
    """
    B, T = ids.shape
    other = ids[torch.randperm(B)]
    anything = torch.randint(codes.start, codes.stop, (B, T))
    new = torch.where(torch.rand(B, T) < 0.5, anything, other)
    hit = torch.rand(B, T) < 2 * rate * torch.rand(B, 1)
    is_code, fits = [(part >= codes.start) & (part < codes.stop) for part in (ids, new)]
    hit &= is_code & fits
    if spared:  # else nothing more is drawn, and a run's random numbers stay what they were
        first_half = 2 * is_code.cumsum(1) <= is_code.sum(1, keepdim=True)
        hit &= ~(first_half & (torch.rand(B, 1) < spared))
    return torch.where(hit, new, ids)
