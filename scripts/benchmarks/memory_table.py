"""Prints an estimate of the memory of finetuning on each GPU, and how many pictures fit in a micro-batch.

python scripts/benchmarks/memory_table.py                                   # the 7B, pictures of 768 x 768
python scripts/benchmarks/memory_table.py --model_config configs/model/2B.yaml --size 512
"""

import argparse
import sys
from dataclasses import replace

from lumina_mgpt import cli

TEXT = 90  # ids of an instruction and a long prompt
MOST = 64  # largest micro-batch that is tried, pictures


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="memory_table.py", description="Estimates the memory of finetuning on each GPU.")
    parser.add_argument("--model_config", default="configs/model/7B.yaml", help="YAML file of the model")
    parser.add_argument("--size", type=cli.whole, default=768, help="width and height of a picture")
    parser.add_argument("--gpus", type=cli.whole, nargs="+", default=[1, 4, 8], help="numbers of GPUs")
    parser.add_argument("--gb", type=cli.whole, nargs="+", default=[24, 48, 80], help="memory of a GPU, in GB")
    parser.add_argument("--distill", action="store_true", help="of distill-guidance instead of finetune")
    parser.add_argument("--lora_rank", type=cli.whole, default=16, help="rank of adapters")
    return parser


def table(args: argparse.Namespace) -> None:
    """Prints a row for each way of training and number of GPUs."""
    from common import print_header, print_row

    from lumina_mgpt.checks import whole_number
    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.training.memory import Plan

    for name in ("size", "gpus", "gb", "lora_rank"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            whole_number(name, value, 1, 1_000_000, "must be a whole number in 1 ... 1000000")
    config, cells = ModelConfig.from_yaml(args.model_config), args.size // 8
    ids = cells * (cells + 1) + 4 + TEXT
    ways = {
        "all weights": {},
        "all weights, `--cpu_offload`": {"offload": True},
        f"`--lora_rank {args.lora_rank}`": {"lora_rank": args.lora_rank},
    }
    sizes = [f"of {gb} GB" for gb in args.gb]
    print_header(f"{ids:,} ids with `--checkpointing`", "GPUs", "GB each", *sizes)
    for name, way in ways.items():
        for gpus in args.gpus:
            plan = Plan(config, ids, gpus, distills=args.distill, **way)
            counts = [most(plan, ids, gb) for gb in args.gb]
            print_row(name, gpus, f"{plan.peak() / 1e9:.0f}", *(count or "no" for count in counts))


def most(plan, ids: int, gb: int) -> int:
    """Number of pictures in a micro-batch that fit in a GPU's memory."""
    fitting = (count for count in range(MOST, 0, -1) if replace(plan, ids=count * ids).peak() <= gb * 1e9)
    return next(fitting, 0)


def main(argv: list[str] | None = None) -> int:
    return cli.run(table, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
