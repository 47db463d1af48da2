"""Files that come with the package: model configurations and the demo checkpoint.

In a checkout they lie at its top level, in an installed package inside it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def configs() -> Path:
    """Folder of the YAML files of models and data sets."""
    return _find("configs")


def demo_checkpoint() -> Path:
    """Folder of the demo checkpoint."""
    return _find("assets/demo")


def _find(name: str) -> Path:
    inside = _PACKAGE / "_files" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
