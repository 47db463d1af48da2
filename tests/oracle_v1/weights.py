"""Checkpoints of the Lumina-mGPT 1 oracle: the weights that the released code ran on to make the files of this folder.

Most weights follow from a formula on the tensor's name, so that no large file is needed:

    u(name, i) = (splitmix64(i + crc32(name) * 2**32) >> 40) * 2**-24, in [0, 1)
    fill       = offset + half * (2 * u - 1), in float32

    write_tiny(folder, script)       the checkpoint of `tiny.safetensors`, bf16, with one of `SCRIPTS` applied
    write_checkpoint(folder, name)   "mha128" or "swin128": layouts of the released 7B and 34B, float32
    write_vqgan(path, name)          "vqgan128" or "vqgan_tiny", as `.ckpt` or `.safetensors`

`python weights.py` makes `tiny.safetensors` and `vqgan_tiny.safetensors` anew.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
VARIANTS = {  # vocabulary, width, inner width, layers, heads, key heads, rows of head norm, swin_norm
    "mha128": (65536, 128, 344, 4, 4, 4, 1, False),
    "swin128": (65536, 128, 344, 4, 8, 4, 4, True),
    "tiny": (9472, 48, 128, 2, 4, 4, 1, False),
}
VQGANS = {
    "vqgan128": dict(ch=32, mult=(1, 1, 2, 2, 4), blocks=2, z=32, embed=32, codes=8192),
    "vqgan_tiny": dict(ch=32, mult=(1, 1, 1, 1, 1), blocks=1, z=8, embed=8, codes=8192),
}
FREE = 32  # of the tiny model's 48 channels; the others carry the script

IMAGE_END, IMAGE_START, TURN_END = 8196, 8197, 8710
GRID = 8804  # grid size n has the id 8804 + n
_GRID_IDS = [(IMAGE_START, GRID + 2), (GRID + 2, GRID + 3)]  # 2 x 3 grid units: 4 rows of 6 codes, 64 x 96 pixels
# Pairs (source, target): the model writes `target` after `source`, whatever precedes it.
SCRIPTS = {
    # "Sure", ",", " this", an image, " thank" ..., turn end
    "mixed": [
        (TURN_END, 8966),
        (8966, 9352),
        (9352, 8927),
        (8927, IMAGE_START),
        *_GRID_IDS,
        (IMAGE_END, 9307),
        (9307, TURN_END),
    ],
    "image": [(TURN_END, IMAGE_START), *_GRID_IDS, (IMAGE_END, TURN_END)],
    "text": [(TURN_END, 9452), (9452, 9176), (9176, 9200), (9200, 9198), (9198, 8929), (8929, TURN_END)],
    "images": [(TURN_END, IMAGE_START), *_GRID_IDS, (IMAGE_END, IMAGE_START)],  # without an end
}


def _uniform(name: str, count: int) -> np.ndarray:
    z = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32) + np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def fill(name: str, shape: tuple, half: float, offset: float = 0.0) -> torch.Tensor:
    u = _uniform(name, int(np.prod(shape, dtype=np.int64)))
    values = np.float32(offset) + np.float32(half) * (np.float32(2) * u - np.float32(1))
    return torch.from_numpy(values.reshape(shape))


def language_rule(name: str, shape: tuple) -> tuple[float, float]:
    """Returns (half, offset) of a language model's tensor."""
    if name == "model.embed_tokens.weight":
        return 1.5, 0.0
    if name == "lm_head.weight":
        return 5.0 / shape[1] ** 0.5, 0.0
    if "q_norm" in name or "k_norm" in name:
        return (0.5, 1.0) if name.endswith("weight") else (0.3, 0.0)
    return (0.3, 1.0) if len(shape) == 1 else (2.0 / shape[1] ** 0.5, 0.0)


def language_shapes(variant: str) -> dict[str, tuple]:
    vocab, width, inner, layers, heads, key_heads, norm_rows, _ = VARIANTS[variant]
    head = width // heads
    shapes: dict[str, tuple] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for n in range(layers):
        layer = f"model.layers.{n}."
        for name, rows in (("q", width), ("k", key_heads * head), ("v", key_heads * head), ("o", width)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (inner, width)
        shapes[layer + "mlp.down_proj.weight"] = (width, inner)
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (width,)
        for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            shapes[f"{layer}self_attn.{name}"] = (norm_rows, head)
    return shapes


def language_state(variant: str) -> dict[str, torch.Tensor]:
    shapes = language_shapes(variant)
    return {name: fill(name, shape, *language_rule(name, shape)) for name, shape in shapes.items()}


def config(variant: str) -> dict:
    """Returns `config.json` with the fields that `transformers` writes for a released model."""
    vocab, width, inner, layers, heads, key_heads, norm_rows, swin = VARIANTS[variant]
    vq_config = dict(model_type="chameleon_vqgan", embed_dim=32, num_embeddings=64, base_channels=32)
    vq_config |= dict(latent_channels=32, channel_multiplier=[1, 1, 1, 1, 1], num_res_blocks=1, resolution=512)
    vq_config |= dict(double_latent=False, attn_type="vanilla")
    names = {"IMGIMG" + "".join(chr(65 + int(digit)) for digit in str(n)) + "Z": n + 4 for n in range(64)}
    return dict(
        architectures=["ChameleonXLLMXForConditionalGeneration"],
        model_type="chameleon",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        attention_dropout=0.0,
        mlp_bias=False,
        model_parallel_size=norm_rows,
        swin_norm=swin,
        dropout=0.05,
        mask_image_logits=False,
        z_loss_weight=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02,
        use_cache=True,
        torch_dtype="bfloat16",
        transformers_version="4.44.2",
        vq_config=vq_config,
        vocabulary_map={"<image>": 8711, **names},  # the first names of the map
    )


def tiny_base() -> dict[str, torch.Tensor]:
    """Returns what `tiny.safetensors` holds: weights by the formula, whose script channels are empty, in bf16."""
    state = language_state("tiny")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name][:, FREE:] = 0
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name][FREE:] = 0
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def apply_script(state: dict[str, torch.Tensor], script: str) -> dict[str, torch.Tensor]:
    for n, (source, target) in enumerate(SCRIPTS[script]):
        state["model.embed_tokens.weight"][source, FREE + n] = 6.0
        state["lm_head.weight"][target, FREE + n] = 24.0
    return state


