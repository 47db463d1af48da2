"""Writes the training data of the demo checkpoint: pictures, caption records and the text tokenizer.

    python scripts/demo/make_data.py --out_dir work/demo
    python scripts/demo/make_data.py --out_dir work/demo --omni

With --omni, writes the records of image tasks instead.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import emoji
import omni
import scenes
from PIL import Image
from text_tokenizer import write_tokenizer
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.images import stacked
from lumina_mgpt.io import json_line, write_atomic
from lumina_mgpt.maps import canny

PAIRS = 12000  # pictures of two emoji
CAPTIONS = {"single": 6, "beside": 1, "above": 1}  # captions of each picture, by arrangement
PANELS = 1500  # scenes whose maps the image tokenizer is trained on
LOOSE = 3000  # pictures of scenes.loose
PROMPTS = (  # example prompts of the checkpoint
    "a hedgehog on a sky blue background",
    "a slice of pizza on a white background",
    "an owl on a lavender background",
    "a rocket on a navy background",
    "a cactus on a pink background",
)


def write_pictures(out_dir: Path, todo: list[scenes.Scene], pictures: dict) -> None:
    """Writes one PNG for each scene to `out_dir/{arrangement}`."""
    for scene in tqdm(todo, desc="pictures", unit="picture"):
        path = out_dir / scene.arrangement / f"{scene.key}.png"
        if not path.exists():
            _save(scenes.render(scene, pictures), path)


def write_tokenizer_pictures(out_dir: Path, todo: list[scenes.Scene], pictures: dict, rng: random.Random) -> None:
    """Writes maps, dual panels and loose compositions, which only the image tokenizer is trained on."""
    for scene in tqdm(todo, desc="maps", unit="scene"):
        picture = scenes.render(scene, pictures)
        maps = {
            "edges": canny(picture),
            "depth": scenes.depth(scene, pictures),
            "segmentation": scenes.segmentation(scene, pictures),
        }
        for name, image in maps.items():
            _save(image, out_dir / "maps" / f"{scene.key}_{name}.png")
        panel = maps[rng.choice(sorted(maps))]
        _save(stacked(rng.sample([picture, panel], 2)), out_dir / "panels" / f"{scene.key}.png")
    for n in tqdm(range(LOOSE), desc="loose", unit="picture"):
        _save(scenes.loose(rng, pictures), out_dir / "loose" / f"{n}.png")


def write_records(path: Path, folder: Path, todo: list[scenes.Scene], rng: random.Random) -> list[str]:
    """Writes JSON lines `{"image_path", "prompt"}` with several captions a picture; returns all captions."""
    captions = []
    with path.open("w") as file:
        for scene in todo:
            picture = str(folder / scene.arrangement / f"{scene.key}.png")
            for text in dict.fromkeys(scenes.caption(scene, rng) for _ in range(CAPTIONS[scene.arrangement])):
                file.write(json.dumps({"image_path": picture, "prompt": text}) + "\n")
                captions.append(text)
    return captions


def write_omni(out_dir: Path, pictures: dict, names: list[str], seed: int) -> int:
    """Writes panels to `out_dir/pictures/omni` and the records of image tasks; returns the number of records.

    Records with a given upper panel are in `out_dir/omni.jsonl`, those that generate both panels in `pairs.jsonl`.
    """
    lines: dict[bool, list[str]] = {True: [], False: []}
    for kind in tqdm(omni.KINDS, desc="image tasks", unit="task"):
        for example in omni.training_examples(kind, names, random.Random(f"{seed} {kind}")):
            paths = [out_dir / "pictures" / "omni" / f"{key}.png" for key in example.keys]
            if not all(path.exists() for path in paths):
                for panel, path in zip(omni.panels(example, pictures), paths, strict=True):
                    _save(panel, path)
            line = json_line(omni.record(example, (str(paths[0]), str(paths[1]))))
            lines[bool(example.task.given_panels)].append(line)
    for given, name in ((True, "omni"), (False, "pairs")):
        write_atomic(out_dir / f"{name}.jsonl", "".join(lines[given]))
    return sum(map(len, lines.values()))


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    image.save(temporary, "PNG", compress_level=1)
    temporary.replace(path)


def write(args: argparse.Namespace) -> None:
    """Writes all data, or with `args.omni` the records of image tasks."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    emoji.fetch(args.out_dir / "emoji")
    pictures, names = emoji.load(args.out_dir / "emoji"), emoji.known_names()
    if args.omni:
        print(f"{write_omni(args.out_dir, pictures, names, args.seed)} records in {args.out_dir}")
        return
    rng = random.Random(args.seed)
    todo = scenes.training_scenes(names, args.pairs, rng)
    write_pictures(args.out_dir / "pictures", todo, pictures)
    write_tokenizer_pictures(args.out_dir / "pictures", rng.sample(todo, min(PANELS, len(todo))), pictures, rng)
    captions = write_records(args.out_dir / "records.jsonl", args.out_dir / "pictures", todo, rng)
    folder = args.out_dir / "tokenizer"
    write_tokenizer(folder, captions)
    ModelConfig.from_yaml(args.model_config).to_json(folder / "config.json")
    aliases = [emoji.ALIASES[name] for name in names if name in emoji.ALIASES]
    for name, lines in (("names", sorted({*names, *aliases})), ("prompts", PROMPTS)):
        write_atomic(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    print(f"{len(captions)} records of {len(todo)} pictures in {args.out_dir}")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="make_data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=Path("work/demo"), help="output folder")
    parser.add_argument("--model_config", default="configs/model/demo.yaml", help="YAML file of the model")
    parser.add_argument("--pairs", type=cli.whole, default=PAIRS, help="number of pictures of two emoji")
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed")
    parser.add_argument("--omni", action="store_true", help="write only the records of image tasks")
    return cli.run(write, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
