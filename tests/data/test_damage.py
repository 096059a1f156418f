"""The damage table: whatever happens to shards and images, good + bad = total, no good sample is lost, nothing is run.

Three settings: our own shards, damaged after they were made; shards that others wrote, indexed or streamed as they are;
and image files on their way into shards.
"""

import errno
import faulthandler
import gc
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import chunk, contents, encoded, one, picture, png, samples, write_pictures
from PIL import Image
from test_tar import END, NO_FILES, member, pax, record

from ssl_vit import config, exits, recipe
from ssl_vit.counter import sample_seed
from ssl_vit.data import decode
from ssl_vit.data import samples as module
from ssl_vit.data.cache import Store
from ssl_vit.data.decode import BadImage
from ssl_vit.data.faults import IN_A_ROW, Fault, Faults, borne
from ssl_vit.data.foreign import IndexShards, Scan, index, scan
from ssl_vit.data.manifest import Manifest, load
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.sequential import SequentialStream, tars
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream
from ssl_vit.data.verify import VerifyShards, verify
from ssl_vit.model import Batch
from ssl_vit.train.watch import DataWatch
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"image_size": 16, "workers": 0, "lanes": 3, "window": 1}
SHARDS, SAMPLES = 4, 6  # of the set that is damaged, a shard
TOTAL = SHARDS * SAMPLES
USUAL = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MB = 1 << 20


class Payload:
    """Says that it was unpickled, by a file in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


class Late(BaseException):
    """Time is up; no handler of Exception stops it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Break off what takes longer."""

    def late(*_: object) -> None:
        raise Late(f"{seconds} s were not enough")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def growth(work: Callable[[], object]) -> float:
    """Bytes by which a process grows at most while it does something."""

    def measured(answer: Any) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a bomb that goes off is to hurt nobody
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        answer.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return math.inf  # it died
    finally:
        process.join()


@pytest.fixture(autouse=True)
def nothing_is_executed_or_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in an empty folder, and leaves it empty."""
    monkeypatch.setattr(module, "PAUSE", 0.0)
    (tmp_path / "deep" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "here")
    yield
    assert contents(tmp_path / "deep") == {}


# our own shards


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four shards of six samples in three classes."""
    folder = tmp_path_factory.mktemp("whole")
    names = [f"{'abc'[number % 3]}/{number}.{'png' if number % 4 else 'jpg'}" for number in range(TOTAL)]
    return one(write_pictures(folder / "in", names), folder / "out", shard_samples=SAMPLES)


@pytest.fixture
def made(whole: Manifest, tmp_path: Path) -> Manifest:
    """A copy of them, to damage."""
    shutil.copytree(whole.folder, tmp_path / "set")
    return load(tmp_path / "set")


def cells(batches: list[Batch]) -> list[tuple[bytes, int, int, bool]]:
    """Pixels, label, seed and validity of every slot, in their order."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "label", "seed", "valid")}
    pixels = [image.contiguous().numpy().tobytes() for image in whole["image"]]
    return list(zip(pixels, *(whole[name].tolist() for name in ("label", "seed", "valid")), strict=True))


def trained(made: Manifest, **options: Any) -> tuple[dict[int, tuple[bytes, int, int, bool]], list[Fault]]:
    """Every sample of the first epoch of training, and the faults."""
    stream, share = TrainingStream(made, Data(**SMALL | options), seed=5, batch=TOTAL), Share(0, 1, TOTAL)
    batch, keys = next(stream.batches(0, share, CPU)), next(stream.keys(0, share))
    return dict(zip([sample for _, sample in keys], cells([batch]), strict=True)), stream.faults.take()


def evaluated(made: Manifest) -> tuple[list[tuple[bytes, int, int, bool]], list[Fault]]:
    """Every sample as evaluation takes it, and the faults."""
    stream = EvaluationStream(made, Data(**SMALL), batch=TOTAL)
    return cells(list(stream.batches(Share(), CPU))), stream.faults.take()


def shard(made: Manifest, number: int = 1) -> Path:
    return made.folder / made.shards[number].name


def flip(path: Path, *spots: int) -> None:
    data = bytearray(path.read_bytes())
    for spot in spots:
        data[spot] ^= 8
    path.write_bytes(data)


DAMAGE = [
    *("cut to nothing", "cut in the first header", "cut in a header", "cut between two samples", "cut in an image"),
    *("cut behind an image", "cut between an image and its class", "cut in the end mark", "grown", "moved by a block"),
    *("a bit of a header", "a bit of an image", "the first bit of an image", "the last bit of an image"),
    *("a bit of a class", "a bit of the padding", "zeros in an image", "zeros to the end"),
    *("a page", "a page of the right size", "gzip", "a folder", "a pipe", "a dead link", "gone"),
    *("another shard", "another shard of the right size"),
    *("no index", "a short index", "an index of garbage", "a pickled index"),
]


