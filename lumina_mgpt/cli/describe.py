"""Describes pictures, or answers a question about each.

    lumina-mgpt describe photos holiday.jpg --save_path answers.jsonl
    lumina-mgpt describe photos --question "How many people are in this image?"

The command writes one line of JSON a picture, on stdout or to --save_path: image, question, answer and reason. A reason
other than "turn end" says why the answer is not complete. Pictures that cannot be read are reported and have no line.
The exit status is then 2.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.io import cause, remedy
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.request import image_count

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint
    from lumina_mgpt.results import Answer

QUESTION = "Describe the image in detail."  # as in the released README
_READ = 8  # pictures that are open at a time; the largest batch by default


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES | {"question": "--question"},
        prog="lumina-mgpt describe",
        description="Describes pictures, or answers a question about each.",
    )
    parser.add_argument("images", nargs="+", help="pictures, and folders of pictures")
    parser.add_argument(
        "--question",
        default=QUESTION,
        help="what to ask about each picture; <|image|> is its place (default place: at the end)",
    )
    parser.add_argument("--save_path", help="file for the answers, one line of JSON each (default: stdout)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    cli.add_max_new_tokens(parser, 1024)
    parser.add_argument(
        "--batch_size", type=cli.whole, help="pictures in a batch; affects speed and memory only (default: up to 8)"
    )
    group = parser.add_argument_group("sampling")
    cli.add_text_sampling(group)
    group.add_argument("--seed", type=cli.whole, default=0, help="the same seed and picture give the same answer")
    cli.add_checkpoint_options(parser)
    cli.add_target_size(parser)
    return parser


def describe(args: argparse.Namespace) -> int:
    """Checks everything that needs no weights, then answers batch by batch. Returns the exit status."""
    cli.quant_group(args)
    seed, limit = cli.sampling_settings(args).seed, cli.answer_limit(args)
    batch = None if args.batch_size is None else image_count("batch_size", args.batch_size)
    if not args.question.strip():
        raise InputError("must not be empty, got ''; ask something, or leave it out", "question")
    if args.question.count(PICTURE) > 1:
        raise InputError(f"must have one mark {PICTURE} at most, got {args.question!r}", "question")
    paths = picture_paths(args.images)
    require_new_file(args.save_path, args.overwrite, paths)

    from lumina_mgpt.devices import resolve_device  # imports torch, which takes seconds

    device = resolve_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    cli.warn_without_text(checkpoint)
    require_fit(args.question, checkpoint)
    settings: dict[str, Any] = {"seed": seed} | cli.given_sampling(args) | limit
    with answers_file(args.save_path) as write_line:
        pipeline = cli.load_pipeline(args, checkpoint, device, text=True)
        left_out = answer_all(pipeline, paths, args.question, batch, settings, write_line)
    if left_out:
        print(f"error: {left_out} of {len(paths)} pictures cannot be read and have no line", file=sys.stderr)
    return cli.REFUSED if left_out else 0


def answer_all(
    pipeline: "Pipeline",
    paths: Sequence[Path],
    question: str,
    batch: int | None,
    settings: Mapping[str, Any],
    write_line: Callable[[str], None],
) -> int:
    """Answers batch by batch, and writes a line a picture. Returns the number of pictures that cannot be read.

    Args:
        batch: pictures in a batch; None for as many as fit the cache limit.
        settings: further arguments of `Pipeline.describe`.
        write_line: writes one line.
    """
    done, left_out, count = 0, 0, batch or _READ
    bar = tqdm(total=len(paths), unit="image", dynamic_ncols=True, mininterval=cli.bar_interval())
    try:
        with bar:
            for start in range(0, len(paths), count):
                part = paths[start : start + count]
                opened = list(readable(part, bar))
                left_out += len(part) - len(opened)
                if not opened:
                    continue
                pictures = [picture for _, picture in opened]
                answers = pipeline.describe(pictures, question, batch_size=batch, **settings)
                for (path, _), answer in zip(opened, answers, strict=True):
                    write_line(line_of(path, question, answer))
                    done += 1
                    bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} of {len(paths)} pictures have a line") from None
    return left_out


def require_fit(question: str, checkpoint: "Checkpoint") -> None:
    """Raises InputError if the question contains a control name, or is longer than the model's context."""
    with caused_by("question"):
        ids = checkpoint.vocabulary.encode_text(question.replace(PICTURE, ""))
    if len(ids) >= (context := checkpoint.config.context):
        raise InputError(f"has {len(ids)} ids, but this model sees {context}; shorten it", "question")


