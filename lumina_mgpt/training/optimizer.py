"""Optimizers, the learning rate over a run, and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.options import Settings

BETAS = (0.9, 0.95)  # as released


def build_optimizers(model: Transformer, settings: Settings) -> list[Optimizer]:
    """AdamW for everything; or Muon for the matrices inside the layers and AdamW for the rest.

    Norms and biases are not decayed. Source: Muon for hidden matrices only, https://kellerjordan.github.io/posts/muon/.
    """
    hidden, other, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "norm" in name or name.endswith("bias"):
            plain.append(parameter)
        elif settings.optimizer == "muon" and name.startswith("layers."):
            hidden.append(parameter)
        else:
            other.append(parameter)
    groups = [{"params": other, "weight_decay": settings.wd}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=settings.muon_lr, weight_decay=settings.wd, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def schedule(progress: float, warmup: float, floor: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to `floor`. All in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizers: Iterable[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


class Ema:
    """Moving average of the trained weights; young averages follow faster, so that short runs forget the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.weights = {name: parameter.detach().clone() for name, parameter in trained}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = dict(model.named_parameters())
        pairs = [(local(mean), local(now[name].detach())) for name, mean in self.weights.items()]
        torch._foreach_lerp_([mean for mean, _ in pairs], [new for _, new in pairs], 1 - decay)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
