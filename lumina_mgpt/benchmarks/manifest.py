"""What a benchmark's images depend on, so that a score can be reproduced: settings, versions, and file hashes."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lumina_mgpt.benchmarks.folder import MANIFEST, BenchmarkFolder
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy

PACKAGES = ("torch", "numpy", "pillow", "tokenizers", "safetensors")
_BLOCK = 1 << 22
_GONE = object()


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that images may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a vendored copy
            found[package] = "unknown"
    return found


def hashes(files: Iterable[Path], on_read: Callable[[int], object] = lambda count: None) -> dict[str, str]:
    """Returns file name -> SHA-256. Two files are read at a time. A name that occurs twice is a whole path.

    Args:
        on_read: called with the number of bytes of each block that was read, from several threads.

    Raises:
        InputError: a file cannot be read.
    """
    files = sorted(files)
    count = Counter(path.name for path in files)
    names = [path.name if count[path.name] == 1 else str(path) for path in files]

    def one(path: Path) -> str:
        digest, block = hashlib.sha256(), bytearray(_BLOCK)
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                digest.update(memoryview(block)[:size])
                on_read(size)
        return digest.hexdigest()

    try:
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(names, pool.map(one, files), strict=True))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({cause(error)}); {remedy(error)}") from None


def keep_manifest(
    folder: BenchmarkFolder, settings: Mapping[str, object], run: Mapping[str, object], write: bool = True
) -> None:
    """Compares the settings with those of earlier runs into a folder, and writes the manifest.

    Args:
        settings: all that the images depend on, as JSON values. They must not change between runs.
        run: what is recorded of this run: versions, device. Each run that differs from earlier ones is listed.
        write: whether this process adds its run to a manifest that exists. Any process writes a missing one, because
            it begins to save images next, and a later process takes a folder without manifest for something else.

    Raises:
        InputError: settings differ; the message names the first ones. Or the manifest cannot be read or written.
    """
    path = folder.path / MANIFEST
    settings, run = json.loads(json.dumps(settings)), json.loads(json.dumps(run))
    runs: list[object] = []
    if path.exists():
        found = read_json(path)
        if not isinstance(found.get("settings"), dict) or not isinstance(found.get("runs"), list):
            raise InputError(f"{path} must hold settings and runs; give another folder", folder.parameter)
        runs = found["runs"]
        changes = differences(found["settings"], settings)
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise InputError(
                f"{folder.path} holds images of other settings: {'; '.join(changes[:3])}{more}; give another folder, "
                "or the earlier settings",
                folder.parameter,
            )
        if run in runs:
            return
    if write or not path.exists():
        folder.write(MANIFEST, json.dumps({"settings": settings, "runs": [*runs, run]}, indent=1) + "\n")


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """Returns a text for each value that differs, such as `top_k was 4096, is 2000`."""
    texts = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new, name = before.get(key, _GONE), now.get(key, _GONE), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            texts += differences(old, new, f"{name} ")
        elif old != new:
            texts.append(f"{name} was {_shown(old)}, is {_shown(new)}")
    return texts


def _shown(value: object) -> str:
    text = "not there" if value is _GONE else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
