"""Rows of the evaluation: the normal map of a picture, and a picture from a normal map."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import normals
from evaluation import Mean
from examples import Example
from PIL import Image
from row_tools import Bench, Figures, Row, share
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.images import stacked
from lumina_mgpt.request import GenerationRequest

_BATCH = 30  # images in a batch
_FACING = (128, 128, 255)  # the colour of a normal towards the viewer


def lower_panels(bench: Bench, todo: Sequence[Example], given: Sequence[Image.Image], label: str) -> list[Image.Image]:
    """The generated lower panel of each example below a given upper panel."""
    found: list[Image.Image] = []
    with tqdm(total=len(todo), desc=label, unit="picture", mininterval=cli.bar_interval()) as bar:
        for start in range(0, len(todo), _BATCH):
            part = slice(start, start + _BATCH)
            request = GenerationRequest.of(
                [example.about.prompt for example in todo[part]],
                *normals.SIZE,
                cfg=bench.args.cfg,
                seed=bench.args.seed + start,
                batch_size=_BATCH,
                panel=list(given[part]),
                task=normals.TASK_OF[todo[0].kind],
            )
            for result in bench.pipeline.stream(request):
                found.append(result.panel)
                bar.update()
    return found


def _panels(bench: Bench, todo: Sequence[Example], panel: int) -> list[Image.Image]:
    return [example.images[0][panel].draw(bench.pictures) for example in todo]


def predicted(bench: Bench) -> Figures:
    """Normal maps of held-out pictures: mean angle to the true normals inside of the object, in degrees.

    `tokenizer`: the true map after the image tokenizer. `another object`: the true map of the next example.
    `towards the viewer`: the same normal everywhere.
    """
    todo = normals.examples("predict_normal", bench.names, bench.count, bench.rng("predict_normal"), held_out=True)
    given, truth = _panels(bench, todo, 0), _panels(bench, todo, 1)
    made = lower_panels(bench, todo, given, "predict_normal")
    again = [bench.through_tokenizer(stacked(pair), panels=2) for pair in zip(given, truth, strict=True)]
    lower = [image.crop((0, image.height // 2, *image.size)) for image in again]
    flat = [Image.new("RGB", image.size, _FACING) for image in truth]
    bench.sheet("predict_normal", [stacked(pair) for pair in zip(given, made, strict=True)], [""] * len(todo))

    def error(maps: Sequence[Image.Image]) -> Mean:
        pairs = zip(maps, todo, strict=True)
        return Mean(tuple(normals.angle_error(image, e.about.picture, bench.pictures) for image, e in pairs))

    return {
        "angle error": error(made),
        "angle error (tokenizer)": error(lower),
        "another object": error([*truth[1:], truth[0]]),
        "towards the viewer": error(flat),
    }


def drawn(bench: Bench, kind: str) -> Figures:
    """Pictures from the normal maps of held-out scenes: the nearest known emoji must be the right one."""
    todo = normals.examples(kind, bench.names, bench.count, bench.rng(kind), held_out=True)
    given, truth = _panels(bench, todo, 0), _panels(bench, todo, 1)
    made = lower_panels(bench, todo, given, kind)
    again = [bench.through_tokenizer(image) for image in truth]
    pairs = list(zip(given, made, strict=True))
    bench.sheet(kind, [stacked(pair) for pair in pairs], [example.about.prompt for example in todo])
    scenes = [example.about.picture for example in todo]
    known = {name: bench.pictures[name] for name in bench.names}

    def right(images: Sequence[Image.Image]) -> list[bool]:
        return [normals.right_emoji(i, scene, known) for i, scene in zip(images, scenes, strict=True)]

    return {"right emoji": share(right(made)), "right emoji (tokenizer)": share(right(again))}


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "predict_normal": predicted,
        **{kind: (lambda bench, kind=kind: drawn(bench, kind)) for kind in ("normal", "normal_unnamed")},
    }
)
