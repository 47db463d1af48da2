"""Rows of the evaluation: the six categories of GenEval, and the best of several pictures."""

from collections.abc import Mapping
from types import MappingProxyType

import drawing
from composed import Picture, arranged, relation
from evaluation import Mean
from finder import background_right, in_words
from row_tools import Bench, Figures, Row, share
from words import caption

from lumina_mgpt.images import psnr
from lumina_mgpt.prompts import text_to_image
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.scoring import Scorer, best_of

CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
_CANDIDATES = 8
_FEW = 3  # the row of candidates has a third of the prompts


def category(bench: Bench, kind: str) -> Figures:
    """Held-out prompts of a category: the picture must show exactly the objects of the prompt.

    `tokenizer` is the share of true pictures that are right after the image tokenizer, `reconstruction` their PSNR.
    """
    todo = drawing.examples(kind, bench.names, bench.count, bench.rng(kind), held_out=True)
    wanted = [example.about for example in todo]
    asked = [[("human", [text_to_image(example.turns[0], *example.about.size)])] for example in todo]
    codes = bench.answered_in_pictures(asked, [picture.size for picture in wanted], kind)
    images = [bench.shown(grid) for grid in codes]
    truth = [picture.draw(bench.pictures) for picture in wanted]
    again = [bench.through_tokenizer(image) for image in truth]
    related = kind == "position"
    right = [bench.finder.right(image, picture, related) for image, picture in zip(images, wanted, strict=True)]
    found = [f"{example.turns[0]} -> {in_words(bench.finder.find(i))}" for example, i in zip(todo, images, strict=True)]
    bench.sheet(
        kind, images, [text if not ok else text.split(" -> ")[0] for text, ok in zip(found, right, strict=True)]
    )
    pairs = list(zip(again, wanted, strict=True))
    return {
        "objects right": share(right),
        "tokenizer": share(bench.finder.right(image, picture, related) for image, picture in pairs),
        "background right": share(background_right(i, picture) for i, picture in zip(images, wanted, strict=True)),
        "reconstruction": Mean(tuple(psnr(image, drawn) for image, drawn in zip(again, truth, strict=True))),
    }


def candidates(bench: Bench) -> Figures:
    """Two objects without guidance: one sample, against the best of 8 by the model's own reading."""
    rng, wanted = bench.rng("candidates"), list[Picture]()
    while len(wanted) < max(2, bench.count // _FEW):
        picture = arranged([(name, None) for name in rng.sample(bench.names, 2)], rng, size=(128, 64))
        if picture.held_out and relation(*picture.items) == "left":
            wanted.append(picture)
    prompts = [caption(picture) for picture in wanted]
    request = GenerationRequest.of(prompts, 128, 64, cfg=1.0, seed=bench.args.seed, batch_size=32)
    prepared = bench.pipeline.checkpoint.prepare(request)
    one, best = [], []
    for choice, picture in zip(best_of(bench.pipeline, prepared, _CANDIDATES, Scorer("reading")), wanted, strict=True):
        right = [bench.finder.right(result.image, picture, related=True) for result in choice.candidates]
        one.append(sum(right) / len(right))
        best.append(float(right[choice.index]))
    return {"best of 8 right": Mean(tuple(best)), "one sample right": Mean(tuple(one))}


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        **{kind: (lambda bench, kind=kind: category(bench, kind)) for kind in CATEGORIES},
        "best of 8": candidates,
    }
)
