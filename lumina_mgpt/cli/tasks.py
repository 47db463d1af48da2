"""From a command line to a request: which task, its words, the picture for its panel, and the names of its files."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import prompt_files
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import I2I_TASKS, TASKS, Task

if TYPE_CHECKING:  # torch takes seconds to import: only when a picture is there
    from PIL import Image

    from lumina_mgpt.pipeline import ImageLayout

_GIVEN = "i2i"  # what --task calls all tasks with a given panel


@dataclass(frozen=True)
class Request:
    """What one run makes.

    Attributes:
        label: what the task is called inside a picture.
        prompts: none mean the built-in ones.
        option: what messages call the prompts.
        n: images of each prompt.
        shown: what the described panel displays, where the task's own words will not do.
        name: what files are called; without one they are numbered.
        source: option and path of the picture for the given panel.
        picture: that picture, upright and RGB.
        extract: makes the panel of the cropped picture; without it, the crop is the panel.
    """

    label: str
    task: Task
    prompts: list[str]
    n: int = 1
    shown: str | None = None
    name: str | None = None
    source: tuple[str, str] | None = None
    picture: "Image.Image | None" = None
    extract: "Callable[[Image.Image], Image.Image] | None" = None
    option: str = "--prompt"

    @property
    def keep(self) -> list[Path]:
        """Files that no result may replace."""
        return [] if self.source is None else [Path(self.source[1])]

    def panel(self, layout: "ImageLayout") -> "Image.Image | None":
        """The given panel as a picture of its size."""
        if self.picture is None:
            return None
        from lumina_mgpt.images import crop_panel
        from lumina_mgpt.panels import given_size

        crop = crop_panel(self.picture, given_size(layout))
        return self.extract(crop) if self.extract else crop

    def described(self) -> dict[str, object]:
        """What is said of the task inside a picture."""
        words = {} if self.shown is None else {"panel_prompt": self.shown}
        return {"task": self.label} | words | ({} if self.source is None else {"image_path": self.source[1]})

    def stem(self, prompt_index: int, repeat: int) -> str:
        """Name without suffix of one image: `0_0`, or as released `depth` for the only one made of a given panel."""
        numbered = f"{prompt_index}_{repeat}"
        if self.name is None:
            return numbered
        return self.name if len(self.prompts) * self.n == 1 else f"{self.name}_{numbered}"

    @property
    def panel_file(self) -> str:
        """Where the given panel goes; the released code calls it so."""
        return f"{self.name}_ref_center_crop.png"


def result_file(stem: str) -> str:
    """Where the lowest panel of a dual-panel image goes, alone."""
    return f"{stem}_result.png"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Options of generate.py that say which task it is, and what is given."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task", default="t2i", choices=(*TASKS, _GIVEN),
        help="t2i: an image; a map's name: an image and, below it, that map of it; i2i: more of a given picture",
    )  # fmt: skip
    group.add_argument(
        "--i2i_task", choices=tuple(I2I_TASKS),
        help="a map's name: the picture given is such a map, make its image; predict_...: make that map of it; "
        "subject: show its subject anew; edit: change it as the prompt says",
    )  # fmt: skip
    group.add_argument("--image_path", help="picture for the upper panel, which is cut out of its middle")
    add_panel_prompt(group)


def add_panel_prompt(group) -> None:
    group.add_argument(
        "--panel_prompt",
        help="what the panel described in the instruction displays (subject: the upper one), for the task's own words",
    )


def read_request(args: argparse.Namespace) -> Request:
    """The request of `add_task_options`, prompts and n, checked; opens the picture.

    Raises:
        InputError: options do not fit each other, a prompt is missing, or the picture is none.
    """
    prompts = prompt_files.read_prompts(args.prompt, args.prompt_file)
    given = (("--prompt", args.prompt), (f"--prompt_file {args.prompt_file}", args.prompt_file))
    option = " and ".join(name for name, value in given if value is not None) or "--prompt"
    if args.task == _GIVEN:
        if args.i2i_task is None:
            raise InputError(f"--task {_GIVEN} needs --i2i_task; it is one of {', '.join(I2I_TASKS)}")
        source = ("--image_path", args.image_path)
        return replace(panel_request(args.i2i_task, prompts, args.n, source, args.panel_prompt), option=option)
    for name in ("i2i_task", "image_path", "panel_prompt"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} {getattr(args, name)} means nothing without --task {_GIVEN}; add that, or "
                             "leave it out")  # fmt: skip
    return Request(args.task, TASKS[args.task], prompts, args.n, option=option)


def panel_request(
    name: str, prompts: list[str], n: int, source: tuple[str, str | None], shown: str | None, extract: bool = False
) -> Request:
    """A request of one of I2I_TASKS; `source` is the option that names the picture, and its value.

    Raises:
        InputError: the picture or a prompt that the task needs is missing, or no map of that name can be computed.
    """
    task, (option, path) = I2I_TASKS[name], source
    if path is None:
        raise InputError(f"the task {name} needs {option}; give a picture for the upper panel")
    if not prompts and not task.wordless:
        raise InputError(f"the task {name} needs --prompt; say what the lower panel should show")
    if shown is not None and not shown.strip():
        raise InputError("--panel_prompt must not be empty, got ''; say what the panel displays, or leave it out")
    from lumina_mgpt.images import open_panel
    from lumina_mgpt.maps import EXTRACTORS

    if extract and name not in EXTRACTORS:
        raise InputError(f"--extract must have a --task of {', '.join(EXTRACTORS)}, got {name}; give the panel itself "
                         f"(generate.py --task {_GIVEN} --i2i_task predict_... makes maps of a picture)")  # fmt: skip
    return Request(
        f"{_GIVEN} {name}", task, prompts or [""], n, shown, name, (option, path), open_panel(option, path),
        EXTRACTORS[name] if extract else None,
    )  # fmt: skip
