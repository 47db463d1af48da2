"""The prompts of a run, and which of them a step takes."""

import hashlib
from collections.abc import Sequence

import numpy as np

from lumina_mgpt.data.seeding import generator
from lumina_mgpt.unirep import ImageLayout
from lumina_mgpt.vocabulary import Vocabulary


class Prompts:
    """The prompts of a run, encoded.

    Args:
        texts: the prompts.
        starts: ids of each prompt, up to image start.
        layout: layout of all images.

    Attributes:
        lengths: number of ids of each sequence, prompt and image.
    """

    def __init__(self, texts: Sequence[str], starts: Sequence[Sequence[int]], layout: ImageLayout) -> None:
        self.texts, self.starts, self.layout = texts, starts, layout
        self.lengths = np.array([len(start) + layout.length for start in starts])

    @property
    def vocabulary(self) -> Vocabulary:
        return self.layout.vocabulary

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Returns a digest of the prompts and the size of the images."""
        text = "\n".join([str(self.layout.size), *self.texts])
        return hashlib.sha256(text.encode()).hexdigest()


class PromptFeed:
    """Chooses the prompts of each step: each epoch takes all of them once, in another order.

    A step may take the last prompts of an epoch and the first of the next one. The order depends on the seed and the
    epoch alone, not on the number of processes.

    Args:
        count: number of prompts.
        groups: number of prompts of a step.

    Attributes:
        epoch, done: position: the current epoch, and the number of its prompts that were taken.
        plan: the order of all prompts in the current epoch.
        indices: the prompts of the current step.
    """

    def __init__(self, count: int, groups: int, seed: int) -> None:
        self.count, self.groups, self.seed = count, groups, seed
        self.epoch = self.done = 0
        self.indices: list[int] = []

    @property
    def plan(self) -> list[int]:
        return generator(self.seed, "prompts", self.epoch).permutation(self.count).tolist()

    @property
    def epochs(self) -> float:
        """Number of epochs that have passed."""
        return self.epoch + self.done / self.count

    def next_step(self) -> list[int]:
        """Returns the indices of the next prompts."""
        self.indices = []
        while len(self.indices) < self.groups:
            taken = self.plan[self.done : self.done + self.groups - len(self.indices)]
            self.indices += taken
            self.done += len(taken)
            if self.done == self.count:
                self.epoch, self.done = self.epoch + 1, 0
        return self.indices
