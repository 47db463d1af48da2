"""The parts `floor` and `ends` of bench_large.py: steps of 7B layers against reading their bytes once."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
from common import print_header, print_row
from large_models import FORMS, SEVEN_B, fill_cache, random_model, stored_bytes

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.measure import read_bandwidth, seconds
from lumina_mgpt.model.compiled import compile_forward
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.transformer import Transformer

LAYERS = 4
FIRST, LAST = 128, 9360  # cached ids at the first and at the last code of a 768 x 768 image with a prompt
CODES = 9216  # of this image


@dataclass
class Case:
    """A step to measure.

    Attributes:
        work: runs the step once.
        read: bytes that it has to read: weights and cache.
        taken: seconds of a step in each run.
        ratios: these seconds over the time to read the bytes at the bandwidth of the run.
    """

    work: Callable[[], object]
    read: int
    taken: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Measures the memory bandwidth, and then the step."""
        bandwidth = read_bandwidth(torch.device("cpu"), repeats=3)
        self.taken.append(seconds(self.work))
        self.ratios.append(self.taken[-1] * bandwidth / self.read)

    def cells(self) -> tuple[str, str, str, str]:
        """Returns medians over the runs, and the range of the ratio."""
        taken, ratio = median(self.taken), median(self.ratios)
        spread = f"{min(self.ratios):.2f} ... {max(self.ratios):.2f}"
        return f"{1000 * taken:.1f}", f"{self.read / taken / 1e9:.1f}", f"{ratio:.2f}", spread


def floor(args: argparse.Namespace, filled: int = 1024) -> dict:
    """Times steps through 7B layers with a partly filled cache, relative to reading their bytes once."""
    print(f"{LAYERS} layers of the 7B, {filled} cache slots, {args.threads} threads, {args.runs} runs\n")
    print_header("weights", "rows", "ms a step", "GB/s", "ratio", "of all runs")
    rows = []
    for name in args.weights or ("fp32", "bf16", "int4"):
        dtype, group = FORMS[name]
        model = random_model(_config(512, 256), dtype, group)
        cases: dict[tuple[str, int], Case] = {}
        for count in (1, 2) if name == "int4-fp32" else (1, 2, 32):
            cases[name, count] = _case(model, model, count, filled, dtype)
            if args.compile and count <= 2:
                cases[f"{name}, compiled", count] = _case(model, compile_forward(model), count, filled, dtype)
        for _ in range(args.runs):
            for case in cases.values():
                case.run()
        for (form, count), case in cases.items():
            print_row(form, count, *case.cells())
            rows.append({"weights": form, "rows": count, "seconds": case.taken, "ratios": case.ratios})
    return {"layers": LAYERS, "rows": rows}


def ends(args: argparse.Namespace) -> dict:
    """Times the first and the last code of a 768 x 768 image with int4 weights and an int8 cache.

    The seconds of a code are those of four layers, scaled to 32, and those of the output projection.
    """
    config = ModelConfig.from_yaml(SEVEN_B)
    model = random_model(_config(config.num_image_codes + 256, config.num_image_codes), torch.bfloat16, 128)
    columns = slice(256, 256 + config.num_image_codes)
    model.lm_head.slice_columns(columns, int8=True)
    hidden = torch.ones(2, 1, config.hidden_size, dtype=torch.bfloat16)
    head = Case(partial(model.project, hidden, columns), stored_bytes(model.lm_head))
    cases = {name: _case(model, model, 2, at, torch.int8) for name, at in (("first", FIRST), ("last", LAST))}
    for _ in range(args.runs):
        for case in (head, *cases.values()):
            case.run()
    print(f"{LAYERS} layers of the 7B, two rows, int8 cache, {args.threads} threads, {args.runs} runs\n")
    print_header("part", "ms", "GB/s", "ratio", "of all runs")
    print_row("output projection", *head.cells())
    for name, case in cases.items():
        print_row(f"{LAYERS} layers, {name} code", *case.cells())
    scale = config.num_hidden_layers / LAYERS
    codes = {name: scale * median(case.taken) + median(head.taken) for name, case in cases.items()}
    hours = sum(codes.values()) / 2 * CODES / 3600  # the time of a step grows linearly with the cache
    print(
        f"\n{codes['first']:.2f} s for the first code, {codes['last']:.2f} s for the last; {hours:.2f} hours an image"
    )
    ratios = {name: case.ratios for name, case in cases.items()}
    return {"head_s": head.taken, "codes_s": codes, "hours": hours, "ratios": {"head": head.ratios, **ratios}}


def _config(vocabulary: int, codes: int) -> ModelConfig:
    sizes = {"vocab_size": vocabulary, "num_image_codes": codes, "image_code_offset": vocabulary - codes}
    return replace(ModelConfig.from_yaml(SEVEN_B), num_hidden_layers=LAYERS, **sizes)


def _case(model: Transformer, forward: Callable, rows: int, filled: int, cached: torch.dtype) -> Case:
    """Returns a step of one id a row after `filled` cached ids."""
    cache = KVCache(model.config, rows, filled + 1, cached, "cpu")
    fill_cache(cache)
    ids, at = torch.ones(rows, 1, dtype=torch.long), torch.full((rows, 1), filled)
    read = stored_bytes(model.layers) + sum(tensor.nbytes for tensor in cache.tensors())
    return Case(partial(forward, ids, positions=at, cache=cache, filled=filled + 1), read)
