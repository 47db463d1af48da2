"""The options --rewrite and --rewrite_model."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumina_mgpt.errors import InputError
from lumina_mgpt.rewriting import KEY_VARIABLE, make_rewriter
from lumina_mgpt.user_functions import add_working_folder

if TYPE_CHECKING:
    from lumina_mgpt.rewriting import Rewriter


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """Adds --rewrite and --rewrite_model."""
    group = parser.add_argument_group("rewriting of prompts")
    group.add_argument(
        "--rewrite",
        metavar="URL|MODULE:FUNCTION",
        help="expand each prompt before generation, by a language model at an OpenAI-compatible address such as "
        f"http://localhost:8000/v1 (its key in {KEY_VARIABLE}), or by your function from a prompt to a prompt",
    )
    group.add_argument("--rewrite_model", metavar="NAME", help="name of the model at the address of --rewrite")


def read_rewriter(args: argparse.Namespace) -> "Rewriter | None":
    """Returns what the options of `add_rewrite` say, or None without --rewrite.

    Raises:
        InputError: options do not fit each other, or the function cannot be loaded.
    """
    if args.rewrite is None:
        if args.rewrite_model is not None:
            rule = f"--rewrite_model {args.rewrite_model} has no effect without --rewrite"
            raise InputError(f"{rule}; add that, or leave it out")
        return None
    add_working_folder()
    return make_rewriter(args.rewrite, args.rewrite_model)


def described(args: argparse.Namespace) -> dict[str, str]:
    """Returns the settings for the text of the saved pictures. An address comes without its query, which may hold keys.

    Args:
        args: parsed command line, with the options of `add_rewrite`.
    """
    if args.rewrite is None:
        return {}
    model = {} if args.rewrite_model is None else {"rewrite_model": args.rewrite_model}
    return {"rewrite": args.rewrite.partition("?")[0]} | model


def original(prompts: Sequence[str], index: int) -> dict[str, str]:
    """Returns the user's prompt for the text of a saved picture; empty if `prompts`, the users', is empty."""
    return {"original_prompt": prompts[index]} if prompts else {}