def damage(kind: str, path: Path, rows: np.ndarray) -> set[int]:
    """Damage a shard; returns which of its samples cannot be had any more."""
    data, every = bytearray(path.read_bytes()), set(range(len(rows)))
    starts, ends = rows["offset"].astype(int), rows["offset"].astype(int) + rows["size"]
    behind = -(-int(ends[3]) // 512) * 512  # where the header of its class stands
    cuts = {
        "cut to nothing": 0,
        "cut in the first header": 100,
        "cut in a header": starts[3] - 200,
        "cut between two samples": starts[3] - 512,
        "cut in an image": starts[3] + 10,
        "cut behind an image": ends[3],
        "cut between an image and its class": behind,
        "cut in the end mark": len(data) - 700,
    }
    flips = {
        "a bit of a header": starts[3] - 512 + 130,
        "a bit of an image": (starts[3] + ends[3]) // 2,
        "the first bit of an image": starts[3],
        "the last bit of an image": ends[3] - 1,
        "a bit of a class": behind + 512,
        "a bit of the padding": ends[3],
    }
    if kind in cuts:
        os.truncate(path, int(cuts[kind]))
        return {number for number, end in enumerate(ends) if end > cuts[kind]}
    if kind in flips:
        flip(path, int(flips[kind]))
        return {number for number in every if starts[number] <= flips[kind] < ends[number]}
    match kind:
        case "grown":
            path.write_bytes(data + b"more")
            return set()
        case "moved by a block":
            path.write_bytes(bytes(512) + data)
        case "zeros in an image":
            data[starts[3] + 5 : starts[3] + 50] = bytes(45)
            path.write_bytes(data)
            return {3}
        case "zeros to the end":
            data[starts[3] :] = bytes(len(data) - starts[3])
            path.write_bytes(data)
            return {3, 4, 5}
        case "a page":
            path.write_bytes(b"<html>404</html>")
        case "a page of the right size":
            path.write_bytes(b"<html>".ljust(len(data), b" "))
        case "gzip":
            path.write_bytes(gzip.compress(data))
        case "another shard":
            path.write_bytes(path.with_name("000002.tar").read_bytes())
        case "another shard of the right size":
            path.write_bytes(path.with_name("000002.tar").read_bytes().ljust(len(data), b"\0")[: len(data)])
        case "no index":
            path.with_suffix(".npy").unlink()
        case "a short index":
            np.save(path.with_suffix(".npy"), rows[:3])
        case "an index of garbage":
            path.with_suffix(".npy").write_bytes(b"garbage")
        case "a pickled index":
            np.save(path.with_suffix(".npy"), np.array([Payload()] * len(rows), dtype=object), allow_pickle=True)
        case _:
            path.unlink()
            if kind == "a folder":
                path.mkdir()
            elif kind == "a pipe":
                os.mkfifo(path)
            elif kind == "a dead link":
                path.symlink_to("nowhere")
    return every


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_shard_costs_exactly_the_samples_that_it_hits(whole: Manifest, made: Manifest, kind: str):
    lost = {SAMPLES + number for number in damage(kind, shard(made), whole.index(1))}
    wanted, none = trained(whole)
    got, faults = trained(made)
    assert none == []
    assert sorted(fault.sample for fault in faults) == sorted(lost)  # each once: good + bad = total
    assert all(str(made.folder / "000001") in fault.reason for fault in faults)
    assert {sample: cell for sample, cell in got.items() if sample not in lost} == {
        sample: cell for sample, cell in wanted.items() if sample not in lost
    }
    candidates = TrainingStream(whole, Data(**SMALL), seed=5, batch=TOTAL).substitutes
    for fault in faults:  # another sample with its own label under the seed of the one that is lost
        substitute = next(other for other in candidates(0, fault.sample) if other not in lost)
        assert fault.substitute == substitute
        seed = sample_seed(5, 0, fault.sample)
        image, label = Samples(whole, Data(**SMALL), 5, True).sample(substitute, seed)
        assert got[fault.sample] == (image.contiguous().numpy().tobytes(), label, seed, True)

    right, _ = evaluated(whole)
    left, faults = evaluated(made)
    assert {(fault.sample, fault.substitute) for fault in faults} == {(sample, None) for sample in lost}
    assert [cell if cell[3] else None for cell in left] == [
        None if sample in lost else cell for sample, cell in enumerate(right)
    ]

    found = verify(VerifyShards(shards=(str(made.folder),), full=True, workers=1, quiet=True))
    assert sum(state.readable for state in found) == TOTAL - len(lost)
    assert [number for number, state in enumerate(found) if state.fault] == [1]
    with pytest.raises(exits.Refusal, match=r"1 of 4 shards are bad: 000001\.tar \("):
        made.check(full=True)


def test_wherever_a_shard_is_cut_all_before_the_cut_is_evaluated(whole: Manifest, made: Manifest):
    right, rows = evaluated(whole)[0], whole.index(1)
    for cut in range(0, whole.shards[1].bytes, 512):
        shutil.copyfile(shard(whole), shard(made))
        os.truncate(shard(made), cut)
        lost = {SAMPLES + n for n, row in enumerate(rows) if int(row["offset"]) + int(row["size"]) > cut}
        left, faults = evaluated(made)
        assert {fault.sample for fault in faults} == lost
        assert all(cell == right[sample] for sample, cell in enumerate(left) if sample not in lost)


def test_a_flipped_bit_of_an_index_brings_no_wrong_sample(whole: Manifest, made: Manifest):
    """Neither a wrong image nor a wrong label, nor the end of the training; the samples of the shard may be lost."""
    wanted, path = trained(whole)[0], shard(made).with_suffix(".npy")
    right = path.read_bytes()
    for spot in range(0, len(right), 7):
        path.write_bytes(right)
        flip(path, spot)
        got, faults = trained(made)
        lost = {fault.sample for fault in faults}
        assert lost <= set(range(SAMPLES, 2 * SAMPLES))
        assert [got[sample] for sample in got if sample not in lost] == [wanted[s] for s in got if s not in lost], spot


@pytest.fixture
def riddled(made: Manifest) -> Manifest:
    """One shard gone, one cut, and bits flipped in the two others: 14 of 24 samples are left."""
    shard(made, 0).unlink()
    os.truncate(shard(made, 1), int(made.index(1)[4]["offset"]) + 5)
    for number in (2, 3):
        flip(shard(made, number), int(made.index(number)[number]["offset"]) + 50)
    return made


def steps_of(made: Manifest, first: int, steps: int, share: Share, **options: Any) -> tuple[list[Any], set[Any]]:
    """The cells of each step from `first` on, in batches of 8, and what took the place of what."""
    stream = TrainingStream(made, Data(**SMALL | options), seed=5, batch=8)
    micro = 8 // share.world // share.micro_batch
    batches = list(itertools.islice(stream.batches(first * 8, share, CPU), steps * micro))
    told = {(fault.epoch, fault.sample, fault.substitute) for fault in stream.faults.take()}
    return [cells(batches[step * micro : (step + 1) * micro]) for step in range(steps)], told


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
@pytest.mark.parametrize("options", [{}, {"subset": 0.5}])
def test_substitutes_are_the_same_on_any_number_of_processes_and_after_a_resumption(riddled: Manifest, options: dict):
    """Pixels, labels and seeds of eight steps, which pass the end of an epoch."""
    wanted, told = steps_of(riddled, 0, 8, Share(0, 1, 8), **options)
    assert len(told) > 5
    assert any(not cell[3] for step in wanted for cell in step) == any(taken is None for *_, taken in told)
    for world, micro, workers in ((1, 4, 2), (2, 2, 0), (4, 1, 0), (2, 4, 1)):
        ranks = [
            steps_of(riddled, 0, 8, Share(rank, world, micro), workers=workers, **options) for rank in range(world)
        ]
        assert [list(itertools.chain(*parts)) for parts in zip(*(cells for cells, _ in ranks), strict=True)] == wanted
        assert set.union(*(told for _, told in ranks)) == told
    assert steps_of(riddled, 3, 5, Share(0, 1, 8), **options)[0] == wanted[3:]
    if "subset" in options:
        chosen = TrainingStream(riddled, Data(**SMALL | options), seed=5, batch=8).ids
        assert chosen is not None
        assert {taken for *_, taken in told if taken is not None} <= set(chosen.tolist())


def test_where_nothing_is_left_batches_keep_their_shape(made: Manifest):
    for path in made.folder.glob("*.tar"):
        path.unlink()
    got, faults = trained(made)
    assert len(got) == len(faults) == TOTAL
    assert not any(valid for *_, valid in got.values())
    assert {fault.substitute for fault in faults} == {None}
    assert not any(valid for *_, valid in evaluated(made)[0])


@pytest.mark.parametrize("kind", ["altered once", "short once", "failing four times"])
def test_what_fails_once_is_read_again_and_is_no_fault(whole: Manifest, monkeypatch: pytest.MonkeyPatch, kind: str):
    wanted, asked, pread = trained(whole)[0], Counter[tuple[int, int]](), os.pread

    def unreliable(handle: int, size: int, offset: int) -> bytes:
        asked[size, offset] += 1
        if kind == "failing four times" and asked[size, offset] < 5:
            raise OSError(errno.EIO, "Input/output error")
        data = pread(handle, size, offset)
        if asked[size, offset] > 1:
            return data
        return bytes([data[0] ^ 1]) + data[1:] if kind == "altered once" else data[:-1]

    monkeypatch.setattr(module.os, "pread", unreliable)
    assert trained(whole) == (wanted, [])


def test_a_disk_that_keeps_failing_is_a_fault_that_names_the_shard(whole: Manifest, monkeypatch: pytest.MonkeyPatch):
    row, pread = whole.index(2)[3], os.pread

    def failing(handle: int, size: int, offset: int) -> bytes:
        if (size, offset) == (row["size"], row["offset"]):
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, size, offset)

    monkeypatch.setattr(module.os, "pread", failing)
    (fault,) = trained(whole)[1]
    assert fault.sample == 2 * SAMPLES + 3
    assert fault.reason == f"{shard(whole, 2)}: sample 3 cannot be read: Input/output error"


def test_a_shard_that_is_gone_is_waited_for_once(made: Manifest, monkeypatch: pytest.MonkeyPatch):
    """Not for each of its samples: that would be an hour for a shard of a thousand."""
    asked, opened = Counter[str](), os.open

    def counting(path: Path, *rest: Any, **named: Any) -> int:
        asked[str(path)] += 1
        return opened(path, *rest, **named)

    shard(made).unlink()
    monkeypatch.setattr(module.os, "open", counting)
    assert len(trained(made)[1]) == SAMPLES
    assert asked[str(shard(made))] == module.TRIES


