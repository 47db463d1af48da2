"""The objective of group-relative policy optimization (GRPO), and the log-probabilities that it needs.

The policy is the distribution that the images are sampled from: with guidance the guided one, at the temperature of the
sampling, over all image codes. With guidance, the gradient flows through both the conditional and the unconditional
pass.

Source: DeepSeekMath (arXiv 2402.03300), section 4.1; for autoregressive images SimpleAR (arXiv 2504.11455).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.training.loss import CHUNK_LOGITS, WHOLE_LOGITS, LossModel
from lumina_mgpt.unirep import ImageLayout

_EPSILON = 1e-4  # added to the standard deviation of a group's rewards, which may be near 0


class Inputs(NamedTuple):
    """What `PolicyModel` takes for some sequences.

    Attributes:
        ids: ids of each row, padded on the right, (rows, T).
        places: positions before the wanted ids, as indices into the flattened ids, (Q · L,). Q is 2 with guidance, the
            conditional positions first, and 1 without.
        targets: the wanted ids, counted from the first of the possible ids, (L,).
    """

    ids: Tensor
    places: Tensor
    targets: Tensor


class PolicyModel(LossModel):
    """Joins the transformer and the log-probabilities of given ids in one module: sharding includes the head."""

    def forward(  # type: ignore[override]  # another result than the loss
        self, ids: Tensor, index: Tensor, targets: Tensor, settings: SamplingConfig, columns: slice | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each target, and the entropy of its distribution, without gradient, in nats.

        Args:
            ids, index, targets: the fields of `Inputs`.
            settings: guidance, temperature and top-k.
            columns: the possible ids; None for the whole vocabulary.

        Shapes: returns two of (L,), float32, or float64 for a float64 model.
        """
        rows = self.model(ids).flatten(0, 1)[index]  # (Q · L, D)
        rows = rows.view(-1, len(targets), rows.shape[-1])  # (Q, L, D)
        width = len(self.model.lm_head.weight) if columns is None else columns.stop - columns.start
        if rows.shape[0] * rows.shape[1] * width <= WHOLE_LOGITS:
            return self._chosen(rows, targets, settings, columns)
        step = max(1, CHUNK_LOGITS // (rows.shape[0] * width))
        parts = [  # recomputed in the backward pass: the logits of all positions would take gigabytes
            checkpoint(self._chosen, rows[:, at : at + step], targets[at : at + step], settings, columns,
                       use_reentrant=False)
            for at in range(0, len(targets), step)
        ]  # fmt: skip
        return torch.cat([chosen for chosen, _ in parts]), torch.cat([entropy for _, entropy in parts])

    def _chosen(
        self, rows: Tensor, targets: Tensor, settings: SamplingConfig, columns: slice | None
    ) -> tuple[Tensor, Tensor]:
        log_probs = code_log_probs(self.model.project(rows, columns), settings)[0]  # (L, C)
        chosen = log_probs.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
        return chosen, entropy


def image_inputs(starts: Sequence[Sequence[int]], codes: Tensor, layout: ImageLayout, guided: bool) -> Inputs:
    """Returns the inputs for the codes of B images, in the order of the images and then in reading order.

    Args:
        starts: ids of the prompt of each image, up to image start.
        codes: codes of the images.
        guided: whether an unconditional row per image follows, which has the image alone, as in sampling.

    Shapes: codes (B, rows, cols), on the CPU. L is B · rows · cols.
    """
    last = layout.offset_of(layout.num_codes - 1)  # no wanted id follows it
    images = layout.fill(codes.flatten(1))[:, :last].tolist()
    rows = [[*start, *image] for start, image in zip(starts, images, strict=True)]
    before = [layout.code_offsets - 1 + len(start) for start in starts]
    if guided:
        rows += images
        before += [layout.code_offsets - 1] * len(images)
    return padded(rows, before, codes.flatten(), layout.vocabulary.bos_id)


def padded(rows: Sequence[Sequence[int]], before: Sequence[Tensor], targets: Tensor, pad: int) -> Inputs:
    """Returns the inputs for rows of different lengths.

    Args:
        before: positions in each row before a wanted id.
        pad: id that fills up shorter rows on the right. No id attends to it.
    """
    T = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (T - len(row))] for row in rows])
    indices = torch.cat([number * T + places for number, places in enumerate(before)])
    return Inputs(ids, indices, targets)


def advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """Returns the advantage of each image: its reward minus the mean of its group.

    The advantages of a group with equal rewards are exactly 0.

    Args:
        scale: "std" divides by the standard deviation of the group (DeepSeekMath); "mean" does not, which does not
            prefer prompts whose images are nearly all right or wrong (Dr. GRPO, arXiv 2503.20783).

    Shapes: rewards (groups, group size), float64 -> the same.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        centred = centred / (rewards.std(1, keepdim=True) + _EPSILON)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return torch.where(equal, 0.0, centred)


def process_advantages(rewards: Tensor, scale: str = "std", discount: float = 1.0) -> Tensor:
    """Returns the advantage of each code: its reward and those of the codes after it, compared within the group.

    The return of code t is the sum over j >= t of discount ** (j - t) · rewards[j]. The advantage is the return minus
    the mean of the group at this code.

    Args:
        scale: "std" divides by the standard deviation of all returns of a group from these means, "mean" does not.

    Shapes: rewards (groups, group size, codes), float64 -> the same.
    Source: process supervision in DeepSeekMath (arXiv 2402.03300), section 4.1.3. There, rewards are normalized with
        the mean and the standard deviation of all steps of the group before they are summed, and there is no discount.
    """
    returns = rewards.clone()
    for at in range(rewards.shape[2] - 2, -1, -1):
        returns[:, :, at] += discount * returns[:, :, at + 1]
    centred = returns - returns.mean(1, keepdim=True)
    if scale == "std":
        variance = centred.square().sum((1, 2), keepdim=True) / ((rewards.shape[1] - 1) * rewards.shape[2])
        centred = centred / (variance.sqrt() + _EPSILON)
    return torch.where(returns.amax(1, keepdim=True) == returns.amin(1, keepdim=True), 0.0, centred)


class Terms(NamedTuple):
    """Sums over the codes of some images: the loss with gradient, and the others without.

    Attributes:
        loss: the loss to minimize.
        kl: estimated divergence from the reference, in nats.
        clipped: number of codes whose ratio is limited, and which have no gradient of the reward.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def policy_terms(
    now: Tensor,
    before: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    low: float = 0.2,
    high: float = 0.2,
    kl: float = 0.0,
) -> Terms:
    """Returns the clipped objective of some codes, with the divergence from a reference.

    With the ratio r = exp(now - before) and the advantage A, the loss of a code is
    -min(r · A, clip(r, 1 - low, 1 + high) · A) + kl · (exp(d) - d - 1), where d = reference - now. The second term is
    an estimate of the divergence KL(policy ‖ reference) that is never negative. Its gradient is in expectation that of
    KL(reference ‖ policy).

    Args:
        now: log-probabilities of the sampled codes, with gradient.
        before: those of the policy that sampled them, without.
        reference: those of the reference; None if `kl` is 0.
        advantage: the advantage of each code.
        kl: weight of the divergence, at least 0.

    Shapes: now, before, reference, advantage (L,).
    Source: DeepSeekMath (arXiv 2402.03300), equations 3 and 4; two limits: DAPO (arXiv 2503.14476).
    """
    ratio = (now - before).exp()
    gain, limited = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    loss = -torch.minimum(gain, limited).sum()
    divergence = loss.new_zeros(())
    if reference is not None:
        ahead = reference - now
        divergence = (ahead.exp() - ahead - 1).sum()
        loss = loss + kl * divergence
    return Terms(loss, divergence.detach(), (gain > limited).sum().detach())
