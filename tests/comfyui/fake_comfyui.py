"""Small stand-ins for the modules of ComfyUI that the nodes use, and for its executor.

They do what ComfyUI's own do with a model, a progress bar and a stopped run, in as few lines as that takes.
"""

import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterruptProcessingException(BaseException):
    """As in ComfyUI since 2026; an Exception before."""


class ModelPatcher:
    """The attributes that ComfyUI gives to a model, and none of the methods that a subclass has to replace."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        if not hasattr(model, "device"):
            model.device = offload_device
        model.model_loaded_weight_memory = 0

    def current_loaded_device(self) -> Any:
        return self.model.device

    def __del__(self) -> None:
        self.detach(unpatch_all=False)

    def _missing(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("moves weights from device to device")

    model_size = loaded_size = partially_load = partially_unload = detach = _missing


class ComfyUI:
    """One running ComfyUI.

    Attributes:
        bars: (value, total, preview) of each update of a progress bar.
        checks: number of times that a node asked whether the run is stopped.
        stop_at: the run is stopped at this check.
        memory: bytes for models on the device.
    """

    def __init__(self, models: Path, memory: float = 1e12) -> None:
        self.bars: list[tuple[int, int, Any]] = []
        self.checks, self.stop_at, self.memory = 0, 0, memory
        self.loaded: list[weakref.ref] = []  # a model is kept by its node's output alone
        self.folders: dict[str, tuple[list[str], set[str]]] = {}
        self.models = models

    def modules(self) -> dict[str, ModuleType]:
        """The modules by name, for `sys.modules`."""
        ui = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                ui.bars.append((value, total or self.total, preview))

        management = {
            "throw_exception_if_processing_interrupted": self._check,
            "get_torch_device": lambda: torch.device("cpu"),
            "load_models_gpu": self._load,
        }
        folder_paths = {
            "models_dir": str(self.models),
            "folder_names_and_paths": self.folders,
            "add_model_folder_path": lambda name, path: self.folders.setdefault(name, ([], set()))[0].append(path),
            "get_folder_paths": lambda name: self.folders[name][0][:],
        }
        contents = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": management,
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "folder_paths": folder_paths,
        }
        made = {}
        for name, values in contents.items():
            made[name] = ModuleType(name)
            made[name].__dict__.update(values)
        return made

    def _check(self) -> None:
        self.checks += 1
        if self.checks == self.stop_at:
            raise InterruptProcessingException

    def _live(self) -> list[ModelPatcher]:
        return [patcher for ref in self.loaded if (patcher := ref()) is not None]

    def _load(self, patchers: list[ModelPatcher], memory_required: float = 0) -> None:
        for patcher in patchers:
            if any(other is patcher for other in self._live()):
                patcher.detach(unpatch_all=False)
            others = [other for other in self._live() if other is not patcher]
            needed = patcher.model_size() - patcher.loaded_size() + memory_required
            for other in others:
                short = needed + sum(one.loaded_size() for one in self._live()) - self.memory
                if short > 0:
                    self._unload(other, short)
            self.loaded = [weakref.ref(one) for one in self._live() if one is not patcher] + [weakref.ref(patcher)]
            patcher.partially_load(patcher.load_device, 1e32, force_patch_weights=False)
            assert patcher.loaded_size() == patcher.model_size() > 0
            weakref.ref(patcher.model)  # ComfyUI keeps one

    def _unload(self, patcher: ModelPatcher, amount: float) -> None:
        if amount < patcher.loaded_size():
            if patcher.partially_unload(patcher.offload_device, amount) >= amount:
                return
        patcher.detach(True)
        self.loaded = [weakref.ref(one) for one in self._live() if one is not patcher]

    def unload_all_models(self) -> None:
        """What the button Unload Models does."""
        for patcher in self._live():
            self._unload(patcher, 1e30)


def call(node: type, **values: Any) -> tuple:
    """Runs a node as ComfyUI does: in inference mode, with every required input, and defaults for those left out."""
    types = node.INPUT_TYPES()
    described = {**types["required"], **types.get("optional", {})}
    assert values.keys() <= described.keys()
    given = {name: options["default"] for name, (_, options) in types["required"].items() if "default" in options}
    given |= values
    assert types["required"].keys() <= given.keys()
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(**given)


def installed(ui: ComfyUI, monkeypatch: Any) -> ComfyUI:
    """Puts the modules of `ui` where imports find them."""
    for name, module in ui.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return ui


def loaded_image(path: Path) -> torch.Tensor:
    """A picture as ComfyUI's Load Image gives it."""
    with torch.inference_mode(), Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")).astype(np.float32) / 255.0)[None]
