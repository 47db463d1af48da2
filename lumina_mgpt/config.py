"""Frozen configurations and the one place that validates them."""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from lumina_mgpt.checks import excerpt, real_number, require, whole_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FAMILIES, SECOND, Family, check_abilities, family_of, with_abilities
from lumina_mgpt.io import cause, read_json, read_text
from lumina_mgpt.model_config_checks import (
    check_foreign_keys,
    check_recipe,
    check_sizes,
    check_type,
    checked_rope,
    with_rope_parameters,
)
from lumina_mgpt.prompts import Task

INT4_GROUPS = (32, 64, 128)
DEFAULT_INT4_GROUP = 128
MODEL_TYPES = ("chameleon", "lumina_mgpt")  # of released files, and of files that `lumina_mgpt.hf` saves


def int4_recipe(group: int) -> dict[str, object]:
    """Returns the `quantization_config` of int4 weights where `group` weights share a scale."""
    return {"quant_method": "lumina_mgpt_int4", "bits": 4, "group_size": group}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder-only transformer; field names are those of the released `config.json`.

    Args lists only fields that released files lack; their defaults fit the released models.

    Args:
        image_code_offset, num_image_codes: image code c has the id `image_code_offset + c`.
        generation: 1 for Lumina-mGPT, 2 for Lumina-mGPT 2.0. `family` has the values that follow from it.
        base_size: side in pixels of the images that the weights were trained on.
        panels_apart: whether the image tokenizer encodes and decodes each panel of an image separately; see `parts`.
        guided_scale: guidance scale whose distribution the weights give without guidance, see
            `training.distillation`; 1.0 for weights that were not trained for that.
        abilities: what the weights were trained on besides the tasks of their family, see `families.check_abilities`.
            None for nothing.
        quantization_config: what `int4_recipe` returns if the weights are int4, else None. Other programs read this
            key of `config.json` and refuse a value that they do not know.

    Raises:
        InputError: a value is of another type or out of its range, or two sizes do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 10240
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type" or "rope_type": "linear" | "dynamic", "factor": float >= 1}
    attention_bias: bool = False
    mlp_bias: bool = False
    model_parallel_size: int = 1
    swin_norm: bool = False
    dropout: float = 0.0
    z_loss_weight: float = 0.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    generation: int = 2
    image_code_offset: int = SECOND.image_code_offset
    num_image_codes: int = SECOND.num_image_codes
    base_size: int = 768
    panels_apart: bool = False
    guided_scale: float = 1.0
    abilities: dict | None = None
    quantization_config: dict | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        check_sizes(self)
        object.__setattr__(self, "rope_scaling", checked_rope(self.rope_scaling))
        if self.abilities is not None:
            check_abilities(self.abilities, self.generation)
        if self.quantization_config is not None:
            groups = (DEFAULT_INT4_GROUP, *INT4_GROUPS)
            check_recipe(self.quantization_config, [int4_recipe(group) for group in groups])

    @property
    def family(self) -> Family:
        """The family of the checkpoint, with the tasks of its abilities."""
        return with_abilities(FAMILIES[self.generation], self.abilities)

    @property
    def guided(self) -> bool:
        """Whether the weights give a guided distribution by themselves, so that no second row is needed."""
        return self.guided_scale != 1.0

    def sampling_of(self, task: Task | None = None) -> dict[str, float]:
        """Returns the default values of `SamplingConfig`, where they differ from those of the class.

        Guided weights need no guidance, so their `cfg` is 1.

        Args:
            task: the task whose defaults count, too; None for an answer in a conversation.
        """
        values = dict(self.family.sampling) if task is None else self.family.sampling_of(task)
        return values | ({"cfg": 1.0} if self.guided else {})

    @property
    def context(self) -> int:
        """Largest number of ids of a sequence."""
        return max(self.max_position_embeddings, self.family.context)

    @property
    def int4_group(self) -> int | None:
        """Number of int4 weights that share a scale; None for weights without quantization."""
        return None if self.quantization_config is None else self.quantization_config["group_size"]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_weight_count(self) -> int:
        """Number of weights in the matrices of one layer."""
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def weight_count(self) -> int:
        """Number of weights in all matrices; norms and biases, under 0.1 %, are not counted."""
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * self.layer_weight_count

    def parts(self, panels: int) -> int:
        """Returns into how many stacked parts an image is cut, each encoded alone: `panels` if `panels_apart`, else 1.

        Norms and attention of a MoVQGAN span its whole input, so a panel's codes depend on the other panel. With the
        demo checkpoint, half of a panel's codes depend on it. The released models were trained on codes of whole
        images, but in inference a given panel is encoded alone. With `panels_apart`, each panel is always encoded
        alone, so its codes are the same in training and in inference.

        Args:
            panels: number of panels of the image.
        """
        return panels if self.panels_apart else 1

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`; a key whose value is null gets its default.

        Where the file does not name the generation, it is that of the tokenizer in the same folder.

        Keys that do not affect this model are ignored. Released files have `vq_config`, `vocabulary_map`,
        `mask_image_logits`, `attention_dropout` and the ids of bos and eos, for example.

        Raises:
            InputError: the file cannot be read, is of another type of model, or has settings that are not supported.
        """
        path = Path(path)
        if not os.path.lexists(path) and os.path.isdir(path.parent):
            rule = "a checkpoint folder holds config.json, safetensors and a tokenizer"
            raise InputError(f"{path} is missing; {rule}")
        raw = read_json(path)
        if raw.get("model_type") not in MODEL_TYPES:
            rule = f"model_type must be {' or '.join(MODEL_TYPES)}, got {excerpt(raw.get('model_type'))}"
            raise InputError(f"{path}: {rule}; give a checkpoint of this model")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in raw.items() if key in known and value is not None}
        values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        if "generation" not in values:
            own = "image_code_offset" in values  # a file of an earlier version of this project
            family = SECOND if own else family_of(path.parent)
            values["generation"] = family.generation
            values.setdefault("image_code_offset", family.image_code_offset)
            values.setdefault("num_image_codes", family.num_image_codes)
        try:
            check_foreign_keys(raw, values)
            values = with_rope_parameters(values, raw.get("rope_parameters"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return cls._build(values, path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "ModelConfig":
        """Reads a YAML file of this project; unknown keys are errors.

        Raises:
            InputError: the file cannot be read, or a key or value is wrong.
        """
        from omegaconf import OmegaConf  # most checkpoints have JSON, and the import takes a tenth of a second
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        path = Path(path)
        text = read_text(path)
        try:
            raw = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        except RecursionError:
            raise InputError(f"{path} is nested too deeply; see configs/model/ for examples") from None
        except (ValueError, OmegaConfBaseException, YAMLError) as error:
            raise InputError(f"{path} is not YAML ({cause(error)}); see configs/model/ for examples") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path} must hold a mapping of model sizes, got {type(raw).__name__}; see configs/model/")
        unknown = sorted(set(map(str, raw)) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(f"{path}: unknown keys {', '.join(unknown)}; remove them, or correct their spelling")
        return cls._build(raw, path)

    @classmethod
    def _build(cls, values: dict, path: Path) -> "ModelConfig":
        missing = [field.name for field in fields(cls) if field.default is MISSING and values.get(field.name) is None]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}; a model has these sizes")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self, path: str | Path) -> None:
        """Writes a `config.json` that both the released code and this project read."""
        extra = {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_type": "chameleon"}
        values = asdict(self)
        for name in ("quantization_config", "abilities"):  # other programs take null for a recipe
            if values[name] is None:
                del values[name]
        if not self.guided:  # the released files lack it
            del values["guided_scale"]
        Path(path).write_text(json.dumps(extra | values, indent=2) + "\n")


@dataclass(frozen=True)
class SamplingConfig:
    """How image codes and text are sampled. NumPy and torch scalars become plain Python numbers.

    Args:
        cfg: scale of classifier-free guidance, 0 to 1000; 1.0 means no guidance and no unconditional row.
        top_k: sample from this number of most probable codes, at least 1. More than there are means all codes.
        temperature: divisor of the logits, above 0.
        text_top_k, text_temperature: the same for text. Text is sampled without guidance.
        seed: seed of the noise, 0 to 2**63 - 1.

    Raises:
        InputError: a value has another type or is out of range.
    """

    cfg: float = 4.0
    top_k: int = 4096
    temperature: float = 1.0
    seed: int = 0
    text_top_k: int = 10
    text_temperature: float = 1.0

    def __post_init__(self) -> None:
        values: dict[str, float] = {"cfg": real_number(self.cfg)}
        require(0 <= values["cfg"] <= 1000, "cfg", self.cfg, "must be a number in 0 ... 1000; try 4.0")
        for name, other, what in (
            ("temperature", "top_k", "code"),
            ("text_temperature", "text_top_k", "piece of text"),
        ):
            values[name] = temperature = real_number(getattr(self, name))
            rule = f"must be a finite number > 0; try 1.0, or {other}=1 for always the most probable {what}"
            require(math.isfinite(temperature) and temperature > 0, name, getattr(self, name), rule)
        for name, usual in (("top_k", 4096), ("text_top_k", 10)):
            rule = f"must be a whole number of at least 1; try {usual}"
            values[name] = whole_number(name, getattr(self, name), 1, None, rule)
        values["seed"] = whole_number("seed", self.seed, 0, 2**63 - 1, "must be a whole number in 0 ... 2**63 - 1")
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def with_seeds(self, count: int) -> list["SamplingConfig"]:
        """Returns `count` copies with consecutive seeds, starting with `seed`.

        Raises:
            InputError: the last seed is out of range.
        """
        rule = f"must be at most 2**63 - {count}, because {count} consecutive seeds are used"
        require(self.seed + count <= 2**63, "seed", self.seed, rule)
        return [replace(self, seed=self.seed + number) for number in range(count)]


COUPLINGS = ("noise", "maximal", "independent")
PROPOSALS = ("uniform", "above")


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative Jacobi sampling.

    Args:
        coupling: how drafts are verified against the target distribution, one of COUPLINGS.
        window: number of drafts that one forward verifies, 1 to 4096. A pipeline replaces None by
            `devices.default_window`; samplers need a number.
        proposal: distribution from which a new draft is drawn, one of PROPOSALS.

    Raises:
        InputError: a value is out of range.
    """

    coupling: str = "noise"
    window: int | None = None
    proposal: str = "above"

    def __post_init__(self) -> None:
        require(self.coupling in COUPLINGS, "coupling", self.coupling, f"must be one of {', '.join(COUPLINGS)}")
        require(self.proposal in PROPOSALS, "proposal", self.proposal, f"must be one of {', '.join(PROPOSALS)}")
        if self.window is not None:
            rule = "must be a whole number in 1 ... 4096; try 32"
            object.__setattr__(self, "window", whole_number("window", self.window, 1, 4096, rule))
