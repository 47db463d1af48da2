"""transformers' Chameleon, an independent implementation of the same transformer, to compare with."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.names import disk_name
from lumina_mgpt.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import ChameleonForConditionalGeneration

# The smallest image tokenizer that transformers builds. It is required and never used.
IMAGE_TOKENIZER = {
    "embed_dim": 8,
    "num_embeddings": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "resolution": 16,
}
IMAGE_ID = 5  # transformers replaces embeddings at this id by an image; inputs must not contain it


def chameleon(config: ModelConfig, **options: Any) -> "ChameleonForConditionalGeneration":
    """A Chameleon of the same sizes with initial weights.

    Args:
        options: further values of ChameleonConfig, such as attn_implementation.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    sizes = {name: value for name, value in asdict(config).items() if not name.startswith("rope") and name != "dropout"}
    scaling = config.rope_scaling or {}
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    rope = {"rope_type": kind, "rope_theta": config.rope_theta}
    rope |= {name: value for name, value in scaling.items() if name == "factor"}
    raw = ChameleonConfig(
        **sizes, rope_parameters=rope, vocabulary_map={"<image>": IMAGE_ID}, vq_config=dict(IMAGE_TOKENIZER), **options
    )
    return ChameleonForConditionalGeneration(raw)


def copy_weights(model: Transformer, theirs: "ChameleonForConditionalGeneration") -> None:
    """Copies all weights of `model`; head norms are repeated, because transformers has one row for each head."""
    heads = {"q_norm": model.config.num_attention_heads, "k_norm": model.config.num_key_value_heads}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        count = next((count for norm, count in heads.items() if f"self_attn.{norm}." in name), None)
        state[disk_name(name)] = tensor if count is None else tensor.repeat_interleave(count // len(tensor), 0)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("vqmodel" in name for name in missing), (missing, unexpected)
