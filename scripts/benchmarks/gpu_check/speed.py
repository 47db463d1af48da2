"""Stages `memory`, `bandwidth` and `batches`: a model with random weights, as large as the 7B on a GPU."""

import math
from dataclasses import replace

import torch
from bench_large import run_codes, stored_bytes

from gpu_check.check import Check
from gpu_check.memory import CPU_SLACK, memory_of
from gpu_check.setup import BF16, FORMS, GUIDED, INT4, INT4_INT8, Form, Setup
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.devices import cache_bytes
from lumina_mgpt.model.quantization import has_int8_kernel
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.training.memory import layer_weights

WINDOWS = (8, 16, 32, 64)
BATCHES = (1, 2, 4)
SLOWEST = 10  # times the time to read weights and cache: a slower plain step is a fault
_SLACK = 1e9  # bytes of activations and of the workspaces of CUDA's libraries
_UNTIMED = 4  # steps: a shape is captured as a graph at its second use
_FILLED = (0.02, 0.5, 0.98)  # parts of the image that are sampled before the measured steps


def weight_bytes(config: ModelConfig, form: Form, device: torch.device) -> float:
    """Returns the bytes of the weights that image generation keeps, from the sizes of the model alone."""
    wide = form.dtype.itemsize
    narrow_head = form.group and has_int8_kernel(device, form.dtype)
    head = config.num_image_codes * config.hidden_size * (1 if narrow_head else wide)
    matrices = layer_weights(config) * (0.5 + 4 / form.group if form.group else wide)
    return matrices + head + wide * config.vocab_size * config.hidden_size


def sequence(setup: Setup) -> int:
    """Returns the number of ids of a whole image with its prompt."""
    return len(setup.prompt()) + setup.layout().length


def room(setup: Setup, form: Form, batch: int = 1) -> float:
    """Returns the bytes of weights and cache with guidance."""
    config = setup.sizes.config
    cache = 2 * batch * cache_bytes(config, sequence(setup), form.cache_dtype)
    return weight_bytes(config, form, setup.device) + cache


def needed(setup: Setup, form: Form, batch: int = 1) -> float:
    """Returns the bytes that must be free for `batch` images, with the whole head while the model is made."""
    config = setup.sizes.config
    return room(setup, form, batch) + form.dtype.itemsize * config.vocab_size * config.hidden_size + _SLACK


@torch.no_grad()
def memory(check: Check) -> None:
    """Compares the memory of weights and cache with their estimate, in a step at the end of an image."""
    for form in FORMS:
        if check.has(form.name, 5) and check.fits(form.name, needed(check.setup, form)):
            with check.part(form.name):
                _memory_of(check, form)


def _memory_of(check: Check, form: Form) -> None:
    setup, total = check.setup, sequence(check.setup)
    with memory_of(check.device) as loading:
        pipeline = setup.random_pipeline(form)
    with memory_of(check.device) as running:
        step = setup.full_step(pipeline)
        finite = bool(setup.call(step, 1, total).isfinite().all())
    peak, estimate = loading.held + running.peak, room(setup, form)
    key = form.key
    check.record(f"{key}_loaded_gb", f"{form.name}, weights", loading.held / 1e9, f"{loading.held / 1e9:.3f} GB")
    slack, low, high = (CPU_SLACK, 0.8, 1.25) if setup.small else (_SLACK, 0.95, 1.05)
    least, most = low * estimate, high * estimate + slack
    what = f"{form.name}, weights and cache in a step with {total} ids"
    wanted = f"{least / 1e9:.3f} to {most / 1e9:.3f} GB, an estimate of {estimate / 1e9:.3f}"
    check.record(f"{key}_peak_gb", what, peak / 1e9, f"{peak / 1e9:.3f} GB", wanted, least <= peak <= most)
    check.record(f"{key}_estimate_gb", f"{form.name}, estimate", estimate / 1e9)
    require_finite(check, form.name, finite)


def require_finite(check: Check, what: str, finite: bool) -> None:
    """Adds a problem if logits are not numbers."""
    if not finite:
        check.problems.append(f"{what}: logits are not numbers")


@torch.no_grad()
def bandwidth(check: Check) -> None:
    """Compares the time of a step with the time to read weights and cache once, at half of an image."""
    gb = check.setup.bandwidth / 1e9
    check.record("bandwidth_gb_s", "memory bandwidth for reading", gb, f"{gb:.0f} GB/s")
    check.record("captured", "steps", str(check.setup.captures), "CUDA graphs" if check.setup.captures else "eager")
    for form in (BF16, INT4):
        if not check.has(form.name, 8) or not check.fits(form.name, needed(check.setup, form)):
            continue
        with check.part(form.name):
            pipeline = check.setup.random_pipeline(form)
            time_steps(check, pipeline, form)
            if form == INT4 and check.has(INT4_INT8.name, 4):
                pipeline.cache_dtype = INT4_INT8.cache_dtype
                time_steps(check, pipeline, INT4_INT8)


