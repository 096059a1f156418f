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
from ssl_vit.data.cache import Cache, CacheDir, FetchRequest, Prefetcher
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import EvaluationStream, ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch
from tests.conftest import TINY
from tests.data import servers
from tests.data.pictures import build_shards, build_splits, contents, write_pictures
from tests.data.servers import CLOSED_CONNECTION, Answer, Buckets, Site, assert_refused
from tests.processes import call_tool
from tests.tiny_runs import metric_rows, read_exit

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than a small machine has
]
CPU, PROCESS = torch.device("cpu"), pytest.mark.process
SIZE = 20_000
PLAN: Any = {"lanes": 4, "shuffle_window": 1}
SHARES = [
    (2.0, {"lanes": 16, "shuffle_window": 4}),
    *(pytest.param(share, PLAN, marks=PROCESS) for share in (2.0, 0.3)),
]
File = tuple[str, int, str]  # name, size and digest


@pytest.fixture
def store(web: Site, tmp_path: Path) -> Cache:
    """With room for ten files."""
    return Cache(web.url, tmp_path / "cache", 10 * SIZE)


def publish_files(web: Site, count: int) -> list[File]:
    """Files on the web."""
    data_by_name = {f"{number}.tar": np.random.default_rng(number).bytes(SIZE) for number in range(count)}
    for name, data in data_by_name.items():
        (web.folder / name).write_bytes(data)
    return [(name, SIZE, hashlib.sha256(data).hexdigest()) for name, data in data_by_name.items()]


def cached_files(folder: Path, hidden: bool = False) -> dict[str, int]:
    """Name -> bytes of what the cache holds; `hidden`: of drafts and locks, too."""
    sizes = {}
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            sizes |= {path.name: path.stat().st_size} if hidden or not path.name.startswith(".") else {}
    return sizes


def draft_names(folder: Path) -> list[str]:
    return [name for name in cached_files(folder, hidden=True) if name.endswith(".tmp")]


