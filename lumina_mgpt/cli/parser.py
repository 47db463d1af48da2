"""The argument parser of all commands, and types of options."""

import argparse

from lumina_mgpt.config import (
    excerpt,
)
from lumina_mgpt.errors import InputError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where an option has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage, and takes no abbreviated options."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        raise InputError(f"{message}; --help lists every option")


def whole(text: str) -> int:
    """Type of a whole-number option."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {excerpt(text)}") from None


def number(text: str) -> float:
    """Type of an option that takes any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {excerpt(text)}") from None
