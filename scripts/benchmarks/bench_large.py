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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

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
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.names import disk_name
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import COMPILED_SPARE, CachedStep, compile_forward
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.jacobi import sample_jacobi, spare_slots
from lumina_mgpt.unirep import ImageLayout, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

TOKENIZER = PROJECT / "tests" / "oracle" / "tokenizer"  # of the released checkpoint
PROMPT = "Generate an image of 768x768 according to the following prompt:\nA lighthouse at dusk, oil painting."
_SPECULATIONS = (("noise", 8), ("maximal", 8), ("maximal", 32))


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="scripts/benchmarks/bench_large.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("floor", "ends", "peer", "whole"))
    add_threads(parser)
    parser.add_argument("--compile", action="store_true", help="floor, peer: also compiled steps (takes minutes)")
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=tuple(FORMS),
        default=["fp32", "bf16", "int4"],
        help="floor: int4-fp32 has fp32 activations and takes half a minute a step",
    )
    parser.add_argument("--runs", type=cli.whole, default=3, help="floor, ends: runs, each with its own bandwidth")
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
        raise InputError(f"--runs must be in 1 ... 100, got {args.runs}; try 3")
    set_threads(args.threads)
    with torch.no_grad():
        figures = {"floor": floor, "ends": ends, "peer": peer, "whole": whole}[args.what](args)
    print(json.dumps({"bench": args.what, "threads": args.threads, **figures}))


# -- peer --------------------------------------------------------------------------------------------------------------


def peer(args: argparse.Namespace) -> dict:
    """Times one 128 x 128 image with 8 layers of width 1024, the released vocabulary and guidance 4."""
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
    model = random_model(config, torch.float32)
    theirs, their_forwards = generate_with_transformers(model, layout, prompt)
    print(f"{args.threads} threads\n")
    print_header("sampler", "weights", "s an image", "speedup")
    print_row("transformers' Chameleon", "fp32", f"{theirs:.2f}", "1.00")
    rows = [{"sampler": "transformers", "weights": "fp32", "seconds": theirs, "speedup": 1.0}]
    for weights, group in (("fp32", None), ("int4, int8 head, bf16 inputs", 128)):
        if group:
            model = random_model(config, torch.bfloat16, group)
        model.lm_head.slice_columns(vocabulary.code_slice, int8=bool(group))
        choices = [(None, None), *((Speculation(*choice), None) for choice in _SPECULATIONS)]
        if args.compile:
            choices.append((None, compile_forward(model)))
        for speculation, compiled in choices:
            name = f"{speculation.coupling}, window {speculation.window}" if speculation else "plain"
            if compiled:
                name += ", compiled"
                generate(model, vocabulary, layout, prompt, speculation, compiled)  # compiles each shape
            taken = generate(model, vocabulary, layout, prompt, speculation, compiled)
            print_row(name, weights, f"{taken:.2f}", f"{theirs / taken:.2f}")
            rows.append({"sampler": name, "weights": weights, "seconds": taken, "speedup": theirs / taken})
    return {"their_forwards": their_forwards, "codes": layout.num_codes, "rows": rows}


def generate(
    model: Transformer,
    vocabulary: Vocabulary,
    layout: ImageLayout,
    prompt: list[int],
    speculation: Speculation | None,
    compiled=None,
) -> float:
    """Seconds of one image with this package's samplers."""
    began = time.perf_counter()
    spare = spare_slots(layout, speculation.window) if speculation and speculation.window else 0
    spare += COMPILED_SPARE if compiled else 0
    dtype = model.norm.weight.dtype
    cache = KVCache(model.config, 2, len(prompt) + layout.length, dtype, "cpu", spare)
    step = CachedStep(model, cache, vocabulary.code_slice, compiled)
    if speculation:
        sample_jacobi(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)], speculation)
    else:
        sample(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)])
    return time.perf_counter() - began


def generate_with_transformers(model: Transformer, layout: ImageLayout, prompt: list[int]) -> tuple[float, int]:
    """Seconds and forwards of `generate` in transformers, whose guidance calls the model a second time for each id.

    It generates one id at a time, row ends included.
    """
    from peers import chameleon, copy_weights

    with torch.device("meta"):
        options = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        theirs = chameleon(model.config, attn_implementation="sdpa", **options)
    theirs.to_empty(device="cpu")
    copy_weights(model, theirs)
    theirs.model.rotary_emb.__init__(theirs.config)  # its buffers are not in the state dict
    calls = []
    theirs.model.register_forward_hook(lambda *_: calls.append(1))
    start = [*prompt, *layout.ids[: layout.prefix_length].tolist()]
    new = layout.num_codes + layout.rows
    began = time.perf_counter()
    theirs.eval().generate(
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
    return time.perf_counter() - began, len(calls)


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
