"""Installs the `lumina_mgpt` package: `pip install -r requirements.txt`, or `pip install -e '.[test]'` with test tools.

The scripts import the package by name, so that none of them edits `sys.path`; an editable install is the intended one.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SCENES = ["opencv-python-headless>=4.10"]  # edge and distance maps of the demo checkpoint's training scenes


def requirements() -> list[str]:
    """The lines of requirements.txt that name a package (its last line installs this project itself)."""
    text = (HERE / "requirements.txt").read_text(encoding="utf-8")
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def version() -> str:
    text = (HERE / "lumina_mgpt" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="lumina-mgpt",
    version=version(),
    description="Lumina-mGPT 2.0: autoregressive image generation with one decoder-only transformer",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lumina_mgpt", "lumina_mgpt.*"]),
    package_data={"lumina_mgpt.demo": ["*.txt"], "lumina_mgpt.model": ["*.cpp", "*.h"]},
    install_requires=requirements(),
    extras_require={
        "demo": SCENES,
        "lora": ["peft>=0.17"],
        "test": [
            *SCENES,
            "pytest>=8",
            "hypothesis>=6.100",  # property tests of the image sequences
            "transformers>=5.0",  # an independent Chameleon to compare logits with
            "diffusers>=0.35",  # an independent MoVQ to compare pixels with
            "ruff>=0.12",
            "peft>=0.17",  # low-rank adapters
            "tensorboard>=2.18",
        ],
    },
)