def test_substitutes_come_from_the_same_shuffle_window_first(whole: Manifest):
    """So that a node which holds its own shards only need not fetch another for each bad sample."""
    options = Data(**{**SMALL, "lanes": 4})  # a lane is a shard, and so is a window
    stream = TrainingStream(whole, options, seed=5, batch=TOTAL)
    for sample in range(TOTAL):
        for epoch in (0, 1, 7):
            others = list(stream.substitutes(epoch, sample))
            assert len(others) == 6
            assert {other // SAMPLES for other in others[:3]} == {sample // SAMPLES}
            assert others == list(stream.substitutes(epoch, sample))
    everywhere = {o // SAMPLES for sample in range(TOTAL) for o in list(stream.substitutes(0, sample))[3:]}
    assert everywhere == set(range(SHARDS))


@pytest.mark.parametrize("error", [MemoryError, SystemError, ImportError])
def test_a_fault_of_the_machine_is_no_bad_sample(
    whole: Manifest, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
):
    """Passed over, it would drop good samples, and others on every machine."""

    def fails(*_: object) -> None:
        raise error("of the machine")

    monkeypatch.setattr(module.Samples, "crop", fails)
    with pytest.raises(error):
        trained(whole)


@pytest.mark.parametrize("kind", ["gone", "replaced"])
def test_shards_that_change_while_they_are_read_cost_what_was_not_open(whole: Manifest, made: Manifest, kind: str):
    options = Data(**{**SMALL, "lanes": 1})
    whole_stream, stream = (TrainingStream(part, options, seed=5, batch=4) for part in (whole, made))
    share = Share(0, 1, 4)
    wanted = cells(list(itertools.islice(whole_stream.batches(0, share, CPU), 6)))
    keys = [sample for batch in itertools.islice(stream.keys(0, share), 6) for _, sample in batch]
    batches = stream.batches(0, share, CPU)
    got = [next(batches) for _ in range(2)]
    opened = {sample // SAMPLES for sample in keys[:8]}
    for number in range(SHARDS):
        if kind == "replaced":
            (made.folder / "new").write_bytes(bytes(made.shards[number].bytes))
            os.replace(made.folder / "new", shard(made, number))
        else:
            shard(made, number).unlink()
    got += [next(batches) for _ in range(4)]
    faults = stream.faults.take()
    lost = {fault.sample for fault in faults}
    assert 0 < len(lost) == len(faults) < TOTAL
    assert lost == {sample for sample in keys if sample // SAMPLES not in opened}
    assert all(f"{made.folder}/0000" in fault.reason for fault in faults)
    right = [(cell, other) for cell, other, key in zip(cells(got), wanted, keys, strict=True) if key not in lost]
    assert all(cell == other for cell, other in right)


def test_bad_shards_are_named_before_training_begins(whole: Manifest, made: Manifest):
    def start(*words: str) -> tuple[object, object]:
        given = [*TINY, f"data.train={made.folder}", f"data.val={whole.folder}", *words]
        return recipe.sources(config.parse(recipe.Pretrain, given, recipe.FOLDER))

    flip(shard(made, 3), int(made.index(3)[0]["offset"]))
    start()  # sizes only
    with pytest.raises(exits.Refusal, match=r"1 of 4 shards are bad: 000003\.tar \(altered\)"):
        start("data.verify=true")
    os.truncate(shard(made, 0), 100)
    shard(made, 2).unlink()
    with pytest.raises(exits.Refusal) as caught:
        start()
    assert caught.value.code == exits.DATA
    named = f"000000.tar (100 bytes, not {made.shards[0].bytes}), 000002.tar (missing)"
    assert str(caught.value) == f"{made.folder}: 2 of 4 shards are bad: {named}"


# shards of others

GOOD = [encoded(picture(number), "PNG" if number % 2 else "JPEG") for number in range(6)]
NAMED = [
    (f"s/{n:03d}.{kind}", data)
    for n, image in enumerate(GOOD)
    for kind, data in (("jpg", image), ("cls", str(n % 3).encode()), ("json", json.dumps({"n": n}).encode()))
]
PIECES = [member(name, data) for name, data in NAMED]
STARTS = [0, *itertools.accumulate(map(len, PIECES))]
THEIRS = b"".join(PIECES) + END
HALF = len(PIECES) // 2


def sample(name: str, image: bytes | None = None, label: bytes = b"0") -> bytes:
    """A sample as others may write it."""
    return member(f"{name}.jpg", encoded(picture(9), "JPEG") if image is None else image) + member(f"{name}.cls", label)


def kept(path: Path, data: bytes, full: bool = False) -> tuple[dict[bytes, Any], Scan]:
    """Image -> class of the samples of a tar, and what else was seen in it."""
    path.write_bytes(data)
    found = scan(path, path.name, full=full)
    return {data[offset : offset + size]: label for offset, size, label, _ in found.rows}, found


def indexed(folder: Path) -> Manifest | exits.Refusal:
    """The shards in a folder, or why they cannot be used."""
    try:
        return index(IndexShards(shards=str(folder), workers=1, quiet=True))
    except exits.Refusal as refusal:
        return refusal


ALL = {image: number % 3 for number, image in enumerate(GOOD)}


def intact(touched: Callable[[int, int], bool], kinds: tuple[str, ...] = ("jpg", "cls")) -> dict[bytes, int]:
    """Image -> class of the samples none of whose members is touched, given from where to where each reaches."""
    ends = {name: (STARTS[place], STARTS[place + 1]) for place, (name, _) in enumerate(NAMED)}
    return {
        image: label
        for number, (image, label) in enumerate(ALL.items())
        if not any(touched(*ends[f"s/{number:03d}.{kind}"]) for kind in kinds)
    }


def test_every_cut_of_a_foreign_shard_keeps_all_intact_samples_and_is_named(tmp_path: Path):
    for cut in range(0, len(THEIRS), 512):
        left, found = kept(tmp_path / "a.tar", THEIRS[:cut])
        assert intact(lambda start, end, cut=cut: end > cut, ("jpg", "cls", "json")).items() <= left.items()
        assert left.keys() <= ALL.keys()
        assert len(found.rejects) >= 1, cut
    assert kept(tmp_path / "a.tar", THEIRS)[0] == ALL
    assert kept(tmp_path / "a.tar", THEIRS)[1].rejects == []


def test_every_broken_header_of_a_foreign_shard_costs_its_own_sample_only(tmp_path: Path):
    """The standard library, and so webdataset, takes it for the end, without a word."""
    for place, (name, _) in enumerate(NAMED):
        for spot in (0, 124, 148, 257):
            broken = bytearray(THEIRS)
            broken[STARTS[place] + spot] ^= 1
            left, found = kept(tmp_path / "a.tar", bytes(broken))
            others = {image: label for image, label in ALL.items() if image != GOOD[place // 3]}
            assert others.items() <= left.items(), name
            assert left.keys() <= ALL.keys()
            assert found.rejects[0]["reason"].startswith(f"at byte {STARTS[place]}: a damaged header")
            if name.endswith(".jpg"):
                assert left == others


def test_a_sample_that_lost_its_class_to_damage_is_not_kept_without_one(tmp_path: Path):
    """One that is left without a word trains, and is judged, on nothing."""
    for place in range(4, len(PIECES), 3):  # a tar of one sample could be one of a set without classes
        broken = bytearray(THEIRS)
        broken[STARTS[place]] ^= 1
        left, found = kept(tmp_path / "a.tar", bytes(broken))
        assert left == {image: label for image, label in ALL.items() if image != GOOD[place // 3]}
        assert len(found.rows) + sum(bool(reject["key"]) for reject in found.rejects) == len(GOOD)
        if place > 1:  # before that nothing tells that there are classes
            cut = kept(tmp_path / "a.tar", THEIRS[: STARTS[place]])[0]
            assert cut == {image: label for image, label in ALL.items() if image in GOOD[: place // 3]}


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 20))
@USUAL
def test_any_damage_to_a_foreign_shard_leaves_what_it_does_not_touch(tmp_path: Path, seed: int, bits: int):
    drawn = random.Random(seed)
    broken = bytearray(THEIRS[: drawn.randrange(1, len(THEIRS) + 1)])
    spots = [drawn.randrange(len(broken)) for _ in range(bits)]
    for spot in spots:
        broken[spot] ^= 1 << drawn.randrange(8)
    left, _ = kept(tmp_path / "a.tar", bytes(broken), full=True)
    untouched = intact(
        lambda start, end: end > len(broken) or any(start <= spot < end for spot in spots), ("jpg", "cls", "json")
    )
    assert untouched.items() <= left.items()


def test_a_flipped_bit_of_one_class_leaves_the_numbers_of_the_others(tmp_path: Path):
    """Text among numbers must not turn all of them into names, which are sorted as names are."""
    labels = [str(number).encode() for number in range(12)]
    labels[5] = bytes([labels[5][0] ^ 64])
    (tmp_path / "in").mkdir()
    parts = [sample(f"{number:03d}", encoded(picture(number), "PNG"), label) for number, label in enumerate(labels)]
    (tmp_path / "in" / "a.tar").write_bytes(b"".join(parts) + END)
    theirs = indexed(tmp_path / "in")
    if isinstance(theirs, exits.Refusal):
        assert theirs.code == exits.DATA
    else:
        assert [label for label in theirs.labels.tolist() if label >= 0] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def hostile() -> Iterator[tuple[str, bytes, int]]:
    """Name, members, and how many samples are good among them."""
    payload = pickle.dumps(Payload())
    objects = io.BytesIO()
    np.save(objects, np.array([Payload()], dtype=object), allow_pickle=True)
    for suffix in ("pyd", "pickle", "pkl", "pth", "pt", "cls.pkl"):
        yield f"a {suffix}", member(f"s/002.{suffix}", payload), 0
    yield "an npy of objects", member("s/002.npy", objects.getvalue()), 0
    yield "a sample that is a pickle", sample("x", payload), 0
    yield "a class that is a pickle", sample("x", label=payload), -1
    yield "a gz member", member("x.jpg.gz", gzip.compress(GOOD[0])) + member("x.cls.gz", gzip.compress(b"1")), 0
    for name, kind in NO_FILES.items():
        yield f"a {name}", member("s/000.jpg", kind=kind) + member("x.jpg", kind=kind) + member("x.cls", b"0"), 0
        yield f"a {name} with a size", member("x.jpg", kind=kind, size=1 << 33), 0
    yield "a negative size", member("x.jpg", size=-1024), 0
    yield "8 GB", member("x.jpg", size=8 << 30), 0
    yield "an exabyte", member("x.jpg", size=1 << 60), 0
    yield "a size of many digits", pax(record(b"size", b"9" * 5000)) + member("x.jpg"), 0
    yield "an extended header of garbage", pax(b"\xff" * 5000) + sample("x"), 1
    yield "an extended header of a megabyte", pax(record(b"comment", bytes(MB))) + sample("x"), 1
    for name in (
        "../../x",
        "/x",
        "..\\..\\x",
        "C:\\x",
        "$(touch canary)",
        "`touch canary`",
        "|touch canary",
        "<script>",
    ):
        yield f"the name {name}", sample(name), 0 if name.startswith("..\\") else 1  # all of it behind its first dot
        yield f"the name {name} of a bad image", sample(name, b"no image"), 0
    for what, name in (
        ("a newline", "x\nreplaced by sample 0\n"),
        ("an escape", "x\x1b]0;title\x07\x1b[2J"),
        ("10 kB", "x/" * 5000 + "x"),
        ("no Unicode", "caf\udce9"),
        ("right to left", "x\u202egpj"),
        ("a lone surrogate", "\udcff\udcfe"),
    ):
        yield f"a name with {what}", sample(name), 1
        yield f"a name with {what} of a bad image", sample(name, b"no image"), 0
        yield f"a name with {what} of a link", member(f"{name}.jpg", kind=tarfile.SYMTYPE), 0
        yield f"a name with {what} in a suffix", member(f"x.{name}", b""), 0
    yield "a duplicate key", sample("x") + sample("x"), 0
    yield "a duplicate image", sample("x") + member("x.jpg", GOOD[0]), 0
    yield "a.JPG beside a.jpg", member("x.JPG", GOOD[0]) + sample("x"), 0
    yield "a.png beside a.jpg", member("x.png", GOOD[1]) + sample("x"), 0
    yield "img.v1.jpg", sample("img.v1"), 0
    yield "a hidden file", sample(".hidden"), 0
    yield "no suffix", member("x", GOOD[0]), 0
    yield "nothing but a suffix", member(".jpg", GOOD[0]), -1
    yield (
        "interleaved",
        member("x.jpg", GOOD[0]) + member("y.jpg", GOOD[1]) + member("x.cls", b"1") * 1 + member("y.cls", b"2"),
        2,
    )
    yield "a tar in an image", sample("x", member("s/000.jpg", GOOD[5]) + END), 0
    yield "a tar behind an image", sample("x", (GOOD[0] + bytes(-len(GOOD[0]) % 512) + member("s/0.jpg", b"x"))), 1
    yield "no image", member("x.cls", b"1"), 0
    yield "an empty image", sample("x", b""), 0
    yield "a huge image", sample("x", png(65_000, 65_000, 8, 2, b"\0")), 0
    yield "an image of one column", sample("x", png(1, 89_478_485, 8, 0, b"\0")), 0
    yield "an EPS", sample("x", b"%!PS-Adobe-3.0 EPSF-3.0\n(touch canary) system"), 0
    yield "a class of a megabyte", sample("x", label=b"x" * MB), -1
    yield "a negative class", sample("x", label=b"-2"), -1
    yield "a class beyond all", sample("x", label=b"9" * 30), -1
    for what, text in (
        ("deep", b"[" * 100_000),
        ("a list", b"[1, 2]"),
        ("no UTF-8", b'{"label": "\xff"}'),
        ("of many digits", b'{"label": ' + b"9" * 5000 + b"}"),
        ("cut", b'{"label": 1'),
        ("a label that is a list", b'{"label": [1]}'),
        ("a label that is not finite", b'{"label": NaN}'),
    ):
        yield f"a json {what}", member("x.jpg", GOOD[0]) + member("x.json", text), -1


@pytest.mark.parametrize(("odd", "good"), [pytest.param(*case, id=name) for name, *case in hostile()])
def test_hostile_members_cost_no_good_sample_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: bytes, good: int
):
    """In the middle of six good samples; `good` of -1 leaves open whether it is taken or rejected."""
    (tmp_path / "in").mkdir()
    data = b"".join([*PIECES[:HALF], odd, *PIECES[HALF:], END])
    with within(5):
        began = time.process_time()
        left, found = kept(tmp_path / "in" / "a.tar", data)
        assert time.process_time() - began < 1
    assert ALL.keys() <= left.keys()
    assert len(found.rows) - len(ALL) == good or good < 0
    assert len(found.rejects) + found.ignored.total() + len(found.rows) > len(ALL), "it is not counted"

    theirs = index(IndexShards(shards=str(tmp_path / "in"), workers=1, quiet=True))
    assert theirs.samples == sum(not isinstance(label, str) for _, _, label, _ in found.rows)  # among numbers
    said = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert all(line.startswith(("a.tar: ", "not read: ", f"{tmp_path}/in: ")) for line in said.splitlines())
    assert max(map(len, said.splitlines())) < 2000
    stream = TrainingStream(theirs, Data(**SMALL), seed=0, batch=theirs.samples)
    batch = next(stream.batches(0, Share(0, 1, theirs.samples), CPU))
    assert stream.faults.take() == []
    assert bool(batch["valid"].all())
    assert sorted(path.name for path in (tmp_path / "in").iterdir() if path.name != "rejects.jsonl") == [
        *("a.npy", "a.tar", "manifest.json"),
    ]


def test_what_an_odd_name_is_refused_for_is_told_in_one_line(tmp_path: Path):
    for number, name in enumerate(("x\nall is well", "x\x1b[2J", "caf\udce9", "x\u202e")):
        for odd in (sample(name, b"no image"), member(f"{name}.jpg", kind=tarfile.SYMTYPE), member(name, size=1 << 40)):
            folder = tmp_path / f"{number}-{len(odd)}-{odd[156]}"
            folder.mkdir()
            (folder / "a.tar").write_bytes(odd + END)
            refusal = indexed(folder)
            assert isinstance(refusal, exits.Refusal)
            assert str(refusal).isprintable()


NO_TARS = {
    "nothing": b"",
    "a page": b"<!DOCTYPE html>" * 100,
    "gzip": gzip.compress(THEIRS),
    "zeros": bytes(20_000),
    "noise": random.Random(0).randbytes(20_000),
    "text that says ustar": b"x" * 257 + b"ustar" + b"x" * 2000,
}


def no_tars(folder: Path) -> list[str]:
    """Put what is no tar under the names of tars; returns the names."""
    for number, data in enumerate(NO_TARS.values()):
        (folder / f"bad{number}.tar").write_bytes(data)
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    (folder / "link.tar").symlink_to("nowhere")
    return sorted(path.name for path in folder.glob("*.tar"))


def test_what_is_no_tar_among_shards_is_named_and_costs_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = no_tars(tmp_path)
    (tmp_path / "a.tar").write_bytes(THEIRS)
    with within(10):
        theirs = index(IndexShards(shards=str(tmp_path), workers=2, quiet=True))
    assert (theirs.samples, [shard.name for shard in theirs.shards]) == (6, ["a.tar"])
    named = {json.loads(line)["shard"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()}
    said = capsys.readouterr().out
    for name in set(bad) - {"bad3.tar"}:  # zeros are a tar of nothing
        assert name in named
        assert f"{name}: 0 of 0 samples can be used: " in said
    (tmp_path / "a.tar").unlink()
    with pytest.raises(exits.Refusal, match="not one sample can be used") as caught, within(10):
        index(IndexShards(shards=str(tmp_path), workers=2, quiet=True))
    assert caught.value.code == exits.DATA


@pytest.mark.parametrize("name", ["caf\udce9.tar", "a\nb.tar", "-x.tar", "$(touch canary).tar", "ä ö.tar"])
def test_a_shard_of_an_odd_name_is_indexed_or_refused_in_one_line(tmp_path: Path, name: str):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(THEIRS)
    theirs = indexed(tmp_path / "in")
    if isinstance(theirs, exits.Refusal):
        assert "\n" not in str(theirs)
    else:
        assert load(tmp_path / "in").samples == theirs.samples == 6
        assert evaluated(load(tmp_path / "in"))[1] == []


# tars without a manifest, by webdataset


def sequential(folder: Path, batches: int = 3, seconds: float = 1.5) -> tuple[list[Batch], Faults]:
    """The first batches of four that webdataset gives of the tars in a folder."""
    try:
        with within(seconds):
            stream = SequentialStream(tars((str(folder),), Store()), Data(**SMALL), seed=0, batch=4)
            return list(itertools.islice(stream.batches(0, Share(0, 1, 4), CPU), batches)), stream.faults
    finally:
        gc.collect()


def seen(batches: list[Batch]) -> set[int]:
    """Which of IMAGES came, told by their color."""
    red = [image[0].float().mean() for batch in batches for image in batch["image"][batch["valid"]]]
    return {round(float(mean) / 40) for mean in red}


def sparse_bomb(size: int) -> bytes:
    """A member of 512 bytes that stands for a file with a hole."""
    header = bytearray(member("000.jpg", kind=tarfile.GNUTYPE_SPARSE, size=512)[:512])
    header[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def gzip_that_says_ustar(data: bytes) -> bytes:
    """What gzip takes for its own, with a tar's mark where a tar has it."""
    packed, extra = gzip.compress(data), bytearray(300)
    extra[257 - 12 : 262 - 12] = b"ustar"
    return packed[:3] + bytes([packed[3] | 4]) + packed[4:10] + struct.pack("<H", 300) + bytes(extra) + packed[10:]


IMAGES = [member(f"s/{n:03d}.jpg", encoded(Image.new("RGB", (20, 20), (40 * n, 0, 0)), "PNG")) for n in range(6)]
HOSTILE_TARS = {
    "a pickle": member("s/002.pkl", pickle.dumps(Payload())) + member("s/002.pyd", pickle.dumps(Payload())),
    "a pickle that is called an image": member("x.jpg", pickle.dumps(Payload())),
    "a gz member": member("x.jpg.gz", gzip.compress(GOOD[0])),
    "links": b"".join(member(f"{n}.jpg", kind=kind) for n, kind in enumerate(NO_FILES.values())),
    "a negative size": member("x.jpg", size=-1024),
    "8 GB": member("x.jpg", size=8 << 30),
    "an exabyte": member("x.jpg", size=1 << 60),
    "a broken header": b"y" + member("x.jpg", b"data")[1:],
    "a sparse file": sparse_bomb(4096),
    "odd names": b"".join(
        member(n, b"bad") for n in ("../../x.jpg", "/x.jpg", "a\nb.jpg", "caf\udce9.jpg", ".jpg", "x")
    ),
    "a duplicate": member("x.jpg", IMAGES[0][512:]) * 2,
    "a huge image": member("x.jpg", png(65_000, 65_000, 8, 2, b"\0")),
    "an extended header of garbage": pax(b"9" * 5000) + member("x.jpg", b"bad"),
}


@pytest.fixture
def stream_folder(tmp_path: Path) -> Path:
    pytest.importorskip("webdataset")
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_webdataset_streams_on_over_hostile_members(stream_folder: Path, kind: str):
    """The six good images around them all come, whatever webdataset itself would do."""
    data = b"".join([*IMAGES[:3], HOSTILE_TARS[kind], *IMAGES[3:], END])
    (stream_folder / "a.tar").write_bytes(data)
    (stream_folder / "b.tar").write_bytes(b"".join(IMAGES[:4]) + END)
    batches, faults = sequential(stream_folder, batches=20)
    assert all(bool(batch["valid"].all()) for batch in batches)
    assert seen(batches) == set(range(6))
    assert faults.fatal is None
    assert all(".tar" in fault.reason for fault in faults.take())


def test_webdataset_names_the_tar_in_which_a_bad_image_lies(stream_folder: Path):
    """Not the one that is being read when the image's turn comes."""
    for name in "abc":
        bad = member("x.jpg", b"bad") if name == "a" else b""
        (stream_folder / f"{name}.tar").write_bytes(b"".join([*IMAGES, bad]) + END)
    _, faults = sequential(stream_folder, batches=20)
    assert faults.fresh
    assert all("a.tar" in fault.reason for fault in faults.fresh)


def test_webdataset_passes_over_what_is_no_tar(stream_folder: Path, capsys: pytest.CaptureFixture[str]):
    bad = no_tars(stream_folder)
    (stream_folder / "a.tar").write_bytes(b"".join(IMAGES) + END)
    batches, faults = sequential(stream_folder, batches=12)
    assert seen(batches) == set(range(6))
    assert faults.fatal is None
    said = capsys.readouterr().out + "".join(fault.reason for fault in faults.take())
    assert all(f"{name}: " in said for name in set(bad) - {"bad3.tar"})


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="an empty file"),
        pytest.param(b"<html>" * 500, id="a page"),
        pytest.param(member("x.txt", b"no image") + END, id="no images"),
        pytest.param(bytes(10240), id="no members"),
        pytest.param(member(".png", GOOD[1]) + END, id="images without a key"),
        pytest.param(b"x" + THEIRS[1:700], id="a broken header"),
        pytest.param(b"".join(member(f"{n}.jpg", b"bad") for n in range(9)) + END, id="bad images"),
        pytest.param(gzip_that_says_ustar(b"".join(IMAGES) + END), id="gzip that says it is a tar"),
    ],
)
def test_webdataset_ends_where_there_is_nothing_to_stream(stream_folder: Path, data: bytes):
    """Never an endless loop: one line, and the code of bad data."""
    for name in "ab":
        (stream_folder / f"{name}.tar").write_bytes(data)
    _, faults = sequential(stream_folder, batches=1)
    assert faults.fatal is not None
    assert faults.fatal.code == exits.DATA
    assert "\n" not in str(faults.fatal)


def test_webdataset_streams_every_image_of_tars_whose_keys_have_dots(stream_folder: Path):
    """As in ImageNet's val.00001.JPEG, which webdataset takes for one sample of many images."""
    parts = [member(f"val.{n:05d}.JPEG", part[512:]) for n, part in enumerate(IMAGES)]
    (stream_folder / "a.tar").write_bytes(b"".join(parts) + END)
    assert seen(sequential(stream_folder, batches=12)[0]) == set(range(6))


# image files


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x112] = orientation
    return block.tobytes()


def bomb(side: int, depth: int, colour: int) -> bytes:
    """A PNG of zeros, which are next to nothing in the file."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    return png(side, side, depth, colour, bytes((1 + side * channels * depth // 8) * side))


def good_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> bytes of an odd image that is good, and its pixels by the written rules."""
    image = picture(5, 18, 26)
    rgb = np.asarray(image)
    alpha = Image.linear_gradient("L").resize(image.size)
    clear = image.copy()
    clear.putalpha(alpha)
    share = np.asarray(alpha)[..., None] / 255
    on_white = rgb * share + 255 * (1 - share)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    frames = [picture(number, 18, 26) for number in (6, 7)]
    grey16 = b"".join(b"\0" + struct.pack(">3H", *row) for row in ([0, 256, 65_535], [511, 40_000, 255]))
    found = {
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=95), rgb),
        "grey16.png": (
            png(3, 2, 16, 0, grey16),
            np.array([[[0] * 3, [1] * 3, [255] * 3], [[1] * 3, [156] * 3, [0] * 3]]),
        ),
        "rgb16.png": (png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 511, 40_000, 65_535)), np.array([[[1, 156, 255]]])),
        "alpha.png": (encoded(clear, "PNG"), on_white),
        "alpha.webp": (encoded(clear, "WEBP", lossless=True, exact=True), on_white),
        "palette.png": (encoded(palette, "PNG", transparency=0), np.array([[[255] * 3, [40, 50, 60]]])),
        "animated.webp": (encoded(image, "WEBP", save_all=True, append_images=frames, lossless=True), rgb),
        "animated.png": (encoded(image, "PNG", save_all=True, append_images=frames), rgb),
        "png-called.jpg": (encoded(image, "PNG"), rgb),
        "one-pixel.png": (png(1, 1, 8, 2, b"\0\1\2\3"), np.array([[[1, 2, 3]]])),
        "broken-exif.jpg": (
            encoded(image, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12x"),
            rgb,
        ),
        "UPPER.JPEG": (encoded(image, "JPEG", quality=95, subsampling=0), rgb),
        "twice.jpg": (encoded(image, "MPO", quality=95, subsampling=0, save_all=True, append_images=frames), rgb),
    }
    turns = [lambda p: p, np.fliplr, lambda p: p[::-1, ::-1], np.flipud, lambda p: p.transpose(1, 0, 2)]
    turns += [lambda p: np.rot90(p, 3), lambda p: np.rot90(p.transpose(1, 0, 2), 2), np.rot90]
    for number, turn in enumerate(turns, start=1):
        found[f"exif{number}.jpg"] = (encoded(image, "JPEG", quality=95, subsampling=0, exif=exif(number)), turn(rgb))
    return found


def bad_images() -> dict[str, bytes]:
    """Name -> bytes of what is no image that we take."""
    whole, gif = encoded(picture(3, 64, 64), "JPEG"), encoded(picture(3), "GIF")
    return {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": encoded(picture(3, 64, 64), "PNG")[:-300],
        "page.jpg": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "gif.webp": gif,
        "animated-gif.webp": encoded(picture(3), "GIF", save_all=True, append_images=[picture(4)]),
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch canary) (w) file\n",
        "pdf.jpg": encoded(picture(3), "PDF"),
        "tiff.jpg": encoded(picture(3), "TIFF"),
        "bmp.png": encoded(picture(3), "BMP"),
        "svg.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "elf.jpg": b"\x7fELF\x02\x01\x01" + bytes(500),
        "fpx.jpg": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),
        "script.jpg": b"#!/bin/sh\ntouch canary\n",
        "pickle.jpg": pickle.dumps(Payload()),
        "sides.png": png(65_000, 65_000, 8, 2, b"\0"),
        "wide.png": png(30_000, 1, 8, 0, bytes(30_001)),
        "long.png": png(1, 89_478_485, 8, 0, b"\0"),
        "no-rows.png": png(10, 0, 8, 2, b""),
        "profile-bomb.png": png(2, 1, 8, 0, b"\0\1\2", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 * MB), 9))),
        "text-bomb.png": png(2, 1, 8, 0, b"\0\1\2", *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MB - 1)))] * 80),
    }


