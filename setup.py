"""Builds the package: modules, sources of the kernels, and files that commands need (configs, demo checkpoint)."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Folders of the checkout that a wheel carries; `lumina_mgpt.resources` finds them in either place.
FILES = ("configs", "assets/demo")
# The kernels are compiled against torch's stable interface of 2.10; without an upper bound pip takes a larger build of
# torch for CUDA. requirements.txt pins the version that the tests run with.
TORCH = "torch>=2.10,<2.14"
SCENES = ["opencv-python-headless>=4.10"]  # edge and distance maps of the demo checkpoint's training scenes
LORA = ["peft>=0.17"]
PLOT = ["matplotlib>=3.8"]
SERVER = [
    "fastapi>=0.115",
    "prometheus_client>=0.21",
    "pydantic>=2.7",
    "python-multipart>=0.0.18",  # fastapi reads uploads with it
    "starlette>=0.40",
    "uvicorn>=0.32",
]
PAGE = [*SERVER, "gradio>=6"]  # takes Pillow 12
RAY = [*SERVER, "ray[serve]>=2.60"]


class BuildWithFiles(build_py):
    """Copies FILES into a wheel; an editable install uses them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in FILES:
            target = Path(self.build_lib) / "lumina_mgpt" / "_files" / name
            shutil.copytree(HERE / name, target, dirs_exist_ok=True)


def requirements() -> list[str]:
    """Packages of requirements.txt, torch with its range."""
    text = (HERE / "requirements.txt").read_text(encoding="utf-8")
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    names = [line for line in lines if line and not line.startswith(("#", "-"))]
    return [TORCH if name.startswith("torch==") else name for name in names]


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
    package_data={"lumina_mgpt": ["py.typed"], "lumina_mgpt.kernels": ["*.cpp", "*.h"]},
    cmdclass={"build_py": BuildWithFiles},
    entry_points={"console_scripts": ["lumina-mgpt = lumina_mgpt.cli.main:main"]},
    install_requires=requirements(),
    extras_require={
        "benchmarks": PLOT,
        "canny": SCENES,  # --extract
        "demo": SCENES,
        "dev": ["pre-commit>=4"],
        "flash": ["flash-attn>=2.6"],
        "llama": ["gguf>=0.17", "llama-cpp-python>=0.3.16"],  # scripts/benchmarks/bench_llama.py
        "lora": LORA,
        "page": PAGE,
        "plot": PLOT,
        "ray": RAY,
        "server": SERVER,
        "tensorboard": ["tensorboard>=2.18"],
        "test": [
            *SCENES,
            *LORA,
            *PLOT,
            *PAGE,
            *RAY,
            "diffusers>=0.35",  # an independent MoVQ to compare pixels with
            "hypothesis>=6.100",  # property tests of the image sequences
            "mypy>=2.4,<3",
            "openai>=1.100",  # the client of the server's tests
            "packaging>=24",  # reads version ranges
            "playwright>=1.50",  # drives the browser of the page's tests
            "pytest>=8",
            "pytest-xdist>=3.6",  # runs the tests in two processes
            "ruff>=0.17,<0.18",  # a minor version may format differently
            "setuptools>=77",  # reads setup.py
            "tensorboard>=2.18",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
