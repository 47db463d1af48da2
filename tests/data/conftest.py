"""Fixtures of the tests of data."""

import pytest

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def tools(tiny_checkpoint):
    vocabulary = Vocabulary.from_folder(tiny_checkpoint, ModelConfig.from_json(tiny_checkpoint / "config.json"))
    return vocabulary, ImageTokenizer.from_checkpoint(tiny_checkpoint / "movqgan_270M.ckpt")
