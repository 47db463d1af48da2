"""How often a first draft is kept at its first look, by the law it is drawn from: candidates for `sampling/drafts.py`.

    python scripts/bench_births.py -n 4

Draws images, runs each through the model once more, and prints the mean over codes below the first row of what the
code's law and a candidate have in common, sum(min(law, candidate)): the share of drafts that the maximal coupling
keeps where the codes before them are right. `gain` is over the law above, with its standard error over images.
"""

import sys

import torch
from torch import Tensor

from lumina_mgpt import cli
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.devices import resolve_device
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.unirep import ImageLayout

AWAY = 6  # codes between a new place and the last one whose law is known: what a step accepts


@torch.no_grad()
def laws_of(pipeline: Pipeline, start: list[int], codes: Tensor, layout: ImageLayout,
            settings: SamplingConfig) -> Tensor:  # fmt: skip
    """Probabilities of each code's law, given the codes before it. Shapes: codes (num_codes,) -> (num_codes, C)."""
    image, logits = layout.fill(codes[None].cpu())[0].tolist(), []
    for prefix in (start, []) if settings.cfg != 1 else (start,):
        hidden = pipeline.model(torch.tensor([prefix + image], device=pipeline.device))
        read = hidden[:, len(prefix) - 1 + layout.code_slots.to(hidden.device)]
        logits.append(pipeline.model.project(read, pipeline.checkpoint.vocabulary.code_slice))
    return code_log_probs(torch.cat(logits), settings)[0].exp().cpu()


def back(probs: Tensor, places: int) -> Tensor:
    """The law of so many places before; any code where there is none. Shapes: (n, C) -> (n, C)."""
    return torch.cat([torch.full_like(probs[:places], 1 / probs.shape[-1]), probs[:-places]])


def counted(above: Tensor, codes: Tensor, cols: int, weight: float) -> Tensor:
    """The law above as `weight` observations, and each code seen below the same code, AWAY places before or earlier."""
    seen: dict[int, list[int]] = {}
    mixed = above.clone()
    for place in range(cols, len(codes)):
        if (known := place - AWAY) >= cols:
            seen.setdefault(int(codes[known - cols]), []).append(int(codes[known]))
        if found := seen.get(int(codes[place - cols])):
            mixed[place] *= weight
            mixed[place].index_add_(0, torch.tensor(found), mixed.new_ones(len(found)))
    return mixed / mixed.sum(-1, keepdim=True)


def candidates(probs: Tensor, codes: Tensor, cols: int) -> dict[str, Tensor]:
    """Laws to draft from, by name. Shapes: probs (n, C), codes (n,) -> (n, C) each."""
    above, left = back(probs, cols), back(probs, AWAY)
    beside = (back(probs, cols - 1) + back(probs, cols + 1)) / 2
    flat, product = above**0.75, (above * left) ** 0.5
    return {
        "above": above,
        "any code": torch.full_like(above, 1 / above.shape[-1]),
        "left, the last known": left,
        "above and left": (above + left) / 2,
        "above and left, product": product / product.sum(-1, keepdim=True),
        "three above": (above + beside) / 2,
        "two rows above": (above + back(probs, 2 * cols)) / 2,
        "above, flattened": flat / flat.sum(-1, keepdim=True),
        "above and a tenth of any": 0.9 * above + 0.1 / above.shape[-1],
        "above and counts of pairs": counted(above, codes, cols, 3.0),
    }


def bench(args) -> None:
    settings = cli.sampling_settings(args)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    pipeline = cli.load_pipeline(args, checkpoint, resolve_device(args.device))
    layout, prompts = checkpoint.layout(), cli.example_prompts(checkpoint.folder)
    shared: dict[str, list[float]] = {}
    for start in checkpoint.prompt_ids(prompts, layout):
        for repeat in range(args.n):
            codes = pipeline.sample([start], layout, settings, [repeat], speculation=Speculation()).flatten()
            probs = laws_of(pipeline, start, codes, layout, settings)
            for name, law in candidates(probs, codes, layout.cols).items():
                overlap = torch.minimum(law, probs)[layout.cols :].sum(-1).mean()
                shared.setdefault(name, []).append(float(overlap))
    print("| drafts from the law | kept | gain |\n| --- | --- | --- |")
    for name, kept in shared.items():
        gain = torch.tensor(kept) - torch.tensor(shared["above"])
        error = gain.std() / len(gain) ** 0.5
        print(f"| {name} | {100 * sum(kept) / len(kept):.1f} % | {100 * gain.mean():+.1f} ± {100 * error:.1f} |")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_births.py", description="Compares laws to draw first drafts from.")
    parser.add_argument("-n", type=cli.whole, default=4, help="images of each prompt")
    cli.add_sampling_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
