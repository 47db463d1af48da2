"""Row of the evaluation: drawing, editing and asking in one conversation."""

from collections.abc import Mapping
from types import MappingProxyType

import reading
import talks
from finder import background_right
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
    every = list(zip(before, after, first, second, wanted, strict=True))
    right = bench.finder.right
    return {
        "edited right": share(right(b, talk.after) and background_right(b, talk.after) for _, b, _, _, talk in every),
        "drawn right": share(right(a, talk.before) and background_right(a, talk.before) for a, _, _, _, talk in every),
        "first description right": share(matches(parsed(words), talk.before, False) for _, _, words, _, talk in every),
        "second description right": share(matches(parsed(words), talk.after, False) for _, _, _, words, talk in every),
    }


ROWS: Mapping[str, Row] = MappingProxyType({"talk": conversations})
