"""Stages `int4` and `steps`: products with int4 matrices, and steps that are compiled or captured as CUDA graphs."""

import time
from functools import partial

import torch
from near_ties import near_tie
from torch import Tensor

from gpu_check.check import Check
from gpu_check.parity import KEY, TIE
from gpu_check.setup import PROMPT, graph_options
from lumina_mgpt import resources
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.measure import seconds, wait
from lumina_mgpt.model.compiled import has_compiler
from lumina_mgpt.model.int4 import dequantize
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.pipeline import Pipeline

ROWS = (1, 2, 16, 17, 64, 65, 128)  # at the limits of the kernel's tiles, and in the windows of two images
INT4_ERROR = 0.01  # of the product's standard deviation; bfloat16 rounds to 0.002
_COMPILED_SIDE = 32  # pixels of the image for compiled steps: few shapes, as each takes a minute
_SETTINGS = {"top_k": 100}


@torch.no_grad()
def int4(check: Check) -> None:
    """Compares the int4 product with the product of the dequantized matrix in float64."""
    device, generator = check.device, torch.Generator().manual_seed(0)
    for outputs, inputs in check.setup.sizes.matrices:
        name = f"{inputs} to {outputs}"
        if not check.has(name, 3):
            continue
        linear = Int4Linear(inputs, outputs, 128)
        linear.load("weight", 0.02 * torch.randn(outputs, inputs, generator=generator), device)
        weight = dequantize(linear.matrix, torch.float32).cpu().double()
        linear.pack(torch.bfloat16)
        kernel = linear.kernel or "none"
        good = (
            linear.kernel == device.type or device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        )
        check.record(f"{outputs}x{inputs}_kernel", f"{name}, kernel", kernel, kernel, device.type, good)
        errors, times = [], []
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator).bfloat16()
            moved, exact = x.to(device), x.double() @ weight.T
            errors.append(float((linear(moved).cpu().double() - exact).square().mean().sqrt() / exact.std()))
            times.append(1000 * seconds(partial(linear, moved), device=device))
        key, rows, worst = f"{outputs}x{inputs}", ", ".join(map(str, ROWS)), max(errors)
        wanted = f"at most {INT4_ERROR}"
        what = f"{name}, largest error for {rows} rows"
        check.record(f"{key}_errors", what, errors, f"{worst:.4f}", wanted, worst <= INT4_ERROR)
        taken = ", ".join(f"{ms:.3f}" for ms in times)
        check.record(f"{key}_ms", f"{name}, for {rows} rows", times, f"{taken} ms")


def steps(check: Check) -> None:
    """Compares compiled and captured steps with eager ones: the same image, and milliseconds a step."""
    ways: dict[str, dict[str, bool]] = {}
    if check.setup.captures:
        ways["captured"] = graph_options(True)
    elif check.device.type == "cuda":
        check.leave_out("captured", "this version has no option for it")
    if has_compiler(check.device):
        ways["compiled"] = {"compile": True}
    else:
        check.leave_out("compiled", "torch finds no compiler for this device")
    for way, options in ways.items():
        if check.has(way, 40 if way == "compiled" else 5):
            with check.part(way):
                _compare_steps(check, way, options)
            if way == "compiled":
                torch._dynamo.reset()  # frees compiled code and its graphs


def _compare_steps(check: Check, way: str, options: dict[str, bool]) -> None:
    """Draws one image in both ways in fp32, then again for the time."""
    device = check.device
    eager, other = (_demo(check, device, "fp32", **more) for more in (graph_options(False), options))
    side = _COMPILED_SIDE if way == "compiled" else 96
    samplers: dict[str, Speculation | None] = {"plain": None}
    if way != "compiled":
        samplers["window 16"] = Speculation("noise", 16)
    for name, speculation in samplers.items():
        theirs, _ = _draw(eager, side, speculation)
        ours, _ = _draw(other, side, speculation)  # compiles or captures each shape
        times = []
        for label, pipeline, expected in (("eager", eager, theirs), (way, other, ours)):
            codes, taken = _draw(pipeline, side, speculation)
            check.problems += [] if torch.equal(codes, expected) else [f"{label}, {name}: two runs differ"]
            times.append(taken)
            key = f"{way}_{name}_{label}_ms".replace(" ", "_")
            check.record(key, f"{way}, {name}, {label}", 1000 * taken)
        good, measured = torch.equal(ours, theirs), "equal"
        if not good:
            exact = _demo(check, "cpu", torch.float64)
            good = near_tie(exact, PROMPT, theirs, ours, KEY, TIE, **_SETTINGS)
            measured = f"differ, {'a' if good else 'not a'} near tie"
        what = f"{way}, {name}, image and the eager one"
        check.record(f"{way}_{name}_codes".replace(" ", "_"), what, measured, measured, "equal, or a near tie", good)
        ratio, milliseconds = times[0] / times[1], " to ".join(f"{1000 * taken:.2f}" for taken in times)
        key = f"{way}_{name}_speedup".replace(" ", "_")
        check.record(key, f"{way}, {name}, speed-up", ratio, f"{ratio:.2f}, from {milliseconds} ms a step")


def _demo(check: Check, device: torch.device | str, dtype: torch.dtype | str, **options: bool) -> Pipeline:
    """Returns the demo; in the self-test its first layer, because a CPU takes minutes to compile six of them."""
    pipeline = Pipeline.from_pretrained(resources.demo_checkpoint(), device, dtype, **options)
    if check.setup.small:
        pipeline.model.layers = pipeline.model.layers[:1]
    return pipeline


def _draw(pipeline: Pipeline, side: int, speculation: Speculation | None) -> tuple[Tensor, float]:
    """Returns the codes of one image, and the mean seconds of a forward."""
    layout = pipeline.checkpoint.layout(side, side)
    starts = pipeline.checkpoint.prompt_ids([PROMPT], layout)
    wait(pipeline.device)
    began = time.perf_counter()
    codes = pipeline.sample(
        starts, layout, SamplingConfig(seed=KEY[0], **_SETTINGS), [KEY[1]], speculation=speculation
    )[0]
    wait(pipeline.device)
    return codes, (time.perf_counter() - began) / pipeline.forwards
