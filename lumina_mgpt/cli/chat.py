r"""Talks with the model, in text and images.

    lumina-mgpt chat --model_path Alpha-VLLM/Lumina-mGPT-7B-768-Omni --save_path chat
    lumina-mgpt chat --model_path Alpha-VLLM/Lumina-mGPT-7B-768-Omni --conversation question.json --save_path answer

In a terminal, text appears as it is written, and images are saved to --save_path and named. `/image FILE` attaches a
picture to the next message, `/new` begins a new conversation, `/quit` ends the program, and `/help` lists this. Ctrl-C
stops an answer and keeps what came.

With --conversation, the command reads a conversation from a JSON file and writes the answer to --save_path: answer.json
and its images. The file has the form of a training record, {"conversations": [{"from", "value"}, ...], "image": [...]},
with the human's turn last. Image paths are relative to the file.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_mgpt import cli
from lumina_mgpt.cli import generate
from lumina_mgpt.cli.answers import AnswerWriter
from lumina_mgpt.cli.terminal import Terminal
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.io import parse_json, read_text, write_atomic
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.prompts import FIRST_TASKS
from lumina_mgpt.request import image_count

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.families import Family
    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint

    Turns = list[tuple[str, list[str | Image.Image]]]

_ANSWER = "answer.json"


def build_parser() -> cli.Parser:
    parser = cli.Parser(cli.ALIASES, prog="lumina-mgpt chat", description="Talks with the model, in text and images.")
    parser.add_argument(
        "--conversation", metavar="FILE", help="JSON file with a conversation to answer (default: talk in the terminal)"
    )
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--want",
        default="any",
        choices=("any", "text", "image", "images"),
        help="what an answer is; any: the model's choice; image: one image; images: --views images in a row",
    )
    group.add_argument(
        "--views", type=cli.whole, help="images of an answer with --want images (default: as trained, else 16)"
    )
    for side in ("--width", "--height"):
        group.add_argument(
            side,
            type=cli.whole,
            help="pixels of an image with --want image or images, a multiple of 32 (default: both sides are the "
            "model's choice; one of them alone: the checkpoint's base size)",
        )
    cli.add_max_new_tokens(group, "8192, or what images of a known size need if that is more")
    cli.add_target_size(group)
    cli.add_sampling_options(parser, text=True)
    cli.add_speculation_options(parser, fast=False)
    cli.add_output_options(parser)
    parser.set_defaults(save_path="chat")
    cli.add_checkpoint_options(parser)
    return parser


def chat(args: argparse.Namespace) -> int:
    """Checks everything that needs no weights, then answers the file, or talks in the terminal."""
    cli.quant_group(args)
    check_options(args)
    sampling = {"seed": cli.sampling_settings(args).seed} | cli.given_sampling(args)
    limit = cli.answer_limit(args)
    speculation = cli.speculation_settings(args)
    output = OutputFolder(args.save_path, args.overwrite)
    turns, keep = (None, []) if args.conversation is None else read_conversation(Path(args.conversation))
    output.claim([] if turns is None else answer_files(output.folder), keep)

    from lumina_mgpt.devices import resolve_device  # imports torch, which takes seconds

    device = resolve_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    if args.want != "text":
        try:
            checkpoint.require_decoder()
        except InputError as error:
            raise InputError(f"{error}; an answer in words alone (want=text) needs none") from None
    for part in (part for _, parts in turns or () for part in parts if isinstance(part, str)):
        with caused_by("conversation"):
            checkpoint.vocabulary.encode_text(part)
    if args.want in ("any", "text"):
        cli.warn_without_text(checkpoint)
    settings: dict[str, Any] = (
        sampling | limit | {"want": args.want, "size": size_of(args, checkpoint), "speculation": speculation}
    )
    if args.want == "images":
        settings["views"] = args.views or views_of(checkpoint.config.family)
    pipeline = cli.load_pipeline(args, checkpoint, device, text=True)
    described = describe(pipeline, args, settings)
    if turns is None:
        return Terminal(pipeline, settings, output, described, build_parser()).run()
    answer(pipeline, turns, settings, output, described)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for an option that has no effect with this --want."""
    for name in ("width", "height"):
        value = getattr(args, name)
        if value is not None and args.want not in ("image", "images"):
            rule = f"--{name} {value} has no effect with --want {args.want}"
            raise InputError(f"{rule}; add --want image, or leave it out")
    if args.views is not None:
        image_count("views", args.views)
    if args.views is not None and args.want != "images":
        raise InputError(f"--views {args.views} has no effect without --want images; add that, or leave it out")


