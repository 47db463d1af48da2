"""Nested operands of operators. The functions of torch for them take five times as long."""

from collections.abc import Callable, Iterable
from typing import Any


def leaves(items: Iterable[Any]) -> list[Any]:
    """Returns what nested lists and tuples hold, in order."""
    found: list[Any] = []
    for item in items:
        found += leaves(item) if isinstance(item, (list, tuple)) else (item,)
    return found


def changed(x: Any, change: Callable[[Any], Any]) -> Any:
    """Returns nested lists, tuples and dictionaries with each leaf changed."""
    if isinstance(x, (list, tuple)):
        return type(x)([changed(item, change) for item in x])
    if isinstance(x, dict):
        return {key: changed(item, change) for key, item in x.items()}
    return change(x)
