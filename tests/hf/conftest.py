"""The tiny checkpoint as classes of transformers, in float64 so that sums may have any order."""

import pytest
import torch

from lumina_mgpt import Pipeline


@pytest.fixture(scope="session")
def hf(tiny_checkpoint):
    """Model and processor."""
    from lumina_mgpt.hf import LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor

    model = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    return model, LuminaMGPTProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, dtype=torch.float64, text=True)
