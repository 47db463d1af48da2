"""The benchmarks as data: the reader of the list, the usual number of images, and the files that the scorer reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lumina_mgpt.benchmarks import lists
from lumina_mgpt.benchmarks.lists import Item


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark.

    Attributes:
        title: name in messages.
        images: images of each prompt in published results.
        read: reads the official list.
        image: (item, number of the image, images of each prompt) -> path of the image in the output folder.
        tile: item -> path of the picture that shows all images of the item; None if there is none.
        texts: (items, images of each prompt) -> path and content of each text file.
        square: whether the scorer takes square images only.
    """

    title: str
    images: int
    read: Callable[[Path], list[Item]]
    image: Callable[[Item, int, int], str]
    tile: Callable[[Item], str] | None = None
    texts: Callable[[Sequence[Item], int], dict[str, str]] = lambda items, images: {}
    square: bool = False


def _geneval_texts(items: Sequence[Item], images: int) -> dict[str, str]:
    return {f"{item.name}/metadata.jsonl": item.line + "\n" for item in items}


def _parti_image(item: Item, number: int, images: int) -> str:
    return f"{item.name}.png" if images == 1 else f"{item.name}_{number:02d}.png"


def _parti_texts(items: Sequence[Item], images: int) -> dict[str, str]:
    rows = ["File\tPrompt\tCategory\tChallenge\tNote"]
    for item in items:
        cells = [item.prompt, *(item.fields[name] for name in ("Category", "Challenge", "Note"))]
        rows += ["\t".join([_parti_image(item, number, images), *cells]) for number in range(images)]
    return {"index.tsv": "\n".join(rows) + "\n"}


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        # evaluation/evaluate_images.py reads metadata.jsonl and every samples/{digits}.png of folders named by digits.
        "geneval": Benchmark(
            "GenEval",
            4,
            lists.read_geneval,
            lambda item, number, images: f"{item.name}/samples/{number:04d}.png",
            lambda item: f"{item.name}/grid.png",
            _geneval_texts,
        ),
        # dpg_bench/compute_dpg_bench.py crops up to four squares from {id}.png: two beside each other, two below them.
        "dpg": Benchmark(
            "DPG-Bench",
            4,
            lists.read_dpg,
            lambda item, number, images: f"samples/{item.name}_{number}.png",
            lambda item: f"{item.name}.png",
            square=True,
        ),
        # BLIPvqa_eval/BLIP_vqa.py splits the names in samples/ at underscores: the prompt, and the number to sort by.
        "compbench": Benchmark(
            "T2I-CompBench",
            10,
            lists.read_compbench,
            lambda item, number, images: f"samples/{item.name}_{item.index * images + number:06d}.png",
        ),
        "parti": Benchmark("PartiPrompts", 1, lists.read_parti, _parti_image, texts=_parti_texts),
    }
)


def columns(images: int) -> int:
    """Returns the number of columns of a tile: two for two to four images, as DPG's scorer reads them, then √images.

    Ranges: images >= 1.
    """
    side = 1
    while side * side < images:
        side += 1
    return side
