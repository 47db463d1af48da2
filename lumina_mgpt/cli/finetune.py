"""Trains or finetunes a model on token records, on one process or, with torchrun, on many. See TRAIN.md."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_mgpt import cli, resources
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.options import Options, TrainingConfig, groups, option_fields, value_type

if TYPE_CHECKING:
    from lumina_mgpt.training.distributed import Processes
    from lumina_mgpt.training.trainer import Trainer

    MakeTrainer = Callable[[TrainingConfig, Processes], Trainer]

TITLES = {
    "data": "data and batches",
    "model": "model and trained weights",
    "optimizer": "optimizer",
    "schedule": "length of the run",
    "regularization": "regularization",
    "distillation": "guidance to distill",
    "checkpoints": "checkpoints",
    "logging": "logging and sample pictures",
    "runtime": "precision, memory and device",
}
# Option -> its other names on the command line.
ALSO = {"movqgan_path": ("--vqgan_path",), "guidance_scale": ("--cfg",)}


def build_parser() -> cli.Parser:
    # Errors name the option of the model's kind of image tokenizer.
    parser = cli.Parser(
        {"vqgan_path": "--vqgan_path"}, prog="lumina-mgpt finetune", description=__doc__.split(". ")[0] + "."
    )
    add_groups(parser, without=("distillation",))
    add_export(parser)
    released = parser.add_argument_group("options of the released command")
    released.add_argument("--model_size", help="released spelling of --model_config configs/model/SIZE.yaml (2B, 7B)")
    released.add_argument("--warmup_epochs", type=cli.number, help="released spelling of --warmup, in epochs")
    for name in ("cache_ann_on_disk", "unmask_image_logits"):
        released.add_argument(f"--{name}", action="store_true", help="always on here")
    released.add_argument("--num_workers", type=cli.whole, help="without effect: tokens are memory-mapped")
    return parser


def add_groups(parser: cli.Parser, without: Collection[str] = ()) -> None:
    """Adds an argument for each option of a training.

    Args:
        without: names of groups and of options that are left out; they keep their defaults.
    """
    add_options(parser, TrainingConfig, without)
    for name, group in groups().items():
        if name not in without:
            add_options(parser.add_argument_group(TITLES[name]), group, without)


def add_export(parser: cli.Parser) -> None:
    """Adds the options that say where and how the trained weights are exported."""
    export = parser.add_argument_group("export")
    export.add_argument("--export_only", action="store_true", help="export the newest checkpoint, do not train")
    export.add_argument("--export_dir", help="where to export to (default: OUTPUT_DIR/export)")
    export.add_argument("--export_dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights")


def add_options(target: argparse._ActionsContainer, group: type[Options], without: Collection[str]) -> None:
    """Adds an argument for each option of a group."""
    for item in option_fields(group):
        if item.name in without:
            continue
        kind, arguments = value_type(item), dict[str, Any](help=item.metadata["help"])
        if kind is bool:
            arguments["action"] = "store_true"
        else:
            arguments["type"] = {int: cli.whole, float: cli.number}.get(kind, kind)
            arguments["default"] = None if item.default is dataclasses.MISSING else item.default
            arguments["required"] = item.name == "output_dir"
        if item.metadata["choices"]:
            arguments["choices"] = item.metadata["choices"]
        target.add_argument(f"--{item.name}", *ALSO.get(item.name, ()), **arguments)


def config_of(args: argparse.Namespace) -> TrainingConfig:
    """Returns the training configuration that the parsed options describe."""
    values: dict[str, Any] = {
        name: getattr(args, name, item.default) for name, item in TrainingConfig.options().items()
    }
    if values["data_config"] is None:
        raise InputError("is missing; give a YAML file such as configs/data/demo.yaml", "data_config")
    require_movqgan(values["movqgan_path"])
    if args.model_size and not values["init_from"]:  # a checkpoint has its size
        if values["model_config"]:
            raise InputError("and --model_config both choose the model; give one of them", "model_size")
        values["model_config"] = str(resources.configs() / "model" / f"{args.model_size}.yaml")
    if args.warmup_epochs is not None:
        if not values["epochs"]:
            raise InputError("needs --epochs; use --warmup, a fraction of the run", "warmup_epochs")
        values["warmup"] = args.warmup_epochs / values["epochs"]
    return TrainingConfig.of(**values)


def require_movqgan(path: str | None) -> None:
    """Raises InputError if a named file of the image tokenizer does not exist: the export would take another one."""
    if path and not Path(path).is_file():
        raise InputError(f"{path} is not a file; check the path", "movqgan_path")


def train(settings: TrainingConfig, make_trainer: "MakeTrainer | None" = None) -> tuple[int, bool, Path | None]:
    """Trains a model.

    Args:
        make_trainer: makes the trainer of this process (default: what `trainer_of` returns).

    Returns:
        Three values: the number of the signal that stopped the training, or 0; whether this process is the first of
        all; and the path of the last checkpoint, or None.
    """
    from lumina_mgpt.training.distillation_trainer import trainer_of
    from lumina_mgpt.training.distributed import Processes, keep_freed_memory

    processes = Processes.start(settings.runtime.device, settings.runtime.cpu_offload)
    try:
        if processes.device.type == "cpu" and not settings.runtime.checkpointing:  # which trades time for memory
            keep_freed_memory()
        make = make_trainer or trainer_of(settings)
        trainer = make(settings, processes)
        return trainer.run(), processes.first, trainer.saver.last
    finally:
        processes.stop()


def train_and_export(
    args: argparse.Namespace, settings: TrainingConfig | None, make_trainer: "MakeTrainer | None" = None
) -> int:
    """Trains a model unless `settings` is None, then exports the newest checkpoint. Returns the exit status.

    Args:
        args: parsed command line, with --output_dir and the options of `add_export`.
    """
    parameter, folder = "export_dir", Path(args.export_dir or "")
    if not args.export_dir:
        parameter, folder = "output_dir", Path(args.output_dir) / "export"

    from lumina_mgpt.training.export import export_checkpoint, require_export_folder  # imports torch: takes seconds

    signal, first, last = 0, True, None
    if settings:
        require_export_folder(folder, settings, parameter)  # before the training
        signal, first, last = train(settings, make_trainer)
    if signal:
        if first:
            print("stopped after a checkpoint; the same command with --resume auto goes on", file=sys.stderr)
        return 128 + signal
    if first:
        folder = export_checkpoint(args.output_dir, folder, args.export_dtype, last, parameter)
        print(f"exported to {folder}")
    return 0


def finetune(args: argparse.Namespace) -> int:
    return train_and_export(args, None if args.export_only else config_of(args))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(finetune, build_parser(), argv, stopped="--resume auto goes on from the last checkpoint")
