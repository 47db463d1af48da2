"""Fields that several parts of the page share."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.page.offers import Offer
from lumina_mgpt.page.runs import Desk
from lumina_mgpt.page.settings import AUTO
from lumina_mgpt.prompts import Task
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.values import picture_of


@dataclass(frozen=True)
class Frame:
    """What all parts of the page need.

    Attributes:
        options: options that every command line shows, such as `--model_path`.
    """

    engine: Engine
    offer: Offer
    limits: Limits
    options: Sequence[str]
    desk: Desk

    @property
    def family(self) -> Family:
        return self.engine.checkpoint.config.family


class SettingsFields:
    """Fields of `Settings`, in the order of the arguments of `Settings.read`.

    Args:
        task: its default sampling settings are the values of the fields.
        many: whether several images can be asked for.
        sizes: sizes to offer; the first is the default.
    """

    def __init__(self, frame: Frame, task: Task, sizes: Sequence[str], many: bool) -> None:
        default = default_sampling(frame, task)
        with gr.Row():
            self.size = gr.Dropdown(list(sizes), value=sizes[0], label="Size", allow_custom_value=True, min_width=120)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        self.random_seed = gr.Checkbox(True, label="New seed each time", container=False)
        self.n = gr.Slider(1, frame.limits.images, 1, step=1, label="Images", visible=many, buttons=[])
        with gr.Accordion("More settings", open=False):
            self.cfg = gr.Slider(0, 20, default.cfg, step=0.1, label="Guidance", info="1 disables it", buttons=[])
            self.top_k = gr.Number(
                default.top_k, label="Top-k", precision=0, minimum=1, info="most probable codes to choose from"
            )
            self.temperature = gr.Slider(0.05, 2, default.temperature, step=0.05, label="Temperature", buttons=[])
            self.faster = gr.Checkbox(
                False, label="Speculative sampling", info="faster; the picture is the same, but for near ties"
            )

    @property
    def all(self) -> list[gr.components.Component]:
        """The fields in the order of the arguments of `Settings.read`."""
        return [
            self.size,
            self.n,
            self.seed,
            self.random_seed,
            self.cfg,
            self.top_k,
            self.temperature,
            self.faster,
        ]


def default_sampling(frame: Frame, task: Task) -> SamplingConfig:
    """Returns the default sampling settings of a task."""
    values: Mapping[str, Any] = frame.family.sampling_of(task)
    return SamplingConfig(**values)


def sizes_of(offer: Offer, task: Task) -> list[str]:
    """Returns the sizes to offer for a task; `auto` first where the picture or the panels set it."""
    return [AUTO] if task.panels > 1 or task.given else list(offer.sizes)


def buttons(verb: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Returns a button that starts a run and one that stops it."""
    with gr.Row():
        return (
            gr.Button(verb, variant="primary", elem_id=f"{name}-run", min_width=100, scale=3),
            gr.Button("Stop", variant="stop", elem_id=f"{name}-stop", interactive=False, min_width=80, scale=1),
        )


def show_examples(rows: list[list[str]], fields: list[Any]) -> None:
    """Shows examples, if there are any. A click on a row puts its values into the fields."""
    if rows:
        gr.Examples(rows, fields, label="Examples")


def picture_field(label: str, name: str) -> gr.Image:
    """Returns a field for an uploaded picture. Its value is the path of the unmodified upload."""
    field = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=220,
        elem_id=f"{name}-picture",
        buttons=[],
    )
    # Gradio opens the picture itself and shows its own error; `opened` has the errors and limits of the server.
    field.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return field


def opened(path: str | None, limits: Limits) -> Image.Image:
    """Returns an uploaded picture, upright and in RGB.

    Raises:
        InputError: there is none.
        ApiError: it cannot be read, or has more pixels than the limit.
    """
    if not path:
        raise InputError("is missing; upload one", "picture")
    return picture_of(Path(path).read_bytes(), limits, "picture")


def status_field(name: str) -> gr.HTML:
    """Returns the field for the state of a run."""
    return gr.HTML(elem_id=f"{name}-status", elem_classes="status", padding=False)


def command_field(name: str, label: str = "The same on the command line") -> gr.Code:
    """Returns the field for the command line of a run, with a button that copies it."""
    return gr.Code(
        label=label,
        language=None,
        interactive=False,
        lines=1,
        wrap_lines=True,
        show_line_numbers=False,
        elem_id=f"{name}-command",
        visible=False,
        buttons=["copy"],
    )


def status(*lines: str, error: str = "") -> str:
    """Returns the HTML of a status: lines of text, and an error in red."""
    text = [f'<p class="error" role="alert">{html.escape(error)}</p>'] if error else []
    return "".join([*text, *(f"<p>{html.escape(line)}</p>" for line in lines if line)])