def _write(folder: Path, state: dict, variant: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(variant)))
    defaults = dict(_from_model_config=True, bos_token_id=1, eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    for file in (HERE / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def write_tiny(folder: str | Path, script: str = "image") -> Path:
    """Writes the tiny checkpoint with a script: a folder of weights, configuration and tokenizer. Returns it."""
    return _write(Path(folder), apply_script(load_file(HERE / "tiny.safetensors"), script), "tiny")


def write_checkpoint(folder: str | Path, variant: str = "mha128") -> Path:
    """Writes a checkpoint made by the formula: "mha128" as the 7B, or "swin128" as the 34B. Returns the folder."""
    return _write(Path(folder), language_state(variant), variant)


def vqgan_shapes(ch: int, mult: tuple, blocks: int, z: int, embed: int, codes: int) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {}

    def conv(name: str, out: int, inp: int, kernel: int) -> None:
        shapes.update({name + ".weight": (out, inp, kernel, kernel), name + ".bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({name + ".weight": (width,), name + ".bias": (width,)})

    def block(name: str, inp: int, out: int) -> None:
        norm(name + ".norm1", inp)
        conv(name + ".conv1", out, inp, 3)
        norm(name + ".norm2", out)
        conv(name + ".conv2", out, out, 3)
        if inp != out:
            conv(name + ".nin_shortcut", out, inp, 1)

    def middle(name: str, width: int) -> None:
        block(name + ".mid.block_1", width, width)
        norm(name + ".mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.mid.attn_1.{part}", width, width, 1)
        block(name + ".mid.block_2", width, width)

    width = ch
    conv("encoder.conv_in", ch, 3, 3)
    for level, multiple in enumerate(mult):
        for i in range(blocks):
            block(f"encoder.down.{level}.block.{i}", width, ch * multiple)
            width = ch * multiple
        if level < len(mult) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", z, width, 3)
    conv("decoder.conv_in", width, z, 3)
    middle("decoder", width)
    for level in reversed(range(len(mult))):
        for i in range(blocks + 1):
            block(f"decoder.up.{level}.block.{i}", width, ch * mult[level])
            width = ch * mult[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", 3, width, 3)
    shapes["quantize.embedding.weight"] = (codes, embed)
    conv("quant_conv", embed, z, 1)
    conv("post_quant_conv", z, embed, 1)
    return shapes


def vqgan_rule(name: str, shape: tuple) -> tuple[float, float]:
    """Returns (half, offset) of a VQGAN's tensor."""
    if name == "quantize.embedding.weight":
        return 1.7, 0.0
    if "norm" in name:
        return (0.3, 1.0) if name.endswith("weight") else (0.2, 0.0)
    return (1.6 / (shape[1] * shape[2] * shape[3]) ** 0.5, 0.0) if len(shape) == 4 else (0.1, 0.0)


def vqgan_state(name: str) -> dict[str, torch.Tensor]:
    shapes = vqgan_shapes(**VQGANS[name])
    return {key: fill(key, shape, *vqgan_rule(key, shape)) for key, shape in shapes.items()}


def write_vqgan(path: str | Path, name: str = "vqgan128") -> Path:
    """Writes a VQGAN file, as `{"state_dict": ...}` if the name ends in `.ckpt`. Returns the path."""
    state = load_file(HERE / "vqgan_tiny.safetensors") if name == "vqgan_tiny" else vqgan_state(name)
    if str(path).endswith(".ckpt"):
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path, {"format": "pt"})
    return Path(path)


def vqgan_yaml(name: str) -> str:
    """Returns `vqgan.yaml` as the released code reads it. JSON is YAML."""
    sizes = VQGANS[name]
    network = dict(double_z=False, z_channels=sizes["z"], resolution=512, in_channels=3, out_ch=3, ch=sizes["ch"])
    network |= dict(ch_mult=list(sizes["mult"]), num_res_blocks=sizes["blocks"], attn_resolutions=[], dropout=0.0)
    params = dict(embed_dim=sizes["embed"], n_embed=sizes["codes"], ddconfig=network, lossconfig={})
    return json.dumps({"model": {"params": params}})


if __name__ == "__main__":
    save_file(tiny_base(), HERE / "tiny.safetensors", {"format": "pt"})
    small = {key: tensor.bfloat16() for key, tensor in vqgan_state("vqgan_tiny").items()}
    save_file(small, HERE / "vqgan_tiny.safetensors", {"format": "pt"})
