"""Finds functions that a user names as `module:function`."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from lumina_mgpt.errors import InputError

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def add_working_folder() -> None:
    """Lets this process import modules of the working folder, after all others."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def load_function(name: str, parameter: str) -> Callable[..., Any]:
    """Imports a module and returns a function of it.

    Args:
        name: `module:function`, such as `my_scores:clip`. Both may have dots.
        parameter: parameter that has the name, for errors.

    Raises:
        InputError: the name has another form, the import fails, or there is nothing callable of that name.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"must be module:function, got {name!r}; such as my_module:my_function", parameter)
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's and may raise anything
        raise InputError(f"{name}: cannot import {module_name} ({reason(error)}); correct it", parameter) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{name}: {module_name} has no {path}; correct the name", parameter)
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} must be a function, got a {type(found).__name__}; name a function", parameter)
    return found


def call(function: Callable[..., Any], name: str, parameter: str, *args: object) -> Any:
    """Calls a user's function and returns its result.

    Raises:
        InputError: the function raises an exception.
    """
    try:
        return function(*args)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the function is the user's and may raise anything
        raise InputError(f"{name} raised {reason(error)}; correct the function", parameter) from error


def reason(error: BaseException) -> str:
    """Returns the type and the text of an exception, one line of about 200 characters."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
