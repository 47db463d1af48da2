"""Attention heads that look a fixed number of positions back, set before a finetuning on tasks with two panels.

What a map or a control panel asks for is found at the same cell of the other panel, a fixed distance back in the
sequence. Training finds heads for that, but late: in a small model after hours no head had more than a tenth of its
attention there. Rotary positions can express such a head exactly (RoFormer, arXiv 2104.09864, equation 16: with queries
and keys that are the same at every position, the score depends on the distance alone), so it can be given.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Attention, Transformer, rope_angles, rotate

_RIDGE = 1e-3  # of the direction that is the same in all hidden states, relative to their mean square
_STEPS, _RATE = 400, 0.05  # of the search for query and key


@dataclass(frozen=True)
class Pointer:
    """Head `head` of layer `layer` is to look `distance` positions back (0: at the position itself).

    `head` None: the one of the layer that is missed least.
    """

    layer: int
    head: int | None
    distance: int

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.head is None else f'.{self.head}'}:{self.distance}"

    @classmethod
    def parse(cls, text: str) -> "Pointer":
        """From LAYER:DISTANCE or LAYER.HEAD:DISTANCE, as in 1:155 or 1.5:155.

        Raises:
            InputError: it is not of that form.
        """
        where, _, distance = text.partition(":")
        layer, dot, head = where.partition(".")
        numbers = (layer, head, distance) if dot else (layer, distance)
        if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in numbers):
            raise InputError(f"a head is given as LAYER:DISTANCE or LAYER.HEAD:DISTANCE, as in 1:155, got {text!r}")
        return cls(int(layer), int(head) if dot else None, int(distance))


def check(config: ModelConfig, pointers: list[Pointer]) -> None:
    """Refuses what `point` cannot do.

    Raises:
        InputError: a layer, head or distance that is not there, a head given twice, or a model whose heads share keys.
    """
    heads, layers, longest = config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings
    if config.num_key_value_heads != heads:
        raise InputError(f"heads can be pointed where each has keys of its own; here {heads} share "
                         f"{config.num_key_value_heads}")  # fmt: skip
    for pointer in pointers:
        if pointer.layer >= layers or (pointer.head or 0) >= heads or pointer.distance >= longest:
            raise InputError(f"{pointer}: the model has layers 0 to {layers - 1}, heads 0 to {heads - 1} and distances "
                             f"to {longest - 1}")  # fmt: skip
    named = [(pointer.layer, pointer.head) for pointer in pointers if pointer.head is not None]
    if len(set(named)) < len(named):
        raise InputError("a head is given twice; give each one distance")
    for layer in range(layers):
        if sum(pointer.layer == layer for pointer in pointers) > heads:
            raise InputError(f"layer {layer} has {heads} heads, and more are asked for")


def point(model: Transformer, pointers: list[Pointer], ids: list[Tensor]) -> list[Pointer]:
    """Gives each head a fixed distance to look back, and lets its output start from nothing; tells which heads.

    Its query and key become the same at every position: the norm of a head leaves nothing of a projection of rank one
    but its sign, and that is fixed by a direction in which all hidden states agree. `ids`, a few sequences (T,) of the
    kind to be trained on, show the hidden states, and how far back keys can be. Training may change all of it again.

    Raises:
        InputError: as `check`.
    """
    check(model.config, pointers)
    longest = max(map(len, ids))
    far = max(pointer.distance for pointer in pointers)
    if far >= longest:
        raise InputError(f"no sequence given is longer than {longest} ids, and a head is to look {far} back")
    pointers = _chosen(model, pointers, ids)
    for layer in sorted({pointer.layer for pointer in pointers}):  # a head changes what later layers see
        attention = model.layers[layer].self_attn
        with torch.no_grad():
            agreed = _agreed(_inputs(model, attention, ids))
        for pointer in (pointer for pointer in pointers if pointer.layer == layer):
            query, key = _search(model.config, attention, pointer.head, pointer.distance, longest)
            H = attention.head_dim
            rows = slice(pointer.head * H, (pointer.head + 1) * H)
            with torch.no_grad():
                for projection, wanted in ((attention.q_proj, query), (attention.k_proj, key)):
                    # As large as a trained one: its rows are turned by the same updates.
                    projection.weight[rows] = torch.outer(wanted, agreed) * _scale(projection.weight, agreed)
                attention.o_proj.weight[:, rows] = 0
    return pointers


def _chosen(model: Transformer, pointers: list[Pointer], ids: list[Tensor]) -> list[Pointer]:
    """The same, with a head each: of those not asked for by number, the ones without which the loss is least."""
    chosen = []
    for layer in sorted({pointer.layer for pointer in pointers}):
        here = [pointer for pointer in pointers if pointer.layer == layer]
        free = sorted(set(range(model.config.num_attention_heads)) - {pointer.head for pointer in here})
        if any(pointer.head is None for pointer in here):
            bar = tqdm(free, desc=f"what the heads of layer {layer} are worth", unit="head")
            losses = {head: loss_without(model, (layer, head), ids) for head in bar}
            free.sort(key=losses.__getitem__)
        rest = iter(free)
        chosen += [replace(pointer, head=next(rest)) if pointer.head is None else pointer for pointer in here]
    return chosen


@torch.no_grad()
def loss_without(model: Transformer, left_out: tuple[int, int] | None, ids: list[Tensor]) -> float:
    """Mean cross entropy in nats an id over sequences (T,) of ids, without head (layer, head), or with all of them."""
    H = model.config.head_dim
    kept = None
    if left_out:
        layer, head = left_out
        output = model.layers[layer].self_attn.o_proj.weight.data[:, head * H : (head + 1) * H]
        kept = output.clone()
        output.zero_()
    logits = (model.project(model(sequence[None, :-1]))[0] for sequence in ids)
    total = sum(F.cross_entropy(part, seq[1:], reduction="sum").item() for part, seq in zip(logits, ids, strict=True))
    if kept is not None:
        output.copy_(kept)
    return total / sum(len(seq) - 1 for seq in ids)


def _scale(weight: Tensor, agreed: Tensor) -> Tensor:
    return weight.pow(2).mean().sqrt() / agreed.pow(2).mean().sqrt()


def _inputs(model: Transformer, attention: Attention, ids: list[Tensor]) -> Tensor:
    """What queries and keys of a layer are made of, (all positions, D)."""
    seen: list[Tensor] = []
    handle = attention.q_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    try:
        for sequence in ids:
            model(sequence[None])
    finally:
        handle.remove()
    return torch.cat(seen).float()


def _agreed(hidden: Tensor) -> Tensor:
    """The direction (D,) whose product with each hidden state is as near to 1 as least squares make it."""
    gram = hidden.mT @ hidden
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, hidden.sum(0))


def _search(config: ModelConfig, attention: Attention, head: int, distance: int, longest: int) -> tuple[Tensor, Tensor]:
    """A query and a key (H,), before their norms, whose attention over keys 0 to longest - 1 back is most at one."""
    generator = torch.Generator().manual_seed(distance)
    H = config.head_dim
    query, key = (torch.randn(H, generator=generator).requires_grad_() for _ in range(2))
    back = rope_angles(config, torch.arange(longest), longest, torch.float32)  # a query turned by its distance
    norms = [(attention.q_norm, query), (attention.k_norm, key)]
    optimizer = torch.optim.Adam([query, key], lr=_RATE)
    for _ in range(_STEPS):
        q, k = (norm(part.expand(norm.heads, H))[head] for norm, part in norms)  # (H,)
        scores = (rotate(q.expand(1, longest, 1, H), back) @ k).flatten() / math.sqrt(H)
        loss = -scores.log_softmax(0)[distance]
        query.grad, key.grad = torch.autograd.grad(loss, (query, key))  # and none for the norms' weights
        optimizer.step()
    return query.detach(), key.detach()


