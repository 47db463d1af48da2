"""Training of the image tokenizer, and the demo's text tokenizer, on tiny sizes."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import emoji
import numpy as np
import pytest
import scenes
import torch
from commands import main_of
from PIL import Image
from safetensors.torch import save_file
from text_tokenizer import VOCABULARY, write_tokenizer

from lumina_mgpt.cli.train_movqgan import build_parser, check_sizes, model_config
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import text_to_image
from lumina_mgpt.training.image_codebook import MovingCodes, kmeans
from lumina_mgpt.training.image_tokenizer import ImageTokenizerTrainer, MoVQGANTrainingConfig, Pictures
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.model import VQGANConfig
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer, find_image_tokenizer, load_state_dict

ROOT = Path(__file__).parents[2]
CONFIG = VQGANConfig(ch=32, blocks=1, mult=(1, 1), num_codes=16, attention_levels=(1,))
PLAIN = replace(CONFIG, z_channels=6, embed_dim=6, attention_levels=(), spatial=False)
SETTINGS = MoVQGANTrainingConfig(minutes=1e6, pixels=2 * 32 * 32, continuous_steps=3, warmup_steps=2, revive_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for n in range(6):
        colors = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colors).resize((32, 32), Image.Resampling.BILINEAR).save(folder / f"{n}.png")
    return folder


class StopAt(Exception):
    pass


def train(
    folder: Path,
    out_dir: Path,
    steps: int,
    settings: MoVQGANTrainingConfig = SETTINGS,
    config: VQGANConfig = CONFIG,
) -> ImageTokenizerTrainer:
    """Trains to `steps` and saves, as a run that was stopped there."""
    trainer = ImageTokenizerTrainer(config, settings, Pictures({folder: 1.0}), out_dir)
    draw = trainer.pictures.batch

    def batch(*args):
        if trainer.step >= steps:
            raise StopAt
        return draw(*args)

    trainer.pictures.batch = batch
    with pytest.raises(StopAt):
        trainer.run()
    trainer.save()
    return trainer


def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)  # the learning rate follows the clock
    whole = train(folder, tmp_path / "whole", 12)
    train(folder, tmp_path / "parts", 7)
    resumed = train(folder, tmp_path / "parts", 12)
    for (name, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert whole.quantizing and resumed.quantizing


def test_the_log_of_a_resumed_run_has_each_step_once(folder, tmp_path):
    """Steps after the last save appeared twice."""
    train(folder, tmp_path, 21)
    with open(tmp_path / "log.jsonl", "a") as file:  # as a run leaves it that was killed at step 60
        file.write('{"step": 40, "loss": 1.0}\n{"step": 6')
    train(folder, tmp_path, 41)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40] and "psnr" in rows[1]


@pytest.mark.parametrize("config, file", [(CONFIG, "movqgan.safetensors"), (PLAIN, "vqgan.safetensors")])
def test_training_the_decoder_keeps_the_codes(folder, tmp_path, config, file):
    train(folder, tmp_path / "first", 8, config=config)
    first = load_state_dict(tmp_path / "first" / file)
    settings = replace(SETTINGS, decoder_of=str(tmp_path / "first" / file))
    train(folder, tmp_path / "second", 8, settings)
    second = load_state_dict(tmp_path / "second" / file)
    train(folder, tmp_path / "second", 9, settings)  # goes on
    train(folder, tmp_path / "third", 4)
    with pytest.raises(InputError, match="not those of decoder_of"):
        train(folder, tmp_path / "third", 8, settings)
    with pytest.raises(InputError, match="decoder_of"):
        train(folder, tmp_path / "fourth", 8, replace(SETTINGS, decoder_of=str(tmp_path / "no.safetensors")))
    kept = ("encoder.", "quant_conv.", "quantize.")
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert not any(key.startswith(kept) for key in changed)
    assert any(key.startswith("decoder.") for key in changed) and any("post_quant_conv" in key for key in changed)


def test_the_decoder_learns_from_the_codes_that_pictures_get(folder, tmp_path, monkeypatch):
    """Latents in bfloat16 gave two codes in five another value."""
    train(folder, tmp_path / "first", 8)
    settings = replace(SETTINGS, decoder_of=str(tmp_path / "first" / "movqgan.safetensors"))
    trainer = ImageTokenizerTrainer(CONFIG, settings, Pictures({folder: 1.0}), tmp_path / "second")
    pixels = trainer.pictures.batch(np.random.default_rng(0), settings.pixels)
    quantizer, seen = trainer.model.quantize, []
    nearest = quantizer.nearest
    monkeypatch.setattr(quantizer, "nearest", lambda cells: seen.append(cells) or nearest(cells))
    trainer._train_step(pixels, torch.Generator())
    expected = trainer.model.latent(pixels).permute(0, 2, 3, 1)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_weights_without_a_decoder_are_refused(folder, tmp_path):
    train(folder, tmp_path / "first", 2, config=PLAIN)
    state = load_state_dict(tmp_path / "first" / "vqgan.safetensors")
    save_file({key: value for key, value in state.items() if "decoder" not in key}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="^decoder_of must name weights with a decoder"):
        train(folder, tmp_path / "second", 8, replace(SETTINGS, decoder_of=str(tmp_path / "half.safetensors")))


def test_the_command_trains_a_vqgan_of_the_first_generation(folder, tmp_path):
    """From scratch to the first codes, then its decoder by the command. The search for a VQGAN finds both files."""
    args = build_parser().parse_args("--images x --out_dir y --norms plain --num_codes 8 --z_channels 6".split())
    check_sizes(args)
    config = model_config(args)
    assert config == replace(PLAIN, mult=(1, 1, 2, 2, 4), num_codes=8)
    trainer = train(folder, tmp_path / "first", 5, replace(SETTINGS, pixels=8 * 32 * 32), config)
    assert trainer.quantizing
    file = find_image_tokenizer(tmp_path / "first", kind="vqgan")
    command = ["--images", str(folder), "--out_dir", str(tmp_path / "second"), "--decoder_of", str(file)]
    assert main_of("train_movqgan")([*command, "--minutes", "0.005", "--threads", "1"]) == 0
    image = Image.open(folder / "0.png").convert("RGB")
    found = find_image_tokenizer(tmp_path / "second", kind="vqgan")
    assert (file.name, found.name) == ("vqgan.safetensors",) * 2
    one, two = map(ImageTokenizer.from_checkpoint, (file, found))
    assert one.model.config == two.model.config == config and one.cell == 16
    codes = one.encode([image])
    assert codes.shape == (1, 2, 2) and torch.equal(codes, two.encode([image]))
    assert not torch.equal(one.model.decode(codes), two.model.decode(codes))


def test_a_run_stopped_just_before_the_codes_begin_can_go_on(folder, tmp_path):
    """It crashed for good once: k-means was given fewer latents than codes."""
    settings = replace(SETTINGS, pixels=32 * 32, continuous_steps=3)
    config = replace(CONFIG, num_codes=300)  # a batch has 256 latents
    trainer = ImageTokenizerTrainer(config, settings, Pictures({folder: 1.0}), tmp_path)
    trainer.step = 3
    trainer.save()
    again = ImageTokenizerTrainer(config, settings, Pictures({folder: 1.0}), tmp_path)
    again.pictures.batch = _stop_after(again.pictures.batch, 12)
    with pytest.raises(StopAt):
        again.run()
    assert again.quantizing


def _stop_after(draw, count: int):
    left = iter(range(count))

    def batch(*args):
        if next(left, None) is None:
            raise StopAt
        return draw(*args)

    return batch


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["spatial", "plain"])
def test_training_lowers_the_error_and_the_file_loads(folder, tmp_path, config):
    settings = replace(SETTINGS, continuous_steps=30, lr=3e-3)
    trainer = train(folder, tmp_path, 90, settings, config)
    image = Image.open(folder / "0.png").convert("RGB")
    tokenizer = ImageTokenizer.from_checkpoint(tmp_path / f"{config.kind}.safetensors")
    out = tokenizer.decode(tokenizer.encode([image]))[0]
    error = np.square(np.asarray(out, float) - np.asarray(image, float)).mean()
    plain = np.square(np.asarray(image, float) - np.asarray(image, float).mean((0, 1))).mean()
    assert error < 0.5 * plain  # far better than the picture's mean colour
    assert len(tokenizer.encode([image]).unique()) > 2
    assert trainer.codes.sizes.sum() > 0


def test_damaged_state_and_other_sizes_are_refused(folder, tmp_path):
    train(folder, tmp_path, 2)
    with pytest.raises(InputError, match="training.pt"):
        ImageTokenizerTrainer(replace(CONFIG, num_codes=8), SETTINGS, Pictures({folder: 1.0}), tmp_path)
    path = tmp_path / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="training.pt"):
        ImageTokenizerTrainer(CONFIG, SETTINGS, Pictures({folder: 1.0}), tmp_path)


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).reshape(-1, 2)
    found = kmeans(points, 3, generator=torch.Generator().manual_seed(1))
    assert torch.cdist(centres, found).min(1).values.max() < 10  # every start gives centres of mass of points
    many = kmeans(points, 30, generator=torch.Generator().manual_seed(1))
    assert torch.cdist(points, many).min(1).values.mean() < 0.2


def test_dead_codes_move_to_latents_and_used_codes_to_their_mean(folder, tmp_path):
    trainer = ImageTokenizerTrainer(CONFIG, SETTINGS, Pictures({folder: 1.0}), tmp_path)
    codes = MovingCodes(trainer.model.quantize.embedding.weight, 0.0, SETTINGS.dead_below)
    codes.start(torch.arange(16.0)[:, None].expand(16, 4).clone())
    flat = torch.full((256, 4), 2.25)
    codes.update(flat, torch.full((256,), 2))
    assert codes.codes[2].tolist() == [2.25] * 4  # no memory at decay 0: the mean of what fell to it
    far = torch.full((256, 4), 50.0)
    moved = codes.revive(far, torch.Generator().manual_seed(0))
    assert moved == 15 and (codes.codes == 50.0).all(1).sum() == 15


def test_the_text_tokenizer_fits_the_demo_configuration(tmp_path):
    rng = random.Random(0)
    todo = scenes.random_pairs(emoji.known_names(), 300, False, rng)
    captions = [scenes.caption(scene, rng) for scene in todo]
    write_tokenizer(tmp_path, captions)
    config = ModelConfig.from_yaml(ROOT / "configs" / "model" / "demo.yaml")
    assert config.image_code_offset == VOCABULARY
    vocabulary = Vocabulary.from_folder(tmp_path, config)
    text = text_to_image("a hedgehog, naïve and 東京", 96, 96)
    assert vocabulary.decode_text(vocabulary.encode_text(text)) == text
    assert len(vocabulary.encode_text(text_to_image(captions[0], 96, 96))) < 60


@pytest.mark.parametrize(
    "options, named",
    [
        (["--ch", "40"], "--ch"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        ([], "no .png"),
        (["--ch", "64", "--decoder_of", "x.safetensors"], "--ch 64 means nothing with --decoder_of"),
    ],
)
def test_options_out_of_range_print_one_line(tmp_path, options, named):
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        "-m",
        "lumina_mgpt",
        "train-movqgan",
        "--images",
        str(tmp_path / "empty"),
        "--out_dir",
        str(tmp_path / "out"),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
