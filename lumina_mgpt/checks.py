"""Checks of values that callers pass, and the text of their errors."""

import math
import operator
from contextlib import suppress
from numbers import Real
from typing import SupportsIndex

from lumina_mgpt.errors import InputError


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raises InputError about parameter `name` unless `condition` holds."""
    if not condition:
        raise InputError(f"{rule}, got {excerpt(value)}", name)


def whole_number(name: str, value: object, low: int | None, high: int | None, rule: str) -> int:
    """Returns `value`, an int or an integer scalar of NumPy or torch, as an int.

    Args:
        name: name of the parameter, for the error.
        low: least allowed value, None for no limit.
        high: greatest allowed value, None for no limit.
        rule: text of the error, such as "must be a whole number of at least 1".

    Raises:
        InputError: `value` has another type (bool included) or is out of range.
    """
    plain_value, number = plain(value), None
    if isinstance(plain_value, SupportsIndex) and not isinstance(plain_value, bool):
        with suppress(TypeError):  # an array has __index__, too
            number = operator.index(plain_value)
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise InputError(f"{rule}, got {excerpt(value)}", name)
    return number


def is_number(value: object) -> bool:
    """Returns whether `value` is an int or float (not bool) that is finite when converted to a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def plain(value: object) -> object:
    """Returns a NumPy or torch scalar as a Python number; returns any other value unmodified."""
    if not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a class, or an array of several numbers
        return value


def real_number(value: object) -> float:
    """Returns a real number as a float: inf if it is too large, NaN if `value` is no real number (or a bool)."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        return math.nan
    try:
        return float(number)
    except OverflowError:
        return math.inf


def excerpt(value: object) -> str:
    """Returns the `repr` of `value` for a message, shortened if it exceeds 200 characters."""
    try:
        text = repr(plain(value))
    except ValueError:  # Python prints no integer of over 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"
