"""Rows of the evaluation: eight views from a prompt, and seven more views of a given one."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import views
from evaluation import Share
from examples import Example
from PIL import Image
from reading_rows import turns_of
from row_tools import Bench, Figures, Row, share
from solids import SIDE
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.unirep import ImageLayout, encode_image, generation_prompt

_BATCH = 30  # answers in a batch
_SHEET = 6  # answers on the contact sheet, one a row, each after the given view


def answered_in_views(bench: Bench, todo: Sequence[Example], label: str) -> list[list[Image.Image]]:
    """The images of each answer. Each image is sampled after the codes of all images before it."""
    vocabulary, found = bench.pipeline.checkpoint.vocabulary, list[list[Image.Image]]()
    layout = ImageLayout.from_pixels(vocabulary, SIDE, SIDE)
    views_each = todo[0].turns[1].count(PICTURE)
    with tqdm(total=len(todo) * views_each, desc=label, unit="view", mininterval=cli.bar_interval()) as bar:
        for start in range(0, len(todo), _BATCH):
            part = todo[start : start + _BATCH]
            starts = [generation_prompt(turns_of(bench, example), vocabulary) for example in part]
            answers: list[list[Image.Image]] = [[] for _ in part]
            for number in range(views_each):  # images of one answer have different noise, as those of a conversation
                settings = SamplingConfig(cfg=bench.args.cfg, seed=bench.args.seed + views.VIEWS * start + number)
                codes = bench.pipeline.sample(starts, layout, settings, range(len(part)))
                for ids, answer, grid in zip(starts, answers, codes, strict=True):
                    ids += encode_image(grid, vocabulary)
                    answer.append(bench.shown(grid))
                bar.update(len(part))
            found += answers
    return found


def figures_of(todo: Sequence[Example], answers: Sequence[Sequence[Image.Image]]) -> list[Share]:
    """The share of each of `views.FIGURES`."""
    columns: list[list[bool]] = [[] for _ in views.FIGURES]
    for example, images in zip(todo, answers, strict=True):
        wanted = example.about.views[-example.turns[1].count(PICTURE) :]
        for column, scores in zip(columns, views.scores(wanted, images), strict=True):
            column += scores
    return [share(column) for column in columns]


def row(bench: Bench, kind: str) -> Figures:
    """Held-out solids in colours: the nearest rendered view must be the right one for all images of an answer.

    `tokenizer`: the true views after the image tokenizer.
    """
    todo = views.examples(kind, bench.names, bench.count, bench.rng(kind), held_out=True)
    todo.sort(key=lambda example: example.about.backdrop)  # the measure draws all views on one background at a time
    answers = answered_in_views(bench, todo, kind)
    again: dict[views.Turn, list[Image.Image]] = {}
    for example in todo:
        if example.about not in again:
            drawn = [view.draw() for view in example.about.views]
            again[example.about] = [bench.through_tokenizer(image) for image in drawn]
    truth = [again[example.about][-example.turns[1].count(PICTURE) :] for example in todo]
    step = max(1, len(todo) // _SHEET)
    rows = range(0, step * min(_SHEET, len(todo)), step)
    shown = [image for n in rows for image in (*again[todo[n].about][: views.VIEWS - len(answers[n])], *answers[n])]
    words: list[str] = []  # below the first picture of each row: its prompt, or what the given view shows
    for n in rows:
        prompt, about = todo[n].turns[0].split("\n")[-1], todo[n].about
        words += [f"{about.color} {about.solid}" if PICTURE in prompt else prompt, *[""] * (views.VIEWS - 1)]
    bench.sheet(kind, shown, words, most=len(shown))
    named: Figures = dict(zip(views.FIGURES, figures_of(todo, answers), strict=True))
    best = dict(zip(views.FIGURES, figures_of(todo, truth), strict=True))
    first, each = views.FIGURES[:2]
    return named | {f"{first} (tokenizer)": best[first], f"{each} (tokenizer)": best[each]}


ROWS: Mapping[str, Row] = MappingProxyType({kind: (lambda bench, kind=kind: row(bench, kind)) for kind in views.KINDS})
