"""Measures the demo checkpoint on held-out scenes. Prints tables, and writes figures.json and contact sheets.

    python scripts/demo/evaluate.py --model_path assets/demo --emoji_dir work/demo/emoji --out_dir work/demo/evaluation

Text to image: the share of pictures with the right emoji, the nearest of all known ones in pixels, and with the right
background; for one emoji and for two of a held-out pair; and the PSNR of the image tokenizer on the same scenes.

Image tasks: each score of the task; the same score with the panel or the prompt of another example; and that of the
true image after the image tokenizer. In the rows `depth unnamed` and `canny unnamed`, the prompt gives only the
background, and the panel alone determines the object.

Further rows, of checkpoints that also write text: drawing in six categories, reading, conversations, marks and views.
The last line of the output is JSON with the value of each figure.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import drawing_rows
import emoji
import evaluation
import marks_rows
import normals_rows
import numpy as np
import omni
import reading_rows
import scenes
import talk_rows
import views_rows
import words
from evaluation import Mean, Share
from omni import Example
from PIL import Image
from row_tools import Bench
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import psnr
from lumina_mgpt.io import write_atomic
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.results import Result

_BATCH = 30  # images in a batch
_ON_SHEET = 24  # pictures of each text row on the contact sheet
_EXAMPLES_ON_SHEET = 12  # pictures on the contact sheet of an image task
TEXT_ROWS = ("one emoji", "two emoji")
UNNAMED = {f"{kind} unnamed": kind for kind in ("depth", "canny")}  # row -> kind; the prompt gives only the background
TASK_ROWS = (*omni.KINDS, *UNNAMED)
FIRST_ROWS = (*TEXT_ROWS, *TASK_ROWS)  # those of every demo checkpoint
MORE_ROWS = {
    **drawing_rows.ROWS, **reading_rows.ROWS, **talk_rows.ROWS, **marks_rows.ROWS, **normals_rows.ROWS,
    **views_rows.ROWS,
}  # fmt: skip
ROWS = (*FIRST_ROWS, *MORE_ROWS)


def drawn(
    pipeline: Pipeline,
    prompts: list[str],
    size: tuple[int, int],
    args: argparse.Namespace,
    panels: list | None = None,
    **options,
) -> Iterator[Result]:
    """Yields a result for each prompt. Each batch has another seed, as its images share their noise."""
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        request = GenerationRequest.of(
            prompts[part],
            *size,
            cfg=args.cfg,
            seed=args.seed + start,
            batch_size=_BATCH,
            panel=panels and panels[part],
            **options,
        )
        yield from pipeline.stream(request)


def generate(pipeline: Pipeline, todo: list[scenes.Scene], rng: random.Random, args) -> list[tuple]:
    """(scene, caption, picture) for each scene, ordered by size."""
    made = []
    with tqdm(total=len(todo), desc="pictures", unit="picture", mininterval=cli.bar_interval()) as bar:
        for size in sorted({scene.size for scene in todo}):
            chosen = [scene for scene in todo if scene.size == size]
            captions = [scenes.caption(scene, rng) for scene in chosen]
            results = drawn(pipeline, captions, size, args)
            for scene, caption, result in zip(chosen, captions, results, strict=True):
                made.append((scene, caption, result.image))
                bar.update()
    return made


def text_scores(made: list[tuple], pictures: dict) -> dict[str, Share]:
    """Shares of pictures with all objects right, of right objects, and of pictures with the right background."""
    whole = objects = colors = 0
    for scene, _, image in made:
        found = [evaluation.nearest_emoji(cell, scene.color, pictures) for cell in evaluation.cells(image, scene)]
        right = [got == wanted for got, wanted in zip(found, scene.names, strict=True)]
        whole, objects = whole + all(right), objects + sum(right)
        colors += evaluation.nearest_color(image) == scene.color
    count = len(made)
    return {
        "all objects": Share(whole, count),
        "each object": Share(objects, sum(len(scene.names) for scene, _, _ in made)),
        "background": Share(colors, count),
    }


def reconstruction(pipeline: Pipeline, todo: list[scenes.Scene], pictures: dict) -> np.ndarray:
    """PSNR in dB of each scene after encoding and decoding."""
    values = []
    for scene in tqdm(todo, desc="reconstruction", unit="picture"):
        image = scenes.render(scene, pictures)
        tokenizer = pipeline.image_tokenizer
        values.append(psnr(tokenizer.decode(tokenizer.encode([image]))[0], image))
    return np.array(values)


def report(pipeline: Pipeline, rows: dict[str, list], pictures: dict, rng: random.Random, args) -> dict[str, dict]:
    """Prints the rows of text to image, writes a contact sheet, and returns the figures."""
    figures: dict[str, dict[str, list[float]]] = {}
    if not rows:
        return figures
    print("| row | prompts | all objects right | each object right | background right | reconstruction |")
    print("| --- | --- | --- | --- | --- | --- |")
    images: list[Image.Image] = []
    captions: list[str] = []
    for name, todo in rows.items():
        made = generate(pipeline, todo, rng, args)
        shares = text_scores(made, pictures)
        decibels = reconstruction(pipeline, todo, pictures)
        error = decibels.std(ddof=1) / len(decibels) ** 0.5
        cells = " | ".join(map(str, shares.values()))
        print(f"| {name} | {len(made)} | {cells} | {decibels.mean():.2f} ± {error:.2f} dB |", flush=True)
        figures[name] = {key: [share.value, share.error] for key, share in shares.items()}
        figures[name]["reconstruction"] = [decibels.mean(), error]
        shown = rng.sample(made, min(_ON_SHEET, len(made)))
        images, captions = images + [m[2] for m in shown], captions + [m[1] for m in shown]
    evaluation.contact_sheet(images, captions, 8).save(args.out_dir / "text_to_image.png", optimize=True)
    return figures


def generate_examples(pipeline: Pipeline, asked: list[Example], pictures: dict, row: str, args) -> list:
    """The generated dual-panel picture of each example, from its prompt and, if given, its upper panel."""
    task = asked[0].task
    given = [omni.panels(example, pictures)[0] for example in asked] if task.given_panels else None
    results = drawn(pipeline, [example.prompt for example in asked], omni.SIZE, args, given, task=task)
    bar = tqdm(results, total=len(asked), desc=row, unit="picture", mininterval=cli.bar_interval())
    return [result.image for result in bar]


def task_scores(truth: list[Example], images: list, pictures: dict) -> list[Share | Mean]:
    """A summary of each score of the kind, of images[i] against truth[i]."""
    scores = [evaluation.scores(example, image, pictures) for example, image in zip(truth, images, strict=True)]
    return [evaluation.summary(column) for column in zip(*scores, strict=True)]


def shuffled(examples: list[Example]) -> dict[str, list[Example]]:
    """The examples with the panel, and with the prompt, of the next example, where these differ."""
    pairs = list(zip(examples, examples[1:] + examples[:1], strict=True))
    others = {}
    if examples[0].task.given_panels:
        others["panel"] = [replace(example, upper=other.upper) for example, other in pairs]
    if len({example.prompt for example in examples}) > 1:
        others["prompt"] = [replace(example, prompt=other.prompt) for example, other in pairs]
    return others


def report_tasks(pipeline: Pipeline, rows: list[str], names: list[str], pictures: dict, args) -> dict[str, object]:
    """Prints a line for each score of each row, writes their contact sheets, and returns the figures."""
    figures: dict[str, object] = {}
    if not rows:
        return figures
    print("\n| task | figure | prompts | value | panel shuffled | prompt shuffled | truth through image tokenizer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    tokenizer, parts = pipeline.image_tokenizer, pipeline.checkpoint.config.parts(panels=2)
    for row in rows:
        kind, otherwise = (UNNAMED[row], 1.0) if row in UNNAMED else (row, 0.0)
        rng = random.Random(f"{args.seed} {kind}")
        examples = omni.evaluation_examples(kind, names, args.prompts, rng, otherwise)
        few = examples[: args.shuffled]
        images = generate_examples(pipeline, examples, pictures, row, args)
        columns = {"value": task_scores(examples, images, pictures)}
        for which, asked in shuffled(few).items():
            made = generate_examples(pipeline, asked, pictures, f"{row}, {which} shuffled", args)
            columns[which] = task_scores(few, made, pictures)
        again = [
            tokenizer.decode(tokenizer.encode([omni.draw(example, pictures)], parts), parts)[0] for example in examples
        ]
        columns["tokenizer"] = task_scores(examples, again, pictures)
        for n, figure in enumerate(evaluation.SCORES[kind]):
            found = {name: column[n] for name, column in columns.items()}
            cells = " | ".join(str(found.get(name, "–")) for name in ("value", "panel", "prompt", "tokenizer"))
            print(f"| {row} | {figure} | {len(examples)} | {cells} |", flush=True)
            figures[f"{row}: {figure}"] = {name: [cell.value, cell.error] for name, cell in found.items()}
        captions = [example.prompt for example in examples[:_EXAMPLES_ON_SHEET]]
        sheet = evaluation.contact_sheet(images[:_EXAMPLES_ON_SHEET], captions, _EXAMPLES_ON_SHEET)
        sheet.save(args.out_dir / f"{row.replace(' ', '_')}.png", optimize=True)
    return figures


def report_more(test: Bench, rows: list[str]) -> dict[str, dict[str, list[float]]]:
    """Prints a line for each figure of each row, and returns the figures."""
    figures: dict[str, dict[str, list[float]]] = {}
    if rows:
        print("\n| row | figure | value |\n| --- | --- | --- |")
    for row in rows:
        found = MORE_ROWS[row](test)
        for name, value in found.items():
            print(f"| {row} | {name} | {value} |", flush=True)
        figures[row] = {name: [value.value, value.error] for name, value in found.items()}
    return figures


def means(figures: dict[str, object]) -> dict[str, object]:
    """Means over rows that belong together, with their standard errors, and the least of their values.

    The first figure of each row counts. Groups of which a row is missing are left out.
    """
    groups = {
        "six categories": drawing_rows.CATEGORIES,
        "questions": [row for row in reading_rows.ROWS if row.startswith("question ")],
    }
    found: dict[str, object] = {}
    for name, rows in groups.items():
        cells = [figures.get(row) for row in rows]
        firsts = np.array([next(iter(cell.values())) for cell in cells if isinstance(cell, dict)])
        if len(firsts) == len(rows):
            mean = [float(firsts[:, 0].mean()), float(np.hypot.reduce(firsts[:, 1])) / len(firsts)]
            found |= {f"{name}, mean": mean, f"{name}, least": float(firsts[:, 0].min())}
    return found


def evaluate(args: argparse.Namespace) -> None:
    """Runs the whole evaluation."""
    few = min(args.prompts, args.shuffled)
    if few < 2:
        raise InputError(f"--prompts and --shuffled must be at least 2 (for a standard error), got {few}; try 60")
    cfg = 4.0 if args.cfg is None else args.cfg
    SamplingConfig(cfg=cfg, seed=args.seed).with_seeds(args.prompts)  # checks the largest seed
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    writes = checkpoint.config.family.answers_in_text
    args.rows = args.rows or list(ROWS if writes else FIRST_ROWS)
    if not writes and (more := [row for row in args.rows if row in MORE_ROWS]):
        raise InputError(f"{more[0]} needs a checkpoint that writes text, got {args.model_path}; leave it out", "rows")
    sheets = [f"{row.replace(' ', '_')}.png" for row in args.rows if row not in TEXT_ROWS]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    output = OutputFolder(args.out_dir, overwrite=True, parameter="out_dir")
    output.claim(["text_to_image.png", "figures.json", *sheets])
    emoji.fetch(args.emoji_dir)
    pictures, names = emoji.load(args.emoji_dir), emoji.known_names()
    rng = random.Random(args.seed)
    todo = dict(zip(TEXT_ROWS, scenes.evaluation_scenes(names, args.prompts, rng), strict=True))
    args.cfg = 1.0 if args.cfg is None and checkpoint.config.guided else cfg
    pipeline = cli.load_pipeline(args, checkpoint, resolve_device(args.device))
    options = ("model_path", "cfg", "seed", "prompts", "shuffled", "quant", "dtype", "cache_dtype")
    figures: dict[str, object] = {name: getattr(args, name) for name in options}
    figures |= report(pipeline, {row: todo[row] for row in TEXT_ROWS if row in args.rows}, pictures, rng, args)
    figures |= report_tasks(pipeline, [row for row in TASK_ROWS if row in args.rows], names, pictures, args)
    if more := [row for row in MORE_ROWS if row in args.rows]:
        _, unknown = words.unknown_names(args.emoji_dir)
        figures |= report_more(Bench(pipeline, pictures, names, unknown, args.prompts, args), more)
        figures |= means(figures)
    write_atomic(args.out_dir / "figures.json", json.dumps(figures, indent=1) + "\n")
    print(f"contact sheets and figures.json in {args.out_dir}")
    print(json.dumps({name: value for name, value in figures.items() if name not in options}))


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    cli.add_checkpoint_options(parser)
    parser.add_argument("--emoji_dir", type=Path, default=Path("work/demo/emoji"), help="folder of the emoji packages")
    parser.add_argument("--out_dir", type=Path, default=Path("work/demo/evaluation"), help="output folder")
    parser.add_argument("--prompts", type=cli.whole, default=300, help="prompts in each row")
    parser.add_argument("--shuffled", type=cli.whole, default=60, help="prompts run with another panel or prompt")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--cfg", type=cli.number, help="guidance scale (default: 4, or 1 for weights that need none)")
    parser.add_argument("--seed", type=cli.whole, default=20_000, help="seed of scenes and noise")
    return cli.run(evaluate, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
