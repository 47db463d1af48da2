"""Lets answers in pictures carry loss mainly where they decide something: which object gets a box, whether to draw.

    python scripts/demo/decision_tokens.py --records work/demo/records/detect.jsonl \\
        --tokens work/demo/tokens/detect --model_path work/demo/start

In most records with a key `starts`, only the beginning of the last image and its codes at these places carry loss, and
the answers before it. In detection, they are the codes at which a box could begin. A model learns there which object is
meant, or that none is. Other records keep all labels.

An answer of detection gets the codes of the given picture, except under the lines of the box. The image tokenizer
normalizes over the whole picture, so that a box would change about half of all codes, and a model would mostly learn
these changes.

The shards are written anew; a second run changes nothing.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError

if TYPE_CHECKING:
    from lumina_mgpt.data import shards
    from lumina_mgpt.vocabulary import Vocabulary

_WHOLE = 0.15  # share of the answers that carry loss everywhere


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="decision_tokens.py", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, required=True, help="records, a .jsonl file")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the pre-tokenized records")
    parser.add_argument("--model_path", default=cli.DEMO, help="checkpoint whose tokenizers made the tokens")
    return parser


def spans(sequence: "shards.Sequence", vocabulary: "Vocabulary") -> list[slice]:
    """Where the images of a sequence are, image start to image end."""
    starts, ends = ((sequence.ids == n).nonzero() for n in (vocabulary.image_start_id, vocabulary.image_end_id))
    return [slice(int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True)]


def kept(sequence: "shards.Sequence", files: Sequence[Path], vocabulary: "Vocabulary") -> "shards.Sequence":
    """The sequence whose second picture has the codes of the first, except where pixels of a code differ.

    Args:
        files: the two pictures.

    Raises:
        InputError: there are not two pictures of the size of their codes.
    """
    import numpy as np
    import torch

    from lumina_mgpt.images import open_image, to_rgb
    from lumina_mgpt.unirep import decode_image, encode_image

    images, cell = spans(sequence, vocabulary), vocabulary.cell
    grids = [decode_image(sequence.ids[span], vocabulary) for span in images]
    pixels = [np.asarray(to_rgb(open_image(file))) for file in files]
    sizes = {picture.shape[:2] for picture in pixels} | {tuple(cell * n for n in grid.shape) for grid in grids}
    if len(files) != 2 or len(grids) != 2 or len(sizes) != 1:
        raise InputError(f"record {sequence.record} must have two pictures of one size, tokenized with --keep_size")
    given, answer = grids
    differs = (pixels[0] != pixels[1]).any(-1).reshape(answer.shape[0], cell, answer.shape[1], cell).any((1, 3))
    ids = sequence.ids.clone()
    codes = torch.where(torch.from_numpy(differs), answer, given)
    ids[images[1]] = torch.tensor(encode_image(codes, vocabulary))
    return replace(sequence, ids=ids, labels=torch.where(sequence.labels < 0, sequence.labels, ids))


def labelled_at(
    sequence: "shards.Sequence", starts: Sequence[Sequence[int]], vocabulary: "Vocabulary"
) -> "shards.Sequence":
    """The sequence whose last picture has labels only on its beginning, and on the codes at these places.

    Args:
        starts: left and top of each place in pixels.

    Raises:
        InputError: a place is not in the picture.
    """
    from lumina_mgpt.unirep import IGNORED, ImageLayout, decode_image

    span, cell = spans(sequence, vocabulary)[-1], vocabulary.cell
    rows, cols = decode_image(sequence.ids[span], vocabulary).shape
    layout = ImageLayout.from_pixels(vocabulary, cols * cell, rows * cell)
    labels = sequence.labels.clone()
    labels[span.start + 1 :] = IGNORED  # also what ends the turn: it always follows
    for left, top in starts:
        if not (0 <= left < cols * cell and 0 <= top < rows * cell):
            raise InputError(f"record {sequence.record}: the start {left}, {top} is outside of the picture")
        place = span.start + layout.offset_of(top // cell * cols + left // cell)
        labels[place] = sequence.labels[place]
    return replace(sequence, labels=labels)


def run(args: argparse.Namespace) -> None:
    """Rewrites the shards."""
    from tqdm import tqdm

    from lumina_mgpt.data.records import parse_record
    from lumina_mgpt.data.shards import read_index, read_sequence, write_shard
    from lumina_mgpt.io import read_rows
    from lumina_mgpt.pipeline import Checkpoint

    vocabulary = Checkpoint.open(cli.checkpoint_path(args.model_path)).vocabulary
    rows = read_rows(args.records, "records")
    records = [parse_record(row) for row in rows]
    files = sorted((args.tokens / "shards").glob("*.safetensors"))
    if not files:
        raise InputError(f"{args.tokens} holds no shards; pre-tokenize the records into it", "tokens")
    for file in tqdm(files, desc=args.records.stem, unit="shard", mininterval=cli.bar_interval()):
        index, sequences = read_index(file), []
        if index.records and max(index.records) >= len(records):
            have = f"{file} holds record {max(index.records)}, {args.records} has {len(records)}"
            raise InputError(f"{have}; give the file that was tokenized", "records")
        for n in index.records:
            sequence, starts = read_sequence(file, n), rows[n].get("starts")
            if starts:
                pictures = [path for panels in records[n].images for path in panels]
                sequence = kept(sequence, pictures, vocabulary)
            if starts is not None and random.Random(n).random() >= _WHOLE:
                sequence = labelled_at(sequence, starts, vocabulary)
            sequences.append(sequence)
        write_shard(file, sequences, index.bad)


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
