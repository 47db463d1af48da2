"""Finds the folder of a checkpoint: a local folder, or one fetched from the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import Any

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy
from lumina_mgpt.model.names import COMPANIONS, first_line
from lumina_mgpt.model.weight_files import find_weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w]")
_FILES = ("config.json", "model*.safetensors", "model*.json", *COMPANIONS)
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.json")


def resolve(source: str | Path, **options: Any) -> Path:
    """Returns the folder of a checkpoint.

    Args:
        source: a local folder, or a hub id of the form owner/name. A hub id is fetched to the hub's local cache.
        options: further arguments of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        InputError: `source` is neither a checkpoint folder nor a hub id that can be fetched.
    """
    folder = Path(os.path.expanduser(source))
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{source} cannot be read ({cause(error)}); {remedy(error)}") from None
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise InputError(f"{source} is not a checkpoint folder: it holds no config.json; give the folder that does")
        find_weights(folder)
        return folder
    if os.path.exists(folder):
        raise InputError(f"{source} is a file; give the checkpoint folder that holds config.json")
    if not _HUB_ID.fullmatch(str(source)):
        raise InputError(f"{source}: no such folder, and not a hub id of the form owner/name; correct the path")
    return _fetch(str(source), options)


def _fetch(hub_id: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download  # the import takes half a second
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    instead = "give a local folder, or `hf download` it first"
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_FILES), **options))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=list(_FILES + _PICKLES), **options))
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"{hub_id}: no such folder, and the hub knows no such model (or it is gated: `hf auth login`); "
            "correct the name, or give a local folder"
        ) from None
    except OfflineModeIsEnabled:
        raise InputError(f"{hub_id}: no such folder, and HF_HUB_OFFLINE forbids fetching it; {instead}") from None
    except (OSError, HTTPError) as error:
        reason = f"no such folder, and it cannot be fetched ({first_line(error)})"
        raise InputError(f"{hub_id}: {reason}; {remedy(error, instead)}") from None
    return resolve(folder)
