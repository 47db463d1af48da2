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

_GAP = 4  # pixels between a picture and its edit on the sheet
_ON_SHEET = 8  # conversations on the sheet


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
    asked = [f"{example.turns[0].splitlines()[-1]} / {example.about.instruction}" for example in todo]
    told = zip(asked, first, second, strict=True)
    shown = [_above(*pair) for pair in zip(before, after, strict=True)]
    bench.sheet("talk", shown, [f"{words} // {one} // {other}" for words, one, other in told], most=_ON_SHEET)
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


def _above(before: Image.Image, after: Image.Image) -> Image.Image:
    """A picture above its edit, which may have another size."""
    sheet = Image.new("RGB", (max(before.width, after.width), before.height + _GAP + after.height), "white")
    sheet.paste(before, (0, 0))
    sheet.paste(after, (0, before.height + _GAP))
    return sheet


def _related(picture: Picture) -> bool:
    """Whether a caption says where the objects are: for two different ones, side by side or one above the other."""
    items = picture.items
    return len(items) == 2 and items[0].what != items[1].what and relation(*items) is not None


ROWS: Mapping[str, Row] = MappingProxyType({"talk": conversations})
