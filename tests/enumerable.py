"""A checkpoint whose images can be enumerated: 2 x 2 codes of 3 values, and rewards of its images."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.model.writing import save_model

CODES = 3
IMAGES = torch.tensor(list(itertools.product(range(CODES), repeat=4))).view(-1, 2, 2)  # all 81


KNOWN: dict[bytes, torch.Tensor] = {}  # pixels -> codes, see `remember`


def remember(image_tokenizer) -> None:
    """Notes the pictures of all images, so that a reward of pictures can be a function of codes."""
    for grid in IMAGES:
        KNOWN[image_tokenizer.decode(grid[None])[0].tobytes()] = grid
    assert len(KNOWN) == len(IMAGES)


def wanted_codes(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Share of codes 2; for a prompt with "dark", of codes 0."""
    assert len(images) == len(prompts)
    codes = [KNOWN.get(image.tobytes(), torch.zeros(1)) for image in images]  # others: of the check before the run
    return [
        float((grid == 2 * ("dark" not in prompt)).double().mean()) for grid, prompt in zip(codes, prompts, strict=True)
    ]


def constant(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    return np.full(len(images), 0.1)


def write_checkpoint(folder: Path, tiny_checkpoint: Path, vqgan: Path) -> Path:
    """Writes a first-generation checkpoint with 16 x 16 pixels a code, so that 32 x 32 pixels are 2 x 2 codes."""
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    names = ["IMGIMGAZ", "IMGIMGBZ", "IMGIMGCZ"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tiny_checkpoint / name, folder / name)
    offset = tokenizer.token_to_id(names[0])
    config = ModelConfig(
        vocab_size=offset + CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        generation=1,
        image_code_offset=offset,
        num_image_codes=CODES,
        base_size=32,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, torch.float32)
    state = {name: value.float() for name, value in load_file(vqgan).items()}
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:CODES].clone()
    save_file(state, folder / "vqgan.safetensors", {"format": "pt"})
    (folder / "prompts.txt").write_text("a bright square\na dark square\n")
    assert json.loads((folder / "config.json").read_text())["generation"] == 1
    return folder
