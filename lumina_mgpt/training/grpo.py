"""Trains a model with rewards of its own images: group-relative policy optimization (GRPO).

A step samples a group of images for each of some prompts, scores them, and raises the probability of those that are
better than the mean of their group. Checkpoints, resuming, sharding and metrics are those of `Trainer`.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import ModelConfig, SamplingConfig
from lumina_mgpt.data.seeding import seed_of
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.prompt_files import read_prompts
from lumina_mgpt.training import base
from lumina_mgpt.training.adapters import without_adapters
from lumina_mgpt.training.distributed import Processes, clip_gradients, place, read
from lumina_mgpt.training.grpo_objective import (
    Inputs,
    PolicyModel,
    advantages,
    image_inputs,
    policy_terms,
    process_advantages,
)
from lumina_mgpt.training.grpo_options import GrpoConfig
from lumina_mgpt.training.grpo_prompts import PromptFeed, Prompts
from lumina_mgpt.training.grpo_rewards import Rewards
from lumina_mgpt.training.grpo_samples import Groups, GroupSampler, sheet
from lumina_mgpt.training.run_folder import name_of
from lumina_mgpt.training.sample_images import SampleImages
from lumina_mgpt.training.trainer import Trainer, logger
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer, find_image_tokenizer


class GrpoTrainer(Trainer):
    """Trains a model in one run. Construct it on every process, then call `run`.

    Attributes:
        reference: the frozen model that the run started from; None with adapters, whose base it is, and if nothing
            needs it.

    Raises:
        InputError: settings, prompts, rewards or checkpoint cannot be used. Nothing has been trained then.
    """

    dataset: Prompts
    feed: PromptFeed
    module: PolicyModel

    def __init__(self, config: GrpoConfig, processes: Processes) -> None:
        self.grpo = config.grpo
        if self.grpo.groups % processes.world:
            rule = f"must be a multiple of the {processes.world} processes"
            raise InputError(f"{rule}, got {self.grpo.groups}; use {self.grpo.groups * processes.world}", "groups")
        self.reference: PolicyModel | None = None
        self.reference_print: str | None = None
        super().__init__(config.training, processes)

    # -- what differs from the finetuning ------------------------------------------------------------------------------

    def _read_sources(self) -> list:
        by_code = self.grpo.supervision == "process"
        self.rewards = Rewards(self.grpo.rewards, self.settings.data.batch_size, by_code)
        return read_prompts(None, self.grpo.prompt_file, "prompt_file")

    def _read_data(self, sources: list, vocabulary: Vocabulary, config: ModelConfig) -> tuple[Prompts, PromptFeed]:
        options, runtime = self.grpo, self.settings.runtime
        path = find_image_tokenizer(
            self.tokenizer_folder, self.settings.logging.movqgan_path, config.family.image_tokenizer
        )
        checkpoint = Checkpoint(self.tokenizer_folder, config, vocabulary, path)
        images = ImageTokenizer.from_checkpoint(path, self.processes.device)
        images.require_codes(config, path)
        images.require_decoder()
        task = config.family.task(options.task)
        if task.views > 1:
            raise InputError(f"must be a task that makes one image, got {options.task}; try t2i", "task")
        layout = checkpoint.layout(options.width, options.height, task)
        prompts = Prompts(sources, checkpoint.prompt_ids(sources, layout, task, parameter="prompt_file"), layout)
        self.rewards.check(sources[0], layout.size, config.family)
        narrow = runtime.precision == "bf16"
        self.sampler = GroupSampler(checkpoint, images, prompts, options, self.processes, narrow)
        self.policy = options.sampling(config.num_image_codes)
        return prompts, PromptFeed(len(prompts), options.groups, runtime.seed)

    def _make_module(self, model: Transformer) -> PolicyModel:
        if (self.grpo.kl or self.grpo.own_reward) and not self.settings.model.lora_rank:
            first = self.processes.first
            self.reference_print = self.processes.of_first(
                base.fingerprint(model.named_parameters()) if first else None
            )
            self.reference = PolicyModel(copy.deepcopy(model).requires_grad_(False))
        return PolicyModel(model)

    def _prepare_model(self, model: Transformer) -> None:
        super()._prepare_model(model)
        if self.reference is not None:
            runtime = self.settings.runtime
            place(self.reference, self.processes, runtime.cpu_offload, runtime.precision == "bf16")

    def _sample_images(self, model: Transformer, vocabulary: Vocabulary) -> SampleImages:
        policy: dict[str, Any] = {name: getattr(self.policy, name) for name in ("cfg", "top_k", "temperature")}
        width, height = self.dataset.layout.size
        task = model.config.family.task(self.grpo.task)
        return SampleImages(
            self.settings, self.tokenizer_folder, model, vocabulary, self.processes, width, height, task, **policy
        )

    def _identity(self) -> dict:
        return super()._identity() | self.grpo.identity() | {"reference": self.reference_print}

    def _check_identity(self, path: Path, stored: dict) -> None:
        base.check(self.reference_print, stored.get("reference"), self.settings.model.init_from)
        super()._check_identity(path, stored)

    def _located(self) -> list[dict]:
        return [{"prompt": self.dataset.texts[index]} for index in self.feed.indices]

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self, began: float) -> None:
        """One step: sampling, scoring, updates, metrics. `began` is the clock at elapsed time 0."""
        times = [time.monotonic()]
        rate, seed = self._set_learning_rate(), self.settings.runtime.seed
        torch.manual_seed(seed_of(seed, "step", self.at, self.processes.rank))  # for rewards that draw numbers
        groups = self.sampler.draw(self.model, self.feed.next_step(), seed, "images", self.at)
        times.append(time.monotonic())
        scores, pictures = self._score(groups)
        rewards, advantage = self._compare(self.rewards.total(scores))
        times.append(time.monotonic())
        learned = self._learn(groups, advantage, began)
        times.append(time.monotonic())
        self._draw_sheet(pictures, groups, rewards)
        size = self.grpo.group_size
        alike = (advantage.view(len(rewards), -1) == 0).all(1)
        if self.rewards.by_code:
            scores = scores.sum(2)
        sums = [*scores.sum(0).tolist(), *(float(part.sum()) for part in (rewards, rewards.std(1), alike))]
        *means, total, spread, equal = (value / self.grpo.images for value in self.processes.sum(*sums))
        self.at, self.tokens = self.at + 1, self.tokens + self.grpo.images * self.dataset.layout.num_codes
        row = {"step": self.at, "epoch": round(self.feed.epochs, 4), "progress": self.progress, "reward": total}
        if len(self.rewards.names) > 1:
            row |= {f"reward {name}": mean for name, mean in zip(self.rewards.names, means, strict=True)}
        row |= {"reward_std": spread * size, "equal_groups": equal * size} | learned
        spans = zip(("sampling", "scoring", "learning"), times, times[1:], strict=False)
        row |= {f"seconds_{name}": round(end - start, 3) for name, start, end in spans}
        codes = self.grpo.images * self.dataset.layout.num_codes
        row |= {
            "codes_per_forward": round(groups.codes_per_forward, 3),  # of the first process
            "lr": rate,
            "images": self.at * self.grpo.images,
            "elapsed": round(self.elapsed, 3),
            "tokens_per_second": codes / (times[-1] - times[0]),
        }
        self.metrics.step(row)

    def _compare(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rewards of the images and the advantages of their codes.

        Shapes: rewards (B,) or, of each code, (B, codes) -> (groups, group size) and (B · codes,).
        """
        options = self.grpo
        rewards = rewards.unflatten(0, (-1, options.group_size))
        if self.rewards.by_code:
            discount = 1.0 if options.discount is None else options.discount
            each = process_advantages(rewards, options.advantage, discount)
            return rewards.sum(2), each.flatten()
        each = advantages(rewards, options.advantage).flatten()
        return rewards, each.repeat_interleave(self.dataset.layout.num_codes)

    def _score(self, groups: Groups) -> tuple[Tensor, list]:
        """Returns the scores of this process's images as `Rewards.with_own`, and their pictures if they are needed."""
        pictures: list[Image.Image] = []
        with self.processes.together("score its images"):  # else the others would wait for it
            if self.rewards.need_pictures or self._sheet_due:
                pictures = self.sampler.decode(groups.codes)
            found = self.rewards.of_functions(pictures, groups.prompts)
        family, layout = self.model.config.family, self.dataset.layout
        scores = self.rewards.with_own(
            found, groups.prompts, groups.starts, groups.codes, layout, family, self._reference_log_probs
        )
        return scores, pictures

    @property
    def _sheet_due(self) -> bool:
        every = self.settings.logging.sample_every
        return bool(every) and self.processes.first and not (self.at + 1) % every

    def _draw_sheet(self, pictures: list, groups: Groups, rewards: Tensor) -> None:
        """Writes `samples/step-N/groups.png`. If it cannot be written, logs a warning, and the training continues."""
        if not self._sheet_due:
            return
        target = OutputFolder(
            self.output_dir / "samples" / name_of(self.at + 1), overwrite=True, parameter="output_dir"
        )
        try:
            target.save("groups.png", sheet(pictures, groups.prompts, rewards.flatten().tolist(), rewards.shape[1]))
        except InputError as error:
            logger.warning("the sheet of step %d is not written: %s", self.at + 1, error)

    def _learn(self, groups: Groups, advantage: Tensor, began: float) -> dict:
        """Takes the optimizer steps on some images; returns metrics.

        The probabilities before the first update are those that the trained model gives, not the sampler, whose
        rounding differs. The ratios are therefore exactly 1 in the first update.

        Args:
            advantage: of each code, (B · codes,).
        """
        layout, options = self.dataset.layout, self.grpo
        size = self.settings.data.batch_size
        spans = [slice(at, at + size) for at in range(0, len(groups.codes), size)]
        parts = [
            image_inputs(groups.starts[span], groups.codes[span], layout, self.policy.cfg != 1.0) for span in spans
        ]
        columns, shares = layout.vocabulary.code_slice, advantage.float().split(size * layout.num_codes)
        reference: list[Tensor | None] = [None] * len(parts)
        if options.kl:
            reference = [self._reference_log_probs(part, columns, self.policy) for part in parts]
        before: list[Tensor] = []
        codes, scale = options.images * layout.num_codes, self.processes.world
        kept, clipped, fault = [0.0] * 4, 0.0, None
        high = options.clip if options.clip_high is None else options.clip_high
        for update in range(options.updates):
            sums: list[Tensor] = []
            for number, (part, share, frozen) in enumerate(zip(parts, shares, reference, strict=True)):
                now, entropy = self._log_probs(self.module, part, columns, self.policy)
                if not update:
                    before.append(now.detach())
                gain = share.to(now.device, now.dtype)
                terms = policy_terms(now, before[number], frozen, gain, options.clip, high, options.kl)
                # FSDP averages gradients over the processes; the factor `scale` makes that a sum.
                (terms.loss * (scale / codes)).backward()
                sums.append(torch.stack([terms.loss.detach(), terms.kl, entropy.sum(), terms.clipped]))
            *found, norm = read(self.processes.device, *torch.stack(sums).sum(0), self._clip_gradients())
            loss, divergence, entropy_sum, limited = (value / codes for value in self._agree(began, *found))
            if not update:
                kept = [loss, divergence, entropy_sum, norm]
            clipped += limited / options.updates
            fault = self._update_unless_bad(loss, norm) or fault
        names = ("loss", "kl", "entropy", "grad_norm")
        row = dict(zip(names, kept, strict=True)) | {"clipped": clipped}
        return row | ({"skipped": fault} if fault else {})

    def _clip_gradients(self) -> Tensor:
        return clip_gradients(self.module, self.settings.optimizer.clip_grad)

    def _log_probs(
        self, module: PolicyModel, inputs: Inputs, columns: slice | None, settings: SamplingConfig
    ) -> tuple[Tensor, Tensor]:
        narrow = self.settings.runtime.precision == "bf16"
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=narrow):
            return module(*self.processes.upload(*inputs), settings, columns)

    def _reference_log_probs(self, inputs: Inputs, columns: slice | None, settings: SamplingConfig) -> Tensor:
        """Returns the log-probabilities that the frozen reference gives. Shapes: (L,).

        They are computed with gradients enabled, and detached: without, some products round otherwise, and the
        divergence of equal weights would not be exactly 0. AdamW turns the smallest gradient into a whole step.
        """
        if self.reference is not None:
            return self._log_probs(self.reference, inputs, columns, settings)[0].detach()
        with without_adapters(self.model):
            return self._log_probs(self.module, inputs, columns, settings)[0].detach()
