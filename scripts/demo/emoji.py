"""Emoji pictures of the demo, Microsoft's Fluent Emoji 3D (MIT), and their Unicode names.

Both are npm packages. They are downloaded for training and are not part of the repository.
"""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import open_image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "unicode-emoji-json@0.9.0"
CELL = 96  # side of one emoji's square cell in pixels; the base size of the demo
COLORS = (  # of backgrounds
    "white", "black", "red", "green", "blue", "yellow", "sky blue", "orange", "purple", "pink", "gray", "brown",
    "navy", "turquoise", "lavender", "olive",
)  # fmt: skip

# Everyday names. Unicode calls an animal's head "dog face", and its "pizza" shows a slice.
ALIASES = {
    "monkey face": "monkey", "dog face": "dog", "cat face": "cat", "tiger face": "tiger", "horse face": "horse",
    "cow face": "cow", "pig face": "pig", "mouse face": "mouse", "rabbit face": "rabbit", "dragon face": "dragon",
    "pizza": "slice of pizza", "lady beetle": "ladybug", "honeybee": "bee", "spouting whale": "whale",
    "hot beverage": "cup of coffee", "doughnut": "donut", "automobile": "car", "locomotive": "steam train",
    "flying saucer": "ufo", "wrapped gift": "gift", "gem stone": "diamond", "light bulb": "lamp",
    "soft ice cream": "ice cream", "evergreen tree": "fir tree", "deciduous tree": "tree", "pool 8 ball": "8 ball",
    "jack-o-lantern": "halloween pumpkin", "soccer ball": "football", "red paper lantern": "lantern",
}  # fmt: skip
_NO_ARTICLE = {
    "grapes", "cherries", "blueberries", "pancakes", "french fries", "popcorn", "sushi", "sunglasses", "jeans",
    "scissors", "fire", "meat on bone", "bread", "broccoli",
}  # fmt: skip
_AN_ANYWAY = {"8 ball"}
_A_ANYWAY = {"unicorn", "ufo"}


def known_names() -> list[str]:
    """Names that the demo is trained on, in alphabetical order."""
    return (Path(__file__).parent / "names.txt").read_text().split("\n")[:-1]


def with_article(noun: str) -> str:
    """`hedgehog` -> `a hedgehog`, `owl` -> `an owl`, `grapes` -> `grapes`."""
    if noun in _NO_ARTICLE:
        return noun
    if noun == "statue of liberty":
        return f"the {noun}"
    vowel = noun[0] in "aeiou" and noun not in _A_ANYWAY or noun in _AN_ANYWAY
    return f"{'an' if vowel else 'a'} {noun}"


def is_plural(noun: str) -> bool:
    """Whether a noun has no article and is not counted: `grapes`, `bread`."""
    return noun in _NO_ARTICLE


def with_articles(text: str) -> str:
    """`a orange background` -> `an orange background`, for colours that begin with a vowel."""
    return text.replace(" a orange", " an orange").replace(" a olive", " an olive")


def fetch(folder: Path) -> None:
    """Downloads both packages with npm into `folder`, unless they are already there.

    Raises:
        InputError: npm is not installed or fails.
    """
    for package, name in ((PICTURES, "pictures"), (NAMES, "names")):
        if (folder / name).is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            try:
                command = ["npm", "pack", "--loglevel", "error", package]
                subprocess.run(command, cwd=temporary, check=True, capture_output=True)
            except FileNotFoundError:
                raise InputError(f"npm is needed to fetch {package}; install Node.js") from None
            except subprocess.CalledProcessError as error:
                reason = " ".join(error.stderr.decode(errors="replace").split())[-200:]
                raise InputError(f"npm pack {package} failed ({reason}); is the registry reachable?") from None
            (archive,) = Path(temporary).glob("*.tgz")
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            shutil.move(Path(temporary) / "package", folder / name)


def load(folder: Path, side: int = CELL, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """RGBA pictures of these names (default: all known ones). Shapes: (side, side, 4) float32. Ranges: [0, 1].

    Raises:
        InputError: the packages have no picture of a name.
    """
    paths = picture_paths(folder)
    pictures = {}
    for name in known_names() if names is None else names:
        if name not in paths:
            raise InputError(f"no picture of {name!r} in {folder}; remove the folder to fetch the packages again")
        small = open_image(paths[name], alpha=True).resize((side, side), Image.Resampling.LANCZOS)
        pictures[name] = np.asarray(small, np.float32) / 255
    return pictures


def picture_paths(folder: Path, groups: Sequence[str] | None = None) -> dict[str, Path]:
    """Files of all emoji that have a picture, by name.

    Args:
        folder: the packages.
        groups: Unicode's groups of the emoji (default: all).
    """
    listed = json.loads((folder / "names" / "data-by-emoji.json").read_text(encoding="utf-8"))
    found = {}
    for emoji, entry in listed.items():
        points = [f"{ord(c):04x}" for c in emoji]
        stems = "-".join(points), "-".join(p for p in points if p != "fe0f")
        files = (folder / "pictures" / "assets" / f"{stem}.webp" for stem in stems)
        path = next((file for file in files if file.is_file()), None)
        if path and (groups is None or entry["group"] in groups):
            found[entry["name"].lower()] = path
    return found
