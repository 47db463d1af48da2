"""Tasks and their instructions, as data. To add a task, add one entry.

The model is trained on exactly these strings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
    """

    template: str
    shown: str = ""
    panels: int = 1
    given_panels: int = 0
    wordless: bool = False

    def instruction(self, prompt: str, width: int, height: int, shown: str | None = None) -> str:
        """Returns the instruction for a prompt: the text of the human turn.

        Args:
            width, height: pixels of the whole image.
            shown: what the panel that the instruction describes displays (default: the task's `shown`).
        """
        shown = self.shown if shown is None else shown
        return self.template.format(width=width, height=height, prompt=prompt, shown=shown)


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


def text_to_image(prompt: str, width: int, height: int) -> str:
    """Returns the text-to-image instruction for a prompt and an image size in pixels."""
    return TASKS["t2i"].instruction(prompt, width, height)


def text_to_image_plain(prompt: str) -> str:
    """Returns the text-to-image instruction without a size. One in ten training sequences has it."""
    return _TEXT_TO_IMAGE_PLAIN.format(prompt=prompt)
