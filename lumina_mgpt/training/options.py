"""Everything a training run is told, checked in one place."""

import numbers
import os
import sys
import typing
from dataclasses import Field, dataclass, fields

from lumina_mgpt.errors import InputError

CHOICES = {
    "precision": ("bf16", "fp32"), "optimizer": ("adamw", "muon"), "overlong": ("error", "drop"),
    "on_nonfinite": ("stop", "skip"),
}  # fmt: skip
_COUNT_LIMIT = 2**31 - 1  # what every library below takes as a size
_LIMITS = {"seed": 2**63 - 1, "threads": 1024, "lora_rank": 2**20}  # torch's seeds have 64 bits; sizes of real machines
_TYPES = {
    bool: (bool, "must be true or false"), str: (str, "must be text"),
    int: (numbers.Integral, "must be a whole number"), float: (numbers.Real, "must be a number"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Field names are those of the command line options.

    One of `epochs`, `max_steps`, `max_minutes` says how long the run is; the learning rate follows the fraction of it
    that has passed. `batch_size` and `max_tokens` are those of one micro-batch on one process.

    Raises:
        InputError: naming the option that is out of its range.
    """

    data_config: str
    output_dir: str
    init_from: str | None = None
    model_config: str | None = None
    tokenizer_path: str | None = None
    batch_size: int = 0
    max_tokens: int = 0
    accum_iter: int = 1
    pad_multiple: int = 32
    pack: bool = False
    lora_rank: int = 0
    lora_alpha: float = 0.0
    freeze_embeddings: bool = False
    max_seq_len: int = 4096
    overlong: str = "error"
    epochs: float = 0
    max_steps: int = 0
    max_minutes: float = 0
    warmup: float = 0.01
    optimizer: str = "adamw"
    lr: float = 2e-5
    min_lr: float = 0.0
    muon_lr: float = 0.02
    wd: float = 0.1
    clip_grad: float = 4.0
    dropout: float = 0.05
    z_loss_weight: float = 1e-5
    tail_weight: float = 0.0
    code_noise: float = 0.0
    spare_panel: float = 0.0
    ema: float = 0.0
    on_nonfinite: str = "stop"
    spike: float = 0.0
    precision: str = "bf16"
    compile: bool = False
    cpu_offload: bool = False
    checkpointing: bool = False
    save_iteration_interval: int = 1000
    save_minutes: float = 0
    keep_checkpoints: int = 2
    save_beside: bool = False
    resume: str = ""
    tensorboard: bool = False
    peak_tflops: float = 0.0
    sample_every: int = 0
    sample_prompts: str | None = None
    movqgan_path: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field)
        if bool(self.init_from) == bool(self.model_config):
            raise InputError("give one of --init_from (a checkpoint) and --model_config (training from scratch)")
        if self.model_config and not self.tokenizer_path:
            raise InputError("--model_config needs --tokenizer_path, the folder whose tokenizer the data was made with")
        budgets = [self.epochs, self.max_steps, self.max_minutes]
        if sum(value > 0 for value in budgets) != 1 or min(budgets) < 0:
            raise InputError(f"give one of --epochs, --max_steps and --max_minutes, above 0; got {budgets}")
        for name in ("accum_iter", "max_seq_len", "keep_checkpoints", "pad_multiple"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("lr", "muon_lr"):
            self._require(name, getattr(self, name) > 0, "must be above 0")
        limits = ("min_lr", "wd", "clip_grad", "z_loss_weight", "tail_weight", "spike", "peak_tflops", "lora_alpha")
        for name in (*limits, "save_minutes"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        self._require("min_lr", self.min_lr <= self.lr, f"must be at most --lr {self.lr}")
        for name in ("warmup", "dropout", "ema", "code_noise"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        self._require("spare_panel", 0 <= self.spare_panel <= 1, "must be in [0, 1]")
        if self.spare_panel and not self.code_noise:
            raise InputError(f"--spare_panel {self.spare_panel} means nothing without --code_noise; add that")
        for name in ("compile", "code_noise"):  # each row is of a shape of its own; other rows lend the noise
            if self.pack and getattr(self, name):
                raise InputError(f"--pack does not go with --{name}; leave one of them out")
        self._check_frozen()
        self._require("spike", self.spike == 0 or self.spike > 1, "must be above 1, or 0 for none")
        for name, values in CHOICES.items():
            self._require(name, getattr(self, name) in values, f"must be one of {', '.join(values)}")

    @property
    def freezes(self) -> bool:
        """Whether some weights stay those of `init_from`, and are not kept in checkpoints."""
        return bool(self.lora_rank or self.freeze_embeddings)

    def _check_frozen(self) -> None:
        if self.freezes and not self.init_from:
            raise InputError("--lora_rank and --freeze_embeddings need --init_from, whose weights stay as they are")
        if self.lora_rank and self.freeze_embeddings:
            raise InputError("--lora_rank trains nothing but adapters already; leave --freeze_embeddings out")
        if self.lora_alpha and not self.lora_rank:
            raise InputError(f"--lora_alpha {self.lora_alpha} means nothing without --lora_rank; add that")
        if self.lora_rank and self.optimizer == "muon":
            raise InputError("--optimizer muon is for whole matrices, not for --lora_rank; use adamw")

    def _check_type(self, field: Field) -> None:
        """Gives a setting the type of its field, so that every one can be written as JSON and read again."""
        name, value = field.name, getattr(self, field.name)
        kinds = typing.get_args(field.type) or (field.type,)
        if value is None and type(None) in kinds:
            return
        if str in kinds and isinstance(value, os.PathLike):
            value = str(value)
        number = bool not in kinds and str not in kinds
        wanted, rule = _TYPES[next(kind for kind in kinds if kind is not type(None))]
        self._require(name, isinstance(value, wanted) and not (number and isinstance(value, bool)), rule)
        if int in kinds:
            limit = _LIMITS.get(name, _COUNT_LIMIT)
            self._require(name, 0 <= value <= limit, f"must be in [0, {limit}]")
        elif float in kinds:
            self._require(name, -sys.float_info.max <= value <= sys.float_info.max, "must be finite")
        object.__setattr__(self, name, kinds[0](value))

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(f"--{name} {rule}, got {getattr(self, name)}")
