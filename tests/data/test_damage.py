"""Damaged and missing shards: named in one line, with the right exit code, and never trained on."""

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import one, write_pictures

from ssl_vit import exits
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream
from ssl_vit.model import Batch

CPU = torch.device("cpu")
SMALL = Data(image_size=16, workers=0)


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    """Four shards of one sample each, to break."""
    return one(write_pictures(tmp_path / "in", [f"{i}.jpg" for i in range(4)]), tmp_path / "out", shard_samples=1)


def refusal(batches: Iterable[Batch]) -> exits.Refusal:
    with pytest.raises(exits.Refusal) as caught:
        list(itertools.islice(batches, 4))
    assert caught.value.code == exits.DATA
    assert "\n" not in str(caught.value)
    return caught.value


def break_byte(damaged: Manifest, shard: int) -> Path:
    """Flip one bit in the middle of a shard's first image."""
    path, row = damaged.folder / damaged.shards[shard].name, damaged.index(shard)[0]
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_byte_is_named_and_stops(damaged: Manifest):
    path = break_byte(damaged, 2)
    damaged.check()  # the size is right: only the checksum tells
    assert [Samples(damaged, SMALL, 0, True).read(sample)[1] for sample in (0, 1, 3)] == [-1] * 3
    stream = TrainingStream(damaged, SMALL, seed=0, batch=4)
    assert str(path) in str(refusal(stream.batches(0, Share(0, 1, 4), CPU)))
    assert str(path) in str(refusal(EvaluationStream(damaged, SMALL, batch=4).batches(Share(), CPU)))


PROCESS = """
import sys, torch
from ssl_vit import exits
from ssl_vit.data import manifest
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import Share, TrainingStream

def main(arguments):
    stream = TrainingStream(manifest.load(arguments[0]), Data(image_size=16, workers=1), seed=0, batch=4)
    batches = stream.batches(0, Share(0, 1, 4), torch.device("cpu"))
    for _ in range(3):
        next(batches)
    raise exits.Refusal(exits.PREEMPTED, "stopped")

exits.run(main)
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_process_with_workers_ends_with_its_code_and_one_line(damaged: Manifest, broken: bool):
    """Preempted or refused: the workers ignore signals, so they must be told to go, or the exit waits for ever."""
    says = f"{break_byte(damaged, 2)} at byte" if broken else "stopped"
    command = [sys.executable, "-c", PROCESS, str(damaged.folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == (exits.DATA if broken else exits.PREEMPTED)
    (line,) = ended.stderr.splitlines()
    assert says in line


@pytest.mark.parametrize("fault", ["gone", "cut", "empty", "no index", "short index", "broken index"])
def test_a_shard_that_is_lost_on_the_way_is_named(damaged: Manifest, fault: str):
    path = damaged.folder / damaged.shards[1].name
    index = path.with_suffix(".npy")
    match fault:
        case "gone":
            path.unlink()
        case "cut" | "empty":
            os.truncate(path, 600 if fault == "cut" else 0)
        case "no index":
            index.unlink()
        case "short index":
            np.save(index, np.load(index)[:0])
        case "broken index":
            index.write_bytes(b"garbage")
    stream = TrainingStream(damaged, SMALL, seed=0, batch=4)
    assert path.stem in str(refusal(stream.batches(0, Share(0, 1, 4), CPU)))


def test_an_error_of_the_disk_names_the_shard(damaged: Manifest, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises((exits.Refusal, OSError), match=r"0000\d\d\.tar"):
        next(TrainingStream(damaged, SMALL, seed=0, batch=1).batches(0, Share(0, 1, 1), CPU))


def test_check_names_all_missing_and_short_shards_at_once(damaged: Manifest):
    (damaged.folder / "000000.tar").unlink()
    os.truncate(damaged.folder / "000002.tar", 100)
    (damaged.folder / "000003.tar").unlink()
    (damaged.folder / "000003.tar").mkdir()
    (damaged.folder / "000001.npy").unlink()  # its index
    with pytest.raises(exits.Refusal) as caught:
        damaged.check()
    assert caught.value.code == exits.DATA
    assert all(f"{number:06d}.tar (" in str(caught.value) for number in range(4))
    assert "\n" not in str(caught.value)
