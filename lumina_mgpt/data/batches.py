"""Samples of a TokenDataset -> Planned batches -> MicroBatch tensors.

Before: dataset.py reads the samples. Next: the trainer computes the loss of each MicroBatch.

The plan of an epoch is a list of micro-batches. It depends only on the dataset and its seed, the epoch and the batch
size. All n processes make the same list, and each of them takes every n-th entry.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.seeding import generator
from lumina_mgpt.errors import InputError
from lumina_mgpt.unirep import IGNORED

_OPEN_ROWS = 16  # candidates of best-fit packing: more fill rows a little better, but slow down the plan


@dataclass(frozen=True)
class BatchSize:
    """Size of a micro-batch: either a fixed number of rows, or the number of ids that its rows must fit into.

    Args:
        rows: number of rows per micro-batch, with one sequence each. 0 if `tokens` is given.
        tokens: largest number of ids per micro-batch, padding included. 0 if `rows` is given.
        multiple: the number of ids in each row is padded to a multiple of this.
        packed: a micro-batch is one row of at most `tokens` ids. It holds several sequences, one after another.

    Raises:
        InputError: `rows` and `tokens` are both given or both 0, a value is out of range, or `packed` is given without
            `tokens`.
    """

    rows: int = 0
    tokens: int = 0
    multiple: int = 32
    packed: bool = False

    def __post_init__(self) -> None:
        if (self.rows > 0) == (self.tokens > 0) or min(self.rows, self.tokens) < 0:
            raise InputError(f"give one of batch_size=N and max_tokens=N, above 0; got {self.rows} and {self.tokens}")
        if self.packed and not self.tokens:
            raise InputError(f"needs max_tokens=N, the number of ids in a row, got batch_size={self.rows}", "pack")
        if self.multiple < 1:
            raise InputError(f"must be at least 1, got {self.multiple}", "pad_multiple")

    def width(self, length: int) -> int:
        """Number of ids in a row, padding included.

        Args:
            length: number of ids without padding.
        """
        return _round_up(length, self.multiple)

    def rows_of(self, width: int) -> int:
        return self.rows or max(1, self.tokens // width)

    def check(self, longest: int) -> None:
        """Raises InputError if the longest sequence with its padding does not fit into `tokens`.

        Args:
            longest: number of ids in the longest sequence.
        """
        if 0 < self.tokens < self.width(longest):
            raise InputError(
                f"must be at least {self.width(longest)}, the longest sequence with its padding, got {self.tokens}",
                "max_tokens",
            )


@dataclass(frozen=True)
class Planned:
    """One micro-batch of a plan, not read yet.

    Attributes:
        samples: indices of its samples in the TokenDataset. There may be fewer than `rows`.
        rows, width: number of rows, and number of ids in each row with padding.
        packed: all samples share one row.
    """

    samples: np.ndarray
    rows: int
    width: int
    packed: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of a micro-batch. The model predicts `targets` from its hidden states at the positions in `index`.

    Attributes:
        ids: input ids. B is the number of rows, T the number of ids in each row.
        index: positions in the flattened ids whose next id has a label. Padding at the end of `index` is 0.
        targets: the next id for each position in `index`; -100 where `index` is padding.
        labelled: number of targets without padding.
        tokens: number of ids without padding.
        documents: number of ids of each sequence in a packed row, then of its padding if there is any. Empty if the
            batch is not packed.

    Shapes: ids (B, T) long; index, targets (L,) long.
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    labelled: int
    tokens: int
    documents: tuple[int, ...] = ()

    @property
    def unlabelled(self) -> Tensor:
        """Whether each id is no target: it belongs to the prompt, a given picture or the padding. Shapes: (B, T)."""
        found = torch.ones(self.ids.numel(), dtype=torch.bool)
        found[self.index[: self.labelled] + 1] = False
        return found.view_as(self.ids)


def plan_epoch(dataset: TokenDataset, epoch: int, size: BatchSize) -> list[Planned]:
    """The micro-batches of an epoch in random order.

    All samples of a micro-batch have the same type. Unless packed, they also have similar lengths.

    Args:
        dataset: all samples; its seed determines the order.
        epoch: index of the epoch, from 0.
        size: size of each micro-batch.
    """
    samples = dataset.epoch(epoch)
    random = generator(dataset.seed, "plan", epoch)
    lengths, kinds = dataset.length(samples), dataset.kind(samples)
    if size.packed:
        order = np.lexsort((random.random(len(samples)), kinds))
        rows = pack(lengths[order], kinds[order], size.tokens)
        batches = [Planned(samples[order[row]], 1, size.width(int(lengths[order[row]].sum())), True) for row in rows]
        return [batches[n] for n in random.permutation(len(batches))]
    widths = _round_up(lengths, size.multiple)
    # Samples of one width are shuffled, so that each epoch has other batches.
    order = np.lexsort((random.random(len(samples)), -widths, kinds))
    batches, at = [], 0
    while at < len(order):
        width = int(widths[order[at]])
        count = size.rows_of(width)
        chosen = order[at : at + count]
        chosen = chosen[kinds[chosen] == kinds[order[at]]]
        batches.append(Planned(samples[chosen], count, width))
        at += len(chosen)
    return [batches[n] for n in random.permutation(len(batches))]


def pack(lengths: np.ndarray, kinds: np.ndarray, tokens: int) -> list[list[int]]:
    """Packs sequences into rows of at most `tokens` ids by best fit.

    Each sequence goes to the fullest open row that still has room for it. A row holds sequences of one kind only.

    Args:
        lengths: number of ids of each sequence.
        kinds: kind of each sequence. Sequences of equal kind must be adjacent.
        tokens: largest number of ids per row.

    Shapes: lengths, kinds (N,) for N sequences.

    Returns:
        For each row, the indices of its sequences.
    """
    rows: list[list[int]] = []
    free: dict[int, int] = {}  # open row -> its free ids
    for n, length in enumerate(lengths.tolist()):
        if n and kinds[n] != kinds[n - 1]:
            free.clear()
        fitting = [row for row, left in free.items() if left >= length]
        if not fitting:
            if len(free) == _OPEN_ROWS:
                del free[min(free, key=free.__getitem__)]
            fitting = [len(rows)]
            free[len(rows)] = tokens
            rows.append([])
        best = min(fitting, key=free.__getitem__)
        rows[best].append(n)
        free[best] -= length
    return rows


def collate(dataset: TokenDataset, planned: Planned, epoch: int, multiple: int, pad_id: int = 0) -> MicroBatch:
    """Reads the samples of a planned micro-batch into tensors.

    Rows are padded on the right, so that no id attends to the padding. If there are fewer samples than rows, the
    remaining rows are all padding.

    The loss covers only the positions in `MicroBatch.index`. `index` is padded to a multiple of 8 * `multiple`, but not
    beyond the number of all ids. The padding keeps the number of different shapes small. Each new shape may cause a
    compilation.

    Args:
        dataset: the dataset of the plan.
        planned: the micro-batch to read.
        epoch: index of the epoch; it selects the samples without context.
        multiple: `BatchSize.multiple`.
        pad_id: id that pads the rows.
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
    L = min(B * T, max(8 * multiple, _round_up(labelled, 8 * multiple)))
    targets = torch.full((L,), IGNORED)
    targets[:labelled] = successors[index]
    index = torch.cat([index, index.new_zeros(L - labelled)])
    return MicroBatch(ids.view(B, T), index, targets, labelled, tokens, documents)


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A copy of `batch` without labels, for a process that has no batch left in a step."""
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED), labelled=0, tokens=0)


class Feed:
    """Gives one process its micro-batches, step by step.

    A step covers the next `accum` * `world` micro-batches of the plan. Process `rank` takes every `world`-th of them,
    starting at index `rank`. The last step of an epoch may be smaller. Epochs without samples are skipped but counted.

    Args:
        dataset: the samples.
        size: size of each micro-batch.
        accum: number of micro-batches per step and process.
        rank, world: index of this process, and number of processes.

    Attributes:
        epoch: index of the current epoch, from 0.
        done: number of micro-batches of this epoch that are done, on all processes together. To resume a run, set
            `epoch` and `done`.
        samples: indices of the samples of the last step, on all processes together.
    """

    def __init__(self, dataset: TokenDataset, size: BatchSize, accum: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.size, self.accum, self.rank, self.world = dataset, size, accum, rank, world
        self.epoch, self.done = 0, 0
        self.samples: list[int] = []
        self._plan: tuple[int, list[Planned]] | None = None

    @property
    def plan(self) -> list[Planned]:
        """Micro-batches of the current epoch."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = self.epoch, plan_epoch(self.dataset, self.epoch, self.size)
        return self._plan[1]

    @property
    def epochs(self) -> float:
        """Number of epochs done, plus the fraction of the current epoch that is done."""
        return self.epoch + self.done / len(self.plan)

    def next_step(self) -> list[MicroBatch]:
        """Returns this process's micro-batches of the next step, at least one, and advances `epoch` and `done`."""
        plan, multiple = self.plan, self.size.multiple
        step = plan[self.done : self.done + self.accum * self.world]
        self.samples = [int(sample) for planned in step for sample in planned.samples]
        mine = step[self.rank :: self.world]
        batches = [collate(self.dataset, planned, self.epoch, multiple) for planned in mine]
        # All processes run equally many forward passes: their collective operations must match.
        for _ in range(len(range(0, len(step), self.world)) - len(mine)):
            batches.append(empty_like(batches[-1] if batches else collate(self.dataset, step[0], self.epoch, multiple)))
        self.done += len(step)
        if self.done == len(plan):
            self.epoch, self.done = self.epoch + 1, 0
            while not self.plan:  # a small source at a small ratio leaves epochs empty
                self.epoch += 1
        return batches


