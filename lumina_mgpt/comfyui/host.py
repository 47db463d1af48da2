"""What the nodes need of ComfyUI. No other module imports ComfyUI's modules.

Source: comfy/utils.py, comfy/model_management.py, comfy/model_patcher.py and folder_paths.py of ComfyUI, for names and
behaviour. Each module is imported at its first use, so that this package imports without ComfyUI.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

_FOLDER = "lumina_mgpt"  # kind of model in ComfyUI's folder_paths, and folder in its `models`
_PREVIEW_SIDE = 512  # largest side of a preview in pixels: ComfyUI's default
_PREVIEW_PAUSE = 1.0  # seconds between previews, each of which decodes all rows so far
_WORKING_MEMORY = 2 << 30  # bytes besides the weights: the cache of an automatic batch is at most 1 GiB


def raise_if_interrupted() -> None:
    """Raises ComfyUI's InterruptProcessingException if the user has stopped the run."""
    importlib.import_module("comfy.model_management").throw_exception_if_processing_interrupted()


def torch_device() -> torch.device:
    """Returns the device that ComfyUI computes on."""
    return importlib.import_module("comfy.model_management").get_torch_device()


def model_folders() -> list[Path]:
    """Returns the folders in which ComfyUI looks for checkpoints of this package.

    They are `models/lumina_mgpt`, and those of the key `lumina_mgpt` in `extra_model_paths.yaml`.
    """
    paths = importlib.import_module("folder_paths")
    own = str(Path(paths.models_dir) / _FOLDER)
    known = paths.folder_names_and_paths
    if _FOLDER not in known or own not in known[_FOLDER][0]:
        paths.add_model_folder_path(_FOLDER, own)
    return [Path(folder) for folder in paths.get_folder_paths(_FOLDER)]


class Bar:
    """ComfyUI's progress bar of the node that runs.

    Args:
        total: value at the end.
    """

    def __init__(self, total: int) -> None:
        self._bar = importlib.import_module("comfy.utils").ProgressBar(total)
        self._total, self._value = total, 0
        self._previewed = float("-inf")  # time of the last preview

    def advance(self, amount: int, preview: Callable[[], Image.Image] | None = None) -> None:
        """Moves the bar forward.

        Args:
            preview: makes a picture to show with the bar. It is called once a second at most.
        """
        self.move_to(self._value + amount, preview)

    def move_to(self, value: int, preview: Callable[[], Image.Image] | None = None) -> None:
        """Moves the bar to `value`. Arguments: as `advance`."""
        self._value = min(value, self._total)
        shown = None
        if preview is not None and time.monotonic() - self._previewed >= _PREVIEW_PAUSE:
            shown = ("JPEG", preview(), _PREVIEW_SIDE)
            self._previewed = time.monotonic()
        self._bar.update_absolute(self._value, self._total, shown)


@contextlib.contextmanager
def before_each_forward(model: torch.nn.Module, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` before each forward of `model` during the block; an exception of it ends the run."""
    handle = model.register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


class Loadable(Protocol):
    """Weights that ComfyUI's memory management loads and drops.

    Attributes:
        device: where the weights are; the CPU while they are not loaded.
        size: bytes of the weights; an estimate until they are loaded.
        loaded: whether they are in memory.
    """

    device: torch.device
    size: int

    @property
    def loaded(self) -> bool: ...

    def load(self) -> None: ...

    def drop(self) -> None: ...


def managed(weights: Loadable, device: torch.device) -> Any:
    """Returns an object that puts `weights` under ComfyUI's memory management: a subclass of its ModelPatcher.

    ComfyUI's own ModelPatcher moves weights to the CPU. int4 weights are packed for one kind of device, so these are
    dropped instead, and read from their files at the next use.

    Args:
        weights: the object itself must not refer to the result, else the garbage collector alone frees both.
        device: device that the weights are loaded to.
    """
    base = importlib.import_module("comfy.model_patcher").ModelPatcher

    class WholeModel(base):  # type: ignore[valid-type, misc]
        """Loads and drops all weights together. Its attribute `model` is `weights`."""

        def model_size(self) -> int:
            return self.model.size

        def loaded_size(self) -> int:
            return self.model.size if self.model.loaded else 0

        def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
            before = self.loaded_size()
            self.model.load()
            return self.loaded_size() - before

        def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> int:
            return 0  # ComfyUI then calls `detach`

        def detach(self, unpatch_all: bool = True) -> Any:
            # ComfyUI also calls this, with False, before it loads a model again that is loaded already.
            if unpatch_all:
                self.model.drop()
            return self.model

    return WholeModel(weights, device, torch.device("cpu"), weights.size)


def load_managed(patcher: Any) -> None:
    """Loads the weights of `managed`, after ComfyUI has freed memory for them where that is short."""
    management = importlib.import_module("comfy.model_management")
    management.load_models_gpu([patcher], memory_required=_WORKING_MEMORY)
