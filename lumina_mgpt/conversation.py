"""A conversation with a loaded checkpoint: its ids and its KV cache go on from turn to turn.

    conversation = pipeline.conversation()
    for event in conversation.say("Describe the image in detail.", ["cat.png"], want="text"):
        if isinstance(event, Text):
            print(event.text, end="", flush=True)
    for event in conversation.say("Remove the cup in the background."):
        ...

The ids hold the codes of all images, so no image is encoded twice. A turn costs the prefill of the new turn alone.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from lumina_mgpt.answers import AnswerReader, read_answer
from lumina_mgpt.checks import require, whole_number
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.conversation_cache import ConversationCache, Host
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.panels import Panel, encode_pictures, fit_pictures, turn_parts
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.results import Answer, End, Event
from lumina_mgpt.sampling.interleaved import AnswerSampler, Plan
from lumina_mgpt.unirep import (
    ImageLayout,
    Status,
    Turn,
    UniRepError,
    encode_conversation,
    encode_turn,
    image_length,
    split,
    status,
    turn_list,
)

WANTS = ("any", "text", "image", "images")
MAX_NEW_TOKENS = 8192  # as in the released examples
_PADS = 16  # spare cache slots for the pads of short rows


class AnswerStream(Iterator[Event]):
    """Iterator over the events of one answer, which samples as it goes.

    If the caller ends it early, by `close` or by an exception such as that of Ctrl-C, `answer` holds what was sampled
    until then.
    """

    def __init__(self, conversation: "Conversation", sampler: AnswerSampler) -> None:
        self._conversation, self._sampler = conversation, sampler
        self._reader = AnswerReader(conversation.host)
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Ends the answer here. Does nothing after its end."""
        self._events.close()

    def before_each_step(self, check: Callable[[], None]) -> None:
        """Calls `check` before each step inside an image. An exception that it raises ends the answer here."""
        self._sampler.before_step = check

    @property
    def prompt_length(self) -> int:
        """Number of ids before the answer."""
        return len(self._sampler.prompt)

    @property
    def answer(self) -> Answer:
        """The answer so far. Its reason is "stopped" unless the answer is complete."""
        reason = self._sampler.reason or "stopped"
        return read_answer(self._sampler.answer, reason, self._conversation.host, self._reader.images)

    def _run(self) -> Generator[Event, None, None]:
        kept = False
        try:
            for ids in self._sampler.run():
                yield from self._reader.feed(ids)
            self._conversation._keep(self._sampler)
            kept = True
            yield from self._reader.end()
            yield End(self.answer)
        finally:
            if not kept:
                self._conversation._keep(self._sampler)


