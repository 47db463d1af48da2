"""Groups of options that several commands share, and what they mean to the library."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import resources
from lumina_mgpt.cli.parser import Parser, number, whole
from lumina_mgpt.cli.progress import ReadingBar
from lumina_mgpt.config import (
    COUPLINGS,
    DEFAULT_INT4_GROUP,
    INT4_GROUPS,
    SamplingConfig,
    Speculation,
    check_counts,
)
from lumina_mgpt.errors import InputError

if TYPE_CHECKING:
    import torch

    from lumina_mgpt.pipeline import Checkpoint, Pipeline

DEMO = "assets/demo"


def add_checkpoint_options(parser: Parser) -> None:
    """Options that say which weights run, and where."""
    parser.aliases["quant"] = "--quant_group"
    group = parser.add_argument_group("checkpoint and device")
    group.add_argument("--model_path", default=DEMO, help="checkpoint folder, or hub id")
    group.add_argument("--movqgan_path", help="MoVQGAN weights, where the checkpoint folder holds none")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: a GPU if any")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="of the transformer; auto: bf16 on CUDA, on a CPU fp32 (bf16 with --quant, or where memory is short)",
    )  # fmt: skip
    group.add_argument("--attn", default="sdpa", choices=("sdpa", "flash"), help="flash needs flash-attn and a GPU")
    group.add_argument("--quant", action="store_true", help="int4 weights, made while loading; `quantize` keeps them")
    group.add_argument(
        "--quant_group", type=whole, choices=INT4_GROUPS,
        help=f"weights that share a scale; fewer: nearer to the original, larger (default: {DEFAULT_INT4_GROUP})",
    )  # fmt: skip
    group.add_argument(
        "--cache_dtype", default="auto", choices=("auto", "int8"),
        help="of keys and values; auto: the transformer's; int8: half of bf16, a scale a token and head",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="compile the steps: minutes before the first image, for many of them or large models",
    )  # fmt: skip
    group.add_argument(
        "--movqgan_dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the image tokenizer"
    )


def load_pipeline(args: argparse.Namespace, checkpoint: "Checkpoint", device: "torch.device") -> "Pipeline":
    """The pipeline of an opened checkpoint that `add_checkpoint_options` asks for."""
    import torch

    from lumina_mgpt.devices import DTYPES
    from lumina_mgpt.pipeline import Pipeline

    stored = checkpoint.config.int4_group
    with ReadingBar("int4 while loading" if args.quant and not stored else "loading", delay=3) as bar:
        return Pipeline.from_pretrained(
            checkpoint, device, args.dtype, attn=args.attn, quant=quant_group(args, stored), on_read=bar,
            cache_dtype=torch.int8 if args.cache_dtype == "int8" else None, movqgan_dtype=DTYPES[args.movqgan_dtype],
            compile=args.compile,
        )  # fmt: skip


def quant_group(args: argparse.Namespace, stored: int | None = None) -> int | None:
    """The group size that --quant asks for, None without it; `stored` is that of a checkpoint which is int4 already."""
    if args.quant:
        return args.quant_group or stored or DEFAULT_INT4_GROUP
    if args.quant_group is not None:
        raise InputError(f"--quant_group {args.quant_group} means nothing without --quant; add that, or leave it out")
    return None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how codes are drawn."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg", type=number, default=SamplingConfig.cfg, help="guidance scale; 1: no guidance")
    group.add_argument(
        "--top_k", type=whole, default=SamplingConfig.top_k,
        help="draw from this many likeliest codes (never more than there are); 1: always the likeliest",
    )  # fmt: skip
    group.add_argument("--temperature", type=number, default=SamplingConfig.temperature, help="> 0; less is smoother")
    group.add_argument("--seed", type=whole, default=SamplingConfig.seed, help="same seed and prompt, same image")


def add_batch_size(group) -> None:
    group.add_argument(
        "--batch_size", type=whole, help="images made at once; changes speed and memory only (default: up to 8)"
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Options of speculative Jacobi sampling."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--speculative_jacobi", action="store_true",
        help="several codes a forward; exact: the same image, or with --coupling maximal one of the same distribution",
    )  # fmt: skip
    group.add_argument(
        "--fast", action="store_true",
        help="times a few forwards and takes the quickest window and coupling, for long runs --compile too; exact",
    )  # fmt: skip
    group.add_argument("--coupling", choices=COUPLINGS, help=f"how drafts are judged (default: {Speculation.coupling})")
    group.add_argument("--window", type=whole, help="drafts judged by one forward (default: by device and precision)")


def speculation_settings(args: argparse.Namespace) -> Speculation | None:
    """The speculation options of a command line, checked; None where there is to be none."""
    given = {name: getattr(args, name) for name in ("coupling", "window") if getattr(args, name) is not None}
    if args.fast and (args.speculative_jacobi or given):
        raise InputError("--fast chooses --speculative_jacobi, --coupling and --window itself; leave those out, or it")
    if args.speculative_jacobi:
        return Speculation(**given)
    for name, value in given.items():
        raise InputError(f"--{name} {value} means nothing without --speculative_jacobi; add that, or leave it out")
    return None


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where pictures go."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", default="outputs", help="folder for the pictures")
    group.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")


def checkpoint_path(text: str) -> str | Path:
    """The demo checkpoint is found from any working folder; every other path or hub id is taken as given."""
    return resources.demo_checkpoint() if text == DEMO and not Path(DEMO).exists() else text


def sampling_settings(args: argparse.Namespace) -> SamplingConfig:
    """The sampling options of a command line, checked."""
    check_counts(getattr(args, "n", 1), getattr(args, "batch_size", None))
    return SamplingConfig(cfg=args.cfg, top_k=args.top_k, temperature=args.temperature, seed=args.seed)
