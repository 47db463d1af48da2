"""The first generation's VQGAN against the released code's outputs and against transformers' Chameleon."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_v1.weights import HERE, vqgan_state, vqgan_yaml, write_tiny, write_vqgan
from PIL import Image
from safetensors.torch import load_file, save_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.image_tokenizer import load_image_tokenizer
from lumina_mgpt.images import to_images, to_pixels, to_rgb
from lumina_mgpt.model.names import COMPANIONS, companions_of
from lumina_mgpt.model.reading import read_prefixed
from lumina_mgpt.vqgan.model import VQGAN, VQGANConfig
from lumina_mgpt.vqgan.tokenizer import KINDS, ImageTokenizer, find_image_tokenizer, look_for_image_tokenizer

MODELS = ("vqgan128", "vqgan_tiny")
PICTURES = {path.name[0]: path for path in sorted(HERE.glob("[a-e]_*.png"))}
CHAMELEON = VQGANConfig(
    ch=128,
    blocks=2,
    mult=(1, 1, 2, 2, 4),
    z_channels=256,
    embed_dim=256,
    num_codes=8192,
    attention_levels=(),
    spatial=False,
)
SIZES = dict(  # of a language model
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PREFIX = "model.vqmodel."


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vqgan")
    return {name: write_vqgan(folder / f"{name}.ckpt", name) for name in MODELS}


@pytest.fixture(scope="module")
def tokenizers(files) -> dict[str, ImageTokenizer]:
    return {name: ImageTokenizer.from_checkpoint(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(HERE / f"{name}_golden.safetensors") for name in MODELS}


def pixels_of(tokenizer: ImageTokenizer, codes: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) before they are clamped."""
    latent = tokenizer.model.quantize.embedding(codes).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        return tokenizer.model.decode_latent(latent)[0]


def released_white(image: Image.Image) -> Image.Image:
    """Alpha over white as the released code computes it: in float, with the fraction cut off."""
    values = np.asarray(image.convert("RGBA"))
    alpha = values[:, :, 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * values[:, :, :3]).astype(np.uint8))


