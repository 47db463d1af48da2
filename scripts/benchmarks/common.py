"""What the benchmarks share: markdown tables and the option for CPU threads."""

import argparse
from collections.abc import Mapping

import torch

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError


def print_header(*columns: object) -> None:
    """Prints the header of a markdown table."""
    print_row(*columns)
    print("| --- " * len(columns) + "|", flush=True)


def print_row(*cells: object) -> None:
    """Prints a row of a markdown table at once, as the next may take minutes."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def add_threads(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--threads`."""
    parser.add_argument("--threads", type=cli.whole, default=torch.get_num_threads(), help="CPU threads")


def add_sizes(parser: argparse.ArgumentParser, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Adds an option for each size: name -> (default, help)."""
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=cli.whole, default=default, help=meaning)


def set_threads(threads: int) -> None:
    """Sets the number of CPU threads.

    Raises:
        InputError: it is not in 1 ... 1024.
    """
    if not 1 <= threads <= 1024:
        raise InputError(f"must be in 1 ... 1024, got {threads}; try {torch.get_num_threads()}", "threads")
    torch.set_num_threads(threads)
