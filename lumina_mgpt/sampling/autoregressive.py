"""The plain sampler, which samples one code of each image per step.

It is slow and simple. Tests of the speculative sampler compare with its images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import Key, gumbel_like
from lumina_mgpt.unirep import ImageLayout


class Step(Protocol):
    """A model with its cache. A call runs one forward pass on new ids and returns logits of image codes.

    The id of row r at column t is written to cache slot `cache_positions[r, t]`. It attends to the slots up to its own.
    Rows shorter than T are padded on the right. A pad writes to a slot after the end of its row. Later ids of the row
    overwrite this slot before any id attends to it.

    Args:
        ids: new ids of each row, on the CPU in the first call, then on the device of the logits.
        cache_positions: cache slot of each id. On the CPU, so the filled length is known without host synchronization.
        read: columns of `ids` whose logits each row returns, on the CPU.

    Shapes: ids (R, T), cache_positions (R, T), read (R, Q) -> (R, Q, C). R is the number of rows of the model's batch,
    Q the number of columns read per row.
    """

    def __call__(self, ids: Tensor, cache_positions: Tensor, read: Tensor, /) -> Tensor: ...


class Call(NamedTuple):
    """The arguments of one call of `step`."""

    ids: Tensor  # (R, T)
    cache_positions: Tensor  # (R, T)
    read: Tensor  # (R, Q)


OnRow = Callable[[int, Tensor], None]
Kept = Callable[[], Sequence[int] | None]


def sample(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[Key],
    on_row: OnRow | None = None,
    *,
    given: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Samples the codes of one image per prompt. All images have the same layout.

    Calls `step` once with the prompts, then once for each sampled code except the first. The call that feeds the last
    code of a row also feeds the row's end. The image end is never fed. On a GPU the host synchronizes once per row.

    Args:
        step: the model. It gets 2B rows, the conditional ones first, or B rows if `settings.cfg` is 1.
        prompts: B sequences of ids, each up to and including the last turn end before the image.
        layout: forced ids, and the positions of given and of sampled codes.
        settings: guidance, temperature and top-k. The seed is ignored; `keys` holds the seeds.
        keys: one key (seed, repeat) per image. The key and the position of a code determine its noise.
        on_row: called after each complete row with its index `row` and a copy of all codes so far,
            (B, row + 1, cols).
        given: the first `layout.given` codes of each image in reading order, (B, layout.given).
        kept: called before each step but the first. It returns None, or which images of the batch go on: indices of its
            current images, at least one, in ascending order. Then `step` has dropped the rows of the others already.
            Later codes have only the images that go on. An exception that it raises ends the sampling.

    Shapes: -> codes (B, rows, cols), on the device of the logits.

    Raises:
        InputError: a logit is NaN, because half precision overflows or weights are broken. Each row end checks this.
    """
    given = check_given(given, keys, layout, len(prompts))
    if layout.given == layout.num_codes:
        return given.view(len(prompts), layout.rows, layout.cols).clone()
    return collect(sample_codes(step, prompts, layout, settings, keys, given=given, kept=kept), layout, on_row)


@torch.no_grad()
def sample_codes(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[Key],
    *,
    given: Tensor | None = None,
    held: Sequence[int] | None = None,
    stop: int | None = None,
    kept: Kept | None = None,
) -> Iterator[Tensor]:
    """Yields all codes so far after each complete row, and at the end: `sample` as a generator.

    Other arguments, calls of `step` and errors are those of `sample`. At least one code is not given.

    Args:
        held: number of ids that the cache already holds of each conditional row; see `first_call`.
        stop: sample only the first `stop` codes, more than `layout.given` (default: all).

    Shapes: yields (B, n), where n is a multiple of `cols` or `stop`: a view of final codes, for which no kernel starts.
    """
    B, C, stop = len(prompts), layout.vocabulary.num_image_codes, stop or layout.num_codes
    given = check_given(given, keys, layout, B)
    call, origin = first_call(prompts, layout, given, guided=settings.cfg != 1.0, held=held)
    codes: Tensor | None = None
    for position in range(layout.given, stop):
        logits = step(*call)
        assert logits.shape == (len(origin), 1, C), logits.shape
        if codes is None:
            codes = torch.empty((B, layout.num_codes), dtype=torch.long, device=logits.device)
            codes[:, : layout.given] = given
        log_probs = code_log_probs(logits, settings)[:, 0]  # (B, C)
        codes[:, position] = code = draw(log_probs, settings, keys, [position] * len(keys))
        if (position + 1) % layout.cols == 0 or position + 1 == stop:
            check_not_nan(log_probs)
            yield codes[:, : position + 1]
        if position + 1 < stop:
            if kept is not None and (rows := kept()) is not None:
                codes, code, origin = codes[rows], code[rows], origin.view(-1, len(keys))[:, rows].flatten()
                keys = [keys[row] for row in rows]
            call = next_call(code, position, layout, origin)


