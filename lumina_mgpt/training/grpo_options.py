"""Defines the configuration of `lumina-mgpt grpo`: its own options, and those that it shares with the finetuning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lumina_mgpt.checks import excerpt
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.options import (
    AT_LEAST_ONE,
    FRACTION,
    MISSING,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Options,
    Rule,
    TrainingConfig,
    option,
    option_fields,
)

# Options of the finetuning that do not apply: the data are prompts, and the loss has no other terms.
EXCLUDED = (
    "data_config", "accum_iter", "max_tokens", "pad_multiple", "pack", "max_seq_len", "overlong", "model_config",
    "tokenizer_path", "zero_image_head", "dropout", "z_loss_weight", "tail_weight", "code_noise", "spare_panel",
    "compile", "peak_tflops", "guidance_scale", "own_samples",
)  # fmt: skip
# Defaults that differ from those of the finetuning.
DEFAULTS: dict[str, Any] = {
    "lr": 1e-5,
    "wd": 0.0,
    "clip_grad": 1.0,
    "warmup": 0.0,
    "save_iteration_interval": 50,
    "dropout": 0.0,
    "z_loss_weight": 0.0,
}
_TWO = Rule("must be at least 2, since the images of a group are compared with each other", lambda value: value >= 2)


@dataclass(frozen=True)
class Reward:
    """A reward by name, and its weight in the sum.

    Attributes:
        name: `own`, `reading`, `bayes`, or `module:function`; see `scoring.make_scorer`.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Reward":
        """Reads `NAME` or `NAME=WEIGHT`.

        Raises:
            InputError: the weight is not a finite number other than 0.
        """
        name, found, weight = text.partition("=")
        rule = f"must be NAME or NAME=WEIGHT with a finite weight other than 0, got {excerpt(text)}"
        try:
            value = float(weight) if found else 1.0
        except ValueError:
            raise InputError(rule, "reward") from None
        if not name or not math.isfinite(value) or not value:
            raise InputError(rule, "reward")
        return cls(name, value)

    def __str__(self) -> str:
        return f"{self.name}={self.weight:g}"


@dataclass(frozen=True)
class GrpoOptions(Options):
    """Chooses prompts, rewards, sampling and the objective.

    Attributes:
        rewards: the rewards whose weighted sum is the reward of an image, at least one.
        speculation: settings of speculative sampling; None for one code per forward.
    """

    prompt_file: str = option(MISSING, "prompts to train on, one a line")
    group_size: int = option(8, "images of one prompt, which are compared with each other", _TWO)
    groups: int = option(8, "prompts a step, over all processes; a multiple of the number of processes", AT_LEAST_ONE)
    task: str = option("t2i", "task of the images; one that makes one image from the prompt alone")
    width: int | None = option(None, "width of the images in pixels (default: the checkpoint's)")
    height: int | None = option(None, "height of the images in pixels (default: the checkpoint's)")
    cfg: float = option(
        1.0, "guidance of the policy; 1 for none. Else the guided distribution is trained, at twice the cost", POSITIVE
    )
    temperature: float = option(1.0, "temperature of the policy", POSITIVE)
    sample_batch: int = option(
        0, "images sampled together; affects speed and memory only, 0 for 32, or on a GPU what fits, at most 8"
    )
    advantage: str = option(
        "std",
        "reward minus the mean of the group; std: divided by its standard deviation",
        choices=("std", "mean"),
    )
    supervision: str = option(
        "outcome",
        "outcome: all codes have the advantage of the image; process: each code has its own, from its reward and those "
        "of the codes after it, which needs --reward bayes",
        choices=("outcome", "process"),
    )
    discount: float | None = option(
        None,
        "process: factor of later rewards, once for each code between (default: 1); 0: the code's own alone",
        SHARE,
    )
    clip: float = option(0.2, "limits ratios of probabilities to 1 - CLIP and 1 + CLIP", FRACTION)
    clip_high: float | None = option(None, "another upper limit, 1 + CLIP_HIGH (default: --clip)", NOT_NEGATIVE)
    kl: float = option(0.04, "weight of the divergence from the model that the run started from", NOT_NEGATIVE)
    updates: int = option(1, "optimizer steps on the images of one step", AT_LEAST_ONE)
    rewards: tuple[Reward, ...] = ()
    speculation: Speculation | None = None

    @property
    def images(self) -> int:
        """Number of images of a step, over all processes."""
        return self.groups * self.group_size

    @property
    def own_reward(self) -> bool:
        """Whether a reward needs the frozen reference."""
        return any(":" not in reward.name for reward in self.rewards)

    def sampling(self, num_codes: int, seed: int = 0) -> SamplingConfig:
        """Returns the settings of the policy, which samples from all codes.

        A code outside the most probable ones would have no probability, and no ratio of probabilities.
        """
        return SamplingConfig(cfg=self.cfg, top_k=num_codes, temperature=self.temperature, seed=seed)

    def identity(self) -> dict[str, Any]:
        """Returns the options that must be the same when a run resumes, as JSON values."""
        values = {item.name: getattr(self, item.name) for item in option_fields(type(self))}
        for name in ("prompt_file", "sample_batch"):  # its prompts are compared; does not change the result
            del values[name]
        speculation = self.speculation and vars(self.speculation)
        return values | {"rewards": [str(reward) for reward in self.rewards], "speculation": speculation}

    def _check_together(self) -> None:
        SamplingConfig(cfg=self.cfg, temperature=self.temperature)
        process = self.supervision == "process"
        if self.discount is not None and not process:
            raise InputError("has no effect without supervision=process; add that, or leave it out", "discount")
        for reward in self.rewards if process else ():
            if reward.name != "bayes":
                rule = "must be bayes with supervision=process, since each code needs a reward"
                raise InputError(f"{rule}, got {reward.name}; give bayes, or leave supervision out", "reward")
        if not self.rewards:
            raise InputError("is missing; give own, or module:function with (images, prompts) -> scores", "reward")
        names = [reward.name for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{name} is given {names.count(name)} times; give it once, with its weight", "reward")


@dataclass(frozen=True)
class GrpoConfig:
    """Holds all options of a run.

    Attributes:
        training: the options that the finetuning has, too. Its `data_config` is the file of prompts.
    """

    training: TrainingConfig
    grpo: GrpoOptions

    @classmethod
    def of(cls, rewards: Sequence[Reward | str], speculation: Speculation | None = None, **values: Any) -> "GrpoConfig":
        """Returns the configuration with the given options; all other options have their defaults.

        Args:
            rewards: at least one reward, or text that `Reward.parse` reads.
            values: options of GrpoOptions and of TrainingConfig, by name.

        Raises:
            TypeError: an option is unknown or does not apply, or one without a default is missing.
            InputError: a value is out of range, or two values do not go together. The error names the option.
        """
        own = {item.name for item in option_fields(GrpoOptions)}
        parsed = tuple(Reward.parse(reward) if isinstance(reward, str) else reward for reward in rewards)
        grpo = GrpoOptions(
            **{name: value for name, value in values.items() if name in own}, rewards=parsed, speculation=speculation
        )
        shared = {name: value for name, value in values.items() if name not in own}
        if wrong := shared.keys() & set(EXCLUDED):
            raise TypeError(f"options that do not apply: {', '.join(sorted(wrong))}")
        shared = DEFAULTS | shared | {"data_config": grpo.prompt_file}
        shared["batch_size"] = shared.get("batch_size") or grpo.group_size
        if not shared.get("init_from"):
            raise InputError("is missing; give the checkpoint folder or hub id to start from", "init_from")
        return cls(TrainingConfig.of(**shared), grpo)
