"""Editing as a conversation: each turn changes the result of the turn before, and the last one can be undone."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.page.fields import (
    Frame,
    SettingsFields,
    buttons,
    command_field,
    opened,
    picture_field,
    show_examples,
    sizes_of,
    status,
    status_field,
)
from lumina_mgpt.page.runs import PREVIEWS, message_of, stream_images, stream_reply
from lumina_mgpt.page.settings import Settings, command_line, option
from lumina_mgpt.panels import turn_parts
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.prompts import Task
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.results import AnswerImage
from lumina_mgpt.server.values import check_length


@dataclass(frozen=True)
class Turn:
    """One finished turn. Attributes: codes of the result (rows, cols), and the file of its picture."""

    instruction: str
    codes: Tensor
    shown: str


@dataclass(frozen=True)
class Edits:
    """A conversation about one picture.

    Attributes:
        path: file of the uploaded picture.
        settings: settings of the first turn; turn t, counted from 0, has the seed of the first plus t.
        prepared: request of the first turn.
        given: file of the cropped picture.
    """

    path: str
    settings: Settings
    prepared: PreparedRequest
    given: str
    turns: tuple[Turn, ...] = ()


class EditPart:
    """The part of the page that edits a picture."""

    def __init__(self, frame: Frame, task: Task, name: str = "edit") -> None:
        self.frame, self.task, self.name = frame, task, name
        self.edits = gr.State(None)
        with gr.Row(elem_classes="work"):
            with gr.Column(elem_classes="ask"):
                self.picture = picture_field("Picture to edit", name)
                self.instruction = gr.Textbox(
                    label="Instruction",
                    placeholder="what to change, such as: make the background red",
                    max_length=frame.limits.prompt,
                    elem_id=f"{name}-prompt",
                )
                self.run, self.stop = buttons("Edit", name)
                with gr.Row():
                    self.undo = gr.Button("Undo", elem_id=f"{name}-undo", min_width=100)
                    self.new = gr.Button("Start again", elem_id=f"{name}-new", min_width=100)
            with gr.Column(elem_classes="made"):
                self.chat = conversation_field(name, "Turns")
                self.status, self.command = status_field(name), command_field(name)
            with gr.Column(elem_classes="set"):
                self.settings = SettingsFields(frame, task, sizes_of(frame.offer, task), many=False)
                gr.Markdown("The settings of the first turn apply to all turns. Each turn adds 1 to the seed.")
                show_examples([[text] for text in frame.offer.others.get("edit", ())], [self.instruction])
        self._connect()

    def _connect(self) -> None:
        quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        outputs = [self.chat, self.status, self.command, self.settings.seed, self.run, self.stop]
        outputs += [self.edits, self.instruction]
        gr.on(
            [self.run.click, self.instruction.submit],
            self._edit,
            [self.edits, self.picture, self.instruction, *self.settings.all],
            outputs,
            concurrency_limit=None,
            **quiet,
        )
        self.stop.click(self._stop, queue=False, **quiet)
        shown = [self.edits, self.chat, self.status, self.command]
        self.undo.click(self._undo, self.edits, [*shown, self.instruction], queue=False, **quiet)
        gr.on([self.new.click, self.chat.clear, self.picture.input], self._new, None, shown, queue=False, **quiet)

    def _stop(self, request: gr.Request) -> None:
        self.frame.desk.stop(str(request.session_hash), self.name)

    def _new(self, request: gr.Request) -> tuple[Any, ...]:
        self._stop(request)
        return None, [], "", gr.update(visible=False)

    def _undo(self, edits: Edits | None, request: gr.Request) -> tuple[Any, ...]:
        """Removes the last turn, and returns its instruction to the field."""
        self._stop(request)
        if edits is None or not edits.turns:
            return None, [], status("nothing to undo"), gr.update(visible=False), gr.skip()
        last, edits = edits.turns[-1], replace(edits, turns=edits.turns[:-1])
        command = gr.update(value=self._command(edits), visible=bool(edits.turns))
        return edits, _messages(edits), status("the last turn is undone"), command, last.instruction

    async def _edit(
        self, request: gr.Request, edits: Edits | None, path: str | None, instruction: str | None, *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Yields the values of the outputs of one turn."""
        keep, idle = gr.skip(), (gr.update(interactive=True), gr.update(interactive=False))
        shown = edits
        try:
            edits = await asyncio.to_thread(self._begin, edits, path, instruction or "", values)
            assert instruction is not None
            shown = edits
            seed, place = edits.settings.sampling.seed, (str(request.session_hash), self.name)
            busy = gr.update(interactive=False), gr.update(interactive=True)
            done: tuple[Tensor, Image.Image] | None = None
            async for picture, codes, words in self._turn(edits, instruction, place):
                growing = self._saved(picture) if picture is not None else None
                yield _messages(edits, instruction, growing), status(words), keep, seed, *busy, edits, keep
                done = None if codes is None or picture is None else (codes, picture)
            if done is None:
                yield _messages(edits), status("stopped"), keep, seed, *idle, edits, keep
                return
            turn = Turn(instruction, done[0], self._saved(done[1]))
            edits = replace(edits, turns=(*edits.turns, turn))
            used = self._settings(edits, len(edits.turns) - 1)
            words = f"turn {len(edits.turns)} · {used.words(edits.prepared.layout.size)}"
            command = gr.update(value=self._command(edits), visible=True)
            yield _messages(edits), status("done", words), command, seed, *idle, edits, ""
        except Exception as error:
            yield _messages(shown), status(error=message_of(error)), keep, keep, *idle, keep, keep

    def _begin(self, edits: Edits | None, path: str | None, instruction: str, values: tuple[Any, ...]) -> Edits:
        """Returns the conversation that the turn belongs to: a new one without a turn yet, or after a new picture."""
        check_length(instruction, self.frame.limits, "instruction")
        if not instruction.strip():
            raise InputError("must not be empty; say what to change", "instruction")
        if edits is not None and edits.turns and edits.path == path:
            return edits
        picture, settings = opened(path, self.frame.limits), Settings.read(self.frame.limits, *values)
        width, height = settings.size or (None, None)
        asked = GenerationRequest(
            instruction,
            width,
            height,
            sampling=settings.sampling,
            speculation=settings.speculation,
            task=self.task,
            panels=(picture,),
        )
        prepared = self.frame.engine.checkpoint.prepare(asked)
        assert prepared.picture is not None and path is not None
        return Edits(path, settings, prepared, self._saved(prepared.picture))

    def _settings(self, edits: Edits, turn: int) -> Settings:
        return replace(edits.settings, sampling=edits.settings.sampling.with_seeds(turn + 1)[turn])

    async def _turn(
        self, edits: Edits, instruction: str, place: tuple[str, str]
    ) -> AsyncIterator[tuple[Image.Image | None, Tensor | None, str]]:
        """Yields the picture of a turn while it grows, its codes when it is complete, and how far it is."""
        sampling = self._settings(edits, len(edits.turns)).sampling
        first = edits.prepared
        if first.panels:  # the picture is the upper panel of the image
            panel = edits.turns[-1].codes if edits.turns else first.panels[0]
            width, height = first.layout.size
            asked = replace(
                first.request, prompts=(instruction,), panels=(panel,), sampling=sampling, width=width, height=height
            )
            prepared = await asyncio.to_thread(self.frame.engine.checkpoint.prepare, asked)
            async for view in stream_images(self.frame.engine, self.frame.desk, place, prepared):
                result = view.results[0]
                yield view.pictures[0], None if result is None else result.panel_codes, view.words
            return
        told = [turn.instruction for turn in edits.turns] + [instruction]
        opening = self.task.instruction(told[0], *first.layout.size)
        turns: list[tuple[str, Any]] = [("human", turn_parts(opening, first.pictures))]
        for turn, text in zip(edits.turns, told[1:], strict=True):
            turns += [("assistant", [turn.codes]), ("human", [text])]
        ticket = self.frame.engine.chat(
            turns,
            previews=PREVIEWS,
            want="image",
            size=first.layout.size,
            speculation=edits.settings.speculation,
            **asdict(sampling),
        )
        async for reply in stream_reply(self.frame.desk, place, ticket):
            (last,) = reply.parts[-1:] or (None,)
            whole = isinstance(last, AnswerImage) and last.whole
            picture = last.image if isinstance(last, AnswerImage) else last if isinstance(last, Image.Image) else None
            yield picture, last.codes if isinstance(last, AnswerImage) and whole else None, reply.words

    def _command(self, edits: Edits) -> str:
        size = edits.prepared.layout.size
        words = [word for turn in edits.turns for word in option("--instruction", turn.instruction)]
        words = ["edit", *option("--image_path", Path(edits.path).name), *words]
        return command_line(*words, *edits.settings.options(size, many=False), options=self.frame.options)

    def _saved(self, picture: Image.Image) -> str:
        return saved_picture(self.chat, picture)


