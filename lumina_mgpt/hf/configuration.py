"""The model's configuration for transformers: the fields of `ModelConfig`."""

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from lumina_mgpt.config import MODEL_TYPES, ModelConfig

_RELEASED, _OWN = MODEL_TYPES
# Sizes of the released 7B, which transformers' code takes for a configuration without arguments.
_SIZES = {
    "vocab_size": 171385,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


class LuminaMGPTConfig(PretrainedConfig):
    """Configuration of a checkpoint of either generation. `config.json` of both layouts can be read.

    Args:
        values: fields of `ModelConfig`, and those that all configurations of transformers have. Sizes that are missing
            are those of the released 7B.

    Raises:
        InputError: a value has another type, is out of range, or does not fit the others.
    """

    model_type = _OWN
    rope_scaling = None  # a plain value here; the base class has a property for the key `rope_parameters`

    def __init__(self, **values: Any) -> None:
        known = {field.name for field in fields(ModelConfig)}
        own = {name: values.pop(name) for name in known & values.keys()}
        super().__init__(**values)
        own = _SIZES | {name: value for name, value in own.items() if value is not None}
        for name, value in asdict(ModelConfig(**own)).items():
            if name != "quantization_config" or value is not None:  # transformers takes null for a recipe
                setattr(self, name, value)

    @property
    def model_config(self) -> ModelConfig:
        """The same configuration for the rest of the project.

        Raises:
            InputError: a field was changed to a value that is not allowed.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name, field.default) for field in fields(ModelConfig)}
        return ModelConfig(**values)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: a saved model always has an `auto_map`, and no copy of this module."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the keys of `config.json`, and the arguments that are left.

        A released file has the model type of another model, and names neither the generation nor the image codes.
        """
        options = {name: kwargs.get(name) for name in ("cache_dir", "revision", "token", "local_files_only")}
        options = {name: value for name, value in options.items() if value is not None}
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") in MODEL_TYPES:
            path = cached_file(pretrained_model_name_or_path, "config.json", **options)
            # The generation is found from the tokenizer beside config.json.
            cached_file(
                pretrained_model_name_or_path,
                "tokenizer.json",
                _raise_exceptions_for_missing_entries=False,
                **options,
            )
            kept = {} if values["model_type"] == _RELEASED else values
            values = {**kept, **asdict(ModelConfig.from_json(Path(str(path)))), "model_type": _OWN}
        return values, rest
