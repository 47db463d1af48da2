"""Stages `parity` and `flash`: logits and images of a small checkpoint on the device, compared with the CPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from near_ties import near_tie
from torch import Tensor

from gpu_check.check import Check
from lumina_mgpt import prompt_files, resources
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.sampling.autoregressive import first_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.unirep import ImageLayout

CPU = torch.device("cpu")
KEY = (3, 0)  # seed and repeat
WAYS: dict[str, tuple[dict, Speculation | None]] = {
    "greedy image": ({"top_k": 1}, None),
    "sampled image": ({"top_k": 100}, None),
    "speculative image, window 8": ({"top_k": 100}, Speculation("noise", 8)),
    "speculative image, window 64": ({"top_k": 100}, Speculation("noise", 64)),
}
_CHUNKS = (1, 1, 2, 30, 64)  # ids of the steps after the prompt; later steps have as many as the last
_WIDEST = Speculation("noise", 64)
FP32_ERROR = 1e-4  # of the logits' standard deviation; a CPU in float32 has 1e-6
SHARE = 0.05  # the share of equal codes may be lower than a CPU's by this
TIE = 1e-3  # difference of two log-probabilities, with noise, that float32 may reverse


@dataclass
class Reference:
    """A checkpoint on the CPU, and what it computes there.

    Attributes:
        exact: the pipeline in float64.
        images: codes in float32 by the keys of WAYS.
        codes: codes that the logits are conditioned on.
        logits: in float64.
        bf16_error: error of a CPU's logits in bfloat16.
        bf16_share: share of positions where the most probable code in bfloat16 is that of float64.
    """

    exact: Pipeline
    prompt: str
    layout: ImageLayout
    images: dict[str, Tensor]
    codes: Tensor
    logits: Tensor
    bf16_error: float
    bf16_share: float

    @classmethod
    def of(cls, folder: Path, side: int = 96) -> "Reference":
        """Computes the reference of images of at most `side` pixels: in float64, larger ones would take minutes."""
        checkpoint = Checkpoint.open(folder)
        prompt = prompt_files.example_prompts(folder)[0]
        side = min(side, checkpoint.config.base_size)
        layout = checkpoint.layout(side, side)
        exact, plain, narrow = (
            Pipeline.from_pretrained(checkpoint, CPU, dtype) for dtype in (torch.float64, "fp32", "bf16")
        )
        images = {name: image(plain, prompt, layout, name) for name in WAYS}
        codes = images["greedy image"]
        logits = image_logits(exact, prompt, layout, codes)
        rounded = image_logits(narrow, prompt, layout, codes)
        error, share = error_of(rounded, logits), share_of(rounded, logits)
        return cls(exact, prompt, layout, images, codes, logits, error, share)

    def logits_of(self, pipeline: Pipeline) -> Tensor:
        return image_logits(pipeline, self.prompt, self.layout, self.codes)


def image(pipeline: Pipeline, prompt: str, layout: ImageLayout, way: str) -> Tensor:
    """Returns the codes of one image, sampled as WAYS says. Shapes: -> (rows, cols)."""
    settings, speculation = WAYS[way]
    starts = pipeline.checkpoint.prompt_ids([prompt], layout)
    sampling = SamplingConfig(seed=KEY[0], **settings)
    return pipeline.sample(starts, layout, sampling, [KEY[1]], speculation=speculation)[0]


@torch.no_grad()
def image_logits(pipeline: Pipeline, prompt: str, layout: ImageLayout, codes: Tensor) -> Tensor:
    """Returns the logits of codes at all positions of an image with these codes, with and without its prompt.

    The steps have different widths, so that all shapes of attention and cache are used.

    Shapes: codes (rows, cols) -> (2, positions, C) float64 on the CPU.
    """
    starts = pipeline.checkpoint.prompt_ids([prompt], layout)
    step = pipeline.make_step(starts, layout, SamplingConfig(), _WIDEST)
    call, origin = first_call(starts, layout, torch.empty((1, 0), dtype=torch.long), guided=True)
    known = replace(layout, given=layout.num_codes - 1).fill(codes.flatten()[None, :-1])[0]
    at, found = layout.prefix_length, [step(*call)]
    while at < len(known):
        ids = known[at : at + _CHUNKS[min(len(found), len(_CHUNKS)) - 1]]
        positions = origin[:, None] + torch.arange(at, at + len(ids))
        read = torch.arange(len(ids)).expand(2, -1)
        found.append(step(ids.expand(2, -1).to(pipeline.device), positions, read))
        at += len(ids)
    return torch.cat([logits.cpu().double() for logits in found], 1)


def error_of(logits: Tensor, exact: Tensor) -> float:
    """Returns the root mean square of the difference, relative to the standard deviation of the exact logits."""
    return float((logits - exact).square().mean().sqrt() / exact.std())


def share_of(logits: Tensor, exact: Tensor) -> float:
    """Returns the share of positions where both have the same most probable code, with guidance."""
    settings = SamplingConfig(top_k=logits.shape[-1])
    ours, theirs = (code_log_probs(part, settings).argmax(-1) for part in (logits, exact))
    return float((ours == theirs).double().mean())


def parity(check: Check) -> None:
    """Compares the demo, and a first-generation checkpoint if one is given."""
    with check.part("demo"):
        compare(check, "demo", resources.demo_checkpoint())
    folder = check.setup.first_generation
    if folder is None:
        check.leave_out("first generation", "no folder given (--first_generation)")
    elif check.has("first generation", 15):
        with check.part("first generation"):
            compare(check, "first_generation", folder)


def compare(check: Check, name: str, folder: Path) -> None:
    """Records logits and images of one checkpoint on the device, against the CPU."""
    reference, device = Reference.of(folder, 64 if check.setup.small else 96), check.device
    label = name.replace("_", " ")
    pipeline = Pipeline.from_pretrained(folder, device, "fp32")
    error = error_of(reference.logits_of(pipeline), reference.logits)
    wanted = f"at most {FP32_ERROR:.0e}"
    what = f"{label}, error of logits in fp32"
    check.record(f"{name}_fp32_error", what, error, f"{error:.1e}", wanted, error <= FP32_ERROR)
    images = {way: image(pipeline, reference.prompt, reference.layout, way) for way in WAYS}
    for way, codes in images.items():
        compare_images(check, f"{label}, {way} and the CPU's", reference, way, codes, reference.images[way])
    plain = images["sampled image"]
    for way in (way for way in WAYS if WAYS[way][1]):
        compare_images(check, f"{label}, {way} and the plain one", reference, way, images[way], plain)
    narrow = reference.logits_of(Pipeline.from_pretrained(folder, device, "bf16"))
    error, limit = error_of(narrow, reference.logits), bf16_limit(reference.bf16_error)
    what = f"{label}, error of logits in bf16"
    check.record(f"{name}_bf16_error", what, error, f"{error:.4f}", f"at most {limit:.4f}", error <= limit)
    share, least = share_of(narrow, reference.logits), reference.bf16_share - SHARE
    what, wanted = f"{label}, equal codes in bf16", f"at least {100 * least:.0f} %"
    check.record(f"{name}_bf16_share", what, share, f"{100 * share:.1f} %", wanted, share >= least)


def bf16_limit(error: float) -> float:
    """Returns the largest error in bfloat16, given that of a CPU: kernels round at different places."""
    return 1.5 * error + 0.005


def compare_images(check: Check, what: str, reference: Reference, way: str, ours: Tensor, theirs: Tensor) -> None:
    """Records whether two images are equal, or differ first at a near tie in float64.

    Later codes depend on the first one that differs, so nothing follows from them.
    """
    settings, _ = WAYS[way]
    differs = (ours != theirs).flatten().nonzero().flatten()
    good, measured = True, "equal"
    if len(differs):
        good = near_tie(reference.exact, reference.prompt, theirs, ours, KEY, TIE, **settings)
        measured = f"differ from code {int(differs[0])} on, {'a' if good else 'not a'} near tie"
    key = what.replace(",", "").replace("'", "").replace(" ", "_")
    check.record(key, what, measured, measured, "equal, or a near tie", good)


def flash(check: Check) -> None:
    """Compares flash attention with torch's attention, in bfloat16."""
    if check.device.type != "cuda":
        check.leave_out("flash-attn", "needs a CUDA GPU")
        return
    folder = resources.demo_checkpoint()
    try:
        pipeline = Pipeline.from_pretrained(folder, check.device, "bf16", attn="flash")
    except InputError as error:  # not installed, or built for another torch
        check.leave_out("flash-attn", str(error))
        return
    reference = Reference.of(folder, 64 if check.setup.small else 96)
    sdpa = error_of(reference.logits_of(Pipeline.from_pretrained(folder, check.device, "bf16")), reference.logits)
    check.record("sdpa_error", "error of logits, sdpa", sdpa, f"{sdpa:.4f}")
    error, limit = error_of(reference.logits_of(pipeline), reference.logits), bf16_limit(sdpa)
    wanted = f"at most {limit:.4f}"
    check.record("flash_error", "error of logits, flash", error, f"{error:.4f}", wanted, error <= limit)