def conversation_field(name: str, label: str) -> gr.Chatbot:
    """Returns the field that shows a conversation."""
    return gr.Chatbot(
        label=label,
        height=480,
        layout="bubble",
        render_markdown=False,
        buttons=["copy"],
        feedback_options=None,
        elem_id=f"{name}-turns",
        elem_classes="turns",
        allow_tags=False,
        group_consecutive_messages=False,
    )


def saved_picture(field: gr.Chatbot, picture: Image.Image) -> str:
    """Saves a picture among the page's temporary files, and returns its path."""
    path = save_pil_to_cache(picture, cache_dir=field.GRADIO_CACHE, format="png")
    field.temp_files.add(path)  # removed with the other temporary files
    return path


def message(role: str, content: Any) -> dict[str, Any]:
    """Returns a message of a conversation field: a text, or the path of a picture in a dict."""
    return {"role": role, "content": content}


def _messages(edits: Edits | None, instruction: str | None = None, growing: str | None = None) -> list[dict[str, Any]]:
    """Returns a conversation for its field.

    Args:
        instruction: that of the turn that runs.
        growing: file of its unfinished picture.
    """
    if edits is None:
        return []
    messages = [message("user", {"path": edits.given})]
    for turn in edits.turns:
        messages += [message("user", turn.instruction), message("assistant", {"path": turn.shown})]
    if instruction is not None:
        messages.append(message("user", instruction))
    return messages + ([message("assistant", {"path": growing})] if growing else [])
