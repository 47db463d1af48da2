"""Task -> instruction. The model was trained on these very strings; a new task is one entry in the table."""

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
# What the released code writes for any subject picture whatever.
_SUBJECT = "Bubbly and effervescent with a sparkling allure."

MAPS: Mapping[str, str] = MappingProxyType(
    {
        "depth": "depth map",
        "canny": "canny edge map",
        "hed": "hed edge map",
        "openpose": "pose estimation map",
        "normal": "normal map",  # from here on, not in the released code: worded in the same manner
        "segmentation": "segmentation map",
    }
)


@dataclass(frozen=True)
class Task:
    """One kind of request.

    Attributes:
        template: instruction with `{width} {height}` (pixels of the whole image), `{prompt}`, and `{shown}` if it names
            what a panel displays.
        shown: what goes into `{shown}` unless the caller says otherwise.
        panels: panels of the image, one above the other; the height is a multiple of 32 · panels.
        given_panels: how many of them, from the top, the user gives.
        wordless: whether it makes sense without a prompt.
    """

    template: str
    shown: str = ""
    panels: int = 1
    given_panels: int = 0
    wordless: bool = False

    def instruction(self, prompt: str, width: int, height: int, shown: str | None = None) -> str:
        """The human turn; width and height in pixels of the whole image."""
        shown = self.shown if shown is None else shown
        return self.template.format(width=width, height=height, prompt=prompt, shown=shown)


# Everything is generated.
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "t2i": Task(_TEXT_TO_IMAGE),
        **{name: Task(_LOWER_SHOWS, shown, panels=2) for name, shown in MAPS.items()},
    }
)
# The upper panel is given. Predicting a map is the pair's instruction with the picture given: the only wording for it
# that released weights have met. Editing has none in the released code; its prompt is what to change.
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
    """Instruction for an image of that size in pixels."""
    return TASKS["t2i"].instruction(prompt, width, height)


def text_to_image_plain(prompt: str) -> str:
    """Instruction without a size: one in ten of the training sequences has this one."""
    return _TEXT_TO_IMAGE_PLAIN.format(prompt=prompt)
