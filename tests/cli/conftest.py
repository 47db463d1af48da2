"""A fixture of several modules of this folder."""

import pytest


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read: checks must come before."""
    for loader in ("lumina_mgpt.pipeline.load_model", "lumina_mgpt.vqgan.tokenizer.load_state_dict"):
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("weights were loaded"))
