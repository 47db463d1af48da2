"""Reads torch.distributed.checkpoint folders without running code from them.

torch unpickles the metadata of a checkpoint without restriction, and a pickle can run any code. The classes here refuse
all types except those that a checkpoint needs.
"""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    """Refuses every type that is not in `_ALLOWED`."""

    def find_class(self, module: str, name: str) -> object:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class Reader(FileSystemReader):
    """Reads the metadata of a checkpoint, and refuses types that no checkpoint needs."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds no metadata")
        storage = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata


class Planner(DefaultLoadPlanner):
    """A load planner that reads values other than tensors with `weights_only=True`.

    Such values are, for example, the options of an optimizer's parameter groups.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def reader_and_planner(checkpoint: Path) -> tuple[Reader, LoadPlanner]:
    """Returns safe arguments `storage_reader` and `planner` for torch.distributed.checkpoint.load."""
    return Reader(checkpoint), Planner()
