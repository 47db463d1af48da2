"""Turns requests into images: the only module where vocabulary, sampler, model and image tokenizer meet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.answers import unfinished
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.conversation import AnswerStream, Conversation
from lumina_mgpt.describing import describe
from lumina_mgpt.devices import (
    activation_bytes,
    batch_limit,
    cache_bytes,
    default_window,
    largest_batch,
    resolve_device,
    resolve_dtype,
)
from lumina_mgpt.errors import InputError
from lumina_mgpt.image_tokenizer import load_image_tokenizer
from lumina_mgpt.loading import check_backend, check_flash, check_format, kept_columns, opened
from lumina_mgpt.model.compiled import compile_forward, compiled_spare
from lumina_mgpt.model.kv_cache import CUDA_SLOTS, KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep, cuda_width
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.panels import Panel
from lumina_mgpt.preparation import Checkpoint, PreparedRequest
from lumina_mgpt.request import GenerationRequest, ImageJob
from lumina_mgpt.results import Answer, Result, RowsDone
from lumina_mgpt.sampling.autoregressive import Kept, sample
from lumina_mgpt.sampling.jacobi import ring_bytes, sample_jacobi, spare_slots, window_ids
from lumina_mgpt.sampling.noise import Key
from lumina_mgpt.unirep import ImageLayout, encode_image, turn_list
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from lumina_mgpt.model.parallel import Parallel

_LOGIT_COPIES = 8  # float32 numbers of the sampler for each logit of a forward

OnRow = Callable[[RowsDone], None]


class Pipeline:
    """A loaded checkpoint that generates images.

    pipeline = Pipeline.from_pretrained("assets/demo")
    results = pipeline.generate("a hedgehog on a sky blue background", n=4)
    results[0].image.save("hedgehog.png")

    Attributes:
        compiled: the compiled forward of the model, None if the model runs eagerly.
        cuda_graphs: on CUDA, whether steps are captured as graphs.
        parallel: this process among those that hold the model together, None if the process holds all of it.
        forwards: number of forwards in the last call of `sample`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Transformer,
        image_tokenizer: ImageTokenizer,
        cache_dtype: torch.dtype | None = None,
        compile: bool = False,
        cuda_graphs: bool = True,
        parallel: "Parallel | None" = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.image_tokenizer = image_tokenizer
        self.parallel = parallel
        self.device, self.dtype = model.device, next(model.parameters()).dtype
        self.cache_dtype = cache_dtype or self.dtype
        self.compiled = compile_forward(model) if compile else None
        self.cuda_graphs = cuda_graphs
        self.forwards = 0
        self._streams = 0  # iterators of `stream` that have begun and not ended
        self._kept: tuple[tuple, CachedStep] | None = None  # shape and step of the last batch of a stream, on CUDA

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path | Checkpoint,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        movqgan_path: str | Path | None = None,
        attn: str = "sdpa",
        quant: int | None = None,
        cache_dtype: torch.dtype | None = None,
        movqgan_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        cuda_graphs: bool = True,
        on_read: Callable[[int, int], None] | None = None,
        parallel: "Parallel | None" = None,
        text: bool | None = None,
    ) -> "Pipeline":
        """Loads a checkpoint.

        Args:
            model_path: a local folder in the released layout, a hub id, or an opened checkpoint.
            attn: attention backend, `sdpa` or `flash`.
            quant: quantize the layers' matrices to int4 while loading, in groups of this size: 32, 64 or 128. A
                checkpoint with int4 weights needs no value. `pipeline.model.config.int4_group` is the size in use.
            cache_dtype: type of cached keys and values (default: the model's). torch.int8 takes half of bf16's memory.
            movqgan_dtype: type of the image tokenizer's decoder. With float32 the image is a function of its codes
                alone; bf16 and fp16 take half the memory. Encoder and codebook are at least float32.
            compile: compile the model's forward at the first use of each shape, which takes a minute or more. The
                flash backend cannot be compiled.
            cuda_graphs: on CUDA, capture each shape of a step as a graph at its second use. Later steps of the shape
                start with one launch. A model in several processes is not captured.
            on_read: called with the number of weights read so far and their total.
            parallel: this process among those that hold the model together, as `model.parallel.Parallel.start` gives
                it. `device` is then `parallel.device`. All these processes make the same calls with the same arguments
                and get the same results.
            text: whether the model can write text, which needs the output projection of the whole vocabulary
                (default: whether models of the checkpoint's family are trained to). Without, memory holds that of the
                image codes alone, as it does if several processes hold the model together.

        Raises:
            InputError: the device or the checkpoint is missing, a file is damaged or does not fit the others, or the
                weights cannot be quantized or split with these settings.
        """
        device = resolve_device(device)
        check_backend(attn, device, compile)
        check_format("cache_dtype", cache_dtype or torch.float32, torch.int8)
        check_format("movqgan_dtype", movqgan_dtype)
        checkpoint = opened(model_path, movqgan_path)
        config = checkpoint.config
        dtype = resolve_dtype(dtype, device, config, quant)
        if parallel:
            parallel.require_fit(config, quant, compile)
        if attn == "flash":
            check_flash(device, dtype, cache_dtype)
        kind = config.family.image_tokenizer
        image_tokenizer = load_image_tokenizer(checkpoint.folder, checkpoint.movqgan_path, device, movqgan_dtype, kind)
        image_tokenizer.require_codes(config, image_tokenizer.source)
        model = load_model(checkpoint.folder, dtype, device, attn, quant, on_read, config=config, parallel=parallel)
        if not config.tie_word_embeddings:
            model.lm_head.slice_columns(kept_columns(checkpoint, text, parallel), bool(model.config.int4_group))
        return cls(checkpoint, model.eval(), image_tokenizer, cache_dtype, compile, cuda_graphs, parallel)

    def generate(
        self,
        prompts: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        *,
        on_row: OnRow | None = None,
        **settings: Any,
    ) -> list[Result]:
        """Returns `n` images of each prompt, ordered by prompt.

        Args:
            on_row: called with a `RowsDone` each time a row of a batch is final.
            settings: other arguments of `GenerationRequest.of`, such as `n`.
        """
        return list(self.stream(GenerationRequest.of(prompts, width, height, **settings), on_row))

    def stream(
        self,
        request: GenerationRequest | PreparedRequest,
        on_row: OnRow | None = None,
        jobs: Sequence[ImageJob] | None = None,
    ) -> Iterator[Result]:
        """Returns an iterator over the images of a request, which samples a batch at a time.

        Args:
            on_row: called with a `RowsDone` each time a row of a batch is final.
            jobs: the images to make, of the request's prompts and any repeats (default: `request.jobs`).

        Raises:
            InputError: the request does not fit the checkpoint. The call itself raises it, before any sampling.
        """
        prepared = request if isinstance(request, PreparedRequest) else self.checkpoint.prepare(request)
        request = prepared.request
        if request.task.views > 1:
            raise InputError("must make one image an answer here; use Pipeline.chat with want='images'", "task")
        size = request.batch_size or self.batch_size(
            max(map(len, prepared.starts)), prepared.layout, request.sampling, request.speculation
        )
        prepared, given = self.encode(prepared)
        jobs = request.jobs if jobs is None else jobs
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return self._batches(batches, prepared, given, on_row)

    def _batches(
        self, batches: Sequence[Sequence[ImageJob]], prepared: PreparedRequest, given: Tensor, on_row: OnRow | None
    ) -> Iterator[Result]:
        """Yields the images of all batches. Meanwhile, the step of the last batch is kept for batches of its shape."""
        self._streams += 1
        try:
            for batch in batches:
                yield from self._batch(batch, prepared, given, on_row)
        finally:
            self._streams -= 1
            self._kept = None

    def encode(self, prepared: PreparedRequest) -> tuple[PreparedRequest, Tensor]:
        """Encodes the given pictures of a request: `Checkpoint.encode`."""
        prepared, given = self.checkpoint.encode(prepared, self.image_tokenizer)
        return prepared, self.parallel.of_first(given) if self.parallel else given

    @property
    def writes_text(self) -> bool:
        """Whether the model can write text: whether it holds the output projection of the whole vocabulary."""
        return self.parallel is None and self.model.lm_head.columns is None

    def conversation(
        self, turns: Sequence[tuple[str, Sequence[str | Panel]]] = (), ids: Sequence[int] = ()
    ) -> Conversation:
        """Returns a conversation, whose cache goes on from turn to turn. Arguments and errors: see `Conversation`."""
        return Conversation(self, turns, ids)

    def chat(self, turns: Sequence[tuple[str, Sequence[str | Panel]]], **settings: Any) -> AnswerStream:
        """Returns an iterator over the events of the model's answer to a conversation.

        Args:
            turns: (role, parts) of each turn, "human" and "assistant" in turn; the last one is the human's. Parts are
                texts (`str`), pictures (PIL), paths (`Path`) and codes (rows, cols).
            settings: other arguments of `Conversation.say`, such as `want`, `size` and the fields of `SamplingConfig`.

        Raises:
            InputError: the turns or a setting do not fit the checkpoint. The call itself raises it.
        """
        *earlier, (role, parts) = turn_list(turns) or [("nobody", [])]
        if len(earlier) % 2 or role != "human":
            raise InputError(f"must end with a turn of the human, got {len(turns)} turns; remove the answer", "turns")
        return self.conversation(earlier).say(parts, **settings)

    def answer(self, turns: Sequence[tuple[str, Sequence[str | Panel]]], **settings: Any) -> Answer:
        """Returns the model's whole answer to a conversation. Arguments and errors: as `chat`."""
        stream = self.chat(turns, **settings)
        for _ in stream:
            pass
        return stream.answer

    def describe(self, pictures: Sequence[Panel], question: str, **settings: Any) -> Iterator[Answer]:
        """Returns an iterator over the answers in text to one question about each picture.

        Arguments and errors: see `describing.describe`.
        """
        return describe(self, pictures, question, **settings)

    def _batch(
        self, jobs: Sequence[ImageJob], prepared: PreparedRequest, given: Tensor, on_row: OnRow | None
    ) -> Iterator[Result]:
        """Yields the images of one batch. Shapes: given (prompts, layout.given)."""
        layout, sampling = prepared.layout, prepared.request.sampling
        prompts = [job.prompt_index for job in jobs]
        codes = self.sample(
            [prepared.starts[prompt] for prompt in prompts],
            layout,
            sampling,
            [job.repeat for job in jobs],
            given=given[prompts],
            on_row=None if on_row is None else lambda row, rows: on_row(RowsDone(tuple(jobs), rows, layout)),
            speculation=prepared.request.speculation,
        )
        yield from (self.result(job, sampling.seed, grid, layout) for job, grid in zip(jobs, codes, strict=True))

    def result(self, job: ImageJob, seed: int, codes: Tensor, layout: ImageLayout) -> Result:
        """Decodes one image alone, as decoding has the highest peak of memory. Shapes: codes (rows, cols)."""
        image = self.image_tokenizer.decode(codes[None], self.checkpoint.config.parts(layout.panels))[0]
        return Result(job, seed, image, codes, encode_image(codes, self.checkpoint.vocabulary), layout.panels)

    def with_window(self, speculation: Speculation | None) -> Speculation | None:
        """Returns `speculation`; where its `window` is None, with the default window of this device and precision."""
        if speculation is None or speculation.window is not None:
            return speculation
        return replace(speculation, window=default_window(self.device, bool(self.model.config.int4_group)))

    def batch_size(
        self,
        start: int,
        layout: ImageLayout,
        settings: SamplingConfig,
        speculation: Speculation | None = None,
        largest: int | None = None,
    ) -> int:
        """Returns the automatic batch size: as many images as fit, 1 to `largest`, or to `largest_batch`.

        On a CUDA GPU, an image takes its part of the cache and of a forward's temporaries. The images may take 90 % of
        the free memory, less what the image tokenizer needs to decode one image. Elsewhere, only the cache counts, and
        its limit is 1 GiB.

        Args:
            start: number of ids of the longest prompt, up to image start.
        """
        config, slots = self.checkpoint.config, start + layout.length
        rows = 1 if settings.cfg == 1.0 else 2
        image = rows * cache_bytes(config, slots, self.cache_dtype)
        image //= self.parallel.size if self.parallel else 1
        speculation = self.with_window(speculation)
        if speculation:
            image += ring_bytes(layout, speculation)
        if self.device.type == "cuda":
            drafts = (speculation and speculation.window) or 1
            ids = max(start + layout.given + layout.rows, drafts)  # of the first forward, or of a later one
            image += rows * activation_bytes(config, ids, self.dtype)
            image += rows * 4 * _LOGIT_COPIES * drafts * config.num_image_codes
        width, height = layout.size
        limit = batch_limit(self.device, self.image_tokenizer.working_bytes(width * height))
        if self.parallel:  # all processes need the same batches
            limit = self.parallel.least(limit)
        return max(1, min(largest or largest_batch(self.device, bool(speculation)), limit // image))

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
        keys: Sequence[Key] | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Returns the codes of B images, one for each of `starts`, sampled in one batch.

        Args:
            starts: the prompt's ids of each image, up to image start.
            repeats: `ImageJob.repeat` of each image; it and the seed determine the noise of the image.
            given: codes of the given panels (B, layout.given).
            on_row: called when a row is final, with its index and the codes so far, (B, index + 1, cols).
            keys: (seed, repeat) of each image (default: the seed of `settings` and `repeats`).
            kept: drops images from the running batch; see `autoregressive.sample`. The result lacks the dropped images.

        Shapes: -> (B, rows, cols) int64 on the CPU.
        """
        speculation = self.with_window(speculation)
        step = self.make_step(starts, layout, settings, speculation)
        keys = [(settings.seed, repeat) for repeat in repeats] if keys is None else keys
        if kept is not None:
            self._kept, kept = None, step.dropping(len(starts), kept)  # such a step is not used again
        sampler = partial(sample_jacobi, speculation=speculation) if speculation else sample
        codes = sampler(step, starts, layout, settings, keys, on_row=on_row, given=given, kept=kept)
        self.forwards, codes = step.calls, codes.cpu()
        if self.parallel:
            self.parallel.require_same(codes)
        return codes

    def make_step(
        self,
        starts: Sequence[Sequence[int]],
        layout: ImageLayout,
        settings: SamplingConfig,
        speculation: Speculation | None,
    ) -> CachedStep:
        """Returns a callable that runs the model for one batch, with an empty KV cache.

        On CUDA, a stream of several batches uses one step with its cache and its graphs for all batches of one shape.

        Args:
            starts: the prompt's ids of each image, up to image start.
            speculation: None, or settings whose `window` is a number.
        """
        rows, length = len(starts) * (1 if settings.cfg == 1.0 else 2), max(map(len, starts)) + layout.length
        window = speculation.window if speculation and speculation.window else 0
        spare = spare_slots(layout, window) if window else 0
        if self.device.type == "cuda":
            return self._cuda_step(rows, length, spare, cuda_width(window_ids(layout, window) if window else 0))
        spare = compiled_spare(length, spare) if self.compiled else spare
        cache = KVCache(self.model.config, rows, length, self.cache_dtype, self.model.layer_devices, spare)
        return CachedStep(self.model, cache, self.checkpoint.vocabulary.code_slice, self.compiled)

    def _cuda_step(self, rows: int, length: int, spare: int, width: int) -> CachedStep:
        """Returns the kept step if it has this shape, with an empty cache, else a new step.

        A new step captures its graphs again, about ten of them, and each takes a few steps' time.
        """
        config, spare = self.model.config, max(spare, width)
        # Rotary angles that are scaled depend on the length itself.
        slots = -(-(length + spare) // CUDA_SLOTS) if config.rope_scaling is None else length
        shape = (rows, slots, width, self.compiled)
        if self._kept is not None and self._kept[0] == shape:
            self._kept[1].restart()
            return self._kept[1]
        self._kept = None  # frees its cache before another one is made
        cache = KVCache(config, rows, length, self.cache_dtype, self.model.layer_devices, spare)
        columns = self.checkpoint.vocabulary.code_slice
        step = CachedStep(
            self.model, cache, columns, self.compiled, width=width, graphs=self.cuda_graphs and not self.parallel
        )
        if self._streams:
            self._kept = shape, step
        return step

    def preview(self, codes: Tensor, layout: ImageLayout) -> list[Image.Image]:
        """Returns pictures of unfinished images, as `answers.unfinished` draws them."""
        return unfinished(codes, layout, self.image_tokenizer, self.checkpoint.config.parts(layout.panels))
