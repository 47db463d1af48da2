"""Builds optimizers, schedules the learning rate, and averages the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.options import OptimizerOptions

BETAS = (0.9, 0.95)  # of the released training code
SPARSE_WEIGHTS = 1 << 24  # from this number of weights, the embedding's gradient is sparse on a CPU
SLAB = 1 << 19  # weights of the embedding that are updated together: their gradient stays in the processor's cache


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which also takes sparse gradients of embeddings. The result is that of the dense gradient.

    Rows without a gradient are updated too, by their moments and by weight decay. torch's SparseAdam leaves them out,
    which is another algorithm. A sparse gradient saves the memory of the dense one, and the time to fill it with zeros.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Updates all weights; see `torch.optim.AdamW.step`."""
        assert closure is None, "a closure would compute new gradients"
        sparse = [
            (group, weight, weight.grad)
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None and weight.grad.is_sparse
        ]
        for _, weight, _ in sparse:
            weight.grad = None
        super().step()
        for group, weight, gradient in sparse:
            weight.grad = gradient
            self._update_in_slabs(group, weight, gradient.coalesce())

    def _update_in_slabs(self, group: dict, weight: Tensor, gradient: Tensor) -> None:
        """Updates a matrix (V, D) a few rows at a time, with the gradient of these rows in dense form."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(2))
        rows, values = gradient.indices()[0], gradient.values()
        count = max(1, SLAB // weight.shape[1])
        starts = torch.arange(0, len(weight), count)
        ends = torch.searchsorted(rows, starts + count).tolist()
        dense, begin = weight.new_zeros(count, weight.shape[1]), 0
        for start, end in zip(starts.tolist(), ends, strict=True):
            slab, given = slice(start, start + count), rows[begin:end] - start
            dense[given] = values[begin:end]
            part = weight[slab]
            adamw(
                [part],
                [dense[: len(part)]],
                [state["exp_avg"][slab]],
                [state["exp_avg_sq"][slab]],
                [],
                [state["step"].clone()],  # a call adds 1 to it
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            dense[given], begin = 0.0, end
        state["step"] += 1


def use_sparse_embedding(model: Transformer) -> None:
    """Makes the gradient of a large embedding sparse, where `AdamW` takes that: on a CPU, in a single process.

    An embedding that is frozen, sharded or also the head keeps its dense gradient.
    """
    embedding = model.embed_tokens
    weight = embedding.weight
    plain = type(embedding) is nn.Embedding and type(weight) is nn.Parameter and weight.device.type == "cpu"
    if plain and weight.requires_grad and weight is not model.lm_head.weight and weight.numel() >= SPARSE_WEIGHTS:
        embedding.sparse = True


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
    optimizers: list[Optimizer] = [AdamW(groups, lr=options.lr, betas=BETAS, fused=True)]
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
