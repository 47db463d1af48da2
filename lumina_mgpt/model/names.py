"""Names of the files and tensors of a checkpoint folder in the released layout."""

from pathlib import Path

# Chameleon's image tokenizer without its decoder, in files of the language model. The transformer does not use it.
UNUSED_PREFIX = "model.vqmodel."
HEAD = "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, SINGLE_PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_INNER_VQGAN = "original_tokenizers/vqgan.ckpt"  # as in the hub's Alpha-VLLM/Chameleon_7B_mGPT
# Files of a checkpoint besides config.json and weights. generation_config.json is for other programs: this project
# does not read it, and samples with the settings of the request.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "names.txt",
    "prompts.txt",
    "examples.json",
    "movqgan*.safetensors",
    "*movqgan*.ckpt",
    "vqgan*.safetensors",
    "vqgan*.ckpt",
    _INNER_VQGAN,
)

_SHOWN = 5


def disk_name(name: str) -> str:
    """Returns the name on disk of a model parameter: `model.` and `name`, or `name` alone for the head."""
    return name if name == HEAD else f"model.{name}"


def companions_of(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint folder that accompany config and weights: COMPANIONS, sorted by path.

    A VQGAN in a subfolder is left out if the folder itself holds one, which readers prefer. A copy of the folder has
    all these files beside each other.
    """
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    if any(is_vqgan(file) and file.parent == folder for file in found):
        found.discard(folder / _INNER_VQGAN)
    return sorted(found)


def is_vqgan(file: Path) -> bool:
    """Returns whether a file of `companions_of` holds an image tokenizer, a VQGAN or a MoVQGAN."""
    return "vqgan" in file.name


def listed(names: list[str]) -> str:
    """Returns the first five names, joined by commas, and the number of the others, for messages."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its type if the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
