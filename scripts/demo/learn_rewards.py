"""Shows `lumina-mgpt grpo` on the demo: writes prompts, and measures held-out prompts before and after.

    python scripts/demo/learn_rewards.py prompts --out_dir work/grpo
    python scripts/demo/learn_rewards.py measure --out_dir work/grpo --name before --model_path assets/demo
    python scripts/demo/learn_rewards.py compare --out_dir work/grpo

`learn_rewards.sh` runs these commands and the training between them. The held-out prompts are other scenes than those
of the training, and the noise of an image is the same in all measurements. Without guidance unless --cfg is given.
"""

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

import evaluation
import numpy as np
import rewards
import scenes
from emoji import known_names
from PIL import Image
from scenes import Scene
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import stacked
from lumina_mgpt.io import read_json, write_atomic
from lumina_mgpt.pipeline import Checkpoint
from lumina_mgpt.request import GenerationRequest

_BATCH = 32  # images in a batch
_SHOWN = 8  # images of a measurement that are kept
_MISSES = 200  # captions in a row that are there already, after which no more are searched for
_SEED = 50_000  # of the noise, other than that of evaluate.py


def prompts_of(held_out: bool, count: int, seed: int, row: str) -> dict[str, Scene]:
    """Returns different captions with their scenes, held out of training or not: single emoji, or two side by side.

    Raises:
        InputError: there are not that many captions.
    """
    rng = random.Random(f"{seed} {held_out}")
    if row == "two emoji":
        pairs = scenes.random_pairs(known_names(), 2 * count, held_out, rng)  # a third of them is not side by side
        pool = [scene for scene in pairs if scene.arrangement == "beside"]
    else:
        pool = [scene for scene in scenes.all_singles(known_names()) if scene.held_out == held_out]
    found: dict[str, Scene] = {}
    misses = 0
    while len(found) < count and misses < _MISSES:
        scene = rng.choice(pool)
        text = scenes.caption(scene, rng)
        misses = misses + 1 if text in found else 0
        found.setdefault(text, scene)
    if len(found) < count:
        raise InputError(f"must be at most about {len(found)}, the number of captions, got {count}", "prompts")
    return found


def write_prompts(args: argparse.Namespace) -> None:
    """Writes the prompts to train on, one a line, and their scenes."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    known = prompts_of(False, args.prompts, args.seed, args.row)
    write_atomic(args.out_dir / "prompts.txt", "".join(f"{text}\n" for text in known))
    rewards.write_scenes(args.out_dir / "scenes.json", args.row, known)
    print(f"{len(known)} prompts in {args.out_dir / 'prompts.txt'}")


def measure(args: argparse.Namespace) -> None:
    """Generates images of held-out prompts, and writes their scores and distances to `NAME.json`."""
    asked = prompts_of(True, args.prompts, args.seed, args.row)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    pipeline = cli.load_pipeline(args, checkpoint, resolve_device(args.device))
    pictures, task = rewards.emoji_pictures(), checkpoint.config.family.task(rewards.ROWS[args.row])
    columns: dict[str, list[float]] = {}
    distances: list[float] = []
    sheet: list[Image.Image] = []
    texts = list(asked)
    width, height = next(iter(asked.values())).size
    bar = tqdm(total=len(texts), desc=args.name, unit="prompt", mininterval=cli.bar_interval())
    for start in range(0, len(texts), _BATCH):
        several = args.repeats if start < args.several else 1  # the first image is the same for any number
        part = texts[start : start + _BATCH]
        settings = dict(n=several, cfg=args.cfg, top_k=args.top_k, batch_size=_BATCH, seed=_SEED + start, task=task)
        images = [result.image for result in pipeline.stream(GenerationRequest.of(part, width, height, **settings))]
        for number, text in enumerate(part):
            group = images[number * several : (number + 1) * several]
            found = [rewards.scores(args.row, asked[text], image, pictures) for image in group]
            for name, value in found[0].items():
                columns.setdefault(name, []).append(value)
            good = [image for image, score in zip(group, found, strict=True) if next(iter(score.values()))]
            distances += [distance(*pair) for pair in itertools.combinations(good, 2)]
            sheet += group[:1]
            bar.update()
    bar.close()
    figures = {"row": args.row, "cfg": args.cfg, "prompts": texts, "scores": columns, "distances": distances}
    shown = evaluation.contact_sheet(sheet[:_SHOWN], texts[:_SHOWN], _SHOWN)
    shown.save(args.out_dir / f"{args.name}.png", optimize=True)
    write_atomic(args.out_dir / f"{args.name}.json", json.dumps(figures) + "\n")  # last: it shows that all is there
    for name, values in columns.items():
        print(f"{args.name}, {name}: {evaluation.Mean(tuple(values))} ({len(values)} prompts)")
    if distances:
        print(f"{args.name}, pixel distance of right images: {np.mean(distances):.4f} ({len(distances)} pairs)")


def distance(first: Image.Image, second: Image.Image) -> float:
    """Root of the mean squared difference of two pictures' pixels, in [0, 1]."""
    one, other = (np.asarray(image.convert("RGB"), np.float64) / 255 for image in (first, second))
    return math.sqrt(((one - other) ** 2).mean())


