"""Frozen configurations and the one place that validates them."""

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lumina_mgpt.checks import excerpt, is_number, real_number, require, whole_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, read_text

INT4_GROUPS = (32, 64, 128)
DEFAULT_INT4_GROUP = 128


def int4_recipe(group: int) -> dict[str, object]:
    """What `config.json` says of int4 weights in groups of `group`."""
    return {"quant_method": "lumina_mgpt_int4", "bits": 4, "group_size": group}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder-only transformer; field names are those of the released `config.json`.

    The last five fields are this project's own, absent from released files (where the defaults are right): image code
    `c` has the id `image_code_offset + c`, `base_size` is the side in pixels the weights were made for, `panels_apart`
    says that the image tokenizer reads and writes each panel of a picture on its own (`parts`), and
    `quantization_config` is the recipe of int4 weights (`int4_recipe`; other programs know the key, and refuse it).

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
    image_code_offset: int = 155000
    num_image_codes: int = 16384
    base_size: int = 768
    panels_apart: bool = False
    quantization_config: dict | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_type(field.name, getattr(self, field.name), field.type)
        for name, most in _MOST.items():
            value = getattr(self, name)
            require(0 < value <= most, name, value, f"must be a positive integer of at most {most}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(self.hidden_size % (2 * heads) == 0, "hidden_size", self.hidden_size,
                 f"must give each of the {heads} heads an even width")  # fmt: skip
        require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
        require(self.hidden_act == "silu", "hidden_act", self.hidden_act, "must be silu")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be > 0")
        require(self.z_loss_weight >= 0, "z_loss_weight", self.z_loss_weight, "must be at least 0")
        require(0 < self.rms_norm_eps < 1, "rms_norm_eps", self.rms_norm_eps, "must be in (0, 1)")
        require(0 <= self.image_code_offset <= self.vocab_size - self.num_image_codes, "image_code_offset",
                 self.image_code_offset,
                 f"must leave {self.num_image_codes} codes below vocab_size = {self.vocab_size}")  # fmt: skip
        require(self.base_size % 32 == 0, "base_size", self.base_size, "must be n x 32")
        object.__setattr__(self, "rope_scaling", _checked_rope(self.rope_scaling))
        if self.quantization_config is not None:
            _check_recipe(self.quantization_config)

    @property
    def int4_group(self) -> int | None:
        """Weights that share a scale; None where nothing is quantized."""
        return self.quantization_config and self.quantization_config["group_size"]

    @property
    def head_dim(self) -> int:
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
        """How many parts, one above another, the image tokenizer makes of a picture of so many panels.

        A MoVQGAN's norms and attention go over the whole picture, so the codes of a panel depend on the other one: in
        half of them, for the demo. The released models were trained so, though a given panel comes alone when they are
        used. With `panels_apart` its codes are those that training saw, and those of the same picture without a panel.
        """
        return panels if self.panels_apart else 1

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Reads a `config.json`; null stands for the default.

        Keys that change no computation of this model are ignored; released files carry many (`vq_config`,
        `vocabulary_map`, `mask_image_logits`, `attention_dropout`, ids of bos and eos). Those that would are refused.

        Raises:
            InputError: the file cannot be read, is of another kind of model, or holds what this one does not compute.
        """
        path = Path(path)
        if not os.path.lexists(path) and os.path.isdir(path.parent):
            rule = "a checkpoint folder holds config.json, safetensors and a tokenizer"
            raise InputError(f"{path} is missing; {rule}")
        raw = read_json(path)
        if raw.get("model_type") != "chameleon":
            kind = excerpt(raw.get("model_type"))
            raise InputError(f"{path}: model_type must be chameleon, got {kind}; this is another kind of checkpoint")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in raw.items() if key in known and value is not None}
        values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        try:
            _check_others(raw, values)
            values = _with_rope_of_transformers_5(values, raw.get("rope_parameters"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return cls._build(values, path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "ModelConfig":
        """Reads one of our own YAML files, where an unknown key is an error."""
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
        """Writes a `config.json` that the released code and this one both read."""
        extra = {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_type": "chameleon"}
        values = asdict(self)
        if self.quantization_config is None:  # other programs take a null for a recipe
            del values["quantization_config"]
        Path(path).write_text(json.dumps(extra | values, indent=2) + "\n")


@dataclass(frozen=True)
class SamplingConfig:
    """How image codes are sampled. NumPy and torch scalars become plain Python numbers.

    Args:
        cfg: scale of classifier-free guidance, 0 to 1000; 1.0 means no guidance and no unconditional row.
        top_k: number of most probable codes to sample from, at least 1; above the number of codes it means all.
        temperature: divisor of the logits, above 0.
        seed: seed of the noise, 0 to 2**63 - 1.

    Raises:
        InputError: a value has another type or is out of range.
    """

    cfg: float = 4.0
    top_k: int = 4096
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        cfg, temperature = real_number(self.cfg), real_number(self.temperature)
        require(0 <= cfg <= 1000, "cfg", self.cfg, "must be a number in 0 ... 1000; try 4.0")
        rule = "must be a finite number > 0; try 1.0, or top_k=1 for the most probable codes"
        require(math.isfinite(temperature) and temperature > 0, "temperature", self.temperature, rule)
        top_k = whole_number("top_k", self.top_k, 1, None, "must be a whole number of at least 1; try 4096")
        seed = whole_number("seed", self.seed, 0, 2**63 - 1, "must be a whole number in 0 ... 2**63 - 1")
        for name, value in (("cfg", cfg), ("top_k", top_k), ("temperature", temperature), ("seed", seed)):
            object.__setattr__(self, name, value)  # the class is frozen

    def with_seeds(self, count: int) -> list["SamplingConfig"]:
        """Returns `count` copies with consecutive seeds, starting with this one's.

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
        window: drafts that one forward verifies, 1 to 4096. A pipeline replaces None by `devices.default_window`;
            samplers need a number.
        proposal: proposal distribution of a new draft, one of PROPOSALS.

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


