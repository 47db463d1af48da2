"""Trains a model with rewards of its own images (GRPO), on one process or, with torchrun, on many. See TRAIN.md."""

import argparse
from collections.abc import Sequence

from lumina_mgpt import cli
from lumina_mgpt.cli import finetune
from lumina_mgpt.cli.options import add_speculation_options, speculation_settings
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.grpo_options import DEFAULTS, EXCLUDED, GrpoConfig, GrpoOptions
from lumina_mgpt.training.options import TrainingConfig, groups, option_fields
from lumina_mgpt.user_functions import add_working_folder


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        {"vqgan_path": "--vqgan_path", "data_config": "--prompt_file"},
        prog="lumina-mgpt grpo",
        description=__doc__.split(". See")[0] + ".",
    )
    finetune.add_options(parser, TrainingConfig, EXCLUDED)
    own = parser.add_argument_group("prompts, rewards and objective")
    own.add_argument(
        "--reward",
        action="append",
        metavar="NAME[=WEIGHT]",
        help="reward of an image: module:function with (images, prompts) -> scores, or the model's own reading of the "
        "prompt (own, reading, bayes); may be repeated, their weighted sum counts",
    )
    finetune.add_options(own, GrpoOptions, ())
    add_speculation_options(parser, fast=False)
    for name, group in groups().items():
        if set(vars_of(group)) - set(EXCLUDED):
            finetune.add_options(parser.add_argument_group(finetune.TITLES[name]), group, EXCLUDED)
    finetune.add_export(parser)
    parser.set_defaults(**{name: value for name, value in DEFAULTS.items() if name not in EXCLUDED})
    return parser


def vars_of(group: type) -> list[str]:
    return [item.name for item in option_fields(group)]


def config_of(args: argparse.Namespace) -> GrpoConfig:
    """Returns the configuration that the parsed options describe."""
    names = {*vars_of(GrpoOptions), *TrainingConfig.options()} - set(EXCLUDED)
    values = {name: getattr(args, name) for name in names}
    finetune.require_movqgan(values["movqgan_path"])
    if values["prompt_file"] is None:
        raise InputError("is missing; give a text file with one prompt a line", "prompt_file")
    return GrpoConfig.of(args.reward or (), speculation_settings(args), **values)


def grpo(args: argparse.Namespace) -> int:
    if args.export_only:
        return finetune.train_and_export(args, None)
    config = config_of(args)
    add_working_folder()  # for rewards of the user

    def make_trainer(_, processes):
        from lumina_mgpt.training.grpo import GrpoTrainer  # imports torch: takes seconds

        return GrpoTrainer(config, processes)

    return finetune.train_and_export(args, config.training, make_trainer)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(grpo, build_parser(), argv, stopped="--resume auto goes on from the last checkpoint")
