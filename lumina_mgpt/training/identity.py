"""What must be the same when a run resumes: data, sizes of the model, frozen weights, and some options.

With an equal identity, a position in the run means the same data and weights.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.options import TrainingConfig

_OPTIONS = (
    "seed",
    "batch_size",
    "max_tokens",
    "pad_multiple",
    "pack",
    "optimizer",
    "lora_rank",
    "lora_alpha",
    "freeze_embeddings",
    "guidance_scale",
)


def of(settings: TrainingConfig, config: ModelConfig, data: str, frozen: str | None) -> dict:
    """Returns the identity of a run, which its checkpoints store.

    Args:
        config: configuration of the model in training.
        data: what `TokenDataset.fingerprint` returns.
        frozen: fingerprint of the weights that are not trained, None if there are none.
    """
    options, model = settings.flat(), asdict(config) | {"dropout": 0, "z_loss_weight": 0, "guided_scale": 1.0}
    return {name: options[name] for name in _OPTIONS} | {
        "data_config": data,
        "ema": settings.regularization.ema > 0,
        "model_config": model,
        "frozen": frozen,
    }


def require_same(checkpoint: Path, stored: dict, own: dict) -> None:
    """Raises an error if a checkpoint is of a run with another identity. Frozen weights are not compared.

    An option or a value of the model that an earlier version did not store counts as its default. Checkpoints without
    `generation` are therefore of the second generation.

    Args:
        checkpoint: folder of the checkpoint, for the message.
        stored: identity in the checkpoint.
        own: identity of the run that is to resume.

    Raises:
        InputError: as above. The message lists what differs.
    """
    stored = {name: item.default for name, item in TrainingConfig.options().items()} | stored
    if isinstance(stored.get("model_config"), dict):
        sizes = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
        stored["model_config"] = sizes | stored["model_config"]
    differs = [name for name in own if name != "frozen" and stored.get(name) != own[name]]
    if differs:
        named = [f"{name}={stored[name]}" if name in _OPTIONS else name for name in differs]
        raise InputError(
            f"{checkpoint} is of a run with another value: {', '.join(named)}; use the same, or a new output folder",
            "resume",
        )
