"""Measures time and memory of large models with random weights. Prints a table and one line of JSON.

python scripts/benchmarks/bench_large.py floor             # a step of 7B layers against reading its weights once
python scripts/benchmarks/bench_large.py ends              # first and last code of a 768 x 768 image, from four layers
python scripts/benchmarks/bench_large.py peer              # this sampler against transformers' Chameleon
python scripts/benchmarks/bench_large.py whole --work DIR  # the 7B, quantized to int4 while loading
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench_floor import ends, floor
from common import add_threads, print_header, print_row, set_threads
from large_models import FORMS, PROJECT, SEVEN_B, fill_cache, random_model, stored_bytes
from torch import Tensor
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.devices import DTYPES, cache_bytes
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_tensors
from lumina_mgpt.measure import peak_anonymous, wait
from lumina_mgpt.model.compiled import CompiledForward, compile_forward, compiled_spare
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.names import disk_name
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.jacobi import sample_jacobi, spare_slots
from lumina_mgpt.unirep import ImageLayout, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

TOKENIZER = PROJECT / "tests" / "oracle" / "tokenizer"  # of the released checkpoint
PROMPT = "Generate an image of 768x768 according to the following prompt:\nA lighthouse at dusk, oil painting."
_SPECULATION = Speculation("maximal", 8)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="scripts/benchmarks/bench_large.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("floor", "ends", "peer", "whole"))
    add_threads(parser)
    parser.add_argument("--compile", action="store_true", help="floor, peer: also compiled steps (takes minutes)")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=tuple(FORMS),
        help="floor: fp32, bf16 and int4; int4-fp32 has fp32 activations and takes half a minute a step. "
        "peer: fp32 and int4",
    )
    parser.add_argument(
        "--runs",
        type=cli.whole,
        default=3,
        help="floor, ends: runs, each with its own bandwidth; peer: runs, each with a ratio for each row",
    )
    parser.add_argument("--work", type=Path, help="whole: folder for the random checkpoint (16 GB, kept)")
    parser.add_argument("--codes", type=cli.whole, default=96, help="whole: codes sampled at either end")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bf16",
        help="whole: dtype of activations and of weights that are not int4",
    )
    return cli.run(bench, parser, argv)


def bench(args: argparse.Namespace) -> None:
    if args.what == "whole" and args.work is None:
        raise InputError("--work is missing; give a folder with 16 GB of free space for the random checkpoint")
    if not 1 <= args.codes <= 4096:
        raise InputError(f"--codes must be in 1 ... 4096, got {args.codes}; try 96")
    if not 1 <= args.runs <= 100:
        raise InputError(f"must be in 1 ... 100, got {args.runs}; try 3", "runs")
    set_threads(args.threads)
    with torch.no_grad():
        figures = {"floor": floor, "ends": ends, "peer": peer, "whole": whole}[args.what](args)
    print(json.dumps({"bench": args.what, "threads": args.threads, **figures}))


# -- peer --------------------------------------------------------------------------------------------------------------


def peer(args: argparse.Namespace) -> dict:
    """Times 128 x 128 images with 8 layers of width 1024, the released vocabulary and guidance 4.

    All samplers run in turn in each run, which gives a ratio for each.
    """
    config = ModelConfig(
        vocab_size=171385,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        base_size=128,
    )
    vocabulary = Vocabulary.from_folder(TOKENIZER, config)
    layout = ImageLayout.from_pixels(vocabulary, 128, 128)
    prompt = generation_prompt(PROMPT.replace("768x768", "128x128"), vocabulary)
    theirs = transformers_sampler(random_model(config, torch.float32), layout, prompt)
    samplers: dict[tuple[str, str], Callable[[], float]] = {("transformers' Chameleon", "fp32"): theirs}
    for weights in args.weights or ("fp32", "int4"):
        dtype, group = FORMS[weights]
        model = random_model(config, dtype, group)
        model.lm_head.slice_columns(vocabulary.code_slice, int8=bool(group))
        ours = partial(generate, model, vocabulary, layout, prompt)
        samplers["plain", weights], samplers["maximal, window 8", weights] = ours, partial(ours, _SPECULATION)
        if args.compile:
            samplers["plain, compiled", weights] = compiled = partial(ours, None, compile_forward(model))
            compiled()  # compiles each shape
    taken = {name: [] for name in samplers}
    for _ in range(args.runs):
        for name, sampler in samplers.items():
            taken[name].append(sampler())
    print(f"{args.threads} threads, {args.runs} runs\n")
    print_header("sampler", "weights", "s an image", "speed-up", "least", "most")
    rows = []
    for name, seconds_ in taken.items():
        ratios = [their / our for their, our in zip(next(iter(taken.values())), seconds_, strict=True)]
        figures = {"seconds": median(seconds_), "speedup": median(ratios), "least": min(ratios), "most": max(ratios)}
        print_row(*name, *(f"{figure:.2f}" for figure in figures.values()))
        rows.append({"sampler": name[0], "weights": name[1], **figures})
    return {"codes": layout.num_codes, "rows": rows}


def generate(
    model: Transformer,
    vocabulary: Vocabulary,
    layout: ImageLayout,
    prompt: list[int],
    speculation: Speculation | None = None,
    compiled: CompiledForward | None = None,
) -> float:
    """Seconds of one image with this package's samplers."""
    began = time.perf_counter()
    spare = spare_slots(layout, speculation.window) if speculation and speculation.window else 0
    length, dtype = len(prompt) + layout.length, model.norm.weight.dtype
    spare = compiled_spare(length, spare) if compiled else spare
    cache = KVCache(model.config, 2, length, dtype, "cpu", spare)
    step = CachedStep(model, cache, vocabulary.code_slice, compiled)
    if speculation:
        sample_jacobi(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)], speculation)
    else:
        sample(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)])
    return time.perf_counter() - began


