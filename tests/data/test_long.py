"""What takes minutes: `make test-long`. Each prints its figure."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream
from ssl_vit.data.verify import VerifyShards, verify
from tests.data.pictures import one, write_pictures

pytestmark = pytest.mark.long
CPU = torch.device("cpu")


def test_ten_thousand_flipped_bits(tmp_path: Path):
    """Anywhere in a shard: what the flip does not touch is delivered as it was, what it touches is named."""
    source = write_pictures(tmp_path / "in", [f"{i}.jpg" for i in range(10)])
    made = one(source, tmp_path / "out", shard_samples=10)
    path, rows = made.tar(0), made.index(0)
    whole, draw, hit = path.read_bytes(), random.Random(5), 0
    plain = every(made)
    for _ in range(10_000):
        place = draw.randrange(len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        touched = [i for i, row in enumerate(rows) if row["offset"] <= place < row["offset"] + row["size"]]
        hit += len(touched)
        found = every(made)
        assert [i for i in range(10) if i not in found] == touched
        assert all(torch.equal(found[i], plain[i]) for i in found)
    path.write_bytes(whole)
    assert every(made).keys() == plain.keys()
    print(f"\n10,000 flipped bits: {hit} samples hit, {hit} named, 0 others lost or changed")


def every(made: Manifest) -> dict[int, torch.Tensor]:
    """Sample id -> pixels of those that can be had."""
    stream = EvaluationStream(made, Data(image_size=16, workers=0), 10)
    (batch,) = stream.batches(Share(), CPU)
    return {i: batch["image"][i] for i in range(10) if batch["valid"][i]}


def test_a_cut_at_every_block_of_a_shard(tmp_path: Path):
    source = write_pictures(tmp_path / "in", [f"{i}.jpg" for i in range(40)])
    made = one(source, tmp_path / "out", shard_samples=40)
    whole, rows = made.tar(0).read_bytes(), made.index(0)
    for cut in range(0, len(whole), 512):
        made.tar(0).write_bytes(whole[:cut])
        (state,) = verify(VerifyShards(shards=(str(tmp_path / "out"),), full=True, workers=1, quiet=True))
        assert state.fault
        assert state.readable == sum(int(row["offset"]) + int(row["size"]) <= cut for row in rows)
    print(f"\n{len(whole) // 512} cuts: good + bad = 40 each time")


def test_a_hundred_epochs_on_real_workers_bring_every_sample_once(tmp_path: Path):
    made = one(
        write_pictures(tmp_path / "in", [f"{i}.png" for i in range(60)], height=8), tmp_path / "out", shard_samples=7
    )
    stream = TrainingStream(made, Data(image_size=8, workers=2, lanes=3, window=1), seed=1, batch=12)
    seen = list(itertools.islice(stream.keys(0, Share(0, 1, 12)), 500))
    assert len({pair for keys in seen for pair in keys}) == 6000
    batches = itertools.islice(stream.batches(0, Share(0, 1, 12), CPU), 500)
    assert len({seed for batch in batches for seed in batch["seed"].tolist()}) == 6000
    print("\n100 epochs of 60 samples with 2 workers: 6,000 different (epoch, sample) pairs")
