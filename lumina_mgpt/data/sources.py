"""Data file of a training (YAML) -> its record files, and how often the training sees each of them.

Next: dataset.py reads the record files.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lumina_mgpt.checks import is_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.io import cause, read_text

_RATIO_LIMIT = 1000  # bounds the size of an epoch
_WEIGHT_LIMIT = 10**12  # far below the overflow of a float
_KEYS = {"path", "type", "ratio", "weight", "given"}


@dataclass(frozen=True)
class Source:
    """One entry of `META` in a data file.

    Args:
        path: record file.
        type: a name of your choice. All records of a batch have the same type.
        ratio: number of samples of this source in an epoch, divided by its number of records. Above 1, records occur
            several times. A fraction of a sample is carried over to the next epoch.
        weight: share of this source in an epoch, relative to the weights of the other sources. It replaces `ratio`.
            Either all sources have a weight, or none has.
        given: train on the lower panel only. The upper panel is input without loss.

    Raises:
        InputError: a value is of another type or out of range.
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
    """The sources with ratios that are computed from their weights. Without weights, the sources are unmodified.

    With weights, an epoch has as many samples as all sources together have records.

    Args:
        sources: either all have a weight, or none has.
        counts: number of records of each source.

    Raises:
        InputError: a ratio is 0 or above 1000.
    """
    total = sum(source.weight for source in sources)
    if not total:
        return sources
    ratios = [source.weight / total * sum(counts) / count for source, count in zip(sources, counts, strict=True)]
    for source, ratio in zip(sources, ratios, strict=True):
        if not 0 < ratio <= _RATIO_LIMIT:
            raise InputError(
                f"weight of {source.path} must give a ratio above 0 and at most {_RATIO_LIMIT}, got {source.weight!r} "
                f"of {total!r}, a ratio of {ratio:.3g}; change the weights",
                "data_config",
            )
    return [replace(source, ratio=ratio) for source, ratio in zip(sources, ratios, strict=True)]


def require_known_panels(sources: list[Source], family: Family) -> None:
    """Raises an error if a source trains on the lower panel only, and the model's images have no panels.

    Raises:
        InputError: as above.
    """
    for source in sources:
        if source.given and not family.has_panels:
            raise InputError(
                f"given of {source.path} must be false for {family.name}, whose images have no panels; remove it",
                "data_config",
            )


def read_sources(data_config: str | Path) -> list[Source]:
    """Reads the list `META` of a data file. Relative paths in it start at the working directory.

    Args:
        data_config: the data file, in YAML.

    Raises:
        InputError: the file is not readable, or a key or value is wrong.
    """
    text = read_text(data_config, "data_config")
    try:
        raw = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        reason = f"{data_config} cannot be read as YAML ({cause(error)}); see configs/data/"
        raise InputError(reason, "data_config") from None
    entries = raw.get("META") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(entries, list) or not entries or set(raw) != {"META"}:
        raise InputError(f"{data_config} must hold one list, META; see configs/data/", "data_config")
    sources = []
    for entry in entries:
        valid = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not valid or not _KEYS >= set(entry) or {"ratio", "weight"} <= set(entry):
            rule = "an entry has path, type, ratio or weight, and given"
            raise InputError(f"{data_config}: {rule}, got {entry!r}", "data_config")
        try:
            sources.append(Source(**entry))
        except InputError as error:
            raise InputError(f"{data_config}: {error}", "data_config") from None
    if len({source.weight > 0 for source in sources}) > 1:
        raise InputError(f"{data_config}: give all entries a weight above 0, or none", "data_config")
    return sources
