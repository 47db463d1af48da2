"""Trains or finetunes on token records, on one process or, under torchrun, on many: see TRAIN.md."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli, resources
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.options import CHOICES, Settings

HELP = {
    "data_config": "YAML with META: [{path, type, ratio}]",
    "output_dir": "checkpoints, metrics.jsonl and the export go here",
    "init_from": "checkpoint folder or hub id to start from",
    "model_config": "YAML or config.json of a model to train from scratch",
    "tokenizer_path": "folder of the tokenizer (default: that of --init_from)",
    "batch_size": "sequences of a micro-batch on one process",
    "max_tokens": "instead of --batch_size: ids of a micro-batch, padding included",
    "accum_iter": "micro-batches a step, on each process",
    "pad_multiple": "sequences are padded to multiples of this",
    "pack": "sequences one after another in rows of --max_tokens, without seeing each other",
    "lora_rank": "train adapters of this rank on the layers' matrices, 0 for all weights (pip install peft)",
    "lora_alpha": "adapters are scaled by this over their rank (default: twice the rank)",
    "freeze_embeddings": "embedding and head stay as they are",
    "cpu_offload": "keep weights and optimizer state in the CPU's memory (CUDA only)",
    "max_seq_len": "longer sequences are an error at the start, or see --overlong",
    "overlong": "sequences over --max_seq_len: an error at the start, or left out and counted",
    "epochs": "length of the run in epochs",
    "max_steps": "or in steps",
    "max_minutes": "or in minutes; time before a --resume counts",
    "warmup": "fraction of the run in which the learning rate rises",
    "optimizer": "muon: for the matrices inside the layers, adamw for the rest",
    "lr": "peak learning rate of adamw",
    "min_lr": "learning rate at the end",
    "muon_lr": "peak learning rate of muon",
    "wd": "weight decay",
    "clip_grad": "limit of the gradient's norm, 0 for none",
    "tail_weight": "pull of unlikely ids to one level; steadies guidance after a short training",
    "code_noise": "share of the image codes read that are replaced; for few pictures, seen often",
    "spare_panel": "share of the rows whose first half of codes, a given panel, gets no --code_noise",
    "ema": "export a moving average of the weights with this decay, 0 for none",
    "on_nonfinite": "a step whose loss or gradient is not finite, or a spike: stop, or leave it out; noted either way",
    "spike": "a gradient norm over this many times the median of the last 100 is one, 0 for none; try 10",
    "tensorboard": "also write the metrics for TensorBoard (pip install tensorboard)",
    "peak_tflops": "of one device at this precision, for the share used (default: that of known GPUs)",
    "sample_every": "steps between pictures of fixed prompts in OUTPUT_DIR/samples, 0 for none",
    "sample_prompts": "their prompts, one a line (default: prompts.txt of the checkpoint, or five built-in ones)",
    "movqgan_path": "MoVQGAN weights for them (default: looked for beside the checkpoint)",
    "precision": "of the matrix products; weights stay float32",
    "compile": "torch.compile layers and loss",
    "checkpointing": "recompute activations in the backward pass",
    "save_iteration_interval": "steps between checkpoints, 0 for none",
    "save_minutes": "minutes between checkpoints, 0 for none",
    "keep_checkpoints": "newest checkpoints kept",
    "save_beside": "write checkpoints while the training goes on; takes a copy of what is written in the CPU's memory",
    "resume": "auto: go on from the newest checkpoint in --output_dir if there is one; or the path of one",
    "device": "auto, cpu or cuda",
    "threads": "CPU threads of this process, 0 for torch's default",
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt finetune", description=__doc__.split(":")[0])
    for field in dataclasses.fields(Settings):
        kind = next(t for t in (typing.get_args(field.type) or (field.type,)) if t is not type(None))
        options: dict = {"help": HELP.get(field.name, " ")}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": {int: cli.whole, float: cli.number}.get(kind, kind)}
            options["default"] = None if field.default is dataclasses.MISSING else field.default
            options["required"] = field.name == "output_dir"
        if field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        parser.add_argument(f"--{field.name}", **options)
    parser.add_argument("--model_size", help="released spelling of --model_config configs/model/SIZE.yaml (2B, 7B)")
    parser.add_argument("--warmup_epochs", type=cli.number, help="released spelling of --warmup, in epochs")
    for name in ("cache_ann_on_disk", "unmask_image_logits"):
        parser.add_argument(f"--{name}", action="store_true", help="released option; always so here")
    parser.add_argument(
        "--num_workers", type=cli.whole, help="released option, without effect: tokens are memory-mapped"
    )
    parser.add_argument("--export_only", action="store_true", help="export the newest checkpoint, do not train")
    parser.add_argument("--export_dir", help="where to export to (default: OUTPUT_DIR/export)")
    parser.add_argument("--export_dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    if values["data_config"] is None:
        raise InputError("--data_config is missing; give a YAML file such as configs/data/demo.yaml")
    if args.model_size and not values["init_from"]:  # of a checkpoint the size is known
        if values["model_config"]:
            raise InputError("--model_size and --model_config say the same thing; give one of them")
        values["model_config"] = str(resources.configs() / "model" / f"{args.model_size}.yaml")
    if args.warmup_epochs is not None:
        if not values["epochs"]:
            raise InputError("--warmup_epochs needs --epochs; use --warmup, a fraction of the run")
        values["warmup"] = args.warmup_epochs / values["epochs"]
    return Settings(**values)


def train(settings: Settings) -> tuple[int, bool, Path | None]:
    """Trains; returns the signal that ended it or 0, whether this is the first process, and the last checkpoint."""
    from lumina_mgpt.training.distributed import Processes
    from lumina_mgpt.training.trainer import Trainer

    processes = Processes.start(settings.device, settings.cpu_offload)
    try:
        trainer = Trainer(settings, processes)
        return trainer.run(), processes.first, trainer.saver.last
    finally:
        processes.stop()


def finetune(args: argparse.Namespace) -> int:
    settings = None if args.export_only else settings_of(args)
    option, folder = "--export_dir", Path(args.export_dir or "")
    if not args.export_dir:
        option, folder = "--output_dir", Path(args.output_dir) / "export"

    from lumina_mgpt.training.checkpoint import export, require_export_folder  # torch takes seconds to import: only now

    signal, first, last = 0, True, None
    if settings:
        require_export_folder(folder, settings, option)  # not only after the training
        signal, first, last = train(settings)
    if signal:
        if first:
            print("stopped after a checkpoint; the same command with --resume auto goes on", file=sys.stderr)
        return 128 + signal
    if first:
        folder = export(args.output_dir, folder, args.export_dtype, checkpoint=last, parameter=option)
        print(f"exported to {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(finetune, build_parser(), argv, stopped="--resume auto goes on from the last checkpoint")