# -- the released code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", PICTURES)
@pytest.mark.parametrize("name", MODELS)
def test_latents_codes_and_pixels_equal_the_released_code(tokenizers, golden, name, letter):
    tokenizer, wanted = tokenizers[name], golden[name]
    image = Image.open(PICTURES[letter])
    image = released_white(image) if image.mode == "RGBA" else image
    with torch.no_grad():
        latent = tokenizer.model.latent(to_pixels([image]))
    torch.testing.assert_close(latent[0], wanted[f"{letter}.latent"], rtol=0, atol=1e-4)
    codes = tokenizer.encode([image])
    assert torch.equal(codes[0], wanted[f"{letter}.codes"])
    if letter in "abc":
        torch.testing.assert_close(pixels_of(tokenizer, codes), wanted[f"{letter}.pixels"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, moved", [("vqgan128", 0), ("vqgan_tiny", 2)])
def test_alpha_is_composited_where_the_released_code_cuts_fractions_off(tokenizers, golden, name, moved):
    """Differs from the reference: one alpha rule for all pictures. It moves two of sixteen codes of the tiny VQGAN."""
    image = Image.open(PICTURES["d"])
    assert (tokenizers[name].encode([image])[0] != golden[name]["d.codes"]).sum() == moved
    above = np.asarray(to_rgb(image), int) - np.asarray(released_white(image), int)
    assert above.min() == 0 and above.max() == 1


@pytest.mark.parametrize("name", MODELS)
def test_free_codes_decode_to_the_released_pixels(tokenizers, golden, name):
    pixels = pixels_of(tokenizers[name], golden[name]["free.codes"][None])
    torch.testing.assert_close(pixels, golden[name]["free.pixels"], rtol=0, atol=1e-4)
    decoded = tokenizers[name].model.decode(golden[name]["free.codes"][None])[0]
    torch.testing.assert_close(decoded, golden[name]["free.pixels"].clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("letter", "ab")
@pytest.mark.parametrize("name", MODELS)
def test_saved_pictures_differ_by_rounding_alone(tokenizers, golden, name, letter):
    """Differs from the reference: it cuts fractions off. With `truncate` the picture is the released one."""
    released = np.asarray(Image.open(HERE / f"{name}_{letter}_rec.png"), int)
    pixels, codes = golden[name][f"{letter}.pixels"][None], golden[name][f"{letter}.codes"][None]
    assert np.array_equal(np.asarray(to_images(pixels, truncate=True)[0]), released)
    rounded = np.asarray(tokenizers[name].decode(codes)[0], int) - released
    assert rounded.min() == 0 and rounded.max() == 1 and 0.4 < rounded.mean() < 0.6
    cut = np.asarray(tokenizers[name].decode(codes, truncate=True)[0], int) - released
    assert np.abs(cut).max() <= 1 and np.abs(cut).mean() < 1e-3  # pixels 1e-5 apart may fall on two sides of a number


# -- files -------------------------------------------------------------------------------------------------------------


def test_sizes_and_kind_follow_from_the_tensors(tokenizers):
    config = tokenizers["vqgan128"].model.config
    assert config == replace(CHAMELEON, ch=32, z_channels=32, embed_dim=32)
    assert tokenizers["vqgan_tiny"].model.config == replace(config, blocks=1, mult=(1,) * 5, z_channels=8, embed_dim=8)
    assert all(tokenizer.cell == 16 and tokenizer.kind == "vqgan" for tokenizer in tokenizers.values())


def test_ckpt_safetensors_and_training_keys_give_one_model(tokenizers, golden, tmp_path):
    """The released file is loaded non-strictly: `loss.*` is the discriminator's and the perceptual network's."""
    state = {"loss.discriminator.main.0.weight": torch.zeros(2), **vqgan_state("vqgan128")}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "vqgan.ckpt")
    write_vqgan(tmp_path / "vqgan.safetensors")
    (tmp_path / "vqgan.yaml").write_text(vqgan_yaml("vqgan128"))
    wanted = tokenizers["vqgan128"].model.state_dict()
    for path in (tmp_path / "vqgan.ckpt", tmp_path / "vqgan.safetensors"):
        found = ImageTokenizer.from_checkpoint(path).model.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_damaged_files_are_refused_in_one_line(tmp_path, suffix):
    path = write_vqgan(tmp_path / f"vqgan.{suffix}", "vqgan_tiny")
    path.write_bytes(_cut(path.read_bytes()))
    with pytest.raises(InputError, match=rf"vqgan\.{suffix} is damaged.*download it again") as caught:
        ImageTokenizer.from_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [pickle.dumps(print, protocol=2), b"\x89PNG\r\n\x1a\n"])
def test_a_file_without_tensors_gives_no_unsafe_advice(tmp_path, content):
    """torch's own message advises to switch off `weights_only`."""
    path = tmp_path / "vqgan.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="it holds something else than tensors") as caught:
        ImageTokenizer.from_checkpoint(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda state: state.pop("decoder.norm_out.weight"), "decoder.norm_out.weight"),
        (lambda state: state.pop("quantize.embedding.weight"), "quantize.embedding.weight"),
        (lambda state: state.update({"decoder.surplus": torch.zeros(1)}), "decoder.surplus"),
        (lambda state: state.update({"decoder.conv_out.weight": torch.zeros(3, 32, 1, 1)}), "decoder.conv_out.weight"),
        (lambda state: state.update({"decoder.norm_out.norm_layer.weight": torch.ones(32)}), "norm_layer"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, change, named):
    state = load_file(HERE / "vqgan_tiny.safetensors")
    change(state)
    save_file(state, tmp_path / "vqgan.safetensors")
    with pytest.raises(InputError, match=named) as caught:
        ImageTokenizer.from_checkpoint(tmp_path / "vqgan.safetensors")
    assert "vqgan.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_is_looked_for_in_the_released_places(tmp_path, monkeypatch):
    """In this order: in the checkpoint's folder, in the hub's layout, below the working folder, in the package."""
    monkeypatch.chdir(tmp_path)
    packaged = tmp_path / "package" / "vqgan.ckpt"
    relative = KINDS["vqgan"].elsewhere[0]
    assert relative == Path("ckpts/chameleon/tokenizer/vqgan.ckpt")
    monkeypatch.setitem(KINDS, "vqgan", replace(KINDS["vqgan"], elsewhere=(relative, packaged)))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "movqgan_270M.ckpt").touch()  # of the other kind
    assert look_for_image_tokenizer(folder, kind="vqgan") is None
    with pytest.raises(InputError, match="no VQGAN weights in .*ckpts/chameleon.*download .*Chameleon_7B.* vqgan_path"):
        find_image_tokenizer(folder, kind="vqgan")
    places = (packaged, relative, folder / "original_tokenizers" / "vqgan.ckpt", folder / "vqgan.safetensors")
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_image_tokenizer(folder, kind="vqgan") == path
    assert find_image_tokenizer(folder) == folder / "movqgan_270M.ckpt"
    assert find_image_tokenizer(folder, packaged, "vqgan") == packaged
    copied = {file.relative_to(folder).as_posix() for file in companions_of(folder)}
    assert "vqgan.safetensors" in copied and "original_tokenizers/vqgan.ckpt" not in copied  # one is enough
    assert "original_tokenizers/vqgan.ckpt" in COMPANIONS  # what the hub is asked for
    (folder / "vqgan_2.ckpt").touch()
    with pytest.raises(InputError, match="^vqgan_path must name one file.*vqgan.safetensors, vqgan_2.ckpt"):
        find_image_tokenizer(folder, kind="vqgan")
    with pytest.raises(InputError, match="^vqgan_path .*nothing.ckpt"):
        find_image_tokenizer(folder, tmp_path / "nothing.ckpt", "vqgan")


