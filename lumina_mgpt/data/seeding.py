"""Random numbers as pure functions of a key.

A key is a sequence of numbers and names, such as a seed, the name of a choice and an epoch. The random numbers do not
depend on the order of calls, the process, or earlier runs.
"""

import hashlib

import numpy as np


def _digest(key: tuple) -> int:
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """The random number in [0, 1) of a key. Over many keys, these numbers are uniformly distributed."""
    return (_digest(key) >> 11) * 2.0**-53


def seed_of(*key: int | str) -> int:
    """The random seed of a key, an integer from 0 to 2**63 - 1."""
    return _digest(key) >> 1


def generator(*key: int | str) -> np.random.Generator:
    """A new NumPy generator that is seeded with the key."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))
