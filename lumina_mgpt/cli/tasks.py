"""Makes a request, and the names of the files to write, from a command line."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_mgpt import prompt_files
from lumina_mgpt.cli.best_of import candidate_files
from lumina_mgpt.cli.options import sampling_settings, speculation_settings, unset_sampling
from lumina_mgpt.cli.parser import whole
from lumina_mgpt.cli.rewrite import original
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FIRST, SECOND, Family, task_names
from lumina_mgpt.launcher import image_share
from lumina_mgpt.prompts import Task
from lumina_mgpt.request import GenerationRequest, ImageJob
from lumina_mgpt.rewriting import Rewriter, rewritten

if TYPE_CHECKING:
    from PIL import Image

_GIVEN = "i2i"  # value of --task for every task with a given picture


@dataclass(frozen=True)
class OutputPlan:
    """The request of a command, and how to name and describe the files that the command writes.

    Attributes:
        request: what to generate. Until `of_family`, its task is that of any family.
        task: name of the task.
        i2i: whether the task has a given picture.
        prompts_from: where the prompts come from, for error messages: a parameter, options or a file.
        examples: whether the prompts are still to be read from the checkpoint. Until then, `request` has a placeholder.
        name: first part of the file names; None: they begin with {prompt index}_{repeat}.
        image_path: file of the given picture; None if the task has none.
        extract: function that computes the panel from the cropped picture; None: the cropped picture is the panel.
        preview: whether to save previews of unfinished images.
        originals: the user's prompts, if those of `request` were rewritten.
        candidates: number of candidates of each image that are saved, too.
    """

    request: GenerationRequest
    task: str
    i2i: bool = False
    prompts_from: str = "prompts"
    examples: bool = False
    name: str | None = None
    image_path: str | None = None
    extract: "Callable[[Image.Image], Image.Image] | None" = None
    preview: bool = False
    originals: tuple[str, ...] = ()
    candidates: int = 0

    @property
    def label(self) -> str:
        """The name of the task in a picture's text."""
        return f"{_GIVEN} {self.task}" if self.i2i else self.task

    def of_family(self, family: Family) -> "OutputPlan":
        """Returns a copy of the plan for a checkpoint of this family.

        Raises:
            InputError: the family does not have the task, or its instruction has no prompt and one is given.
        """
        task = family.task(self.task, self.i2i)
        if not task.has_prompt and self.request.instruction is None and any(map(str.strip, self.request.prompts)):
            rule = f"has no effect on the task {self.task} of {family.name}, whose instruction is fixed"
            raise InputError(f"{rule}; leave it out, or give instruction=TEXT", "prompts")
        return replace(self, request=replace(self.request, task=task))

    @property
    def keep(self) -> list[Path]:
        """The files that no result may replace: the given picture."""
        return [] if self.image_path is None else [Path(self.image_path)]

    def with_prompts(self, prompts: Sequence[str], prompts_from: str) -> "OutputPlan":
        """Returns a copy of the plan with other prompts.

        Args:
            prompts: the new prompts.
            prompts_from: where they come from, for error messages.
        """
        request = replace(self.request, prompts=prompts)
        return replace(self, request=request, prompts_from=prompts_from, examples=False)

    def with_candidates(self, count: int) -> "OutputPlan":
        """Returns a copy of the plan that saves the `count` candidates of each image, too."""
        return replace(self, candidates=count)

    def rewritten(self, rewriter: Rewriter) -> "OutputPlan":
        """Returns a copy of the plan with expanded prompts.

        Raises:
            InputError: a prompt cannot be expanded.
        """
        prompts = tuple(self.request.prompts)
        return replace(self.with_prompts(rewritten(prompts, rewriter), "rewrite"), originals=prompts)

    def prompt_text(self, job: ImageJob) -> dict[str, object]:
        """Returns that part of a picture's text which tells its prompt and repeat."""
        text: dict[str, object] = {"prompt": job.prompt, "repeat": job.repeat}
        return text | original(self.originals, job.prompt_index)

    def described(self) -> dict[str, object]:
        """Returns that part of a picture's text which describes the task."""
        shown, path = self.request.shown, self.image_path
        text: dict[str, object] = {"task": self.label}
        text |= {} if shown is None else {"panel_prompt": shown}
        text |= {} if self.request.instruction is None else {"instruction": self.request.instruction}
        return text | ({} if path is None else {"image_path": path})

    def stem(self, job: ImageJob) -> str:
        """Returns the file name of an image without its extension.

        Without a `name` in the plan, the result is {prompt index}_{repeat}, such as `0_0`. With the name `depth`, it is
        `depth` for the only image of a plan, and `depth_0_0` for one of several.
        """
        numbered = f"{job.prompt_index}_{job.repeat}"
        if self.name is None:
            return numbered
        return self.name if len(self.request.prompts) * self.request.n == 1 else f"{self.name}_{numbered}"

    @property
    def panel_file(self) -> str:
        """The file name of the given picture. It is the same as in the released code."""
        return f"{self.name}_ref_center_crop.png"

    def whole_files(self) -> list[str]:
        """Returns those names of files of this process that do not depend on the family: without parts of images."""
        first = self.request.share[0] == 0
        names = [f"{stem}.png" for stem in map(self.stem, self.request.jobs)]
        for job in self.request.jobs if self.candidates else ():
            names += candidate_files(self.stem(job), job, self.candidates)
        return names + [self.panel_file] * (self.image_path is not None and first)

    def file_names(self) -> list[str]:
        """Returns the names of all files that this process writes, without previews."""
        names, task = self.whole_files(), self.request.worded_task
        for stem in map(self.stem, self.request.jobs):
            names += [result_file(stem)] * (task.panels > 1)
            names += view_files(stem, task.views)
        return names

    def preview_names(self) -> list[str]:
        """Returns the names of all previews of this process. The process itself removes these files."""
        return [preview_file(self.stem(job)) for job in self.request.jobs] if self.preview else []


