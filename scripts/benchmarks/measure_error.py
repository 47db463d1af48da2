"""Measures error and memory of int4 weights, an int8 head and an int8 cache. Prints a table and one line of JSON.

    python scripts/benchmarks/measure_error.py --model_path assets/demo

Samples an image in fp32 for each prompt. Each form of the model then reads the same ids, one at a time, with its cache.
`error` is the root of the squared error of the code logits against fp32, relative to their variance. `KL` is the mean
Kullback-Leibler divergence of the form's distribution from that of fp32, in nats. Both are without guidance.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from common import print_header, print_row
from torch import Tensor

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.config import INT4_GROUPS, SamplingConfig
from lumina_mgpt.devices import cache_bytes
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import int4, quantization
from lumina_mgpt.model.kv_cache import KVCache, Scaled
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Checkpoint, Pipeline

EARLY = "int8, keys before rotation"
FORMS = (  # weights, int4 group, cache, whether the head is int8
    ("fp32", None, "fp32", False),
    ("fp32", None, "int8", False),
    ("fp32", None, EARLY, False),
    ("fp32, int8 head", None, "fp32", True),
    *((f"int4 in groups of {group}", group, "fp32", False) for group in INT4_GROUPS),
)


def logits(model: Transformer, rows: Tensor, columns: slice, cache_dtype: torch.dtype) -> Tensor:
    """Logits (B, T, C) after each id of rows (B, T), fed one at a time, so that the cache serves all earlier ones."""
    B, T = rows.shape
    cache, found = KVCache(model.config, B, T, cache_dtype, "cpu"), []
    for t in range(T):
        hidden = model(rows[:, t : t + 1], positions=t, cache=cache, filled=t + 1)
        found.append(model.project(hidden, columns))
    return torch.cat(found, 1)


def measure(args: argparse.Namespace) -> None:
    if args.prompts < 1:
        raise InputError(f"--prompts must be at least 1, got {args.prompts}; try 5")
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path))
    pipeline = Pipeline.from_pretrained(checkpoint, "cpu", "fp32")
    prompts, layout = prompt_files.example_prompts(checkpoint.folder)[: args.prompts], checkpoint.layout()
    starts = checkpoint.prompt_ids(prompts, layout)
    codes = pipeline.sample(starts, layout, SamplingConfig(top_k=layout.vocabulary.num_image_codes), [0] * len(starts))
    rows = layout.fill(codes.flatten(1))[:, : layout.offset_of(layout.num_codes - 1) + 1]  # without prompts
    read = layout.code_offsets - 1
    columns, exact, figures = checkpoint.vocabulary.code_slice, None, []
    print_header("weights", "cache", "MB of layers", "MB of head", "MB of cache", "error", "KL")
    for name, group, kind, int8_head in FORMS:
        model = load_model(checkpoint.folder, None, "cpu", quant=group)  # int4 in its portable layout
        dequantize(model)
        model.float().lm_head.slice_columns(columns, int8_head)
        if kind == EARLY:
            round_early(model)
        cache_dtype = torch.int8 if kind == "int8" else torch.float32
        got = logits(model, rows, columns, cache_dtype)[:, read].double()
        exact = got if exact is None else exact
        error = ((got - exact).square().sum() / (exact - exact.mean(-1, keepdim=True)).square().sum()).sqrt().item()
        log_probs, expected = got.log_softmax(-1), exact.log_softmax(-1)
        divergence = (expected.exp() * (expected - log_probs)).sum(-1).mean().item()
        bits = 4 + 32 / group if group else 32
        layers = sum(p.numel() for p in pipeline.model.layers.parameters()) * bits / 8e6
        head = sum(t.nbytes for t in (model.lm_head.weight, model.lm_head.scale) if t is not None) / 1e6
        stored = torch.float32 if kind == "fp32" else torch.int8
        cache = cache_bytes(checkpoint.config, rows.shape[1], stored) / 1e6
        sizes = (f"{size:.1f}" for size in (layers, head, cache))
        print_row(name, kind, *sizes, f"{100 * error:.2f} %", f"{divergence:.5f}")
        figures.append(
            {
                "weights": name,
                "cache": kind,
                "layers_mb": layers,
                "head_mb": head,
                "cache_mb": cache,
                "error": error,
                "kl": divergence,
            }
        )
    print(json.dumps({"bench": "error", "images": len(prompts), "rows": figures}))


def dequantize(model: Transformer) -> None:
    """Replaces int4 matrices by their dequantized values, so that no kernel rounds activations."""
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, quantization.Int4Linear):
            weight = int4.dequantize(module.matrix)
            outputs, inputs = weight.shape
            linear = torch.nn.Linear(inputs, outputs, bias=False)
            linear.weight = torch.nn.Parameter(weight)
            if isinstance(module.bias, torch.nn.Parameter):
                linear.bias = module.bias
            owner, _, leaf = name.rpartition(".")
            setattr(model.layers.get_submodule(owner), leaf, linear)


def round_early(model: Transformer) -> None:
    """Rounds keys and values like an int8 cache, but keys before their rotation. The cache stays fp32."""

    def rounded(module: torch.nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        return Scaled.quantize(out.unflatten(-1, (-1, model.config.head_dim))).dequantize(out.dtype).view(out.shape)

    for layer in model.layers:
        for name in ("self_attn.k_norm", "self_attn.v_proj"):
            layer.get_submodule(name).register_forward_hook(rounded)


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="measure_error.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default=cli.DEMO, type=Path, help="checkpoint folder")
    parser.add_argument("--prompts", default=5, type=cli.whole, help="number of the checkpoint's example prompts")
    with torch.no_grad():
        return cli.run(measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
