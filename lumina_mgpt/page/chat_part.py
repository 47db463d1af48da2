"""Chat in texts and pictures, for checkpoints that write text: describing a picture is its first turn."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.page.edit_part import conversation_field, message, saved_picture
from lumina_mgpt.page.fields import (
    Frame,
    buttons,
    command_field,
    opened,
    picture_field,
    show_examples,
    status,
    status_field,
)
from lumina_mgpt.page.runs import PREVIEWS, Reply, message_of, stream_reply
from lumina_mgpt.page.settings import SEEDS, command_line, number
from lumina_mgpt.prompt_files import CHAT
from lumina_mgpt.results import AnswerImage
from lumina_mgpt.server.values import check_count, check_length

Part = str | Image.Image | Tensor
_DESCRIBE = "Describe the image in detail."
_WANTS = [("text or pictures", "any"), ("text", "text"), ("a picture", "image")]


@dataclass(frozen=True)
class Turn:
    """A turn of the human and its answer.

    Attributes:
        said, answered: texts and pictures for the model; the pictures of an answer as codes (rows, cols).
        shown: the same as messages of the field.
    """

    said: tuple[Part, ...]
    answered: tuple[Part, ...]
    shown: tuple[dict[str, Any], ...]


class ChatPart:
    """The part of the page that talks with the model."""

    def __init__(self, frame: Frame, name: str = "chat") -> None:
        self.frame, self.name = frame, name
        self.turns = gr.State(())
        values: dict[str, Any] = dict(frame.family.sampling)
        default = SamplingConfig(**values)
        with gr.Row(elem_classes="work"):
            with gr.Column(elem_classes="ask"):
                self.picture = picture_field("Picture (optional)", name)
                self.text = gr.Textbox(
                    label="Message",
                    placeholder=_DESCRIBE,
                    max_length=frame.limits.prompt,
                    lines=2,
                    elem_id=f"{name}-prompt",
                )
                self.run, self.stop = buttons("Send", name)
                with gr.Row():
                    self.describe = gr.Button("Describe the picture", elem_id=f"{name}-describe", min_width=100)
                    self.undo = gr.Button("Undo", elem_id=f"{name}-undo", min_width=100)
                    self.new = gr.Button("Start again", elem_id=f"{name}-new", min_width=100)
            with gr.Column(elem_classes="made"):
                self.chat = conversation_field(name, "Conversation")
                self.status, self.command = status_field(name), command_field(name, "The settings on the command line")
            with gr.Column(elem_classes="set"):
                self._settings(default)
                show_examples([[text] for text in frame.offer.others.get(CHAT, ())], [self.text])
        self._connect()

    def _settings(self, default: SamplingConfig) -> None:
        self.want = gr.Radio(_WANTS, value="any", label="Answer with")
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        self.random_seed = gr.Checkbox(True, label="New seed each time", container=False)
        with gr.Accordion("More settings", open=False):
            self.text_top_k = gr.Number(default.text_top_k, label="Top-k of text", precision=0, minimum=1)
            self.text_temperature = gr.Slider(0.05, 2, default.text_temperature, step=0.05, label="Temperature of text")
            self.cfg = gr.Slider(0, 20, default.cfg, step=0.1, label="Guidance of pictures")
            self.top_k = gr.Number(default.top_k, label="Top-k of pictures", precision=0, minimum=1)

    def _connect(self) -> None:
        quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        settings = [self.seed, self.random_seed, self.text_top_k, self.text_temperature, self.cfg, self.top_k]
        outputs = [self.chat, self.status, self.command, self.seed, self.run, self.stop, self.turns]
        outputs += [self.text, self.picture]
        gr.on(
            [self.run.click, self.text.submit],
            self._say,
            [self.turns, self.picture, self.text, self.want, *settings],
            outputs,
            concurrency_limit=None,
            **quiet,
        )
        self.describe.click(
            self._describe, [self.turns, self.picture, *settings], outputs, concurrency_limit=None, **quiet
        )
        self.stop.click(self._stop, queue=False, **quiet)
        shown = [self.turns, self.chat, self.status]
        self.undo.click(self._undo, self.turns, shown, queue=False, **quiet)
        gr.on([self.new.click, self.chat.clear], self._new, None, shown, queue=False, **quiet)

    def _stop(self, request: gr.Request) -> None:
        self.frame.desk.stop(str(request.session_hash), self.name)

    def _new(self, request: gr.Request) -> tuple[Any, ...]:
        self._stop(request)
        return (), [], ""

    def _undo(self, turns: tuple[Turn, ...], request: gr.Request) -> tuple[Any, ...]:
        self._stop(request)
        words = "the last turn is undone" if turns else "nothing to undo"
        return turns[:-1], _messages(turns[:-1]), status(words)

    async def _describe(
        self, request: gr.Request, turns: tuple[Turn, ...], path: str | None, *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        async for outputs in self._say(request, turns, path, _DESCRIBE, "text", *values):
            yield outputs

    async def _say(
        self,
        request: gr.Request,
        turns: tuple[Turn, ...],
        path: str | None,
        text: str | None,
        want: str,
        *values: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Yields the values of the outputs of one turn."""
        keep, idle = gr.skip(), (gr.update(interactive=True), gr.update(interactive=False))
        busy = gr.update(interactive=False), gr.update(interactive=True)
        try:
            said, shown = await asyncio.to_thread(self._said, turns, path, (text or "").strip())
            sampling = _sampling(*values)
            history = [part for turn in turns for part in (("human", turn.said), ("assistant", turn.answered))]
            ticket = self.frame.engine.chat(
                [*history, ("human", said)],
                previews=PREVIEWS,
                want=want,
                max_new_tokens=self.frame.limits.new_tokens,
                **{name: getattr(sampling, name) for name in _settings_names()},
            )
            reply, answered = Reply(), list[dict[str, Any]]()
            async for reply in stream_reply(self.frame.desk, (str(request.session_hash), self.name), ticket):
                answered = self._answered(reply)
                state = status(reply.words)
                chat = [*_messages(turns), *shown, *answered]
                yield chat, state, keep, sampling.seed, *busy, keep, keep, keep
            parts = tuple(part for part in map(_for_model, reply.parts) if part is not None)
            if parts:
                turns = (*turns, Turn(said, parts, (*shown, *answered)))
            state = status(_end(reply, ticket.prompt_length))
            command = gr.update(value=self._command(want, sampling), visible=True)
            cleared = ("", None) if parts else (keep, keep)
            yield _messages(turns), state, command, sampling.seed, *idle, turns, *cleared
        except Exception as error:
            yield _messages(turns), status(error=message_of(error)), keep, keep, *idle, keep, keep, keep

    def _said(
        self, turns: tuple[Turn, ...], path: str | None, text: str
    ) -> tuple[tuple[Part, ...], tuple[dict[str, Any], ...]]:
        """Returns a turn of the human, for the model and for the field. A picture comes after its text and a space."""
        check_length(text, self.frame.limits, "message")
        if not text:
            raise InputError("must not be empty; ask something", "message")
        shown = (message("user", text),)
        if not path:
            return (text,), shown
        pictures = sum(not isinstance(part, str) for turn in turns for part in turn.said + turn.answered)
        check_count(pictures + 1, self.frame.limits, self.frame.engine, "number of pictures")
        picture = self.frame.engine.fitted(opened(path, self.frame.limits))
        return (f"{text} ", picture), (message("user", {"path": saved_picture(self.chat, picture)}), *shown)

    def _answered(self, reply: Reply) -> list[dict[str, Any]]:
        messages = []
        for part in reply.parts:
            picture = part.image if isinstance(part, AnswerImage) else part
            content = picture if isinstance(picture, str) else {"path": saved_picture(self.chat, picture)}
            messages.append(message("assistant", content))
        return messages

    def _command(self, want: str, sampling: SamplingConfig) -> str:
        words = ["chat", "--want", want]
        for name in _settings_names():
            words += [f"--{name}", number(getattr(sampling, name))]
        return command_line(*words, options=self.frame.options)


def _settings_names() -> tuple[str, ...]:
    return "seed", "text_top_k", "text_temperature", "cfg", "top_k"


def _sampling(
    seed: int | None,
    random_seed: bool,
    text_top_k: int | None,
    text_temperature: float,
    cfg: float,
    top_k: int | None,
) -> SamplingConfig:
    values: dict[str, Any] = dict(text_top_k=text_top_k, text_temperature=text_temperature, cfg=cfg, top_k=top_k)
    values["seed"] = secrets.randbelow(SEEDS) if random_seed else seed
    for name, value in values.items():
        if value is None:
            raise InputError("must not be empty; type a number", name)
    return SamplingConfig(**values)


def _for_model(part: str | Image.Image | AnswerImage) -> Part | None:
    """Returns a part of an answer for the history; None for an unfinished picture."""
    if isinstance(part, AnswerImage):
        return part.codes if part.whole else None
    return part if isinstance(part, str) else None


def _end(reply: Reply, prompt: int) -> str:
    if reply.answer is None:
        return "stopped"
    return f"{prompt} ids read, {len(reply.answer.ids)} written; ended by {reply.answer.reason}"


def _messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    return [part for turn in turns for part in turn.shown]
