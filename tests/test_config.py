"""Configurations: reading, validation and messages."""

import json
import re

import pytest
import torch

from lumina_mgpt.config import ModelConfig, SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.resources import configs

SIZES = dict(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    image_code_offset=100,
    num_image_codes=64,
)


def _write(path, **values):
    path.write_text(json.dumps({"model_type": "chameleon"} | SIZES | values))
    return path


def test_a_written_config_is_read_back_equal(tmp_path):
    config = ModelConfig(**SIZES, rope_scaling={"type": "linear", "factor": 2.0}, base_size=96)
    config.to_json(tmp_path / "config.json")
    assert ModelConfig.from_json(tmp_path / "config.json") == config


def test_a_released_config_with_unused_keys_is_read(oracle_checkpoint):
    config = ModelConfig.from_json(oracle_checkpoint("mp2gqa256") / "config.json")
    assert (config.num_key_value_heads, config.model_parallel_size, config.base_size) == (4, 2, 768)
    assert (config.image_code_offset, config.num_image_codes) == (155000, 16384)


def test_rope_parameters_of_transformers_5_are_applied(tmp_path):
    """They were ignored: the file loaded with the default angle base, and images were noise."""
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    config = ModelConfig.from_json(_write(tmp_path / "config.json", rope_parameters=parameters))
    assert config.rope_theta == 5e5 and config.rope_scaling["factor"] == 4.0
    plain = _write(tmp_path / "plain.json", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert ModelConfig.from_json(plain).rope_scaling is None
    with pytest.raises(InputError, match="rope_scaling"):
        ModelConfig.from_json(_write(tmp_path / "yarn.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}))


@pytest.mark.parametrize(
    "values, named",
    [
        ({"hidden_size": 30}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"image_code_offset": 150}, "image_code_offset"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"base_size": 100}, "base_size"),
        ({"model_type": "llama"}, "model_type"),
        ({"rope_scaling": 3}, "config.json"),
        ({"dropout": "x"}, "config.json"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, values, named):
    with pytest.raises(InputError, match=named):
        ModelConfig.from_json(_write(tmp_path / "config.json", **values))


@pytest.mark.parametrize("content", ["hidden_size: [", "- 1", "a: b: c", "hidden_sise: 4", "\x00", "hidden_size: 4"])
def test_an_error_in_yaml_is_one_line_with_its_path(tmp_path, content):
    (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "model.yaml"))) as caught:
        ModelConfig.from_yaml(tmp_path / "model.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size, billions", [("demo", 0.013), ("2B", 1.92), ("7B", 7.88)])
def test_shipped_model_sizes_have_their_weight_counts(size, billions):
    """The count is a formula; the model itself, built without memory, has the same number within 0.1 %."""
    config = ModelConfig.from_yaml(configs() / "model" / f"{size}.yaml")
    with torch.device("meta"):
        exact = sum(parameter.numel() for parameter in Transformer(config).parameters())
    assert config.weight_count == pytest.approx(exact, rel=1e-3)
    assert exact / 1e9 == pytest.approx(billions, rel=0.01 if billions > 1 else 0.2)  # the demo's vocabulary may change


@pytest.mark.parametrize(
    "values, option",
    [
        ({"cfg": -1.0}, "cfg"),
        ({"cfg": float("nan")}, "cfg"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sampling_options_out_of_range_are_named(values, option):
    with pytest.raises(InputError, match=option):
        SamplingConfig(**values)
