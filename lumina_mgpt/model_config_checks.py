"""Checks of the values of a model's configuration, and of keys of `config.json` that other programs write."""

from collections.abc import Sequence
from typing import Any

from lumina_mgpt.checks import excerpt, is_number, require
from lumina_mgpt.errors import InputError

# The largest accepted sizes; each is many times that of the released 34B.
_MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "max_position_embeddings": 2**31 - 1,
    "model_parallel_size": 2**16,
    "num_image_codes": 2**24,
    "base_size": 2**16,
}

# Keys of other models that change the computation in ways this model does not support, with their neutral values
# besides null.
_FOREIGN: dict[str, tuple] = {
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

_TYPE_RULES: dict[Any, str] = {
    int: "must be a positive integer",
    float: "must be a finite number",
    bool: "must be true or false",
    str: "must be text",
}


def check_type(name: str, value: object, kind: Any) -> None:
    """Refuses a value of another type than `kind`. An int passes as a float; a bool passes as neither.

    Raises:
        InputError: the type differs, or a number is infinite or NaN.
    """
    if kind is float:
        fits = is_number(value)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    require(fits, name, value, _TYPE_RULES.get(kind, "must be null or an object"))


def check_sizes(config: Any) -> None:
    """Refuses sizes out of range, and sizes that do not fit each other.

    Args:
        config: a ModelConfig whose fields have the right types.

    Raises:
        InputError: a size is wrong. The message names the first such field.
    """
    for name, most in _MOST.items():
        value = getattr(config, name)
        require(0 < value <= most, name, value, f"must be a positive integer of at most {most}")
    heads, codes = config.num_attention_heads, config.num_image_codes
    rules = {
        "hidden_size": (config.hidden_size % (2 * heads) == 0, f"must give each of the {heads} heads an even width"),
        "num_key_value_heads": (
            heads % config.num_key_value_heads == 0,
            f"must divide num_attention_heads = {heads}",
        ),
        "hidden_act": (config.hidden_act == "silu", "must be silu"),
        "generation": (config.generation in (1, 2), "must be 1 (Lumina-mGPT) or 2 (Lumina-mGPT 2.0)"),
        "dropout": (0 <= config.dropout < 1, "must be in [0, 1)"),
        "rope_theta": (config.rope_theta > 0, "must be > 0"),
        "z_loss_weight": (config.z_loss_weight >= 0, "must be at least 0"),
        "rms_norm_eps": (0 < config.rms_norm_eps < 1, "must be in (0, 1)"),
        "image_code_offset": (
            0 <= config.image_code_offset <= config.vocab_size - codes,
            f"must leave {codes} codes below vocab_size = {config.vocab_size}",
        ),
        "guided_scale": (1 <= config.guided_scale <= 1000, "must be in 1 ... 1000; 1 for weights without guidance"),
        "base_size": (config.base_size % 32 == 0, "must be a multiple of 32"),
    }
    for name, (fits, rule) in rules.items():
        require(fits, name, getattr(config, name), rule)


def check_foreign_keys(raw: dict, values: dict) -> None:
    """Refuses keys of `config.json` that would change the result and that this model does not support.

    Args:
        raw: all keys of the file.
        values: the keys that are fields of ModelConfig.

    Raises:
        InputError: a key is not supported. The message names the first one.
    """
    for name, neutral in _FOREIGN.items():
        value = raw.get(name)
        require(value is None or value in neutral, name, value, "must be null, since this model does not support it")
    width, hidden, heads = raw.get("head_dim"), values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int | float) and isinstance(hidden, int | float) and isinstance(heads, int | float):
        if all(map(is_number, (width, hidden, heads))):
            require(width * heads == hidden, "head_dim", width, "must be hidden_size / num_attention_heads")


def with_rope_parameters(values: dict, parameters: object) -> dict:
    """Returns `values` with `rope_theta` and `rope_scaling` from `rope_parameters`.

    transformers 5 writes the key `rope_parameters` in place of the two fields.

    Args:
        values: fields of ModelConfig in the file.
        parameters: value of `rope_parameters`, None if the file lacks it.

    Raises:
        InputError: the parameters contradict the other fields, or are not supported.
    """
    if parameters is None:
        return values
    require(isinstance(parameters, dict), "rope_parameters", parameters, "must be an object")
    assert isinstance(parameters, dict)
    given = {key: value for key, value in parameters.items() if value is not None}
    theta = given.pop("rope_theta", None)
    rule = f"must have the rope_theta of the file, {excerpt(values.get('rope_theta'))}"
    require(theta is None or values.get("rope_theta", theta) == theta, "rope_parameters", parameters, rule)
    scaling = checked_rope(given, "rope_scaling (of rope_parameters)")
    field = checked_rope(values.get("rope_scaling"))
    require(field is None or field == scaling, "rope_parameters", parameters, f"must equal rope_scaling, {field}")
    return values | ({} if theta is None else {"rope_theta": theta}) | {"rope_scaling": scaling}


def checked_rope(scaling: object, name: str = "rope_scaling") -> dict | None:
    """Returns the scaling of rotary angles, or None if `scaling` is one of the ways to write "no scaling".

    Args:
        scaling: value of `rope_scaling`.
        name: name of the key, for errors.

    Raises:
        InputError: the type, or a setting, is not supported.
    """
    if scaling is None:
        return None
    require(isinstance(scaling, dict), name, scaling, "must be null or an object")
    assert isinstance(scaling, dict)
    given = {key: value for key, value in scaling.items() if value is not None}
    types = [given.pop(key) for key in ("type", "rope_type") if key in given]
    if not types and not given:
        return None
    equal = all(kind == types[0] for kind in types)
    known = bool(types) and equal and types[0] in ("default", "linear", "dynamic")
    require(known, name, scaling, "must be null, default, linear or dynamic")
    factor = given.pop("factor", 1 if types[0] == "default" else None)
    require(not given, name, scaling, f"must not have {', '.join(map(str, given))}, which is not supported")
    require(is_number(factor) and factor >= 1, name, scaling, "must have a factor of at least 1")
    return None if types[0] == "default" else scaling


def check_recipe(recipe: dict, known: Sequence[dict]) -> None:
    """Refuses quantized weights that other programs made, and unknown settings of quantization.

    Args:
        recipe: the `quantization_config` of the file.
        known: the supported recipes, the default one first.

    Raises:
        InputError: the recipe is not one of `known`.
    """
    default, method = known[0], recipe.get("quant_method")
    if method != default["quant_method"]:
        got = f"quant_method {excerpt(method)}" if method else "no quant_method"
        rule = f"must be absent or of quant_method {default['quant_method']}, got {got}"
        remedy = "give the checkpoint that these weights were made from, with quant=128"
        raise InputError(f"{rule}; {remedy}", "quantization_config")
    extra = sorted(map(str, recipe.keys() - default.keys()))
    require(not extra, "quantization_config", recipe, f"must not have {', '.join(extra)}, which is not known")
    require(recipe in known, "quantization_config", recipe, f"must be {default} (or with group_size 32 or 64)")
