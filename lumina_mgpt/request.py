"""One request for images, validated when it is made. Importing this module does not import torch."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Union

from lumina_mgpt.checks import excerpt, require, whole_number
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import TASKS, Task

if TYPE_CHECKING:
    from lumina_mgpt.panels import Panel

_MOST_IMAGES = 100_000  # each image takes a file name and some memory before the first is sampled


@dataclass(frozen=True)
class ImageJob:
    """One image to make.

    Args:
        prompt: text of the prompt.
        prompt_index: index of the prompt in the request, from 0.
        repeat: index of the image among those of its prompt, from 0.
    """

    prompt: str
    prompt_index: int
    repeat: int


@dataclass(frozen=True)
class GenerationRequest:
    """A request for `n` images of each prompt.

    An image depends on its prompt, its repeat (0 to n - 1), its given panel, the seed and the sampling settings. It
    does not depend on the other prompts, their order or `batch_size`.

    Args:
        prompts: texts, at least one; a single str becomes a tuple.
        width, height: pixels of the whole image (default: `Checkpoint.base_size`). The width is a multiple of 32, the
            height of 32 · `task.panels`.
        n: images of each prompt.
        sampling: guidance, temperature, top-k and seed.
        speculation: settings of speculative sampling, None for one code per forward. The coupling `noise` gives the
            same image as None. Other couplings give an image from the same distribution.
        unset: names of fields of `sampling` that get the default values of the task and the checkpoint's family.
        guide_again: whether `sampling.cfg` may guide weights that are guided already, see `ModelConfig.guided_scale`.
            Else `Checkpoint.prepare` refuses that.
        task: a task of the checkpoint's family, an entry of `families.Family.tasks` or `i2i_tasks`.
        panels: given pictures, one for all prompts or one per prompt: the upper panels, or the pictures in the
            instructions. Pictures, also those read from paths, are cropped to the panel's size, or to the fitting one
            of the checkpoint's sizes. Codes are used unmodified.
        shown: what the panel that the instruction describes displays (default: `task.shown`).
        instruction: whole instruction, in place of the task's own, see `Task.worded`; prompts have no effect on it.
        views: number of images of one answer (default: `task.views`). Only tasks with several images take another.
        batch_size: images sampled together; None: as many as fit the cache limit, at most
            `devices.largest_batch`.
        share: (rank, count): this process is number `rank` (from 0) of `count` processes. It makes every count-th
            image, starting with index `rank`.

    Raises:
        InputError: a value has another type or is out of range. `Checkpoint.prepare` checks what depends on a
            checkpoint: sizes, lengths and panels.
    """

    prompts: Sequence[str]
    width: int | None = None
    height: int | None = None
    n: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    unset: Collection[str] = ()
    guide_again: bool = False
    speculation: Speculation | None = None
    task: Task = TASKS["t2i"]
    panels: Sequence["Panel"] = ()
    shown: str | None = None
    instruction: str | None = None
    views: int | None = None
    batch_size: int | None = None
    share: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str | bytes) else _several(self.prompts)
        if not prompts:
            raise InputError("must hold at least one text, got none", "prompts")
        others = ("shown", self.shown or ""), ("instruction", self.instruction or "")
        for name, text in (*(("prompts", text) for text in prompts), *others):
            if not isinstance(text, str):
                raise InputError(f"must be text, got {type(text).__name__}; give a str", name)
        known = isinstance(self.sampling, SamplingConfig)
        require(known, "sampling", self.sampling, "must be a config.SamplingConfig")
        known = self.speculation is None or isinstance(self.speculation, Speculation)
        require(known, "speculation", self.speculation, "must be a config.Speculation or None")
        if not isinstance(self.task, Task):
            rule = "must be a prompts.Task, such as families.SECOND.tasks['t2i']"
            raise InputError(f"{rule}, got {excerpt(self.task)}", "task")
        plain = {
            "prompts": prompts,
            "panels": (self.panels,) if isinstance(self.panels, str | bytes) else tuple(self.panels),
            "width": _pixels("width", self.width),
            "height": _pixels("height", self.height),
            "n": image_count("n", self.n),
            "views": None if self.views is None else image_count("views", self.views),
            "batch_size": None if self.batch_size is None else image_count("batch_size", self.batch_size),
            "share": _share(self.share),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        *,
        panel: Union["Panel", Sequence["Panel"], None] = None,
        **settings: Any,
    ) -> "GenerationRequest":
        """Returns a request from flat keyword arguments.

        Args:
            panel: one given picture, or one per prompt.
            settings: fields of SamplingConfig (`cfg`, `top_k`, `temperature`, `seed`) and of GenerationRequest. Fields
                of SamplingConfig that are not given are `unset`. A given `cfg` sets `guide_again`.
        """
        settings.setdefault("guide_again", "cfg" in settings)
        if "sampling" not in settings:
            every = {item.name for item in fields(SamplingConfig)}
            names = every & settings.keys()
            settings["sampling"] = SamplingConfig(**{name: settings.pop(name) for name in names})
            settings.setdefault("unset", tuple(sorted(every - names)))
        panels = () if panel is None else panel if isinstance(panel, list | tuple) else (panel,)
        return cls(prompts, width, height, panels=panels, **settings)

    @property
    def worded_task(self) -> Task:
        """The task with the request's own instruction and number of images, where they are given."""
        task = self.task if self.instruction is None else self.task.worded(self.instruction)
        return task if self.views is None else replace(task, views=self.views)

    @property
    def jobs(self) -> list[ImageJob]:
        """The images that `share` selects, ordered by prompt, then by repeat."""
        first, every = self.share
        jobs = [ImageJob(text, index, repeat) for index, text in enumerate(self.prompts) for repeat in range(self.n)]
        return jobs[first::every]


def _several(prompts: Sequence[str]) -> tuple[str, ...]:
    require(isinstance(prompts, Iterable), "prompts", prompts, "must be a text or a sequence of texts")
    return tuple(prompts)


def _pixels(name: str, value: int | None) -> int | None:
    return None if value is None else whole_number(name, value, None, None, "must be a whole number of pixels")


def image_count(name: str, value: int) -> int:
    """Returns `value`, a number of images, as an int.

    Args:
        name: name of the parameter, for the error.

    Raises:
        InputError: `value` is not a whole number in 1 ... 100000.
    """
    return whole_number(name, value, 1, _MOST_IMAGES, f"must be a whole number in 1 ... {_MOST_IMAGES}; try 1")


def _share(share: tuple[int, int]) -> tuple[int, int]:
    rule = "must be two whole numbers (r, count) with 0 <= r < count"
    require(isinstance(share, list | tuple) and len(share) == 2, "share", share, rule)
    count = whole_number("share", share[1], 1, None, rule)
    return whole_number("share", share[0], 0, count - 1, rule), count
