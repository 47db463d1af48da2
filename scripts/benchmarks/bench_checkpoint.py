"""Measures how long a checkpoint delays training: torch's save, and async_save, which writes during later steps.

    python scripts/benchmarks/bench_checkpoint.py --folder outputs

The defaults have 89 M weights, 1.1 GB with optimizer state, and take half a minute. `held` is the time of the call in
seconds. `lost` is the time until the checkpoint is complete, less that of the training steps done meanwhile. The last
line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import add_sizes

from lumina_mgpt import cli

SIZES = {
    "vocab": (20_000, "vocabulary size"),
    "hidden": (768, "width of the model"),
    "layers": (8, "number of layers"),
    "length": (256, "ids in a sequence"),
    "repeats": (3, "checkpoints of each kind; the fastest counts"),
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_checkpoint.py", description="Measures how long a checkpoint delays training.")
    parser.add_argument("--folder", type=Path, default=Path("."), help="folder on the disk to measure")
    add_sizes(parser, SIZES)
    return parser


def bench(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.model.transformer import Transformer
    from lumina_mgpt.training.loss import LossModel
    from lumina_mgpt.training.tensors import tensors_of

    heads = max(1, args.hidden // 64)
    config = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=args.hidden * 8 // 3,
        image_code_offset=0,
        num_image_codes=16,
    )
    model = Transformer(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    module, optimizer = LossModel(model), torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, args.vocab, (1, args.length), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        began = time.perf_counter()
        module(ids, torch.arange(args.length - 1), ids[0, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    step()
    usual = sorted(step() for _ in range(5))[2]
    found: dict = {"step": usual, "gb": 12e-9 * sum(parameter.numel() for parameter in model.parameters())}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for repeat in range(args.repeats):
            for name in ("save", "async_save"):
                began = time.perf_counter()
                options = {"checkpoint_id": Path(folder) / f"{name}-{repeat}", "no_dist": True}
                writing = getattr(dcp, name)(tensors_of(model, [optimizer], None), **options)
                held, done = time.perf_counter() - began, 0
                while done < 5 or name == "async_save" and not writing.done():
                    step()
                    done += 1
                lost = time.perf_counter() - began - done * usual
                least = found.setdefault(name, {"held": held, "lost": lost})
                found[name] = {"held": min(least["held"], held), "lost": min(least["lost"], lost)}
    print(json.dumps(rounded(found)))


def rounded(found: dict) -> dict:
    """All numbers with two decimals."""
    return {key: rounded(value) if isinstance(value, dict) else round(value, 2) for key, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
