"""What large models cost on this machine, with random weights of the released shapes; no checkpoint is needed.

    cd scripts/benchmarks
    python bench_large.py floor             # layers of the 7B: a step against reading its weights once
    python bench_large.py peer              # this sampler against transformers' Chameleon, on the same weights
    python bench_large.py whole --work DIR  # all of the 7B, int4 while loading: memory, first and last codes

Each prints a table and ends with one line of JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.devices import DTYPES, cache_bytes
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_tensors
from lumina_mgpt.measure import peak_anonymous, read_bandwidth, seconds
from lumina_mgpt.model import quantization
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.names import disk_name
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import COMPILED_SPARE, CachedStep, compile_forward
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.jacobi import sample_jacobi, spare_slots
from lumina_mgpt.unirep import ImageLayout, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

PROJECT = Path(__file__).resolve().parent.parent.parent
SEVEN_B = PROJECT / "configs" / "model" / "7B.yaml"
TOKENIZER = PROJECT / "tests" / "oracle" / "tokenizer"  # the released vocabulary
PROMPT = "Generate an image of 768x768 according to the following prompt:\nA lighthouse at dusk, oil painting."
FORMS = {  # dtype of the inputs, and weights of an int4 group
    "fp32": (torch.float32, None), "bf16": (torch.bfloat16, None),
    "int4": (torch.bfloat16, 128), "int4-fp32": (torch.float32, 128),
}  # fmt: skip
_SPECULATIONS = (("noise", 8), ("maximal", 8), ("maximal", 32))


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="scripts/benchmarks/bench_large.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("floor", "peer", "whole"))
    parser.add_argument("--threads", type=cli.whole, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="floor, peer: compiled steps, too (takes minutes)")
    parser.add_argument("--weights", nargs="+", choices=tuple(FORMS), default=["fp32", "bf16", "int4"],
                        help="floor: int4-fp32 has fp32 inputs, which take half a minute a step")  # fmt: skip
    parser.add_argument("--work", type=Path, help="whole: gets the random checkpoint (16 GB, kept for the next time)")
    parser.add_argument("--codes", type=cli.whole, default=96, help="whole: codes to run at either end of the image")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="whole: of what is not int4")
    return cli.run(bench, parser, argv)


def bench(args: argparse.Namespace) -> None:
    if not 1 <= args.threads <= 1024:
        raise InputError(f"--threads must be in 1 ... 1024, got {args.threads}; try {torch.get_num_threads()}")
    if args.what == "whole" and args.work is None:
        raise InputError("--work is missing; give a folder with 16 GB of room for the random checkpoint")
    if not 1 <= args.codes <= 4096:
        raise InputError(f"--codes must be in 1 ... 4096, got {args.codes}; try 96")
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        figures = {"floor": floor, "peer": peer, "whole": whole}[args.what](args)
    print(json.dumps({"bench": args.what, "threads": args.threads, **figures}))


def random_model(config: ModelConfig, dtype: torch.dtype, group: int | None = None) -> Transformer:
    """Random weights; with `group` the layers' matrices are int4, each made and quantized on its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fresh = torch.full(parameter.shape, float(name == "weight"), dtype=dtype)
            if isinstance(module, nn.Linear | nn.Embedding):
                fresh.normal_(0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(fresh, requires_grad=False))
    if group:
        plain = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
        quantization.replace_linears(model, group)
        for name, linear in plain.items():
            model.layers.get_submodule(name).load("weight", linear.weight, "cpu")
        quantization.pack_weights(model, dtype)
    return model.eval()


def stored_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


# -- floor -------------------------------------------------------------------------------------------------------------


