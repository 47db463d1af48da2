"""The data file: which record files are trained on, and how often each is seen."""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lumina_mgpt.config import is_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_text

_RATIO_LIMIT = 1000
_WEIGHT_LIMIT = 10**12  # far from where floats overflow
_KEYS = {"path", "type", "ratio", "weight", "given"}


@dataclass(frozen=True)
class Source:
    """One entry of a data file's `META`.

    `ratio` of its records are seen an epoch (above 1: some more than once); what is less than a record is carried over
    to the next epoch. Or each source has a `weight`, its part of
    what is seen: then an epoch has as many samples as there are records, and `weighted` makes ratios of weights.
    `given`: the first half of each image, its upper panel, is read without being learnt.
    """

    path: str
    type: str = "default"
    ratio: float = 1.0
    weight: float = 0.0
    given: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.type, str):
            raise InputError(f"type of {self.path} must be a name, got {self.type!r}")
        if not is_number(self.ratio) or not 0 < self.ratio <= _RATIO_LIMIT:
            raise InputError(f"ratio of {self.path} must be above 0 and at most {_RATIO_LIMIT}, got {self.ratio!r}")
        if not is_number(self.weight) or not 0 <= self.weight <= _WEIGHT_LIMIT:
            raise InputError(f"weight of {self.path} must be a number from 0 to {_WEIGHT_LIMIT}, got {self.weight!r}")
        if not isinstance(self.given, bool):
            raise InputError(f"given of {self.path} must be true or false, got {self.given!r}")


def weighted(sources: list[Source], counts: list[int]) -> list[Source]:
    """The sources with ratios that give each its weight's part of an epoch; as they are, where none has a weight.

    Raises:
        InputError: a weight would need some record over a thousand times an epoch.
    """
    total = sum(source.weight for source in sources)
    if not total:
        return sources
    ratios = [source.weight / total * sum(counts) / count for source, count in zip(sources, counts, strict=True)]
    for source, ratio in zip(sources, ratios, strict=True):
        if not 0 < ratio <= _RATIO_LIMIT:
            raise InputError(f"weight of {source.path} must let its records be seen more than never and at most "
                             f"{_RATIO_LIMIT} times an epoch, got {source.weight!r} of {total!r}; change the "
                             "weights")  # fmt: skip
    return [replace(source, ratio=ratio) for source, ratio in zip(sources, ratios, strict=True)]


def read_sources(data_config: str | Path) -> list[Source]:
    """The `META: [{path, type, ratio or weight, given}]` of a YAML file; relative paths start at the working directory.

    Raises:
        InputError: the file cannot be read, or has other keys.
    """
    text = read_text(data_config, "--data_config")
    try:
        raw = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"--data_config {data_config} cannot be read as YAML ({cause(error)}); see "
                         "configs/data/") from None  # fmt: skip
    entries = raw.get("META") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not entries or set(raw) != {"META"}:
        raise InputError(f"--data_config {data_config} must hold one list, META; see configs/data/")
    sources = []
    for entry in entries:
        fits = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not fits or not _KEYS >= set(entry) or {"ratio", "weight"} <= set(entry):
            rule = "an entry has path, type, ratio or weight, and given"
            raise InputError(f"--data_config {data_config}: {rule}, got {entry!r}")
        sources.append(Source(**entry))
    if len({source.weight > 0 for source in sources}) > 1:
        raise InputError(f"--data_config {data_config}: give all entries a weight above 0, or none")
    return sources
