"""Reads prompts from text files of users and checkpoints, and suggests corrections of names."""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.families import task_names
from lumina_mgpt.io import lines_of, read_json, read_text

# In a checkpoint folder: prompts of text to image; and other examples.
PROMPTS_FILE, EXAMPLES_FILE = "prompts.txt", "examples.json"
CHAT = "chat"  # the key of messages in EXAMPLES_FILE


EXAMPLE_PROMPTS = (
    "A red fox curled up asleep in fresh snow under a birch tree, soft morning light, close-up photograph",
    "An old lighthouse on a rocky cape at dusk, its beam crossing a stormy violet sky, oil painting",
    "A bowl of ramen with a soft-boiled egg and spring onions on a wooden counter, steam rising, food photography",
    "A glass greenhouse full of giant ferns, sunbeams through the panes, a small robot watering the plants",
    "A paper-cut landscape of mountains, a river and a hot-air balloon in shades of teal and orange",
)


def read_prompts(prompts: Sequence[str] | None, file: str | None, parameter: str = "prompt_file") -> list[str]:
    """Returns `prompts`, followed by the prompts in a file: one per line, blank lines ignored.

    Args:
        parameter: name of the parameter that has the file, for errors.

    Raises:
        InputError: a prompt is empty, or the file cannot be read, is not UTF-8, or has no prompt.
    """
    result = list(prompts or ())
    if any(not prompt.strip() for prompt in result):
        raise InputError("must not be empty, got ''; say what the image should show", "prompts")
    if file is not None:
        lines = _not_blank(read_text(file, parameter))
        if not lines:
            raise InputError(f"{file} must hold at least one prompt, got none; write one per line", parameter)
        result += lines
    return result


def example_prompts(folder: Path) -> list[str]:
    """Returns example prompts: the first five in the checkpoint's `prompts.txt`, else EXAMPLE_PROMPTS.

    Args:
        folder: the checkpoint folder.

    Raises:
        InputError: `prompts.txt` exists but cannot be read or is not UTF-8.
    """
    file = folder / PROMPTS_FILE
    return (_not_blank(read_text(file)) if file.exists() else [])[:5] or list(EXAMPLE_PROMPTS)


def other_examples(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Returns the examples in the checkpoint's `examples.json`; nothing without that file.

    The file maps the name of a task with a given picture to prompts for it, and CHAT to messages.

    Raises:
        InputError: the file cannot be read, or does not have this form.
    """
    file = folder / EXAMPLES_FILE
    if not file.exists():
        return {}
    found, known = read_json(file), (CHAT, *task_names(i2i=True))
    for name, texts in found.items():
        if name not in known:
            raise InputError(f"{file}: {name!r} must be one of {', '.join(known)}; correct or remove the file")
        if not isinstance(texts, list) or not all(map(_shows, texts)):
            rule = "must hold a list of texts, none of them empty or with control characters"
            raise InputError(f"{file}: {name!r} {rule}; correct or remove the file")
    return {name: tuple(texts) for name, texts in found.items()}


def _shows(text: object) -> bool:
    """Whether a value of a file is text that can be shown, with line breaks or without."""
    controls = ("Cc", "Cs")  # the second: half of a character
    return (
        isinstance(text, str)
        and bool(text.strip())
        and not any(letter != "\n" and unicodedata.category(letter) in controls for letter in text)
    )


def known_names(folder: Path) -> list[str]:
    """Returns the names of things that a small checkpoint can draw, from its `names.txt`; empty without that file."""
    try:
        return _not_blank(read_text(folder / "names.txt"))
    except InputError:  # only hints need the names
        return []


def unknown_hint(prompt: str, names: Sequence[str]) -> str | None:
    """Returns a hint with similar names if a prompt contains none of `names`, else None.

    Args:
        names: what `known_names` returns; None is returned if it is empty.
    """
    text = prompt.lower()
    if not names or any(re.search(rf"\b{_plural_too(name.lower())}\b", text) for name in names):
        return None
    words = re.findall(r"[\w'-]+", text)
    phrases = [" ".join(words[i : i + size]) for size in (3, 2, 1) for i in range(len(words) - size + 1)]
    close: dict[str, float] = {}
    for phrase in phrases:
        for name in difflib.get_close_matches(phrase, names, n=3, cutoff=0.7):
            close[name] = max(close.get(name, 0.0), difflib.SequenceMatcher(None, phrase, name).ratio())
    best = sorted(close, key=lambda name: -close[name])[:3]
    suggestion = f"did you mean {' or '.join(best)}?" if best else f"it knows {', '.join(names[:3])} and so on"
    return f"{prompt!r} contains none of the {len(names)} names that this checkpoint knows; {suggestion} (names.txt)"


def _plural_too(name: str) -> str:
    """Returns a pattern for a name and its regular plural: cat, cats; box, boxes; cherry, cherries."""
    stem = re.escape(name)
    return f"(?:{stem}(?:e?s)?|{stem[:-1]}ies)" if name.endswith("y") else f"{stem}(?:e?s)?"


def _not_blank(text: str) -> list[str]:
    """Returns the lines that are not blank, stripped."""
    return [line.strip() for line in lines_of(text) if line.strip()]