def test_an_image_tokenizer_of_another_model_is_refused(tokenizers, oracle_movqgan):
    tokenizer, movqgan = tokenizers["vqgan_tiny"], ImageTokenizer.from_checkpoint(oracle_movqgan)
    first = ModelConfig(vocab_size=9472, image_code_offset=4, num_image_codes=8192, generation=1, **SIZES)
    second = ModelConfig(vocab_size=200000, **SIZES)
    tokenizer.require_codes(first, "x.ckpt")
    movqgan.require_codes(second, "x.ckpt")
    with pytest.raises(InputError, match="^vqgan_path .* 64 codes, but x.ckpt has 8192; give the VQGAN that the model"):
        tokenizer.require_codes(replace(first, num_image_codes=64), "x.ckpt")
    with pytest.raises(InputError, match="^movqgan_path .* 8 x 8 .* 2.0, but those of x.ckpt have 16 x 16.*MoVQGAN"):
        tokenizer.require_codes(replace(second, num_image_codes=8192), "x.ckpt")
    with pytest.raises(InputError, match="^vqgan_path .* 16 x 16 .*, but those of x.ckpt have 8 x 8"):
        movqgan.require_codes(replace(first, num_image_codes=16384, vocab_size=20000), "x.ckpt")


# -- the encoder inside a language model's files -----------------------------------------------------------------------


def with_encoder(folder: Path) -> Path:
    """The tiny checkpoint whose weight file also holds the tiny VQGAN's tensors but for the decoder, as released."""
    write_tiny(folder)
    state = {key: value for key, value in vqgan_state("vqgan_tiny").items() if not key.startswith("decoder.")}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {PREFIX + key: value.bfloat16() for key, value in state.items()}, folder / "model.safetensors")
    return folder


