"""InputError: the exception for everything that a user can cause and correct."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """An error that a user can correct: a parameter, a file, a folder, a missing device.

    The message is one line with the parameter or file, the rule, the value got and a remedy:
    `width must be a multiple of 32, got 100; try 96 or 128`. A remedy writes another parameter as in Python,
    `device=cpu`. Commands print the line with the names of their options, `--width ...; use --device cpu`, and exit
    with status 2. All other exceptions are bugs and keep their traceback.

    Attributes:
        parameter: name of the parameter at fault, None where it is a file or something else.
        message: the text after the parameter's name.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(f"{parameter} {message}" if parameter else message)
        self.parameter, self.message = parameter, message


@contextmanager
def caused_by(parameter: str) -> Iterator[None]:
    """Makes every InputError of the block name `parameter`.

    For blocks that read a file or folder which the value of the parameter names.
    """
    try:
        yield
    except InputError as error:
        raise InputError(str(error), parameter) from None


def package_error(
    error: BaseException, need: str, package: str, modules: tuple[str, ...] = (), otherwise: str = ""
) -> InputError:
    """Returns the error for an optional package that is not installed or fails to import.

    Args:
        error: what the import raised.
        need: what needs the package, as the first words of the message.
        package: name of the package for pip.
        modules: names of its modules; empty if the only one is `package`.
        otherwise: what a user can do without the package.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name in (modules or (package,)):
        fault, remedy = f"({reason})", f"pip install {package}"
    else:
        fault, remedy = f"and its import fails ({reason})", f"repair or reinstall {package}"
    return InputError(f"{need} needs the {package} package {fault}; {remedy}{otherwise and ', or ' + otherwise}")
