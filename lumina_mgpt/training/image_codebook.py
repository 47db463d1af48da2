"""Trains the codebook of an image tokenizer: initialization by k-means, then updates by moving averages."""

import torch
from torch import Tensor


def kmeans(points: Tensor, count: int, steps: int = 12, generator: torch.Generator | None = None) -> Tensor:
    """Returns the centres of `count` clusters of points, by Lloyd's algorithm.

    An empty cluster restarts at a random point.

    Args:
        steps: number of iterations.
        generator: source of the random choices; torch's global one if None.

    Shapes: points (N, Z), N points of Z channels; returns (count, Z).
    """
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(steps):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / sizes.clamp(min=1)
        empty = (sizes == 0).squeeze(1)
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    return centres


class MovingCodes:
    """Updates codes in place, as moving averages of the latents that are assigned to them.

    Args:
        codes: the codebook (C, Z): C codes of Z channels.
        decay: decay of the averages per step, in [0, 1).
        dead_below: a code is dead if fewer latents than this are assigned to it per step, as a moving average.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1.
    """

    def __init__(self, codes: Tensor, decay: float, dead_below: float) -> None:
        self.codes, self.decay, self.dead_below = codes, decay, dead_below
        self.sizes = codes.new_zeros(len(codes))  # (C,)
        self.sums = torch.zeros_like(codes)  # (C, Z)

    def start(self, centres: Tensor) -> None:
        """Sets the codes to `centres` (C, Z). In the averages, each centre counts as one latent."""
        self.codes.data.copy_(centres)
        self.sizes.fill_(1.0)
        self.sums.copy_(centres)

    @torch.no_grad()
    def update(self, flat: Tensor, nearest: Tensor) -> None:
        """Moves each code towards the mean of the latents of a batch that are assigned to it.

        Args:
            flat: N latents of the batch.
            nearest: index of the code of each latent.

        Shapes: flat (N, Z), nearest (N,).
        """
        count = len(self.codes)
        self.sizes.mul_(self.decay).add_(torch.bincount(nearest, minlength=count), alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(torch.zeros_like(self.sums).index_add_(0, nearest, flat), alpha=1 - self.decay)
        alive = self.sizes > 1e-4  # avoids a division by almost 0
        self.codes.data[alive] = self.sums[alive] / self.sizes[alive, None]

    def used(self) -> int:
        """Returns the number of codes that are not dead."""
        return int((self.sizes >= self.dead_below).sum())

    @torch.no_grad()
    def revive(self, flat: Tensor, generator: torch.Generator) -> int:
        """Moves dead codes to random latents of a batch; returns the number of moved codes.

        Latents far from every code are chosen more often. At most one code moves per eight latents, since a batch has
        few latents that differ much from each other.

        Args:
            flat: N latents of the batch.

        Shapes: flat (N, Z).
        """
        dead = (self.sizes < self.dead_below).nonzero().squeeze(1)
        far = torch.cat([torch.cdist(part, self.codes).min(1).values for part in flat.split(8192)])
        dead = dead[: len(flat) // 8]
        if len(dead):
            # The same choice on every device: a generator of the CPU draws from weights on the CPU.
            chosen = torch.multinomial((far + 1e-6).cpu(), len(dead), generator=generator)
            self.codes.data[dead] = flat[chosen]
            self.sums[dead], self.sizes[dead] = flat[chosen], 1.0
        return len(dead)