def test_the_encoder_of_a_language_model_encodes_and_refuses_to_decode(tokenizers, tmp_path, golden):
    folder = with_encoder(tmp_path / "model")
    state = read_prefixed(folder, PREFIX)
    assert "encoder.conv_in.weight" in state and not any(key.startswith("model.") for key in state)
    tokenizer = load_image_tokenizer(folder, None, kind="vqgan")
    assert not tokenizer.can_decode and tokenizers["vqgan_tiny"].can_decode
    for letter in "abce":
        codes = tokenizer.encode([Image.open(PICTURES[letter])])
        assert torch.equal(codes[0], golden["vqgan_tiny"][f"{letter}.codes"])
    with pytest.raises(InputError, match="^vqgan_path must name a VQGAN file .*model.vqmodel.*download .*vqgan.ckpt"):
        tokenizer.decode(codes)
    with pytest.raises(InputError, match="no decoder"):
        tokenizer.model.decode(codes)


def test_a_file_precedes_the_encoder_and_one_of_them_is_needed(tmp_path, files):
    folder = write_tiny(tmp_path / "model")
    assert load_image_tokenizer(folder, files["vqgan_tiny"], kind="vqgan").can_decode
    with pytest.raises(InputError, match="no VQGAN weights in"):
        load_image_tokenizer(folder, None, kind="vqgan")
    with pytest.raises(InputError, match="no MoVQGAN weights in"):
        load_image_tokenizer(with_encoder(tmp_path / "other"), None)  # a checkpoint of the second generation


def test_encoders_are_read_from_shards(tmp_path):
    folder = with_encoder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_prefixed(folder, PREFIX)
    assert found.keys() == {key for key in vqgan_state("vqgan_tiny") if not key.startswith("decoder.")}
    assert all(torch.equal(value, weights[PREFIX + key]) for key, value in found.items())
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="repeats keys"):
        read_prefixed(folder, PREFIX)


def test_names_and_codes_equal_those_of_transformers():
    """Its Chameleon holds exactly these tensors below `model.vqmodel`; the released files hold 129."""
    chameleon = pytest.importorskip("transformers.models.chameleon")
    torch.manual_seed(0)
    sizes = dict(base_channels=32, latent_channels=16, embed_dim=16, num_embeddings=64)
    theirs = chameleon.modeling_chameleon.ChameleonVQVAE(chameleon.ChameleonVQVAEConfig(**sizes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = VQGAN.from_state_dict(theirs.state_dict())
    assert len(theirs.state_dict()) == 129 and not ours.config.decoder
    with torch.device("meta"):
        whole = VQGAN(CHAMELEON)
    assert sum(not key.startswith("decoder.") for key in whole.state_dict()) == 129
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        codes = theirs.encode(pixels)
    codes = codes[2] if isinstance(codes, tuple) else codes.image_tokens
    assert len(codes.unique()) > 2 and torch.equal(ours.encode(pixels).flatten(), codes.flatten())


# -- half types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_decoder_takes_a_half_type(files, tokenizers, golden, dtype):
    half = ImageTokenizer.from_checkpoint(files["vqgan128"], dtype=dtype)
    types = {
        name: {weight.dtype for weight in getattr(half.model, name).parameters()}
        for name, _ in half.model.named_children()
    }
    kept = dict.fromkeys(("encoder", "quant_conv", "quantize"), {torch.float32})
    assert types == kept | dict.fromkeys(("decoder", "post_quant_conv"), {dtype})
    image = Image.open(PICTURES["b"])
    codes = half.encode([image])
    assert torch.equal(codes, tokenizers["vqgan128"].encode([image]))
    whole, part = (np.asarray(t.decode(codes)[0], float) for t in (tokenizers["vqgan128"], half))
    assert 0 < np.abs(whole - part).mean() < 3  # of 255


def test_a_half_movqgan_encodes_as_float32(oracle_movqgan, oracle_dir):
    image = Image.open(oracle_dir / "img_64x64.png").convert("RGB")
    codes = [
        ImageTokenizer.from_checkpoint(oracle_movqgan, dtype=t).encode([image]) for t in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*codes)
