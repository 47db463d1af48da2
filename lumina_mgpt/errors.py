"""The one exception that means: the user gave something that cannot work, and can mend it."""


class InputError(ValueError):
    """What a user can cause and mend: an option, a file, a folder, a missing device.

    The message names the option or file, the value got, the rule and a remedy, in one line. Entry points print it on
    stderr and exit with status 2; everything else that goes wrong is a bug and keeps its traceback.
    """


def package_error(
    error: BaseException, need: str, package: str, modules: tuple[str, ...] = (), otherwise: str = ""
) -> InputError:
    """The error for an optional package whose import raised `error`: it is not installed, or it is and fails.

    Args:
        need: what the package is needed for, as the first words of the message.
        package: its name for pip.
        modules: names it is imported by, where they differ from `package`.
        otherwise: what a user can do without the package.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name in (modules or (package,)):
        fault, remedy = f"({reason})", f"pip install {package}"
    else:
        fault, remedy = f"and its import fails ({reason})", f"repair or reinstall {package}"
    return InputError(f"{need} needs the {package} package {fault}; {remedy}{otherwise and ', or ' + otherwise}")