def result_file(stem: str) -> str:
    """Returns the file name for the lowest panel of the image `{stem}.png`."""
    return f"{stem}_result.png"


def view_files(stem: str, views: int) -> list[str]:
    """Returns the file names for the images of one answer, whose contact sheet is `{stem}.png`; none for one image."""
    digits = len(str(views - 1))
    return [f"{stem}_view_{view:0{digits}}.png" for view in range(views)] if views > 1 else []


def preview_file(stem: str) -> str:
    """Returns the file name for the preview of the image `{stem}.png`."""
    return f"{stem}.preview.png"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate` that select the task, its picture and its words."""
    group = parser.add_argument_group(
        "task", "which tasks there are depends on the checkpoint; see docs/image-tasks.md"
    )
    group.add_argument(
        "--task",
        default="t2i",
        choices=(*task_names(), _GIVEN),
        help="t2i: an image; name of a map: an image and, below it, that map of it (Lumina-mGPT 2.0); multiview: "
        "--views images round one object (Lumina-mGPT); i2i: an image for a given picture",
    )
    group.add_argument(
        "--i2i_task",
        choices=task_names(i2i=True),
        help="name of a map: an image for this map; predict_...: the map of this picture; subject: another image of "
        "the picture's subject; edit: the picture, changed as the prompt says; no_edit: the same picture; detect: "
        "the picture with a box round what the prompt names",
    )
    group.add_argument(
        "--image_path",
        help="given picture. Lumina-mGPT 2.0: the upper panel, cropped at its center to the panel's size; "
        "Lumina-mGPT: cropped to one of the checkpoint's sizes, which is the image's default size, too",
    )
    add_panel_prompt(group)
    group.add_argument(
        "--instruction",
        help="the whole instruction, in place of the task's own and of --prompt; <|image|> is the place of the given "
        "picture (default: at the end)",
    )
    group.add_argument("--views", type=whole, help="images of --task multiview (default: as trained, else 16)")


def add_panel_prompt(group: argparse._ActionsContainer) -> None:
    """Adds --panel_prompt."""
    group.add_argument(
        "--panel_prompt",
        help="text in the instruction for what the described panel displays (subject: the upper panel), instead of "
        "the task's own text",
    )


def request_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of GenerationRequest that do not depend on the task."""
    return {
        "sampling": sampling_settings(args),
        "unset": unset_sampling(args),
        "guide_again": args.cfg is not None,
        "speculation": speculation_settings(args),
        "share": image_share(args.tensor_parallel),
        **{name: getattr(args, name) for name in ("width", "height", "n", "batch_size")},
        **{name: getattr(args, name, None) for name in ("instruction", "views")},
    }


def read_plan(args: argparse.Namespace) -> OutputPlan:
    """Returns the plan of `generate`. If the task has a given picture, it is opened.

    Raises:
        InputError: options do not fit each other, a prompt is missing, or the picture cannot be read.
    """
    settings = request_settings(args)
    prompts = prompt_files.read_prompts(args.prompt, args.prompt_file)
    source = "prompts"
    if args.prompt_file is not None:
        source = f"{'--prompt and ' if args.prompt else ''}--prompt_file {args.prompt_file}"
    if args.instruction is not None:
        prompts, source = _only_instruction(args.instruction, prompts), "instruction"
    if args.task == _GIVEN:
        if args.i2i_task is None:
            raise InputError(f"--task {_GIVEN} needs --i2i_task; it is one of {', '.join(task_names(i2i=True))}")
        plan = picture_plan(args.i2i_task, prompts, ("image_path", args.image_path), args.panel_prompt, settings)
        return replace(plan, prompts_from=source, preview=args.preview)
    for name in ("i2i_task", "image_path", "panel_prompt"):
        value = getattr(args, name)
        if value is not None:
            raise InputError(f"--{name} {value} has no effect without --task {_GIVEN}; add that, or leave it out")
    request = GenerationRequest(prompts or [""], task=_any_task(args.task), **settings)
    return OutputPlan(request, args.task, prompts_from=source, examples=not prompts, preview=args.preview)


def _only_instruction(instruction: str, prompts: Sequence[str]) -> list[str]:
    """Returns the instruction as the only prompt, which names the image in messages and in its text."""
    if prompts:
        raise InputError("replaces --prompt and --prompt_file; leave those out, or --instruction", "instruction")
    if not instruction.strip():
        raise InputError("must not be empty, got ''; say what to make, or leave it out", "instruction")
    return [instruction]


def _any_task(name: str, i2i: bool = False) -> Task:
    """Returns the task of this name of any family, for what is checked before a checkpoint is opened."""
    for family in (SECOND, FIRST):
        table = family.i2i_tasks if i2i else family.tasks
        if name in table:
            return table[name]
    raise KeyError(name)  # the parser knows the names


def picture_plan(
    name: str,
    prompts: Sequence[str],
    source: tuple[str, str | None],
    shown: str | None,
    settings: dict[str, Any],
    extract: bool = False,
) -> OutputPlan:
    """Opens the picture and returns the plan of a task with a given picture.

    Args:
        name: key of the task in `Family.i2i_tasks`.
        prompts: what the image shows; may be empty for some tasks.
        source: (name, value) of the parameter that gives the path of the picture. The value None is an error.
        shown: what the described panel displays; None: the task's own text.
        settings: further fields of the request.
        extract: compute the panel from the picture with the extractor of this task.

    Raises:
        InputError: the task needs a picture or a prompt that is missing, or no map of that name can be computed.
    """
    task, (parameter, path) = _any_task(name, i2i=True), source
    if path is None:
        raise InputError(f"the task {name} needs --{parameter}; give a picture")
    if not prompts and not task.wordless:
        raise InputError(f"the task {name} needs --prompt; say what the image should show")
    if shown is not None and not shown.strip():
        raise InputError("must not be empty, got ''; say what the panel displays, or leave it out", "shown")
    from lumina_mgpt.images import open_panel  # imports torch, which takes seconds
    from lumina_mgpt.maps import EXTRACTORS

    if extract and name not in EXTRACTORS:
        instead = f"lumina-mgpt generate --task {_GIVEN} --i2i_task predict_... generates maps of a picture"
        raise InputError(
            f"--extract must have a --task of {', '.join(EXTRACTORS)}, got {name}; give the panel itself ({instead})"
        )
    picture = open_panel(parameter, path)
    request = GenerationRequest(prompts or [""], task=task, panels=(picture,), shown=shown, **settings)
    return OutputPlan(
        request,
        name,
        i2i=True,
        name=name,
        image_path=path,
        extract=EXTRACTORS[name] if extract else None,
    )
