"""Expanded prompts of a benchmark. They are kept, so that a run that goes on draws from the same words."""

import json
from collections.abc import Callable, Iterable

from filelock import FileLock

from lumina_mgpt.benchmarks.folder import BenchmarkFolder
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import append_lines, lines_of, read_text

FILE = "rewritten.jsonl"  # a line for each prompt: {"prompt": ..., "rewritten": ...}


def tried(folder: BenchmarkFolder, prompt: str, rewriter: Callable[[str], str]) -> Callable[[str], str]:
    """Expands one prompt before the folder is opened, so that a wrong address or function leaves no folder behind.

    Of a folder in which prompts were expanded, none is expanded here, as none may be left to do.

    Returns:
        A rewriter that knows what it gave for this prompt.

    Raises:
        InputError: the prompt cannot be expanded.
    """
    if (folder.path / FILE).exists():
        return rewriter
    first = rewriter(prompt)
    return lambda other: first if other == prompt else rewriter(other)


def rewritten_once(
    folder: BenchmarkFolder,
    prompts: Iterable[str],
    rewriter: Callable[[str], str],
    on_done: Callable[[], object] = lambda: None,
) -> tuple[str, ...]:
    """Returns the expanded prompts, in the same order.

    Prompts that an earlier run or another process of this run expanded are read from the file `rewritten.jsonl`; the
    others are expanded one by one and written to it. Of several processes, one works while the others wait.

    Args:
        rewriter: expands one prompt.
        on_done: called after each expanded prompt.

    Raises:
        InputError: a prompt cannot be expanded. Those before it stay in the file.
    """
    prompts, path = tuple(prompts), folder.path / FILE
    with FileLock(folder.path / ".rewriting.lock"):
        known = _read(folder)
        for prompt in dict.fromkeys(prompts):
            if prompt not in known:
                known[prompt] = rewriter(prompt)
                append_lines(path, [{"prompt": prompt, "rewritten": known[prompt]}])
                on_done()
    return tuple(known[prompt] for prompt in prompts)


def _read(folder: BenchmarkFolder) -> dict[str, str]:
    """The prompts in the file. A last line that a killed process left incomplete is removed."""
    path, known = folder.path / FILE, {}
    if not path.exists():
        return {}
    text = read_text(path, folder.parameter)
    *lines, rest = lines_of(text)
    if rest:
        folder.write(FILE, text[: len(text) - len(rest)])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, expanded = row["prompt"], row["rewritten"]
            assert isinstance(prompt, str) and isinstance(expanded, str)
        except (ValueError, LookupError, TypeError, AssertionError):
            rule = f"{path}, line {number} must hold prompt and rewritten; remove the line to rewrite the prompt again"
            raise InputError(rule, folder.parameter) from None
        known[prompt] = expanded
    return known