def rejected(folder: Path) -> dict[str, str]:
    """Path -> reason of what a conversion left out."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {reject["path"]: reject["reason"] for reject in map(json.loads, lines)}


def test_odd_images_are_converted_by_the_written_rules_and_bad_ones_listed(tmp_path: Path):
    (tmp_path / "in").mkdir()
    good, bad = good_images(), bad_images()
    for name, data in ({name: data for name, (data, _) in good.items()} | bad).items():
        (tmp_path / "in" / name).write_bytes(data)
    began = time.process_time()
    made = one(tmp_path / "in", tmp_path / "out", shard_samples=7)
    assert time.process_time() - began < 5
    rejects = rejected(tmp_path / "out")
    assert rejects.keys() == bad.keys()
    assert all(reason and "\n" not in reason for reason in rejects.values())
    assert made.samples + len(rejects) == len(good) + len(bad)
    found = {name: image for name, (_, image, _) in samples(made).items()}
    assert found == {name: data for name, (data, _) in good.items()}  # as they were
    for name, (data, pixels) in good.items():
        got = decode.decode(data)
        assert got.shape == pixels.shape, name
        assert np.abs(got.astype(float) - pixels).mean() < 3, name
    stream = TrainingStream(made, Data(**SMALL), seed=0, batch=made.samples)
    assert bool(next(stream.batches(0, Share(0, 1, made.samples), CPU))["valid"].all())
    assert stream.faults.take() == []


def test_bad_images_are_refused_when_they_are_shrunk_too(tmp_path: Path):
    (tmp_path / "in").mkdir()
    good, bad = good_images(), bad_images()
    for name, data in ({name: data for name, (data, _) in good.items()} | bad).items():
        (tmp_path / "in" / name).write_bytes(data)
    made = one(tmp_path / "in", tmp_path / "out", resize=9, quality=95)
    assert rejected(tmp_path / "out").keys() == bad.keys()
    found = {name: image for name, (_, image, _) in samples(made).items()}
    for name, (_, pixels) in good.items():
        sides = Image.open(io.BytesIO(found[name])).size
        assert min(sides) == min(9, *pixels.shape[:2])
        assert (sides[0] > sides[1]) == (pixels.shape[1] > pixels.shape[0]), name  # upright


def test_an_image_at_which_the_decoder_crashes_is_listed_and_the_rest_is_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(20)]
    write_pictures(tmp_path / "in", names)
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    deadly = {names[3], names[8]}
    killers = {(tmp_path / "in" / name).read_bytes() for name in deadly}
    for name in deadly:  # what the shards are to be: the same files, of which these are rejected
        (tmp_path / "other" / name).write_bytes(bytes((tmp_path / "in" / name).stat().st_size))
    wanted = one(tmp_path / "other", tmp_path / "wanted", shard_samples=3)
    right = decode.open_image

    def crashing(data: bytes) -> Image.Image:
        if data in killers:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()  # pytest's, which would write much
            os.abort()
        return right(data)

    monkeypatch.setattr(decode, "open_image", crashing)
    for workers in (1, 2):
        made = one(tmp_path / "in", tmp_path / f"out{workers}", shard_samples=3, workers=workers)
        assert rejected(made.folder) == dict.fromkeys(deadly, "its decoder crashes")
        assert made.samples == wanted.samples == len(names) - len(deadly)
        assert {n: d for n, d in contents(made.folder).items() if n.endswith((".tar", ".npy"))} == {
            n: d for n, d in contents(wanted.folder).items() if n.endswith((".tar", ".npy"))
        }


def test_an_image_of_a_thousand_scans_is_refused():
    """Each costs the time of a whole decoding: 100 kB would keep a worker at work for minutes."""
    few = encoded(picture(1, 64, 64), "JPEG", progressive=True)
    with pytest.raises(BadImage):
        decode.decode(few[:-2] + few[few.rfind(b"\xff\xda") : -2] * 1000 + b"\xff\xd9")


# memory


@pytest.mark.parametrize(
    ("depth", "colour"),
    [
        *(pytest.param(8, 2, id="rgb"), pytest.param(8, 6, id="rgba")),
        *(pytest.param(16, 2, id="rgb16"), pytest.param(16, 6, id="rgba16")),
        pytest.param(16, 0, id="grey16"),
    ],
)
def test_the_memory_of_a_decompressed_image_is_bounded(depth: int, colour: int):
    """A file of a few kB: it is 16 bytes a pixel at most, so 1 GB for the largest that is taken."""
    side = 2000
    data = bomb(side, depth, colour)
    assert len(data) < 200_000
    assert growth(lambda: decode.decode(data)) < 16 * side * side + 20 * MB


def test_the_memory_of_compressed_extras_is_bounded():
    def refused(name: str) -> None:
        try:
            decode.decode(bombs[name])
        except BadImage:
            return

    bombs = bad_images()
    for name in ("profile-bomb.png", "text-bomb.png", "sides.png", "long.png"):
        assert growth(lambda name=name: refused(name)) < 30 * MB, name


@pytest.mark.parametrize("kind", ["a class", "a json", "an image", "an extended header", "a long name", "a gzip"])
def test_the_memory_of_a_scan_is_bounded(tmp_path: Path, kind: str):
    """Members of more than is read, which are holes on this disk."""
    size = 300 * MB if kind == "an image" else 120 * MB
    path = tmp_path / "a.tar"
    heads = {
        "a class": member("x.cls", size=size),
        "a json": member("x.json", size=size),
        "an image": member("x.jpg", size=size),
        "an extended header": member("x", kind=tarfile.XHDTYPE, size=size),
        "a long name": member("x", kind=tarfile.GNUTYPE_LONGNAME, size=size),
    }
    if kind == "a gzip":
        path.write_bytes(gzip_that_says_ustar(member("x.jpg", bytes(100 * MB)) + END))
    else:
        with path.open("wb") as file:
            file.write(b"".join(PIECES) + member("x.jpg", GOOD[0]) * (kind != "an image") + heads[kind])
            file.truncate(file.tell() + size + 1024)
    assert growth(lambda: scan(path, "a.tar")) < 60 * MB


@pytest.mark.parametrize(
    "kind",
    [
        *("gzip that says it is a tar", "a sparse file"),
        "large members",
    ],
)
def test_the_memory_of_webdataset_is_bounded(stream_folder: Path, kind: str):
    """It keeps a thousand samples to shuffle, of whatever size."""
    size = 50 * MB
    path = stream_folder / "a.tar"
    if kind == "gzip that says it is a tar":
        path.write_bytes(gzip_that_says_ustar(b"".join(IMAGES) + member("x.jpg", bytes(size)) + END))
    elif kind == "large members":
        with path.open("wb") as file:
            for number in range(2):
                file.write(IMAGES[number] + member(f"x{number}.jpg", size=size))
                file.truncate(file.seek(size, os.SEEK_CUR))
            file.write(END)
    else:
        path.write_bytes(b"".join([*IMAGES[:3], sparse_bomb(size), *IMAGES[3:], END]))

    def streamed() -> None:
        try:
            sequential(stream_folder, batches=4, seconds=1.5)
        except Late:
            return

    assert growth(streamed) < 8 * size


# thresholds


def watch(folder: Path, faults: Faults, epoch_samples: int = 1000, most: int | None = None) -> DataWatch:
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1)
    return DataWatch(accelerator, faults, folder, epoch_samples, most)


def fault(number: int, reason: str = "a.tar: it is damaged") -> Fault:
    return Fault(0, 0, number, number + 1, reason)


def test_how_many_bad_samples_are_borne():
    assert [borne(samples, None) for samples in (1, 1000, 100_000, 200_000, 1_281_167)] == [10, 10, 10, 20, 128]
    assert [borne(1000, most) for most in (0, 3, 10**6)] == [0, 3, 10**6]


@pytest.mark.parametrize(("epoch_samples", "most", "allowed"), [(1000, None, 10), (200_000, None, 20), (1000, 0, 0)])
def test_one_bad_sample_too_many_stops(tmp_path: Path, epoch_samples: int, most: int | None, allowed: int):
    faults = Faults()
    judge = watch(tmp_path, faults, epoch_samples, most)
    for number in range(allowed):
        faults.met(4, [fault(number)])
        judge.check(4 * number, wait=False)
    judge.check(4 * allowed, wait=True)
    faults.met(4, [fault(allowed)])
    with pytest.raises(exits.Refusal) as caught:
        judge.check(4 * allowed + 4, wait=False)
    assert caught.value.code == exits.DATA
    told = str(caught.value)
    assert told.startswith(f"too many samples are damaged: {allowed + 1} in this epoch, {allowed} are borne; ")
    assert "bad_samples-*.jsonl" in told
    assert "\n" not in told
    rows = [json.loads(line) for line in (tmp_path / "bad_samples-0.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == list(range(allowed + 1))
    assert rows[0] == {"epoch": 0, "sample": 0, "substitute": 1, "reason": "a.tar: it is damaged"}


def test_a_hundred_in_a_row_stop_whatever_is_borne(tmp_path: Path):
    faults = Faults()
    judge = watch(tmp_path, faults, most=10**6)

    def step(bad: list[int]) -> None:
        faults.met(10, [Fault(slot, 0, slot, None, "gone") for slot in bad])
        judge.check(0, wait=False)

    for _ in range(2):  # one good sample among them begins the count anew
        for _ in range(9):
            step(list(range(10)))
        step(list(range(9)))
    for _ in range(9):
        step(list(range(10)))
    with pytest.raises(exits.Refusal, match=f"{IN_A_ROW} in a row") as caught:
        step(list(range(10)))
    assert caught.value.code == exits.DATA


def test_an_epoch_begins_a_new_count_and_a_resumption_goes_on_with_the_old_one(tmp_path: Path):
    faults = Faults()
    judge = watch(tmp_path, faults, epoch_samples=100)
    judge.resume(250, total=30, bad=8)
    faults.met(4, [fault(1), fault(2)])
    judge.check(290, wait=False)
    assert (judge.total, judge.bad) == (32, 10)
    judge.check(304, wait=False)  # the next epoch
    assert (judge.total, judge.bad) == (32, 0)
    faults.met(20, [fault(number) for number in range(10)])
    judge.check(350, wait=False)
    faults.met(4, [fault(11)])
    with pytest.raises(exits.Refusal, match="11 in this epoch"):
        judge.check(354, wait=False)


def test_a_failure_that_no_substitute_cures_is_told_as_it_is(tmp_path: Path):
    faults = Faults()
    faults.fatal = exits.Refusal(exits.DISK, "https://nowhere: stays away")
    with pytest.raises(exits.Refusal) as caught:
        watch(tmp_path, faults, most=10**6).check(0, wait=False)
    assert (caught.value.code, caught.value.message) == (exits.DISK, "https://nowhere: stays away")
    assert caught.value.shared


def test_few_bad_samples_are_printed_all_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    faults = Faults()
    faults.met(50, [fault(number) for number in range(40)])
    watch(tmp_path, faults, most=100).check(0, wait=False)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11
    assert said[0] == "bad sample 0, replaced by sample 1: a.tar: it is damaged"
    assert "bad_samples-0.jsonl" in said[-1]
    assert len((tmp_path / "bad_samples-0.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize("name", ["caf\udce9", "x\x1b[2J", "x\nbad sample 7, replaced by sample 8: all is well"])
def test_an_odd_name_in_a_tar_neither_ends_the_training_nor_writes_its_log(
    stream_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    data = b"".join([*IMAGES[:3], member(f"{name}.jpg", b"bad"), *IMAGES[3:], END])
    (stream_folder / "a.tar").write_bytes(data)
    _, faults = sequential(stream_folder, batches=6)
    assert faults.fresh
    watch(tmp_path, faults, most=10**6).check(0, wait=False)
    said = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert all(f": {stream_folder}/a.tar: " in line for line in said.splitlines() if line.startswith("bad sample"))


# processes

PROCESS = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from ssl_vit import exits
from ssl_vit.data import manifest
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import Share, TrainingStream
from ssl_vit.train.watch import DataWatch

def main(arguments):
    stream = TrainingStream(manifest.load(arguments[0]), Data(image_size=16, workers=1), seed=0, batch=8)
    watch = DataWatch(SimpleNamespace(process_index=0, num_processes=1), stream.faults, Path(arguments[1]), 24, None)
    for step, _ in enumerate(stream.batches(0, Share(0, 1, 8), torch.device("cpu")), start=1):
        watch.check(8 * step, wait=True)

exits.run(main)
"""