def transformers_sampler(model: Transformer, layout: ImageLayout, prompt: list[int]) -> Callable[[], float]:
    """Returns a function that generates an image with transformers and the weights of `model`; it returns the seconds.

    transformers calls the model a second time for guidance. It generates one id at a time, row ends included.
    """
    from peers import chameleon, copy_weights

    with torch.device("meta"):
        options = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        theirs = chameleon(model.config, attn_implementation="sdpa", **options)
    theirs.to_empty(device="cpu")
    copy_weights(model, theirs)
    theirs.model.rotary_emb.__init__(theirs.config)  # its buffers are not in the state dict
    theirs.eval()
    start = [*prompt, *layout.ids[: layout.prefix_length].tolist()]
    new = layout.num_codes + layout.rows

    def generate_one() -> float:
        began = time.perf_counter()
        ids = theirs.generate(
            torch.tensor([start]),
            negative_prompt_ids=torch.tensor([start[len(prompt) :]]),
            guidance_scale=4.0,
            do_sample=True,
            top_k=16384,
            temperature=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            use_cache=True,
        )
        assert ids.shape == (1, len(start) + new), ids.shape
        return time.perf_counter() - began

    return generate_one


# -- whole -------------------------------------------------------------------------------------------------------------


def whole(args: argparse.Namespace) -> dict:
    """Loads the 7B as int4 and samples the first codes of a 768 x 768 image, and the last ones with a full cache."""
    config = ModelConfig.from_yaml(SEVEN_B)
    folder, dtype = args.work / "random-7B", DTYPES[args.dtype]
    write_random(config, folder)
    began = time.perf_counter()
    with peak_anonymous() as loading, cli.ReadingBar("int4 while loading") as bar:
        model = load_model(folder, dtype, "cpu", quant=128, on_read=bar)
        vocabulary = Vocabulary.from_folder(TOKENIZER, config)
        model.lm_head.slice_columns(vocabulary.code_slice, int8=True)
    taken = time.perf_counter() - began
    layout = ImageLayout.from_pixels(vocabulary, 768, 768)
    prompt, ends = generation_prompt(PROMPT, vocabulary), {}
    with peak_anonymous() as running:
        for end in ("first", "last"):
            given = 0 if end == "first" else layout.num_codes - args.codes - 1
            cache = KVCache(model.config, 2, len(prompt) + layout.length, torch.int8, "cpu")
            step = CachedStep(model, cache, vocabulary.code_slice)
            ends[end] = run_codes(step, replace(layout, given=given), [prompt], args.codes)
    hours = (
        (ends["first"] + ends["last"]) / 2 * layout.num_codes / 3600
    )  # the time of a step grows linearly with the cache
    cached = 2 * cache_bytes(config, len(prompt) + layout.length, torch.int8)
    print_header("what", "measured")
    print_row("loading, with quantization", f"{taken:.0f} s")
    print_row("peak anonymous memory, loading", f"{loading[0] / 1e9:.2f} GB")
    print_row("peak anonymous memory, an image of 768 x 768", f"{running[0] / 1e9:.2f} GB")
    print_row("of it int4 weights, embeddings, int8 head", f"{stored_bytes(model) / 1e9:.2f} GB")
    print_row("of it the int8 cache", f"{cached / 1e9:.2f} GB")
    print_row(f"s a code, the first and the last {args.codes}", f"{ends['first']:.2f}, {ends['last']:.2f}")
    print_row("a whole image, extrapolated", f"{hours:.1f} h")
    return {
        "dtype": args.dtype,
        "loading_s": taken,
        "peak_loading_gb": loading[0] / 1e9,
        "weights_gb": stored_bytes(model) / 1e9,
        "peak_running_gb": running[0] / 1e9,
        "cache_gb": cached / 1e9,
        "first_s": ends["first"],
        "last_s": ends["last"],
        "image_hours": hours,
    }


