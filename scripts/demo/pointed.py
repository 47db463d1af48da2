"""Initializes attention heads that attend to a fixed distance, before finetuning on tasks with two panels.

To draw or follow a map, a model needs the same cell of the other panel, at a fixed distance in the sequence. Training
finds such heads late: after hours, no head of a small model had more than 10 % of its attention there. Rotary position
embeddings express them exactly: with the same query and key at every position, the score depends only on the distance
(RoFormer, arXiv 2104.09864, equation 16).
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

_RIDGE = 1e-3  # regularization of the common direction, relative to the mean square of hidden states
_STEPS, _RATE = 400, 0.05  # of the optimizer that finds query and key


@dataclass(frozen=True)
class Pointer:
    """A head and the distance it shall attend to.

    Attributes:
        layer: index of the layer.
        head: index of the head in the layer; None for the one whose removal increases the loss least.
        distance: ids back in the sequence; 0 is the id itself.
    """

    layer: int
    head: int | None
    distance: int

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.head is None else f'.{self.head}'}:{self.distance}"

    @classmethod
    def parse(cls, text: str) -> "Pointer":
        """The pointer of a text LAYER:DISTANCE or LAYER.HEAD:DISTANCE, such as 1:155 or 1.5:155.

        Raises:
            InputError: the text does not have this form.
        """
        where, _, distance = text.partition(":")
        layer, dot, head = where.partition(".")
        numbers = (layer, head, distance) if dot else (layer, distance)
        if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in numbers):
            raise InputError(f"a head must be LAYER:DISTANCE or LAYER.HEAD:DISTANCE, such as 1:155, got {text!r}")
        return cls(int(layer), int(head) if dot else None, int(distance))


def check(config: ModelConfig, pointers: list[Pointer]) -> None:
    """Checks pointers against a model.

    Raises:
        InputError: a layer, head or distance does not exist, a head is given twice, or heads of the model share keys.
    """
    heads, layers, longest = config.num_attention_heads, config.num_hidden_layers, config.max_position_embeddings
    if config.num_key_value_heads != heads:
        raise InputError(
            f"each head must have its own keys, got {heads} heads that share "
            f"{config.num_key_value_heads}; use a model without grouped queries"
        )
    for pointer in pointers:
        if pointer.layer >= layers or (pointer.head or 0) >= heads or pointer.distance >= longest:
            raise InputError(
                f"{pointer}: the model has layers 0 to {layers - 1}, heads 0 to {heads - 1} and distances "
                f"to {longest - 1}"
            )
    named = [(pointer.layer, pointer.head) for pointer in pointers if pointer.head is not None]
    if len(set(named)) < len(named):
        raise InputError("a head is given twice; give each one distance")
    for layer in range(layers):
        if sum(pointer.layer == layer for pointer in pointers) > heads:
            raise InputError(f"layer {layer} has {heads} heads, got more; give fewer")


def point(model: Transformer, pointers: list[Pointer], ids: list[Tensor]) -> list[Pointer]:
    """Makes each head attend to its distance, with zero output at first; returns the pointers with their heads.

    Query and key become the same at every position. Their projections get rank one, of which the head's norm keeps only
    the sign, and a direction common to all hidden states fixes the sign. Training can change all of these weights.

    Args:
        ids: a few training sequences (T,), for hidden states and for the largest distance.

    Raises:
        InputError: as for `check`, or a distance is longer than all sequences.
    """
    check(model.config, pointers)
    longest = max(map(len, ids))
    far = max(pointer.distance for pointer in pointers)
    if far >= longest:
        raise InputError(f"a distance must be below {longest}, the longest sequence, got {far}; shorten it")
    pointers = _chosen(model, pointers, ids)
    for layer in sorted({pointer.layer for pointer in pointers}):  # a head changes the inputs of later layers
        attention = _attention(model, layer)
        with torch.no_grad():
            common = _common_direction(_inputs(model, attention, ids))
        for pointer in (pointer for pointer in pointers if pointer.layer == layer):
            assert pointer.head is not None
            query, key = _search(model.config, attention, pointer.head, pointer.distance, longest)
            H = attention.head_dim
            rows = slice(pointer.head * H, (pointer.head + 1) * H)
            with torch.no_grad():
                for projection, wanted in ((attention.q_proj, query), (attention.k_proj, key)):
                    # The scale of trained weights, so that updates change its direction at the same rate.
                    projection.weight[rows] = torch.outer(wanted, common) * _scale(projection.weight, common)
                attention.o_proj.weight[:, rows] = 0
    return pointers


def _chosen(model: Transformer, pointers: list[Pointer], ids: list[Tensor]) -> list[Pointer]:
    """The pointers with a head each; missing ones get the heads whose removal increases the loss least."""
    chosen = []
    for layer in sorted({pointer.layer for pointer in pointers}):
        here = [pointer for pointer in pointers if pointer.layer == layer]
        free = sorted(set(range(model.config.num_attention_heads)) - {pointer.head for pointer in here})
        if any(pointer.head is None for pointer in here):
            bar = tqdm(free, desc=f"loss without heads of layer {layer}", unit="head")
            losses = {head: loss_without(model, (layer, head), ids) for head in bar}
            free.sort(key=losses.__getitem__)
        rest = iter(free)
        chosen += [replace(pointer, head=next(rest)) if pointer.head is None else pointer for pointer in here]
    return chosen


@torch.no_grad()
def loss_without(model: Transformer, left_out: tuple[int, int] | None, ids: list[Tensor]) -> float:
    """Mean cross entropy over sequences (T,), in nats an id, without one head (layer, head) or with all heads."""
    H = model.config.head_dim
    kept = None
    if left_out:
        layer, head = left_out
        output = _attention(model, layer).o_proj.weight.data[:, head * H : (head + 1) * H]
        kept = output.clone()
        output.zero_()
    logits = (model.project(model(sequence[None, :-1]))[0] for sequence in ids)
    total = sum(F.cross_entropy(part, seq[1:], reduction="sum").item() for part, seq in zip(logits, ids, strict=True))
    if kept is not None:
        output.copy_(kept)
    return total / sum(len(seq) - 1 for seq in ids)


def _attention(model: Transformer, layer: int) -> Attention:
    attention = model.layers[layer].self_attn
    assert isinstance(attention, Attention)
    return attention


def _scale(weight: Tensor, common: Tensor) -> Tensor:
    return weight.pow(2).mean().sqrt() / common.pow(2).mean().sqrt()


def _inputs(model: Transformer, attention: Attention, ids: list[Tensor]) -> Tensor:
    """Inputs of a layer's query and key projections. Shapes: -> (all positions, D)."""
    seen: list[Tensor] = []
    handle = attention.q_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    try:
        for sequence in ids:
            model(sequence[None])
    finally:
        handle.remove()
    return torch.cat(seen).float()


