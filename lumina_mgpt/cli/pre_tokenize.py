"""Turns records (pictures and texts) into token shards: see TRAIN.md."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="pre-tokenize", description="Turns records into token shards.")
    parser.add_argument("--in_filename", required=True, help="folder, .json, .jsonl (paths as seen from here), .tar")
    parser.add_argument("--out_dir", required=True, help="shards, record files and bad items go here")
    parser.add_argument("--model_path", required=True, help="folder with config.json and the tokenizer")
    parser.add_argument("--movqgan_path", help="MoVQGAN weights (default: looked for in --model_path)")
    parser.add_argument("--splits", type=cli.whole, default=1, help="parts that the records are cut into")
    parser.add_argument("--rank", type=cli.whole, default=0, help="which part this process does")
    parser.add_argument(
        "--target_size", type=cli.whole, default=768, help="area target x target at the nearest aspect ratio"
    )
    parser.add_argument("--keep_size", action="store_true", help="leave pictures whose sides are multiples of 32 uncut")
    parser.add_argument("--batch_size", type=cli.whole, default=16, help="pictures encoded at once")
    parser.add_argument("--workers", type=cli.whole, default=2, help="threads that read and crop pictures")
    parser.add_argument("--block", type=cli.whole, default=512, help="records a shard")
    parser.add_argument("--seed", type=cli.whole, default=0, help="decides which instructions leave the size out")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (auto: a GPU where there is one)")
    return parser


def pre_tokenize(args: argparse.Namespace) -> None:
    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.data.pre_tokenize import PreTokenizeConfig, PreTokenizer, fingerprint
    from lumina_mgpt.devices import resolve_device
    from lumina_mgpt.movqgan.tokenizer import ImageTokenizer, find_movqgan
    from lumina_mgpt.vocabulary import Vocabulary

    device = resolve_device(args.device)
    folder = Path(args.model_path)
    config = ModelConfig.from_json(folder / "config.json")
    movqgan = find_movqgan(folder, args.movqgan_path)
    vocabulary = Vocabulary.from_folder(folder, config)
    names = ("in_filename", "out_dir", "splits", "rank", "target_size", "keep_size", "seed", "batch_size", "block",
             "workers")  # fmt: skip
    models = fingerprint(folder / "tokenizer.json", movqgan)
    settings = PreTokenizeConfig(**{name: getattr(args, name) for name in names}, panels_apart=config.panels_apart,
                        models=f"{models}-{config.image_code_offset}")  # fmt: skip
    job = PreTokenizer(settings, vocabulary, ImageTokenizer.from_checkpoint(movqgan, device))
    if job.images.num_codes != config.num_image_codes:
        raise InputError(f"{movqgan} has {job.images.num_codes} codes, {folder} expects {config.num_image_codes}")
    with tqdm(total=job.last - job.first, unit="record", desc=settings.name, dynamic_ncols=True) as bar:
        job.run(bar.update)
    print(f"{job.good} records in {job.out / (settings.name + '-record.jsonl')}, {job.bad} left out")
    if job.bad:
        print(f"why: {job.out / (settings.name + '-bad.jsonl')}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(pre_tokenize, build_parser(), argv, stopped="the same command goes on from here")

