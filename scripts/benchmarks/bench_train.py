"""Measures training steps against a plain loop: transformers' Chameleon with full logits, same weights and batch.

    python scripts/benchmarks/bench_train.py

The sides are the plain loop, the same compiled by torch.compile, this project's step, the same with `--compile`, and
with `--checkpointing`. Each side runs in its own process, in float32, or with `--precision bf16` in torch's autocast
as in the trainer. `--runs` rounds run all sides in turn; a speed is a ratio of two sides of one round. The first step
of a process is not timed: it compiles, and allocates the optimizer's state. `beyond_gb` is peak memory less weights,
gradients and optimizer state, which take 16 bytes a parameter on each side; on compiled sides it includes the compiler.
Freed memory is kept for the next tensors, as in the trainer. With `--freed returned`, and with checkpointing, it goes
back to the system, which takes less memory and more time.

The defaults need 12 GB and many minutes, most of which the compiler takes. The last line is JSON. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from common import add_sizes

from lumina_mgpt import cli

PLAIN = ("plain", "plain_compiled")
SIDES = (*PLAIN, "ours", "ours_compiled", "checkpointing")
PROMPT = 50  # ids of the prompt, without a label
SIZES = {
    "vocab": (171_385, "vocabulary size"),
    "hidden": (1024, "width of the model"),
    "layers": (8, "number of layers"),
    "length": (1100, "ids in a sequence"),
    "batch": (1, "sequences in a batch"),
    "steps": (3, "training steps of a run, of which the first is not timed"),
    "threads": (2, "CPU threads"),
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_train.py", description="Measures a training step against a plain loop.")
    add_sizes(parser, SIZES)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of matrix products")
    parser.add_argument("--freed", choices=("kept", "returned"), default="kept", help="where freed memory goes")
    parser.add_argument("--runs", type=cli.whole, default=3, help="runs of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="measure only these sides")
    parser.add_argument("--side", choices=SIDES, help="measure only this side, once, in this process")
    return parser


def measure(args: argparse.Namespace) -> dict:
    """Tokens a second of the fastest timed step, peak memory beyond 16 bytes a parameter, and the loss of each step."""
    import torch

    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.model.transformer import Transformer
    from lumina_mgpt.training.distributed import keep_freed_memory, return_freed_memory
    from lumina_mgpt.training.loss import LossModel
    from lumina_mgpt.training.optimizer import BETAS, AdamW, use_sparse_embedding

    return_freed_memory()  # as the trainer does
    if args.freed == "kept" and args.side != "checkpointing":
        keep_freed_memory()  # which makes the plain loop faster, too
    torch.set_num_threads(args.threads)
    heads = max(1, args.hidden // 128)
    config = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=args.hidden * 11 // 4,
        model_parallel_size=heads,
        image_code_offset=args.vocab // 2,
        num_image_codes=16,
    )
    model = Transformer(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(6, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(1))
    if args.side in PLAIN:
        model, labels = chameleon_of(model), ids.clone()
        labels[:, :PROMPT] = -100
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=BETAS, fused=True)
        called = torch.compile(model) if args.side == "plain_compiled" else model
        return timed(model, optimizer, lambda: called(input_ids=ids, labels=labels, use_cache=False).loss, args)
    model.gradient_checkpointing = args.side == "checkpointing"
    use_sparse_embedding(model)
    index = torch.arange(ids.numel()).view_as(ids)[:, PROMPT - 1 : -1].flatten()
    targets, ours = ids[:, PROMPT:].flatten(), LossModel(model)
    if args.side == "ours_compiled":
        ours.compile_parts()
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=BETAS, fused=True)
    return timed(ours, optimizer, lambda: ours(ids, index, targets)[0] / len(targets), args)


def chameleon_of(model):
    """transformers' Chameleon with the same weights, without its image tokenizer."""
    from peers import chameleon, copy_weights

    theirs = chameleon(model.config, attn_implementation="sdpa").train()
    copy_weights(model, theirs)
    del theirs.model.vqmodel
    return theirs


def timed(model, optimizer, loss: Callable, args: argparse.Namespace) -> dict:
    """Runs training steps of `loss`; see `measure`."""
    import torch

    parameters = sum(parameter.numel() for parameter in model.parameters())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    rest = resident("VmRSS") - 4 * parameters  # the interpreter and its libraries
    losses, seconds = [], []
    for _ in range(args.steps):
        began = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(round(value.item(), 5))
        seconds.append(time.monotonic() - began)
    beyond = resident("VmHWM") - rest - 16 * parameters
    speed = args.batch * args.length / min(seconds[1:] or seconds)
    return {
        "tokens_per_second": round(speed, 2),
        "beyond_gb": round(beyond / 1e9, 3),
        "losses": losses,
        "parameters": parameters,
    }


def resident(what: str) -> int:
    """Bytes of this process's resident memory: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(what))


def bench(args: argparse.Namespace) -> None:
    if args.side:
        print(json.dumps(measure(args)))
        return
    rounds = [{side: one_run(side, args) for side in args.sides} for _ in range(args.runs)]
    how = {"precision": args.precision, "freed": args.freed}
    print(json.dumps(how | {side: summary(side, rounds) for side in args.sides}))


def one_run(side: str, args: argparse.Namespace) -> dict:
    """Returns what `measure` returns for one side, in a new process."""
    line = [sys.executable, __file__, "--side", side, "--precision", args.precision, "--freed", args.freed]
    line += [part for name in SIZES for part in (f"--{name}", str(getattr(args, name)))]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {found}", file=sys.stderr, flush=True)
    return found


def summary(side: str, rounds: list[dict]) -> dict:
    """Returns the medians of a side, and its ratios to the plain loops.

    `speed` and `memory` have a ratio for each plain loop: of memory the median, of speed the smallest, the median and
    the largest of the rounds. `to_better` has the speeds to the faster plain loop of each round.
    """
    speeds = [one[side]["tokens_per_second"] for one in rounds]
    beyond = statistics.median(one[side]["beyond_gb"] for one in rounds)
    found = {"tokens_per_second": speeds, "beyond_gb": beyond, "losses": rounds[0][side]["losses"]}
    plain = [other for other in PLAIN if other in rounds[0]]
    if side in PLAIN or not plain:
        return found
    found["speed"], found["memory"] = {}, {}
    for other in plain:
        found["speed"][other] = spread(
            [one[side]["tokens_per_second"] / one[other]["tokens_per_second"] for one in rounds]
        )
        found["memory"][other] = round(beyond / statistics.median(one[other]["beyond_gb"] for one in rounds), 3)
    best = [max(one[other]["tokens_per_second"] for other in plain) for one in rounds]
    return found | {"to_better": spread([speed / other for speed, other in zip(speeds, best, strict=True)])}


def spread(values: list[float]) -> list[float]:
    """Returns the smallest, the median and the largest value."""
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