def _common_direction(hidden: Tensor) -> Tensor:
    """The direction (D,) whose product with all hidden states is 1, by regularized least squares."""
    gram = hidden.mT @ hidden
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, hidden.sum(0))


def _search(config: ModelConfig, attention: Attention, head: int, distance: int, longest: int) -> tuple[Tensor, Tensor]:
    """Query and key (H,), before their norms, with the most attention at `distance` among 0 ... longest - 1."""
    generator = torch.Generator().manual_seed(distance)
    H = config.head_dim
    query, key = (torch.randn(H, generator=generator).requires_grad_() for _ in range(2))
    back = rope_angles(config, torch.arange(longest), longest, torch.float32)  # rotations by each distance
    norms = [(attention.q_norm, query), (attention.k_norm, key)]
    optimizer = torch.optim.Adam([query, key], lr=_RATE)
    for _ in range(_STEPS):
        q, k = (norm(part.expand(norm.heads, H))[head] for norm, part in norms)  # (H,)
        scores = (rotate(q.expand(1, longest, 1, H), back) @ k).flatten() / math.sqrt(H)
        loss = -scores.log_softmax(0)[distance]
        query.grad, key.grad = torch.autograd.grad(loss, (query, key))  # not of the norms' weights
        optimizer.step()
    return query.detach(), key.detach()
