"""The node's cache of remote shards, and training from it: fetched once, ahead of use, under the cap."""

import gc
import hashlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ssl_vit.convert import resolve
from ssl_vit.data import cache, manifest, remote
from ssl_vit.data import loader as streams
from ssl_vit.data.cache import Ahead, Cache, Store, Wanted
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import EvaluationStream, Share, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.errors import CANNOT_CREATE, DATA, DISK, Refusal
from ssl_vit.model import Batch
from tests.conftest import TINY
from tests.data import servers
from tests.data.pictures import contents, make, one, write_pictures
from tests.data.servers import GONE, Answer, Buckets, Site, refused
from tests.starts import call
from tests.tiny_runs import rows, told

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than a small machine has
]
CPU, PROCESS = torch.device("cpu"), pytest.mark.process
SIZE = 20_000
PLAN: Any = {"lanes": 4, "window": 1}
SHARES = [(2.0, {"lanes": 16, "window": 4}), *(pytest.param(share, PLAN, marks=PROCESS) for share in (2.0, 0.3))]
File = tuple[str, int, str]  # name, size and digest


@pytest.fixture
def store(web: Site, tmp_path: Path) -> Cache:
    """With room for ten files."""
    return Cache(web.url, tmp_path / "cache", 10 * SIZE)


def files(web: Site, count: int) -> list[File]:
    """Files on the web."""
    made = {f"{number}.tar": np.random.default_rng(number).bytes(SIZE) for number in range(count)}
    for name, data in made.items():
        (web.folder / name).write_bytes(data)
    return [(name, SIZE, hashlib.sha256(data).hexdigest()) for name, data in made.items()]


def held(folder: Path, hidden: bool = False) -> dict[str, int]:
    """Name -> bytes of what the cache holds; `hidden`: of drafts and locks, too."""
    found = {}
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            found |= {path.name: path.stat().st_size} if hidden or not path.name.startswith(".") else {}
    return found


def drafts(folder: Path) -> list[str]:
    return [name for name in held(folder, hidden=True) if name.endswith(".tmp")]


