"""Trains a model to give, without guidance, the images that it gives with guidance.

    lumina-mgpt distill-guidance --cfg 4 --init_from Lumina-mGPT-2.0 --data_config data.yaml --output_dir outputs/guided

Guidance takes two rows for each image. The exported model takes one, so that cache and work are half. Its config.json
records the scale, and generation with it uses --cfg 1 by default. Most options are those of `lumina-mgpt finetune`. See
TRAIN.md.
"""

import argparse
from collections.abc import Sequence

from lumina_mgpt import cli
from lumina_mgpt.cli import finetune
from lumina_mgpt.errors import InputError

# Options of `finetune` that this training cannot use: the teacher is the model itself, and the loss is another.
_WITHOUT = ("model_config", "zero_image_head", "z_loss_weight", "tail_weight")


def build_parser() -> cli.Parser:
    # Errors name the option of the model's kind of image tokenizer.
    parser = cli.Parser(
        {"vqgan_path": "--vqgan_path", "guidance_scale": "--cfg"},
        prog="lumina-mgpt distill-guidance",
        description="Trains a model to give, without guidance, the images that it gives with guidance.",
    )
    finetune.add_groups(parser, _WITHOUT)
    finetune.add_export(parser)
    # The target is a distribution, not one code, and the teacher has no dropout: nothing needs regularization.
    parser.set_defaults(guidance_scale=4.0, dropout=0.0, wd=0.0, z_loss_weight=0.0)
    parser.set_defaults(model_size=None, warmup_epochs=None)
    return parser


def distill(args: argparse.Namespace) -> int:
    """Trains and exports. Checks first what `finetune` does not require."""
    if not args.export_only:
        if not args.guidance_scale:
            rule = "must be above 1 and at most 1000, got 0"
            raise InputError(f"{rule}; give the scale that images are generated with", "guidance_scale")
        if not args.init_from:
            raise InputError("is missing; give the checkpoint to train, which is the teacher, too", "init_from")
    return finetune.finetune(args)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(distill, build_parser(), argv, stopped="--resume auto goes on from the last checkpoint")