def floor(args: argparse.Namespace, layers: int = 4, filled: int = 1024) -> dict:
    """A step of one row through 7B layers with a cache that is partly filled, over reading those bytes."""
    bandwidth, rows = read_bandwidth(torch.device("cpu")), []
    config = replace(ModelConfig.from_yaml(SEVEN_B), vocab_size=512, num_image_codes=256, image_code_offset=256,
                     num_hidden_layers=layers)  # fmt: skip
    print(f"{layers} layers of the 7B, {filled} cache slots, {args.threads} threads, read bandwidth "
          f"{bandwidth / 1e9:.1f} GB/s\n\n| weights | rows | ms a step | ms to read its bytes | ratio |\n"
          "| --- | --- | --- | --- | --- |")  # fmt: skip
    for name in args.weights:
        dtype, group = FORMS[name]
        model = random_model(config, dtype, group)
        for count in (1, 2) if name == "int4-fp32" else (1, 2, 32):
            cache = KVCache(config, count, filled + 1, dtype, "cpu")
            ids, at = torch.ones(count, 1, dtype=torch.long), torch.full((count, 1), filled)
            least = (stored_bytes(model.layers) + sum(tensor.nbytes for tensor in cache.tensors())) / bandwidth
            for compiled in (False, True)[: 2 if args.compile and count <= 2 else 1]:
                form, forward = (f"{name}, compiled", compile_forward(model)) if compiled else (name, model)
                taken = seconds(partial(forward, ids, positions=at, cache=cache, filled=filled + 1))
                ratio = taken / least
                print(f"| {form} | {count} | {1000 * taken:.1f} | {1000 * least:.1f} | {ratio:.2f} |", flush=True)
                rows.append({"weights": form, "rows": count, "seconds": taken, "floor": least, "ratio": ratio})
    return {"bandwidth_gb_s": bandwidth / 1e9, "layers": layers, "rows": rows}


# -- peer --------------------------------------------------------------------------------------------------------------


def peer(args: argparse.Namespace) -> dict:
    """One 128 x 128 image: 8 layers of width 1024, the released vocabulary, guidance 4."""
    config = ModelConfig(
        vocab_size=171385, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, base_size=128,
    )  # fmt: skip
    vocabulary = Vocabulary.from_folder(TOKENIZER, config)
    layout = ImageLayout.from_pixels(vocabulary, 128, 128)
    prompt = generation_prompt(PROMPT.replace("768x768", "128x128"), vocabulary)
    model = random_model(config, torch.float32)
    theirs, their_forwards = chameleon(model, layout, prompt)
    print(f"{args.threads} threads\n\n| sampler | weights | s an image | times faster |\n| --- | --- | --- | --- |")
    print(f"| transformers' Chameleon | fp32 | {theirs:.2f} | 1.00 |", flush=True)
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
                ours(model, vocabulary, layout, prompt, speculation, compiled)  # each shape once, for the compiler
            taken = ours(model, vocabulary, layout, prompt, speculation, compiled)
            print(f"| {name} | {weights} | {taken:.2f} | {theirs / taken:.2f} |", flush=True)
            rows.append({"sampler": name, "weights": weights, "seconds": taken, "speedup": theirs / taken})
    return {"their_forwards": their_forwards, "codes": layout.num_codes, "rows": rows}


def ours(model: Transformer, vocabulary: Vocabulary, layout: ImageLayout, prompt: list[int],
         speculation: Speculation | None, compiled=None) -> float:  # fmt: skip
    began = time.perf_counter()
    spare = spare_slots(layout, speculation.window) if speculation else 0
    spare += COMPILED_SPARE if compiled else 0
    dtype = model.norm.weight.dtype
    cache = KVCache(model.config, 2, len(prompt) + layout.length, dtype, "cpu", spare)
    step = CachedStep(model, cache, vocabulary.code_slice, compiled)
    if speculation:
        sample_jacobi(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)], speculation)
    else:
        sample(step, [prompt], layout, SamplingConfig(top_k=16384), [(0, 0)])
    return time.perf_counter() - began


