"""Rewards of the demo for `lumina-mgpt grpo`: the scores of its evaluation.

    PYTHONPATH=scripts/demo lumina-mgpt grpo --reward rewards:right ...

The scene of each prompt is in the file that the variable DEMO_SCENES names (default: work/grpo/scenes.json), which
`learn_rewards.py prompts` writes. The emoji pictures are in the folder DEMO_EMOJI (default: work/demo/emoji).
"""

import functools
import json
import os
from pathlib import Path

import emoji
import evaluation
import numpy as np
from omni import Example
from PIL import Image
from scenes import Scene

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_json

# Row of the evaluation -> name of its task.
ROWS = {"one emoji": "t2i", "two emoji": "t2i", "pair_depth": "depth", "pair_canny": "canny"}


@functools.cache
def emoji_pictures() -> dict[str, np.ndarray]:
    """The emoji by name, from the folder DEMO_EMOJI."""
    folder = Path(os.environ.get("DEMO_EMOJI", "work/demo/emoji"))
    emoji.fetch(folder)
    return emoji.load(folder)


@functools.cache
def _asked() -> tuple[str, dict[str, Scene]]:
    stored = read_json(Path(os.environ.get("DEMO_SCENES", "work/grpo/scenes.json")))
    return stored["row"], {text: Scene(tuple(names), *rest) for text, (names, *rest) in stored["scenes"].items()}


def write_scenes(path: Path, row: str, scenes: dict[str, Scene]) -> None:
    """Writes the scene of each prompt, as `right` reads it."""
    listed = {text: (scene.names, scene.color, scene.arrangement) for text, scene in scenes.items()}
    path.write_text(json.dumps({"row": row, "scenes": listed}, indent=0) + "\n")


def scores(row: str, scene: Scene, image: Image.Image, pictures: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the scores of an image by name, the first of them whether all its emoji are right."""
    if row in ("one emoji", "two emoji"):
        found = [evaluation.nearest_emoji(cell, scene.color, pictures) for cell in evaluation.cells(image, scene)]
        return {
            "right emoji": float(found == list(scene.names)),
            "right background": float(evaluation.nearest_color(image) == scene.color),
        }
    found = evaluation.scores(Example(row, scene, scene, ""), image, pictures)
    return dict(zip(evaluation.SCORES[row], map(float, found), strict=True))


def right(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Returns the mean of all scores of each image.

    Raises:
        InputError: a prompt is not in the file of scenes.
    """
    row, known = _asked()
    if unknown := [prompt for prompt in prompts if prompt not in known]:
        raise InputError(f"{unknown[0]!r} is not in DEMO_SCENES; write it with learn_rewards.py prompts")
    pairs = zip(images, prompts, strict=True)
    return [float(np.mean([*scores(row, known[text], image, emoji_pictures()).values()])) for image, text in pairs]
