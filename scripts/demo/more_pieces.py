"""More text pieces for a byte-level BPE whose model is already trained.

The new pieces get the ids after all others. The encoding of the texts that the model knows stays the same, so that its
weights keep their meaning.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

Pair = tuple[str, str]


def learned(tokenizer: Tokenizer, known: Iterable[str], texts: Iterable[str], count: int) -> list[Pair]:
    """Returns at most `count` merges, the most frequent first, that shorten `texts` and leave `known` as they are.

    Source: byte-pair encoding (arXiv 1508.07909).
    """
    fixed = {pair for word in _words(tokenizer, known) for pair in _pairs(_pieces(tokenizer, word))}
    words = {tuple(_pieces(tokenizer, word)): n for word, n in _words(tokenizer, texts).items()}
    merges: list[Pair] = []
    while len(merges) < count:
        found: Counter[Pair] = Counter()
        for pieces, n in words.items():
            for pair in _pairs(pieces):
                found[pair] += n
        fits = [(n, pair) for pair, n in found.items() if pair not in fixed and n > 1]
        if not fits:
            break
        _, best = max(fits, key=lambda entry: (entry[0], entry[1]))
        merges.append(best)
        words = {tuple(_merged(pieces, best)): n for pieces, n in words.items()}
    return merges


def extended(content: Mapping[str, Any], merges: list[Pair], first: int) -> dict[str, Any]:
    """Content of a `tokenizer.json` with more merges, whose pieces get the ids from `first` on.

    The special names become entries of the model's vocabulary, since readers otherwise number them after its last one.
    """
    model = dict(content["model"])
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    new = {left + right: first + n for n, (left, right) in enumerate(merges)}
    assert not new.keys() & (model["vocab"].keys() | special.keys()), "a piece exists already"
    model["vocab"] = {**model["vocab"], **special, **new}
    as_lists = not model["merges"] or isinstance(model["merges"][0], list)
    model["merges"] = model["merges"] + [list(pair) if as_lists else " ".join(pair) for pair in merges]
    return {**content, "model": model}


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in texts:
        found.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return found


def _pieces(tokenizer: Tokenizer, word: str) -> list[str]:
    return [token.value for token in tokenizer.model.tokenize(word)]


def _pairs(pieces: Iterable[str]) -> list[Pair]:
    pieces = list(pieces)
    return list(zip(pieces, pieces[1:], strict=False))


def _merged(pieces: Iterable[str], pair: Pair) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
