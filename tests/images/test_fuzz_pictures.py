"""Pictures damaged at random: `open_image` returns a picture or raises InputError, and prints nothing."""

import io
import logging
import random
import warnings

import pytest
from pictures import damaged, every_file

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import open_image

ROUNDS = 15  # damaged copies of each file


@pytest.fixture
def no_log_handler(monkeypatch):
    """Removes pytest's log handlers, so that unhandled records go to stderr, as in a command."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_damaged_pictures_raise_only_input_error(capsys, no_log_handler):
    """AVIF raised RuntimeError and BLP NotImplementedError, which stopped the pre-tokenization."""
    files, rng, opened, refused = every_file(), random.Random(0), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, data in files.items():
            for number in range(ROUNDS):
                content = damaged(data, rng)
                try:
                    image = open_image(f"{name}, {number}", io.BytesIO(content))
                    assert image.mode == "RGB"
                    opened += 1
                except InputError as error:
                    assert f"{name}, {number}" in str(error) and "\n" not in str(error)
                    refused += 1
                except Exception as error:
                    pytest.fail(f"{name}, copy {number}: {error!r}; the bytes are {content[:200].hex()} ...")
    assert opened > 300 and refused > 300
    assert capsys.readouterr() == ("", "")
