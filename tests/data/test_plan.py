"""The order of samples: that of its plain twin, whatever was asked before. test_stream.py has its other promises."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_vit.data.plan import Plan, sequential_plan
from ssl_vit.rng import hash_key, permutation

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)
SEED, LANES, WINDOW = st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 4)


def reference_order(sizes: list[int], seed: int, lanes: int, window: int, epoch: int) -> list[int]:
    """DESIGN 6 read aloud: permute shards, cut into equal lanes, permute within windows, deal round robin."""
    ids = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    shuffled_ids = np.concatenate([ids[shard] for shard in permutation(hash_key(seed, "shards", epoch), len(sizes))])
    span = window * -(-len(shuffled_ids) // len(sizes))  # so many average shards
    lane_orders = []
    for lane, part in enumerate(np.array_split(shuffled_ids, min(lanes, len(shuffled_ids)))):
        windows = [part[first : first + span] for first in range(0, len(part), span)]
        keys = [hash_key(seed, "window", epoch, lane, number) for number in range(len(windows))]
        lane_orders.append([int(w[i]) for w, key in zip(windows, keys, strict=True) for i in permutation(key, len(w))])
    return [i for row in itertools.zip_longest(*lane_orders) for i in row if i is not None]


@given(SIZES, SEED, LANES, WINDOW)
def test_the_stream_is_its_plain_twin(sizes: list[int], seed: int, lanes: int, window: int):
    plan, total = Plan(sizes, seed, 1, lanes, window), sum(sizes)
    stream = [plan.samples(position, 1)[0] for position in range(2 * total)]
    assert stream == [(epoch, i) for epoch in (0, 1) for i in reference_order(sizes, seed, lanes, window, epoch)]


@given(SIZES, SEED, LANES, WINDOW, st.lists(st.integers(0, 60), min_size=2, max_size=12))
def test_what_was_asked_before_changes_no_answer(
    sizes: list[int], seed: int, lanes: int, window: int, steps: list[int]
):
    plan = Plan(sizes, seed, 4, lanes, window)
    assert [plan.batch(s) for s in steps] == [Plan(sizes, seed, 4, lanes, window).batch(s) for s in steps]


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match="3 processes do not divide a batch of 16"):
        Plan([10], batch=16).batch(0, 0, 3)
    for sizes in ([], [0], [0, 0, 0]):
        with pytest.raises(ValueError, match="no samples"):
            Plan(sizes)


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_rank_reads_its_share_of_the_shards(world: int):
    """16 lanes of one shard each: rank r of W needs 16/W shards in the whole epoch, and no other rank needs them."""
    plan = Plan([10] * 16, seed=3, batch=32, lanes=16, window=1)
    shards = [{i // 10 for step in range(5) for _, i in plan.batch(step, rank, world)} for rank in range(world)]
    assert [len(s) for s in shards] == [16 // world] * world
    assert len(set().union(*shards)) == 16


@given(SIZES, SEED, st.integers(0, 30), st.sampled_from([2, 4, 8]))
def test_a_share_is_a_contiguous_run_of_lanes(sizes: list[int], seed: int, step: int, world: int):
    plan, total = Plan(sizes, seed, 8, 8, 1), sum(sizes)
    lane = {
        plan.samples(position, 1)[0]: position % total % min(8, total) for position in range(step * 8, step * 8 + 8)
    }
    lanes = [lane[pair] for rank in range(world) for pair in plan.batch(step, rank, world)]
    assert lanes == sorted(lanes)


def test_golden_batches_of_many_shards():
    """Another order would break the resuming of every run: a change here is a new version of the plan."""
    large = Plan([1000] * 50 + [0, 7], seed=1, batch=64, lanes=8, window=4)
    pairs = np.array([large.batch(step) for step in range(0, 1600, 40)], dtype="<i8")
    digest = hashlib.sha256(pairs.tobytes()).hexdigest()
    assert digest == "1617bb0e91b11d747cdbf59a083484d7ac729b765e06ef094d783a40c66c2eed"


def test_a_large_plan_seeks_anywhere_and_stays_small():
    """10,000 shards, 12.8 M samples: a batch costs a few windows; unbounded caches would hold over 20 MB here."""
    plan = Plan([1280] * 10_000, batch=4096, lanes=16)
    steps = [0, *range(10, 40_000, 1000)]  # 13 epochs of 3,125 steps
    for step in steps:
        batch = plan.batch(step)
        assert len(set(batch)) == 4096
        assert {epoch for epoch, _ in batch} <= {step * 4096 // 12_800_000, (step * 4096 + 4095) // 12_800_000}
        assert all(0 <= i < 12_800_000 for _, i in batch)
    assert len(pickle.dumps(plan)) < 6_000_000


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_takes_every_sample_once_on_equal_ranks(samples: int, batch: int, world: int):
    ranks = [sequential_plan(samples, batch, rank, world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-samples // (batch * world))}  # the fewest possible
    assert all(len(keys) == batch for batches in ranks for keys in batches)
    keys = [pair for step in zip(*ranks, strict=True) for pair in itertools.chain(*step)]
    assert [pair for pair in keys if pair[1] >= 0] == [(0, i) for i in range(samples)]  # in order, rank after rank
    assert set(keys[samples:]) <= {(0, -1)}
