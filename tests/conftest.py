"""Shared fixtures: the oracle files, and weights made by the oracle's formula."""

import importlib.util
from pathlib import Path

import pytest
import torch

ORACLE = Path(__file__).parent / "oracle"
# One spelling of float32 products everywhere; several threads would also make the small sizes here slower.
torch.set_num_threads(2)


def _oracle_weights():
    spec = importlib.util.spec_from_file_location("oracle_weights", ORACLE / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    return ORACLE


@pytest.fixture(scope="session")
def oracle_checkpoint(tmp_path_factory):
    """variant name -> checkpoint folder in the released layout, written once a session."""
    folders: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = _oracle_weights().write_checkpoint(tmp_path_factory.mktemp(variant), variant)
        return folders[variant]

    return get


@pytest.fixture(scope="session")
def oracle_movqgan(tmp_path_factory) -> Path:
    return _oracle_weights().write_movqgan(tmp_path_factory.mktemp("movqgan") / "movqgan_270M.ckpt")
