"""The argument parser of all commands, and the converters of option values."""

import argparse
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from lumina_mgpt.checks import excerpt
from lumina_mgpt.errors import InputError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses abbreviated options. For a wrong command line, it raises InputError.

    Args:
        aliases: initial value of the attribute.
        kwargs: further arguments of `argparse.ArgumentParser`.

    Attributes:
        aliases: parameter of a library function -> option of this command, where the names differ.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.aliases = dict(aliases or {})

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        raise InputError(f"{message}; --help lists every option")

    def option(self, parameter: str) -> str:
        """Returns the option that sets a parameter, such as `--width` for `width`.

        If no option sets the parameter, the result is its name.
        """
        return self.aliases.get(parameter) or self._options().get(parameter, parameter)

    def render(self, error: InputError) -> str:
        """Returns the message of an error in terms of options.

        Each parameter in the message becomes its option: `device=cpu` becomes `--device cpu`.
        """
        options = self._options() | self.aliases
        text = re.sub(r"(?<![\w/.-])([a-z]\w*)=(\S)", lambda found: _option_value(options, found), error.message)
        text = re.sub(r"(--?\w+) True\b", r"\1", text)
        return f"{self.option(error.parameter)} {text}" if error.parameter else text

    def _options(self) -> dict[str, str]:
        return {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}


def _option_value(options: Mapping[str, str], found: re.Match) -> str:
    name, first = found.groups()
    return f"{options[name]} {first}" if name in options else found[0]


def whole(text: str) -> int:
    """Converts the value of an option that takes a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {excerpt(text)}") from None


def number(text: str) -> float:
    """Converts the value of an option that takes any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {excerpt(text)}") from None
