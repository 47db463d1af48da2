"""Randomness as a pure function of a key, so that it depends on no order, process or earlier run."""

import hashlib

import numpy as np


def _digest(key: tuple) -> int:
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that is uniform over keys."""
    return (_digest(key) >> 11) * 2.0**-53


def seed_of(*key: int | str) -> int:
    """A seed in 0 ... 2**63 - 1."""
    return _digest(key) >> 1


def generator(*key: int | str) -> np.random.Generator:
    """A generator whose stream belongs to the key alone."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))
