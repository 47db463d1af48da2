"""`lumina-mgpt pre-tokenize`: converts images and texts to token shards for training. See TRAIN.md."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.errors import caused_by

if TYPE_CHECKING:
    from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

logger = logging.getLogger(__name__)

# Errors name the option of the checkpoint's kind of image tokenizer.
ALIASES = {"vqgan_path": "--vqgan_path"}
OPTIONS = ("out_dir", "splits", "rank", "target_size", "keep_size", "seed", "batch_size", "block", "workers")


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        ALIASES, prog="lumina-mgpt pre-tokenize", description="Converts images and texts to token shards for training."
    )
    parser.add_argument(
        "--in_filename", required=True, help="folder of pictures, .json, .jsonl (paths relative to here) or .tar"
    )
    parser.add_argument("--out_dir", required=True, help="folder for shards, record files and lists of bad records")
    parser.add_argument("--model_path", required=True, help="folder of the checkpoint: config.json and the tokenizer")
    parser.add_argument(
        "--movqgan_path",
        "--vqgan_path",
        help="weights of the MoVQGAN, or of the VQGAN of a first-generation model (default: those in --model_path)",
    )
    parser.add_argument("--splits", type=cli.whole, default=1, help="number of parts of the input")
    parser.add_argument("--rank", type=cli.whole, default=0, help="the part that this process tokenizes")
    parser.add_argument(
        "--target_size", type=cli.whole, default=768, help="crop to about target x target pixels, nearest aspect ratio"
    )
    parser.add_argument("--keep_size", action="store_true", help="do not crop pictures with sides in multiples of 32")
    parser.add_argument(
        "--batch_size", type=cli.whole, default=16, help="pictures encoded at once (on a GPU, fewer if memory is short)"
    )
    parser.add_argument("--workers", type=cli.whole, default=2, help="threads that read and crop pictures")
    parser.add_argument("--block", type=cli.whole, default=512, help="records per shard")
    parser.add_argument("--seed", type=cli.whole, default=0, help="selects the instructions that do not name the size")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: a GPU if there is one; ranks take GPUs in turn)"
    )
    return parser


def pre_tokenize(args: argparse.Namespace) -> None:
    from lumina_mgpt.config import ModelConfig
    from lumina_mgpt.data.inputs import read_input
    from lumina_mgpt.data.job import PreTokenizeConfig
    from lumina_mgpt.data.pre_tokenize import PreTokenizer
    from lumina_mgpt.devices import own_device
    from lumina_mgpt.image_tokenizer import load_image_tokenizer
    from lumina_mgpt.vocabulary import Vocabulary
    from lumina_mgpt.vqgan.tokenizer import look_for_image_tokenizer

    config = PreTokenizeConfig(**{name: getattr(args, name) for name in OPTIONS})
    source = read_input(args.in_filename)
    files = config.files(source)
    device = own_device(args.device, args.rank)
    if device.type == "cuda":
        logger.info("rank %d of %d encodes on %s", args.rank, args.splits, device)
    folder = Path(args.model_path)
    with caused_by("model_path"):
        model = ModelConfig.from_json(folder / "config.json")
        vocabulary = Vocabulary.from_folder(folder, model)
    family = model.family
    path = look_for_image_tokenizer(folder, args.movqgan_path, family.image_tokenizer)
    images = load_image_tokenizer(folder, path, device, kind=family.image_tokenizer)
    images.require_codes(model, images.source)
    models = f"{_fingerprint(folder / 'tokenizer.json', path, images)}-{model.image_code_offset}"
    config = replace(config, panels_apart=model.panels_apart, models=models)
    job = PreTokenizer(config, source, vocabulary, images, family)
    with tqdm(total=len(files.part), unit="record", desc=files.name, dynamic_ncols=True) as bar:
        job.run(bar.update)
    print(f"{job.good} records in {files.record}, {job.bad} left out")
    if job.bad:
        print(f"reasons: {files.bad}")


def _fingerprint(tokenizer: Path, path: Path | None, images: "ImageTokenizer") -> str:
    """Returns a hash over the text tokenizer's file and the weights of the image tokenizer.

    Args:
        path: file of the image tokenizer. If it is None, its tensors from the language model's files are hashed.
    """
    from lumina_mgpt.data.inputs import fingerprint
    from lumina_mgpt.training.base import fingerprint as digest_of

    if path is not None:
        return fingerprint(tokenizer, path)
    encoder = ((name, tensor.cpu()) for name, tensor in images.model.state_dict().items())
    return fingerprint(tokenizer) + digest_of(encoder)[:16]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(pre_tokenize, build_parser(), argv, stopped="run the same command again to continue")
