"""Builds models on the meta device: modules whose tensors have shapes and no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInitialization(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`: there are no numbers to initialize.

    On the meta device, `normal_` runs through Python code that imports torch's compiler: 1,100 modules, over a second.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Makes all new tensors of this thread on the meta device within the block, and skips their initialization."""
    with torch.device("meta"), _NoInitialization():
        yield
