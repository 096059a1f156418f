"""Counter-based random numbers: the numpy and the torch form agree to the bit, and their values never change."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ssl_vit.rng import (
    MASK64,
    SPLITMIX_GAMMA,
    hash_key,
    permutation,
    random_words,
    random_words_on_device,
    sample_seed,
    uniform,
)

SEEDS = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator in Python's own integers (Vigna's splitmix64.c): advance by GOLDEN, then mix."""
    words = []
    for _ in range(count):
        state = (state + SPLITMIX_GAMMA) & MASK64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        words.append(z ^ (z >> 31))
    return words


@given(SEEDS, st.integers(1, 40))
def test_numpy_words_are_splitmix64(seed: int, count: int):
    assert random_words(seed & MASK64, count).tolist() == splitmix64(seed & MASK64, count)


@given(st.lists(SEEDS, min_size=1, max_size=5), st.integers(1, 40))
@example([0, 1, -1, 2**62, 2**63 - 1, -(2**63)], 100)
def test_torch_words_have_the_bits_of_numpy_words(seeds: list[int], count: int):
    on_device = random_words_on_device(torch.tensor(seeds), count)
    assert on_device.dtype == torch.int64
    assert on_device.tolist() == [random_words(seed & MASK64, count).view(np.int64).tolist() for seed in seeds]


@given(st.integers(0, MASK64), st.integers(0, 300))
def test_permutation_holds_every_number_once(name: int, count: int):
    order = permutation(name, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


def test_permutations_are_fair():
    """Every number comes first, and in every other place, about equally often."""
    counts = np.zeros((6, 6))
    for name in range(3000):
        counts[np.arange(6), permutation(hash_key("fair", name), 6)] += 1
    assert abs(counts / 500 - 1).max() < 0.2  # 4.9 standard deviations


@given(st.integers(0, MASK64), st.integers(0, 300))
def test_uniforms_lie_below_one(name: int, count: int):
    """That of the largest word, too."""
    draws = uniform(name, count)
    assert (draws.dtype, len(draws)) == (np.float64, count)
    assert ((draws >= 0) & (draws < 1)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_vit.rng.random_words", lambda key, count: np.full(count, MASK64, dtype=np.uint64))
        assert uniform(0, 1)[0] < 1.0


def test_uniforms_fill_the_interval():
    counts = np.histogram(uniform(hash_key("fill"), 20_000), bins=10, range=(0, 1))[0]
    assert abs(counts / 2000 - 1).max() < 0.1
    assert abs(np.corrcoef(uniform(1, 5000), uniform(2, 5000))[0, 1]) < 0.06


@given(SEEDS, st.integers(0, 10**6), st.integers(0, 10**10))
def test_a_sample_seed_fits_an_int64_tensor(seed: int, epoch: int, sample: int):
    assert 0 <= sample_seed(seed, epoch, sample) < 2**63
    assert torch.tensor([sample_seed(seed, epoch, sample)]).dtype == torch.int64


def test_sample_seeds_differ_in_every_part():
    seeds = {sample_seed(run, epoch, sample) for run in range(5) for epoch in range(20) for sample in range(50)}
    assert len(seeds) == 5 * 20 * 50


def test_golden_values():
    """Other values would silently reorder every run's data: a change here is a new format version."""
    assert random_words(0, 2).tolist() == [16294208416658607535, 7960286522194355700]  # splitmix64.c started at 0
    assert hash_key(0, "shards", 0) == 12436667693854765059
    assert sample_seed(7, 3, 12345) == 3957390104039631556
    assert permutation(hash_key("golden"), 10).tolist() == [5, 2, 0, 4, 7, 8, 9, 3, 1, 6]
    assert uniform(hash_key("golden"), 2).tolist() == [0.39671817875665716, 0.9563718134472265]
