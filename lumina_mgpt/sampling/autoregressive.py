"""The plain sampler: one code a step. Slow and simple, it is the oracle of the speculative sampler."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import gumbel_like
from lumina_mgpt.unirep import ImageLayout


class Step(Protocol):
    """A model with its cache: runs one forward on new ids and returns logits of image codes.

    The id of row r at column t is written to cache slot `cache_positions[r, t]` and attends to the slots up to its own.
    Rows shorter than T are padded on the right. Padding writes to slots after the end of its row, which later ids
    overwrite before any id attends to them.

    Args:
        ids: on the CPU in the first call, then on the device of the logits.
        cache_positions: on the CPU, so that the filled length of the cache is known without host synchronization.
        read: columns of T to return logits for, on the CPU.

    Shapes: ids (R, T), cache_positions (R, T), read (R, Q) -> (R, Q, C).
    """

    def __call__(self, ids: Tensor, cache_positions: Tensor, read: Tensor, /) -> Tensor: ...


class Call(NamedTuple):
    """Arguments of one `step`."""

    ids: Tensor  # (R, T)
    cache_positions: Tensor  # (R, T)
    read: Tensor  # (R, Q)


OnRow = Callable[[int, Tensor], None]


@torch.no_grad()
def sample(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[tuple[int, int]],
    on_row: OnRow | None = None,
    *,
    given: Tensor | None = None,
) -> Tensor:
    """Samples the codes of one image for each prompt; all images have the same layout.

    Calls `step` once with the prompts and once more for each sampled code except the first. Each row end is fed with
    the code before it; the image end is never fed. On a GPU the host synchronizes once a row.

    Args:
        step: the model; it gets 2B rows, conditional ones first, or B rows where `settings.cfg` is 1.
        prompts: B sequences of ids up to and including the last turn end before the image.
        layout: forced ids, and the given and sampled positions.
        settings: guidance, temperature and top-k; the seed is not used.
        keys: B times (seed, repeat). With a code's position, they determine its noise.
        on_row: called with each complete row: its index and a copy of the codes so far, (B, row + 1, cols).
        given: the first codes in reading order, (B, layout.given).

    Shapes: -> codes (B, rows, cols), on the device of the logits.

    Raises:
        InputError: a logit is NaN, by an overflow in half precision or broken weights; checked at the end of each row.
    """
    B, C = len(prompts), layout.vocabulary.num_image_codes
    given = check_given(given, keys, layout, B)
    if layout.given == layout.num_codes:
        return given.view(B, layout.rows, layout.cols).clone()

    call, origin = first_call(prompts, layout, given, guided=settings.cfg != 1.0)
    codes: Tensor | None = None
    for position in range(layout.given, layout.num_codes):
        logits = step(*call)
        assert logits.shape == (len(origin), 1, C), logits.shape
        if codes is None:
            codes = torch.empty((B, layout.num_codes), dtype=torch.long, device=logits.device)
            codes[:, : layout.given] = given
        log_probs = code_log_probs(logits, settings)[:, 0]  # (B, C)
        codes[:, position] = code = draw(log_probs, settings, keys, [position] * B)
        if (position + 1) % layout.cols == 0:
            check_not_nan(log_probs)
            if on_row is not None:
                rows = (position + 1) // layout.cols
                on_row(rows - 1, codes[:, : position + 1].reshape(B, rows, layout.cols).clone())
        if position + 1 < layout.num_codes:
            call = next_call(code, position, layout, origin)
    assert codes is not None
    return codes.view(B, layout.rows, layout.cols)


def check_given(given: Tensor | None, keys: Sequence[tuple[int, int]], layout: ImageLayout, B: int) -> Tensor:
    """The given codes (B, layout.given), or an empty tensor for None; asserts their shape and one key an image."""
    assert len(keys) == B, (len(keys), B)
    given = torch.empty((B, 0), dtype=torch.long) if given is None else given
    assert given.shape == (B, layout.given), (given.shape, B, layout.given)
    return given


def draw(
    log_probs: Tensor, settings: SamplingConfig, keys: Sequence[tuple[int, int]], positions: Sequence[int]
) -> Tensor:
    """Samples one code a row with the Gumbel-max trick; for top_k 1 the most probable code, without noise.

    Shapes: log_probs (B, C); keys and positions of length B -> (B,).
    """
    if settings.top_k == 1:
        return log_probs.argmax(-1)
    return (log_probs + gumbel_like(log_probs, keys, positions)).argmax(-1)


def first_call(
    prompts: Sequence[Sequence[int]], layout: ImageLayout, given: Tensor, *, guided: bool
) -> tuple[Call, Tensor]:
    """The call that fills the cache: prompts with the known ids of their images, and unconditional rows with guidance.

    An unconditional row is the image without its prompt.

    Shapes: given (B, layout.given) -> a call of R rows that reads the last id of each, and origin (R,), the cache
    position of image start in each row.
    """
    prefix = layout.fill(given.cpu()).tolist()
    rows = [[*prompt, *known] for prompt, known in zip(prompts, prefix, strict=True)] + (prefix if guided else [])
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    pad = layout.vocabulary.bos_id  # never attended to
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    cache_positions = torch.arange(longest).expand(len(rows), longest)
    return Call(ids, cache_positions, lengths[:, None] - 1), lengths - layout.prefix_length


def next_call(code: Tensor, position: int, layout: ImageLayout, origin: Tensor) -> Call:
    """The call after the code at `position`: that code, and the forced ids up to the next code.

    Shapes: code (B,), origin (R,) with R a multiple of B -> a call of R rows.
    """
    first, stop = layout.offset_of(position), layout.offset_of(position + 1)
    R, T = len(origin), stop - first
    ids = code.new_empty((R, T))
    ids[:, 0] = (code + layout.vocabulary.code_slice.start).repeat(R // len(code))
    for column, forced in enumerate(layout.ids[first + 1 : stop].tolist(), start=1):
        ids[:, column] = forced
    return Call(ids, origin[:, None] + torch.arange(first, stop), torch.full((R, 1), T - 1))


def check_not_nan(log_probs: Tensor) -> None:
    """Raises InputError for NaN. Once a row is enough, because a NaN in the cache makes all later logits NaN."""
    if log_probs.isnan().any():
        raise InputError(
            "gives logits that are not numbers; try bf16 or fp32, or download the checkpoint again", "dtype"
        )
