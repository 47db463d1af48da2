"""Finds the model configurations and the demo checkpoint.

A checkout of the repository has them at its top level. An installation has them inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def configs() -> Path:
    """Returns the folder with the YAML configurations of models and data sets."""
    return _find("configs")


def demo_checkpoint() -> Path:
    """Returns the folder of the demo checkpoint."""
    return _find("assets/demo")


def _find(name: str) -> Path:
    inside = _PACKAGE / "_files" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
