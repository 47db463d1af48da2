"""Speculative Jacobi sampling: a window of draft codes is judged by one forward, and all that is final is kept.

The image has the very distribution that the plain sampler gives it; with the coupling `noise` it is the very image, as
far as rounding lets a window and a single step agree: in float32 but for near ties, in half precision seldom.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.sampling import couplings
from lumina_mgpt.sampling.autoregressive import Call, OnRow, Step, check_not_nan, check_given, draw, first_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import gumbel_rows, uniform_rows
from lumina_mgpt.sampling.proposals import PROPOSAL_FUNCTIONS
from lumina_mgpt.unirep import ImageLayout


def spare_slots(layout: ImageLayout, window: int) -> int:
    """Cache slots beyond prompt and image that a window of a row which is nearly done may write junk into."""
    window = min(window, layout.num_codes)
    return window + window // layout.cols + 1


def ring_bytes(layout: ImageLayout, speculation: Speculation) -> int:
    """Bytes that one image's laws and noise take, in float32."""
    window = min(speculation.window, layout.num_codes)
    places = layout.cols + window + 1 + (window + 1 if speculation.coupling == "noise" else 0)
    return 4 * places * layout.vocabulary.num_image_codes


@torch.no_grad()
def sample_jacobi(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    keys: Sequence[tuple[int, int]],
    speculation: Speculation,
    on_row: OnRow | None = None,
    *,
    given: Tensor | None = None,
) -> Tensor:
    """Draws the codes of one image a prompt; arguments, shapes and errors are those of `sample`.

    Costs one `step` with the prompts, which gives the first code, and then one step a window. Each image goes on at its
    own pace. A GPU is waited for once a step, to learn how much was accepted.
    """
    B = len(prompts)
    assert B == len(keys), (B, len(keys))
    given = check_given(given, layout, B)
    if layout.given == layout.num_codes:
        return given.view(B, layout.rows, layout.cols).clone()

    call, origin = first_call(prompts, layout, given, guided=settings.cfg != 1.0)
    law = code_log_probs(step(*call), settings)[:, 0]
    state = _Images(layout, settings, keys, speculation, origin, law)
    state.start(given, law)
    told = layout.given // layout.cols
    while True:
        done = state.rows_done()
        if done > told:
            check_not_nan(law)
            for row in range(told, done) if on_row is not None else ():
                on_row(row, state.codes[:, : (row + 1) * layout.cols].reshape(B, row + 1, layout.cols).clone())
            told = done
        if done == layout.rows:
            return state.codes[:, : layout.num_codes].reshape(B, layout.rows, layout.cols)
        law = code_log_probs(step(*state.window_call()), settings)
        state.judge(law)


