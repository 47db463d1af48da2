"""Inputs and checkpoints of the first generation, for several test modules."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from commands import main_of
from PIL import Image
from records import rows_of
from safetensors.torch import load_file, save_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.shards import Sequence, read_sequence
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.model.writing import save_model
from lumina_mgpt.vocabulary import Vocabulary


def released_white(image: Image.Image) -> Image.Image:
    """Alpha over white as the released code computes it: in float, with the fraction cut off."""
    values = np.asarray(image.convert("RGBA"))
    alpha = values[:, :, 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * values[:, :, :3]).astype(np.uint8))


def oracle_records(oracle: Path, folder: Path) -> tuple[list[dict], list[dict]]:
    """Training records of the oracle with the paths of their pictures in `folder`, and their ids and labels."""
    items = list(json.loads((oracle / "train_items.json").read_text()).values())
    for path in oracle.glob("[a-e]_*.png"):
        image = Image.open(path)
        (released_white(image) if image.mode == "RGBA" else image).save(folder / path.name)
    records = [
        {"conversations": item["conversations"], "image": [str(folder / name) for name in item["image"]]}
        for item in items
    ]
    return records, items


def vocabulary_of(folder: Path) -> Vocabulary:
    return Vocabulary.from_folder(folder, ModelConfig.from_json(folder / "config.json"))


def pre_tokenize(path: Path, out: Path, checkpoint: Path, *options: object) -> int:
    """Exit status of the command, with pictures of about 64 x 64."""
    line = ["--in_filename", path, "--out_dir", out, "--model_path", checkpoint, "--target_size", 64, "--device", "cpu"]
    return main_of("pre_tokenize")([str(part) for part in (*line, *options)])


def sequences_in(out: Path) -> list[Sequence]:
    """Sequences that `pre_tokenize` wrote, in the order of their records."""
    return [read_sequence(out / row["file"], row["id"]) for row in rows_of(out)]


def with_encoder_inside(checkpoint: Path, target: Path) -> Path:
    """Copies a checkpoint. The encoder of its VQGAN moves to the files of the language model: `model.vqmodel.*`."""
    shutil.copytree(checkpoint, target)
    vqgan = load_file(target / "vqgan.safetensors")
    inside = {f"model.vqmodel.{name}": value for name, value in vqgan.items() if not name.startswith("decoder.")}
    weights = target / "model.safetensors"
    save_file(load_file(weights) | inside, weights, {"format": "pt"})
    (target / "vqgan.safetensors").unlink()
    return target


def divisible_checkpoint(oracle: Path, folder: Path) -> Path:
    """Writes a first-generation checkpoint whose matrices divide into groups of 32 weights, with random weights."""
    config = ModelConfig(
        vocab_size=9472,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        generation=1,
        image_code_offset=4,
        num_image_codes=8192,
        base_size=64,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder)
    shutil.copytree(oracle / "tokenizer", folder, dirs_exist_ok=True)
    return folder
