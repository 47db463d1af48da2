"""Random numbers as pure functions of a key.

They do not depend on the order of calls, the process, or earlier runs.
"""

import hashlib

import numpy as np


def _digest(key: tuple) -> int:
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """A number in [0, 1), uniform over keys."""
    return (_digest(key) >> 11) * 2.0**-53


def seed_of(*key: int | str) -> int:
    """A seed in 0 ... 2**63 - 1."""
    return _digest(key) >> 1


def generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator that is seeded by the key."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))
