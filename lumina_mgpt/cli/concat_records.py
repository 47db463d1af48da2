"""`lumina-mgpt concat-records`: checks token shards and lists them in one record file. See TRAIN.md."""

import argparse
from collections.abc import Sequence

from lumina_mgpt import cli


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="lumina-mgpt concat-records",
        description="Checks the token shards of all ranks and lists them in one record file.",
    )
    parser.add_argument("--sub_record_dir", required=True, help="--out_dir of pre-tokenize, all ranks finished")
    parser.add_argument("--save_path", required=True, help="record file to write, .json or .jsonl")
    return parser


def concat(args: argparse.Namespace) -> None:
    from lumina_mgpt.data.concat import concat_records  # imports torch, which takes seconds

    good, bad = concat_records(args.sub_record_dir, args.save_path)
    print(f"{good} records in {args.save_path}; {bad} were left out by pre-tokenize")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(concat, build_parser(), argv, stopped="run the same command again")
