"""Builds optimizers, schedules the learning rate, and averages the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.options import OptimizerOptions

BETAS = (0.9, 0.95)  # of the released training code


def build_optimizers(model: Transformer, options: OptimizerOptions) -> list[Optimizer]:
    """Returns the optimizers of all trained weights.

    With `options.optimizer` "adamw", AdamW trains all of them. With "muon", Muon trains the matrices of the layers, and
    AdamW trains the other weights. Norms and biases have no weight decay.

    Source: Muon for hidden matrices only, https://kellerjordan.github.io/posts/muon/.
    """
    hidden, other, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "norm" in name or name.endswith("bias"):
            plain.append(parameter)
        elif options.optimizer == "muon" and name.startswith("layers."):
            hidden.append(parameter)
        else:
            other.append(parameter)
    groups = [{"params": other, "weight_decay": options.wd}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=options.muon_lr, weight_decay=options.wd, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Returns the learning rate as a fraction of its peak: it rises linearly, then falls by half a cosine.

    Args:
        progress: fraction of the run that has passed, in [0, 1].
        warmup: fraction of the run in which the learning rate rises, in [0, 1).
        floor: value at the end of the run, in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Sets each learning rate of the optimizers to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


class Ema:
    """Keeps an exponential moving average of the trained weights.

    Update n, counted from 1, uses the decay min(decay, (1 + n) / (10 + n)). The average thus follows the weights faster
    at first, and the initial weights do not dominate it after a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.weights = {name: parameter.detach().clone() for name, parameter in trained}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = dict(model.named_parameters())
        pairs = [(local(mean), local(now[name].detach())) for name, mean in self.weights.items()]
        torch._foreach_lerp_([mean for mean, _ in pairs], [new for _, new in pairs], 1 - decay)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor; returns any other tensor unmodified."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
