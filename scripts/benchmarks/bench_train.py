"""Measures training steps against a plain loop: transformers' Chameleon with full logits, same weights and batch.

    python scripts/benchmarks/bench_train.py

The defaults need 12 GB and a few minutes. Each side runs in its own process, in float32; the last line is JSON.
`beyond_gb` is peak memory less weights, gradients and optimizer state, which take 16 bytes a parameter on each side.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

from common import add_sizes

from lumina_mgpt import cli

SIDES = ("plain", "ours", "checkpointing")
PROMPT = 50  # ids of the prompt, without a label
SIZES = {
    "vocab": (171_385, "vocabulary size"),
    "hidden": (1024, "width of the model"),
    "layers": (8, "number of layers"),
    "length": (1100, "ids in a sequence"),
    "batch": (1, "sequences in a batch"),
    "steps": (3, "training steps"),
    "threads": (2, "CPU threads"),
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_train.py", description="Measures a training step against a plain loop.")
    add_sizes(parser, SIZES)
    parser.add_argument("--side", choices=SIDES, help="measure only this side, in this process")
    return parser


def measure(args: argparse.Namespace) -> dict:
    """Tokens a second of the fastest step, peak memory beyond 16 bytes a parameter, and the loss of each step."""
    import torch

    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.model.transformer import Transformer
    from lumina_mgpt.training.distributed import return_freed_memory
    from lumina_mgpt.training.loss import LossModel

    return_freed_memory()  # as the trainer does; it helps the plain loop too
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
    if args.side == "plain":
        model, labels = chameleon_of(model), ids.clone()
        labels[:, :PROMPT] = -100
        return timed(model, lambda: model(input_ids=ids, labels=labels, use_cache=False).loss, args)
    model.gradient_checkpointing = args.side == "checkpointing"
    index = torch.arange(ids.numel()).view_as(ids)[:, PROMPT - 1 : -1].flatten()
    targets, ours = ids[:, PROMPT:].flatten(), LossModel(model)
    return timed(model, lambda: ours(ids, index, targets)[0] / len(targets), args)


def chameleon_of(model):
    """transformers' Chameleon with the same weights, without its image tokenizer."""
    from peers import chameleon, copy_weights

    theirs = chameleon(model.config, attn_implementation="sdpa").train()
    copy_weights(model, theirs)
    del theirs.model.vqmodel
    return theirs


def timed(model, loss: Callable, args: argparse.Namespace) -> dict:
    """Runs training steps of `loss`; see `measure`."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    rest = resident("VmRSS") - 4 * parameters  # the interpreter and its libraries
    losses, seconds = [], []
    for _ in range(args.steps):
        began = time.monotonic()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(value.item(), 5))
        seconds.append(time.monotonic() - began)
    beyond = resident("VmHWM") - rest - 16 * parameters
    speed = args.batch * args.length / min(seconds)
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
    found = {}
    for side in SIDES:
        line = [sys.executable, __file__, "--side", side]
        line += [part for name in SIZES for part in (f"--{name}", str(getattr(args, name)))]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side}: {found[side]}", file=sys.stderr)
    plain = found["plain"]
    for side in SIDES[1:]:
        found[side] |= {
            "speed": round(found[side]["tokens_per_second"] / plain["tokens_per_second"], 3),
            "memory": round(found[side]["beyond_gb"] / plain["beyond_gb"], 3),
        }
    print(json.dumps(found))


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
