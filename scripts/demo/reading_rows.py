"""Rows of the evaluation: captions, questions, several pictures, unknown names, and reading what was drawn."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import drawing
import reading
from composed import Picture, relation
from emoji import with_article
from examples import Example
from questions import QUESTIONS, held_out_questions
from row_tools import Bench, Figures, Row, most_frequent, share
from words import UNKNOWN, Said, caption, parsed, word_for

from lumina_mgpt.prompts import PICTURE, text_to_image
from lumina_mgpt.unirep import Turn


def turns_of(bench: Bench, example: Example, count: int = 1) -> list[Turn]:
    """The first `count` turns of an example, with the codes of its pictures in the places of the marks."""
    drawn = iter(bench.codes_of(panels[0].draw(bench.pictures)) for panels in example.images)
    found: list[Turn] = []
    for n, text in enumerate(example.turns[:count]):
        before, *after = text.split(PICTURE)
        parts = [before, *(part for piece in after for part in (next(drawn), piece))]
        found.append((("human", "assistant")[n % 2], [part for part in parts if not isinstance(part, str) or part]))
    return found


def _sheet(bench: Bench, row: str, shown: Sequence[Picture], words: Sequence[str]) -> None:
    bench.sheet(row, [picture.draw(bench.pictures) for picture in shown[:16]], words)


def captions(bench: Bench) -> Figures:
    """Held-out pictures: the caption must be right word for word: objects, background, number and order."""
    todo = reading.examples("caption", bench.names, bench.count, bench.rng("caption"), held_out=True)
    answers = bench.answered_in_words([turns_of(bench, example) for example in todo], "caption")
    truth = [example.turns[1] for example in todo]
    _sheet(bench, "caption", [example.about for example in todo], answers)
    said = [(parsed(ours), parsed(theirs)) for ours, theirs in zip(answers, truth, strict=True)]
    return {
        "all right": share(ours == theirs for ours, theirs in zip(answers, truth, strict=True)),
        "most frequent answer": most_frequent(truth),
        "objects right": share(a is not None and b is not None and a.objects == b.objects for a, b in said),
        "background right": share(a is not None and b is not None and a.background == b.background for a, b in said),
    }


def questions(bench: Bench, kind: str) -> Figures:
    """Held-out questions of one kind, with equally frequent answers."""
    asked = held_out_questions(kind, bench.names, bench.count, bench.rng(f"question {kind}"))
    todo = [
        Example(kind, (reading.shown_first(question.text), question.answer), ((question.picture,),))
        for question in asked
    ]
    answers = bench.answered_in_words([turns_of(bench, example) for example in todo], kind)
    words = [f"{question.text} {answer}" for question, answer in zip(asked, answers, strict=True)]
    _sheet(bench, f"question {kind}", [question.picture for question in asked if question.picture], words)
    truth = [question.answer for question in asked]
    right = share(ours == theirs for ours, theirs in zip(answers, truth, strict=True))
    return {"right": right, "most frequent answer": most_frequent(truth)}


def two_pictures(bench: Bench) -> Figures:
    """Which of two pictures shows an object."""
    todo = reading.examples("pictures", bench.names, bench.count, bench.rng("pictures"), held_out=True)
    answers = bench.answered_in_words([turns_of(bench, example) for example in todo], "pictures")
    truth = [example.turns[1] for example in todo]
    right = share(ours == theirs for ours, theirs in zip(answers, truth, strict=True))
    return {"right": right, "most frequent answer": most_frequent(truth)}


def unknown(bench: Bench) -> Figures:
    """Names that training never mentions, and as many known ones: what is it, and draw it."""
    rng = bench.rng("unknown")
    figures: Figures = {}
    for known, names in ((False, list(bench.unknown)), (True, rng.sample(bench.names, len(bench.unknown)))):
        asked: list[list[Turn]] = []
        for name in names:
            noun = with_article(word_for(name))
            asked += [
                [("human", [f"Do you know what {noun} is?"])],
                [("human", [f"Draw {noun} on a white background."])],
            ]
        answers = bench.answered_in_words(asked, "known" if known else "unknown")
        drawn = bench.begins_with_picture(asked)
        refused = [answer == UNKNOWN and not picture for answer, picture in zip(answers, drawn, strict=True)]
        if known:
            said = zip(answers[::2], drawn[::2], strict=True)
            yes = [answer == "Yes." and not picture for answer, picture in said]
            figures |= {"known: yes, or drawn": share([*yes, *drawn[1::2]])}
        else:
            figures |= {"refused": share(refused)}
            figures |= {"refused, what": share(refused[::2]), "refused, draw": share(refused[1::2])}
    return figures


def matches(said: Said | None, wanted: Picture, related: bool) -> bool:
    """Whether a caption says what a prompt asked for: objects, number, background, and position if it was asked for."""
    if said is None or said.background != wanted.background or said.objects != Said.of(wanted).objects:
        return False
    return not related or said.relation in _same_relation(wanted)


def _same_relation(wanted: Picture) -> tuple[tuple[str, str, str], ...]:
    first, second = wanted.items
    forth, back = relation(first, second), relation(second, first)
    assert forth and back
    return (first.name, forth, second.name), (second.name, back, first.name)


def drawn_and_described(bench: Bench) -> Figures:
    """Draws held-out prompts, describes its own pictures, and compares the description with the prompt."""
    rng, todo = bench.rng("own picture"), list[Example]()
    for kind in ("single", "colors", "counting", "position"):
        todo += drawing.examples(kind, bench.names, -(-bench.count // 4), rng, held_out=True)
    wanted = [example.about for example in todo]
    prompts = [text_to_image(caption(picture), *picture.size) for picture in wanted]
    codes = bench.answered_in_pictures([[("human", [p])] for p in prompts], [p.size for p in wanted], "own pictures")
    talks = [
        [("human", [prompt]), ("assistant", [grid]), ("human", [reading.DESCRIBE])]
        for prompt, grid in zip(prompts, codes, strict=True)
    ]
    alone = [[("human", [f"{reading.DESCRIBE} ", grid])] for grid in codes]
    pairs = list(zip(wanted, [example.kind == "position" for example in todo], strict=True))
    figures: Figures = {}
    for name, asked in (("description matches", alone), ("in the same conversation", talks)):
        answers = bench.answered_in_words(asked, name)
        figures[name] = share(matches(parsed(a), *pair) for a, pair in zip(answers, pairs, strict=True))
    images = [bench.shown(grid) for grid in codes]
    bench.sheet("own picture", images, answers)
    figures["drawn right"] = share(bench.finder.right(i, *pair) for i, pair in zip(images, pairs, strict=True))
    return figures


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "caption": captions,
        **{f"question {kind}": (lambda bench, kind=kind: questions(bench, kind)) for kind in QUESTIONS},
        "pictures": two_pictures,
        "unknown": unknown,
        "own picture": drawn_and_described,
    }
)
