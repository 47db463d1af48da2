"""Extends a demo checkpoint before it learns to read: more text pieces, more rows of weights, and its new abilities.

    python scripts/demo/extend.py --model_path assets/demo --known work/demo/records.jsonl work/demo/omni.jsonl \\
        --records work/demo/records --save_path work/demo/start

The new rows begin as means of the rows of the pieces that they join. What the checkpoint could do, it does as before.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.io import new_folder, read_json, require_new, write_atomic

PIECES = 256  # new text pieces at most; the rows of the weights are extended by this number
ABILITIES = {"text": {}, "detect": {}, "multiview": {"views": 8, "side": 64}}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="extend.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default=cli.DEMO, help="checkpoint folder or hub id")
    parser.add_argument(
        "--known", nargs="+", type=Path, required=True, help="records that the checkpoint was trained on"
    )
    parser.add_argument("--records", type=Path, required=True, help="folder of the new records")
    parser.add_argument("--save_path", required=True, type=Path, help="new folder for the result")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the extended checkpoint. One that was extended before is copied."""
    import more_pieces

    from lumina_mgpt.model.convert import copy_companions
    from lumina_mgpt.model.hub import resolve
    from lumina_mgpt.model.reading import load_model, require_plain_weights
    from lumina_mgpt.model.writing import save_model

    require_new(args.save_path, "save_path")
    source = resolve(cli.checkpoint_path(args.model_path))
    require_plain_weights(source, "model_path", "edited")
    old, content = load_model(source, None, "cpu"), read_json(source / "tokenizer.json")
    model, merges = old, []
    if old.config.abilities != ABILITIES:
        model, merges = _extended(old, source, args)
        content = more_pieces.extended(content, merges, old.config.vocab_size)
    with new_folder(args.save_path, "save_path") as folder:
        save_model(model, folder, old.embed_tokens.weight.dtype)
        copy_companions(source, folder)
        write_atomic(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(merges)} new pieces of text in {args.save_path}")


def _extended(old, source: Path, args: argparse.Namespace) -> tuple:
    """The model with more rows and with ABILITIES, and the new merges of the text tokenizer."""
    import examples
    import more_pieces
    from tokenizers import Tokenizer

    from lumina_mgpt.model.transformer import Transformer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    known = [text for path in args.known for text in examples.texts(path)]
    new = [text for path in sorted(args.records.glob("*.jsonl")) for text in examples.texts(path)]
    merges = more_pieces.learned(tokenizer, known, new, PIECES)
    model = Transformer(replace(old.config, vocab_size=old.config.vocab_size + PIECES, abilities=ABILITIES))
    state = old.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = _more_rows(state[name], tokenizer, merges)
    model.load_state_dict(state)
    return model, merges


def _more_rows(rows, tokenizer, merges: list[tuple[str, str]]):
    """`rows` with one more for each merge, the mean of those of its two pieces, and unused ones up to PIECES."""
    import torch

    ids = {token: id_ for token, id_ in tokenizer.get_vocab(with_added_tokens=False).items()}
    out = torch.cat([rows, rows[: min(ids.values()) + 1].mean(0, keepdim=True).expand(PIECES, -1)]).clone()
    for n, (left, right) in enumerate(merges):
        out[len(rows) + n] = (out[ids[left]].float() + out[ids[right]].float()).div(2).to(out.dtype)
        ids[left + right] = len(rows) + n
    return out


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
