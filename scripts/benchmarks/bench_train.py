"""Measures a training step against a plain loop: transformers' Chameleon with full logits, the same weights and batch.

    python scripts/benchmarks/bench_train.py

Vocabulary 171,385, width 1024, 8 layers, 1,100 ids: 12 GB, a few minutes.

Each side runs in a process of its own, in float32; the last line is JSON. `beyond` is peak memory less weights,
gradients and optimizer state, which are 16 bytes a parameter on each side. Linux only; needs transformers (`.[test]`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from lumina_mgpt import cli

SIDES = ("plain", "ours", "checkpointing")
PROMPT = 50  # ids without a label
SIZES = {"vocab": 171_385, "hidden": 1024, "layers": 8, "length": 1100, "batch": 1, "steps": 3, "threads": 2}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_train.py", description="Measures a training step against a plain loop.")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=cli.whole, default=default, help=" ")
    parser.add_argument("--side", choices=SIDES, help="measure this one only, in this process")
    return parser


def measure(args: argparse.Namespace) -> dict:
    """Tokens a second of the fastest step, GB at the peak beyond 16 bytes a parameter, and each step's loss."""
    import torch

    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.model.transformer import Transformer
    from lumina_mgpt.training.distributed import return_freed_memory
    from lumina_mgpt.training.loss import LossModel

    return_freed_memory()  # as the trainer does; the plain loop gains by it too
    torch.set_num_threads(args.threads)
    heads = max(1, args.hidden // 128)
    config = ModelConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=args.hidden * 11 // 4, model_parallel_size=heads,
        image_code_offset=args.vocab // 2, num_image_codes=16,
    )  # fmt: skip
    model = Transformer(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(6, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(1))
    if args.side == "plain":
        model, labels = chameleon(model), ids.clone()
        labels[:, :PROMPT] = -100
        return timed(model, lambda: model(input_ids=ids, labels=labels, use_cache=False).loss, args)
    model.gradient_checkpointing = args.side == "checkpointing"
    index = torch.arange(ids.numel()).view_as(ids)[:, PROMPT - 1 : -1].flatten()
    targets, ours = ids[:, PROMPT:].flatten(), LossModel(model)
    return timed(model, lambda: ours(ids, index, targets)[0] / len(targets), args)


def chameleon(model):
    """transformers' model of the same weights, those of its image tokenizer taken out."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    from lumina_mgpt.model.names import disk_name

    raw = {key: value for key, value in asdict(model.config).items() if not key.startswith("rope")}
    image = dict(embed_dim=8, num_embeddings=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1,
                 latent_channels=8, resolution=16)  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    config = ChameleonConfig(**raw, rope_parameters=rope, vocabulary_map={"<image>": 5}, vq_config=image,
                             attn_implementation="sdpa")  # fmt: skip
    theirs = ChameleonForConditionalGeneration(config).train()
    state = {disk_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("vqmodel" in name for name in missing)
    del theirs.model.vqmodel
    return theirs


def timed(model, loss: Callable, args: argparse.Namespace) -> dict:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # What is there before the first step: weights, and the interpreter with its libraries.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    rest = resident("VmRSS") - 4 * parameters
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
    return {"tokens_per_second": round(speed, 2), "beyond_gb": round(beyond / 1e9, 3), "losses": losses,
            "parameters": parameters}  # fmt: skip


def resident(what: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or has held at most (VmHWM)."""
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
        found[side] |= {"speed": round(found[side]["tokens_per_second"] / plain["tokens_per_second"], 3),
                        "memory": round(found[side]["beyond_gb"] / plain["beyond_gb"], 3)}  # fmt: skip
    print(json.dumps(found))


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