class _Enough(Exception):
    """Ends sampling before the image is complete."""


def run_codes(inner: CachedStep, layout: ImageLayout, prompts: list[list[int]], codes: int, untimed: int = 1) -> float:
    """Mean seconds a step over `codes` steps of an image a prompt. Given codes are not fed: the cache is random.

    Args:
        untimed: number of steps before these, at least 1: the first one has the prompts, others may capture a graph.
    """
    vocabulary, bar, began, done = (
        layout.vocabulary,
        tqdm(total=codes, unit="code", leave=False, disable=None),
        [0.0],
        [0],
    )
    if layout.given:
        fill_cache(inner.cache)
        inner.calls = 1

    def step(ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        if done[0] == untimed + codes:
            raise _Enough
        if done[0] >= untimed:
            bar.update()
        if layout.given and not done[0]:
            logits = torch.randn(len(ids), 1, vocabulary.num_image_codes, device=inner.device)
        else:
            logits = inner(ids, positions, read)
        done[0] += 1
        if done[0] == untimed:
            wait(inner.device)
            began[0] = time.perf_counter()
        return logits

    with suppress(_Enough):
        given = torch.zeros(len(prompts), layout.given, dtype=torch.long)
        sample(step, prompts, layout, SamplingConfig(), [(0, repeat) for repeat in range(len(prompts))], given=given)
    wait(inner.device)
    bar.close()
    return (time.perf_counter() - began[0]) / (done[0] - untimed)


def write_random(config: ModelConfig, folder: Path) -> None:
    """Writes a bf16 checkpoint in the released layout, one shard a layer, unless it is already there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Transformer(config)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    shards: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[1] if name.startswith("layers.") else name.split(".")[0]
        shards.setdefault(f"model-{part}.safetensors", {})[disk_name(name)] = parameter
    for shard, parameters in tqdm(shards.items(), desc="writing random weights", unit="shard"):
        tensors = {}
        for name, parameter in parameters.items():
            fresh = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            tensors[name] = fresh if "norm" in name else fresh.normal_(0, 0.02, generator=generator)
            weight_map[name] = shard
        write_tensors(folder / shard, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.to_json(folder / "config.json")  # last, as it marks a complete checkpoint


if __name__ == "__main__":
    sys.exit(main())