def collect(rows: Iterator[Tensor], layout: ImageLayout, on_row: OnRow | None) -> Tensor:
    """Returns the last codes that `rows` yields, (B, rows, cols), and calls `on_row` with a copy of each of them.

    Shapes: `rows` yields (B, n), where n is a multiple of `cols`.
    """
    grid: Tensor | None = None
    for codes in rows:
        grid = codes.view(len(codes), -1, layout.cols)
        if on_row is not None:
            on_row(grid.shape[1] - 1, grid.clone())
    assert grid is not None
    return grid


def check_given(given: Tensor | None, keys: Sequence[Key], layout: ImageLayout, B: int) -> Tensor:
    """Returns the given codes (B, layout.given), or an empty tensor (B, 0) for None.

    Asserts the shape of `given`, and that there is one key per image.
    """
    assert len(keys) == B, (len(keys), B)
    given = torch.empty((B, 0), dtype=torch.long) if given is None else given
    assert given.shape == (B, layout.given), (given.shape, B, layout.given)
    return given


def draw(log_probs: Tensor, settings: SamplingConfig, keys: Sequence[Key], positions: Sequence[int]) -> Tensor:
    """Samples one code per row with the Gumbel-max trick. For top_k 1, returns the most probable code of each row.

    Args:
        keys: key of each row, which determines its noise.
        positions: position of each row's code in its image.

    Shapes: log_probs (B, C); keys and positions of length B -> (B,).
    """
    if settings.top_k == 1:
        return log_probs.argmax(-1)
    return (log_probs + gumbel_like(log_probs, keys, positions)).argmax(-1)


def first_call(
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    given: Tensor,
    *,
    guided: bool,
    held: Sequence[int] | None = None,
) -> tuple[Call, Tensor]:
    """Returns the arguments of the first call, which fills the cache, and where the image starts in each row.

    A conditional row has a prompt and the known ids of its image. With guidance, an unconditional row per image
    follows, which has the known ids without the prompt. The call reads the logits at the last id of each row.

    Args:
        held: number of ids that the cache already holds of each conditional row, fewer than the row has: earlier turns
            of a conversation. They are not fed again. The cache holds nothing of use of the unconditional rows, which
            begin at position 0 and overwrite those of an earlier image.

    Shapes: given (B, layout.given) -> a call of R rows, and the cache position of the image start (R,). R is 2B with
    guidance and B without.
    """
    prefix = layout.fill(given.cpu()).tolist()
    rows = [[*prompt, *known] for prompt, known in zip(prompts, prefix, strict=True)] + (prefix if guided else [])
    origin = torch.tensor([len(row) for row in rows]) - layout.prefix_length
    starts = [0] * len(rows) if held is None else [*held, *[0] * (len(rows) - len(held))]
    return prompt_call(rows, starts, layout.vocabulary.bos_id), origin


def prompt_call(rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int) -> Call:
    """Returns the call that feeds each row from its start on, and reads the logits at its last id.

    Args:
        rows: ids of each row from position 0 on.
        starts: number of ids that the cache holds of each row, fewer than the row has.
        pad: id that fills up shorter rows on the right. No id ever attends to it.
    """
    tails = [list(row[start:]) for row, start in zip(rows, starts, strict=True)]
    lengths = torch.tensor([len(tail) for tail in tails])
    longest = int(lengths.max())
    ids = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails])
    return Call(ids, torch.tensor(starts)[:, None] + torch.arange(longest), lengths[:, None] - 1)


def next_call(code: Tensor, position: int, layout: ImageLayout, origin: Tensor) -> Call:
    """Returns the arguments of the call that feeds the code at `position` and the forced ids before the next code.

    Args:
        code: code of each image at `position`.
        position: index of the code in its image, in reading order.
        origin: cache position of the image start in each row of the model.

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
    """Raises InputError if a log-probability is NaN.

    One check per row of the image is enough, because a NaN in the cache makes all later logits NaN.
    """
    if math.isnan(log_probs.amax().item()):  # the largest is NaN if any is
        raise InputError(
            "gives logits that are not numbers; try bf16 or fp32, or download the checkpoint again", "dtype"
        )