def until(done: Callable[[], Any], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


fork = get_context("fork").Process


def begun(kind: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """A thread or a process that does this."""
    begun = kind(target=work, args=arguments)
    begun.start()
    return begun


def test_a_file_is_fetched_once_for_all_processes_and_threads(web: Site, store: Cache):
    (file,) = files(web, 1)
    web.faults = lambda path, nth: Answer(drip=(SIZE // 4, 0.1))
    for one_of_them in [begun(kind, store.fetch, *file) for kind in (fork, Thread) for _ in range(3)]:
        one_of_them.join(20)
    assert store.fetch(*file).read_bytes() == (web.folder / "0.tar").read_bytes()
    assert web.got == {"0.tar": 1}
    assert drafts(store.folder) == []


def test_what_is_equal_is_kept_once_and_what_was_replaced_is_fetched_anew(web: Site, store: Cache):
    (file,) = files(web, 1)
    (web.folder / "copy").mkdir()
    (web.folder / "copy" / "other.tar").write_bytes((web.folder / "0.tar").read_bytes())
    first = store.fetch(*file)
    assert replace(store, url=f"{web.url}/copy").fetch("other.tar", SIZE, file[2]) == first
    new = b"new" * 100
    (web.folder / "0.tar").write_bytes(new)
    assert store.fetch("0.tar", 300, hashlib.sha256(new).hexdigest()).read_bytes() == new
    assert web.got == {"0.tar": 2}
    first.unlink()
    with pytest.raises(remote.BadSource):  # by an older manifest
        store.fetch(*file)


def test_what_was_used_longest_ago_makes_room(web: Site, store: Cache):
    store, made = replace(store, room=int(3.5 * SIZE)), files(web, 5)
    handle = store.fetch(*made[1]).open("rb")
    for number in (0, 2, 0, 3, 0, 4):  # 0 is in use all the time, and 1 is open
        time.sleep(0.02)
        store.fetch(*made[number])
        assert sum(held(store.folder).values()) <= store.room
    assert set(held(store.folder)) == {f"{made[number][2]}.tar" for number in (0, 3, 4)}
    assert web.got == {f"{number}.tar": 1 for number in range(5)}
    with handle:
        assert handle.read() == (web.folder / "1.tar").read_bytes()


def test_the_cap_holds_with_many_downloads_at_once(web: Site, store: Cache):
    """Drafts included, and some bytes of notes in the locks."""
    store, made, most = replace(store, room=int(2.5 * SIZE)), files(web, 8), 0
    web.faults = lambda path, nth: Answer(drip=(SIZE // 5, 0.03))
    work = [begun(Thread, store.fetch, *file) for file in made]
    while any(thread.is_alive() for thread in work):
        most = max(most, sum(held(store.folder, hidden=True).values()))
        time.sleep(0.002)
    assert 0 < most <= store.room + 1000
    assert web.got == {name: 1 for name, _, _ in made}


def test_the_cap_holds_for_files_of_unknown_size_and_what_can_never_fit_is_refused(web: Site, store: Cache):
    """Tars for webdataset: nothing but their names is known."""
    store = replace(store, room=int(2.5 * SIZE))
    for name, _, _ in files(web, 4):
        store.fetch(name, None, "")
        assert sum(held(store.folder).values()) <= store.room
    (web.folder / "large.tar").write_bytes(bytes(store.room + 1))
    for size, sha256 in ((None, ""), (store.room + 1, "0" * 64)):
        assert "cache_gb" in refused(lambda size=size, sha256=sha256: store.fetch("large.tar", size, sha256), DISK)
    assert web.got["large.tar"] == 0


def test_stale_drafts_and_those_of_a_killed_process_go_with_the_next_fetch(web: Site, store: Cache):
    """Else a training that is restarted again and again fills the disk beyond the cap."""
    (file,) = files(web, 1)
    web.faults = lambda path, nth: None if nth else Answer(drip=(SIZE // 10, 0.1))
    process = begun(fork, store.fetch, *file)
    until(lambda: drafts(store.folder))
    process.kill()
    process.join()
    for name, age in (("old", 2 * cache.STALE), ("young", 1.0)):
        (store.folder / f".{name}.tar.abc.tmp").write_bytes(bytes(100))
        os.utime(store.folder / f".{name}.tar.abc.tmp", (time.time() - age, time.time() - age))
    store.fetch(*file)
    assert drafts(store.folder) == [".young.tar.abc.tmp"]


def test_a_try_that_was_given_up_writes_nothing_later(web: Site, store: Cache, monkeypatch: pytest.MonkeyPatch):
    """As behind a slow redirect; the draft would be whole, and nobody's."""
    servers.hurry(monkeypatch)
    files(web, 1)
    web.faults = lambda path, nth: Answer(late=0.3) if path == "0.tar" else Answer(302, late=0.4, where="/0.tar")
    with pytest.raises(Refusal):
        remote.get(f"{web.url}/old.tar", store.folder / "x")
    time.sleep(1)
    assert contents(store.folder) == {}


def test_a_failure_leaves_nothing_and_the_next_fetch_is_good(web: Site, store: Cache):
    """Also a cached file that is short, as after a loss of power: it had its name, and not yet its bytes."""
    (file,) = files(web, 1)
    for fault in (Answer(cut=100), Answer(503), Answer(more=5)):
        web.faults = lambda path, nth, fault=fault: fault
        refused(lambda: store.fetch(*file), DISK)
    web.faults = lambda path, nth: Answer(change=lambda data: data[::-1])
    with pytest.raises(remote.BadSource):
        store.fetch(*file)
    assert (held(store.folder), drafts(store.folder)) == ({}, [])
    web.faults = lambda path, nth: None
    for size in (SIZE // 2, 0):
        os.truncate(store.fetch(*file), size)
        assert store.fetch(*file).read_bytes() == (web.folder / "0.tar").read_bytes()
    elsewhere = replace(store, folder=store.fetch(*file) / "cache")
    assert "data.cache" in refused(lambda: elsewhere.fetch(*file), CANNOT_CREATE)


def test_those_who_waited_for_a_dead_source_end_with_the_first(
    web: Site, store: Cache, monkeypatch: pytest.MonkeyPatch
):
    """Else a node's workers end one after the other, each after minutes, and the other nodes wait in a reduction."""
    servers.hurry(monkeypatch, tries=2, patience=0.3)
    (file,) = files(web, 1)
    web.faults = lambda path, nth: Answer(late=2)
    ends: list[int] = []
    fails = lambda: (refused(lambda: store.fetch(*file), DISK), ends.append(web.got["0.tar"]))  # noqa: E731
    for thread in [begun(Thread, fails) for _ in range(4)]:
        thread.join()
    assert ends == [2] * 4  # the tries of the first


def wanted(store: Cache, file: File) -> Wanted:
    return Wanted(store.url, str(store.folder), store.room, *file)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children() -> set[int]:
    """Of this process, zombies included."""
    return {process.pid for process in psutil.Process().children()}


def test_the_fetcher_works_and_ends_with_its_parent(web: Site, store: Cache):
    """Though the parent was killed, and a download is under way."""
    (file,) = files(web, 1)
    web.faults = lambda path, nth: Answer(drip=(100, 0.05))
    here, there = get_context("fork").Pipe()

    def dies_with_a_fetcher() -> None:
        ahead = Ahead()
        ahead.fetch(wanted(store, file))
        there.send(ahead._process.pid)
        signal.pause()

    process = begun(fork, dies_with_a_fetcher)
    pid = here.recv()
    until(lambda: web.got["0.tar"])
    assert alive(pid)
    process.kill()
    process.join()
    until(lambda: not alive(pid), limit=5)


@pytest.mark.parametrize("dead", [False, pytest.param(True, marks=PROCESS)])
def test_the_fetcher_leaves_signals_to_its_parent_and_its_death_is_no_harm(
    web: Site, store: Cache, capfd: pytest.CaptureFixture[str], dead: bool
):
    """Ctrl-C reaches every process of a terminal; the training says what there is to say."""
    first, second = files(web, 2)
    before, ahead = children(), Ahead()
    if dead:
        ahead._process.kill()
        ahead._process.wait()
    ahead.fetch(wanted(store, first))
    until(lambda: dead or held(store.folder))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        ahead._process.send_signal(number)
    ahead.fetch(wanted(store, second))
    try:
        until(lambda: dead or len(held(store.folder)) == 2)
    finally:
        ahead.close()
        assert children() <= before  # no zombie
    assert capfd.readouterr().err == ""


class Idle(Ahead):
    """In place of the process that fetches ahead, where a test is not about it."""

    __init__ = fetch = close = lambda self, *_: None  # type: ignore[assignment]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "Ahead", Idle)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """159 images in 40 shards."""
    folder = tmp_path_factory.mktemp("disk")
    write_pictures(folder / "in", [f"{c}/{i:03d}.jpg" for c in "abc" for i in range(53)])
    one(folder / "in", folder / "out", shard_samples=4, workers=2)
    return folder / "out"


@pytest.fixture
def site(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The shards on the web."""
    servers.hurry(monkeypatch, patience=10)
    with servers.site(disk) as made:
        yield made


def at(url: str, folder: Path, room: int = 10**9) -> Manifest:
    return resolve.sets((url,), "train", folder / "converted", Store(folder / "cache", room))


def training(made: Manifest, **more: Any) -> TrainingStream:
    options = Data(**{"image_size": 16, "workers": 0, **PLAN, **more})
    return TrainingStream(made, options, seed=5, batch=16)


def digest(batches: Iterable[Batch]) -> str:
    """Of all pixels, labels, seeds and flags, in their order."""
    parts = [[batch[name] for name in ("image", "label", "seed", "valid")] for batch in batches]
    joined = (torch.cat(part).numpy().tobytes() for part in zip(*parts, strict=True))
    return hashlib.sha256(b"".join(joined)).hexdigest()


def trained(made: Manifest, steps: int = 25, first: int = 0, **more: Any) -> str:
    """The digest of some steps, of which no sample is bad."""
    stream = training(made, **more)
    found = digest(itertools.islice(stream.batches(first * 16, Share(0, 1, 8), CPU), 2 * steps))
    assert (stream.faults.fresh, stream.faults.fatal) == ([], None)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_the_web_is_that_from_the_disk(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    """In training, from any step on, and in evaluation; each shard comes once."""
    here, far = manifest.load(disk), at(site.url, tmp_path)
    for made, first in ((far, 0), (at(site.url, tmp_path), 7)):
        assert trained(made, first=first, workers=workers) == trained(here, first=first)
        assert all(site.got[shard.name] == 1 for shard in here.shards)
    options = Data(image_size=16, workers=workers)
    judged = [digest(EvaluationStream(made, options, 32).batches(Share(), CPU)) for made in (far, here)]
    assert judged[0] == judged[1]


def test_a_stream_from_s3_and_from_both_is_that_from_the_disk(buckets: Buckets, tmp_path: Path, alone: None):
    write_pictures(tmp_path / "in", [f"{c}/{i}.png" for c in "ab" for i in range(12)])
    make(tmp_path / "in", tmp_path / "disk", shard_samples=4, val_fraction=0.3)
    disk, url = str(tmp_path / "disk"), f"{buckets.bucket()}/deep/below"
    buckets.upload(tmp_path / "disk", url)
    given = [(disk,), (url,), (disk, disk), (disk, url)]
    here, far, twice, both = (resolve.sets(each, "train", tmp_path, Store(tmp_path / "cache")) for each in given)
    far.check()
    assert trained(far, 4, workers=2, lanes=2) == trained(here, 4, lanes=2)
    assert trained(both, 4, lanes=2) == trained(twice, 4, lanes=2)


def test_a_cache_smaller_than_the_set_is_enough_for_several_workers(
    disk: Path, site: Site, tmp_path: Path, alone: None
):
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    assert trained(at(site.url, tmp_path, 8 * size), 20, workers=2) == trained(manifest.load(disk), 20)
    assert sum(held(tmp_path / "cache").values()) <= 8 * size


def test_a_cache_smaller_than_the_set_is_enough(disk: Path, site: Site, tmp_path: Path, alone: None):
    """The cap is for the disk: a deleted file takes its room until the last process closes it, which is soon."""
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    batches = training(at(site.url, tmp_path, 8 * size)).batches(0, Share(0, 1, 16), CPU)
    near = training(manifest.load(disk)).batches(0, Share(0, 1, 16), CPU)
    for batch, wanted in itertools.islice(zip(batches, near, strict=True), 20):
        assert digest([batch]) == digest([wanted])
    taken = sum(held(tmp_path / "cache").values())
    assert taken <= 8 * size
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            opened = os.readlink(entry)
            taken += entry.stat().st_size if "(deleted)" in opened and str(tmp_path) in opened else 0
    assert taken <= (8 + 4 * 2) * size  # in use: lanes, each through a window of one shard, which may lie across two


@pytest.mark.parametrize("suffix", [".tar", ".npy"])
def test_what_another_process_evicts_too_early_is_fetched_again(
    disk: Path, site: Site, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    """The first file of a kind goes before this process opens it."""
    fetch, gone = Cache.fetch, list[Path]()

    def fetched(*arguments: Any, **more: bool) -> Path:
        path = fetch(*arguments, **more)
        if path.suffix == suffix and not gone:
            gone.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", fetched)
    assert trained(at(site.url, tmp_path), 4) == trained(manifest.load(disk), 4)
    assert gone


@pytest.mark.parametrize("said", ["", "x", "../../../../etc/passwd", "00000000/../../outside", "Z" * 64, "0" * 63])
def test_a_manifest_with_other_digests_is_none(disk: Path, web: Site, tmp_path: Path, said: str):
    """They become names of files, and an empty one would mean that nothing is compared."""
    text = json.loads((disk / "manifest.json").read_bytes())
    text["shards"][0]["sha256"] = said
    (web.folder / "manifest.json").write_text(json.dumps(text))
    refused(lambda: at(web.url, tmp_path), DATA)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_goes_away_ends_the_stream(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    stream = training(at(site.url, tmp_path), workers=workers)
    site.faults = lambda path, nth: GONE if path.endswith(".tar") and site.count(site.got) > 12 else None
    batches = stream.batches(0, Share(0, 1, 8), CPU)
    good = list(itertools.takewhile(lambda batch: stream.faults.fatal is None, itertools.islice(batches, 40)))
    assert 0 < len(good) < 40
    assert all(batch["valid"].all() for batch in good)
    assert stream.faults.fresh == []  # none of it is a bad sample
    assert stream.faults.fatal is not None
    assert stream.faults.fatal.code == DISK
    assert site.url in str(stream.faults.fatal)
    asked = site.count(site.got)
    assert not any(next(batches)["valid"].any() for _ in range(50))  # until all processes stop in one step
    assert site.count(site.got) == asked  # nor is anybody asked in vain again and again


@pytest.mark.parametrize("fault", ["altered", "gone"])
def test_a_bad_object_is_bad_samples_and_no_end(disk: Path, site: Site, tmp_path: Path, alone: None, fault: str):
    """One altered byte costs one sample, as it does on disk, where the checksum of each tells."""
    here, far = manifest.load(disk), at(site.url, tmp_path)
    row = here.index(7)[1]
    place = int(row["offset"]) + int(row["size"]) // 2
    altered = Answer(change=lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    answer = altered if fault == "altered" else Answer(404)
    site.faults = lambda path, nth: answer if path == here.shards[7].name else None
    stream, bad = training(far), []
    batches, wholes = (made.batches(0, Share(0, 1, 16), CPU) for made in (stream, training(here)))
    for batch, whole in zip(itertools.islice(batches, here.samples // 16 + 1), wholes, strict=False):
        faults = stream.faults.take()
        bad += faults
        same = [slot for slot in range(16) if slot not in {found.slot for found in faults}]
        assert torch.equal(batch["image"][same], whole["image"][same])
        assert torch.equal(batch["seed"], whole["seed"])
        assert batch["valid"].all()
    assert stream.faults.fatal is None
    first, end = map(int, here.starts[7:9])
    assert {found.sample for found in bad} == ({first + 1} if fault == "altered" else set(range(first, end)))
    assert all(f"{site.url}/{here.shards[7].name}" in found.reason for found in bad)
    assert far.altered(7) is not None  # as verify_shards full=true finds it


def test_a_stream_that_is_closed_leaves_no_process(disk: Path, site: Site, tmp_path: Path):
    before = children()
    batches = training(at(site.url, tmp_path), workers=1).batches(0, Share(0, 1, 16), CPU)
    next(batches)
    assert len(children() - before) == 2  # a worker, and the process that fetches ahead
    batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()
    until(lambda: children() <= before)


@pytest.mark.parametrize(("share", "plan"), SHARES)  # at first the default plan
def test_two_nodes_fetch_the_set_once_an_epoch(
    disk: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, plan: dict[str, int]
):
    """All of it ahead of its use, by the process that is there for it; with much room, and with little."""
    here = manifest.load(disk)
    size = sum(shard.bytes for shard in here.shards)
    mine, get = [], remote.get  # what the training processes had to fetch themselves
    monkeypatch.setattr(remote, "get", lambda *arguments: (mine.append(arguments[0]), get(*arguments)))
    nodes = []
    for rank in range(2):
        far = at(site.url, tmp_path / str(rank), room=int(share * size))
        stream = training(far, **plan)
        nodes.append((stream, stream.batches(0, Share(rank, 2, 8), CPU), tmp_path / str(rank) / "cache"))

    def needed(stream: TrainingStream, step: int, rank: int) -> set[str]:
        """The files that a node needs for a step, by the plan alone."""
        ids = [sample for _, sample in stream.plan.batch(step, rank, 2)]
        coming = [here.shards[shard] for shard in set(np.searchsorted(here.starts, ids, side="right") - 1)]
        return {f"{shard.sha256}.tar" for shard in coming} | {f"{shard.index_sha256}.npy" for shard in coming}

    steps = here.samples // 16
    batches: list[list[Batch]] = [[], []]
    own = 0  # of the first step's, which nobody could fetch ahead
    for step in range(steps):
        own = len(mine) if step == 1 else own
        for rank, (stream, made, folder) in enumerate(nodes):
            if step:
                files = needed(stream, step, rank)
                until(lambda files=files, folder=folder: files <= set(held(folder)))
            batches[rank].append(next(made))
    assert len(mine) == own
    for rank, (_, made, _) in enumerate(nodes):
        made.close()  # type: ignore[attr-defined]
        alone = training(here, **plan).batches(0, Share(rank, 2, 8), CPU)
        assert digest(batches[rank]) == digest(itertools.islice(alone, steps))
    assert site.count(site.sent) <= 1.1 * size
    assert sum(held(tmp_path / "0" / "cache").values()) <= share * size


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.process)])
def test_a_training_stops_when_its_source_goes_away_and_goes_on_when_it_is_back(
    disk: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
):
    if not ahead:
        monkeypatch.setattr(streams, "Ahead", Idle)
    keys = [*TINY, "data.lanes=1", "data.window=1", "steps=12", "log_every=3", "save_every=3", "tracker=none"]
    far = [*keys, f"data.train={site.url}", f"data.cache={tmp_path / 'cache'}", f"run={tmp_path / 'far'}"]

    def away(path: str, nth: int) -> Answer | None:
        known = [name for name, count in site.got.items() if name.endswith(".tar") and count]
        return GONE if path in known[14:] else None  # the first questions for sizes are answered

    site.faults = away
    stopped = call("pretrain", far)
    assert stopped.code == DISK, stopped.said
    (line,) = stopped.said.splitlines()
    assert line.startswith(f"pretrain.py: {site.url}/")
    assert "the same command goes on" in line
    assert told(tmp_path / "far")["code"] == DISK
    assert 0 < told(tmp_path / "far")["step"] < 12
    site.faults = lambda path, nth: None
    for words in (far, [*keys, f"data.train={disk}", f"run={tmp_path / 'near'}"]):
        ended = call("pretrain", words)
        assert ended.code == 0, ended.said
    assert rows(tmp_path / "far") == rows(tmp_path / "near")
    assert len(rows(tmp_path / "near")) == 4
