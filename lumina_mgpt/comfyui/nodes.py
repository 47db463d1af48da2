"""The nodes: thin adapters over `GenerationRequest` and `Pipeline`. No node knows a sampler.

A run ends at the next forward of the model after the user has stopped it. Errors are `InputError`, whose line ComfyUI
shows at the node.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lumina_mgpt.comfyui import checkpoints, host, inputs
from lumina_mgpt.comfyui.checkpoints import Model
from lumina_mgpt.comfyui.pictures import to_batch, to_pictures
from lumina_mgpt.describing import MAX_NEW_TOKENS
from lumina_mgpt.editing import turns_of
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FIRST, SECOND
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.results import Result, RowsDone

_CATEGORY = "Lumina-mGPT"
_MOST = 64  # images of one prompt
# An answer with several views is a conversation of several images, which these nodes do not make.
_TASKS = [name for name, task in {**SECOND.tasks, **FIRST.tasks}.items() if task.views == 1]
_I2I_TASKS = list({**SECOND.i2i_tasks, **FIRST.i2i_tasks})


class LoadCheckpoint:
    """Opens a checkpoint. Its weights are read when a node first uses them."""

    RETURN_TYPES = (inputs.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "Opens a checkpoint of Lumina-mGPT in ComfyUI's models/lumina_mgpt. Weights are read at the first use."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, inputs.Inputs]:
        device = "auto: the device that ComfyUI uses."
        dtype = "Number format of the transformer. auto: bf16 on CUDA, fp16 on Apple GPUs, fp32 on a CPU."
        quant = "Quantize weights to int4 while loading, in groups of this size. Smaller groups are more accurate."
        cache = "Number format of cached keys and values. int8: half the memory of bf16."
        choices: dict[str, tuple[Sequence[str], str]] = {
            "checkpoint": (checkpoints.names(), "A folder in models/lumina_mgpt, or the small demo."),
            "device": (checkpoints.DEVICES, device),
            "dtype": (checkpoints.FORMATS, dtype),
            "quant": (checkpoints.QUANTS, quant),
            "cache": (checkpoints.CACHES, cache),
        }
        described = {
            name: (list(values), {"default": values[0], "tooltip": tip}) for name, (values, tip) in choices.items()
        }
        return {"required": described}

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, **_: Any) -> str:
        """Returns a value that changes with the checkpoint's files, so that ComfyUI opens it again."""
        return str(checkpoints.fingerprint(checkpoints.folder_of(checkpoint)))

    def load(self, checkpoint: str, device: str, dtype: str, quant: str, cache: str) -> tuple[Model]:
        return (checkpoints.open_model(checkpoint, device, dtype, quant, cache),)