@dataclass
class _Images:
    """B images under way. Places are indices of codes in reading order; `done[b]` of image b are final.

    `laws` and `noise` are rings: place p lies at p modulo their length. laws holds what the codes of the last row and
    of the window were drawn from, log-probabilities. Everything has one column more, where places beyond the image go:
    that costs nothing, while picking out the real ones would make a GPU wait.
    """

    layout: ImageLayout
    settings: SamplingConfig
    keys: Sequence[tuple[int, int]]
    speculation: Speculation
    origin: Tensor  # (R,) position of image start, on the CPU
    like: Tensor = field(repr=False)  # for its device and dtype

    def __post_init__(self) -> None:
        B, layout, device = len(self.keys), self.layout, self.like.device
        C, self.N = layout.vocabulary.num_image_codes, layout.num_codes
        self.W = min(self.speculation.window, self.N)
        self.codes = torch.zeros((B, self.N + 1), dtype=torch.long, device=device)
        self.done = torch.full((B,), layout.given)  # on the CPU
        self.laws = self.like.new_full((B, layout.cols + self.W + 1, C), -torch.inf)
        noisy = self.speculation.coupling == "noise" and self.settings.top_k > 1
        self.noise = self.like.new_zeros((B, self.W + 1, C)) if noisy else None
        self.visit = 0
        self.forced, self.code_offsets = layout.ids.to(device), layout.code_offsets.to(device)
        self.rows = torch.arange(B, device=device)[:, None]

    def start(self, given: Tensor, law: Tensor) -> None:
        """Takes the given codes, draws the first one and drafts a window behind it. Shapes: law (B, C)."""
        g = self.layout.given
        self.codes[:, :g] = given.to(self.codes.device)
        self.codes[:, g] = draw(law, self.settings, self.keys, [g] * len(self.keys))
        self.laws[:, g % (self.laws.shape[1] - 1)] = law
        self.done += 1
        self._draft(self.done, torch.full_like(self.done, self.W), law)
        self.visit += 1  # no random number is used twice: what decides a draft must not have decided what is before it

    def rows_done(self) -> int:
        """Rows that are final in every image."""
        return int(self.done.min()) // self.layout.cols

    def window_call(self) -> Call:
        """The code before each window, the drafts but the last, and the forced ids between them."""
        layout, offset_of = self.layout, self.layout.code_offsets
        W = min(self.W, self.N - int(self.done.min()))
        places = (self.done[:, None] + torch.arange(W)).clamp(max=self.N - 1)  # beyond: read, ignored
        first = offset_of[self.done - 1]
        reads = (offset_of[places] - 1 - first[:, None]).clamp(min=0)  # an image that is finished looks at its last code
        slots = first[:, None] + torch.arange(int(reads.max()) + 1)
        inside = slots.clamp(max=layout.length - 1).to(self.codes.device, non_blocking=True)
        ids = self.forced.expand(len(first), -1).clone()
        ids[:, self.code_offsets] = self.codes[:, : self.N] + layout.vocabulary.code_slice.start
        copies = len(self.origin) // len(first)
        positions = self.origin[:, None] + slots.repeat(copies, 1)
        return Call(ids.gather(1, inside).repeat(copies, 1), positions, reads.repeat(copies, 1))

    def judge(self, law: Tensor) -> None:
        """Takes the laws of the window (B, W, C): what is final is kept, the rest is drafted."""
        W = law.shape[1]
        places = self.done[:, None] + torch.arange(W)
        at = places.clamp(max=self.N).to(law.device, non_blocking=True)
        codes, confirmed = self._couple(law, self.codes.gather(1, at), places)
        final = (confirmed.int().cumprod(1).sum(1) + 1).clamp(max=W)
        self.codes[self.rows, at] = codes
        self.laws[self.rows, self._ring(places, self.laws)] = law
        moved = torch.minimum(final, self.N - self.done)
        self._draft(self.done + W, moved, law[:, -1])
        self.done = self.done + moved
        self.visit += 1

    def _couple(self, law: Tensor, drafts: Tensor, places: Tensor) -> couplings.Judged:
        if self.speculation.coupling == "noise":
            noise = None if self.noise is None else self.noise[self.rows, self._ring(places, self.noise)]
            return couplings.common_noise(law, drafts, noise)
        drafted = self.laws[self.rows, self._ring(places, self.laws)]
        W = law.shape[1]
        uniforms = uniform_rows(self.keys, self.done.tolist(), self.visit, 3 * self.W)
        judge = couplings.maximal if self.speculation.coupling == "maximal" else couplings.independent
        return judge(law, drafted, drafts, torch.stack([uniforms[:, :W], uniforms[:, self.W : self.W + W]]))

    def _draft(self, first: Tensor, counts: Tensor, left: Tensor) -> None:
        """Drafts `counts` new places of each image from `first` on; `left` is the law before them (B, C)."""
        counts = torch.minimum(counts, self.N - first).clamp(min=0)
        ahead = torch.arange(int(counts.max()))
        if not len(ahead):
            return
        places = torch.where(ahead < counts[:, None], first[:, None] + ahead, self.N)  # (B, most)
        # The nearest place above that has a law: in a window of several rows the one above may be as young.
        above = places - self.layout.cols * (1 + ahead // self.layout.cols)
        above_law = self.laws[self.rows, self._ring(above.clamp(min=0), self.laws)]
        known = (above >= self.layout.given).to(left.device, non_blocking=True)
        law = PROPOSAL_FUNCTIONS[self.speculation.proposal](torch.where(known[..., None], above_law, left[:, None]))
        at = places.to(left.device, non_blocking=True)
        self.codes[self.rows, at] = self._first_codes(law, places)
        self.laws[self.rows, self._ring(places, self.laws)] = law

    def _first_codes(self, law: Tensor, places: Tensor) -> Tensor:
        if self.speculation.coupling != "noise":
            uniforms = uniform_rows(self.keys, self.done.tolist(), self.visit, 3 * self.W)[:, 2 * self.W :]
            return couplings.by_inversion(couplings.probs(law), uniforms[:, : law.shape[1]])
        if self.noise is None:
            return law.argmax(-1)
        B, n, C = law.shape
        keys = [key for key in self.keys for _ in range(n)]
        noise = gumbel_rows(keys, places.flatten().tolist(), C).to(law.dtype).view(B, n, C)
        if law.is_cuda:
            noise = noise.pin_memory()  # else the copy waits for the device
        noise = noise.to(law.device, non_blocking=True)
        self.noise[self.rows, self._ring(places, self.noise)] = noise
        return (law + noise).argmax(-1)

    def _ring(self, places: Tensor, ring: Tensor) -> Tensor:
        """Where places (B, n) lie in a ring."""
        last = ring.shape[1] - 1
        return torch.where(places < self.N, places % last, last).to(ring.device, non_blocking=True)
