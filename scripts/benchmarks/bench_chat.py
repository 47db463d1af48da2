"""Measures how long each turn of a conversation waits for its first id. Prints a table and one line of JSON.

Every turn shows the model pictures and gets an answer in text. The model has random weights and the layers of the 7B,
only fewer and narrower. "anew" is the same turn in a conversation whose cache is empty, as in the released demo, which
reads the whole history at every turn. Pictures are given as codes: encoding them costs the same in both.

python scripts/benchmarks/bench_chat.py
python scripts/benchmarks/bench_chat.py --width 4096 --inner 11008 --layers 2
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from bench_large import random_model
from common import add_sizes, add_threads, print_header, print_row, set_threads

from lumina_mgpt import Checkpoint, Pipeline, cli, resources
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.conversation import AnswerStream, Conversation
from lumina_mgpt.errors import InputError
from lumina_mgpt.image_tokenizer import load_image_tokenizer

SIZES = {
    "width": (2048, "width of the model"),
    "inner": (5504, "width of its MLP"),
    "layers": (2, "number of layers"),
    "heads": (16, "number of heads"),
    "turns": (8, "number of turns, at least 2"),
    "side": (192, "side of a picture in pixels; 192 takes 604 ids, as 384 in the first generation"),
    "pictures": (1, "pictures a turn"),
    "answer": (32, "ids of an answer"),
    "repeats": (3, "equal conversations; a turn's time is the least of theirs"),
}
_CONTEXT = 10240


@dataclass
class Clock:
    """Measures the time from a start to the first logits after it.

    Attributes:
        model: the model, whose `project` this replaces.
        now: the time in seconds.
        first: seconds to the first logits; None before.
    """

    model: torch.nn.Module
    now: Callable[[], float] = time.perf_counter
    began: float = 0.0
    first: float | None = None

    def __post_init__(self) -> None:
        project = self.model.project

        def timed(*args: object) -> torch.Tensor:
            logits = project(*args)
            if self.first is None:
                self.first = self.now() - self.began
            return logits

        self.model.project = timed

    def seconds(self, stream: AnswerStream) -> float:
        """Samples the whole answer, and returns the seconds to its first logits."""
        self.began, self.first = self.now(), None
        for _ in stream:
            pass
        assert self.first is not None
        return self.first


def build_parser() -> cli.Parser:
    """Returns the parser of the options."""
    parser = cli.Parser(prog="scripts/benchmarks/bench_chat.py", description=__doc__.split("\n")[0])
    add_threads(parser)
    add_sizes(parser, SIZES)
    parser.add_argument("--cpu_time", action="store_true", help="measure time of the CPU; other processes matter less")
    return parser


def bench(args: argparse.Namespace) -> None:
    """Measures all turns and prints them."""
    for name, least, usual in (("turns", 2, 8), ("repeats", 1, 3)):
        if getattr(args, name) < least:
            raise InputError(f"must be at least {least}, got {getattr(args, name)}; try {usual}", name)
    set_threads(args.threads)
    pipeline = random_pipeline(args)
    clock = Clock(pipeline.model, time.process_time if args.cpu_time else time.perf_counter)
    say(pipeline.conversation(), args, 0, clock)  # warms up
    print(f"{args.threads} threads, the least of {args.repeats} conversations\n")
    print_header("turn", "ids before", "new ids", "s to the first id", "s anew")
    conversations = [pipeline.conversation() for _ in range(args.repeats)]
    rows = []
    for turn in range(1, args.turns + 1):
        history, before = conversations[0].ids, len(conversations[0].ids)
        seconds = min(say(conversation, args, turn, clock) for conversation in conversations)
        new = len(conversations[0].ids) - before
        anew = say(pipeline.conversation(ids=history), args, turn, clock, limit=1)
        print_row(turn, before, new, f"{seconds:.2f}", f"{anew:.2f}")
        rows.append({"turn": turn, "before": before, "new": new, "seconds": seconds, "anew": anew})
    ratio, saved = rows[-1]["seconds"] / rows[1]["seconds"], rows[-1]["anew"] / rows[-1]["seconds"]
    print(f"\nturn {args.turns} takes {ratio:.2f} times as long as turn 2; anew it takes {saved:.1f} times as long")
    print(json.dumps({"bench": "chat", **{name: getattr(args, name) for name in SIZES}, "ratio": ratio, "rows": rows}))


def random_pipeline(args: argparse.Namespace) -> Pipeline:
    """A pipeline with the demo's tokenizers and a random model of the wanted size."""
    checkpoint = Checkpoint.open(resources.demo_checkpoint())
    config: ModelConfig = replace(
        checkpoint.config,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=_CONTEXT,
    )
    images = load_image_tokenizer(checkpoint.folder, checkpoint.movqgan_path)
    return Pipeline(replace(checkpoint, config=config), random_model(config, torch.float32), images)


def say(
    conversation: Conversation, args: argparse.Namespace, turn: int, clock: Clock, limit: int | None = None
) -> float:
    """Says one turn with random pictures, samples the answer, and returns the seconds to its first logits."""
    vocabulary = conversation.host.checkpoint.vocabulary
    cells, generator = args.side // vocabulary.cell, torch.Generator().manual_seed(turn)
    shape = (args.pictures, cells, cells)
    pictures = list(torch.randint(vocabulary.num_image_codes, shape, generator=generator))
    stream = conversation.say(
        "What is in this picture?", pictures, want="text", max_new_tokens=limit or args.answer, seed=turn
    )
    return clock.seconds(stream)


if __name__ == "__main__":
    sys.exit(cli.run(bench, build_parser(), None))
