"""Compares the demo checkpoint's own scorers: how often the chosen one of several candidates is right.

    python scripts/demo/compare_scorers.py --emoji_dir work/demo/emoji --prompts 40 --cfg 1 --temperature 1.5

Candidates are right if each emoji of the held-out scene is the nearest of all known ones in pixels. The last columns
say for how many first candidates the prompt that they were drawn from has the highest score among those of its batch.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import emoji
import evaluation
import scenes

from lumina_mgpt import cli, scoring
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.request import GenerationRequest

_BATCH = 10  # prompts drawn together
SCORES = {"bayes": scoring.bayes_score, "reading": scoring.read_score}


def compare(args: argparse.Namespace) -> None:
    """Draws the candidates and prints a table for scenes with one and with two emoji."""
    emoji.fetch(args.emoji_dir)
    pictures, names = emoji.load(args.emoji_dir), emoji.known_names()
    pipeline = Pipeline.from_pretrained(cli.checkpoint_path(cli.DEMO), text=True)
    rng = random.Random(args.seed)
    print(
        "| emoji | prompts | mean of candidates | bayes | reading | prompts found by bayes | by reading | by chance |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for label, todo in zip(("one", "two"), scenes.evaluation_scenes(names, args.prompts, rng), strict=True):
        mean, chance = 0.0, 0.0
        right, found = dict.fromkeys(SCORES, 0), dict.fromkeys(SCORES, 0)
        for batch in _batches(todo):
            captions = [scenes.caption(scene, rng) for scene in batch]
            request = GenerationRequest.of(
                captions, *batch[0].size, cfg=args.cfg, temperature=args.temperature, seed=args.seed + batch[0].size[0]
            )
            prepared = pipeline.checkpoint.prepare(request)
            images = list(pipeline.stream(prepared, jobs=scoring.candidate_jobs(request.jobs, args.best_of)))
            for index, scene in enumerate(batch):
                candidates = images[index * args.best_of : (index + 1) * args.best_of]
                good = [_is_right(image.image, scene, pictures) for image in candidates]
                first = candidates[0]
                jobs = [replace(first.job, prompt=text, prompt_index=at) for at, text in enumerate(captions)]
                mean, chance = mean + sum(good) / args.best_of, chance + 1 / len(batch)
                for name, score in SCORES.items():
                    scores = [score(pipeline, prepared, candidate) for candidate in candidates]
                    right[name] += good[scores.index(max(scores))]
                    scores = [score(pipeline, prepared, replace(first, job=job)) for job in jobs]
                    found[name] += scores.index(max(scores)) == index
        count = len(todo)
        shares = [mean / count, *(right[name] / count for name in SCORES)]
        cells = [label, str(count), *(f"{share:.1%}" for share in shares), *(str(found[name]) for name in SCORES)]
        print("| " + " | ".join([*cells, f"{chance:.1f}"]) + " |", flush=True)


def _batches(todo: list[scenes.Scene]) -> list[list[scenes.Scene]]:
    """Scenes of one size each."""
    batches = []
    for size in sorted({scene.size for scene in todo}):
        same = [scene for scene in todo if scene.size == size]
        batches += [same[start : start + _BATCH] for start in range(0, len(same), _BATCH)]
    return batches


def _is_right(image, scene: scenes.Scene, pictures: dict) -> bool:
    cells = evaluation.cells(image, scene)
    return all(
        evaluation.nearest_emoji(cell, scene.color, pictures) == name
        for cell, name in zip(cells, scene.names, strict=True)
    )


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Compares the demo checkpoint's own scorers.")
    parser.add_argument("--emoji_dir", type=Path, default="work/demo/emoji", help="folder for the emoji pictures")
    parser.add_argument("--prompts", type=cli.whole, default=40, help="prompts with one emoji, and with two")
    parser.add_argument("--best_of", type=cli.whole, default=4, help="candidates of each prompt")
    parser.add_argument("--cfg", type=cli.number, default=4.0, help="guidance scale")
    parser.add_argument("--temperature", type=cli.number, default=1.0, help="temperature of sampling")
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed of scenes and images")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(compare, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
