"""Defines the training configuration: groups of options, as dataclasses, for the command `finetune`.

The metadata of each field hold the help text, choices and rule of one option. The command line is generated from the
fields, so that names, defaults and limits are written once. Command lines and `trainer.json` hold the options as one
flat mapping. `TrainingConfig.of` reads such a mapping, and `TrainingConfig.flat` returns one.
"""

import dataclasses
import numbers
import os
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from lumina_mgpt.errors import InputError

_COUNT_LIMIT = 2**31 - 1  # largest size that every library below accepts
_LIMITS = {"seed": 2**63 - 1, "threads": 1024, "lora_rank": 2**20}  # torch's seeds have 64 bits; sizes of real machines
_TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "must be true or false"),
    str: (str, "must be text"),
    int: (numbers.Integral, "must be a whole number"),
    float: (numbers.Real, "must be a number"),
}


@dataclass(frozen=True)
class Rule:
    """Holds a condition on a number, and the text of the condition in error messages."""

    text: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Rule("must be at least 0", lambda value: value >= 0)
POSITIVE = Rule("must be above 0", lambda value: value > 0)
AT_LEAST_ONE = Rule("must be at least 1", lambda value: value >= 1)
FRACTION = Rule("must be in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Rule("must be in [0, 1]", lambda value: 0 <= value <= 1)
GUIDANCE = Rule("must be above 1 and at most 1000", lambda value: value == 0 or 1 < value <= 1000)
FACTOR = Rule("must be above 1, or 0 for none", lambda value: value == 0 or value > 1)


def option(default: Any, help: str, rule: Rule | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Returns a dataclass field with the metadata of one option.

    Args:
        default: default of the option; MISSING if the option must be given.
        help: help text.
        rule: condition on a number.
        choices: allowed texts; empty if all are allowed.
    """
    return field(default=default, metadata={"help": help, "rule": rule, "choices": choices})


def value_type(item: Field) -> type:
    """Returns the type of an option's value: bool, int, float or str.

    If the option also allows None, this is the type of its other values.
    """
    return next(kind for kind in _kinds(item) if kind is not type(None))


def _kinds(item: Field) -> tuple[type, ...]:
    return typing.get_args(item.type) or (typing.cast(type, item.type),)


class Options:
    """Base class of all groups of options. A new instance checks the type and the rule of each field."""

    def __post_init__(self) -> None:
        for item in option_fields(type(self)):
            _check(self, item)
        self._check_together()

    def _check_together(self) -> None:
        """Checks rules that concern several fields of a group."""


def option_fields(group: Any) -> list[Field]:
    """Returns those fields of a group, a subclass of Options, that are options."""
    return [item for item in fields(group) if "help" in item.metadata]


def _check(group: Any, item: Field) -> None:
    """Converts a value to the type of its field, so that it can be written as JSON, and checks its range."""
    name, value, kinds, kind = item.name, getattr(group, item.name), _kinds(item), value_type(item)
    if value is None and type(None) in kinds:
        return
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    wanted, text = _TYPES[kind]
    _require(name, value, isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)), text)
    if kind is int:
        limit = _LIMITS.get(name, _COUNT_LIMIT)
        _require(name, value, 0 <= value <= limit, f"must be in [0, {limit}]")
    elif kind is float:
        _require(name, value, -sys.float_info.max <= value <= sys.float_info.max, "must be finite")
    if rule := item.metadata["rule"]:
        _require(name, value, rule.holds(value), rule.text)
    if choices := item.metadata["choices"]:
        _require(name, value, value in choices, f"must be one of {', '.join(choices)}")
    object.__setattr__(group, name, kind(value))


def _require(name: str, value: object, holds: bool, text: str) -> None:
    if not holds:
        raise InputError(f"{text}, got {value}", name)


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions(Options):
    """Chooses the sequences that are read, and how they form batches."""

    data_config: str = option(MISSING, "YAML with META: [{path, type, ratio}]")
    batch_size: int = option(0, "sequences of a micro-batch on one process")
    max_tokens: int = option(0, "instead of --batch_size: ids of a micro-batch, padding included")
    accum_iter: int = option(1, "micro-batches a step, on each process", AT_LEAST_ONE)
    pad_multiple: int = option(32, "sequences are padded to multiples of this", AT_LEAST_ONE)
    pack: bool = option(False, "pack several sequences into each row of --max_tokens; they do not attend to each other")
    max_seq_len: int = option(4096, "maximum length of a sequence; see --overlong", AT_LEAST_ONE)
    overlong: str = option(
        "error",
        "sequences over --max_seq_len: refuse them at the start, or drop and count them",
        choices=("error", "drop"),
    )


@dataclass(frozen=True)
class ModelOptions(Options):
    """Chooses the model to train, and its trained weights."""

    init_from: str | None = option(None, "checkpoint folder or hub id to start from")
    model_config: str | None = option(None, "YAML or config.json of a model to train from scratch")
    tokenizer_path: str | None = option(None, "folder of the tokenizer (default: that of --init_from)")
    lora_rank: int = option(
        0, "train adapters of this rank on the layers' matrices, 0 for all weights (pip install peft)"
    )
    lora_alpha: float = option(
        0.0, "adapters are scaled by this over their rank (default: twice the rank)", NOT_NEGATIVE
    )
    freeze_embeddings: bool = option(False, "do not train embedding and head")
    zero_image_head: bool = option(
        False, "start with zeros in the head's rows of image codes; for a model that has not learned to draw yet"
    )

    @property
    def freezes(self) -> bool:
        """Whether some weights are not trained. Checkpoints do not hold these weights."""
        return bool(self.lora_rank or self.freeze_embeddings)

    @property
    def alpha(self) -> float:
        """LoRA's alpha: the adapters are scaled by `alpha / lora_rank`."""
        return self.lora_alpha or 2.0 * self.lora_rank

    def _check_together(self) -> None:
        if bool(self.init_from) == bool(self.model_config):
            raise InputError("give one of init_from=FOLDER, a checkpoint, and model_config=FILE, to train from scratch")
        if self.model_config and not self.tokenizer_path:
            raise InputError("needs tokenizer_path=FOLDER, with the tokenizer of the data", "model_config")
        if self.freezes and not self.init_from:
            name = "lora_rank" if self.lora_rank else "freeze_embeddings"
            raise InputError("needs init_from=FOLDER, which holds the weights that are not trained", name)
        if self.lora_rank and self.freeze_embeddings:
            raise InputError(
                f"is not needed with lora_rank={self.lora_rank}, which trains adapters only; leave it out",
                "freeze_embeddings",
            )
        if self.zero_image_head and (self.freezes or not self.init_from):
            reason = "the head is not trained then" if self.freezes else "new weights are random"
            names = {"lora_rank": self.lora_rank, "freeze_embeddings": self.freeze_embeddings}
            other = next((f"{name}={value}" for name, value in names.items() if value), "model_config=FILE")
            raise InputError(f"cannot be used with {other}: {reason}; leave one of them out", "zero_image_head")
        if self.lora_alpha and not self.lora_rank:
            raise InputError(f"{self.lora_alpha} means nothing without lora_rank=R; add that", "lora_alpha")


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """Chooses the optimizer, its learning rates, and the treatment of steps with a bad loss or gradient."""

    optimizer: str = option(
        "adamw", "muon: for the matrices of the layers, adamw for the rest", choices=("adamw", "muon")
    )
    lr: float = option(2e-5, "peak learning rate of adamw", POSITIVE)
    min_lr: float = option(0.0, "learning rate at the end", NOT_NEGATIVE)
    muon_lr: float = option(0.02, "peak learning rate of muon", POSITIVE)
    wd: float = option(0.1, "weight decay", NOT_NEGATIVE)
    clip_grad: float = option(4.0, "limit of the gradient's norm, 0 for none", NOT_NEGATIVE)
    on_nonfinite: str = option(
        "stop",
        "a step whose loss or gradient is not finite, or a spike: stop, or skip it; both are logged",
        choices=("stop", "skip"),
    )
    spike: float = option(
        0.0, "a gradient norm above this multiple of the median of the last 100 is a spike, 0 for none; try 10", FACTOR
    )

    def _check_together(self) -> None:
        _require("min_lr", self.min_lr, self.min_lr <= self.lr, f"must be at most lr={self.lr}")


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Chooses the length of the run and of its warm-up.

    The learning rate depends on the fraction of the run that has passed.
    """

    epochs: float = option(0.0, "length of the run in epochs", NOT_NEGATIVE)
    max_steps: int = option(0, "or in steps")
    max_minutes: float = option(0.0, "or in minutes; time before a --resume counts", NOT_NEGATIVE)
    warmup: float = option(0.01, "fraction of the run in which the learning rate rises", FRACTION)

    def _check_together(self) -> None:
        lengths = self.epochs, self.max_steps, self.max_minutes
        if sum(value > 0 for value in lengths) != 1:
            given = ", ".join(map(str, lengths))
            raise InputError(f"give one of epochs=N, max_steps=N and max_minutes=N, above 0; got {given}")


@dataclass(frozen=True)
class RegularizationOptions(Options):
    """Chooses dropout, additional loss terms, noise in the inputs, and the moving average of the weights."""

    dropout: float = option(0.05, "dropout rate on the output of attention and feed-forward", FRACTION)
    z_loss_weight: float = option(1e-5, "weight of the z-loss, logsumexp squared", NOT_NEGATIVE)
    tail_weight: float = option(
        0.0, "pull of unlikely ids to one probability; stabilizes guidance after a short training", NOT_NEGATIVE
    )
    code_noise: float = option(
        0.0, "share of the input image codes that are replaced; for few pictures, seen often", FRACTION
    )
    spare_panel: float = option(
        0.0,
        "share of the rows in which --code_noise leaves given pictures, and the first half of codes, unchanged",
        SHARE,
    )
    ema: float = option(0.0, "export a moving average of the weights with this decay, 0 for none", FRACTION)

    def _check_together(self) -> None:
        if self.spare_panel and not self.code_noise:
            raise InputError(f"{self.spare_panel} means nothing without code_noise=SHARE; add that", "spare_panel")


@dataclass(frozen=True)
class DistillationOptions(Options):
    """Chooses the teacher of a distillation of guidance. `distillation.DistillationTrainer` uses these options."""

    guidance_scale: float = option(0.0, "guidance scale whose distribution the weights learn, above 1", GUIDANCE)
    own_samples: float = option(
        0.0, "share of the steps that learn on images that the model in training samples, not on the records", SHARE
    )

    def _check_together(self) -> None:
        if self.own_samples and not self.guidance_scale:
            raise InputError(f"{self.own_samples} means nothing without guidance_scale=S; add that", "own_samples")


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """Chooses when checkpoints are written, how many are kept, and the checkpoint that the run resumes from."""

    save_iteration_interval: int = option(1000, "steps between checkpoints, 0 for none")
    save_minutes: float = option(0.0, "minutes between checkpoints, 0 for none", NOT_NEGATIVE)
    keep_checkpoints: int = option(2, "number of newest checkpoints that are kept", AT_LEAST_ONE)
    save_beside: bool = option(
        False, "write checkpoints while the training continues; takes a copy of what is written in the CPU's memory"
    )
    resume: str = option(
        "", "auto: go on from the newest checkpoint in --output_dir if there is one; or the path of one"
    )


@dataclass(frozen=True)
class LoggingOptions(Options):
    """Chooses what a run records besides `metrics.jsonl`."""

    tensorboard: bool = option(False, "also write the metrics for TensorBoard (pip install tensorboard)")
    peak_tflops: float = option(
        0.0,
        "peak TFLOP/s of one device at this precision, for the share used (default: that of known GPUs)",
        NOT_NEGATIVE,
    )
    sample_every: int = option(0, "steps between pictures of fixed prompts in OUTPUT_DIR/samples, 0 for none")
    sample_prompts: str | None = option(
        None, "their prompts, one a line (default: prompts.txt of the checkpoint, or five built-in ones)"
    )
    movqgan_path: str | None = option(
        None, "MoVQGAN or VQGAN weights for them and the export (default: looked for beside the checkpoint)"
    )


@dataclass(frozen=True)
class RuntimeOptions(Options):
    """Chooses device, precision, use of memory, and seed."""

    precision: str = option("bf16", "of the matrix products; weights stay float32", choices=("bf16", "fp32"))
    compile: bool = option(False, "torch.compile layers and loss")
    cpu_offload: bool = option(False, "keep weights and optimizer state in the CPU's memory (CUDA only)")
    checkpointing: bool = option(
        False, "recompute activations in the backward pass, and return freed memory at once: less memory, more time"
    )
    seed: int = option(0, "seed of weights, data order and dropout")
    device: str = option("auto", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads of this process, 0 for torch's default")


@dataclass(frozen=True)
class TrainingConfig(Options):
    """Holds all options of a training.

    `batch_size` and `max_tokens` are the sizes of one micro-batch on one process. Exactly one of `epochs`, `max_steps`
    and `max_minutes` gives the length of the run.

    Raises:
        InputError: a value is out of range, or two values do not go together. The error names the option.
    """

    data: DataOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    regularization: RegularizationOptions
    distillation: DistillationOptions
    checkpoints: CheckpointOptions
    logging: LoggingOptions
    runtime: RuntimeOptions
    output_dir: str = option(MISSING, "checkpoints, metrics.jsonl and the export go here")

    @classmethod
    def options(cls) -> dict[str, Field]:
        """Returns the fields of the options of all groups, by name."""
        return {item.name: item for group in (cls, *groups().values()) for item in option_fields(group)}

    @classmethod
    def of(cls, **values: Any) -> "TrainingConfig":
        """Returns the configuration with the given options; all other options have their defaults.

        Args:
            values: options of any group, by name.

        Raises:
            TypeError: an option is unknown, or one without a default is missing.
            InputError: for the same reasons as the constructor.
        """
        if unknown := values.keys() - cls.options().keys():
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        parts: dict[str, Any] = {name: group(**_part(group, values)) for name, group in groups().items()}
        return cls(**_part(cls, values), **parts)

    def flat(self) -> dict[str, Any]:
        """Returns the options of all groups as one mapping; `of` makes an equal configuration from it."""
        owners = (self, *(getattr(self, name) for name in groups()))
        return {item.name: getattr(owner, item.name) for owner in owners for item in option_fields(type(owner))}

    def _check_together(self) -> None:
        if self.model.lora_rank and self.optimizer.optimizer == "muon":
            raise InputError(
                "muon trains whole matrices and cannot be used with lora_rank=R; use optimizer=adamw", "optimizer"
            )
        if self.distillation.guidance_scale:
            self._check_distillation()
        if self.data.pack:  # packed rows differ in shape, and noise is taken from other rows
            for name, given in (("compile", self.runtime.compile), ("code_noise", self.regularization.code_noise)):
                if given:
                    raise InputError(f"cannot be used with {name}={given}; leave one of them out", "pack")

    def _check_distillation(self) -> None:
        """Refuses options that a distillation of guidance cannot use."""
        if not self.model.init_from:
            raise InputError("needs init_from=FOLDER, the weights that are the teacher", "guidance_scale")
        others = {"zero_image_head": self.model.zero_image_head}
        others |= {name: getattr(self.regularization, name) for name in ("z_loss_weight", "tail_weight")}
        for name, value in others.items():
            if value:
                raise InputError(
                    f"cannot be used with guidance_scale=S, got {value}; leave it out, or set it to 0", name
                )
        if self.data.pack and self.distillation.own_samples:
            raise InputError("cannot be used with own_samples=SHARE; leave one of them out", "pack")


def groups() -> dict[str, type[Options]]:
    """Returns the class of each group, by its attribute in TrainingConfig."""
    hints = {item.name: item.type for item in dataclasses.fields(TrainingConfig)}
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, Options)}


def _part(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in option_fields(group) if item.name in values}
