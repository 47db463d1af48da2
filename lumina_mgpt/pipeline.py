"""From a prompt to a picture: the only place where vocabulary, sampler, model and image tokenizer meet."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import (
    ModelConfig,
    SamplingConfig,
    Speculation,
    check_counts,
    check_share,
    excerpt,
    whole_number,
)
from lumina_mgpt.devices import cache_bytes, default_window, resolve_device, resolve_dtype
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import attention
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import COMPILED_SPARE, CachedStep, compile_forward, has_compiler, require_compiler
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.movqgan.tokenizer import ImageTokenizer, find_movqgan
from lumina_mgpt.panels import Panel, given_codes, pixel_size
from lumina_mgpt.prompts import TASKS, Task
from lumina_mgpt.results import Job, Result, RowsDone
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.fastest import fastest
from lumina_mgpt.sampling.jacobi import ring_bytes, sample_jacobi, spare_slots
from lumina_mgpt.unirep import CODE_CELL, GRID_UNIT, ImageLayout, encode_image, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Batches are sized so that their keys and values stay below this: one image of the 7B, eight of the demo checkpoint.
_CACHE_BUDGET = 1 << 30
_LARGEST_AUTO_BATCH = 8
_COMPILING_MAY_PAY = 1800  # seconds that sampling takes: a tenth of it is about what compiling takes
_OTHER_SHAPES = 6  # are compiled on the way, at most, for each that was in a trial


OnRow = Callable[[RowsDone], None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose small files were read and found good; no weights are loaded yet."""

    folder: Path
    config: ModelConfig
    vocabulary: Vocabulary
    movqgan_path: Path

    @classmethod
    def open(cls, path: str | Path, movqgan_path: str | Path | None = None) -> "Checkpoint":
        """Opens a local folder, or fetches a hub id.

        Raises:
            InputError: there is no such checkpoint, it is incomplete, or MoVQGAN weights are missing.
        """
        _require_utf8("--model_path", path)
        try:
            folder = resolve(path)
            config = ModelConfig.from_json(folder / "config.json")
            vocabulary = Vocabulary.from_folder(folder, config)
        except InputError as error:
            raise InputError(f"--model_path {error}") from None
        movqgan = find_movqgan(folder, movqgan_path)
        if movqgan.suffix == ".safetensors":
            _require_utf8("--movqgan_path", movqgan)
        return cls(folder, config, vocabulary, movqgan)

    def base_size(self, panels: int = 1) -> tuple[int, int]:
        """Width and height in pixels where the user gives none: square panels, one above the other, of the base size.

        Where the model does not see that many codes, the largest whose pixels together are no more than one image's of
        the base size: 512 × 1024 for the released weights, as in their examples.
        """
        side = self.config.base_size
        if panels > 1 and panels * (side // CODE_CELL) ** 2 > self.config.max_position_embeddings:
            side = max(GRID_UNIT, math.isqrt(side**2 // panels) // GRID_UNIT * GRID_UNIT)
        return side, panels * side

    def layout(
        self, width: int | None = None, height: int | None = None, task: Task = TASKS["t2i"]
    ) -> ImageLayout:
        """Where forced ids and codes go in an image of that size in pixels, all panels together (default: `base_size`).

        Raises:
            InputError: a side is not a multiple of 32 (the height: of 32 · panels), or too long; or `task` is no Task.
        """
        if not isinstance(task, Task):
            raise InputError(f"task must be one of prompts.TASKS or prompts.I2I_TASKS, got {excerpt(task)}")
        base, rule = self.base_size(task.panels), "must be a whole number of pixels"
        width = base[0] if width is None else whole_number("--width", width, None, None, rule)
        height = base[1] if height is None else whole_number("--height", height, None, None, rule)
        return ImageLayout.from_pixels(
            self.vocabulary, width, height, panels=task.panels, given_panels=task.given_panels
        )

    def prompt_ids(
        self, texts: Sequence[str], layout: ImageLayout, task: Task = TASKS["t2i"], shown: str | None = None,
        option: str = "--prompt",
    ) -> list[list[int]]:
        """The ids that each generation starts from, up to image start; `shown` as in `Task.instruction`.

        `option` is what messages call the texts.

        Raises:
            InputError: a text holds a special name, or prompt and image are longer than the model can see.
        """
        texts = [texts] if isinstance(texts, str) else texts
        for name, text in (*((option, text) for text in texts), ("--panel_prompt", shown or "")):
            if not isinstance(text, str):
                raise InputError(f"{name} must be text, got {type(text).__name__}; give a str")
        try:
            self.vocabulary.encode_text(shown or "")
        except InputError as error:
            raise InputError(f"--panel_prompt: {error}") from None
        size = pixel_size(layout)
        limit = self.config.max_position_embeddings
        of = "" if option == "--prompt" else f" of {option}"
        encoded = []
        for index, text in enumerate(texts):
            try:
                ids = generation_prompt(task.instruction(text, *size, shown), self.vocabulary)
            except InputError as error:
                raise InputError(f"{option} (number {index}): {error}") from None
            if len(ids) + layout.length > limit:
                raise InputError(
                    f"--width {size[0]} --height {size[1]} take {layout.length} ids and the prompt "
                    f"(number {index}{of}) {len(ids)}, but this model sees {limit}; "
                    "make the image smaller or the prompt shorter"
                )
            encoded.append(ids)
        return encoded


class Pipeline:
    """A loaded checkpoint that makes pictures.

        pipeline = Pipeline.from_pretrained("assets/demo")
        results = pipeline.generate("a hedgehog on a sky blue background", n=4)
        results[0].image.save("hedgehog.png")
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Transformer, image_tokenizer: ImageTokenizer,
        cache_dtype: torch.dtype | None = None, compile: bool = False,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.model = model
        self.image_tokenizer = image_tokenizer
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.cache_dtype = cache_dtype or self.dtype
        self.compiled = compile_forward(model) if compile else None
        self.forwards = 0  # of the last `sample`: what it cost

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        movqgan_path: str | Path | None = None,
        attn: str = "sdpa",
        quant: int | None = None,
        cache_dtype: torch.dtype | None = None,
        movqgan_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        on_read: Callable[[int, int], None] | None = None,
    ) -> "Pipeline":
        """Loads a local folder or a hub id in the released layout (or a checkpoint that was opened before).

        `quant` 32, 64 or 128 makes int4 weights of the layers' matrices while they are read, in groups of so many;
        a checkpoint of int4 weights needs no telling. `pipeline.model.config.int4_group` says what there is.
        `cache_dtype` torch.int8 holds keys and values in half the room of bf16 (default: the model's own).
        `movqgan_dtype`: decoding is a small part of the work, and in float32 (default) a picture depends on its codes
        alone; bf16 and fp16 halve the memory that it takes. `compile` compiles the steps, for each shape at its first
        use, which takes a minute or more; on CUDA they become graphs. `on_read` is told how many of the transformer's
        weights are read, and of how many.

        Raises:
            InputError: the device is not there, the checkpoint is none, a file is damaged or does not fit the others,
                or it cannot be quantized so.
        """
        device = resolve_device(device)
        attention.backend(attn)  # asked for here only to have its error before any weights are read
        if compile:
            require_compiler(device)
        if not isinstance(path, Checkpoint):
            checkpoint = Checkpoint.open(path, movqgan_path)
        else:
            checkpoint = replace(path, movqgan_path=find_movqgan(path.folder, movqgan_path or path.movqgan_path))
        dtype = resolve_dtype(dtype, device, checkpoint.config, quant)
        if attn == "flash" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
            raise InputError(
                f"--attn flash needs --device cuda and --dtype bf16 or fp16, got {device} and {dtype}; use --attn sdpa"
            )
        if attn == "flash" and cache_dtype == torch.int8:
            raise InputError("--attn flash reads no int8 cache; use --attn sdpa, or leave out --cache_dtype int8")
        image_tokenizer = ImageTokenizer.from_checkpoint(checkpoint.movqgan_path, device, movqgan_dtype)
        image_tokenizer.require_codes(checkpoint.config, checkpoint.movqgan_path)
        model = load_model(checkpoint.folder, dtype, device, attn, quant, on_read)
        if not checkpoint.config.tie_word_embeddings:
            model.lm_head.slice_columns(checkpoint.vocabulary.code_slice, int8=bool(model.config.int4_group))
        return cls(checkpoint, model.eval(), image_tokenizer, cache_dtype, compile)

    def generate(
        self, prompts: str | Sequence[str], width: int | None = None, height: int | None = None, **settings
    ) -> list[Result]:
        """Makes `n` images of each prompt; the settings are those of `stream`. Results are ordered by prompt."""
        return list(self.stream(prompts, width, height, **settings))

    def stream(
        self,
        prompts: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        n: int = 1,
        cfg: float = SamplingConfig.cfg,
        top_k: int = SamplingConfig.top_k,
        temperature: float = SamplingConfig.temperature,
        seed: int = SamplingConfig.seed,
        batch_size: int | None = None,
        on_row: OnRow | None = None,
        speculation: Speculation | None = None,
        share: tuple[int, int] = (0, 1),
        task: Task = TASKS["t2i"],
        panel: Panel | Sequence[Panel] | None = None,
        shown: str | None = None,
    ) -> Iterator[Result]:
        """Makes `n` images of each prompt and yields them batch by batch, as soon as they are done.

        An image depends on its prompt, its repeat (0 to n - 1), the seed and the settings; neither on the other
        prompts and their order, nor on `batch_size` (default: what keeps the cache within 1 GiB, at most 8).
        `width` and `height` are pixels, multiples of 32 (default: the checkpoint's base size). With `speculation`
        several codes come of one forward: the same image where its coupling is `noise`, else one of the same law.
        `share` (r, count) makes every count-th image from the r-th on, for one of several processes.

        `task` is one of prompts.TASKS, or of prompts.I2I_TASKS where the upper panel is given: `panel`, one for all
        prompts or one a prompt, is a picture or its path, which is cropped to it, or codes, which are kept as they are.
        `shown` says what the panel that the instruction describes displays, in place of the task's own words.

        Raises:
            InputError: before any work, when a prompt or a setting is out of its range.
        """
        texts = [prompts] if isinstance(prompts, str | bytes) else list(prompts)
        if not texts:
            raise InputError("--prompt must be given at least once")
        n, batch_size = check_counts(n, batch_size)
        first, every = check_share(share)
        settings = SamplingConfig(cfg=cfg, top_k=top_k, temperature=temperature, seed=seed)
        layout = self.checkpoint.layout(width, height, task)
        encoded = self.checkpoint.prompt_ids(texts, layout, task, shown)
        given = given_codes(panel, layout, len(texts), self.image_tokenizer)
        jobs = [Job(text, index, repeat) for index, text in enumerate(texts) for repeat in range(n)]
        jobs = jobs[first::every]
        size = batch_size or self.batch_size(max(map(len, encoded)), layout, settings, speculation)
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return self._run(batches, encoded, layout, settings, on_row, speculation, given)

    def with_window(self, speculation: Speculation | None) -> Speculation | None:
        """The same, with a window that suits this device and precision where none was chosen."""
        if speculation is None or speculation.window is not None:
            return speculation
        return replace(speculation, window=default_window(self.device, bool(self.model.config.int4_group)))

    def batch_size(
        self, start: int, layout: ImageLayout, settings: SamplingConfig, speculation: Speculation | None = None
    ) -> int:
        """How many images behind a start of so many ids make one batch when the caller does not say."""
        config, slots = self.checkpoint.config, start + layout.length
        image = (1 if settings.cfg == 1.0 else 2) * cache_bytes(config, slots, self.cache_dtype)
        if speculation:
            image += ring_bytes(layout, self.with_window(speculation))
        return max(1, min(_LARGEST_AUTO_BATCH, _CACHE_BUDGET // image))

    def _run(self, batches, encoded, layout, settings, on_row, speculation, given) -> Iterator[Result]:
        parts = self.checkpoint.config.parts(layout.panels)
        for batch in batches:
            report = None if on_row is None else _reporter(on_row, batch, layout)
            prompts, repeats = [job.prompt_index for job in batch], [job.repeat for job in batch]
            codes = self.sample(
                [encoded[prompt] for prompt in prompts], layout, settings, repeats, given=given[prompts],
                on_row=report, speculation=speculation,
            )  # fmt: skip
            for job, grid in zip(batch, codes, strict=True):
                # One by one: decoding needs by far the most memory a pixel, and a picture must not feel its neighbours.
                image = self.image_tokenizer.decode(grid[None], parts)[0]
                ids = encode_image(grid, self.checkpoint.vocabulary)
                yield Result(job, settings.seed, image, grid, ids, layout.panels)

    def sample(
        self,
        starts: Sequence[Sequence[int]],
        layout: ImageLayout,
        settings: SamplingConfig,
        repeats: Sequence[int],
        *,
        given: Tensor | None = None,
        on_row: Callable[[int, Tensor], None] | None = None,
        speculation: Speculation | None = None,
    ) -> Tensor:
        """Continues each of B starts (ids up to the image) with an image, all in one batch.

        `given` are the codes of panels that are not to be sampled, (B, layout.given).
        Shapes: -> codes (B, rows, cols) int64 on the CPU. Afterwards `self.forwards` tells how many steps it took.
        """
        speculation = self.with_window(speculation)
        step = self._step(starts, layout, settings, speculation)
        keys = [(settings.seed, repeat) for repeat in repeats]
        if speculation:
            codes = sample_jacobi(step, starts, layout, settings, keys, speculation, on_row, given=given)
        else:
            codes = sample(step, starts, layout, settings, keys, on_row, given=given)
        self.forwards = step.calls
        return codes.cpu()

    def _step(
        self, starts: Sequence[Sequence[int]], layout: ImageLayout, settings: SamplingConfig,
        speculation: Speculation | None,
    ) -> CachedStep:  # fmt: skip
        rows = len(starts) * (1 if settings.cfg == 1.0 else 2)
        length = max(map(len, starts)) + layout.length
        spare = spare_slots(layout, speculation.window) if speculation else 0
        spare += COMPILED_SPARE if self.compiled else 0
        cache = KVCache(self.checkpoint.config, rows, length, self.cache_dtype, self.device, spare)
        return CachedStep(self.model, cache, self.checkpoint.vocabulary.code_slice, self.compiled)

    def fastest(
        self, start: Sequence[int], layout: ImageLayout, settings: SamplingConfig, images: int = 1, batches: int = 1
    ) -> Speculation | None:
        """The way of sampling with the most codes a second here for batches of `images` (None: one code a forward).

        It times a few forwards of each; what it returns is exact, and no setting that changes the weights. Where all
        `batches` would take so long that compiling may pay, it tries that too, and keeps to it if that saves more than
        what is left to compile will take.
        """
        given = torch.zeros((images, layout.given), dtype=torch.long)
        trial = partial(fastest, partial(self._step, [start] * images, layout, settings), [start] * images, layout,
                        settings, given)  # fmt: skip
        choice, seconds = trial()
        whole = seconds[choice] * (layout.num_codes - layout.given) * batches
        if self.compiled is None and whole > _COMPILING_MAY_PAY and has_compiler(self.device):
            self.compiled, began = compile_forward(self.model), time.perf_counter()
            try:
                _, compiled = trial(choices=[choice])
            except (RuntimeError, OSError) as error:  # an option's option must not end a run
                logger.warning("--fast goes on without --compile: %s", str(error).strip().split("\n")[0])
                compiled = {choice: math.inf}
            still = _OTHER_SHAPES * (time.perf_counter() - began)
            if whole * (1 - compiled[choice] / seconds[choice]) < still:
                self.compiled = None
                torch.compiler.reset()
        return choice

    def preview(self, codes: Tensor, layout: ImageLayout) -> list[Image.Image]:
        """Pictures of full size from the first rows of their codes (B, rows so far, cols); the rest is grey."""
        pictures, whole = [], layout.rows // self.checkpoint.config.parts(layout.panels)
        for grid in codes:
            picture = Image.new("RGB", pixel_size(layout), (128, 128, 128))
            for part, rows in enumerate(grid.split(whole)):
                picture.paste(self.image_tokenizer.decode(rows[None])[0], (0, part * whole * CODE_CELL))
            pictures.append(picture)
        return pictures


def _reporter(on_row: OnRow, batch: Sequence[Job], layout: ImageLayout) -> Callable[[int, Tensor], None]:
    return lambda row, codes: on_row(RowsDone(tuple(batch), codes, layout))


def _require_utf8(option: str, path: str | Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{option} {path} must be UTF-8, which the libraries that read weights and tokenizers need; "
                         "rename the folder, or give a link to it") from None  # fmt: skip