def test_a_process_with_workers_ends_with_its_code_and_one_line(made: Manifest, tmp_path: Path):
    """The workers ignore signals, so they must be told to go, or the exit waits for ever."""
    for number in (1, 2):
        os.truncate(shard(made, number), 0)
    command = [sys.executable, "-c", PROCESS, str(made.folder), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert ended.returncode == exits.DATA
    (line,) = ended.stderr.splitlines()
    assert "too many samples are damaged: " in line
    assert all(f"{made.folder}/00000" in said for said in ended.stdout.splitlines()[:-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A training by two processes on 60 samples of which 20 are damaged, and the same command with more borne."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(60)]
    made = one(write_pictures(folder / "in", names, height=18, width=18), folder / "out", shard_samples=10)
    bad = {number for number in range(60) if number % 3 == 1}
    for sample in bad:
        flip(shard(made, sample // 10), int(made.index(sample // 10)[sample % 10]["offset"]) + 20)
    run = folder / "run"
    words = [*TINY, f"data.train={made.folder}", f"run={run}", "steps=7", "log_every=1", "save_every=2", "tracker=none"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}

    def start(*more: str) -> SimpleNamespace:
        command = [*launcher, "tools/pretrain.py", *words, *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        listed = {
            rank: [json.loads(line) for line in path.read_text().splitlines()]
            for rank, path in enumerate(sorted(run.glob("bad_samples-*.jsonl")))
        }
        return SimpleNamespace(
            code=done.returncode,
            out=done.stdout,
            error=done.stderr,
            end=json.loads((run / "exit.json").read_text()),
            rows=[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
            checkpoints=sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")),
            listed=listed,
        )

    stream = TrainingStream(made, config.parse(recipe.Pretrain, words, recipe.FOLDER).data, seed=0, batch=8)
    met = [sum(sample in bad for _, sample in stream.plan.batch(step)) for step in range(7)]
    return SimpleNamespace(first=start(), second=start("data.max_bad=20"), run=run, bad=bad, met=met)


def test_two_processes_stop_together_where_too_much_is_damaged(runs: SimpleNamespace):
    first = runs.first
    too_many = next(step for step in range(7) if sum(runs.met[: step + 1]) > 10) + 1  # in which step
    assert first.code != 0
    assert "exitcode  : 65 " in first.error
    lines = [line for line in first.error.splitlines() if line.startswith("pretrain.py: ")]
    assert 1 <= len(lines) <= 2  # the launcher ends the second process as soon as the first has ended
    assert lines[0] == lines[-1]
    assert first.end["code"] == exits.DATA
    assert f"pretrain.py: {first.end['reason']}" == lines[0]
    assert first.end["reason"].startswith(
        f"too many samples are damaged: {sum(runs.met[:too_many])} in this epoch, 10 are"
    )
    assert too_many <= first.end["step"] <= too_many + 1
    assert all(step < too_many for step in first.checkpoints)
    assert first.checkpoints, "there was none before the fault either"
    told = [row for rank in first.listed.values() for row in rank]
    assert len(first.listed) == 2
    assert all(first.listed.values())  # each rank its own
    assert {row["sample"] for row in told} <= runs.bad
    assert len({row["sample"] for row in told}) == len(told) >= sum(runs.met[:too_many])
    assert all(row["substitute"] not in runs.bad and ".tar: sample" in row["reason"] for row in told)


def test_the_same_command_goes_on_to_its_end_where_more_is_borne(runs: SimpleNamespace):
    second = runs.second
    assert second.code == 0, second.error
    assert second.end["code"] == 0
    assert second.checkpoints[-1] == 7
    told = {(row["epoch"], row["sample"]) for rank in second.listed.values() for row in rank}
    assert len(told) == sum(runs.met) == len({row["sample"] for rank in second.listed.values() for row in rank})
    assert [row["step"] for row in second.rows] == list(range(1, 8))


def test_rows_of_metrics_count_the_bad_samples_of_their_own_steps(runs: SimpleNamespace):
    """The last row is what remains of a run: a sample that was replaced in its last step is missing nowhere."""
    assert [row["bad_samples"] for row in runs.second.rows] == list(itertools.accumulate(runs.met))
