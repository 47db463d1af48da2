"""The project's documents and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "assets/demo", "lumina_mgpt/movqgan/270M", "scripts")
    for path in (ROOT / folder).glob("*.md")
)
GUIDE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CELL = re.compile(r"\| `(lumina-mgpt [^`]*--[^`]*)` \|")
_MENTION = re.compile(r"`((?:lumina-mgpt [a-z]|python (?:scripts|generate_examples)/|scripts/)[^`\n]* --[^`\n]*)`")
_PROGRAM = re.compile(r"(?:lumina-mgpt|python \S+\.py|accelerate launch \S+\.py|\S+\.sh) [^;|&]*")


def guide_text() -> str:
    """README.md and docs/*.md, one after another."""
    return "\n".join(path.read_text(encoding="utf-8") for path in GUIDE)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [body for name, body in _BLOCK.findall(text) if name == language]


def prose(text: str) -> str:
    """The text without its code blocks."""
    return _BLOCK.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The project's commands in bash blocks and in cells of tables, as words."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines() + _CELL.findall(text)
    found = (_PROGRAM.search(re.sub(r"\$\{\w+:-(\w+)\}", r"\1", line)) for line in lines)
    return [shlex.split(match[0], comments=True) for match in found if match]


def mentions(text: str) -> list[list[str]]:
    """Commands with options in running text, as words; they may leave out required options."""
    return [match.split() for match in _MENTION.findall(prose(text))]
