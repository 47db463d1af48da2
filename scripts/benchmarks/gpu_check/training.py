"""Stage `training`: steps of the trainer's parts on random weights, and their memory against the estimate."""

import importlib.util
import math
import time
from dataclasses import replace

import torch
from bench_large import random_model

from gpu_check.check import Check, free_memory
from gpu_check.memory import CPU_SLACK, memory_of
from gpu_check.setup import Setup, host_bytes
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.measure import wait
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.distributed import Processes, clip_gradients, place
from lumina_mgpt.training.loss import LossModel
from lumina_mgpt.training.memory import Plan
from lumina_mgpt.training.optimizer import build_optimizers
from lumina_mgpt.training.options import ModelOptions, OptimizerOptions

TEXT = 90  # ids of an instruction and a long prompt, as in memory_table.py
RANK = 16
STEPS = 3  # the first one is not timed
TOLERANCE = 0.25  # of the estimate
_SHORTEST = 1024  # ids
_SMALL_IDS = 1100  # of the self-test: with fewer, attention on a CPU keeps its probabilities, unlike on a GPU


def training(check: Check) -> None:
    """Trains adapters of the whole model, and all weights with offload."""
    if importlib.util.find_spec("peft") is None:
        check.leave_out("adapters", "needs the peft package")
    elif check.has("adapters", 15):
        with check.part("adapters"):
            import peft  # noqa: F401  # before the measurement, as the import takes memory too

            adapters(check)
    if check.has("all weights", 40):
        with check.part("all weights"):
            all_weights(check)


def adapters(check: Check) -> None:
    """Trains adapters (LoRA) of all layers, in bfloat16."""
    setup, config = check.setup, check.setup.sizes.config
    plan = fitting(check, "adapters", Plan(config, image_ids(setup), lora_rank=RANK, gpu=not setup.small))
    if plan is None:
        return
    with memory_of(check.device) as use:
        model = random_model(config, torch.bfloat16, device=check.device)
        choose_trained(model, ModelOptions(init_from="random", lora_rank=RANK))
        taken, losses = train(model, Processes(0, 1, check.device), plan)
    record(
        check, "adapters", f"adapters of rank {RANK}, {config.num_hidden_layers} layers", plan, use.peak, taken, losses
    )


def all_weights(check: Check) -> None:
    """Trains all weights of some layers with embedding and head; on a GPU with offload, by FSDP in one process."""
    setup, whole = check.setup, check.setup.sizes.config
    config = replace(whole, num_hidden_layers=setup.sizes.offloaded)
    offload = check.device.type == "cuda"
    plan = Plan(config, image_ids(setup), offload=offload, wide=not offload, gpu=not setup.small)
    plan = fitting(check, "all weights", plan)
    free = host_bytes()
    if plan is None:
        return
    if offload and free is not None and free < 18 * plan.weights:
        lack = f"needs {18e-9 * plan.weights:.0f} GB of the host's memory, and {free / 1e9:.0f} GB are free"
        check.leave_out("all weights", lack)
        return
    model = random_model(config, torch.float32, device=check.device)
    if offload:
        model.to("cpu")
    free_memory(check.device)
    model.requires_grad_(True)
    processes = Processes.start(str(check.device), offload)
    try:
        with memory_of(check.device) as use:
            taken, losses = train(model, processes, plan)
    finally:
        processes.stop()
    held = 0 if offload else 4 * plan.weights  # the weights were there before
    name = f"all weights{', offload' if offload else ', no offload on a CPU'}, {config.num_hidden_layers} layers"
    record(check, "all_weights", name, plan, use.peak + held, taken, losses)
    if offload:
        weights = Plan(whole, plan.ids).weights
        scaled = taken * weights / plan.weights
        what = f"all weights, {whole.num_hidden_layers} layers, scaled by the number of weights"
        check.record("all_weights_scaled_s", what, scaled, f"{scaled:.1f} s a step")


def image_ids(setup: Setup) -> int:
    """Returns the number of ids of a training sequence: text and one image."""
    return _SMALL_IDS if setup.small else setup.layout().length + TEXT


def fitting(check: Check, what: str, plan: Plan) -> Plan | None:
    """Returns the plan with its sequence halved until it fits the free memory, None if no length fits."""
    free = check.setup.free_bytes()
    while free is not None and plan.peak() > 0.95 * free:
        if plan.ids // 2 < _SHORTEST:
            check.fits(what, plan.peak())
            return None
        plan = replace(plan, ids=plan.ids // 2)
    return plan


def train(model: Transformer, processes: Processes, plan: Plan) -> tuple[float, list[float]]:
    """Runs training steps on one sequence, as the trainer does. Returns the seconds of the fastest, and all losses."""
    config, device = model.config, processes.device
    model.dropout, model.gradient_checkpointing = 0.0, plan.checkpointing
    module = LossModel(model.train())
    place(module, processes, plan.offload, not plan.wide)
    optimizers = build_optimizers(model, OptimizerOptions(lr=1e-4))
    ids = sample_ids(config, plan.ids).to(device)
    index, targets = torch.arange(TEXT - 1, plan.ids - 1, device=device), ids[0, TEXT:]
    losses, times = [], []
    for _ in range(STEPS):
        wait(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=not plan.wide):
            total, cross, _ = module(ids, index, targets)
        (total / len(targets)).backward()
        clip_gradients(module, 4.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(cross.item() / len(targets))
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:]), losses


def sample_ids(config: ModelConfig, length: int) -> torch.Tensor:
    """Returns ids of a text and of random image codes. Shapes: -> (1, length)."""
    first, count = config.image_code_offset, config.num_image_codes
    generator = torch.Generator().manual_seed(1)
    return torch.randint(first, first + count, (1, length), generator=generator)


def record(check: Check, key: str, name: str, plan: Plan, peak: float, taken: float, losses: list[float]) -> None:
    """Records time, memory and losses of one way of training."""
    check.record(f"{key}_ids", f"{name}, ids", plan.ids)
    check.record(f"{key}_s", f"{name}, a step with {plan.ids} ids", taken, f"{taken:.2f} s")
    estimate = max(plan.moments().values())  # without CUDA's context, which torch does not count
    low, high = (1 - TOLERANCE) * estimate, (1 + TOLERANCE) * estimate + (0 if plan.gpu else CPU_SLACK)
    wanted = f"{low / 1e9:.2f} to {high / 1e9:.2f} GB, an estimate of {estimate / 1e9:.2f}"
    check.record(f"{key}_gb", f"{name}, memory", peak / 1e9, f"{peak / 1e9:.2f} GB", wanted, low <= peak <= high)
    check.record(f"{key}_estimate_gb", f"{name}, estimate", estimate / 1e9)
    falls = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    change = losses[-1] - losses[0]
    check.record(f"{key}_loss", f"{name}, loss {losses[0]:.3f}, change", change, f"{change:.5f}", "negative", falls)
