"""Makes data sources from short sequences."""

import json
from pathlib import Path

import torch

from lumina_mgpt.data.dataset import Source
from lumina_mgpt.data.shards import Sequence, write_shard
from lumina_mgpt.unirep import encode_conversation
from lumina_mgpt.vocabulary import Vocabulary


def make_source(folder: Path, vocabulary: Vocabulary, count: int, name: str = "a", **source) -> Source:
    """`count` sequences of three sizes, in two shards."""
    sequences = []
    for n in range(count):
        codes = torch.full((4, 4 * (1 + n % 3)), n % 64)
        ids, labels = encode_conversation([("human", [f"a cat {n}"]), ("assistant", [codes])], vocabulary)
        sequences.append(Sequence(n, torch.tensor(ids), torch.tensor(labels)))
    rows = []
    for part, half in enumerate((sequences[: count // 2], sequences[count // 2 :])):
        file = f"{name}{part}.safetensors"
        rows += write_shard(folder / file, half, []).rows(file)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), **source)
