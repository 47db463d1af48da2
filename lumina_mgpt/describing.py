"""Describes many pictures: one question about each of them, answered in text, in batches."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lumina_mgpt.answers import read_answer
from lumina_mgpt.checks import require, whole_number
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.conversation import sampling_config
from lumina_mgpt.conversation_cache import Host, conversation_cache, conversation_step
from lumina_mgpt.devices import LARGEST_AUTO_BATCH, batch_limit, cache_bytes
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.images import candidate_sizes
from lumina_mgpt.panels import Panel, encode_pictures, fit_pictures
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.request import image_count
from lumina_mgpt.results import Answer
from lumina_mgpt.sampling.interleaved import sample_texts
from lumina_mgpt.unirep import ImageLayout, generation_prompt

MAX_NEW_TOKENS = 1024


def describe(
    host: Host,
    pictures: Sequence[Panel],
    question: str,
    *,
    batch_size: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **sampling: Any,
) -> Iterator[Answer]:
    """Returns an iterator over the answers to one question about each picture, in text. It samples a batch at a time.

    All pictures share the seed, so an answer does not depend on the other pictures of its batch.

    Args:
        pictures: pictures (PIL), paths, or codes (rows, cols). Each is opened when its batch begins.
        question: text of the turn. The picture comes after it and a space, or in the place of `<|image|>` in it.
        batch_size: number of pictures of a batch (default: as many as fit into memory, at most 8).
        max_new_tokens: largest number of ids of an answer.
        sampling: fields of `SamplingConfig`; the defaults are those of the checkpoint's family.

    Raises:
        InputError: an argument does not fit the checkpoint: the call itself raises it. A picture cannot be read: the
            iterator raises it.
    """
    checkpoint = host.checkpoint
    require(host.writes_text, "text", False, "must be True when the pipeline is loaded, because answers are texts")
    settings = sampling_config(checkpoint, sampling)
    limit = whole_number("max_new_tokens", max_new_tokens, 1, None, "must be a whole number of at least 1; try 1024")
    single = isinstance(pictures, str) or not isinstance(pictures, Sequence)
    require(not single, "pictures", type(pictures).__name__, "must be a sequence of pictures; put it in a list")
    require(isinstance(question, str), "question", question, "must be a text")
    question = question if PICTURE in question else f"{question} {PICTURE}"
    require(question.count(PICTURE) == 1, "question", question, f"must have one mark {PICTURE} at most")
    with caused_by("question"):
        words = sum(len(checkpoint.vocabulary.encode_text(text)) for text in question.split(PICTURE))
    size = _auto_batch(host, words, limit) if batch_size is None else image_count("batch_size", batch_size)
    batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    return (answer for batch in batches for answer in _batch(host, batch, question, settings, limit))


def _auto_batch(host: Host, words: int, limit: int) -> int:
    config, vocabulary = host.checkpoint.config, host.checkpoint.vocabulary
    sizes = candidate_sizes(config.base_size)
    picture = max(ImageLayout.from_pixels(vocabulary, *size).length for size in sizes)
    row = cache_bytes(config, min(config.context, words + picture + limit), host.cache_dtype)
    return max(1, min(LARGEST_AUTO_BATCH, batch_limit(host.device) // row))


def _batch(
    host: Host, pictures: Sequence[Panel], question: str, settings: SamplingConfig, limit: int
) -> Iterator[Answer]:
    checkpoint, vocabulary = host.checkpoint, host.checkpoint.vocabulary
    with caused_by("pictures"):
        fitted = fit_pictures(pictures, vocabulary, len(pictures), checkpoint.config.base_size)
    prompts = [_prompt(question, codes, host) for codes in encode_pictures(fitted, host.image_tokenizer)]
    with caused_by("question"):
        answers = answer_prompts(host, prompts, settings, limit, [0] * len(prompts))
    for ids in answers:
        yield read_answer(ids, "turn end" if ids[-1] == vocabulary.turn_end_id else "length", host)


def answer_prompts(
    host: Host, prompts: Sequence[Sequence[int]], settings: SamplingConfig, limit: int, repeats: Sequence[int]
) -> list[list[int]]:
    """Returns the ids of one answer in text for each prompt, sampled in one batch.

    Args:
        prompts: ids of each conversation, bos first, up to its answer.
        limit: largest number of ids of an answer.
        repeats: for each prompt, a number that determines the noise of its answer together with the seed.

    Raises:
        InputError: a prompt leaves no room for an answer.
    """
    context, vocabulary = host.checkpoint.config.context, host.checkpoint.vocabulary
    longest = max(map(len, prompts))
    if longest >= context:
        raise InputError(f"takes {longest} ids, but this model sees {context}; shorten it", "prompt")
    slots = min(context, longest + limit)
    step = conversation_step(host, conversation_cache(host, len(prompts), slots), None)
    limits = [min(limit, context - len(prompt)) for prompt in prompts]
    return sample_texts(step, prompts, vocabulary, settings, [(settings.seed, repeat) for repeat in repeats], limits)


def _prompt(question: str, codes: Tensor, host: Host) -> list[int]:
    before, after = question.split(PICTURE)
    parts = [part for part in (before, codes, after) if not isinstance(part, str) or part]
    return generation_prompt([("human", parts)], host.checkpoint.vocabulary)
