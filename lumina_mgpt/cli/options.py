"""Options that several commands share, and the conversion of their values to settings."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_mgpt import resources
from lumina_mgpt.checks import whole_number
from lumina_mgpt.cli.parser import Parser, number, whole
from lumina_mgpt.cli.progress import ReadingBar
from lumina_mgpt.config import (
    COUPLINGS,
    DEFAULT_INT4_GROUP,
    INT4_GROUPS,
    SamplingConfig,
    Speculation,
)
from lumina_mgpt.errors import InputError

if TYPE_CHECKING:
    import torch

    from lumina_mgpt.model.parallel import Parallel
    from lumina_mgpt.pipeline import Checkpoint, Pipeline

DEMO = "assets/demo"
# Parameter of GenerationRequest -> option, where the names differ.
ALIASES = {"prompts": "--prompt", "panel": "--image_path", "shown": "--panel_prompt"}
_SAMPLING = ("cfg", "top_k", "temperature", "text_top_k", "text_temperature")


def add_checkpoint_options(parser: Parser) -> None:
    """Adds the options that select weights, device and number formats."""
    parser.aliases |= {"quant": "--quant_group", "vqgan_path": "--vqgan_path"}
    group = parser.add_argument_group("checkpoint and device")
    group.add_argument("--model_path", default=DEMO, help="checkpoint folder or hub id")
    group.add_argument(
        "--movqgan_path",
        "--vqgan_path",
        help="weights of the image tokenizer: a MoVQGAN for Lumina-mGPT 2.0, Chameleon's VQGAN for Lumina-mGPT "
        "(default: those in the checkpoint folder)",
    )
    group.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: a GPU if there is one"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="number format of the transformer; auto: bf16 on CUDA, fp16 on Apple GPUs, fp32 on a CPU (bf16 with "
        "--quant, or if fp32 weights exceed half of the memory); Lumina-mGPT overflows fp16",
    )
    group.add_argument(
        "--attn", default="sdpa", choices=("sdpa", "flash"), help="attention; flash needs flash-attn and CUDA"
    )
    group.add_argument(
        "--quant", action="store_true", help="quantize weights to int4 while loading; lumina-mgpt quantize saves them"
    )
    group.add_argument(
        "--quant_group",
        type=whole,
        choices=INT4_GROUPS,
        help="int4 weights that share a scale; smaller groups are more accurate and take more memory (default: "
        f"{DEFAULT_INT4_GROUP})",
    )
    group.add_argument(
        "--cache_dtype",
        default="auto",
        choices=("auto", "int8"),
        help="number format of cached keys and values; auto: that of the transformer; int8: half the memory of bf16",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the model; takes minutes before the first image, then each image is faster",
    )
    group.add_argument(
        "--no_cuda_graphs",
        action="store_true",
        help="on CUDA, start the kernels of each step one by one; without it, a graph starts them all at once",
    )
    group.add_argument(
        "--movqgan_dtype",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="number format of the image tokenizer's decoder; images are encoded in fp32",
    )


def open_checkpoint(args: argparse.Namespace) -> "Checkpoint":
    """Opens the checkpoint that the command line names. Loads no weights.

    Args:
        args: parsed command line, with the options of `add_checkpoint_options`.
    """
    from lumina_mgpt.preparation import Checkpoint

    path = checkpoint_path(args.model_path)
    return Checkpoint.open(path, args.movqgan_path, getattr(args, "target_size", None))


def warn_without_text(checkpoint: "Checkpoint") -> None:
    """Prints a warning if the checkpoint is not trained to write text."""
    family = checkpoint.config.family
    if not family.answers_in_text:
        print(
            f"warning: {family.name} is not trained to write text, so expect none that makes sense; Lumina-mGPT is",
            file=sys.stderr,
        )


def add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    """Adds --tensor_parallel."""
    parser.add_argument(
        "--tensor_parallel",
        type=whole,
        default=1,
        metavar="N",
        help="N processes, started by torchrun, hold the model together, each a part of it on its own GPU",
    )


def refuse_tensor_parallel(args: argparse.Namespace, what: str) -> None:
    """Raises InputError for --tensor_parallel above 1. `what` names what one process alone can make."""
    if args.tensor_parallel > 1:
        raise InputError(f"must be 1 for {what}, got {args.tensor_parallel}; leave it out", "tensor_parallel")


@contextlib.contextmanager
def model_processes(
    args: argparse.Namespace, checkpoint: "Checkpoint", device: "torch.device"
) -> "Iterator[Parallel | None]":
    """Connects this process, during the block, with the others that hold the same model; gives None if it is alone.

    Args:
        args: parsed command line, with the options of `add_checkpoint_options` and `add_tensor_parallel`.
        checkpoint: the opened checkpoint.
        device: device of this process.

    Raises:
        InputError: the model cannot be split in this way, or the processes cannot connect.
    """
    if args.tensor_parallel == 1:
        yield None
        return
    from lumina_mgpt.model.parallel import Parallel, require_fit

    quant = quant_group(args, checkpoint.config.int4_group)
    require_fit(checkpoint.config, args.tensor_parallel, quant, args.compile)
    with Parallel.start(device, args.tensor_parallel) as parallel:
        yield parallel


def load_pipeline(
    args: argparse.Namespace,
    checkpoint: "Checkpoint",
    device: "torch.device",
    parallel: "Parallel | None" = None,
    text: bool | None = None,
) -> "Pipeline":
    """Loads the weights of an opened checkpoint and returns the pipeline.

    Args:
        args: parsed command line, with the options of `add_checkpoint_options`.
        checkpoint: the opened checkpoint.
        device: device to load the weights to.
        parallel: this process among those that hold the model together, None if it is alone.
        text: whether text will be sampled (default: by the family).

    Raises:
        InputError: --no_cuda_graphs is given without a CUDA device, or an error of `Pipeline.from_pretrained`.
    """
    import torch

    from lumina_mgpt.devices import DTYPES
    from lumina_mgpt.pipeline import Pipeline

    if args.no_cuda_graphs and device.type != "cuda":
        raise InputError(f"--no_cuda_graphs has no effect on device {device}; leave it out, or use --device cuda")
    stored = checkpoint.config.int4_group
    with ReadingBar("int4 while loading" if args.quant and not stored else "loading", delay=3) as bar:
        return Pipeline.from_pretrained(
            checkpoint,
            device,
            args.dtype,
            attn=args.attn,
            quant=quant_group(args, stored),
            on_read=bar,
            cache_dtype=torch.int8 if args.cache_dtype == "int8" else None,
            movqgan_dtype=DTYPES[args.movqgan_dtype],
            compile=args.compile,
            cuda_graphs=not args.no_cuda_graphs,
            parallel=parallel,
            text=text,
        )


def quant_group(args: argparse.Namespace, stored: int | None = None) -> int | None:
    """Returns the group size for int4 weights, or None without --quant.

    Args:
        args: parsed command line, with the options of `add_checkpoint_options`.
        stored: group size of the checkpoint if its weights are int4 already, else None.

    Raises:
        InputError: --quant_group is given without --quant.
    """
    if args.quant:
        return args.quant_group or stored or DEFAULT_INT4_GROUP
    if args.quant_group is not None:
        raise InputError(f"--quant_group {args.quant_group} has no effect without --quant; add that, or leave it out")
    return None


def add_target_size(group: argparse._ActionsContainer) -> None:
    """Adds --target_size."""
    group.add_argument(
        "--target_size",
        type=whole,
        metavar="SIZE",
        help="the checkpoint is trained on images of about SIZE x SIZE pixels: the size of images by default, and to "
        "which given pictures are cropped (default: base_size of its config.json, else 768)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, text: bool = False) -> None:
    """Adds the options that set the fields of SamplingConfig for images.

    Args:
        text: whether text is sampled, too: adds the options for it.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--cfg",
        type=number,
        help="guidance scale; 1 disables guidance (default: 4; 1 for maps and detection of Lumina-mGPT, and for "
        "weights of distill-guidance)",
    )
    group.add_argument(
        "--top_k",
        type=whole,
        help="sample from this many most probable codes; 1: always the most probable (default: 4096; 2000 for "
        "Lumina-mGPT, 200 for its maps and detection)",
    )
    group.add_argument("--temperature", type=number, help="above 0; lower values prefer probable codes (default: 1)")
    if text:
        add_text_sampling(group)
    group.add_argument(
        "--seed", type=whole, default=SamplingConfig.seed, help="the same seed and prompt give the same result"
    )


