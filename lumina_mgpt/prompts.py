"""Tasks and their instructions, as data. To add a task, add one entry.

The models are trained on exactly these strings. TASKS and I2I_TASKS are those of the second generation, FIRST_TASKS and
FIRST_I2I_TASKS those of the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

PICTURE = "<|image|>"  # stands for a picture in a text, as in the released records

_TEXT_TO_IMAGE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
_TEXT_TO_IMAGE_PLAIN = "Generate an image according to the following prompt:\n{prompt}"
_LOWER_SHOWS = (
    "Generate a dual-panel image of {width}x{height} where the <lower half> displays a <{shown}>, "
    "while the <upper half> retains the original image for direct visual comparison:\n{prompt}"
)
_UPPER_SHOWS = (
    "Generate a dual-panel image of {width}x{height} where the <upper half> displays a <{shown}>, "
    "while the <lower half> retains the original image for direct visual comparison:\n{prompt}"
)
# The released code uses this text for every subject picture.
_SUBJECT = "Bubbly and effervescent with a sparkling allure."

MAPS: Mapping[str, str] = MappingProxyType(
    {
        "depth": "depth map",
        "canny": "canny edge map",
        "hed": "hed edge map",
        "openpose": "pose estimation map",
        "normal": "normal map",  # this and later entries are not in the released code; same wording
        "segmentation": "segmentation map",
    }
)


@dataclass(frozen=True)
class Task:
    """A kind of request.

    Attributes:
        template: text of the instruction with the fields `{width}`, `{height}` (pixels of the whole image) and
            `{prompt}`. The optional field `{shown}` says what one of the panels displays.
        shown: default of `{shown}`.
        panels: number of panels of the image, one above the other; the height is a multiple of 32 · panels.
        given_panels: number of panels that the user gives, counted from the top.
        wordless: whether the prompt may be empty.
        views: number of images of one answer.
        side: default side of an image in pixels, if the checkpoint's base size is larger.
        box: whether the image is the given picture with a box drawn in.
        sampling: default values of `SamplingConfig`, where they differ from those of the family.
    """

    template: str
    shown: str = ""
    panels: int = 1
    given_panels: int = 0
    wordless: bool = False
    views: int = 1
    side: int | None = None
    box: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def takes_picture(self) -> bool:
        """Whether the instruction contains a given picture, as a whole image of the human's turn."""
        return PICTURE in self.template

    @property
    def given(self) -> bool:
        """Whether the user gives a picture: a panel of the image, or a picture in the instruction."""
        return self.given_panels > 0 or self.takes_picture

    @property
    def has_prompt(self) -> bool:
        """Whether the instruction contains the prompt."""
        return "{prompt}" in self.template

    def worded(self, instruction: str) -> "Task":
        """Returns a copy of the task whose instruction is this text.

        Args:
            instruction: text with PICTURE where a given picture belongs. Without it, the picture comes last, after a
                space.
        """
        template = instruction.replace("{", "{{").replace("}", "}}")
        if self.takes_picture and PICTURE not in template:
            template = f"{template} {PICTURE}"
        return replace(self, template=template)

    def parts(self, prompt: str, width: int, height: int, shown: str | None = None) -> list[str | None]:
        """Returns the instruction as its texts, with None for the picture in it. Arguments: as `instruction`."""
        before, *after = self.template.split(PICTURE)
        texts = [replace(self, template=text).instruction(prompt, width, height, shown) for text in (before, *after)]
        return [part for text in texts for part in (None, text)][1:]

    def instruction(self, prompt: str, width: int, height: int, shown: str | None = None) -> str:
        """Returns the instruction for a prompt: the text of the human turn, with PICTURE for a given picture.

        Args:
            width, height: pixels of the whole image.
            shown: what the panel that the instruction describes displays (default: the task's `shown`).
        """
        shown = self.shown if shown is None else shown
        return self.template.format(width=width, height=height, prompt=prompt, shown=shown, views=self.views)


# All panels are generated.
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "t2i": Task(_TEXT_TO_IMAGE),
        **{name: Task(_LOWER_SHOWS, shown, panels=2) for name, shown in MAPS.items()},
    }
)
# The upper panel is given. Predicting a map has the instruction of TASKS, the only wording of it that released weights
# are trained on. The released code has no instruction for editing; its prompt is what to change.
I2I_TASKS: Mapping[str, Task] = MappingProxyType(
    {
        **{name: Task(_UPPER_SHOWS, shown, panels=2, given_panels=1) for name, shown in MAPS.items()},
        "subject": Task(_UPPER_SHOWS, _SUBJECT, panels=2, given_panels=1),
        "edit": Task(_LOWER_SHOWS, "modified image", panels=2, given_panels=1),
        **{
            f"predict_{name}": Task(_LOWER_SHOWS, shown, panels=2, given_panels=1, wordless=True)
            for name, shown in MAPS.items()
        },
    }
)

# -- the first generation: a given picture is a whole image in the instruction ----------------------------------------

_MAP = MappingProxyType({"cfg": 1.0, "top_k": 200})  # as the released examples: maps need no guidance
_FROM_MAP = Task(
    "Generate an image according to the provided image, and according to the following caption:\n{prompt} " + PICTURE
)
_MULTIVIEW = "Generate {views} object views of {width}x{height} according to the following prompt:\n{prompt}"

# The released code sends "Segmentic", the paper's figure prints "Semantic".
FIRST_MAPS: Mapping[str, str] = MappingProxyType(
    {
        "depth": "Depth estimation.",
        "normal": "Surface normal estimation.",
        "openpose": "Human pose estimation.",
        "segmentation": "Segmentic segmentation.",
    }
)
FIRST_TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "t2i": TASKS["t2i"],
        "multiview": Task(_MULTIVIEW, views=16, side=384),  # both numbers from the paper
    }
)
FIRST_I2I_TASKS: Mapping[str, Task] = MappingProxyType(
    {
        **dict.fromkeys(FIRST_MAPS, _FROM_MAP),  # the instruction does not say which map is given
        "edit": Task("{prompt} " + PICTURE),
        "no_edit": Task("no edit " + PICTURE, wordless=True),
        "detect": Task("Detect: {prompt} " + PICTURE, box=True, sampling=_MAP),
        **{
            f"predict_{name}": Task(f"{text} {PICTURE}", wordless=True, sampling=_MAP)
            for name, text in FIRST_MAPS.items()
        },
    }
)


def text_to_image(prompt: str, width: int, height: int) -> str:
    """Returns the text-to-image instruction for a prompt and an image size in pixels."""
    return TASKS["t2i"].instruction(prompt, width, height)


def text_to_image_plain(prompt: str) -> str:
    """Returns the text-to-image instruction without a size. One in ten training sequences has it."""
    return _TEXT_TO_IMAGE_PLAIN.format(prompt=prompt)
