"""Image tasks of the demo: dual-panel examples made of scenes, their prompts, and their training records."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import scenes
from emoji import CELL, COLORS, with_article, with_articles
from PIL import Image
from scenes import Scene

from lumina_mgpt.images import stacked
from lumina_mgpt.maps import canny
from lumina_mgpt.prompts import I2I_TASKS, TASKS, Task

SIZE = (CELL, 2 * CELL)  # (width, height) of two panels of the base size


@dataclass(frozen=True)
class Kind:
    """A kind of example.

    Attributes:
        task: its task.
        upper, lower: what the panels show: picture, depth, canny or segmentation.
        records: number of training records.
        otherwise: share of training prompts of another form than in the evaluation. For a control panel they give only
            the background, so that the model must use the panel; for a subject or prediction they name the object.
    """

    task: Task
    upper: str
    lower: str
    records: int
    otherwise: float = 0.0


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "pair_depth": Kind(TASKS["depth"], "picture", "depth", 2000),
        "pair_canny": Kind(TASKS["canny"], "picture", "canny", 2000),
        "depth": Kind(I2I_TASKS["depth"], "depth", "picture", 5000, 0.75),
        "canny": Kind(I2I_TASKS["canny"], "canny", "picture", 16000, 0.65),
        "subject": Kind(I2I_TASKS["subject"], "picture", "picture", 4500, 0.15),
        "edit": Kind(I2I_TASKS["edit"], "picture", "picture", 4500),
        "predict_depth": Kind(I2I_TASKS["predict_depth"], "picture", "depth", 4000, 0.3),
        "predict_canny": Kind(I2I_TASKS["predict_canny"], "picture", "canny", 10500, 0.3),
        "predict_segmentation": Kind(I2I_TASKS["predict_segmentation"], "picture", "segmentation", 2500, 0.3),
    }
)
_OF_LAYERS = {"depth": scenes.depth, "segmentation": scenes.segmentation}  # maps that do not depend on the background
_BACKGROUNDS = ("on a {c} background", "the same on a {c} background", "{c} background", "it, {c} background")
# Operation -> weight and prompts of an edit: {n} is the old object, {b} the new one, {c} the new background.
_EDITS = {
    "background": (4, ("make the background {c}", "change the background to {c}", "put it on a {c} background")),
    "replace": (4, ("replace the {n} with {b}", "turn the {n} into {b}", "swap the {n} for {b}")),
    "remove": (2, ("remove the {n}", "take the {n} away")),
    "add": (1, ("add {b}", "put {b} there")),
    "nothing": (1, ("no edit",)),
}


@dataclass(frozen=True)
class Example:
    """The two panels of one image and its prompt; `shown` as in Task.instruction."""

    kind: str
    upper: Scene
    lower: Scene
    prompt: str
    shown: str | None = None

    @property
    def task(self) -> Task:
        return KINDS[self.kind].task

    @property
    def held_out(self) -> bool:
        """Whether one of its scenes is held out of training."""
        return self.upper.held_out or self.lower.held_out

    @property
    def keys(self) -> tuple[str, str]:
        """Paths without suffix of the two panels; identical panels have the same path."""
        kind = KINDS[self.kind]
        return _key(self.upper, kind.upper), _key(self.lower, kind.lower)


def _key(scene: Scene, shows: str) -> str:
    if shows in _OF_LAYERS:
        scene = replace(scene, color="any")
    return f"{shows}/{scene.key}"


def draw_panel(scene: Scene, shows: str, pictures: dict[str, np.ndarray]) -> Image.Image:
    """The picture or the map of a scene; `shows` is picture, depth, canny or segmentation."""
    if shows in _OF_LAYERS:
        return _OF_LAYERS[shows](scene, pictures)
    picture = scenes.render(scene, pictures)
    return canny(picture) if shows == "canny" else picture


def panels(example: Example, pictures: dict[str, np.ndarray]) -> tuple[Image.Image, Image.Image]:
    """The upper panel and the lower one."""
    kind = KINDS[example.kind]
    return draw_panel(example.upper, kind.upper, pictures), draw_panel(example.lower, kind.lower, pictures)


def draw(example: Example, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Both panels in one picture of SIZE."""
    return stacked(panels(example, pictures))


def record(example: Example, paths: tuple[str, str]) -> dict:
    """The example as a record for pre-tokenization; `paths` are its panels, both with a loss."""
    text = example.task.instruction(example.prompt, *SIZE, example.shown)
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "<|image|>"}]
    return {"conversations": turns, "image": [list(paths)], "task": example.kind}


def training_examples(kind: str, names: list[str], rng: random.Random) -> list[Example]:
    """Training examples without scenes that are held out; each scene is used once before one repeats."""
    pool = [scene for scene in scenes.all_singles(names) if not scene.held_out]
    rng.shuffle(pool)
    found: list[Example] = []
    while len(found) < KINDS[kind].records:
        example = _example(kind, pool[len(found) % len(pool)], names, KINDS[kind].otherwise, rng)
        if not example.held_out:  # the other scene of an edit
            found.append(example)
    return found


def evaluation_examples(
    kind: str, names: list[str], count: int, rng: random.Random, otherwise: float = 0.0
) -> list[Example]:
    """At most `count` examples of scenes that are held out; `otherwise` as in Kind."""
    pool = [scene for scene in scenes.all_singles(names) if scene.held_out]
    return [_example(kind, scene, names, otherwise, rng) for scene in rng.sample(pool, min(count, len(pool)))]


def _example(kind: str, scene: Scene, names: list[str], otherwise: float, rng: random.Random) -> Example:
    if kind == "edit":
        return _edit(scene, names, rng)
    differs, task = rng.random() < otherwise, KINDS[kind].task
    if kind == "subject":
        return _subject(scene, differs, rng)
    if task.wordless and not differs:
        prompt = ""
    elif task.given_panels and not task.wordless and differs:  # the model must use the control panel
        prompt = _background(scene, rng)
    else:
        prompt = scenes.caption(scene, rng)
    return Example(kind, scene, scene, prompt)


def _background(scene: Scene, rng: random.Random) -> str:
    return with_articles(rng.choice(_BACKGROUNDS).format(c=scene.color))


def _subject(scene: Scene, named: bool, rng: random.Random) -> Example:
    """The same emoji on another background; if `named`, either the prompt or `shown` contains its name."""
    reference = Scene(scene.names, rng.choice([color for color in COLORS if color != scene.color]))
    if not named:
        return Example("subject", reference, scene, _background(scene, rng))
    if rng.random() < 0.5:
        return Example("subject", reference, scene, scenes.caption(scene, rng))
    shown = with_article(scenes.noun(scene.names[0], rng))
    return Example("subject", reference, scene, _background(scene, rng), shown)


def _edit(scene: Scene, names: list[str], rng: random.Random) -> Example:
    """An edit whose result is the scene; for a removal, the scene is the input."""
    (name,), color = scene.names, scene.color
    (operation,) = rng.choices(list(_EDITS), [weight for weight, _ in _EDITS.values()])
    other = rng.choice([known for known in names if known != name])
    bare = Scene((), color)
    before, after = {
        "background": (Scene((name,), rng.choice([known for known in COLORS if known != color])), scene),
        "replace": (Scene((other,), color), scene),
        "remove": (scene, bare),
        "add": (bare, scene),
        "nothing": (scene, scene),
    }[operation]
    old, new = (scenes.noun(panel.names[0], rng) if panel.names else "" for panel in (before, after))
    words = {"n": old, "b": with_article(new) if new else "", "c": color}
    return Example("edit", before, after, with_articles(rng.choice(_EDITS[operation][1]).format(**words)))
