"""Checks every token shard of a pre-tokenized folder and writes one record file: see TRAIN.md."""

import argparse
import sys

from lumina_mgpt.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sub_record_dir", required=True, help="--out_dir of pre_tokenize.py, all ranks finished")
    parser.add_argument("--save_path", required=True, help="record file to write, .json or .jsonl")
    args = parser.parse_args()
    from lumina_mgpt.data.pre_tokenize import concat_records

    try:
        good, bad = concat_records(args.sub_record_dir, args.save_path)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{good} records in {args.save_path}; {bad} were left out by pre_tokenize.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