def add_text_sampling(group: argparse._ActionsContainer) -> None:
    """Adds the options that set the fields of SamplingConfig for text."""
    group.add_argument(
        "--text_top_k",
        type=whole,
        help="sample text from this many most probable pieces; 1: always the most probable (default: 10)",
    )
    group.add_argument("--text_temperature", type=number, help="the same as --temperature, for text (default: 1)")


def add_batch_size(group: argparse._ActionsContainer) -> None:
    """Adds --batch_size."""
    group.add_argument(
        "--batch_size",
        type=whole,
        help="images sampled together; affects speed and memory only (default: up to 8, "
        "and up to 32 for plain sampling on a CPU)",
    )


def add_speculation_options(parser: argparse.ArgumentParser, fast: bool = True) -> None:
    """Adds the options of speculative Jacobi sampling.

    Args:
        fast: whether to add --fast, too, which needs the size of all images in advance.
    """
    group = parser.add_argument_group("speculative sampling")
    group.add_argument(
        "--speculative_jacobi",
        action="store_true",
        help="accept several codes per forward; exact: the same image, or with --coupling maximal another image from "
        "the same distribution",
    )
    if fast:
        group.add_argument(
            "--fast",
            action="store_true",
            help="sample a few codes with several windows and use the fastest, in long runs also --compile; exact",
        )
    group.add_argument(
        "--coupling", choices=COUPLINGS, help=f"how drafts are verified (default: {Speculation.coupling})"
    )
    group.add_argument(
        "--window", type=whole, help="drafts verified by one forward (default: depends on device and precision)"
    )


