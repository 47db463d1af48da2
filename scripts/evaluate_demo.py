"""Measures the demo checkpoint on compositions and seeds that it was not trained on, and makes a contact sheet.

python scripts/evaluate_demo.py --model_path assets/demo --emoji_dir work/demo/emoji --out_dir work/demo/evaluation

Rows: one emoji (is the nearest of all known emoji the one asked for; is the background's colour right); two emoji of a
pair that never occurs in training (are both right); and how well the image tokenizer reconstructs such pictures.
The (name, colour) and the pairs that are held out come from lumina_mgpt/demo/scenes.py.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lumina_mgpt.demo import emoji, evaluation, scenes
from lumina_mgpt.demo.evaluation import Share
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import psnr
from lumina_mgpt.pipeline import Pipeline

_BATCH = 30
_ON_SHEET = 24


def generate(pipeline: Pipeline, todo: list[scenes.Scene], rng: random.Random, args) -> list[tuple]:
    """(scene, caption, picture) for each scene; scenes of one size are made together."""
    made = []
    bar = tqdm(total=len(todo), desc="pictures", unit="picture")
    for size in sorted({scene.size for scene in todo}):
        chosen = [scene for scene in todo if scene.size == size]
        captions = [scenes.caption(scene, rng) for scene in chosen]
        results = pipeline.stream(captions, *size, cfg=args.cfg, seed=args.seed, batch_size=_BATCH)
        for scene, caption, result in zip(chosen, captions, results, strict=True):
            made.append((scene, caption, result.image))
            bar.update()
    bar.close()
    return made


def judge(made: list[tuple], pictures: dict) -> dict[str, Share]:
    """Shares of pictures with every object right, each object right, and the background right."""
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
    """PSNR in dB of each scene through codes and back."""
    values = []
    for scene in tqdm(todo, desc="reconstruction", unit="picture"):
        image = scenes.render(scene, pictures)
        tokenizer = pipeline.image_tokenizer
        values.append(psnr(tokenizer.decode(tokenizer.encode([image]))[0], image))
    return np.array(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="assets/demo")
    parser.add_argument("--emoji_dir", type=Path, default=Path("work/demo/emoji"), help="fetched there if missing")
    parser.add_argument("--out_dir", type=Path, default=Path("work/demo/evaluation"))
    parser.add_argument("--prompts", type=int, default=300, help="prompts a row")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=20_000)
    args = parser.parse_args()
    try:
        if args.prompts < 2:
            raise InputError(f"--prompts must be at least 2 (a standard error needs two), got {args.prompts}; try 300")
        emoji.fetch(args.emoji_dir)
        pictures = emoji.load(args.emoji_dir)
        rng = random.Random(args.seed)
        names = emoji.known_names()
        singles, pairs = scenes.evaluation_scenes(names, args.prompts, rng)
        pipeline = Pipeline.from_pretrained(args.model_path)
        report(pipeline, {"one emoji": singles, "two emoji": pairs}, pictures, rng, args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def report(pipeline: Pipeline, rows: dict[str, list], pictures: dict, rng: random.Random, args) -> None:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    figures: dict[str, object] = {"model_path": str(args.model_path), "cfg": args.cfg, "seed": args.seed}
    print("| row | prompts | all objects right | each object right | background right | reconstruction |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, todo in rows.items():
        made = generate(pipeline, todo, rng, args)
        shares = judge(made, pictures)
        decibels = reconstruction(pipeline, todo, pictures)
        error = decibels.std(ddof=1) / len(decibels) ** 0.5
        cells = " | ".join(map(str, shares.values()))
        print(f"| {name} | {len(made)} | {cells} | {decibels.mean():.2f} ± {error:.2f} dB |", flush=True)
        figures[name] = {key: [share.value, share.error] for key, share in shares.items()}
        figures[name]["reconstruction"] = [decibels.mean(), error]
        shown = rng.sample(made, min(_ON_SHEET, len(made)))
        columns = 8 if len(todo[0].names) == 1 else 6
        sheet = evaluation.contact_sheet([m[2] for m in shown], [m[1] for m in shown], columns)
        sheet.save(args.out_dir / f"{name.replace(' ', '_')}.png")
    (args.out_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"contact sheets and figures.json in {args.out_dir}")


if __name__ == "__main__":
    sys.exit(main())
