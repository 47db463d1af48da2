"""Checkpoints of ComfyUI's model folders, and their pipelines: one for equal settings, loaded at its first use."""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from lumina_mgpt import resources
from lumina_mgpt.comfyui import host
from lumina_mgpt.config import INT4_GROUPS
from lumina_mgpt.devices import DTYPES, resolve_device, resolve_dtype
from lumina_mgpt.errors import InputError
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint

DEMO = "demo"
DEVICES = ("auto", "cpu", "cuda", "mps")
FORMATS = ("auto", *DTYPES)
QUANTS = ("off", *map(str, reversed(INT4_GROUPS)))
CACHES = ("auto", "int8")
_DEPTH = 2  # folders below a model folder: a hub id has two parts
_MOVQGAN_BYTES = 1 << 30  # of the image tokenizer, in the estimate before loading


def names() -> list[str]:
    """Returns the names of all checkpoints: `demo`, and each folder with a `config.json` in ComfyUI's model folders."""
    return [DEMO, *sorted(name for name in _found() if name != DEMO)]


def folder_of(name: str) -> Path:
    """Returns the folder of a checkpoint.

    Raises:
        InputError: `names` does not list it. Paths and hub ids are not read, because workflows come from others.
    """
    if name == DEMO:
        return resources.demo_checkpoint()
    known = _found()
    if name not in known:
        listed = ", ".join(names())
        rule = f"must be one of {listed}, got {name!r}; put the folder of the checkpoint into models/lumina_mgpt"
        raise InputError(rule, "checkpoint")
    return known[name]


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Returns name, size and time of change of the folder's files: other values mean other weights."""
    entries = sorted((entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file())
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in entries)


def _found() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in host.model_folders():
        for depth in range(1, _DEPTH + 1):
            for path in sorted(root.glob("*/" * depth + "config.json")):
                found.setdefault(path.parent.relative_to(root).as_posix(), path.parent)
    return found


@dataclass(frozen=True)
class Settings:
    """What a pipeline is loaded with. Equal settings share one pipeline.

    Attributes:
        files: the result of `fingerprint`.
        quant: group size of int4 weights, None without quantization while loading.
    """

    folder: Path
    files: tuple[tuple[str, int, int], ...]
    device: torch.device
    dtype: torch.dtype
    quant: int | None
    cache_dtype: torch.dtype | None


class Weights:
    """The pipeline of some settings, while it is loaded. ComfyUI's memory management calls `load` and `drop`."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.settings, self.checkpoint = settings, checkpoint
        self.device = torch.device("cpu")
        self.size = _estimate(settings, checkpoint)
        self.pipeline: Pipeline | None = None

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self.pipeline is not None

    def load(self) -> None:
        """Reads the weights, with a progress bar, unless they are in memory.

        Raises:
            InputError: the weights cannot be read, or do not fit the settings.
        """
        if self.pipeline is not None:
            return
        settings, bars = self.settings, list[host.Bar]()

        def on_read(count: int, total: int) -> None:
            host.raise_if_interrupted()
            bars.extend([host.Bar(total)] if not bars else [])
            bars[0].move_to(count)

        self.pipeline = Pipeline.from_pretrained(
            self.checkpoint,
            settings.device,
            settings.dtype,
            quant=settings.quant,
            cache_dtype=settings.cache_dtype,
            on_read=on_read,
        )
        self.device = self.pipeline.device
        modules = (self.pipeline.model, self.pipeline.image_tokenizer.model)
        self.size = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))

    def drop(self) -> None:
        """Lets go of the weights."""
        self.pipeline, self.device = None, torch.device("cpu")


class Model:
    """A checkpoint with its settings: what the node that loads a checkpoint gives to the others.

    ComfyUI keeps it for later runs as the output of that node. It holds no weights before the first call of `pipeline`,
    nor after ComfyUI has unloaded them.

    Raises:
        InputError: the checkpoint's small files cannot be read.
    """

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.settings, self.checkpoint = settings, checkpoint
        self._weights = Weights(settings, checkpoint)
        self._patcher = host.managed(self._weights, settings.device)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._weights.loaded

    def pipeline(self) -> Pipeline:
        """Returns the pipeline; reads the weights if they are not in memory.

        Raises:
            InputError: the weights cannot be read, or do not fit the settings.
        """
        host.load_managed(self._patcher)
        assert self._weights.pipeline is not None
        return self._weights.pipeline


_models: "weakref.WeakValueDictionary[Settings, Model]" = weakref.WeakValueDictionary()


def open_model(name: str, device: str, dtype: str, quant: str, cache: str) -> Model:
    """Returns the model of these settings, the same object while ComfyUI or a run holds it.

    Args:
        name: one of `names`.
        device: one of DEVICES; `auto` is the device that ComfyUI computes on.
        dtype: one of FORMATS, for the transformer.
        quant: one of QUANTS: group size of int4 weights.
        cache: one of CACHES, for keys and values.

    Raises:
        InputError: a value is not among its choices, a device is missing, or the checkpoint's small files cannot be
            read.
    """
    for parameter, value, choices in (("quant", quant, QUANTS), ("cache", cache, CACHES)):
        if value not in choices:
            raise InputError(f"must be one of {', '.join(choices)}, got {value!r}", parameter)
    folder = folder_of(name)
    where = resolve_device(host.torch_device() if device == "auto" else device)
    checkpoint = Checkpoint.open(folder)
    group = None if quant == "off" else int(quant)
    settings = Settings(
        folder,
        fingerprint(folder),
        where,
        resolve_dtype(dtype, where, checkpoint.config, group),
        group,
        torch.int8 if cache == "int8" else None,
    )
    model = _models.get(settings)
    if model is None:
        model = _models[settings] = Model(settings, checkpoint)
    return model


def _estimate(settings: Settings, checkpoint: Checkpoint) -> int:
    """Returns the bytes of all weights, before they are read."""
    config, item = checkpoint.config, settings.dtype.itemsize
    layers = config.num_hidden_layers * config.layer_weight_count
    int4 = settings.quant or config.int4_group
    layer_bytes = layers * 5 // 8 if int4 else layers * item  # 4 bits, and at most 1 bit of scales
    movqgan = checkpoint.movqgan_path.stat().st_size if checkpoint.movqgan_path else _MOVQGAN_BYTES
    return layer_bytes + (config.weight_count - layers) * item + movqgan
