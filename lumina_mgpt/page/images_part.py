"""Text to image, and image tasks with an uploaded picture: one request, whose images grow row by row."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lumina_mgpt.errors import InputError
from lumina_mgpt.maps import EXTRACTORS
from lumina_mgpt.page.fields import (
    Frame,
    SettingsFields,
    buttons,
    command_field,
    default_sampling,
    opened,
    picture_field,
    show_examples,
    sizes_of,
    status,
    status_field,
)
from lumina_mgpt.page.offers import computes_map, task_label
from lumina_mgpt.page.runs import Images, message_of, stream_images
from lumina_mgpt.page.settings import Settings, command_line, request_command
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.prompt_files import unknown_hint
from lumina_mgpt.prompts import Task
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.server.values import check_length


class ImagesPart:
    """One part of the page: a form, and the images of its last run.

    Args:
        name: name of the part in the page's ids.
        given: whether its tasks have a given picture.
    """

    def __init__(self, frame: Frame, name: str, given: bool) -> None:
        self.frame, self.name = frame, name
        self.tasks = frame.offer.picture_tasks if given else frame.offer.tasks
        first = next(iter(self.tasks))
        with gr.Row(elem_classes="work"):
            with gr.Column(elem_classes="ask"):
                self._form(first, given)
            with gr.Column(elem_classes="made"):
                self.gallery = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=2,
                    object_fit="contain",
                    height="auto",
                    interactive=False,
                    elem_id=f"{name}-images",
                    elem_classes="images",
                    buttons=["download", "fullscreen"],
                )
                self.status, self.command = status_field(name), command_field(name)
            with gr.Column(elem_classes="set"):
                offer, task = frame.offer, self.tasks[first]
                self.settings = SettingsFields(frame, task, sizes_of(offer, task), many=not given)
                if given:
                    examples = [[name, text] for name in self.tasks for text in offer.others.get(name, ())]
                    show_examples(examples, [self.task, self.prompt])
                else:
                    show_examples([[text] for text in offer.examples], [self.prompt])
        self._connect()

    def _form(self, first: str, given: bool) -> None:
        frame = self.frame
        labels = [(task_label(name, task), name) for name, task in self.tasks.items()]
        self.task = gr.Dropdown(labels, value=first, label="Task", visible=len(labels) > 1, elem_id=f"{self.name}-task")
        self.picture = picture_field("Picture", self.name) if given else gr.State(None)
        self.extract = gr.Checkbox(
            False, label="Compute the map from this photo", visible=given and computes_map(first), container=False
        )
        self.prompt = gr.Textbox(
            "" if given else frame.offer.examples[0],
            label="Prompt",
            placeholder="what the image shows",
            lines=2,
            max_length=frame.limits.prompt,
            elem_id=f"{self.name}-prompt",
        )
        names = frame.offer.names
        self.thing = gr.Dropdown(
            list(names),
            value=None,
            label="What this checkpoint can draw",
            visible=bool(names),
            info="goes into the prompt",
        )
        self.run, self.stop = buttons("Generate", self.name)

    def _connect(self) -> None:
        """Connects the fields with what they do."""
        quiet: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        fields = self.settings
        gr.on(
            [self.run.click, self.prompt.submit],
            self._generate,
            [self.task, self.picture, self.extract, self.prompt, *fields.all],
            [self.gallery, self.status, self.command, fields.seed, self.run, self.stop],
            concurrency_limit=None,
            **quiet,
        )
        self.stop.click(self._stop, queue=False, **quiet)
        self.thing.input(self.frame.offer.with_name, [self.prompt, self.thing], self.prompt, queue=False, **quiet)
        changed = [self.extract, fields.size, fields.cfg, fields.top_k]
        self.task.change(self._choose, self.task, changed, queue=False, **quiet)

    def _choose(self, name: str) -> tuple[Any, ...]:
        """Returns the fields' values for another task."""
        task = self.tasks[name]
        default, sizes = default_sampling(self.frame, task), sizes_of(self.frame.offer, task)
        size = gr.update(choices=sizes, value=sizes[0])
        return gr.update(visible=task.given and computes_map(name), value=False), size, default.cfg, default.top_k

    def _stop(self, request: gr.Request) -> None:
        self.frame.desk.stop(str(request.session_hash), self.name)

    async def _generate(
        self,
        request: gr.Request,
        name: str,
        path: str | None,
        extract: bool,
        prompt: str | None,
        *values: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Yields the values of the outputs of a run."""
        keep, idle = gr.skip(), (gr.update(interactive=True), gr.update(interactive=False))
        lines: list[str] = []
        try:
            settings = Settings.read(self.frame.limits, *values)
            prepared = await asyncio.to_thread(self._prepare, name, path, extract, prompt or "", settings)
            size = prepared.layout.size
            words = request_command(name, prepared.request, path and Path(path).name, extract)
            command = command_line(*words, *settings.options(size), options=self.frame.options)
            names = () if prepared.picture else self.frame.offer.names
            lines = [settings.words(size), unknown_hint(prompt or "", names) or ""]
            place = str(request.session_hash), self.name
            begun = gr.update(value=command, visible=True), settings.sampling.seed
            async for view in stream_images(self.frame.engine, self.frame.desk, place, prepared):
                shown = status(view.words, *lines)
                buttons = idle if view.over else (gr.update(interactive=False), gr.update(interactive=True))
                yield _pictures(view), shown, *begun, *buttons
        except Exception as error:
            yield keep, status(*lines, error=message_of(error)), keep, keep, *idle

    def _prepare(self, name: str, path: str | None, extract: bool, prompt: str, settings: Settings) -> PreparedRequest:
        """Returns the request of the form, checked against the checkpoint."""
        task = self._task(name)
        check_length(prompt, self.frame.limits, "prompt")
        if not prompt.strip() and not task.wordless:
            raise InputError("must not be empty; say what the image shows", "prompt")
        width, height = settings.size or (None, None)
        given = (opened(path, self.frame.limits),) if task.given else ()
        asked = GenerationRequest(
            prompt if prompt.strip() else "",
            width,
            height,
            n=settings.n,
            sampling=settings.sampling,
            speculation=settings.speculation,
            task=task,
            panels=given,
        )
        prepared = self.frame.engine.checkpoint.prepare(asked)
        if extract and name in EXTRACTORS and prepared.picture:
            prepared = replace(prepared, panels=(EXTRACTORS[name](prepared.picture),))
        return prepared

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise InputError(f"must be one of {', '.join(self.tasks)}", "task")
        return self.tasks[name]


def _pictures(view: Images) -> list[Any]:
    """Returns the pictures of a gallery: the images, and after the last one those with their given panels."""
    pictures: list[Any] = [picture for picture in view.pictures if picture is not None]
    if view.complete:
        for result, picture in zip(view.results, view.pictures, strict=True):
            if result is not None and picture is not None and picture.size != result.image.size:
                whole = result.image
                whole.info = dict(picture.info)
                pictures.append((whole, "with the given picture"))
    return pictures