class Conversation:
    """A conversation. `Pipeline.conversation` makes one.

    A turn of the human and its answer enter the history together. If an answer ends inside an image, the history goes
    on without the incomplete image; if nothing is left of the answer, without the whole turn.

    Attributes:
        host: the pipeline.
        ids: ids of the history, bos first; each turn is closed by a turn end.

    Args:
        turns: earlier turns, human and assistant in turn, the last one the assistant's. Their parts are texts and
            pictures: see `say`.
        ids: the same as ids, such as `ids` of another conversation. Give one of the two.

    Raises:
        InputError: the turns do not alternate, or cannot be encoded; or the ids are not those of a conversation.
    """

    def __init__(
        self, host: Host, turns: Sequence[tuple[str, Sequence["str | Panel"]]] = (), ids: Sequence[int] = ()
    ) -> None:
        require(not (turns and ids), "ids", ids, "must be left out if there are turns")
        self.host = host
        self._cache = ConversationCache(host)
        self._held = 0  # number of `ids` that the cache holds
        self._stream: AnswerStream | None = None
        vocabulary = host.checkpoint.vocabulary
        if len(turns) % 2:
            raise InputError(f"must end with an answer, got {len(turns)} turns; give the last one to say()", "turns")
        encoded: list[Turn] = [(role, self._encode(parts)) for role, parts in turn_list(turns)]
        self.ids = encode_conversation(encoded, vocabulary)[0] if encoded else list(ids)
        if ids:
            self._check_ids()

    @property
    def answers(self) -> int:
        """Number of answers in the history."""
        return self.ids.count(self.host.checkpoint.vocabulary.turn_end_id) // 2

    def say(
        self,
        text: str | Sequence["str | Panel"],
        pictures: Sequence[Panel] = (),
        *,
        want: str = "any",
        size: tuple[int, int] | None = None,
        views: int = 1,
        max_new_tokens: int | None = None,
        speculation: Speculation | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Returns an iterator over the events of the model's answer to a turn of the human.

        An earlier answer that is still being sampled ends here.

        Args:
            text: the turn's text. `<|image|>` in it stands for the next of `pictures`; see `turn_parts`. Or the turn as
                a sequence of texts and pictures; then `pictures` is empty.
            pictures: pictures (PIL), paths, or codes (rows, cols). Pictures are cropped to the candidate size of
                `config.base_size` that fits best.
            want: what the answer is. "any": the model's choice; text, if the image tokenizer makes no images. "text":
                no image. "image": one image, then the turn end. "images": `views` images in a row, then the turn end.
            size: width and height in pixels of the images, for `want` "image" and "images". None: the model draws the
                size of each.
            views: number of images for `want` "images".
            max_new_tokens: largest number of ids of the answer (default: 8192, or what images of a known size need if
                that is more).
            speculation: settings of speculative Jacobi sampling inside images; None for one code a forward.
            sampling: fields of `SamplingConfig`; the defaults are those of the checkpoint's family.

        Raises:
            InputError: an argument does not fit the checkpoint, or the model's context is used up. The call itself
                raises it, before any sampling.
        """
        if self._stream is not None:
            self._stream.close()
        vocabulary = self.host.checkpoint.vocabulary
        settings = sampling_config(self.host.checkpoint, sampling)
        require(isinstance(text, Sequence), "text", text, "must be a text, or a sequence of texts and pictures")
        known = speculation is None or isinstance(speculation, Speculation)
        require(known, "speculation", speculation, "must be a config.Speculation or None")
        parts = turn_parts(text, pictures) if isinstance(text, str) else list(text)
        require(isinstance(text, str) or not pictures, "pictures", pictures, "must be left out if the turn has parts")
        prompt = (self.ids or [vocabulary.bos_id]) + encode_turn(self._encode(parts), vocabulary)
        plan = self._plan(prompt, want, size, views, max_new_tokens)
        self._stream = AnswerStream(self, self._sampler(prompt, plan, settings, speculation))
        return self._stream

    def answer_ids(
        self,
        prompt: Sequence[int],
        settings: SamplingConfig,
        max_new_tokens: int = MAX_NEW_TOKENS,
        speculation: Speculation | None = None,
    ) -> list[int]:
        """Returns the ids of the model's answer, in texts and images, to a prompt. The history stays unchanged.

        Args:
            prompt: ids of a conversation, bos first, up to the answer. The answer may have begun with text.

        Raises:
            InputError: as for `say`.
        """
        plan = self._plan(list(prompt), "any", None, 1, max_new_tokens)
        self._held = 0  # the cache gets this prompt
        sampler = self._sampler(list(prompt), plan, settings, speculation)
        for _ in sampler.run():
            pass
        return sampler.answer

    def _sampler(
        self, prompt: list[int], plan: Plan, settings: SamplingConfig, speculation: Speculation | None
    ) -> AnswerSampler:
        """Returns the sampler of the answer to a prompt, and makes room for both in the cache."""
        vocabulary, speculation = self.host.checkpoint.vocabulary, self.host.with_window(speculation)
        rows = 1 if settings.cfg == 1.0 or plan.text_only else 2
        length = min(plan.context, len(prompt) + plan.limit)
        self._cache.reserve(rows, length, self._spare(plan, speculation), self._held)
        window = 0 if speculation is None or speculation.window is None else speculation.window
        steps = self._cache.text_step(), partial(self._cache.image_step, rows, self._window_ids(window))
        return AnswerSampler(*steps, vocabulary, prompt, self._held, plan, settings, self.answers, speculation)

    def _spare(self, plan: Plan, speculation: Speculation | None) -> int:
        """Number of cache slots after the answer's end, for pads and drafts."""
        if speculation is None or speculation.window is None or plan.text_only:
            return _PADS
        return _PADS + self._window_ids(speculation.window)

    def _window_ids(self, window: int) -> int:
        """Largest number of ids of a window, 0 for no window. In the narrowest images it has most row ends."""
        return window + window // self.host.checkpoint.vocabulary.cells + 1 if window else 0

    def _encode(self, parts: Sequence["str | Panel"]) -> list[str | Tensor]:
        """Returns texts and code grids: fits and encodes the pictures. A `str` is a text; a path must be a `Path`."""
        host, side = self.host, self.host.checkpoint.config.base_size
        encoded: list[str | Tensor] = []
        for part in parts:
            if isinstance(part, str):
                encoded.append(part)
                continue
            with caused_by("pictures"):
                fitted = fit_pictures([part], host.checkpoint.vocabulary, 1, side)
                encoded += encode_pictures(fitted, host.image_tokenizer)
        return encoded

    def _plan(self, prompt: list[int], want: str, size: tuple[int, int] | None, views: int, limit: int | None) -> Plan:
        checkpoint = self.host.checkpoint
        vocabulary, context = checkpoint.vocabulary, checkpoint.config.context
        require(want in WANTS, "want", want, f"must be one of {', '.join(WANTS)}")
        if limit is not None:
            rule = f"must be a whole number of at least 1; try {MAX_NEW_TOKENS}"
            limit = whole_number("max_new_tokens", limit, 1, None, rule)
        views = whole_number("views", views, 1, 1000, "must be a whole number in 1 ... 1000; try 16")
        require(views == 1 or want == "images", "views", views, "must be 1 unless want=images")
        forced = want in ("image", "images")
        require(forced or size is None, "size", size, f"must be left out with want={want}; try want=image")
        layout = None
        if size is not None:
            require(isinstance(size, tuple | list) and len(size) == 2, "size", size, "must be a width and a height")
            layout = ImageLayout.from_pixels(vocabulary, *size)
        if layout is None and not self.host.writes_text:
            rule = f"{want} needs the whole output projection, but this pipeline holds that of the image codes"
            raise InputError(f"{rule}; load it with text=True{', or give a size' if forced else ''}", "want")
        length = image_length(1, 1, vocabulary) if layout is None else layout.length
        needed = len(prompt) + (views * length if forced else 1)
        if needed > context:
            rule = f"the conversation has {len(prompt)} ids and the answer takes at least {needed - len(prompt)}"
            rule = f"{rule}, but this model sees {context}"
            raise InputError(f"{rule}; begin a new conversation, or ask for fewer or smaller images")
        if limit is None:
            limit = max(MAX_NEW_TOKENS, views * length + 1) if forced else MAX_NEW_TOKENS  # and the turn end
        if forced:
            self.host.image_tokenizer.require_decoder()
        text_only = want == "text" or not self.host.image_tokenizer.can_decode
        return Plan(views if forced else 0, text_only, layout, limit, context)

    def _keep(self, sampler: AnswerSampler) -> None:
        """Takes a turn and its answer into the history, as far as the answer is complete."""
        vocabulary, answer = self.host.checkpoint.vocabulary, sampler.answer
        if status(answer, vocabulary) is not Status.TEXT:
            answer = answer[: len(answer) - 1 - answer[::-1].index(vocabulary.image_start_id)]
        if answer:
            self.ids = sampler.prompt + answer
        # Slots after `held` are written again before they are read.
        self._held = min(sampler.held, len(self.ids))
        if self.ids and self.ids[-1] != vocabulary.turn_end_id:
            self.ids.append(vocabulary.turn_end_id)

    def _check_ids(self) -> None:
        vocabulary, ids = self.host.checkpoint.vocabulary, self.ids
        for id_ in ids:
            rule = f"must be whole numbers in 0 ... {vocabulary.vocab_size - 1}"
            whole_number("ids", id_, 0, vocabulary.vocab_size - 1, rule)
        ends = ids.count(vocabulary.turn_end_id)
        if ids[0] != vocabulary.bos_id or ids[-1] != vocabulary.turn_end_id or ends % 2 or not ends:
            rule = "must be bos and an even number of turns, each closed by a turn end"
            raise InputError(f"{rule}, got {len(ids)} ids with {ends} turn ends", "ids")
        try:
            split(ids, vocabulary)
        except UniRepError as error:
            raise InputError(f"must hold complete images: {error}", "ids") from None


def sampling_config(checkpoint: Checkpoint, values: dict[str, Any]) -> SamplingConfig:
    """Returns the sampling settings of an answer; defaults are those of the checkpoint.

    Raises:
        InputError: a name is unknown, or a value is out of range.
    """
    known = [field.name for field in fields(SamplingConfig)]
    for name in values:
        if name not in known:
            raise InputError(f"is no setting of an answer; the sampling settings are {', '.join(known)}", name)
    return SamplingConfig(**{**checkpoint.config.sampling_of(), **values})
