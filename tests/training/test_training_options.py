"""The options of a training: their list, the command line made from them, and their flat form."""

import dataclasses

import pytest

from lumina_mgpt.cli.finetune import TITLES, build_parser
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.options import TrainingConfig, groups, option_fields

# Every option with its default. A new option, or another default, is a decision: change this list in the same commit.
OPTIONS = {
    "data": {
        "data_config": None,
        "batch_size": 0,
        "max_tokens": 0,
        "accum_iter": 1,
        "pad_multiple": 32,
        "pack": False,
        "max_seq_len": 4096,
        "overlong": "error",
    },
    "model": {
        "init_from": None,
        "model_config": None,
        "tokenizer_path": None,
        "lora_rank": 0,
        "lora_alpha": 0.0,
        "freeze_embeddings": False,
        "zero_image_head": False,
    },
    "optimizer": {
        "optimizer": "adamw",
        "lr": 2e-5,
        "min_lr": 0.0,
        "muon_lr": 0.02,
        "wd": 0.1,
        "clip_grad": 4.0,
        "on_nonfinite": "stop",
        "spike": 0.0,
    },
    "schedule": {"epochs": 0.0, "max_steps": 0, "max_minutes": 0.0, "warmup": 0.01},
    "regularization": {
        "dropout": 0.05,
        "z_loss_weight": 1e-5,
        "tail_weight": 0.0,
        "code_noise": 0.0,
        "spare_panel": 0.0,
        "ema": 0.0,
    },
    "checkpoints": {
        "save_iteration_interval": 1000,
        "save_minutes": 0.0,
        "keep_checkpoints": 2,
        "save_beside": False,
        "resume": "",
    },
    "logging": {
        "tensorboard": False,
        "peak_tflops": 0.0,
        "sample_every": 0,
        "sample_prompts": None,
        "movqgan_path": None,
    },
    "runtime": {
        "precision": "bf16",
        "compile": False,
        "cpu_offload": False,
        "checkpointing": False,
        "seed": 0,
        "device": "auto",
        "threads": 0,
    },
}
# Options of the command alone: those of the export, and released ones.
COMMAND = {
    "output_dir": None,
    "export_only": False,
    "export_dir": None,
    "export_dtype": "bf16",
    "model_size": None,
    "warmup_epochs": None,
    "cache_ann_on_disk": False,
    "unmask_image_logits": False,
    "num_workers": None,
}
DISTILLATION = {"guidance_scale": 0.0, "own_samples": 0.0}


def test_options_and_defaults_are_as_listed():
    found = {
        name: {i.name: None if i.default is dataclasses.MISSING else i.default for i in option_fields(group)}
        for name, group in groups().items()
    }
    assert found.pop("distillation") == DISTILLATION  # of another command
    assert found == OPTIONS and TITLES.keys() == {*OPTIONS, "distillation"}


def test_the_command_line_has_every_option():
    args = vars(build_parser().parse_args(["--output_dir", "x"]))
    assert args.pop("output_dir") == "x"
    listed = {name: default for group in (*OPTIONS.values(), COMMAND) for name, default in group.items()}
    del listed["output_dir"]
    assert args == listed


def test_every_option_has_a_help_text_and_a_group():
    text = build_parser().format_help()
    assert all((f"{title}:\n" in text) == (name != "distillation") for name, title in TITLES.items())
    assert all(item.metadata["help"].strip() for item in TrainingConfig.options().values())


def test_the_flat_form_makes_an_equal_configuration():
    values = {"data_config": "x", "output_dir": "y", "init_from": "z", "max_steps": 3, "lr": 1, "pack": True}
    config = TrainingConfig.of(**values)
    assert config.flat().items() >= values.items() and len(config.flat()) == 1 + sum(
        map(len, [*OPTIONS.values(), DISTILLATION])
    )
    assert TrainingConfig.of(**config.flat()) == config and config.optimizer.lr == 1.0


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="batch"):
        TrainingConfig.of(data_config="x", output_dir="y", init_from="z", max_steps=3, batch=1)


@pytest.mark.parametrize(
    "values, parameter",
    [
        ({"lr": "fast"}, "lr"),
        ({"lr": True}, "lr"),
        ({"pack": 1}, "pack"),
        ({"max_steps": 2.5}, "max_steps"),
        ({"batch_size": 2**31}, "batch_size"),
        ({"warmup": 1.0}, "warmup"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"precision": "fp8"}, "precision"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"device": 0}, "device"),
    ],
)
def test_the_error_names_the_parameter(values, parameter):
    with pytest.raises(InputError) as caught:
        TrainingConfig.of(**{"data_config": "x", "output_dir": "y", "init_from": "z", "max_steps": 3} | values)
    assert caught.value.parameter == parameter
