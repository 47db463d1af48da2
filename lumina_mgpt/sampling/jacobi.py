"""Speculative Jacobi sampling: a window of draft codes is judged by one forward, and all that is final is kept.

The image has the very distribution that the plain sampler gives it; with the coupling `noise` it is the very image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.sampling import couplings
from lumina_mgpt.sampling.autoregressive import Call, OnRow, Step, check_numbers, draw, opening
from lumina_mgpt.sampling.drafts import BIRTHS
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.sampling.noise import gumbel_rows, uniform_rows
from lumina_mgpt.unirep import ImageLayout


def spare_slots(layout: ImageLayout, window: int) -> int:
    """Cache slots beyond prompt and image that a window of a row which is nearly done may write junk into."""
    return window + window // layout.cols + 1


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
    own pace. The device is waited for once a step.
    """
    B = len(prompts)
    assert B == len(keys), (B, len(keys))
    given = torch.empty((B, 0), dtype=torch.long) if given is None else given
    assert given.shape == (B, layout.given), (given.shape, B, layout.given)
    if layout.given == layout.num_codes:
        return given.view(B, layout.rows, layout.cols).clone()

    call, origin = opening(prompts, layout, given, guided=settings.cfg != 1.0)
    law = code_log_probs(step(*call), settings)[:, 0]
    state = _Images(layout, settings, keys, speculation, origin, law)
    state.start(given, law)
    told = 0
    while True:
        done = state.rows_done()
        if done > told:
            check_numbers(law)
            for row in range(told, done) if on_row is not None else ():
                on_row(row, state.codes[:, : (row + 1) * layout.cols].reshape(B, row + 1, layout.cols).clone())
            told = done
        if done == layout.rows:
            return state.codes.view(B, layout.rows, layout.cols)
        law = code_log_probs(step(*state.window_call()), settings)
        state.judge(law)