def speculation_settings(args: argparse.Namespace) -> Speculation | None:
    """Returns the settings of speculative sampling, or None without --speculative_jacobi.

    Args:
        args: parsed command line, with the options of `add_speculation_options`.

    Raises:
        InputError: options do not fit each other.
    """
    given = {name: getattr(args, name) for name in ("coupling", "window") if getattr(args, name) is not None}
    if getattr(args, "fast", False) and (args.speculative_jacobi or given):
        raise InputError("--fast chooses --speculative_jacobi, --coupling and --window itself; leave those out, or it")
    if args.speculative_jacobi:
        return Speculation(**given)
    for name, value in given.items():
        raise InputError(f"--{name} {value} has no effect without --speculative_jacobi; add that, or leave it out")
    return None


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds --save_path and --overwrite, the options for OutputFolder."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", default="outputs", help="folder for the images")
    group.add_argument("--overwrite", action="store_true", help="replace files of the same name")


def checkpoint_path(text: str) -> str | Path:
    """Returns the path or hub id of a checkpoint, such that the path DEMO works in every working directory.

    If `text` is DEMO and the working directory has no such path, the result is the folder of the demo checkpoint.
    Otherwise, the result is `text`.
    """
    return resources.demo_checkpoint() if text == DEMO and not Path(DEMO).exists() else text


def add_max_new_tokens(group: argparse._ActionsContainer, default: int | str) -> None:
    """Adds --max_new_tokens. `default` is that of the function that samples."""
    group.add_argument("--max_new_tokens", type=whole, help=f"largest number of ids of an answer (default: {default})")


def answer_limit(args: argparse.Namespace) -> dict[str, int]:
    """Returns the argument that --max_new_tokens gives; none without the option.

    Raises:
        InputError: the value is below 1.
    """
    limit = args.max_new_tokens
    if limit is None:
        return {}
    rule = "must be a whole number of at least 1; try 1024"
    return {"max_new_tokens": whole_number("max_new_tokens", limit, 1, None, rule)}


def sampling_settings(args: argparse.Namespace) -> SamplingConfig:
    """Returns the settings that the options of `add_sampling_options` give. `unset_sampling` names the others."""
    given: dict[str, Any] = given_sampling(args)
    return SamplingConfig(seed=args.seed, **given)


def given_sampling(args: argparse.Namespace) -> dict[str, float]:
    """Returns the fields of SamplingConfig that the command line gives, without the seed."""
    return {name: value for name in _SAMPLING if (value := getattr(args, name, None)) is not None}


def unset_sampling(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the fields of SamplingConfig that the command line does not give. The task and the family set them."""
    return tuple(name for name in _SAMPLING if getattr(args, name, None) is None)
