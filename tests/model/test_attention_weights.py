"""Recorded attention weights: the released code's, and those of the kernels."""

import pytest
import torch
from safetensors.torch import load_file

from lumina_mgpt.attention_map import KINDS, attention_map, draw
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.attention_weights import last_query_weights
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.unirep import decode_image
from lumina_mgpt.vocabulary import Vocabulary


@pytest.fixture(scope="module", params=["tiny", "mha128"])
def golden(request, oracle_v1_dir, oracle_v1_checkpoint, tmp_path_factory):
    """Model, checkpoint folder, and the file of the released code's results."""
    if request.param == "tiny":  # the file's results are those of the weights without a script
        folder = tmp_path_factory.mktemp("plain")
        for path in oracle_v1_checkpoint("image").iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(oracle_v1_dir / "tiny.safetensors")
    else:
        folder = oracle_v1_checkpoint(request.param)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    return model.eval(), folder, load_file(oracle_v1_dir / f"logits_{request.param}.safetensors")


def test_weights_are_those_of_the_released_code(golden):
    model, _, expected = golden
    position = int(expected["t2i.attention.position"])
    ids = expected["t2i.cond.ids"][None, : position + 1]
    with torch.inference_mode(), last_query_weights(model) as recorded:
        watched = model(ids)
    torch.testing.assert_close(torch.cat(recorded), expected["t2i.attention"], atol=1e-4, rtol=0)
    with torch.inference_mode():
        assert torch.equal(model(ids), watched) and len(recorded) == len(model.layers), "no recording after the block"


def test_shares_by_kind_of_id(golden):
    model, folder, expected = golden
    vocabulary = Vocabulary.from_folder(folder, ModelConfig.from_json(folder / "config.json"))
    ids = expected["t2i.cond.ids"]
    begin = ids.tolist().index(vocabulary.image_start_id)
    codes = decode_image(ids[begin:-1], vocabulary)
    attention = attention_map(model, vocabulary, ids[:begin].tolist(), codes)
    weights = expected["t2i.attention"].mean((0, 1))
    sums = dict.fromkeys(KINDS, 0.0)
    for id_, weight in zip(ids.tolist(), weights.tolist(), strict=False):
        kind = {
            vocabulary.image_start_id: "image start",
            vocabulary.row_end_id: "row ends",
            vocabulary.bos_id: "bos and turn end",
            vocabulary.turn_end_id: "bos and turn end",
        }.get(id_)
        if kind is None and vocabulary.is_code(torch.tensor(id_)):
            kind = "codes"
        if kind is None:
            kind = "grid ids" if vocabulary.describe(id_).startswith("grid") else "text"
        sums[kind] += weight
    assert attention.shares() == pytest.approx(sums, abs=1e-4) and sum(sums.values()) == pytest.approx(1)
    assert attention.counts["codes"] == codes.numel() and attention.counts["grid ids"] == 2
    is_code = vocabulary.is_code(ids[: len(weights)])
    torch.testing.assert_close(attention.grid.flatten(), weights[is_code], atol=1e-4, rtol=0)


def test_the_picture_shows_the_heaviest_code(golden):
    from PIL import Image

    model, folder, expected = golden
    vocabulary = Vocabulary.from_folder(folder, ModelConfig.from_json(folder / "config.json"))
    attention = attention_map(model, vocabulary, [vocabulary.bos_id], torch.arange(24).view(4, 6))
    drawing = draw(attention, Image.new("RGB", (96, 64), "blue"))
    row, col = divmod(int(attention.grid.argmax()), 6)
    square = drawing.width // 12
    assert drawing.getpixel((drawing.width // 2 + col * square + square // 2, row * 96 + 48)) == (255, 255, 230)
    assert drawing.getpixel((5, 5)) == (0, 0, 255)