def corrupt(ids: Tensor, codes: slice, rate: float, spared: float = 0.0, unlabelled: Tensor | None = None) -> Tensor:
    """Replaces a share `rate` of the image codes in the input ids, as data augmentation.

    With few training images, a model can learn to recognize an image by its previous codes. One wrong code during
    sampling then misleads the model.

    Half of the new codes are random. The others are the codes of another row at the same position. The rate of each row
    is uniform in [0, 2 * rate]. All random numbers come from torch's global generator.

    Args:
        ids: input ids of the model. They are not modified, and neither are the labels.
        codes: range of the ids that are image codes.
        rate: mean share of the codes to replace.
        spared: share of the rows that keep the first half of their codes, which is the given upper panel, and their
            codes in `unlabelled`. From these rows, the model learns to rely on what is given.
        unlabelled: `MicroBatch.unlabelled`; its codes are those of given pictures. None for no such codes.

    Shapes: ids, unlabelled and result (B, T), with B rows of T ids.

    Source: scheduled sampling (arXiv 1506.03099) has the same aim, but needs a second forward pass.
    """
    B, T = ids.shape
    other = ids[torch.randperm(B)]
    anything = torch.randint(codes.start, codes.stop, (B, T))
    new = torch.where(torch.rand(B, T) < 0.5, anything, other)
    hit = torch.rand(B, T) < 2 * rate * torch.rand(B, 1)
    is_code, fits = [(part >= codes.start) & (part < codes.stop) for part in (ids, new)]
    hit &= is_code & fits
    if spared:  # draws nothing otherwise, so that runs without it keep their random numbers
        kept = 2 * is_code.cumsum(1) <= is_code.sum(1, keepdim=True)
        if unlabelled is not None:
            kept = kept | unlabelled
        hit &= ~(kept & (torch.rand(B, 1) < spared))
    return torch.where(hit, new, ids)


def _round_up(value, multiple: int):
    """The next multiple; of an int or of each number in an array."""
    return -(-value // multiple) * multiple