def views_of(family: "Family") -> int:
    """Returns the default number of images of an answer with several: that of the family, or of Lumina-mGPT."""
    return family.tasks.get("multiview", FIRST_TASKS["multiview"]).views


def size_of(args: argparse.Namespace, checkpoint: "Checkpoint") -> tuple[int, int] | None:
    """Returns width and height of the images in pixels; None to let the model choose."""
    if args.width is None and args.height is None:
        return None
    return checkpoint.layout(args.width, args.height).size


def describe(pipeline: "Pipeline", args: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, object]:
    """Returns the settings of all answers, for the text of saved images."""
    from lumina_mgpt.config import SamplingConfig
    from lumina_mgpt.conversation import sampling_config

    sampling = {name: settings[name] for name in asdict(SamplingConfig()) if name in settings}
    text: dict[str, object] = {"want": args.want, **asdict(sampling_config(pipeline.checkpoint, sampling))}
    speculation = pipeline.with_window(settings["speculation"])
    if speculation is not None:
        text |= {"coupling": speculation.coupling, "window": speculation.window}
    return text | generate.describe_pipeline(pipeline, generate.loading_text(args))


# -- a conversation in a file ------------------------------------------------------------------------------------------


def read_conversation(path: Path) -> "tuple[Turns, list[Path]]":
    """Returns the turns of a conversation file, as (role, texts and pictures), and all files that were read.

    Raises:
        InputError: the file is not a conversation whose last turn is the human's, or a picture cannot be read.
    """
    from lumina_mgpt.data.records import parse_prompt
    from lumina_mgpt.images import open_panel

    raw = parse_json(read_text(path, "conversation"), str(path), "conversation")
    try:
        record = parse_prompt(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}", "conversation") from None
    files = [path.parent / panels[0] for panels in record.images]
    pictures = [open_panel("conversation", file) for file in files]
    turns = [
        (role, [pictures[part] if isinstance(part, int) else part for part in parts]) for role, parts in record.turns
    ]
    return turns, [path, *files]


def answer_files(folder: Path) -> list[str]:
    """Returns the names of files of an answer: answer.json, the first image, and images that an earlier run left."""
    found = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    left = [name for name in found if re.fullmatch(r"answer_\d+\.png", name)]
    return list(dict.fromkeys([_ANSWER, "answer_0.png", *left]))


def answer(
    pipeline: "Pipeline",
    turns: "Turns",
    settings: Mapping[str, Any],
    output: OutputFolder,
    described: Mapping[str, object],
) -> None:
    """Answers the last turn, and writes the answer. After Ctrl-C, what came is written.

    Args:
        turns: turns of the conversation, as `Pipeline.chat` takes them.
        settings: further arguments of `Pipeline.chat`.
        output: folder for answer.json and the images answer_0.png, answer_1.png and so on.
        described: settings for the text of the saved images.
    """
    numbers = count()
    writer = AnswerWriter(output, lambda: f"answer_{next(numbers)}.png", described)
    stream = pipeline.chat(turns, **settings)
    try:
        writer.show(stream)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what came of the answer is in {output.folder}") from None
    finally:
        found = stream.answer
        content = {"text": found.text, "images": writer.saved, "ids": found.ids, "reason": found.reason}
        output.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(output.folder / _ANSWER, json.dumps(content, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(chat, build_parser(), argv)
