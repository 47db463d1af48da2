"""Row of the evaluation: drawing, editing and asking in one conversation."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import reading
import talks
from composed import Picture, relation
from evaluation import Share
from finder import background_right
from PIL import Image
from reading_rows import matches
from row_tools import Bench, Figures, Row, share
from words import parsed

from lumina_mgpt.unirep import Turn


def conversations(bench: Bench) -> Figures:
    """Draws, describes, edits its own picture, describes again; the history has the model's own codes and answers."""
    todo = talks.examples("talk", bench.names, bench.count, bench.rng("talk"), held_out=True)
    wanted = [example.about for example in todo]
    history: list[list[Turn]] = [[("human", [example.turns[0]])] for example in todo]
    drawn = bench.answered_in_pictures(history, [talk.before.size for talk in wanted], "draw")
    for turns, codes in zip(history, drawn, strict=True):
        turns += [("assistant", [codes]), ("human", [reading.DESCRIBE])]
    first = bench.answered_in_words(history, "describe")
    for turns, words, talk in zip(history, first, wanted, strict=True):
        turns += [("assistant", [words]), ("human", [talk.instruction])]
    edited = bench.answered_in_pictures(history, [talk.after.size for talk in wanted], "edit")
    for turns, codes in zip(history, edited, strict=True):
        turns += [("assistant", [codes]), ("human", [reading.DESCRIBE])]
    second = bench.answered_in_words(history, "describe again")
    before, after = ([bench.shown(codes) for codes in grids] for grids in (drawn, edited))
    bench.sheet("talk", [i for pair in zip(before, after, strict=True) for i in pair], [
        text for example, talk in zip(todo, wanted, strict=True)
        for text in (example.turns[0].split("\n")[-1], talk.instruction)
    ])  # fmt: skip
    scenes = [talk.before for talk in wanted], [talk.after for talk in wanted]

    def drawn_right(images: Sequence[Image.Image], pictures: Sequence[Picture]) -> Share:
        pairs = zip(images, pictures, strict=True)
        return share(bench.finder.right(i, p, _related(p)) and background_right(i, p) for i, p in pairs)

    def described_right(answers: Sequence[str], pictures: Sequence[Picture]) -> Share:
        return share(matches(parsed(words), p, _related(p)) for words, p in zip(answers, pictures, strict=True))

    return {
        "edited right": drawn_right(after, scenes[1]),
        "drawn right": drawn_right(before, scenes[0]),
        "first description right": described_right(first, scenes[0]),
        "second description right": described_right(second, scenes[1]),
    }


def _related(picture: Picture) -> bool:
    """Whether a caption says where the objects are: for two different ones, side by side or one above the other."""
    items = picture.items
    return len(items) == 2 and items[0].what != items[1].what and relation(*items) is not None


ROWS: Mapping[str, Row] = MappingProxyType({"talk": conversations})
