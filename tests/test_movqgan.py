"""MoVQGAN against the released code's outputs and against diffusers' MoVQ."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import to_pixels
from lumina_mgpt.movqgan.model import MoVQGAN, MoVQGANConfig
from lumina_mgpt.movqgan.tokenizer import ImageTokenizer, find_movqgan, load_state_dict


@pytest.fixture(scope="module")
def tokenizer(oracle_movqgan):
    return ImageTokenizer.from_checkpoint(oracle_movqgan)


GOLDEN = {"img64": "img_64x64.png", "w128h64": "img_w128_h64.png"}


@pytest.mark.parametrize("name", GOLDEN)
def test_codes_and_pixels_equal_the_released_code(tokenizer, oracle_dir, name):
    golden = load_file(oracle_dir / "movqgan_small_golden.safetensors")
    image = Image.open(oracle_dir / GOLDEN[name]).convert("RGB")
    with torch.no_grad():
        latent = tokenizer.model.latent(to_pixels([image]))
    torch.testing.assert_close(latent, golden[f"{name}.latent"], rtol=0, atol=1e-4)
    codes = tokenizer.encode([image])
    assert codes.flatten().tolist() == golden[f"{name}.indices"].tolist()
    torch.testing.assert_close(tokenizer.model.decode(codes), golden[f"{name}.decoded"].clamp(-1, 1), rtol=0, atol=1e-4)


def test_decoding_an_oblong_grid_equals_the_released_code(tokenizer, oracle_dir):
    golden = load_file(oracle_dir / "movqgan_small_codes_h8_w16.safetensors")
    pixels = tokenizer.model.decode(golden["codes"].view(1, 8, 16))
    torch.testing.assert_close(pixels, golden["decoded"].clamp(-1, 1), rtol=0, atol=1e-4)
