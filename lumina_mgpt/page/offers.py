"""What the page offers for a checkpoint: sizes, tasks and examples, and the default settings of a task."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lumina_mgpt import prompt_files
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import candidate_sizes
from lumina_mgpt.maps import EXTRACTORS
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.prompts import Task

_ROOM = 128  # ids that remain for the prompt where a size is offered
_NEAR = 1.0, 3 / 2, 2 / 3, 2.0, 1 / 2  # offered ratios of width and height
_WHOLE = "t2i"  # the task of text to image without a panel


@dataclass(frozen=True)
class Offer:
    """What a checkpoint can be asked for.

    Attributes:
        sizes: size in pixels, such as `96x96`, of images of one panel; the first is the default.
        tasks: name -> task without a given picture, one image an answer.
        picture_tasks: name -> task with a given picture, without editing.
        edit: the task of editing; None if the family has none.
        examples: prompts of text to image.
        others: name of a task with a given picture -> prompts, and `chat` -> messages, see `other_examples`.
        names: what a small checkpoint can draw; empty if it does not say so.
    """

    sizes: tuple[str, ...]
    tasks: Mapping[str, Task]
    picture_tasks: Mapping[str, Task]
    edit: Task | None
    examples: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Offer":
        """Returns what a checkpoint offers."""
        family = checkpoint.config.family
        return cls(
            sizes=tuple(_sizes(checkpoint)),
            tasks={name: task for name, task in family.tasks.items() if task.views == 1},
            picture_tasks={name: task for name, task in family.i2i_tasks.items() if name != "edit"},
            edit=family.i2i_tasks.get("edit"),
            examples=tuple(prompt_files.example_prompts(checkpoint.folder)),
            others=prompt_files.other_examples(checkpoint.folder),
            names=tuple(prompt_files.known_names(checkpoint.folder)),
        )

    def with_name(self, prompt: str, name: str) -> str:
        """Returns a prompt with another name: in the place of a known name, or else as the whole prompt."""
        known = sorted(map(re.escape, self.names), key=len, reverse=True)
        found = re.search(rf"(?:\b(an?) )?\b({'|'.join(known)})\b", prompt, re.IGNORECASE) if known else None
        if found is None:
            return f"{_article(name)} {name}"
        new = f"{_article(name)} {name}" if found[1] else name
        return prompt[: found.start()] + new + prompt[found.end() :]


def task_label(name: str, task: Task) -> str:
    """Returns the words for a task in a list, such as `picture from depth map`."""
    kind = name.removeprefix("predict_").replace("_", " ")
    if name == _WHOLE:
        return "image"
    if name.startswith("predict_"):
        return f"{kind} map of the picture"
    if name in ("no_edit", "detect", "subject"):
        return {"no_edit": "the picture again", "detect": "find an object", "subject": "the subject elsewhere"}[name]
    return f"image from {kind} map" if task.given else f"image with {kind} map"


def computes_map(name: str) -> bool:
    """Returns whether the map of a task can be computed from a photo."""
    return name in EXTRACTORS


def _article(name: str) -> str:
    return "an" if name[:1].lower() in "aeiou" else "a"


def _sizes(checkpoint: Checkpoint) -> list[str]:
    """Returns the base size, and the sizes nearest to common ratios, that fit the model's context."""
    side = checkpoint.config.base_size
    try:
        candidates = candidate_sizes(side)
    except InputError:  # a base size that no list of sizes is made for
        candidates = []
    # Small checkpoints also draw two objects, side by side or one above the other.
    candidates += [(side, side), (2 * side, side), (side, 2 * side)]
    fitting = [size for size in candidates if _fits(checkpoint, *size)]
    chosen = [checkpoint.base_size()]
    for ratio in _NEAR:
        near = min(fitting, key=lambda size: (abs(size[0] / size[1] - ratio), -size[0] * size[1]), default=None)
        if near is not None and near not in chosen:
            chosen.append(near)
    return [f"{width}x{height}" for width, height in chosen]


def _fits(checkpoint: Checkpoint, width: int, height: int) -> bool:
    try:
        return checkpoint.layout(width, height).length + _ROOM <= checkpoint.config.context
    except InputError:
        return False