@contextmanager
def answers_file(path: str | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes a line to the file of the answers, or to stdout for None.

    An earlier file stays until the first line is written. A new file without a line is removed at the end.

    Raises:
        InputError: the file cannot be written. It ends with the last whole line.
    """
    if path is None:
        yield lambda line: print(line, flush=True)
        return
    new, lines = not os.path.lexists(path), 0
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise _unwritable(path, error) from None

    def write_line(line: str) -> None:
        nonlocal lines
        try:
            if not lines:
                file.truncate(0)
            end = file.tell()
            rest = memoryview(f"{line}\n".encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
        except OSError as error:
            raise _unwritable(path, error) from None
        lines += 1

    try:
        with file:
            yield write_line
    finally:
        if new and not lines:
            os.unlink(path)


def _unwritable(path: str, error: OSError) -> InputError:
    return InputError(f"{path} cannot be written ({cause(error)}); {remedy(error, 'give another file')}", "save_path")


def picture_paths(given: Sequence[str]) -> list[Path]:
    """Returns the pictures to describe: files as they are given, and the pictures in folders and their subfolders.

    Raises:
        InputError: a path does not exist, or a folder has no pictures.
    """
    from lumina_mgpt.images import picture_suffixes

    paths: list[Path] = []
    for path in map(Path, given):
        if not os.path.lexists(path):
            raise InputError(f"{path} does not exist; check the path", "images")
        if not path.is_dir():
            paths.append(path)
            continue
        found = [file for file in path.rglob("*") if file.suffix.lower() in picture_suffixes() and file.is_file()]
        found = [file for file in found if not file.name.startswith("._")]  # metadata of macOS
        if not found:
            raise InputError(f"{path} is a folder without pictures; put PNG, JPEG or WebP files there", "images")
        paths += sorted(found)
    return paths


def require_new_file(path: str | None, overwrite: bool, pictures: Sequence[Path]) -> None:
    """Raises InputError if the file of the answers exists and must not be replaced, or is a picture or a device."""
    if path is None or not os.path.lexists(path):
        if path is None and overwrite:
            raise InputError("has no effect without --save_path; add that, or leave it out", "overwrite")
        return
    if any(os.path.samefile(path, picture) for picture in pictures if os.path.exists(path)):
        raise InputError(f"{path} is one of the pictures; give another file", "save_path")
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; give another file, or leave it out for stdout", "save_path")
    if not overwrite:
        raise InputError(f"{path} already exists; give another file, or overwrite=True", "save_path")


def readable(paths: Sequence[Path], bar: tqdm) -> "Iterator[tuple[Path, Image.Image]]":
    """Yields the pictures that can be read. Reports the others on stderr, and counts them on the bar."""
    from lumina_mgpt.images import open_panel

    for path in paths:
        try:
            yield path, open_panel("images", path)
        except InputError as error:
            bar.write(f"left out: {error.message}", file=sys.stderr)
            bar.update()


def line_of(path: Path, question: str, answer: "Answer") -> str:
    """Returns the line of a picture."""
    row = {"image": str(path), "question": question, "answer": answer.text, "reason": answer.reason}
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # the path has bytes that are not UTF-8
        line = json.dumps(row)
    return line


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(describe, build_parser(), argv, stopped="finished lines are kept")
