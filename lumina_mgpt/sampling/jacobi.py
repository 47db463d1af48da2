"""Speculative Jacobi sampling: each round verifies a window of drafts in one forward pass.

All codes up to and including the first rejected position become final. Images have the same distribution as those of
the plain sampler. With the coupling `noise` they are even identical, up to rounding. The logits of a window and those
of a single step round differently. This changes a code at near ties in float32, and more often in half precision.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.sampling import couplings
from lumina_mgpt.sampling.autoregressive import (
    Call,
    Kept,
    OnRow,
    Step,
    check_given,
    check_not_nan,
    collect,
    draw,
    first_call,
)
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import Key, gumbel_like, uniform_rows
from lumina_mgpt.sampling.proposals import PROPOSAL_FUNCTIONS
from lumina_mgpt.unirep import ImageLayout


def window_size(layout: ImageLayout, speculation: Speculation) -> int:
    """Returns the number of drafts per round and image: `speculation.window`, or all codes if the image has fewer."""
    assert speculation.window is not None, "a sampler needs a window"
    return min(speculation.window, layout.num_codes)


def spare_slots(layout: ImageLayout, window: int) -> int:
    """Returns the number of cache slots needed after the end of the image.

    The window of a nearly complete image extends past the end of the image and writes to these slots.
    """
    window = min(window, layout.num_codes)
    return window + window // layout.cols + 1


def window_ids(layout: ImageLayout, window: int) -> int:
    """Returns the largest number of ids that a round feeds: a final code, drafts, and forced ids between them."""
    ahead = min(window, layout.num_codes - 1)
    return int((layout.code_offsets[ahead:] - layout.code_offsets[: layout.num_codes - ahead]).max())


def ring_bytes(layout: ImageLayout, speculation: Speculation) -> int:
    """Returns the bytes of the float32 ring buffers that hold the proposals and the noise of one image."""
    window = window_size(layout, speculation)
    length = layout.cols + window + 1 + (window + 1 if speculation.coupling == "noise" else 0)
    return 4 * length * layout.vocabulary.num_image_codes


def sample_jacobi(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[Key],
    speculation: Speculation,
    on_row: OnRow | None = None,
    *,
    given: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """Samples the codes of one image per prompt.

    Other arguments, shapes and errors are those of `autoregressive.sample`. The function calls `step` once with the
    prompts, which gives the first code, and then once per round. The images of a batch advance independently. On a GPU
    the host synchronizes once per round, to read which drafts are accepted.

    Args:
        speculation: coupling, window and proposal distribution. The window must not be None.
    """
    given = check_given(given, keys, layout, len(prompts))
    if layout.given == layout.num_codes:
        return given.view(len(prompts), layout.rows, layout.cols).clone()
    codes = jacobi_codes(step, prompts, layout, settings, keys, speculation, given=given, kept=kept)
    return collect(codes, layout, on_row)


@torch.no_grad()
def jacobi_codes(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[Key],
    speculation: Speculation,
    *,
    given: Tensor | None = None,
    held: Sequence[int] | None = None,
    stop: int | None = None,
    kept: Kept | None = None,
) -> Iterator[Tensor]:
    """Yields all codes so far after each row that is final in every image, and at the end.

    Arguments are those of `sample_jacobi` and of `autoregressive.sample_codes`. At least one code is not given.

    Shapes: yields (B, n), where n is a multiple of `cols` or `stop`: a view of final codes, for which no kernel starts.
    """
    stop = stop or layout.num_codes
    given = check_given(given, keys, layout, len(prompts))
    call, origin = first_call(prompts, layout, given, guided=settings.cfg != 1.0, held=held)
    log_probs = code_log_probs(step(*call), settings)  # (B, 1, C)
    state = _State(layout, settings, keys, speculation, origin, log_probs[:, 0])
    state.start(given, log_probs[:, 0])
    reported = layout.given // layout.cols
    while True:
        final = min(int(state.final.min()), stop)
        if (rows := final // layout.cols) > reported:
            check_not_nan(log_probs)
            for row in range(reported, rows):
                yield state.codes[:, : (row + 1) * layout.cols]
            reported = rows
        if final == stop:
            if stop % layout.cols:
                check_not_nan(log_probs)
                yield state.codes[:, :stop]
            return
        if kept is not None and (going_on := kept()) is not None:
            state.keep(going_on)
            continue  # the images that go on may have more final rows, or be complete
        log_probs = code_log_probs(step(*state.window_call()), settings)  # (B, W, C)
        state.verify(log_probs)


class _State:
    """The codes of B images between rounds.

    A position is the index of a code in reading order. The first `final[b]` codes of image b are final, the W after
    them are drafts.

    `proposals` and `noise` are ring buffers: position p has index p modulo their length less 1. `proposals` holds the
    log-probabilities that the codes of the last row and of the window were drawn from. The last column of each buffer
    takes writes of positions after the end of the image: masking them would need a host synchronization.

    Shapes: codes (B, N + 1), proposals (B, cols + W + 1, C), noise (B, W + 1, C); final (B,) on the CPU.
    """

    def __init__(
        self,
        layout: ImageLayout,
        settings: SamplingConfig,
        keys: Sequence[Key],
        speculation: Speculation,
        origin: Tensor,
        like: Tensor,
    ) -> None:
        """Makes the buffers.

        Args:
            origin: cache position of image start in each row of the model, (R,) on the CPU.
            like: log-probabilities, for their device and dtype.
        """
        self.layout, self.settings, self.keys = layout, settings, keys
        self.speculation, self.origin = speculation, origin
        B, device = len(keys), like.device
        C, self.N = layout.vocabulary.num_image_codes, layout.num_codes
        self.W = window_size(layout, speculation)
        self.codes = torch.zeros((B, self.N + 1), dtype=torch.long, device=device)
        self.final = torch.full((B,), layout.given)
        self.proposals = like.new_full((B, layout.cols + self.W + 1, C), -torch.inf)
        noisy = speculation.coupling == "noise" and settings.top_k > 1
        self.noise = like.new_zeros((B, self.W + 1, C)) if noisy else None
        self.round = 0
        self.forced, self.code_offsets = layout.ids.to(device), layout.code_offsets.to(device)
        self.rows = torch.arange(B, device=device)[:, None]

    def start(self, given: Tensor, log_probs: Tensor) -> None:
        """Takes the given codes, samples the first code after them and drafts a window. Shapes: log_probs (B, C)."""
        first = self.layout.given
        self.codes[:, :first] = given.to(self.codes.device)
        self.codes[:, first] = draw(log_probs, self.settings, self.keys, [first] * len(self.keys))
        self.proposals[:, first % (self.proposals.shape[1] - 1)] = log_probs
        self.final += 1
        self._draft(self.final, torch.full_like(self.final, self.W), log_probs)
        self.round += 1  # verification must not use the random numbers that drew the drafts

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all images but `rows`, which are indices of images in ascending order."""
        self.origin = self.origin.view(-1, len(self.keys))[:, rows].flatten()
        self.keys = [self.keys[row] for row in rows]
        self.codes, self.final, self.proposals = self.codes[rows], self.final[rows], self.proposals[rows]
        self.noise = None if self.noise is None else self.noise[rows]
        self.rows = self.rows[: len(rows)]

    def window_call(self) -> Call:
        """The call of a round: the last final code, all drafts but the last, and the forced ids between them."""
        layout, offsets = self.layout, self.layout.code_offsets
        W = min(self.W, self.N - int(self.final.min()))
        positions = (self.final[:, None] + torch.arange(W)).clamp(max=self.N - 1)  # after the image: read, unused
        first = offsets[self.final - 1]  # (B,)
        reads = (offsets[positions] - 1 - first[:, None]).clamp(min=0)  # a complete image reads its last code
        fed = first[:, None] + torch.arange(int(reads.max()) + 1)  # (B, T) offsets in the image
        inside = fed.clamp(max=layout.length - 1).to(self.codes.device, non_blocking=True)
        ids = self.forced.expand(len(first), -1).clone()
        ids[:, self.code_offsets] = self.codes[:, : self.N] + layout.vocabulary.code_slice.start
        copies = len(self.origin) // len(first)
        cache_positions = self.origin[:, None] + fed.repeat(copies, 1)
        return Call(ids.gather(1, inside).repeat(copies, 1), cache_positions, reads.repeat(copies, 1))

    def verify(self, target: Tensor) -> None:
        """Verifies the window's drafts, and drafts as many new positions as became final.

        Shapes: target (B, W, C) log-probabilities.
        """
        W = target.shape[1]
        positions = self.final[:, None] + torch.arange(W)
        columns = positions.clamp(max=self.N).to(target.device, non_blocking=True)
        codes, accepted = self._couple(target, self.codes.gather(1, columns), positions)
        advance = (accepted.int().cumprod(1).sum(1) + 1).clamp(max=W)  # accepted drafts, and the first rejected one
        self.codes[self.rows, columns] = codes
        self.proposals[self.rows, self._ring_index(positions, self.proposals)] = target
        advance = torch.minimum(advance, self.N - self.final)
        self._draft(self.final + W, advance, target[:, -1])
        self.final = self.final + advance
        self.round += 1

    def _couple(self, target: Tensor, drafts: Tensor, positions: Tensor) -> couplings.Verified:
        if self.speculation.coupling == "noise":
            noise = None if self.noise is None else self.noise[self.rows, self._ring_index(positions, self.noise)]
            return couplings.common_noise(target, drafts, noise)
        proposal = self.proposals[self.rows, self._ring_index(positions, self.proposals)]
        coupling = couplings.maximal if self.speculation.coupling == "maximal" else couplings.independent
        return coupling(target, proposal, drafts, self._uniforms()[:2, :, : target.shape[1]])

    def _draft(self, first: Tensor, counts: Tensor, previous: Tensor) -> None:
        """Drafts `counts` positions of each image from `first` on.

        Shapes: first, counts (B,); previous (B, C), the log-probabilities of the code before `first`.
        """
        counts = torch.minimum(counts, self.N - first).clamp(min=0)
        ahead = torch.arange(int(counts.max()))
        if not len(ahead):
            return
        positions = torch.where(ahead < counts[:, None], first[:, None] + ahead, self.N)  # (B, n)
        # The nearest position above with log-probabilities: in a window of several rows the next one above has none.
        above = positions - self.layout.cols * (1 + ahead // self.layout.cols)
        of_above = self.proposals[self.rows, self._ring_index(above.clamp(min=0), self.proposals)]
        known = (above >= self.layout.given).to(previous.device, non_blocking=True)
        above_or_previous = torch.where(known[..., None], of_above, previous[:, None])
        proposal = PROPOSAL_FUNCTIONS[self.speculation.proposal](above_or_previous)
        columns = positions.to(previous.device, non_blocking=True)
        self.codes[self.rows, columns] = self._sample_drafts(proposal, positions)
        self.proposals[self.rows, self._ring_index(positions, self.proposals)] = proposal

    def _sample_drafts(self, proposal: Tensor, positions: Tensor) -> Tensor:
        """Drafts from the proposal distribution. Shapes: proposal (B, n, C), positions (B, n) -> (B, n)."""
        B, n, C = proposal.shape
        if self.speculation.coupling != "noise":
            return couplings.sample_by_inversion(couplings.to_probs(proposal), self._uniforms()[2, :, :n])
        if self.noise is None:
            return proposal.argmax(-1)
        keys = [key for key in self.keys for _ in range(n)]
        noise = gumbel_like(proposal.reshape(B * n, C), keys, positions.flatten().tolist()).view(B, n, C)
        self.noise[self.rows, self._ring_index(positions, self.noise)] = noise
        return (proposal + noise).argmax(-1)

    def _uniforms(self) -> Tensor:
        """Uniform numbers of this round, for acceptance, residual and drafts. Shapes: -> (3, B, W) on the CPU."""
        uniforms = uniform_rows(self.keys, self.final.tolist(), self.round, 3 * self.W)
        return uniforms.unflatten(1, (3, self.W)).movedim(1, 0)

    def _ring_index(self, positions: Tensor, ring: Tensor) -> Tensor:
        """Indices of positions (B, n) in a ring buffer (B, length, C), on its device."""
        last = ring.shape[1] - 1
        return torch.where(positions < self.N, positions % last, last).to(ring.device, non_blocking=True)
