"""Counter-based random numbers: a pure hash of what is drawn for, instead of a generator with a state.

The mixer is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). The numpy form serves the data
plan and the augmentation, the torch form draws masks on the device; both give the same bits (tests/test_rng.py),
on any machine and in any version, because they are ours and made of integers only.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

SPLITMIX_GAMMA = 0x9E3779B97F4A7C15
SPLITMIX_MIX1 = 0xBF58476D1CE4E5B9
SPLITMIX_MIX2 = 0x94D049BB133111EB
MASK64 = (1 << 64) - 1


def hash_key(*parts: int | str) -> int:
    """A 64-bit key for a purpose, such as `hash_key(seed, "lane", epoch, lane)`."""
    text = "/".join(map(str, parts)).encode(errors="surrogateescape")  # file names may be no Unicode
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def random_words(key: int, count: int) -> np.ndarray:
    """`count` uint64 words of the stream that belongs to `key`: word i is the hash of (key, i)."""
    with np.errstate(over="ignore"):
        state = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(SPLITMIX_GAMMA)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(SPLITMIX_MIX1)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(SPLITMIX_MIX2)
        return state ^ (state >> np.uint64(31))


def permutation(key: int, count: int) -> np.ndarray:
    """A random permutation of range(count), int64, that is a function of `key` alone."""
    return np.argsort(random_words(key, count), kind="stable")


def uniform(key: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) of the stream that belongs to `key`."""
    return (random_words(key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """The seed of one sample in one epoch, below 2^63 so that it fits an int64 tensor."""
    return hash_key(seed, "sample", epoch, sample) >> 1


def _to_int64(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: torch's int64 shift keeps the sign


def random_words_on_device(seed: Tensor, count: int) -> Tensor:
    """`count` words per seed, on its device: seed int64 [B] -> int64 [B, count], the bits of `random_words`."""
    index = torch.arange(1, count + 1, device=seed.device, dtype=torch.int64)
    state = seed[:, None] + index * _to_int64(SPLITMIX_GAMMA)  # int64 arithmetic wraps, as uint64 does
    state = (state ^ _logical_shift(state, 30)) * _to_int64(SPLITMIX_MIX1)
    state = (state ^ _logical_shift(state, 27)) * _to_int64(SPLITMIX_MIX2)
    return state ^ _logical_shift(state, 31)