def compare(args: argparse.Namespace) -> None:
    """Prints the change between two measurements, with the standard error of paired differences.

    Writes `compared.png`: the images of some prompts before, and below them those after.
    """
    before, after = (read_json(args.out_dir / f"{name}.json") for name in ("before", "after"))
    if before["prompts"] != after["prompts"] or before["row"] != after["row"]:
        raise InputError(f"{args.out_dir}: before.json and after.json must be of the same prompts; measure again")
    guided = args.out_dir / "guided.json"
    aim = read_json(guided)["scores"] if guided.exists() else {}
    print("| score | before | after | difference | in standard errors | with guidance | share of the gap |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, values in before["scores"].items():
        old, new = np.array(values), np.array(after["scores"][name])
        change, error = new - old, (new - old).std(ddof=1) / math.sqrt(len(old))
        cells = [f"{old.mean():.3f}", f"{new.mean():.3f}", f"{change.mean():+.3f} ± {error:.3f}"]
        cells.append(f"{change.mean() / error:.1f}" if error else "–")
        gap = np.mean(aim[name]) - old.mean() if name in aim else 0.0
        cells += [f"{np.mean(aim[name]):.3f}" if name in aim else "–", f"{change.mean() / gap:.0%}" if gap else "–"]
        print("| " + " | ".join([name, *cells]) + " |")
    means = [np.mean(part["distances"]) if part["distances"] else math.nan for part in (before, after)]
    print(f"pixel distance of right images of a prompt: {means[0]:.4f} -> {means[1]:.4f}, {means[1] / means[0]:.0%}")
    sheets = [Image.open(args.out_dir / f"{name}.png") for name in ("before", "after")]
    stacked(sheets).save(args.out_dir / "compared.png", optimize=True)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="learn_rewards.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for work in (write_prompts, measure, compare):
        name = "prompts" if work is write_prompts else work.__name__
        sub = commands.add_parser(name, help=(work.__doc__ or "").split("\n")[0])
        sub.set_defaults(work=work)
        sub.add_argument("--out_dir", type=Path, default=Path("work/grpo"), help="folder of all files")
        if work is compare:
            continue
        sub.add_argument("--row", choices=tuple(rewards.ROWS), default="two emoji", help="row of the evaluation")
        sub.add_argument("--prompts", type=cli.whole, default=2000 if name == "prompts" else 1000, help="their number")
        sub.add_argument("--seed", type=cli.whole, default=0, help="seed of the prompts")
        if work is measure:
            cli.add_checkpoint_options(sub)
            sub.add_argument("--name", required=True, help="before, after or guided: name of the file to write")
            sub.add_argument("--cfg", type=cli.number, default=1.0, help="guidance scale")
            sub.add_argument("--top_k", type=cli.whole, default=4096, help="sample from this number of codes")
            sub.add_argument(
                "--several",
                type=cli.whole,
                default=256,
                help="prompts with several images; rounded up to whole batches of 32",
            )
            sub.add_argument("--repeats", type=cli.whole, default=4, help="images of each of these")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda args: args.work(args), build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
