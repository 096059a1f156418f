"""Files and shards on the web and on S3: what is refused, what is tried again, and how each failure ends."""

import hashlib
import json
import resource
import shutil
import socket
import sys
import urllib.parse
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from ssl_vit import config, recipes
from ssl_vit.commands import setup
from ssl_vit.convert import resolve
from ssl_vit.convert.index_shards import IndexShards, VerifyShards, index_tars, verify_all_shards
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data import manifest, remote, webdataset_stream
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.loader import ProcessShard
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream, list_tars
from ssl_vit.errors import ExitCode, ExitError
from tests.conftest import TINY
from tests.data import servers
from tests.data.pictures import build_splits, contents, encode_pil, write_pictures
from tests.data.servers import CLOSED_CONNECTION, Answer, Buckets, Site, assert_refused

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than a small machine has
]
CPU = torch.device("cpu")
FILE = bytes(np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8))


@pytest.fixture
def web(web: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A web server with one file, and no patience with it."""
    servers.shorten_timeouts(monkeypatch)
    (web.folder / "file").write_bytes(FILE)
    return web


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 images of two classes; one is no image."""
    folder = write_pictures(tmp_path_factory.mktemp("images"), [f"{c}/{i}.png" for c in ("a", "b") for i in range(7)])
    (folder / "a" / "broken.jpg").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def disk(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their shards on disk, train/ and val/."""
    folder = tmp_path_factory.mktemp("disk")
    build_splits(images, folder, **SHARDS)
    return folder


SHARDS: dict[str, Any] = {"val_fraction": 0.3, "shard_samples": 4, "workers": 1, "quiet": True}


Host = Callable[[str, Path], str]
FORBIDDEN_URLS = ["file:///etc/passwd", "ftp://127.0.0.1/x", "sftp://127.0.0.1/x", "github://a:b@main/x", "memory://x"]
FORBIDDEN_URLS += ["local:///etc/passwd", "pipe:touch canary", "pipe:touch canary #.tar", "http://", "://x"]
FORBIDDEN_URLS += [
    "simplecache::https://127.0.0.1/x",
    "filecache::s3://bucket/x",
    "zip://x.tar::http://127.0.0.1/x.zip",
]
FORBIDDEN_URLS += ["s3://bucket/x::file:///etc"]
LINK_LOCAL = ["169.254.169.254", "169.254.0.1:8080", "user:word@169.254.169.254", "2852039166", "0xa9fea9fe"]
LINK_LOCAL += ["0xA9.0xFE.0xA9.0xFE", "0251.0376.0251.0376", "169.254.43518", "①⑥⑨.254.169.254", "169。254。169。254"]
LINK_LOCAL += ["[fe80:0:0:0:0:0:0:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[0:0:0:0:0:ffff:169.254.169.254]"]
LINK_LOCAL += ["[::ffff:a9fe:a9fe]"]
URLS = FORBIDDEN_URLS + [f"{scheme}://{host}/latest" for scheme in ("http", "https") for host in LINK_LOCAL]
ENTRANCES: dict[str, Callable[[str, Path], Any]] = {
    "get": lambda url, folder: remote.download(url, folder / "x"),
    "read": lambda url, folder: remote.read_file(url),
    "size": lambda url, folder: remote.file_size(url),
    "put": lambda url, folder: remote.upload(Path(__file__), url),
    "sets": lambda url, folder: resolve.resolve_manifest((url,), "train", folder, CacheDir(folder)),
    "tars": lambda url, folder: list_tars((url,), CacheDir(folder)),
    "a tar": lambda url, folder: list_tars((f"{url}/{{00..11}}.tar",), CacheDir(folder)),
    "output": lambda url, folder: MakeShards(input=str(folder), output=url),
    "index": lambda url, folder: index_tars(IndexShards(shards=url, output=str(folder / "out"), quiet=True)),
    "verify": lambda url, folder: verify_all_shards(VerifyShards(shards=(url,), quiet=True)),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_nothing_off_the_list_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entrance: str):
    def fail_on_connect(*_: object, **__: object) -> None:
        pytest.fail("it connects")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", fail_on_connect)
    monkeypatch.setattr(fsspec.core, "url_to_fs", fail_on_connect)
    for url in URLS:
        code = ExitCode.CANNOT_CREATE if entrance == "put" and url.startswith("http") else ExitCode.USAGE
        assert remote.is_url(url)
        assert_refused(lambda url=url: ENTRANCES[entrance](url, tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leads_to_a_link_local_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Clouds give their metadata service names, such as metadata.google.internal."""
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in ("10.0.0.1", "169.254.169.254")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    url = "https://metadata.internal/x"
    assert url in assert_refused(lambda: remote.download(url, tmp_path / "x"), ExitCode.USAGE)


@pytest.mark.parametrize("where", [f"http://{host}/x" for host in LINK_LOCAL] + ["//169.254.169.254/x"])
def test_a_redirect_to_a_link_local_address_is_not_followed(web: Site, tmp_path: Path, where: str):
    quoted = urllib.parse.quote(where, safe=":/[]@")
    web.faults = lambda path, nth: Answer(302, location=quoted)
    assert "link-local" in assert_refused(lambda: remote.download(f"{web.url}/file", tmp_path / "x"), ExitCode.USAGE)
    assert "link-local" in assert_refused(lambda: remote.read_file(f"{web.url}/file"), ExitCode.USAGE)
    assert web.get_counts["file"] == 2  # never asked again
    assert list(tmp_path.iterdir()) == [tmp_path / "web"]


def test_other_redirects_are_followed_but_not_into_files(web: Site, tmp_path: Path):
    web.faults = lambda path, nth: Answer(302, location="/file") if path == "old" else None
    remote.download(f"{web.url}/old", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    web.faults = lambda path, nth: Answer(302, location=f"file://{tmp_path}/x")
    assert_refused(lambda: remote.download(f"{web.url}/old", tmp_path / "y"), ExitCode.DISK)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("at", ["pipe:touch canary", "file:///etc", "http://169.254.169.254/x", "/etc", ".."])
def test_a_manifest_from_afar_names_no_place_that_is_refused(web: Site, disk: Path, tmp_path: Path, at: str):
    fields = json.loads((disk / "train" / "manifest.json").read_bytes()) | {"at": at}
    (web.folder / "manifest.json").write_text(json.dumps(fields))
    code = ExitCode.USAGE if remote.is_url(at) else ExitCode.DATA
    assert_refused(lambda: resolve.resolve_manifest((web.url,), "train", tmp_path, CacheDir(tmp_path / "cache")), code)
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = assert_refused(lambda: remote.read_file("gs://bucket/x"), ExitCode.USAGE)
    assert "gcsfs is not installed" in line
    assert "ssl_vit[gs]" in line


def transient_fault(fault: Answer, times: int = 2) -> Callable[[str, int], Answer | None]:
    return lambda path, nth: fault if nth < times else None


FAULTS = {
    **{str(code): Answer(code) for code in (500, 503, 429)},
    "no answer": Answer(delay=3),
    "closed": CLOSED_CONNECTION,
    "cut at once": Answer(cut=0),
    "cut": Answer(cut=1234),
    "cut before the last byte": Answer(cut=len(FILE) - 1),
    "drip": Answer(drip=(1500, 0.1)),
    "length too long": Answer(extra_length=7),
    "length too short": Answer(extra_length=-7),
    "shorter": Answer(change=lambda data: data[:-1]),
    "longer": Answer(change=lambda data: data + b"x"),
    "empty": Answer(change=lambda data: b""),
    "altered": Answer(change=lambda data: data[:-1] + b"\0"),
    "an HTML page": Answer(change=lambda data: b"<html>Bad gateway</html>"),
}
SIZE, BYTES = f"bytes came, not {len(FILE)}", "other bytes than the manifest says"
MISMATCHES = {
    "length too short": "",
    "shorter": SIZE,
    "longer": SIZE,
    "empty": SIZE,
    "altered": BYTES,
    "an HTML page": SIZE,
}


def fetch_file(url: str, path: Path) -> None:
    remote.download(url, path, len(FILE), hashlib.sha256(FILE).hexdigest())


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_ends_soon_and_in_one_line_and_what_passes_is_tried_again(web: Site, tmp_path: Path, fault: str):
    url, path = f"{web.url}/file", tmp_path / "out" / "x"
    path.parent.mkdir()
    path.write_bytes(b"before")
    web.faults = lambda path, nth: FAULTS[fault]
    if fault in MISMATCHES:  # too much is taken for a bad answer to a question not asked yet, or is not
        kinds = (remote.RemoteMismatch, ExitError) if fault == "length too short" else remote.RemoteMismatch
        with pytest.raises(kinds, match=f"{url}: .*{MISMATCHES[fault]}"):
            fetch_file(url, path)
    else:
        line = assert_refused(lambda: fetch_file(url, path), ExitCode.DISK)
        assert f"{url}: cannot be reached (3 tries in " in line
        assert "the same command goes on" in line
    assert 3 <= web.get_counts["file"] <= 6  # the client itself asks once more where a connection was closed
    assert contents(tmp_path / "out") == {"x": b"before"}
    web.get_counts.clear()
    web.faults = transient_fault(FAULTS[fault])
    fetch_file(url, path)
    assert contents(tmp_path / "out") == {"x": FILE}
    assert web.get_counts["file"] >= 3


def test_what_is_missing_or_forbidden_is_not_asked_for_again(web: Site, tmp_path: Path):
    with pytest.raises(remote.RemoteMismatch, match="is not there"):
        remote.download(f"{web.url}/none", tmp_path / "x")
    assert web.get_counts["none"] == 1
    assert (remote.read_file(f"{web.url}/none"), remote.file_size(f"{web.url}/none")) == (None, None)
    web.faults = lambda path, nth: Answer(403)
    assert "denied" in assert_refused(lambda: remote.download(f"{web.url}/file", tmp_path / "x"), ExitCode.DISK)
    assert web.get_counts["file"] == 1


def test_slow_but_steady_is_borne(web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four times the slowest rate, for several times the patience."""
    monkeypatch.setattr(remote, "MIN_BYTES_PER_SECOND", 5_000)
    web.faults = lambda path, nth: Answer(drip=(2_000, 0.1))
    remote.download(f"{web.url}/file", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    assert web.get_counts["file"] == 1


def test_a_file_has_its_name_only_when_it_is_whole(web: Site, tmp_path: Path):
    web.faults = lambda path, nth: Answer(drip=(8_000, 0.05)) if nth else Answer(cut=20_000)
    sizes: set[int] = set()

    def watch() -> None:
        while len(FILE) not in sizes:
            sizes.add((tmp_path / "x").stat().st_size if (tmp_path / "x").exists() else 0)

    watcher = Thread(target=watch)
    watcher.start()
    remote.download(f"{web.url}/file", tmp_path / "x", len(FILE))
    watcher.join(5)
    assert sizes == {0, len(FILE)}


def test_no_length_no_compression_and_few_connections(web: Site, tmp_path: Path):
    for number in range(20):
        remote.download(f"{web.url}/file", tmp_path / f"{number}")
    assert web.connections <= 8
    web.faults = lambda path, nth: Answer(extra_length=None)
    remote.download(f"{web.url}/file", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    assert remote.file_size(f"{web.url}/file") == -1
    assert {headers.get("Accept-Encoding") for headers in web.headers} == {"identity"}


def test_a_full_disk_is_not_the_sources_fault(web: Site, tmp_path: Path):
    """Here, no file may have more than 10,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises((ExitError, OSError), match="File too large") as caught:
            remote.download(f"{web.url}/file", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be reached" not in str(caught.value)
    assert web.get_counts["file"] == 1


def test_a_server_in_trouble_is_asked_again_for_a_size(web: Site):
    for fault in ("503", "closed", "no answer"):
        web.head_counts.clear()
        web.faults = transient_fault(FAULTS[fault])
        assert remote.file_size(f"{web.url}/file") == len(FILE)
        assert web.head_counts["file"] >= 3
    assert "{000000..000099}" in assert_refused(lambda: remote.list_sizes(web.url), ExitCode.USAGE)


def test_a_server_that_is_away_does_not_make_shards_missing(web: Site, disk: Path, tmp_path: Path):
    """65 would say that the data are bad, and a restart in vain; 74 that the same command may go on later."""
    with servers.serve_folder(disk / "train") as site:
        dataset = resolve.resolve_manifest((site.url,), "train", tmp_path, CacheDir(tmp_path / "cache"))
    assert_refused(dataset.check_shards, ExitCode.DISK)


def test_sizes_on_s3_and_what_another_machine_stores_is_seen_at_once(buckets: Buckets, disk: Path):
    url = buckets.bucket()
    assert remote.list_sizes(url) == {}
    buckets.upload(disk, f"{url}/x")
    assert remote.list_sizes(f"{url}/x") == {name: len(data) for name, data in contents(disk).items()}
    assert remote.file_size(f"{url}/x/train/000000.tar") == (disk / "train" / "000000.tar").stat().st_size
    assert remote.file_size(f"{url}/x/train/000009.tar") is None
    for name, data in (("b", b"1"), ("a", b"22"), ("a", b"333")):
        buckets.put(f"{url}/x/train/{name}", data)
        assert (remote.read_file(f"{url}/x/train/{name}"), remote.file_size(f"{url}/x/train/{name}")) == (
            data,
            len(data),
        )
    assert remote.list_sizes(f"{url}/x/train")["a"] == 3


def test_s3_fails_for_a_while_and_for_good(buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    servers.shorten_timeouts(monkeypatch, patience=4)
    url, path = f"{buckets.bucket()}/file", tmp_path / "out" / "x"
    buckets.put(url, FILE)
    for fault in (503, lambda data: data[:-5], lambda data: data[:-1] + b"\0"):
        buckets.faults = lambda method, path, nth, fault=fault: fault if method == "GET" and nth < 2 else None
        buckets.requests.clear()
        fetch_file(url, path)
        assert contents(tmp_path / "out") == {"x": FILE}
        assert len(buckets.requests) >= 3
    path.unlink()
    servers.shorten_timeouts(monkeypatch, tries=2)
    buckets.faults = lambda method, path, nth: 500
    assert f"{url}: cannot be reached (2 tries in " in assert_refused(lambda: fetch_file(url, path), ExitCode.DISK)
    buckets.faults = lambda method, path, nth: 403
    buckets.requests.clear()
    assert f"{url}: access is denied" in assert_refused(lambda: fetch_file(url, path), ExitCode.DISK)
    assert len(buckets.requests) == 1
    buckets.faults = lambda method, path, nth: lambda data: data[:-1] + b"\0"
    with pytest.raises(remote.RemoteMismatch, match=url):
        fetch_file(url, path)
    buckets.faults = lambda method, path, nth: None
    with pytest.raises(remote.RemoteMismatch, match="is not there"):
        remote.download(f"{url}-none", path)
    assert remote.read_file(f"{url}-none") is None
    assert not path.exists()


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_set_at_a_url_is_found_by_its_split_and_bad_shards_are_named_at_once(
    kind: str, web: Site, buckets: Buckets, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    servers.shorten_timeouts(monkeypatch, patience=20)
    url, cache_dir = f"{web.url if kind == 'http' else buckets.bucket()}/x", CacheDir(tmp_path / "cache")
    shutil.copytree(disk, web.folder / "x") if kind == "http" else buckets.upload(disk, url)
    for split in ("val", "train"):
        local_dataset = manifest.load(disk / split)
        for source in (url, f"{url}/", f"{url}/{split}"):
            dataset = resolve.resolve_manifest((source,), split, tmp_path / "converted", cache_dir)
            assert dataset.name == f"{url}/{split}"
            assert (dataset.classes, dataset.shards, dataset.identity) == (
                local_dataset.classes,
                local_dataset.shards,
                local_dataset.identity,
            )
            assert np.array_equal(dataset.labels, local_dataset.labels)
            dataset.check_shards(full=True)
    joined = resolve.resolve_manifest((url, str(disk)), "train", tmp_path / "converted", cache_dir)
    assert np.array_equal(joined.labels, np.tile(local_dataset.labels, 2))
    assert not (tmp_path / "converted").exists()
    for name, data in (("000000.tar", None), ("000001.npy", None), ("000002.tar", b"short")):
        (web if kind == "http" else buckets).put(f"{url}/train/{name}", data)
    line = assert_refused(dataset.check_shards, ExitCode.DATA)
    assert line.startswith(f"{url}/train: 3 of {len(dataset.shards)} shards are bad: 000000.tar (missing), ")
    assert "000001.tar (its index is missing)" in line
    assert f"000002.tar (5 bytes, not {dataset.shards[2].bytes})" in line
    states = verify_all_shards(VerifyShards(shards=(f"{url}/train",), quiet=True, workers=1))
    assert [state.fault is None for state in states] == [False, False, False, *[True] * (len(states) - 3)]


def test_a_set_that_is_none_is_refused_with_what_to_do(web: Site, buckets: Buckets, tmp_path: Path):
    resolve_at = lambda url: lambda: resolve.resolve_manifest((url,), "train", tmp_path, CacheDir(tmp_path))  # noqa: E731
    for url in (web.url, f"{web.url}/{{000..009}}.tar", buckets.bucket(), "s3://there-is-no-such-bucket/x"):
        assert "index_shards" in assert_refused(resolve_at(url), ExitCode.DATA)
    for page in (b"<html>Welcome</html>", b"{}", b"", b'{"format": "other", "version": 1}', b"\xff\xfe"):
        (web.folder / "manifest.json").write_bytes(page)
        assert f"{web.url}/manifest.json" in assert_refused(resolve_at(web.url), ExitCode.DATA)


def convert_to(url: str, images: Path, rank: int = 0, world: int = 1, **options: Any) -> dict[str, Manifest]:
    return convert_images(MakeShards(input=str(images), output=url, **(SHARDS | options)), rank, world)


def uploaded_names(buckets: Buckets) -> list[str]:
    """The names that were written, in their order, without the bucket."""
    return [path.split("/", 2)[2] for method, path in buckets.requests if method == "PUT" and path.count("/") > 1]


def test_a_conversion_to_s3_writes_what_one_to_disk_does(buckets: Buckets, images: Path, disk: Path, tmp_path: Path):
    url = f"{buckets.bucket()}/x"
    manifests = convert_to(url, images, workers=2)  # processes, each of which asks anew for its file system
    assert buckets.contents(url) == contents(disk)
    assert contents(tmp_path / "home") == {}
    order = [name for name in uploaded_names(buckets) if not name.startswith(".notes") and "/.notes" not in name]
    assert sorted(order) == sorted(contents(disk))  # each once
    for split in ("train", "val"):
        assert [name for name in order if name.startswith(f"{split}/")][-1] == f"{split}/manifest.json"
        assert (manifests[split].name, manifests[split].samples) == (
            f"{url}/{split}",
            manifest.load(disk / split).samples,
        )
    buckets.requests.clear()
    repeated = convert_to(url, images)  # is done already
    assert uploaded_names(buckets) == []
    assert {split: dataset.shards for split, dataset in repeated.items()} == {
        s: dataset.shards for s, dataset in manifests.items()
    }


@pytest.mark.parametrize("at", [13, 25])
def test_an_interrupted_conversion_to_s3_goes_on(buckets: Buckets, images: Path, disk: Path, tmp_path: Path, at: int):
    """Writing is denied at a certain file, one after the other, until all are there."""
    url = f"{buckets.bucket()}/x"
    num_puts = lambda: sum(method == "PUT" for method, _ in buckets.requests)  # noqa: E731
    buckets.requests.clear()
    buckets.faults = lambda method, path, nth: 403 if method == "PUT" and num_puts() >= at else None
    assert url in assert_refused(lambda: convert_to(url, images), ExitCode.DISK)
    assert num_puts() > at  # a shard that was begun already may try, too
    done = [name for name in buckets.contents(url) if name.endswith(".json") and ".notes/0" in name]
    with pytest.raises(ExitError):
        resolve.resolve_manifest((url,), "val", tmp_path, CacheDir(tmp_path / "cache"))
    buckets.faults = lambda method, path, nth: None
    buckets.requests.clear()
    convert_to(url, images)
    assert buckets.contents(url) == contents(disk)
    assert contents(tmp_path / "home") == {}
    sent_again = {name for name in uploaded_names(buckets) if name.endswith(".tar")}
    assert sent_again.isdisjoint(name.replace(".notes/", "").replace(".json", ".tar") for name in done)


def test_two_machines_convert_to_a_url(buckets: Buckets, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build_splits(write_pictures(tmp_path / "test", ["a/x.png"]), tmp_path / "excluded")
    options = {"exclude": (str(tmp_path / "excluded"),)}
    build_splits(images, tmp_path / "alone", **SHARDS, **options)
    url, results = f"{buckets.bucket()}/x", []
    for rank in range(2):
        monkeypatch.setenv("HOME", str(tmp_path / f"machine{rank}"))
        results.append(convert_to(url, images, rank, 2, **options))
    assert [set(result) for result in results] == [set(), {"train", "val"}]
    assert buckets.contents(url) == contents(tmp_path / "alone")
    assert contents(tmp_path / "machine1") == {}


def test_a_url_that_holds_something_else_is_refused_and_so_is_a_web_server(buckets: Buckets, images: Path):
    url = f"{buckets.bucket()}/x"
    buckets.put(f"{url}/train/letter.txt", b"dear")
    assert "is not empty" in assert_refused(lambda: convert_to(url, images), ExitCode.CANNOT_CREATE)
    assert buckets.contents(url) == {"train/letter.txt": b"dear"}
    convert_to(f"{url}/other", images)
    before = buckets.contents(f"{url}/other")
    for options in ({"resize": 8}, {"val_fraction": 0}):
        assert "another job" in assert_refused(
            lambda options=options: convert_to(f"{url}/other", images, **options), ExitCode.CANNOT_CREATE
        )
    assert buckets.contents(f"{url}/other") == before
    assert "cannot be written" in assert_refused(
        lambda: convert_to(f"{servers.closed_url()}/x", images), ExitCode.CANNOT_CREATE
    )


@pytest.mark.parametrize("kind", ["http", "s3", "s3 folder", "s3 in place"])
def test_foreign_shards_at_a_url_are_read(disk: Path, host: Host, buckets: Buckets, tmp_path: Path, kind: str):
    """The tars alone of our own shards, so that the answer is known; what was indexed by its name is read by it."""
    tars = tmp_path / "tars" / "part"
    shutil.copytree(disk / "train", tars, ignore=shutil.ignore_patterns("*.npy", "*.json*"))
    url = host(kind.split()[0], tars.parent)
    local_dataset = index_tars(IndexShards(shards=str(tars.parent), quiet=True, workers=1))
    pattern = url if "s3 " in kind else f"{url}/part/{{000000..{len(local_dataset.shards) - 1:06d}}}.tar"
    output = None if kind == "s3 in place" else str(tmp_path / "there")
    indexed = index_tars(IndexShards(shards=pattern, output=output, quiet=True, workers=1))
    assert remote.is_url(str(indexed.at)) == (output is not None)
    open_samples = lambda dataset: SampleDataset(dataset, Data(image_size=16, workers=0), 0, training=False)  # noqa: E731
    for name in (output or url, str(tars.parent)):
        loaded = resolve.resolve_manifest((name,), "train", tmp_path, CacheDir(tmp_path / "cache"))
        loaded.check_shards()
        assert (loaded.samples, loaded.classes) == (local_dataset.samples, local_dataset.classes)
        assert np.array_equal(loaded.labels, local_dataset.labels)
        assert all(
            open_samples(loaded).read_sample(i) == open_samples(local_dataset).read_sample(i)
            for i in range(local_dataset.samples)
        )
    assert contents(tmp_path / "home") == {}
    assert output or set(buckets.contents(url)) == set(contents(tars.parent))


def test_a_web_server_that_stays_away_ends_the_scan(web: Site, tmp_path: Path):
    shards = f"{servers.closed_url()}/{{000000..000003}}.tar"
    scan = lambda shards, **options: lambda: index_tars(IndexShards(shards=shards, quiet=True, **options))  # noqa: E731
    assert ".tar" in assert_refused(scan(shards, output=str(tmp_path / "x")), ExitCode.DISK)
    assert_refused(scan(f"{web.url}/{{0..3}}.tar", output=str(tmp_path / "x")), ExitCode.DATA)
    assert_refused(scan(f"{web.url}/0.tar"), ExitCode.USAGE)  # written to the web server
    assert not (tmp_path / "x" / "manifest.json").exists()


NUM_TARS, TAR_SAMPLES = 8, 4  # tars, images in each


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of plain squares: the color is the number of the sample."""
    folder = tmp_path_factory.mktemp("colored")
    for shard in range(NUM_TARS):
        with TarWriter(str(folder / f"{shard}.tar"), encoder=False) as writer:
            for number in range(shard * TAR_SAMPLES, (shard + 1) * TAR_SAMPLES):
                png = encode_pil(Image.new("RGB", (9, 7), (number, 255 - number, 100)), "PNG")
                canary = b"cos\nsystem\n(S'touch canary'\ntR."
                writer.write({"__key__": str(number), "png": png, "cls": b"0", "pyd": canary})
    return folder


def make_stream(pattern: str, tmp_path: Path, **options: Any) -> SequentialStream:
    data = Data(**{"image_size": 8, "workers": 0, "flip": False, **options})
    return SequentialStream(list_tars((pattern,), CacheDir(tmp_path / "cache")), data, seed=3, batch=2 * TAR_SAMPLES)


def sample_numbers(stream: SequentialStream, num_batches: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """The sample numbers of a process's batches of one tar's size."""
    batches = islice(stream.batches(0, ProcessShard(rank, world, TAR_SAMPLES), CPU), num_batches)
    return [batch["image"][:, 0, 4, 4].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("disk", 2), ("http", 0), ("http", 2), ("s3", 0), pytest.param("s3", 2, marks=pytest.mark.process)],
)
def test_webdataset_deals_all_tars_anew_in_each_epoch(
    kind: str, workers: int, host: Host, colored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = str(colored) if kind == "disk" else host(kind, colored)
    pattern = url if kind == "s3" else f"{url}/{{0..{NUM_TARS - 1}}}.tar"
    monkeypatch.setattr(webdataset_stream, "BUFFER", 1)  # the tars' own order, to tell which they are
    monkeypatch.chdir(tmp_path)
    epochs, steps_per_epoch = 3, NUM_TARS // 2
    rank_batches = [
        sample_numbers(make_stream(pattern, tmp_path, workers=workers), epochs * steps_per_epoch, rank, world=2)
        for rank in range(2)
    ]
    orders = []
    for epoch in range(epochs):
        epoch_batches = [part[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for part in rank_batches]
        assert sorted(chain(*epoch_batches[0], *epoch_batches[1])) == list(range(NUM_TARS * TAR_SAMPLES))
        orders.append([batch[0] for part in epoch_batches for batch in part])
    assert len(set(map(tuple, orders))) == epochs
    assert set(orders[0][:steps_per_epoch]) != set(orders[1][:steps_per_epoch])
    assert not (tmp_path / "canary").exists()


def test_webdataset_shuffles_among_tars_and_is_the_same_again(colored: Path, tmp_path: Path):
    pattern = f"{colored}/*.tar"
    first, second = (sample_numbers(make_stream(pattern, tmp_path), 2 * NUM_TARS) for _ in range(2))
    assert first == second
    assert any(len({number // TAR_SAMPLES for number in batch}) > 1 for batch in first)
    reseeded = make_stream(pattern, tmp_path)
    reseeded.seed = 4
    assert sample_numbers(reseeded, 2 * NUM_TARS) != first


@pytest.mark.parametrize("workers", [0, 3])
def test_webdataset_has_no_end_though_tars_are_fewer_than_readers(colored: Path, tmp_path: Path, workers: int):
    """Two tars for two processes of up to three workers: each takes as many steps as it is asked for."""
    for rank in range(2):
        batches = sample_numbers(make_stream(f"{colored}/{{0,1}}.tar", tmp_path, workers=workers), 12, rank, world=2)
        assert [len(batch) for batch in batches] == [TAR_SAMPLES] * 12
        assert set(chain(*batches)) <= set(range(2 * TAR_SAMPLES))


def test_webdataset_passes_over_what_it_cannot_read_or_ends(colored: Path, tmp_path: Path, web: Site):
    for shard in (0, 1):
        shutil.copy(colored / f"{shard}.tar", web.folder)
    for name in "267":
        (web.folder / f"{name}.tar").write_bytes(b"<html>no tar</html>")  # and 3.tar is not there
    mixed_stream = make_stream(f"{web.url}/{{0..3}}.tar", tmp_path)
    assert set(chain(*sample_numbers(mixed_stream, 40))) == set(range(2 * TAR_SAMPLES))
    reasons = " ".join(fault.reason for fault in mixed_stream.faults.drain())
    assert [f"{web.url}/{shard}.tar: " in reasons for shard in (0, 2, 3)] == [False, True, True]
    for url, code in ((web.url, ExitCode.DATA), (servers.closed_url(), ExitCode.DISK)):
        bad_stream = make_stream(f"{url}/{{6,7}}.tar", tmp_path)
        assert not next(bad_stream.batches(0, ProcessShard(0, 1, TAR_SAMPLES), CPU))["valid"].any()
        assert bad_stream.faults.fatal is not None
        assert bad_stream.faults.fatal.code == code


def test_webdataset_says_what_it_does_not_promise(colored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = [*TINY, "data.reader=webdataset", f"data.train={colored}/{{0..3}}.tar", f"run={tmp_path}/run"]
    setup.prepare_data(config.parse(recipes.Pretrain, args))
    assert "neither exactly once an epoch nor exactly resumable" in capsys.readouterr().out
