"""Gives the answers of detection the codes of the given picture, except under the lines of the box.

    python scripts/demo/keep_codes.py --records work/demo/records/detect.jsonl --tokens work/demo/tokens/detect \\
        --model_path work/demo/start

The image tokenizer normalizes over the whole picture, so that a box changes codes everywhere: about half of them, where
its lines cover an eighth. A model would mostly learn these changes, and only slowly where the box belongs.

Each record has two pictures of the same size. The shards are written anew; a second run changes nothing.
"""

import argparse
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


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="keep_codes.py", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, required=True, help="records with two pictures each, a .jsonl file")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the pre-tokenized records")
    parser.add_argument("--model_path", default=cli.DEMO, help="checkpoint whose tokenizers made the tokens")
    return parser


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

    starts = (sequence.ids == vocabulary.image_start_id).nonzero().flatten().tolist()
    ends = ((sequence.ids == vocabulary.image_end_id).nonzero().flatten() + 1).tolist()
    grids = [decode_image(sequence.ids[start:end], vocabulary) for start, end in zip(starts, ends, strict=True)]
    pixels = [np.asarray(to_rgb(open_image(file))) for file in files]
    sizes = {picture.shape[:2] for picture in pixels} | {
        tuple(vocabulary.cell * n for n in grid.shape) for grid in grids
    }
    if len(files) != 2 or len(grids) != 2 or len(sizes) != 1:
        raise InputError(f"record {sequence.record} must have two pictures of one size, tokenized with --keep_size")
    (given, answer), cell = grids, vocabulary.cell
    differs = (pixels[0] != pixels[1]).any(-1).reshape(answer.shape[0], cell, answer.shape[1], cell).any((1, 3))
    ids = sequence.ids.clone()
    codes = torch.where(torch.from_numpy(differs), answer, given)
    ids[starts[1] : ends[1]] = torch.tensor(encode_image(codes, vocabulary))
    return replace(sequence, ids=ids, labels=torch.where(sequence.labels < 0, sequence.labels, ids))


def run(args: argparse.Namespace) -> None:
    """Rewrites the shards."""
    from tqdm import tqdm

    from lumina_mgpt.data.records import parse_record
    from lumina_mgpt.data.shards import read_index, read_sequence, write_shard
    from lumina_mgpt.io import read_rows
    from lumina_mgpt.pipeline import Checkpoint

    vocabulary = Checkpoint.open(cli.checkpoint_path(args.model_path)).vocabulary
    records = [parse_record(row) for row in read_rows(args.records, "records")]
    files = sorted((args.tokens / "shards").glob("*.safetensors"))
    if not files:
        raise InputError(f"{args.tokens} holds no shards; pre-tokenize the records into it", "tokens")
    for file in tqdm(files, desc=args.records.stem, unit="shard", mininterval=cli.bar_interval()):
        index = read_index(file)
        if index.records and max(index.records) >= len(records):
            raise InputError(f"{file} holds record {max(index.records)}, {args.records} has {len(records)}", "records")
        pictures = {n: [path for panels in records[n].images for path in panels] for n in index.records}
        write_shard(file, [kept(read_sequence(file, n), pictures[n], vocabulary) for n in index.records], index.bad)


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
