"""The console script `lumina-mgpt COMMAND [options]`. It imports the module of the command and runs it."""

import importlib
import sys
from collections.abc import Sequence

from lumina_mgpt import __version__, cli

# Command -> its module in this package, and a summary. A module is imported when its command runs.
COMMANDS = {
    "generate": ("generate", "generate images from prompts, and from prompts and pictures"),
    "generate-with-image": ("generate_with_image", "generate an image from one prompt and a control picture"),
    "edit": ("edit", "edit a picture in several turns"),
    "serve": ("serve", "serve a checkpoint over HTTP, with OpenAI's API"),
    "describe": ("describe", "describe pictures, or answer a question about each"),
    "chat": ("chat", "talk with the model, in text and images"),
    "attention": ("attention", "show what the last code of an image attends to"),
    "benchmark": ("benchmark", "make the images of a public benchmark, as its scorer reads them"),
    "reconstruct": ("reconstruct", "show what the image tokenizer preserves of pictures"),
    "pre-tokenize": ("pre_tokenize", "encode records as token shards"),
    "concat-records": ("concat_records", "check token shards and list them in one record file"),
    "finetune": ("finetune", "train or finetune a model on token records"),
    "grpo": ("grpo", "train a model with rewards of its own images"),
    "distill-guidance": ("distill_guidance", "train a model to need no guidance"),
    "train-movqgan": ("train_movqgan", "train an image tokenizer"),
    "export": ("export", "write a training checkpoint as a model folder"),
    "merge-lora": ("merge_lora", "merge adapters into the weights they were trained on"),
    "quantize": ("quantize", "write a checkpoint with int4 weights"),
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="lumina-mgpt", add_help=False, usage="lumina-mgpt COMMAND [options]   (COMMAND --help lists its options)"
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND")
    return parser


def overview() -> str:
    """Returns the text of `lumina-mgpt --help`: usage and list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lumina-mgpt COMMAND [options]",
            "",
            "commands:",
            *lines,
            "",
            "lumina-mgpt COMMAND --help lists the options of a command; lumina-mgpt --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names, and returns its exit status.

    Args:
        argv: command and options; None: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        return cli.run(lambda _: print(overview()), cli.Parser(), [])
    if arguments[0] == "--version":
        return cli.run(lambda _: print(f"lumina-mgpt {__version__}"), cli.Parser(), [])
    if arguments[0] not in COMMANDS:
        return cli.run(lambda _: None, build_parser(), arguments[:1])
    module = importlib.import_module(f"lumina_mgpt.cli.{COMMANDS[arguments[0]][0]}")
    return module.main(arguments[1:])
