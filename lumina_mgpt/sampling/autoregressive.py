"""The plain sampler, one code a step: slow, obvious, and the oracle of every faster one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import gumbel_rows
from lumina_mgpt.unirep import ImageLayout


class Step(Protocol):
    """The model, as a sampler sees it: feeds ids into a cache that it keeps, and returns logits of image codes.

    Row r's id at `positions[r, t]` is written to the cache slot of that number and sees the slots up to its own. A row
    shorter than T is padded on the right: its pads write junk into slots above its end, which it overwrites before it
    can see them.

    Shapes: ids (R, T), positions (R, T), read (R, Q), the columns of T whose logits are wanted -> (R, Q, C).
    Devices: positions and read are on the CPU, being known in advance, so that a step learns how much of the cache is
    filled without waiting for a device; ids are on the CPU in the first call and then where the logits were.
    """

    def __call__(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor: ...


class Call(NamedTuple):
    """What one `step` is fed."""

    ids: Tensor  # (R, T)
    positions: Tensor  # (R, T)
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
    """Draws the codes of one image a prompt, all of one layout.

    Costs one `step` with the prompts, and one more for each sampled code but the first: a row end rides along with the
    code before it, and the image end is never fed. Nothing waits for the device within a row.

    Args:
        step: the model; handed 2B rows, conditional ones first, or B where `settings.cfg` is 1.
        prompts: B times the ids up to and including the last turn end before the image.
        layout: forced, given and sampled slots.
        settings: guidance, temperature and top-k; its seed is not used here.
        keys: B times (seed, repeat), what an image's noise depends on besides a code's position.
        on_row: called when a row of the image is complete, with its index from 0 and the codes so far (B, row + 1,
            cols), a copy.
        given: the first codes, in reading order, that the user gives (B, layout.given).

    Shapes: -> codes (B, rows, cols), on the logits' device.

    Raises:
        InputError: the logits are not numbers (an overflow in half precision, or broken weights); seen at a row's end.
    """
    B, C = len(prompts), layout.vocabulary.num_image_codes
    assert B == len(keys), (B, len(keys))
    given = check_given(given, layout, B)
    if layout.given == layout.num_codes:
        return given.view(B, layout.rows, layout.cols).clone()

    call, origin = first_call(prompts, layout, given, guided=settings.cfg != 1.0)
    codes: Tensor | None = None
    for index in range(layout.given, layout.num_codes):
        logits = step(*call)
        assert logits.shape == (len(origin), 1, C), logits.shape
        if codes is None:
            codes = torch.empty((B, layout.num_codes), dtype=torch.long, device=logits.device)
            codes[:, : layout.given] = given
        law = code_log_probs(logits, settings)[:, 0]  # (B, C)
        codes[:, index] = code = draw(law, settings, keys, [index] * B)
        if (index + 1) % layout.cols == 0:
            check_not_nan(law)
            if on_row is not None:
                rows = (index + 1) // layout.cols
                on_row(rows - 1, codes[:, : index + 1].reshape(B, rows, layout.cols).clone())
        if index + 1 < layout.num_codes:
            call = next_call(code, index, layout, origin)
    assert codes is not None
    return codes.view(B, layout.rows, layout.cols)


def check_given(given: Tensor | None, layout: ImageLayout, B: int) -> Tensor:
    """The given codes (B, layout.given), checked; none where there are none."""
    given = torch.empty((B, 0), dtype=torch.long) if given is None else given
    assert given.shape == (B, layout.given), (given.shape, B, layout.given)
    return given


def draw(law: Tensor, settings: SamplingConfig, keys: Sequence[tuple[int, int]], positions: Sequence[int]) -> Tensor:
    """One code a row by the Gumbel-max trick; the likeliest one where top_k is 1, whatever the noise.

    Shapes: law (B, C), log-probabilities; keys and positions of length B -> (B,).
    """
    if settings.top_k == 1:
        return law.argmax(-1)
    noise = gumbel_rows(keys, positions, law.shape[-1]).to(law.dtype)
    if law.is_cuda:
        noise = noise.pin_memory()  # else the copy waits for the device
    return (law + noise.to(law.device, non_blocking=True)).argmax(-1)


def first_call(
    prompts: Sequence[Sequence[int]], layout: ImageLayout, given: Tensor, *, guided: bool
) -> tuple[Call, Tensor]:
    """The first call: each prompt with the known beginning of its image, then, with guidance, that beginning alone.

    Shapes: given (B, layout.given) -> a call of R rows that reads the last id of each, and origin (R,), the position of
    image start in each row.
    """
    prefix = layout.fill(given.cpu()).tolist()
    rows = [[*prompt, *known] for prompt, known in zip(prompts, prefix, strict=True)] + (prefix if guided else [])
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    pad = layout.vocabulary.bos_id  # any id will do
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest).expand(len(rows), longest)
    return Call(ids, positions, lengths[:, None] - 1), lengths - layout.prefix_length


def next_call(code: Tensor, index: int, layout: ImageLayout, origin: Tensor) -> Call:
    """The call after the code with that index: it, and the forced ids up to the next code.

    Shapes: code (B,), origin (R,) with R a multiple of B -> a call of R rows.
    """
    first, stop = layout.offset_of(index), layout.offset_of(index + 1)
    R, T = len(origin), stop - first
    ids = code.new_empty((R, T))
    ids[:, 0] = (code + layout.vocabulary.code_slice.start).repeat(R // len(code))
    for column, forced in enumerate(layout.ids[first + 1 : stop].tolist(), start=1):
        ids[:, column] = forced
    return Call(ids, origin[:, None] + torch.arange(first, stop), torch.full((R, 1), T - 1))


def check_not_nan(law: Tensor) -> None:
    """Raises InputError where there is none. Once a row is enough: what is not a number in the cache stays there."""
    if law.isnan().any():
        raise InputError("--dtype gives logits that are not numbers; try bf16 or fp32, or fetch the checkpoint again")