@dataclass
class _Images:
    """B images under way. Places are indices of codes in reading order; `done[b]` of image b are final.

    `laws` and `noise` are rings: place p lies at p modulo their length. laws holds what the codes of the last row and
    of the window were drawn from, log-probabilities.
    """

    layout: ImageLayout
    settings: SamplingConfig
    keys: Sequence[tuple[int, int]]
    speculation: Speculation
    origin: Tensor  # (R,) position of image start, on the CPU
    like: Tensor = field(repr=False)  # for its device and dtype

    def __post_init__(self) -> None:
        B, layout, device = len(self.keys), self.layout, self.like.device
        C, N = layout.vocabulary.num_image_codes, layout.num_codes
        self.W = min(self.speculation.window, N)
        self.codes = torch.zeros((B, N), dtype=torch.long, device=device)
        self.done = torch.full((B,), layout.given)  # on the CPU
        self.laws = self.like.new_full((B, layout.cols + self.W, C), -torch.inf)
        self.noise = self.like.new_zeros((B, self.W, C)) if self._noisy else None
        self.visit = 0
        self.forced = layout.ids.to(device)
        self.rows = torch.arange(B, device=device)[:, None]

    @property
    def _noisy(self) -> bool:
        return self.speculation.coupling == "noise" and self.settings.top_k > 1

    def start(self, given: Tensor, law: Tensor) -> None:
        """Takes the given codes, draws the first one and drafts a window behind it. Shapes: law (B, C)."""
        g = self.layout.given
        self.codes[:, :g] = given.to(self.codes.device)
        self.codes[:, g] = draw(law, self.settings, self.keys, [g] * len(self.keys))
        self.laws[:, g % self.laws.shape[1]] = law
        self.done += 1
        self._draft(self.done, self.W, law)
        self.visit += 1  # no random number is used twice: what decides a draft must not have decided what is before it

    def rows_done(self) -> int:
        """Rows that are final in every image."""
        return int(self.done.min()) // self.layout.cols

    def window_call(self) -> Call:
        """The code before each window, the drafts but the last, and the forced ids between them."""
        layout, N = self.layout, self.layout.num_codes
        W = min(self.W, N - int(self.done.min()))
        places = (self.done[:, None] + torch.arange(W)).clamp(max=N - 1)  # beyond the image: read, and then ignored
        slot_of = layout.code_slots
        first = slot_of[self.done - 1]
        reads = (slot_of[places] - 1 - first[:, None]).clamp(min=0)  # an image that is finished looks at its last code
        slots = first[:, None] + torch.arange(int(reads.max()) + 1)
        inside = slots.clamp(max=layout.length - 1).to(self.codes.device)
        ids = self.forced.expand(len(first), -1).clone()
        ids[:, slot_of.to(ids.device)] = layout.vocabulary.code_to_id(self.codes)
        copies = len(self.origin) // len(first)
        positions = self.origin[:, None] + slots.repeat(copies, 1)
        return Call(ids.gather(1, inside).repeat(copies, 1), positions, reads.repeat(copies, 1))

    def judge(self, law: Tensor) -> None:
        """Takes the laws of the window (B, W, C): what is final is kept, the rest is drafted."""
        W, N, device = law.shape[1], self.layout.num_codes, law.device
        places = self.done[:, None] + torch.arange(W)
        real = (places < N).to(device)
        at = places.clamp(max=N - 1).to(device)
        drafts, drafted = self.codes.gather(1, at), self._law_at(at)
        codes, confirmed = self._couple(law, drafted, drafts, at)
        final = torch.cat([confirmed, confirmed.new_zeros(len(confirmed), 1)], 1).int().argmin(1) + 1
        moved = torch.minimum(final.cpu(), (N - self.done).clamp(max=W))  # here a GPU is waited for
        rows = self.rows.expand_as(at)[real]
        self.codes[rows, at[real]] = codes[real]
        self.laws[rows, at[real] % self.laws.shape[1]] = law[real]
        self._draft(self.done + W, moved, law[:, -1])
        self.done = self.done + moved
        self.visit += 1

    def _couple(self, law: Tensor, drafted: Tensor, drafts: Tensor, at: Tensor) -> couplings.Judged:
        if self.speculation.coupling == "noise":
            noise = self.noise[self.rows, at % self.W] if self.noise is not None else None
            return couplings.common_noise(law, drafts, noise)
        W = law.shape[1]
        uniforms = uniform_rows(self.keys, self.done.tolist(), self.visit, 3 * self.W).to(law.device)
        coupling = couplings.maximal if self.speculation.coupling == "maximal" else couplings.independent
        return coupling(law, drafted, drafts, torch.stack([uniforms[:, :W], uniforms[:, self.W : self.W + W]]))

    def _draft(self, first: Tensor, counts: Tensor | int, left: Tensor) -> None:
        """Drafts `counts` new places of each image from `first` on; `left` is the law before them (B, C)."""
        most = int(torch.as_tensor(counts).max())
        ahead = torch.arange(most)
        places = first[:, None] + ahead  # (B, most)
        real = (ahead < torch.as_tensor(counts).reshape(-1, 1)) & (places < self.layout.num_codes)
        if not real.any():
            return
        # The nearest place above that has a law: in a window of several rows the one above may be as young.
        above = places - self.layout.cols * (1 + ahead // self.layout.cols)
        known = (above >= self.layout.given).to(left.device)
        at = places.clamp(max=self.layout.num_codes - 1).to(left.device)
        above_law = torch.where(known[..., None], self._law_at(above.clamp(min=0).to(left.device)), left[:, None])
        law = BIRTHS[self.speculation.birth](above_law, left[:, None].expand_as(above_law))
        codes = self._first_codes(law, places, at, real)
        real = real.to(left.device)
        rows = self.rows.expand_as(at)[real]
        self.codes[rows, at[real]] = codes[real]
        self.laws[rows, at[real] % self.laws.shape[1]] = law[real]

    def _first_codes(self, law: Tensor, places: Tensor, at: Tensor, real: Tensor) -> Tensor:
        if self.speculation.coupling == "noise":
            if self.noise is None:
                return law.argmax(-1)
            B, n, C = law.shape
            keys = [key for key in self.keys for _ in range(n)]
            noise = gumbel_rows(keys, places.flatten().tolist(), C).to(law).view(B, n, C)
            real = real.to(law.device)
            self.noise[self.rows.expand_as(at)[real], at[real] % self.W] = noise[real]
            return (law + noise).argmax(-1)
        uniforms = uniform_rows(self.keys, self.done.tolist(), self.visit, 3 * self.W)[:, 2 * self.W :]
        return couplings.by_inversion(law, uniforms[:, : law.shape[1]].to(law.device))

    def _law_at(self, places: Tensor) -> Tensor:
        return self.laws[self.rows, places % self.laws.shape[1]]
