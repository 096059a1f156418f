"""The node's cache of remote shards, and training from it: fetched once, ahead of use, under the cap."""

import gc
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import servers
import torch
from pictures import contents, make, one, write_pictures
from servers import Site, refused

from ssl_vit import config, recipe, session
from ssl_vit.data import cache, find, manifest, remote
from ssl_vit.data import stream as streams
from ssl_vit.data.cache import Ahead, Cache, Store, Wanted
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream
from ssl_vit.exits import CANNOT_CREATE, DATA, DISK, Refusal
from ssl_vit.model import Batch
from tests.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SIZE = 20_000
File = tuple[str, int, str]
"""Name, size and digest."""


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server of an empty folder, and no patience with it."""
    (tmp_path / "web").mkdir()
    servers.hurry(monkeypatch)
    with servers.site(tmp_path / "web") as site:
        yield site


def files(web: Site, count: int, size: int = SIZE) -> list[File]:
    """Files on the web."""
    made = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        (web.folder / f"{number}.tar").write_bytes(data)
        made.append((f"{number}.tar", size, hashlib.sha256(data).hexdigest()))
    return made


def held(folder: Path, hidden: bool = False) -> dict[str, int]:
    """Name -> bytes of what the cache holds; `hidden`: of drafts and locks, too."""
    found = {}
    for entry in os.scandir(folder):
        try:
            found[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            continue
    return {name: size for name, size in found.items() if hidden or not name.startswith(".")}


def drafts(folder: Path) -> list[str]:
    return [name for name in held(folder, hidden=True) if name.endswith(".tmp")]


def until(done: Callable[[], Any], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


# fetching


def fetch(url: str, folder: Path, room: int, file: File) -> None:
    Cache(url, folder, room).fetch(*file)


def in_process(*arguments: Any) -> Any:
    """A process that fetches a file."""
    process = get_context("fork").Process(target=fetch, args=arguments)
    process.start()
    return process


def in_thread(*arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=fetch, args=arguments)
    thread.start()
    return thread


def test_a_file_is_fetched_once_for_all_processes_and_threads(web: Site, tmp_path: Path):
    (file,) = files(web, 1)
    web.faults = lambda path, nth: servers.drip(SIZE // 4, 0.1)
    arguments = web.url, tmp_path / "cache", 10 * SIZE, file
    for one_of_them in [start(*arguments) for start in (in_process, in_thread) for _ in range(3)]:
        one_of_them.join(20)
    assert web.got == {"0.tar": 1}
    path = Cache(web.url, tmp_path / "cache", 10 * SIZE).fetch(*file)
    assert path.read_bytes() == (web.folder / "0.tar").read_bytes()
    assert web.got == {"0.tar": 1}
    assert drafts(tmp_path / "cache") == []


def test_what_is_equal_is_kept_once_and_what_was_replaced_is_fetched_anew(web: Site, tmp_path: Path):
    store = Store(tmp_path / "cache", 10 * SIZE)
    (file,) = files(web, 1)
    (web.folder / "copy").mkdir()
    (web.folder / "copy" / "other.tar").write_bytes((web.folder / "0.tar").read_bytes())
    first = store.of(web.url).fetch(*file)
    assert store.of(f"{web.url}/copy").fetch("other.tar", SIZE, file[2]) == first
    new = b"new" * 100
    (web.folder / "0.tar").write_bytes(new)
    assert store.of(web.url).fetch("0.tar", 300, hashlib.sha256(new).hexdigest()).read_bytes() == new
    assert web.got == {"0.tar": 2}
    first.unlink()
    with pytest.raises(remote.BadSource):  # by an older manifest
        store.of(web.url).fetch(*file)


def test_what_was_used_longest_ago_makes_room(web: Site, tmp_path: Path):
    store = Store(tmp_path / "cache", int(3.5 * SIZE)).of(web.url)
    made = files(web, 5)
    handle = store.fetch(*made[1]).open("rb")
    for number in (0, 2, 0, 3, 0, 4):  # 0 is in use all the time, and 1 is open
        time.sleep(0.02)
        store.fetch(*made[number])
        assert sum(held(tmp_path / "cache").values()) <= store.room
    assert set(held(tmp_path / "cache")) == {f"{made[number][2]}.tar" for number in (0, 3, 4)}
    assert web.got == {f"{number}.tar": 1 for number in range(5)}
    with handle:
        assert handle.read() == (web.folder / "1.tar").read_bytes()


def test_a_file_that_can_never_fit_is_refused(web: Site, tmp_path: Path):
    (file,) = files(web, 1)
    line = refused(lambda: Cache(web.url, tmp_path / "cache", SIZE - 1).fetch(*file), DISK)
    assert "cache_gb" in line
    assert web.got == {}


def most(folder: Path, work: list[threading.Thread]) -> int:
    """The most bytes that the cache holds while threads work, drafts included."""
    seen = [0]
    while any(thread.is_alive() for thread in work):
        if folder.exists():
            seen.append(sum(held(folder, hidden=True).values()))
        time.sleep(0.002)
    return max(seen)


def test_the_cap_holds_with_many_downloads_at_once(web: Site, tmp_path: Path):
    made = files(web, 8)
    room = int(2.5 * SIZE)
    web.faults = lambda path, nth: servers.drip(SIZE // 5, 0.03)
    work = [in_thread(web.url, tmp_path / "cache", room, file) for file in made]
    assert most(tmp_path / "cache", work) <= room + 1000  # some bytes are notes in the locks
    assert web.got == {name: 1 for name, _, _ in made}


def test_the_cap_holds_for_files_of_unknown_size(web: Site, tmp_path: Path):
    """Tars for webdataset: nothing but their names is known."""
    room = int(2.5 * SIZE)
    for name, _, _ in files(web, 4):
        Cache(web.url, tmp_path / "cache", room).fetch(name, None, "")
        assert sum(held(tmp_path / "cache").values()) <= room
    (web.folder / "large.tar").write_bytes(bytes(room + 1))
    refused(lambda: Cache(web.url, tmp_path / "cache", room).fetch("large.tar", None, ""), DISK)


def test_stale_drafts_are_removed_and_others_left(web: Site, tmp_path: Path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in (("old", 2 * cache.STALE), ("young", 1.0)):
        (folder / f".{name}.tar.abc.tmp").write_bytes(bytes(100))
        os.utime(folder / f".{name}.tar.abc.tmp", (time.time() - age, time.time() - age))
    fetch(web.url, folder, 10 * SIZE, files(web, 1)[0])
    assert drafts(folder) == [".young.tar.abc.tmp"]


def test_the_draft_of_a_killed_process_goes_with_the_next_fetch(web: Site, tmp_path: Path):
    """Else a training that is restarted again and again fills the disk beyond the cap."""
    folder = tmp_path / "cache"
    (file,) = files(web, 1)
    web.faults = lambda path, nth: servers.drip(SIZE // 10, 0.1) if nth == 0 else None
    process = in_process(web.url, folder, 10 * SIZE, file)
    until(lambda: folder.exists() and drafts(folder))
    process.kill()
    process.join()
    fetch(web.url, folder, 10 * SIZE, file)
    assert drafts(folder) == []


def test_a_try_that_was_given_up_writes_nothing_later(web: Site, tmp_path: Path):
    """As behind a slow redirect; the draft would be whole, and nobody's."""
    files(web, 1)

    def slow(path: str, nth: int) -> servers.Answer:
        del nth
        if path == "0.tar":
            return servers.late(0.3)

        def answer(handler: servers.Handler, data: bytes) -> None:
            time.sleep(0.4)
            servers.redirect("/0.tar")(handler, data)

        return answer

    web.faults = slow
    with pytest.raises(Refusal):
        remote.get(f"{web.url}/old.tar", tmp_path / "cache" / "x")
    time.sleep(1)
    assert contents(tmp_path / "cache") == {}


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_cached_file_that_is_short_is_fetched_again(web: Site, tmp_path: Path, damage: str):
    """As after a loss of power: it had its name, and not yet its bytes."""
    (file,) = files(web, 1)
    store = Cache(web.url, tmp_path / "cache", 10 * SIZE)
    os.truncate(store.fetch(*file), SIZE // 2 if damage == "cut" else 0)
    assert store.fetch(*file).read_bytes() == (web.folder / "0.tar").read_bytes()


def test_a_folder_that_cannot_be_made_is_refused(web: Site, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    line = refused(lambda: fetch(web.url, tmp_path / "file" / "cache", 10 * SIZE, files(web, 1)[0]), CANNOT_CREATE)
    assert "data.cache" in line


def test_a_failure_leaves_nothing_and_the_next_fetch_is_good(web: Site, tmp_path: Path):
    (file,) = files(web, 1)
    store = Cache(web.url, tmp_path / "cache", 10 * SIZE)
    for fault in (servers.cut(100), servers.status(503), servers.lying(5)):
        web.faults = lambda path, nth, fault=fault: fault
        refused(lambda: store.fetch(*file), DISK)
    web.faults = lambda path, nth: servers.other(lambda data: data[::-1])
    with pytest.raises(remote.BadSource):
        store.fetch(*file)
    assert held(tmp_path / "cache") == {}
    assert drafts(tmp_path / "cache") == []
    web.faults = lambda path, nth: None
    store.fetch(*file)


def test_those_who_waited_for_a_source_that_is_away_end_with_the_first(
    web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a node's workers end one after the other, each after minutes, and the other nodes wait in a reduction."""
    servers.hurry(monkeypatch, tries=2, patience=0.3)
    (file,) = files(web, 1)
    web.faults = lambda path, nth: servers.late(2)
    ends: list[float] = []

    def fails() -> None:
        with pytest.raises(Refusal):
            fetch(web.url, tmp_path / "cache", 10 * SIZE, file)
        ends.append(time.monotonic())

    began, threads = time.monotonic(), [threading.Thread(target=fails) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 4
    assert max(ends) - began < 1.6  # one takes 0.6


# the process that fetches ahead


def wanted(url: str, folder: Path, file: File) -> Wanted:
    return Wanted(url, str(folder), 10 * SIZE, *file)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[int]:
    """Of this process, zombies included."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def dies_with_a_fetcher(url: str, folder: Path, file: File, pipe: Any) -> None:
    ahead = Ahead()
    ahead.fetch(wanted(url, folder, file))
    pipe.send(ahead._process.pid)
    time.sleep(60)


def test_the_fetcher_works_and_ends_with_its_parent(web: Site, tmp_path: Path):
    """Though the parent was killed, and a download is under way."""
    files(web, 2)
    web.faults = lambda path, nth: servers.drip(100, 0.05)
    here, there = get_context("fork").Pipe()
    file = "0.tar", SIZE, hashlib.sha256((web.folder / "0.tar").read_bytes()).hexdigest()
    process = get_context("fork").Process(target=dies_with_a_fetcher, args=(web.url, tmp_path / "cache", file, there))
    process.start()
    pid = here.recv()
    until(lambda: web.got["0.tar"])
    assert alive(pid)
    process.kill()
    process.join()
    until(lambda: not alive(pid), limit=5)


def test_the_fetcher_leaves_signals_to_its_parent(web: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Ctrl-C reaches every process of a terminal; the training says what there is to say."""
    first, second = files(web, 2)
    before = children()
    ahead = Ahead()
    ahead.fetch(wanted(web.url, tmp_path / "cache", first))
    until(lambda: held(tmp_path / "cache") if (tmp_path / "cache").exists() else None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(ahead._process.pid, number)
    ahead.fetch(wanted(web.url, tmp_path / "cache", second))
    try:
        until(lambda: len(held(tmp_path / "cache")) == 2, limit=3)
    finally:
        ahead.close()
        assert children() <= before  # no zombie
    assert capfd.readouterr().err == ""


def test_a_fetcher_that_died_is_no_harm(web: Site, tmp_path: Path):
    before = children()
    ahead = Ahead()
    ahead._process.kill()
    ahead._process.wait()
    for file in files(web, 3):
        ahead.fetch(wanted(web.url, tmp_path / "cache", file))
    ahead.close()
    assert children() <= before


# streams


class Idle(Ahead):
    """In place of the process that fetches ahead, where a test is not about it."""

    def __init__(self) -> None:
        pass

    def fetch(self, wanted: Wanted) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "Ahead", Idle)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """315 images in 80 shards."""
    folder = tmp_path_factory.mktemp("disk")
    write_pictures(folder / "in", [f"{c}/{i:03d}.jpg" for c in "abc" for i in range(105)])
    one(folder / "in", folder / "out", shard_samples=4, workers=2)
    return folder / "out"


@pytest.fixture
def site(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The shards on the web."""
    servers.hurry(monkeypatch)
    with servers.site(disk) as made:
        yield made


def at(url: str, folder: Path, room: int = 10**9) -> Manifest:
    return find.sets((url,), "train", folder / "converted", Store(folder / "cache", room))


def options(**more: Any) -> Data:
    return Data(**{"image_size": 16, "workers": 0, "lanes": 4, "window": 1, **more})


def digest(batches: list[Batch]) -> str:
    """Of all pixels, labels, seeds and flags, in their order."""
    names = ("image", "label", "seed", "valid")
    parts = [torch.cat([batch[name] for batch in batches]).numpy().tobytes() for name in names]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def trained(made: Manifest, steps: int = 25, first: int = 0, **more: Any) -> list[Batch]:
    stream = TrainingStream(made, options(**more), seed=5, batch=16)
    batches = list(itertools.islice(stream.batches(first * 16, Share(0, 1, 8), CPU), 2 * steps))
    assert stream.faults.fresh == []
    assert stream.faults.fatal is None
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_the_web_is_that_from_the_disk(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    here = manifest.load(disk)
    far = at(site.url, tmp_path)
    assert digest(trained(far, workers=workers)) == digest(trained(here))
    assert all(site.got[shard.name] == 1 for shard in here.shards)
    assert digest(trained(at(site.url, tmp_path), first=7, workers=workers)) == digest(trained(here, first=7))
    assert all(site.got[shard.name] == 1 for shard in here.shards)
    judge = lambda made: EvaluationStream(made, options(workers=workers), 32).batches(Share(), CPU)  # noqa: E731
    assert digest(list(judge(far))) == digest(list(judge(here)))


def test_a_stream_from_s3_and_from_both_is_that_from_the_disk(tmp_path: Path, alone: None):
    write_pictures(tmp_path / "in", [f"{c}/{i}.png" for c in "ab" for i in range(12)])
    make(tmp_path / "in", tmp_path / "disk", shard_samples=4, val_fraction=0.3)
    with servers.s3() as (buckets, environment), servers.at_s3(environment, tmp_path / "home"):
        url = f"{buckets.bucket()}/deep/below"
        buckets.upload(tmp_path / "disk", url)
        store = Store(tmp_path / "cache")
        here = find.sets((str(tmp_path / "disk"),), "train", tmp_path, store)
        far = find.sets((url,), "train", tmp_path, store)
        far.check()
        assert digest(trained(far, 4, workers=2, lanes=2)) == digest(trained(here, 4, lanes=2))
        both = (str(tmp_path / "disk"), url)
        twice = [find.sets(given, "train", tmp_path, store) for given in (both, (both[0],) * 2)]
        assert digest(trained(twice[0], 4, lanes=2)) == digest(trained(twice[1], 4, lanes=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_set_is_enough(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    far = at(site.url, tmp_path, room=8 * size)
    assert digest(trained(far, 40, workers=workers)) == digest(trained(manifest.load(disk), 40))
    assert sum(held(tmp_path / "cache").values()) <= 8 * size


def test_what_was_deleted_is_not_kept_by_open_files(disk: Path, site: Site, tmp_path: Path, alone: None):
    """The cap is for the disk: a deleted file takes its room until the last process closes it."""
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    room = 8 * size
    stream = TrainingStream(at(site.url, tmp_path, room), options(), seed=5, batch=16)
    batches = stream.batches(0, Share(0, 1, 16), CPU)
    for _ in range(20):
        next(batches)
    deleted = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "(deleted)" in os.readlink(entry) and str(tmp_path) in os.readlink(entry):
                deleted += entry.stat().st_size
        except OSError:
            continue
    in_use = 4 * 2 * size  # lanes, each through a window of one shard, which may lie across two
    assert deleted + sum(held(tmp_path / "cache").values()) <= room + in_use


def snatched(monkeypatch: pytest.MonkeyPatch, suffix: str) -> list[Path]:
    """Have the first file of a kind evicted by another process before this one opens it."""
    fetch, gone = Cache.fetch, list[Path]()

    def fetched(self: Cache, name: str, size: int | None, sha256: str, **more: bool) -> Path:
        path = fetch(self, name, size, sha256, **more)
        if path.suffix == suffix and not gone:
            gone.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", fetched)
    return gone


@pytest.mark.parametrize(
    "suffix",
    [
        ".tar",
        ".npy",
    ],
)
def test_what_another_process_evicts_too_early_is_fetched_again(
    disk: Path, site: Site, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    far = at(site.url, tmp_path)
    gone = snatched(monkeypatch, suffix)
    assert digest(trained(far, 4)) == digest(trained(manifest.load(disk), 4))
    assert gone


@pytest.mark.parametrize("said", ["", "x", "../../../../etc/passwd", "00000000/../../outside", "Z" * 64, "0" * 63])
def test_a_manifest_with_other_digests_is_none(disk: Path, tmp_path: Path, said: str):
    """They become names of files, and an empty one would mean that nothing is compared."""
    text = json.loads((disk / "manifest.json").read_bytes())
    text["shards"][0]["sha256"] = said
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text(json.dumps(text))
    with servers.site(tmp_path / "web") as site:
        refused(lambda: at(site.url, tmp_path), DATA)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_goes_away_ends_the_stream(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    far = at(site.url, tmp_path)
    asked = lambda: sum(count for name, count in site.got.items() if name.endswith(".tar"))  # noqa: E731
    site.faults = lambda path, nth: servers.gone if path.endswith(".tar") and asked() > 12 else None
    stream = TrainingStream(far, options(workers=workers), seed=5, batch=16)
    batches = stream.batches(0, Share(0, 1, 8), CPU)
    good = list(itertools.takewhile(lambda batch: stream.faults.fatal is None, itertools.islice(batches, 40)))
    assert 0 < len(good) < 40
    assert all(batch["valid"].all() for batch in good)
    assert stream.faults.fresh == []  # none of it is a bad sample
    assert stream.faults.fatal is not None
    assert stream.faults.fatal.code == DISK
    assert site.url in str(stream.faults.fatal)
    began = time.monotonic()
    assert not any(next(batches)["valid"].any() for _ in range(50))  # until all processes stop in one step
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("fault", ["altered", "gone"])
def test_a_bad_object_is_bad_samples_and_no_end(disk: Path, site: Site, tmp_path: Path, alone: None, fault: str):
    here, far = manifest.load(disk), at(site.url, tmp_path)
    row = here.index(7)[1]

    def altered(data: bytes) -> bytes:
        place = int(row["offset"]) + int(row["size"]) // 2
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    answer = servers.other(altered) if fault == "altered" else servers.status(404)
    site.faults = lambda path, nth: answer if path == here.shards[7].name else None
    stream = TrainingStream(far, options(), seed=5, batch=16)
    good = TrainingStream(here, options(), seed=5, batch=16)
    bad = []
    for batch, whole in zip(
        itertools.islice(stream.batches(0, Share(0, 1, 16), CPU), 19),
        good.batches(0, Share(0, 1, 16), CPU),
        strict=False,
    ):
        faults = stream.faults.take()
        bad += faults
        same = [slot for slot in range(16) if slot not in {found.slot for found in faults}]
        assert torch.equal(batch["image"][same], whole["image"][same])
        assert torch.equal(batch["seed"], whole["seed"])
        assert batch["valid"].all()
    assert stream.faults.fatal is None
    own = range(*(int(start) for start in here.starts[7:9]))
    assert 0 < len(bad) <= len(own)
    assert {found.sample for found in bad} <= set(own)
    assert all(f"{site.url}/{here.shards[7].name}" in found.reason for found in bad)
    assert far.altered(7) is not None  # as verify_shards full=true finds it


def test_one_altered_byte_at_the_source_costs_one_sample(disk: Path, site: Site, tmp_path: Path, alone: None):
    """As it does on disk, where the checksum of each sample tells."""
    here, far = manifest.load(disk), at(site.url, tmp_path)
    row = here.index(7)[1]
    place = int(row["offset"]) + int(row["size"]) // 2
    change = servers.other(lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    site.faults = lambda path, nth: change if path == here.shards[7].name else None
    start = int(here.starts[7])
    _, faults = Samples(far, options(), 0, training=False).batch([(0, start + number) for number in range(4)])
    assert [fault.slot for fault in faults] == [1]


def test_a_stream_that_is_closed_leaves_no_process(disk: Path, site: Site, tmp_path: Path):
    before = children()
    stream = TrainingStream(at(site.url, tmp_path), options(workers=1), seed=5, batch=16)
    batches = stream.batches(0, Share(0, 1, 16), CPU)
    next(batches)
    assert len(children() - before) == 2  # a worker, and the process that fetches ahead
    batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()
    until(lambda: children() <= before)


# nodes


def shards_of(stream: TrainingStream, steps: range, rank: int) -> set[int]:
    """The shards that a node needs for some steps, by the plan alone."""
    starts = stream.samples.manifest.starts
    ids = [sample for step in steps for _, sample in stream.plan.batch(step, rank, 2)]
    return set((np.searchsorted(starts, ids, side="right") - 1).tolist())


@pytest.mark.parametrize(
    ("share", "plan"),
    [
        (2.0, {"lanes": 4, "window": 1}),
        (0.3, {"lanes": 4, "window": 1}),
        (2.0, {"lanes": 16, "window": 4}),
    ],
)
def test_two_nodes_fetch_the_set_once_an_epoch(
    disk: Path,
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    plan: dict[str, int],
):
    """All of it ahead of its use, by the process that is there for it; with much room, and with little.

    The last case is the default plan.
    """
    here = manifest.load(disk)
    size = sum(shard.bytes for shard in here.shards)
    mine = []  # what the training processes had to fetch themselves
    get = remote.get
    monkeypatch.setattr(remote, "get", lambda *arguments: (mine.append(arguments[0]), get(*arguments)))
    nodes = []
    for rank in range(2):
        far = at(site.url, tmp_path / str(rank), room=int(share * size))
        stream = TrainingStream(far, options(**plan), seed=5, batch=16)
        nodes.append((stream, stream.batches(0, Share(rank, 2, 8), CPU), tmp_path / str(rank) / "cache"))
    steps = here.samples // 16
    batches: list[list[Batch]] = [[], []]
    own = 0  # of the first step's, which nobody could fetch ahead
    for step in range(steps):
        for rank, (stream, made, folder) in enumerate(nodes):
            own = len(mine) if step == 1 and rank == 0 else own
            if step:
                coming = [here.shards[shard] for shard in shards_of(stream, range(step, step + 1), rank)]
                needed = {f"{shard.sha256}.tar" for shard in coming} | {f"{s.index_sha256}.npy" for s in coming}
                until(lambda needed=needed, folder=folder: needed <= set(held(folder)))
            batches[rank].append(next(made))
    assert len(mine) == own
    for _, made, _ in nodes:
        made.close()  # type: ignore[attr-defined]
    good = TrainingStream(here, options(**plan), seed=5, batch=16)
    for rank in range(2):
        alone = itertools.islice(good.batches(0, Share(rank, 2, 8), CPU), steps)
        assert digest(batches[rank]) == digest(list(alone))
    assert site.bytes() <= 1.1 * size
    assert sum(held(tmp_path / "0" / "cache").values()) <= share * size


# a training


def rows(run: Path) -> list[tuple[int, str, int]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["samples_digest"], row["bad_samples"]) for row in found]


HASTY = """
import runpy, sys
from ssl_vit.data import remote
remote.PAUSE = 0.01
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_training_stops_when_its_source_goes_away_and_goes_on_when_it_is_back(disk: Path, site: Site, tmp_path: Path):
    keys = [*TINY, "data.lanes=1", "data.window=1", "steps=12", "log_every=3", "save_every=3", "tracker=none"]
    far = [*keys, f"data.train={site.url}", f"data.cache={tmp_path / 'cache'}", f"run={tmp_path / 'far'}"]

    def pretrain() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HASTY, "tools/pretrain.py", *far]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
        )

    def away(path: str, nth: int) -> servers.Answer | None:
        known = [name for name, count in site.got.items() if name.endswith(".tar") and count]
        return servers.gone if path in known[14:] else None  # the first questions for sizes are answered

    site.faults = away
    stopped = pretrain()
    assert stopped.returncode == DISK, stopped.stderr
    (line,) = stopped.stderr.strip().splitlines()
    assert line.startswith(f"pretrain.py: {site.url}/")
    assert "the same command goes on" in line
    end = json.loads((tmp_path / "far" / "exit.json").read_text())
    assert end["code"] == DISK
    assert 0 < end["step"] < 12
    site.faults = lambda path, nth: None
    done = pretrain()
    assert done.returncode == 0, done.stderr
    near = [*keys, f"data.train={disk}", f"run={tmp_path / 'near'}"]
    assert session.run(config.parse(recipe.Pretrain, near, recipe.FOLDER)) == 0
    assert rows(tmp_path / "far") == rows(tmp_path / "near")
    assert len(rows(tmp_path / "near")) == 4