class TextToImage:
    """Generates images of a prompt; with the name of a map as task, each with that map below it."""

    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("image", "result")
    FUNCTION = "generate"
    CATEGORY = _CATEGORY
    DESCRIPTION = "Generates images of a prompt. result: the lowest panel, such as the map of a task with a map."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, inputs.Inputs]:
        task = "t2i: an image. A map: an image and that map below it. The tasks depend on the checkpoint."
        return {
            "required": {
                **inputs.model(),
                **inputs.text("prompt", "a hedgehog on a sky blue background", "What the image shows."),
                "task": (_TASKS, {"default": "t2i", "tooltip": task}),
                **inputs.size(),
                "count": inputs.whole(1, 1, _MOST, "Images of the prompt."),
                **inputs.sampling(),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None, height: int | None) -> bool | str:
        """Returns True or an error, which ComfyUI shows before it runs anything."""
        return inputs.check_size(width=width, height=height)

    def generate(
        self, model: Model, prompt: str, task: str, count: int, preview: bool, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        chosen = model.checkpoint.config.family.task(task)
        request = GenerationRequest.of(prompt, task=chosen, n=count, **inputs.request_settings(**settings))
        return _batches(_generate(model, request, preview))


class ImageTask:
    """Generates images for given pictures: an image for a map, the map of an image, another image of a subject."""

    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("result", "panels")
    FUNCTION = "generate"
    CATEGORY = _CATEGORY
    DESCRIPTION = "Generates an image for each given picture. panels: the given picture with the result below it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, inputs.Inputs]:
        task = "A map: an image for it. predict_...: the map of the picture. The tasks depend on the checkpoint."
        return {
            "required": {
                **inputs.model(),
                "image": ("IMAGE", {"tooltip": "The pictures; their centers are cropped to the size that fits."}),
                "task": (_I2I_TASKS, {"default": "depth", "tooltip": task}),
                **inputs.text("prompt", "", "What the result shows; predict_... needs none."),
                **inputs.size(),
                "count": inputs.whole(1, 1, _MOST, "Images for each picture."),
                **inputs.sampling(cfg=-1.0),
            },
            "optional": inputs.text("shown", "", "What the described panel displays, instead of the task's own text."),
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None, height: int | None) -> bool | str:
        """Returns True or an error, which ComfyUI shows before it runs anything."""
        return inputs.check_size(width=width, height=height)

    def generate(
        self,
        model: Model,
        image: Tensor,
        task: str,
        prompt: str,
        count: int,
        preview: bool,
        shown: str = "",
        **settings: Any,
    ) -> tuple[Tensor, Tensor]:
        chosen = model.checkpoint.config.family.task(task, i2i=True)
        if not prompt.strip() and not chosen.wordless:
            raise InputError(f"must not be empty for the task {task}; say what the result shows", "prompt")
        pictures = to_pictures(image)
        request = GenerationRequest.of(
            (prompt,) * len(pictures),
            panel=pictures,
            task=chosen,
            n=count,
            shown=shown.strip() or None,
            **inputs.request_settings(**settings),
        )
        images, results = _batches(_generate(model, request, preview))
        return results, images


class Edit:
    """Edits pictures in several turns. Each turn edits the codes of the previous result, so no error accumulates."""

    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("image", "turns")
    FUNCTION = "edit"
    CATEGORY = _CATEGORY
    DESCRIPTION = "Changes pictures as instructed, a line a turn. turns: the result of every turn, picture by picture."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, inputs.Inputs]:
        tip = "What to change, one line a turn. Turn t, counted from 1, has the seed plus t - 1."
        return {
            "required": {
                **inputs.model(),
                "image": ("IMAGE", {"tooltip": "The pictures; their centers are cropped to the size that fits."}),
                **inputs.text("instructions", "make the background red", tip),
                **inputs.size(),
                **inputs.sampling(),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, width: int | None, height: int | None, instructions: str | None) -> bool | str:
        """Returns True or an error, which ComfyUI shows before it runs anything."""
        if instructions is not None and not instructions.strip():
            return "instructions must not be empty; write what to change, one line a turn"
        return inputs.check_size(width=width, height=height)

    def edit(
        self, model: Model, image: Tensor, instructions: str, preview: bool, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        turns = [line.strip() for line in instructions.splitlines() if line.strip()]
        if not turns:
            raise InputError("must not be empty; write what to change, one line a turn", "instructions")
        task, pictures = model.checkpoint.config.family.task("edit", i2i=True), to_pictures(image)
        common = {"task": task, "batch_size": 1, **inputs.request_settings(**settings)}
        # Errors of the request are raised before the weights are read.
        requests = [GenerationRequest.of(turns, panel=picture, **common) for picture in pictures]
        prepared = [model.checkpoint.prepare(request, "instructions") for request in requests]
        requests[0].sampling.with_seeds(len(turns))
        last, every = [], []
        with _running(model) as pipeline:
            pipeline.image_tokenizer.require_decoder()
            show = _rows_shower(pipeline, prepared[0], len(pictures) * len(turns), preview)
            for one in prepared:
                every += [turn.result for turn in turns_of(pipeline, one, show)]
                last.append(every[-1])
        return to_batch(last), to_batch(every)


class Describe:
    """Answers a question about each picture, in text."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("text",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "describe"
    CATEGORY = _CATEGORY
    DESCRIPTION = "Answers a question about each picture. It needs a checkpoint that is trained to write text."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, inputs.Inputs]:
        return {
            "required": {
                **inputs.model(),
                "image": ("IMAGE", {"tooltip": "The pictures; each has an answer of its own."}),
                **inputs.text("question", "Describe the image in detail.", "What to say about each picture."),
                "max_new_tokens": inputs.whole(MAX_NEW_TOKENS, 1, 8192, "Largest number of ids of an answer."),
                **inputs.seed(),
                "temperature": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.01, "max": 100.0, "step": 0.1, "round": 0.001},
                ),
                "top_k": inputs.whole(10, 1, 1 << 20, "Sample from this many most probable ids. 1: the most probable."),
            }
        }

    def describe(
        self,
        model: Model,
        image: Tensor,
        question: str,
        max_new_tokens: int,
        seed: int,
        temperature: float,
        top_k: int,
    ) -> tuple[list[str]]:
        family = model.checkpoint.config.family
        if not family.answers_in_text:
            raise InputError(f"must be trained to write text, but {family.name} is not; load another", "model")
        pictures = to_pictures(image)
        bar, texts, forwards = host.Bar(len(pictures) * max_new_tokens), list[str](), 0

        def on_forward() -> None:
            nonlocal forwards
            host.raise_if_interrupted()
            bar.move_to(len(texts) * max_new_tokens + min(forwards, max_new_tokens))
            forwards += 1

        with _running(model) as pipeline, host.before_each_forward(pipeline.model, on_forward):
            sampling = {"seed": seed, "text_temperature": temperature, "text_top_k": top_k}
            for answer in pipeline.describe(pictures, question, max_new_tokens=max_new_tokens, **sampling):
                texts.append(answer.text)
                forwards = 0
        bar.move_to(len(pictures) * max_new_tokens)
        return (texts,)


@contextlib.contextmanager
def _running(model: Model) -> Iterator[Pipeline]:
    """Gives the pipeline of a model, whose forwards end the block once the user has stopped the run.

    ComfyUI runs nodes in torch's inference mode. It is off here, because the weights stay for later runs, and tensors
    made in that mode cannot be changed outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        pipeline = model.pipeline()
        with host.before_each_forward(pipeline.model, host.raise_if_interrupted):
            yield pipeline


def _generate(model: Model, request: GenerationRequest, preview: bool) -> list[Result]:
    """Returns the images of a request. Errors of the request are raised before the weights are read."""
    prepared = model.checkpoint.prepare(request, "prompt")
    with _running(model) as pipeline:
        pipeline.image_tokenizer.require_decoder()
        return list(pipeline.stream(prepared, _rows_shower(pipeline, prepared, len(request.jobs), preview)))


def _rows_shower(pipeline: Pipeline, prepared: PreparedRequest, images: int, preview: bool) -> Any:
    """Returns an `on_row` that moves the progress bar, and shows the first image of the batch as far as it is sampled.

    Args:
        images: number of images of the run, all with the layout of `prepared`.
    """
    layout = prepared.layout
    bar = host.Bar(images * (layout.num_codes - layout.given) // layout.cols)

    def on_row(done: RowsDone) -> None:
        host.raise_if_interrupted()
        picture = (lambda: pipeline.preview(done.codes[:1], done.layout)[0]) if preview else None
        bar.advance(len(done.jobs), picture)

    return on_row


def _batches(results: Sequence[Result]) -> tuple[Tensor, Tensor]:
    """Returns the whole images, and their lowest panels."""
    return to_batch([result.image for result in results]), to_batch([result.panel for result in results])


NODE_CLASS_MAPPINGS = {
    "LuminaMGPTLoadCheckpoint": LoadCheckpoint,
    "LuminaMGPTTextToImage": TextToImage,
    "LuminaMGPTImageTask": ImageTask,
    "LuminaMGPTEdit": Edit,
    "LuminaMGPTDescribe": Describe,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LuminaMGPTLoadCheckpoint": "Load Lumina-mGPT Checkpoint",
    "LuminaMGPTTextToImage": "Lumina-mGPT Text to Image",
    "LuminaMGPTImageTask": "Lumina-mGPT Image Task",
    "LuminaMGPTEdit": "Lumina-mGPT Edit",
    "LuminaMGPTDescribe": "Lumina-mGPT Describe",
}