# -- checks of a model's configuration ---------------------------------------------------------------------------------

# The largest sizes that are taken; each is many times that of the 34B.
_MOST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 1024,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "max_position_embeddings": 2**31 - 1,
    "model_parallel_size": 2**16, "num_image_codes": 2**24, "base_size": 2**16,
}  # fmt: skip

# Keys of `config.json` that change what a transformer computes, in ways that this one does not; and the values that
# change nothing, besides null.
_OTHERS: dict[str, tuple] = {
    "partial_rotary_factor": (1,),
    "sliding_window": (),
    "layer_types": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "pruned_heads": ({},),
    "add_cross_attention": (False,),
    "compression_config": (),
}


def _check_others(raw: dict, values: dict) -> None:
    """Refuses keys that would change the result and mean nothing to this model."""
    for name, neutral in _OTHERS.items():
        value = raw.get(name)
        require(value is None or value in neutral, name, value, "must be null, since this model does not support it")
    width, hidden, heads = raw.get("head_dim"), values.get("hidden_size"), values.get("num_attention_heads")
    if width is not None and is_number(width) and is_number(hidden) and is_number(heads):
        require(width * heads == hidden, "head_dim", width, "must be hidden_size / num_attention_heads")


def _with_rope_of_transformers_5(values: dict, parameters: object) -> dict:
    """Adds `rope_theta` and `rope_scaling` from the one entry that transformers 5 writes in their place."""
    if parameters is None:
        return values
    require(isinstance(parameters, dict), "rope_parameters", parameters, "must be an object")
    told = {key: value for key, value in parameters.items() if value is not None}
    theta = told.pop("rope_theta", None)
    require(theta is None or values.get("rope_theta", theta) == theta, "rope_parameters", parameters,
             f"must have the rope_theta of the file, {excerpt(values.get('rope_theta'))}")  # fmt: skip
    scaling = _checked_rope(told, "rope_scaling (of rope_parameters)")
    own = _checked_rope(values.get("rope_scaling"))
    require(own is None or own == scaling, "rope_parameters", parameters, f"must equal rope_scaling, {own}")
    return values | ({} if theta is None else {"rope_theta": theta}) | {"rope_scaling": scaling}


def _checked_rope(scaling: object, name: str = "rope_scaling") -> dict | None:
    """The scaling of position angles; None where there is none, in whatever spelling.

    Raises:
        InputError: it is of a kind, or has a setting, that is not supported.
    """
    if scaling is None:
        return None
    require(isinstance(scaling, dict), name, scaling, "must be null or an object")
    told = {key: value for key, value in scaling.items() if value is not None}
    kinds = [told.pop(key) for key in ("type", "rope_type") if key in told]
    if not kinds and not told:
        return None
    same = all(kind == kinds[0] for kind in kinds)
    known = bool(kinds) and same and kinds[0] in ("default", "linear", "dynamic")
    require(known, name, scaling, "must be null, default, linear or dynamic")
    factor = told.pop("factor", 1 if kinds[0] == "default" else None)
    require(not told, name, scaling, f"must not have {', '.join(map(str, told))}, which is not supported")
    require(is_number(factor) and factor >= 1, name, scaling, "must have a factor of at least 1")
    return None if kinds[0] == "default" else scaling


def _check_recipe(recipe: dict) -> None:
    """Refuses int4 weights of another program, and settings that this one does not know."""
    own, method = int4_recipe(DEFAULT_INT4_GROUP), recipe.get("quant_method")
    if method != own["quant_method"]:
        name = f"quant_method {excerpt(method)}" if method else "no quant_method"
        raise InputError(f"quantization_config must be absent or of quant_method {own['quant_method']}, got {name}; "
                         "give the checkpoint that these weights were made of, with --quant")  # fmt: skip
    extra = sorted(map(str, recipe.keys() - own.keys()))
    require(not extra, "quantization_config", recipe, f"must not have {', '.join(extra)}, which is not known")
    require(recipe in [int4_recipe(group) for group in INT4_GROUPS], "quantization_config", recipe,
             f"must be {own} (or with group_size 32 or 64)")  # fmt: skip


_RULES = {int: "must be a positive integer", float: "must be a finite number", bool: "must be true or false",
          str: "must be text"}  # fmt: skip


def _require_type(name: str, value: object, kind: object) -> None:
    if kind is float:
        right = is_number(value)
    elif kind is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    else:
        right = isinstance(value, kind)
    require(right, name, value, _RULES.get(kind, "must be null or an object"))