def chameleon(model: Transformer, layout: ImageLayout, prompt: list[int]) -> tuple[float, int]:
    """Seconds and forwards of `generate` with its own guidance, which calls the model a second time for each id.

    It writes as many ids as a row-by-row sampler must: codes and row ends.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = model.config
    image = dict(embed_dim=8, num_embeddings=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
                 latent_channels=8, resolution=16)  # fmt: skip
    sizes = {name: getattr(config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")}  # fmt: skip
    raw = ChameleonConfig(**sizes, vocabulary_map={"<image>": 5}, vq_config=image, attn_implementation="sdpa",
                          bos_token_id=1, eos_token_id=None, pad_token_id=0)  # fmt: skip
    with torch.device("meta"):
        theirs = ChameleonForConditionalGeneration(raw)
    state = {disk_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if "_norm." in name and "self_attn" in name:  # theirs has a row a head
            state[name] = tensor.expand(config.num_attention_heads, -1)
    theirs.to_empty(device="cpu")
    theirs.load_state_dict(state, strict=False)
    theirs.model.rotary_emb.__init__(raw)  # its buffers are not in a state dict
    calls = []
    theirs.model.register_forward_hook(lambda *_: calls.append(1))
    start = [*prompt, *layout.ids[: layout.prefix_length].tolist()]
    new = layout.num_codes + layout.rows
    began = time.perf_counter()
    theirs.eval().generate(
        torch.tensor([start]), negative_prompt_ids=torch.tensor([start[len(prompt) :]]), guidance_scale=4.0,
        do_sample=True, top_k=16384, temperature=1.0, max_new_tokens=new, min_new_tokens=new, use_cache=True,
    )  # fmt: skip
    return time.perf_counter() - began, len(calls)


# -- whole -------------------------------------------------------------------------------------------------------------


def whole(args: argparse.Namespace) -> dict:
    """Loads the 7B as int4, then runs the first codes and, with a cache that is full, the last ones of 768 x 768."""
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
            ends[end] = run_codes(model, replace(layout, given=given), prompt, args.codes)
    step = (ends["first"] + ends["last"]) / 2
    hours = step * layout.num_codes / 3600  # a step grows with the cache, evenly
    cache = 2 * cache_bytes(config, len(prompt) + layout.length, torch.int8)
    print("| what | measured |\n| --- | --- |")
    print(f"| loading, with quantization | {taken:.0f} s |")
    print(f"| peak anonymous memory, loading | {loading[0] / 1e9:.2f} GB |")
    print(f"| peak anonymous memory, an image of 768 x 768 | {running[0] / 1e9:.2f} GB |")
    print(f"| of it int4 weights, embeddings, int8 head | {stored_bytes(model) / 1e9:.2f} GB |")
    print(f"| of it the int8 cache | {cache / 1e9:.2f} GB |")
    print(f"| s a code, the first and the last {args.codes} | {ends['first']:.2f}, {ends['last']:.2f} |")
    print(f"| a whole image, projected | {hours:.1f} h |")
    return {
        "dtype": args.dtype, "loading_s": taken, "peak_loading_gb": loading[0] / 1e9, "weights_gb":
        stored_bytes(model) / 1e9, "peak_running_gb": running[0] / 1e9, "cache_gb": cache / 1e9,
        "first_s": ends["first"], "last_s": ends["last"], "image_hours": hours,
    }  # fmt: skip


class _Enough(Exception):
    pass


def run_codes(model: Transformer, layout: ImageLayout, prompt: list[int], codes: int) -> float:
    """Seconds a code over so many steps. Given codes are not read: the cache holds random numbers in their place."""
    vocabulary, length = layout.vocabulary, len(prompt) + layout.length
    cache = KVCache(model.config, 2, length, torch.int8, "cpu")
    inner, bar, began = CachedStep(model, cache, vocabulary.code_slice), tqdm(total=codes, unit="code"), []
    if layout.given:
        for tensor in cache.tensors():
            tensor.random_(-127, 128) if tensor.dtype == torch.int8 else tensor.fill_(0.02)
        inner.calls = 1

    def step(ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        if began:
            bar.update()
        elif layout.given:
            began.append(time.perf_counter())
            return torch.randn(2, 1, vocabulary.num_image_codes)
        if len(began) > codes:
            raise _Enough
        logits = inner(ids, positions, read)
        began.append(time.perf_counter())  # the first ends the prompt, which is not counted
        return logits

    try:
        given = torch.zeros(1, layout.given, dtype=torch.long)
        sample(step, [prompt], layout, SamplingConfig(), [(0, 0)], given=given)
    except _Enough:
        pass
    bar.close()
    return (time.perf_counter() - began[0]) / codes


def write_random(config: ModelConfig, folder: Path) -> None:
    """A sharded bf16 checkpoint in the released layout, a shard a layer; done once."""
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
    config.to_json(folder / "config.json")  # last: it says that all is there


if __name__ == "__main__":
    sys.exit(main())
