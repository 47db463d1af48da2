"""What all stages share: the device, the sizes of the models, and models with random weights."""

import inspect
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from bench_large import SEVEN_B, TOKENIZER, fill_cache, random_model
from torch import Tensor

from lumina_mgpt import resources
from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.measure import read_bandwidth, seconds
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.unirep import ImageLayout
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

PROMPT = "An old lighthouse on a rocky cape at dusk, its beam crossing a stormy violet sky, oil painting"
GUIDED = SamplingConfig(cfg=4.0)
_STEPS = 4  # steps between two waits: samplers do not wait after each step either
_SELF_TEST_SPEED = 40  # a stage of the self-test takes about this part of the seconds of the 7B on an H100


@dataclass(frozen=True)
class Form:
    """How weights and cache are stored.

    Attributes:
        key: its name in the JSON line.
        dtype: dtype of activations, and of weights that are not int4.
        group: group size of int4 weights, None for weights in `dtype`.
        cache_dtype: dtype of the KV cache.
    """

    name: str
    key: str
    dtype: torch.dtype = torch.bfloat16
    group: int | None = None
    cache_dtype: torch.dtype = torch.bfloat16


BF16 = Form("bf16", "bf16")
INT4 = Form("int4", "int4", group=128)
INT4_INT8 = Form("int4, int8 cache", "int4_int8", group=128, cache_dtype=torch.int8)
FORMS = (BF16, INT4, INT4_INT8)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured models and images.

    Attributes:
        config: model with random weights.
        tokenizer: folder of its tokenizer.
        side: width and height of an image in pixels.
        matrices: (outputs, inputs) of the matrices of the int4 stage.
        offloaded: number of layers that are trained with offload.
    """

    name: str
    config: ModelConfig
    tokenizer: Path
    side: int
    matrices: tuple[tuple[int, int], ...]
    steps: int
    offloaded: int

    @classmethod
    def of(cls, small: bool) -> "Sizes":
        """Returns the sizes of the 7B, or small ones for a self-test."""
        if not small:
            config, widths = ModelConfig.from_yaml(SEVEN_B), ((4096, 4096), (11008, 4096), (4096, 11008))
            return cls("the 7B", config, TOKENIZER, 768, widths, 24, 8)
        demo = resources.demo_checkpoint()
        sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=2)
        heads = dict(num_attention_heads=12, num_key_value_heads=12, model_parallel_size=1)
        config = replace(ModelConfig.from_json(demo / "config.json"), **sizes, **heads, dropout=0.0)
        return cls("a small model", config, demo, 128, ((256, 384), (1024, 384), (384, 1024)), 2, 1)


@dataclass
class Setup:
    """The device and the models of a run.

    Attributes:
        small: whether sizes are those of the self-test.
        first_generation: folder of a small first-generation checkpoint, None to leave it out.
    """

    device: torch.device
    small: bool
    first_generation: Path | None = None

    def __post_init__(self) -> None:
        self.sizes = Sizes.of(self.small)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that the device reads from its memory."""
        return read_bandwidth(self.device)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_folder(self.sizes.tokenizer, self.sizes.config)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the random model; it has a tokenizer but no files of weights."""
        demo = resources.demo_checkpoint()
        return Checkpoint(self.sizes.tokenizer, self.sizes.config, self.vocabulary, demo / "movqgan.safetensors")

    def seconds(self, on_gpu: float) -> float:
        """Returns the seconds of something that takes `on_gpu` seconds for the 7B on an H100."""
        return on_gpu / _SELF_TEST_SPEED if self.small else on_gpu

    def free_bytes(self) -> int | None:
        """Returns the free bytes of the GPU's memory; None for a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def layout(self) -> ImageLayout:
        return ImageLayout.from_pixels(self.vocabulary, self.sizes.side, self.sizes.side)

    def prompt(self) -> list[int]:
        """Returns the ids of a prompt, up to image start."""
        return self.checkpoint.prompt_ids([PROMPT], self.layout())[0]

    @property
    def captures(self) -> bool:
        """Whether pipelines capture their steps as CUDA graphs."""
        return self.device.type == "cuda" and bool(graph_options(True))

    def random_pipeline(self, form: Form) -> Pipeline:
        """Returns a pipeline with random weights, made on the device."""
        model = random_model(self.sizes.config, form.dtype, form.group, self.device)
        model.lm_head.slice_columns(self.vocabulary.code_slice, int8=bool(form.group))
        image_tokenizer = ImageTokenizer.from_checkpoint(self.checkpoint.movqgan_path, self.device)
        return Pipeline(self.checkpoint, model, image_tokenizer, form.cache_dtype)

    def full_step(self, pipeline: Pipeline, window: int = 1) -> CachedStep:
        """Returns a step with guidance whose cache is full of random numbers.

        Args:
            window: drafts of a forward; 1 for the step of plain sampling.
        """
        speculation = Speculation("noise", window) if window > 1 else None
        step = pipeline.make_step([self.prompt()], self.layout(), GUIDED, speculation)
        fill_cache(step.cache)
        step.calls = 1  # the first call, which reads the prompt, is over
        return step

    def call(self, step: CachedStep, width: int, filled: int) -> Tensor:
        """Feeds `width` ids to each row, the last at slot `filled` - 1, and returns their logits."""
        rows = len(step.cache.tensors()[0])
        start = self.vocabulary.code_slice.start
        ids = torch.full((rows, width), start, device=self.device)
        positions = torch.arange(filled - width, filled).expand(rows, width)
        return step(ids, positions, torch.arange(width).expand(rows, width))

    def seconds_a_call(self, step: CachedStep, width: int, filled: int) -> float:
        """Returns the median seconds of `call`."""

        count = 1 if self.small else _STEPS

        def work() -> None:
            for _ in range(count):
                self.call(step, width, filled)

        return seconds(work, device=self.device) / count


def graph_options(captured: bool) -> dict[str, bool]:
    """Returns the option of a pipeline that captures its steps as CUDA graphs or not; empty where there is none."""
    known = "cuda_graphs" in inspect.signature(Pipeline.__init__).parameters
    return {"cuda_graphs": captured} if known else {}


def host_bytes() -> int | None:
    """Returns the free bytes of the host's memory (Linux only)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