def wait_until(done: Callable[[], Any], limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


fork = get_context("fork").Process


def start(kind: Any, work: Callable[..., Any], *arguments: Any) -> Any:
    """A thread or a process that does this."""
    worker = kind(target=work, args=arguments)
    worker.start()
    return worker


def test_a_file_is_fetched_once_for_all_processes_and_threads(web: Site, store: Cache):
    (file,) = publish_files(web, 1)
    web.faults = lambda path, nth: Answer(drip=(SIZE // 4, 0.1))
    for worker in [start(kind, store.fetch, *file) for kind in (fork, Thread) for _ in range(3)]:
        worker.join(20)
    assert store.fetch(*file).read_bytes() == (web.folder / "0.tar").read_bytes()
    assert web.get_counts == {"0.tar": 1}
    assert draft_names(store.folder) == []


def test_what_is_equal_is_kept_once_and_what_was_replaced_is_fetched_anew(web: Site, store: Cache):
    (file,) = publish_files(web, 1)
    (web.folder / "copy").mkdir()
    (web.folder / "copy" / "other.tar").write_bytes((web.folder / "0.tar").read_bytes())
    first = store.fetch(*file)
    assert replace(store, url=f"{web.url}/copy").fetch("other.tar", SIZE, file[2]) == first
    new = b"new" * 100
    (web.folder / "0.tar").write_bytes(new)
    assert store.fetch("0.tar", 300, hashlib.sha256(new).hexdigest()).read_bytes() == new
    assert web.get_counts == {"0.tar": 2}
    first.unlink()
    with pytest.raises(remote.RemoteMismatch):  # by an older manifest
        store.fetch(*file)


def test_what_was_used_longest_ago_makes_room(web: Site, store: Cache):
    store, files = replace(store, max_bytes=int(3.5 * SIZE)), publish_files(web, 5)
    handle = store.fetch(*files[1]).open("rb")
    for number in (0, 2, 0, 3, 0, 4):  # 0 is in use all the time, and 1 is open
        time.sleep(0.02)
        store.fetch(*files[number])
        assert sum(cached_files(store.folder).values()) <= store.max_bytes
    assert set(cached_files(store.folder)) == {f"{files[number][2]}.tar" for number in (0, 3, 4)}
    assert web.get_counts == {f"{number}.tar": 1 for number in range(5)}
    with handle:
        assert handle.read() == (web.folder / "1.tar").read_bytes()


def test_the_cap_holds_with_many_downloads_at_once(web: Site, store: Cache):
    """Drafts included, and some bytes of notes in the locks."""
    store, files, peak = replace(store, max_bytes=int(2.5 * SIZE)), publish_files(web, 8), 0
    web.faults = lambda path, nth: Answer(drip=(SIZE // 5, 0.03))
    threads = [start(Thread, store.fetch, *file) for file in files]
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, sum(cached_files(store.folder, hidden=True).values()))
        time.sleep(0.002)
    assert 0 < peak <= store.max_bytes + 1000
    assert web.get_counts == {name: 1 for name, _, _ in files}


def test_the_cap_holds_for_files_of_unknown_size_and_what_can_never_fit_is_refused(web: Site, store: Cache):
    """Tars for webdataset: nothing but their names is known."""
    store = replace(store, max_bytes=int(2.5 * SIZE))
    for name, _, _ in publish_files(web, 4):
        store.fetch(name, None, "")
        assert sum(cached_files(store.folder).values()) <= store.max_bytes
    (web.folder / "large.tar").write_bytes(bytes(store.max_bytes + 1))
    for size, sha256 in ((None, ""), (store.max_bytes + 1, "0" * 64)):
        assert "cache_gb" in assert_refused(
            lambda size=size, sha256=sha256: store.fetch("large.tar", size, sha256), ExitCode.DISK
        )
    assert web.get_counts["large.tar"] == 0


def test_stale_drafts_and_those_of_a_killed_process_go_with_the_next_fetch(web: Site, store: Cache):
    """Else a training that is restarted again and again fills the disk beyond the cap."""
    (file,) = publish_files(web, 1)
    web.faults = lambda path, nth: None if nth else Answer(drip=(SIZE // 10, 0.1))
    process = start(fork, store.fetch, *file)
    wait_until(lambda: draft_names(store.folder))
    process.kill()
    process.join()
    for name, age in (("old", 2 * cache.STALE_SECONDS), ("young", 1.0)):
        (store.folder / f".{name}.tar.abc.tmp").write_bytes(bytes(100))
        os.utime(store.folder / f".{name}.tar.abc.tmp", (time.time() - age, time.time() - age))
    store.fetch(*file)
    assert draft_names(store.folder) == [".young.tar.abc.tmp"]


def test_a_try_that_was_given_up_writes_nothing_later(web: Site, store: Cache, monkeypatch: pytest.MonkeyPatch):
    """As behind a slow redirect; the draft would be whole, and nobody's."""
    servers.shorten_timeouts(monkeypatch)
    publish_files(web, 1)
    web.faults = lambda path, nth: Answer(delay=0.3) if path == "0.tar" else Answer(302, delay=0.4, location="/0.tar")
    with pytest.raises(ExitError):
        remote.download(f"{web.url}/old.tar", store.folder / "x")
    time.sleep(1)
    assert contents(store.folder) == {}


def test_a_failure_leaves_nothing_and_the_next_fetch_is_good(web: Site, store: Cache):
    """Also a cached file that is short, as after a loss of power: it had its name, and not yet its bytes."""
    (file,) = publish_files(web, 1)
    for fault in (Answer(cut=100), Answer(503), Answer(extra_length=5)):
        web.faults = lambda path, nth, fault=fault: fault
        assert_refused(lambda: store.fetch(*file), ExitCode.DISK)
    web.faults = lambda path, nth: Answer(change=lambda data: data[::-1])
    with pytest.raises(remote.RemoteMismatch):
        store.fetch(*file)
    assert (cached_files(store.folder), draft_names(store.folder)) == ({}, [])
    web.faults = lambda path, nth: None
    for size in (SIZE // 2, 0):
        os.truncate(store.fetch(*file), size)
        assert store.fetch(*file).read_bytes() == (web.folder / "0.tar").read_bytes()
    elsewhere = replace(store, folder=store.fetch(*file) / "cache")
    assert "data.cache" in assert_refused(lambda: elsewhere.fetch(*file), ExitCode.CANNOT_CREATE)


def test_those_who_waited_for_a_dead_source_end_with_the_first(
    web: Site, store: Cache, monkeypatch: pytest.MonkeyPatch
):
    """Else a node's workers end one after the other, each after minutes, and the other nodes wait in a reduction."""
    servers.shorten_timeouts(monkeypatch, tries=2, patience=0.3)
    (file,) = publish_files(web, 1)
    web.faults = lambda path, nth: Answer(delay=2)
    num_requests: list[int] = []

    def fails() -> None:
        assert_refused(lambda: store.fetch(*file), ExitCode.DISK)
        num_requests.append(web.get_counts["0.tar"])

    for thread in [start(Thread, fails) for _ in range(4)]:
        thread.join()
    assert num_requests == [2] * 4  # the tries of the first


def fetch_request(store: Cache, file: File) -> FetchRequest:
    return FetchRequest(store.url, str(store.folder), store.max_bytes, *file)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def child_pids() -> set[int]:
    """Of this process, zombies included."""
    return {process.pid for process in psutil.Process().children()}


def test_the_fetcher_works_and_ends_with_its_parent(web: Site, store: Cache):
    """Though the parent was killed, and a download is under way."""
    (file,) = publish_files(web, 1)
    web.faults = lambda path, nth: Answer(drip=(100, 0.05))
    receiver, sender = get_context("fork").Pipe()

    def start_prefetcher() -> None:
        prefetcher = Prefetcher()
        prefetcher.fetch(fetch_request(store, file))
        sender.send(prefetcher._process.pid)
        signal.pause()

    process = start(fork, start_prefetcher)
    pid = receiver.recv()
    wait_until(lambda: web.get_counts["0.tar"])
    assert is_alive(pid)
    process.kill()
    process.join()
    wait_until(lambda: not is_alive(pid), limit=5)


@pytest.mark.parametrize("dead", [False, pytest.param(True, marks=PROCESS)])
def test_the_fetcher_leaves_signals_to_its_parent_and_its_death_is_no_harm(
    web: Site, store: Cache, capfd: pytest.CaptureFixture[str], dead: bool
):
    """Ctrl-C reaches every process of a terminal; the training says what there is to say."""
    first, second = publish_files(web, 2)
    before, prefetcher = child_pids(), Prefetcher()
    if dead:
        prefetcher._process.kill()
        prefetcher._process.wait()
    prefetcher.fetch(fetch_request(store, first))
    wait_until(lambda: dead or cached_files(store.folder))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        prefetcher._process.send_signal(number)
    prefetcher.fetch(fetch_request(store, second))
    try:
        wait_until(lambda: dead or len(cached_files(store.folder)) == 2)
    finally:
        prefetcher.close()
        assert child_pids() <= before  # no zombie
    assert capfd.readouterr().err == ""


class IdlePrefetcher(Prefetcher):
    """In place of the process that fetches ahead, where a test is not about it."""

    __init__ = fetch = close = lambda self, *_: None  # type: ignore[assignment]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "Prefetcher", IdlePrefetcher)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """159 images in 40 shards."""
    folder = tmp_path_factory.mktemp("disk")
    write_pictures(folder / "in", [f"{c}/{i:03d}.jpg" for c in "abc" for i in range(53)])
    build_shards(folder / "in", folder / "out", shard_samples=4, workers=2)
    return folder / "out"


@pytest.fixture
def site(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The shards on the web."""
    servers.shorten_timeouts(monkeypatch, patience=10)
    with servers.serve_folder(disk) as server:
        yield server


def resolve_url(url: str, folder: Path, room: int = 10**9) -> Manifest:
    return resolve.resolve_manifest((url,), "train", folder / "converted", CacheDir(folder / "cache", room))


def make_stream(dataset: Manifest, **overrides: Any) -> TrainingStream:
    options = Data(**{"image_size": 16, "workers": 0, **PLAN, **overrides})
    return TrainingStream(dataset, options, seed=5, batch=16)


def batch_digest(batches: Iterable[Batch]) -> str:
    """Of all pixels, labels, seeds and flags, in their order."""
    parts = [[batch[name] for name in ("image", "label", "seed", "valid")] for batch in batches]
    joined = (torch.cat(part).numpy().tobytes() for part in zip(*parts, strict=True))
    return hashlib.sha256(b"".join(joined)).hexdigest()


def training_digest(dataset: Manifest, steps: int = 25, first: int = 0, **overrides: Any) -> str:
    """The digest of some steps, of which no sample is bad."""
    stream = make_stream(dataset, **overrides)
    result = batch_digest(itertools.islice(stream.batches(first * 16, ProcessShard(0, 1, 8), CPU), 2 * steps))
    assert (stream.faults.pending, stream.faults.fatal) == ([], None)
    return result


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_the_web_is_that_from_the_disk(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    """In training, from any step on, and in evaluation; each shard comes once."""
    local_dataset, remote_dataset = manifest.load(disk), resolve_url(site.url, tmp_path)
    for dataset, first in ((remote_dataset, 0), (resolve_url(site.url, tmp_path), 7)):
        assert training_digest(dataset, first=first, workers=workers) == training_digest(local_dataset, first=first)
        assert all(site.get_counts[shard.name] == 1 for shard in local_dataset.shards)
    options = Data(image_size=16, workers=workers)
    evaluation_digests = [
        batch_digest(EvaluationStream(dataset, options, 32).batches(ProcessShard(), CPU))
        for dataset in (remote_dataset, local_dataset)
    ]
    assert evaluation_digests[0] == evaluation_digests[1]


def test_a_stream_from_s3_and_from_both_is_that_from_the_disk(buckets: Buckets, tmp_path: Path, alone: None):
    write_pictures(tmp_path / "in", [f"{c}/{i}.png" for c in "ab" for i in range(12)])
    build_splits(tmp_path / "in", tmp_path / "disk", shard_samples=4, val_fraction=0.3)
    disk, url = str(tmp_path / "disk"), f"{buckets.bucket()}/deep/below"
    buckets.upload(tmp_path / "disk", url)
    sources = [(disk,), (url,), (disk, disk), (disk, url)]
    local_dataset, remote_dataset, twice, mixed = (
        resolve.resolve_manifest(source, "train", tmp_path, CacheDir(tmp_path / "cache")) for source in sources
    )
    remote_dataset.check_shards()
    assert training_digest(remote_dataset, 4, workers=2, lanes=2) == training_digest(local_dataset, 4, lanes=2)
    assert training_digest(mixed, 4, lanes=2) == training_digest(twice, 4, lanes=2)


def test_a_cache_smaller_than_the_set_is_enough_for_several_workers(
    disk: Path, site: Site, tmp_path: Path, alone: None
):
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    assert training_digest(resolve_url(site.url, tmp_path, 8 * size), 20, workers=2) == training_digest(
        manifest.load(disk), 20
    )
    assert sum(cached_files(tmp_path / "cache").values()) <= 8 * size


def test_a_cache_smaller_than_the_set_is_enough(disk: Path, site: Site, tmp_path: Path, alone: None):
    """The cap is for the disk: a deleted file takes its room until the last process closes it, which is soon."""
    size = max(shard.bytes for shard in manifest.load(disk).shards)
    batches = make_stream(resolve_url(site.url, tmp_path, 8 * size)).batches(0, ProcessShard(0, 1, 16), CPU)
    local_batches = make_stream(manifest.load(disk)).batches(0, ProcessShard(0, 1, 16), CPU)
    for batch, expected in itertools.islice(zip(batches, local_batches, strict=True), 20):
        assert batch_digest([batch]) == batch_digest([expected])
    num_bytes = sum(cached_files(tmp_path / "cache").values())
    assert num_bytes <= 8 * size
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(entry)
            num_bytes += entry.stat().st_size if "(deleted)" in target and str(tmp_path) in target else 0
    assert (
        num_bytes <= (8 + 4 * 2) * size
    )  # in use: lanes, each through a window of one shard, which may lie across two


@pytest.mark.parametrize("suffix", [".tar", ".npy"])
def test_what_another_process_evicts_too_early_is_fetched_again(
    disk: Path, site: Site, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    """The first file of a kind goes before this process opens it."""
    fetch, evicted = Cache.fetch, list[Path]()

    def fetch_and_evict(*arguments: Any, **options: bool) -> Path:
        path = fetch(*arguments, **options)
        if path.suffix == suffix and not evicted:
            evicted.append(path)
            path.unlink()
        return path

    monkeypatch.setattr(Cache, "fetch", fetch_and_evict)
    assert training_digest(resolve_url(site.url, tmp_path), 4) == training_digest(manifest.load(disk), 4)
    assert evicted


@pytest.mark.parametrize("said", ["", "x", "../../../../etc/passwd", "00000000/../../outside", "Z" * 64, "0" * 63])
def test_a_manifest_with_other_digests_is_none(disk: Path, web: Site, tmp_path: Path, said: str):
    """They become names of files, and an empty one would mean that nothing is compared."""
    fields = json.loads((disk / "manifest.json").read_bytes())
    fields["shards"][0]["sha256"] = said
    (web.folder / "manifest.json").write_text(json.dumps(fields))
    assert_refused(lambda: resolve_url(web.url, tmp_path), ExitCode.DATA)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_goes_away_ends_the_stream(disk: Path, site: Site, tmp_path: Path, alone: None, workers: int):
    stream = make_stream(resolve_url(site.url, tmp_path), workers=workers)
    site.faults = lambda path, nth: (
        CLOSED_CONNECTION if path.endswith(".tar") and site.count(site.get_counts) > 12 else None
    )
    batches = stream.batches(0, ProcessShard(0, 1, 8), CPU)
    good = list(itertools.takewhile(lambda batch: stream.faults.fatal is None, itertools.islice(batches, 40)))
    assert 0 < len(good) < 40
    assert all(batch["valid"].all() for batch in good)
    assert stream.faults.pending == []  # none of it is a bad sample
    assert stream.faults.fatal is not None
    assert stream.faults.fatal.code == ExitCode.DISK
    assert site.url in str(stream.faults.fatal)
    num_requests = site.count(site.get_counts)
    assert not any(next(batches)["valid"].any() for _ in range(50))  # until all processes stop in one step
    assert site.count(site.get_counts) == num_requests  # nor is anybody asked in vain again and again


@pytest.mark.parametrize("fault", ["altered", "gone"])
def test_a_bad_object_is_bad_samples_and_no_end(disk: Path, site: Site, tmp_path: Path, alone: None, fault: str):
    """One altered byte costs one sample, as it does on disk, where the checksum of each tells."""
    local_dataset, remote_dataset = manifest.load(disk), resolve_url(site.url, tmp_path)
    row = local_dataset.index(7)[1]
    position = int(row["offset"]) + int(row["size"]) // 2
    altered = Answer(change=lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    answer = altered if fault == "altered" else Answer(404)
    site.faults = lambda path, nth: answer if path == local_dataset.shards[7].name else None
    stream, bad_samples = make_stream(remote_dataset), []
    batches, local_batches = (
        source.batches(0, ProcessShard(0, 1, 16), CPU) for source in (stream, make_stream(local_dataset))
    )
    for batch, expected in zip(itertools.islice(batches, local_dataset.samples // 16 + 1), local_batches, strict=False):
        faults = stream.faults.drain()
        bad_samples += faults
        intact_slots = [slot for slot in range(16) if slot not in {bad_sample.slot for bad_sample in faults}]
        assert torch.equal(batch["image"][intact_slots], expected["image"][intact_slots])
        assert torch.equal(batch["seed"], expected["seed"])
        assert batch["valid"].all()
    assert stream.faults.fatal is None
    first, end = map(int, local_dataset.starts[7:9])
    assert {bad_sample.sample for bad_sample in bad_samples} == (
        {first + 1} if fault == "altered" else set(range(first, end))
    )
    assert all(f"{site.url}/{local_dataset.shards[7].name}" in bad_sample.reason for bad_sample in bad_samples)
    assert remote_dataset.find_corruption(7) is not None  # as verify_shards full=true finds it


def test_a_stream_that_is_closed_leaves_no_process(disk: Path, site: Site, tmp_path: Path):
    before = child_pids()
    batches = make_stream(resolve_url(site.url, tmp_path), workers=1).batches(0, ProcessShard(0, 1, 16), CPU)
    next(batches)
    assert len(child_pids() - before) == 2  # a worker, and the process that fetches ahead
    batches.close()  # type: ignore[attr-defined]
    del batches
    gc.collect()
    wait_until(lambda: child_pids() <= before)


@pytest.mark.parametrize(("share", "plan"), SHARES)  # at first the default plan
def test_two_nodes_fetch_the_set_once_an_epoch(
    disk: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, plan: dict[str, int]
):
    """All of it ahead of its use, by the process that is there for it; with much room, and with little."""
    local_dataset = manifest.load(disk)
    size = sum(shard.bytes for shard in local_dataset.shards)
    own_downloads, download = [], remote.download  # what the training processes had to fetch themselves
    monkeypatch.setattr(
        remote, "download", lambda *arguments: (own_downloads.append(arguments[0]), download(*arguments))
    )
    nodes = []
    for rank in range(2):
        remote_dataset = resolve_url(site.url, tmp_path / str(rank), room=int(share * size))
        stream = make_stream(remote_dataset, **plan)
        nodes.append((stream, stream.batches(0, ProcessShard(rank, 2, 8), CPU), tmp_path / str(rank) / "cache"))

    def needed_files(stream: TrainingStream, step: int, rank: int) -> set[str]:
        """The files that a node needs for a step, by the plan alone."""
        ids = [sample for _, sample in stream.plan.batch(step, rank, 2)]
        shards = [
            local_dataset.shards[shard] for shard in set(np.searchsorted(local_dataset.starts, ids, side="right") - 1)
        ]
        return {f"{shard.sha256}.tar" for shard in shards} | {f"{shard.index_sha256}.npy" for shard in shards}

    steps = local_dataset.samples // 16
    batches: list[list[Batch]] = [[], []]
    num_first = 0  # of the first step's, which nobody could fetch ahead
    for step in range(steps):
        num_first = len(own_downloads) if step == 1 else num_first
        for rank, (stream, node_batches, folder) in enumerate(nodes):
            if step:
                files = needed_files(stream, step, rank)
                wait_until(lambda files=files, folder=folder: files <= set(cached_files(folder)))
            batches[rank].append(next(node_batches))
    assert len(own_downloads) == num_first
    for rank, (_, node_batches, _) in enumerate(nodes):
        node_batches.close()  # type: ignore[attr-defined]
        expected = make_stream(local_dataset, **plan).batches(0, ProcessShard(rank, 2, 8), CPU)
        assert batch_digest(batches[rank]) == batch_digest(itertools.islice(expected, steps))
    assert site.count(site.bytes_sent) <= 1.1 * size
    assert sum(cached_files(tmp_path / "0" / "cache").values()) <= share * size


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.process)])
def test_a_training_stops_when_its_source_goes_away_and_goes_on_when_it_is_back(
    disk: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
):
    if not ahead:
        monkeypatch.setattr(streams, "Prefetcher", IdlePrefetcher)
    base_args = [
        *TINY,
        "data.lanes=1",
        "data.shuffle_window=1",
        "steps=12",
        "log_every=3",
        "save_every=3",
        "tracker=none",
    ]
    remote_args = [*base_args, f"data.train={site.url}", f"data.cache={tmp_path / 'cache'}", f"run={tmp_path / 'far'}"]

    def fail_late_shards(path: str, nth: int) -> Answer | None:
        fetched = [name for name, count in site.get_counts.items() if name.endswith(".tar") and count]
        return CLOSED_CONNECTION if path in fetched[14:] else None  # the first questions for sizes are answered

    site.faults = fail_late_shards
    stopped = call_tool("pretrain", remote_args)
    assert stopped.code == ExitCode.DISK, stopped.output
    (line,) = stopped.output.splitlines()
    assert line.startswith(f"pretrain.py: {site.url}/")
    assert "the same command goes on" in line
    assert read_exit(tmp_path / "far")["code"] == ExitCode.DISK
    assert 0 < read_exit(tmp_path / "far")["step"] < 12
    site.faults = lambda path, nth: None
    for args in (remote_args, [*base_args, f"data.train={disk}", f"run={tmp_path / 'near'}"]):
        result = call_tool("pretrain", args)
        assert result.code == 0, result.output
    assert metric_rows(tmp_path / "far") == metric_rows(tmp_path / "near")
    assert len(metric_rows(tmp_path / "near")) == 4
