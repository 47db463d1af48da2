"""Translates the arguments of `generate` to the project's samplers. No sampling happens here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lumina_mgpt.checks import excerpt, require, whole_number
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.conversation import MAX_NEW_TOKENS, Conversation
from lumina_mgpt.describing import answer_prompts
from lumina_mgpt.errors import InputError
from lumina_mgpt.hf.body import Body
from lumina_mgpt.hf.ids import begun_image, begun_layout, padded, unpadded
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.request import image_count
from lumina_mgpt.unirep import ImageLayout, encode_image
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

MODES = ("text", "image", "any")
_TEXT_BATCH = 8  # rows of text that are sampled together, as in `describing`
# Fields of a GenerationConfig that have no effect here.
_WITHOUT_EFFECT = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}


def generate(
    transformer: Body,
    checkpoint: Checkpoint,
    load: Callable[[], ImageTokenizer],
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    generation_mode: str = "text",
    height: int | None = None,
    width: int | None = None,
    generation_config: GenerationConfig | None = None,
    batch_size: int | None = None,
    speculative: bool | str | Speculation = False,
    **settings: Any,
) -> Tensor:
    """Returns ids that the model samples.

    Args:
        load: returns the image tokenizer. The mode "text" needs none.
        input_ids, attention_mask: prompts, with pads at either side.
        generation_mode: "text" answers without images, "image" draws one image, "any" lets the model choose.
        height, width: size of the image in pixels, where the ids do not end with an image's start and size (default:
            `Checkpoint.base_size`). Only for the mode "image".
        generation_config: values for `settings` that are not given.
        batch_size: number of rows that are sampled together (default: chosen by memory).
        speculative: True, the name of a coupling, or the settings of speculative sampling of image codes.
        settings: `guidance_scale`, `top_k`, `temperature`, `text_top_k`, `text_temperature` (fields of
            `SamplingConfig`; in the mode "text", `top_k` and `temperature` are those of text; defaults: those of the
            checkpoint's family), `do_sample` (False: the most probable id), `seed` or `generator`,
            `num_return_sequences`, and `max_new_tokens`, which does not limit the mode "image".

    Shapes: input_ids, attention_mask (B, T) -> (B · num_return_sequences, N). In the mode "image", rows are the ids of
        the images alone. In the others, rows are the prompts, then the answers with pads at their right.

    Raises:
        InputError: an argument is unknown, out of range, or does not fit the prompts or the checkpoint.
    """
    if input_ids is None:
        raise InputError("must be given; the processor makes them of texts and pictures", "input_ids")
    rows = unpadded(input_ids, attention_mask, checkpoint.vocabulary)
    settings = _from_config(generation_config) | {name: value for name, value in settings.items() if value is not None}
    wanted = _wanted(generation_mode, settings, batch_size, speculative, checkpoint)
    tokenizer: Any = None if wanted.mode == "text" else load()
    # A graph would replay addresses of weights that accelerate has moved.
    pipeline = Pipeline(checkpoint, transformer, tokenizer, cuda_graphs=not transformer.dispatched)
    if wanted.mode == "image":
        return _images(pipeline, rows, (width, height), wanted).to(input_ids.device)
    for name, side in (("height", height), ("width", width)):
        require(side is None, name, side, f"must be left out with generation_mode={generation_mode}")
    if any(begun_image(row, checkpoint.vocabulary)[1] for row in rows):
        raise InputError(f"must not end inside an image with generation_mode={generation_mode}", "input_ids")
    answers = _answers(pipeline, rows, wanted)
    prompts = torch.atleast_2d(input_ids).repeat_interleave(wanted.count, 0)
    return torch.cat([prompts, padded(answers, checkpoint.vocabulary.bos_id).to(prompts)], 1)


@dataclass(frozen=True)
class _Wanted:
    """What a call asks for.

    Attributes:
        mode: one of MODES.
        count: number of results for each prompt.
        limit: largest number of ids of an answer.
        batch_size: number of rows that are sampled together; None for an automatic number.
    """

    mode: str
    count: int
    limit: int
    batch_size: int | None
    sampling: SamplingConfig
    speculation: Speculation | None


def _images(
    pipeline: Pipeline, rows: Sequence[Sequence[int]], size: tuple[int | None, int | None], wanted: _Wanted
) -> Tensor:
    """Returns the ids of `wanted.count` images for each prompt. Shapes: -> (B · count, layout.length)."""
    checkpoint, sampling, speculation = pipeline.checkpoint, wanted.sampling, wanted.speculation
    starts, layout, given = _begun(rows, size, checkpoint)
    longest, context = max(map(len, starts)), checkpoint.config.context
    if longest + layout.length > context:
        width, height = layout.size
        rule = f"take {layout.length} ids and the prompt {longest}, but this model sees {context}"
        raise InputError(f"width={width} height={height} {rule}; make the image smaller or the prompt shorter")
    step = wanted.batch_size or pipeline.batch_size(longest, layout, sampling, speculation)
    jobs = [(row, repeat) for row in range(len(starts)) for repeat in range(wanted.count)]
    images = []
    for batch in (jobs[at : at + step] for at in range(0, len(jobs), step)):
        prompts, repeats = [row for row, _ in batch], [repeat for _, repeat in batch]
        codes = pipeline.sample(
            [starts[row] for row in prompts],
            layout,
            sampling,
            repeats,
            given=given[prompts],
            speculation=speculation,
        )
        images += [encode_image(grid, checkpoint.vocabulary) for grid in codes]
    return torch.tensor(images)


def _begun(
    rows: Sequence[Sequence[int]], size: tuple[int | None, int | None], checkpoint: Checkpoint
) -> tuple[list[list[int]], ImageLayout, Tensor]:
    """Returns the prompts up to image start, the layout of the images, and their codes in the ids.

    Shapes: -> given (B, layout.given).
    """
    vocabulary = checkpoint.vocabulary
    starts, begun = zip(*(begun_image(row, vocabulary) for row in rows), strict=True)
    found = [begun_layout(image, vocabulary) if len(image) > 1 else None for image in begun]
    asked = checkpoint.layout(*size) if size != (None, None) else None
    layouts = [one[0] if one else asked or checkpoint.layout() for one in found]
    given = [one[1] if one else torch.empty(0, dtype=torch.long) for one in found]
    layout = layouts[0]
    if asked is not None and asked.size != layout.size:
        got = "width={} height={}".format(*asked.size)
        rule = "must be the size of the image that the ids begin, width={} height={}".format(*layout.size)
        raise InputError(f"{rule}, got {got}; leave both out", "width")
    for other in layouts[1:]:
        if (other.size, other.given) != (layout.size, layout.given):
            sizes = " and ".join(str(one.size) for one in (layout, other))
            raise InputError(f"must begin images of one size, got {sizes}; generate them one by one", "input_ids")
    return list(starts), layout, torch.stack(given)


def _answers(pipeline: Pipeline, rows: Sequence[Sequence[int]], wanted: _Wanted) -> list[list[int]]:
    """Returns the ids of `wanted.count` answers to each prompt. Answers in text alone are sampled in batches."""
    if wanted.mode == "any":
        return [
            Conversation(pipeline).answer_ids(row, seeded, wanted.limit, wanted.speculation)
            for row in rows
            for seeded in wanted.sampling.with_seeds(wanted.count)
        ]
    jobs = [(row, repeat) for row in rows for repeat in range(wanted.count)]
    answers, step = [], wanted.batch_size or _TEXT_BATCH
    for batch in (jobs[at : at + step] for at in range(0, len(jobs), step)):
        prompts, repeats = [row for row, _ in batch], [repeat for _, repeat in batch]
        answers += answer_prompts(pipeline, prompts, wanted.sampling, wanted.limit, repeats)
    return answers


# -- settings ----------------------------------------------------------------------------------------------------------


def _from_config(config: GenerationConfig | None) -> dict[str, Any]:
    """Returns the values of a GenerationConfig that differ from the defaults."""
    if config is None:
        return {}
    return {name: value for name, value in config.to_diff_dict().items() if name not in _WITHOUT_EFFECT}


def _wanted(
    mode: str,
    settings: dict[str, Any],
    batch_size: int | None,
    speculative: bool | str | Speculation,
    checkpoint: Checkpoint,
) -> _Wanted:
    """Returns what a call asks for. Takes the values out of `settings`."""
    require(mode in MODES, "generation_mode", mode, f"must be one of {', '.join(MODES)}")
    count = image_count("num_return_sequences", settings.pop("num_return_sequences", 1))
    rule = f"must be a whole number of at least 1; try {MAX_NEW_TOKENS}"
    limit = whole_number("max_new_tokens", settings.pop("max_new_tokens", MAX_NEW_TOKENS), 1, None, rule)
    size = None if batch_size is None else image_count("batch_size", batch_size)
    return _Wanted(mode, count, limit, size, _sampling(settings, mode, checkpoint), _speculation(speculative))


def _sampling(settings: dict[str, Any], mode: str, checkpoint: Checkpoint) -> SamplingConfig:
    seed = settings.pop("seed", None)
    generator = settings.pop("generator", None)
    sampled = settings.pop("do_sample", True)
    require(isinstance(sampled, bool), "do_sample", sampled, "must be True or False")
    require(seed is None or generator is None, "seed", seed, "must be left out with a generator")
    values: dict[str, Any] = dict(checkpoint.config.family.sampling)
    names = {"guidance_scale": "cfg", "top_k": "top_k", "temperature": "temperature"}
    if mode == "text":
        names |= {"top_k": "text_top_k", "temperature": "text_temperature"}
    for name, value in settings.items():
        field = names.get(name, name if name in ("text_top_k", "text_temperature") else "")
        if not field and value is False:  # such as return_dict_in_generate, which pipelines pass
            continue
        if not field:
            known = ", ".join(sorted({*names, "text_top_k", "text_temperature", "seed", "generator", "do_sample"}))
            rule = "is not supported: this model is sampled by its own samplers, whose settings are"
            raise InputError(f"{rule} {known}; leave it out", name)
        values[field] = value
    if not sampled:
        values |= {"top_k": 1, "text_top_k": 1}
    values["seed"] = _seed(generator) if seed is None else seed
    try:
        return SamplingConfig(**values)
    except InputError as error:  # names a field of SamplingConfig
        given = {field: name for name, field in names.items() if name in settings}
        raise InputError(error.message, given.get(error.parameter or "", error.parameter)) from None


def _seed(generator: torch.Generator | None) -> int:
    """Returns the seed of one call, and advances the generator (default: torch's own).

    A generator that has given no number yet gives its own seed. `torch.Generator().manual_seed(7)` and the option
    `--seed 7` of the commands therefore give one image.
    """
    known = generator is None or isinstance(generator, torch.Generator)
    require(known, "generator", excerpt(generator), "must be a torch.Generator")
    generator = torch.default_generator if generator is None else generator
    first = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    fresh = torch.equal(first.get_state(), generator.get_state())
    drawn = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return generator.initial_seed() % 2**63 if fresh else drawn


def _speculation(value: bool | str | Speculation) -> Speculation | None:
    if isinstance(value, Speculation) or value is None:
        return value
    if isinstance(value, str):
        return Speculation(coupling=value)
    require(isinstance(value, bool), "speculative", excerpt(value), "must be True, False, a coupling or a Speculation")
    return Speculation() if value else None