def time_steps(check: Check, pipeline: Pipeline, form: Form) -> None:
    """Records the plain step and windows of one form; where steps are captured, also the eager plain step."""
    setup = check.setup
    if setup.captures:
        pipeline.cuda_graphs = False
        time_step(check, pipeline, form, f"{form.name}, plain, eager", f"{form.key}_eager", 1)
        pipeline.cuda_graphs = True
    for width in (1, *WINDOWS):
        name = f"window {width}" if width > 1 else "plain"
        time_step(check, pipeline, form, f"{form.name}, {name}", f"{form.key}_{name.replace(' ', '_')}", width)


def time_step(check: Check, pipeline: Pipeline, form: Form, name: str, key: str, width: int) -> None:
    """Records milliseconds of a step with `width` ids a row, and their part of the memory's bandwidth."""
    setup, filled = check.setup, sequence(check.setup) // 2
    if not check.has(name, 1):
        return
    step = setup.full_step(pipeline, width)
    cache = 2 * cache_bytes(setup.sizes.config, filled, form.cache_dtype)
    floor = (stored_bytes(pipeline.model.layers) + pipeline.model.lm_head.weight.nbytes + cache) / setup.bandwidth
    require_finite(check, name, bool(setup.call(step, width, filled).isfinite().all()))
    taken = setup.seconds_a_call(step, width, filled)
    ratio = floor / taken
    check.record(f"{key}_ms", name, 1000 * taken)
    least = 1 / SLOWEST if width == 1 else 0.0  # a wide window is limited by products, not by reading
    good = setup.small or least <= ratio <= 1.1  # small models are in the caches, or bound by launches
    wanted = "" if setup.small else f"{100 * least:.0f} to 110 %"
    measured = f"{1000 * taken:.2f} ms, {100 * ratio:.0f} % of the bandwidth"
    check.record(f"{key}_bandwidth", f"{name}, a step", ratio, measured, wanted, good)


@torch.no_grad()
def batches(check: Check) -> None:
    """Measures steps of several images at once, and extrapolates to whole images."""
    setup = check.setup
    for form in (BF16, INT4_INT8):
        if not check.has(form.name, 10) or not check.fits(form.name, needed(setup, form)):
            continue
        with check.part(form.name):
            pipeline = setup.random_pipeline(form)
            auto = pipeline.batch_size(len(setup.prompt()), setup.layout(), GUIDED)
            check.record(f"{form.key}_auto", f"{form.name}, automatic batch", auto, f"{auto} images")
            for batch in sorted({*BATCHES, auto}):
                name = f"{form.name}, batch {batch}"
                cache = 2 * batch * cache_bytes(setup.sizes.config, sequence(setup), form.cache_dtype)
                if check.has(name, 5) and check.fits(name, cache + (0 if setup.small else _SLACK)):
                    with check.part(name):
                        _images_a_minute(check, pipeline, form, batch)


def _images_a_minute(check: Check, pipeline: Pipeline, form: Form, batch: int) -> None:
    """Measures some steps at three lengths. The time of a step grows linearly with the length, apart from launches."""
    setup, layout, count = check.setup, check.setup.layout(), check.setup.sizes.steps
    prompts, found = [setup.prompt()] * batch, []
    for part in _FILLED:
        given = max(1, min(math.ceil(part * layout.num_codes), layout.num_codes - count - _UNTIMED - 1))
        step: CachedStep = pipeline.make_step(prompts, layout, GUIDED, None)
        found.append(run_codes(step, replace(layout, given=given), prompts, count, _UNTIMED))
        del step  # two caches may not fit
    mean = (found[0] + 2 * found[1] + found[2]) / 4  # trapezoidal rule
    images = 60 * batch / (mean * layout.num_codes)
    key, name = f"{form.key}_batch_{batch}", f"{form.name}, batch {batch}"
    times, parts = ", ".join(f"{1000 * taken:.1f}" for taken in found), ", ".join(f"{100 * p:.0f}" for p in _FILLED)
    check.record(f"{key}_ms", name, [1000 * taken for taken in found])
    measured = f"{images:.2f} images a minute, from {times} ms a step at {parts} % of an image"
    what = f"{name}, extrapolated to whole images of {setup.sizes.side} × {setup.sizes.side}"
    check.record(f"{key}_images_a_minute", what, images, measured)
