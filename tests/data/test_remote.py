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
from ssl_vit.convert.index_shards import IndexShards, VerifyShards, index, verify
from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.data import manifest, remote, webdataset_stream
from ssl_vit.data.cache import Store
from ssl_vit.data.dataset import Data, Samples
from ssl_vit.data.loader import Share
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream, tars
from ssl_vit.errors import CANNOT_CREATE, DATA, DISK, USAGE, Refusal
from tests.conftest import TINY
from tests.data import servers
from tests.data.pictures import contents, encoded, make, write_pictures
from tests.data.servers import GONE, Answer, Buckets, Site, refused

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than a small machine has
]
CPU = torch.device("cpu")
FILE = bytes(np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8))


@pytest.fixture
def web(web: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A web server with one file, and no patience with it."""
    servers.hurry(monkeypatch)
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
    make(images, folder, **SHARDS)
    return folder


SHARDS: dict[str, Any] = {"val_fraction": 0.3, "shard_samples": 4, "workers": 1, "quiet": True}


Host = Callable[[str, Path], str]
STRANGE = ["file:///etc/passwd", "ftp://127.0.0.1/x", "sftp://127.0.0.1/x", "github://a:b@main/x", "memory://x"]
STRANGE += ["local:///etc/passwd", "pipe:touch canary", "pipe:touch canary #.tar", "http://", "://x"]
STRANGE += ["simplecache::https://127.0.0.1/x", "filecache::s3://bucket/x", "zip://x.tar::http://127.0.0.1/x.zip"]
STRANGE += ["s3://bucket/x::file:///etc"]
LINK_LOCAL = ["169.254.169.254", "169.254.0.1:8080", "user:word@169.254.169.254", "2852039166", "0xa9fea9fe"]
LINK_LOCAL += ["0xA9.0xFE.0xA9.0xFE", "0251.0376.0251.0376", "169.254.43518", "①⑥⑨.254.169.254", "169。254。169。254"]
LINK_LOCAL += ["[fe80:0:0:0:0:0:0:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]", "[0:0:0:0:0:ffff:169.254.169.254]"]
LINK_LOCAL += ["[::ffff:a9fe:a9fe]"]
URLS = STRANGE + [f"{scheme}://{host}/latest" for scheme in ("http", "https") for host in LINK_LOCAL]
ENTRANCES: dict[str, Callable[[str, Path], Any]] = {
    "get": lambda url, folder: remote.get(url, folder / "x"),
    "read": lambda url, folder: remote.read(url),
    "size": lambda url, folder: remote.size(url),
    "put": lambda url, folder: remote.put(Path(__file__), url),
    "sets": lambda url, folder: resolve.sets((url,), "train", folder, Store(folder)),
    "tars": lambda url, folder: tars((url,), Store(folder)),
    "a tar": lambda url, folder: tars((f"{url}/{{00..11}}.tar",), Store(folder)),
    "output": lambda url, folder: MakeShards(input=str(folder), output=url),
    "index": lambda url, folder: index(IndexShards(shards=url, output=str(folder / "out"), quiet=True)),
    "verify": lambda url, folder: verify(VerifyShards(shards=(url,), quiet=True)),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_nothing_off_the_list_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entrance: str):
    def connects(*_: object, **__: object) -> None:
        pytest.fail("it connects")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connects)
    monkeypatch.setattr(fsspec.core, "url_to_fs", connects)
    for url in URLS:
        code = CANNOT_CREATE if entrance == "put" and url.startswith("http") else USAGE
        assert remote.is_url(url)
        refused(lambda url=url: ENTRANCES[entrance](url, tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leads_to_a_link_local_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Clouds give their metadata service names, such as metadata.google.internal."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in ("10.0.0.1", "169.254.169.254")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    url = "https://metadata.internal/x"
    assert url in refused(lambda: remote.get(url, tmp_path / "x"), USAGE)


@pytest.mark.parametrize("where", [f"http://{host}/x" for host in LINK_LOCAL] + ["//169.254.169.254/x"])
def test_a_redirect_to_a_link_local_address_is_not_followed(web: Site, tmp_path: Path, where: str):
    quoted = urllib.parse.quote(where, safe=":/[]@")
    web.faults = lambda path, nth: Answer(302, where=quoted)
    assert "link-local" in refused(lambda: remote.get(f"{web.url}/file", tmp_path / "x"), USAGE)
    assert "link-local" in refused(lambda: remote.read(f"{web.url}/file"), USAGE)
    assert web.got["file"] == 2  # never asked again
    assert list(tmp_path.iterdir()) == [tmp_path / "web"]


def test_other_redirects_are_followed_but_not_into_files(web: Site, tmp_path: Path):
    web.faults = lambda path, nth: Answer(302, where="/file") if path == "old" else None
    remote.get(f"{web.url}/old", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    web.faults = lambda path, nth: Answer(302, where=f"file://{tmp_path}/x")
    refused(lambda: remote.get(f"{web.url}/old", tmp_path / "y"), DISK)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("at", ["pipe:touch canary", "file:///etc", "http://169.254.169.254/x", "/etc", ".."])
def test_a_manifest_from_afar_names_no_place_that_is_refused(web: Site, disk: Path, tmp_path: Path, at: str):
    text = json.loads((disk / "train" / "manifest.json").read_bytes()) | {"at": at}
    (web.folder / "manifest.json").write_text(json.dumps(text))
    code = USAGE if remote.is_url(at) else DATA
    refused(lambda: resolve.sets((web.url,), "train", tmp_path, Store(tmp_path / "cache")), code)
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    line = refused(lambda: remote.read("gs://bucket/x"), USAGE)
    assert "gcsfs is not installed" in line
    assert "ssl_vit[gs]" in line


def passing(fault: Answer, times: int = 2) -> Callable[[str, int], Answer | None]:
    return lambda path, nth: fault if nth < times else None


FAULTS = {
    **{str(code): Answer(code) for code in (500, 503, 429)},
    "no answer": Answer(late=3),
    "closed": GONE,
    "cut at once": Answer(cut=0),
    "cut": Answer(cut=1234),
    "cut before the last byte": Answer(cut=len(FILE) - 1),
    "drip": Answer(drip=(1500, 0.1)),
    "length too long": Answer(more=7),
    "length too short": Answer(more=-7),
    "shorter": Answer(change=lambda data: data[:-1]),
    "longer": Answer(change=lambda data: data + b"x"),
    "empty": Answer(change=lambda data: b""),
    "altered": Answer(change=lambda data: data[:-1] + b"\0"),
    "an HTML page": Answer(change=lambda data: b"<html>Bad gateway</html>"),
}
SIZE, BYTES = f"bytes came, not {len(FILE)}", "other bytes than the manifest says"
WRONG = {"length too short": "", "shorter": SIZE, "longer": SIZE, "empty": SIZE, "altered": BYTES, "an HTML page": SIZE}


def fetch(url: str, path: Path) -> None:
    remote.get(url, path, len(FILE), hashlib.sha256(FILE).hexdigest())


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_ends_soon_and_in_one_line_and_what_passes_is_tried_again(web: Site, tmp_path: Path, fault: str):
    url, path = f"{web.url}/file", tmp_path / "out" / "x"
    path.parent.mkdir()
    path.write_bytes(b"before")
    web.faults = lambda path, nth: FAULTS[fault]
    if fault in WRONG:  # too much is taken for a bad answer to a question not asked yet, or is not
        kinds = (remote.BadSource, Refusal) if fault == "length too short" else remote.BadSource
        with pytest.raises(kinds, match=f"{url}: .*{WRONG[fault]}"):
            fetch(url, path)
    else:
        line = refused(lambda: fetch(url, path), DISK)
        assert f"{url}: cannot be reached (3 tries in " in line
        assert "the same command goes on" in line
    assert 3 <= web.got["file"] <= 6  # the client itself asks once more where a connection was closed
    assert contents(tmp_path / "out") == {"x": b"before"}
    web.got.clear()
    web.faults = passing(FAULTS[fault])
    fetch(url, path)
    assert contents(tmp_path / "out") == {"x": FILE}
    assert web.got["file"] >= 3


def test_what_is_missing_or_forbidden_is_not_asked_for_again(web: Site, tmp_path: Path):
    with pytest.raises(remote.BadSource, match="is not there"):
        remote.get(f"{web.url}/none", tmp_path / "x")
    assert web.got["none"] == 1
    assert (remote.read(f"{web.url}/none"), remote.size(f"{web.url}/none")) == (None, None)
    web.faults = lambda path, nth: Answer(403)
    assert "denied" in refused(lambda: remote.get(f"{web.url}/file", tmp_path / "x"), DISK)
    assert web.got["file"] == 1


def test_slow_but_steady_is_borne(web: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four times the slowest rate, for several times the patience."""
    monkeypatch.setattr(remote, "SLOWEST", 5_000)
    web.faults = lambda path, nth: Answer(drip=(2_000, 0.1))
    remote.get(f"{web.url}/file", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    assert web.got["file"] == 1


def test_a_file_has_its_name_only_when_it_is_whole(web: Site, tmp_path: Path):
    web.faults = lambda path, nth: Answer(drip=(8_000, 0.05)) if nth else Answer(cut=20_000)
    seen: set[int] = set()

    def look() -> None:
        while len(FILE) not in seen:
            seen.add((tmp_path / "x").stat().st_size if (tmp_path / "x").exists() else 0)

    watcher = Thread(target=look)
    watcher.start()
    remote.get(f"{web.url}/file", tmp_path / "x", len(FILE))
    watcher.join(5)
    assert seen == {0, len(FILE)}


def test_no_length_no_compression_and_few_connections(web: Site, tmp_path: Path):
    for number in range(20):
        remote.get(f"{web.url}/file", tmp_path / f"{number}")
    assert web.connections <= 8
    web.faults = lambda path, nth: Answer(more=None)
    remote.get(f"{web.url}/file", tmp_path / "x", len(FILE))
    assert (tmp_path / "x").read_bytes() == FILE
    assert remote.size(f"{web.url}/file") == -1
    assert {headers.get("Accept-Encoding") for headers in web.headers} == {"identity"}


def test_a_full_disk_is_not_the_sources_fault(web: Site, tmp_path: Path):
    """Here, no file may have more than 10,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises((Refusal, OSError), match="File too large") as caught:
            remote.get(f"{web.url}/file", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be reached" not in str(caught.value)
    assert web.got["file"] == 1


def test_a_server_in_trouble_is_asked_again_for_a_size(web: Site):
    for fault in ("503", "closed", "no answer"):
        web.asked.clear()
        web.faults = passing(FAULTS[fault])
        assert remote.size(f"{web.url}/file") == len(FILE)
        assert web.asked["file"] >= 3
    assert "{000000..000099}" in refused(lambda: remote.sizes(web.url), USAGE)


def test_a_server_that_is_away_does_not_make_shards_missing(web: Site, disk: Path, tmp_path: Path):
    """65 would say that the data are bad, and a restart in vain; 74 that the same command may go on later."""
    with servers.site(disk / "train") as site:
        found = resolve.sets((site.url,), "train", tmp_path, Store(tmp_path / "cache"))
    refused(found.check, DISK)


def test_sizes_on_s3_and_what_another_machine_stores_is_seen_at_once(buckets: Buckets, disk: Path):
    url = buckets.bucket()
    assert remote.sizes(url) == {}
    buckets.upload(disk, f"{url}/x")
    assert remote.sizes(f"{url}/x") == {name: len(data) for name, data in contents(disk).items()}
    assert remote.size(f"{url}/x/train/000000.tar") == (disk / "train" / "000000.tar").stat().st_size
    assert remote.size(f"{url}/x/train/000009.tar") is None
    for name, data in (("b", b"1"), ("a", b"22"), ("a", b"333")):
        buckets.put(f"{url}/x/train/{name}", data)
        assert (remote.read(f"{url}/x/train/{name}"), remote.size(f"{url}/x/train/{name}")) == (data, len(data))
    assert remote.sizes(f"{url}/x/train")["a"] == 3


def test_s3_fails_for_a_while_and_for_good(buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    servers.hurry(monkeypatch, patience=4)
    url, path = f"{buckets.bucket()}/file", tmp_path / "out" / "x"
    buckets.put(url, FILE)
    for fault in (503, lambda data: data[:-5], lambda data: data[:-1] + b"\0"):
        buckets.faults = lambda method, path, nth, fault=fault: fault if method == "GET" and nth < 2 else None
        buckets.seen.clear()
        fetch(url, path)
        assert contents(tmp_path / "out") == {"x": FILE}
        assert len(buckets.seen) >= 3
    path.unlink()
    servers.hurry(monkeypatch, tries=2)
    buckets.faults = lambda method, path, nth: 500
    assert f"{url}: cannot be reached (2 tries in " in refused(lambda: fetch(url, path), DISK)
    buckets.faults = lambda method, path, nth: 403
    buckets.seen.clear()
    assert f"{url}: access is denied" in refused(lambda: fetch(url, path), DISK)
    assert len(buckets.seen) == 1
    buckets.faults = lambda method, path, nth: lambda data: data[:-1] + b"\0"
    with pytest.raises(remote.BadSource, match=url):
        fetch(url, path)
    buckets.faults = lambda method, path, nth: None
    with pytest.raises(remote.BadSource, match="is not there"):
        remote.get(f"{url}-none", path)
    assert remote.read(f"{url}-none") is None
    assert not path.exists()


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_set_at_a_url_is_found_by_its_split_and_bad_shards_are_named_at_once(
    kind: str, web: Site, buckets: Buckets, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    servers.hurry(monkeypatch, patience=20)
    url, store = f"{web.url if kind == 'http' else buckets.bucket()}/x", Store(tmp_path / "cache")
    shutil.copytree(disk, web.folder / "x") if kind == "http" else buckets.upload(disk, url)
    for split in ("val", "train"):
        here = manifest.load(disk / split)
        for given in (url, f"{url}/", f"{url}/{split}"):
            found = resolve.sets((given,), split, tmp_path / "converted", store)
            assert found.name == f"{url}/{split}"
            assert (found.classes, found.shards, found.identity) == (here.classes, here.shards, here.identity)
            assert np.array_equal(found.labels, here.labels)
            found.check(full=True)
    both = resolve.sets((url, str(disk)), "train", tmp_path / "converted", store)
    assert np.array_equal(both.labels, np.tile(here.labels, 2))
    assert not (tmp_path / "converted").exists()
    for name, data in (("000000.tar", None), ("000001.npy", None), ("000002.tar", b"short")):
        (web if kind == "http" else buckets).put(f"{url}/train/{name}", data)
    line = refused(found.check, DATA)
    assert line.startswith(f"{url}/train: 3 of {len(found.shards)} shards are bad: 000000.tar (missing), ")
    assert "000001.tar (its index is missing)" in line
    assert f"000002.tar (5 bytes, not {found.shards[2].bytes})" in line
    states = verify(VerifyShards(shards=(f"{url}/train",), quiet=True, workers=1))
    assert [state.fault is None for state in states] == [False, False, False, *[True] * (len(states) - 3)]


def test_a_set_that_is_none_is_refused_with_what_to_do(web: Site, buckets: Buckets, tmp_path: Path):
    find_at = lambda url: lambda: resolve.sets((url,), "train", tmp_path, Store(tmp_path))  # noqa: E731
    for url in (web.url, f"{web.url}/{{000..009}}.tar", buckets.bucket(), "s3://there-is-no-such-bucket/x"):
        assert "index_shards" in refused(find_at(url), DATA)
    for page in (b"<html>Welcome</html>", b"{}", b"", b'{"format": "other", "version": 1}', b"\xff\xfe"):
        (web.folder / "manifest.json").write_bytes(page)
        assert f"{web.url}/manifest.json" in refused(find_at(web.url), DATA)


def to(url: str, images: Path, rank: int = 0, world: int = 1, **options: Any) -> dict[str, Manifest]:
    return convert(MakeShards(input=str(images), output=url, **(SHARDS | options)), rank, world)


def stored(buckets: Buckets) -> list[str]:
    """The names that were written, in their order, without the bucket."""
    return [path.split("/", 2)[2] for method, path in buckets.seen if method == "PUT" and path.count("/") > 1]


def test_a_conversion_to_s3_writes_what_one_to_disk_does(buckets: Buckets, images: Path, disk: Path, tmp_path: Path):
    url = f"{buckets.bucket()}/x"
    made = to(url, images, workers=2)  # processes, each of which asks anew for its file system
    assert buckets.contents(url) == contents(disk)
    assert contents(tmp_path / "home") == {}
    order = [name for name in stored(buckets) if not name.startswith(".notes") and "/.notes" not in name]
    assert sorted(order) == sorted(contents(disk))  # each once
    for split in ("train", "val"):
        assert [name for name in order if name.startswith(f"{split}/")][-1] == f"{split}/manifest.json"
        assert (made[split].name, made[split].samples) == (f"{url}/{split}", manifest.load(disk / split).samples)
    buckets.seen.clear()
    again = to(url, images)  # is done already
    assert stored(buckets) == []
    assert {split: part.shards for split, part in again.items()} == {s: part.shards for s, part in made.items()}


@pytest.mark.parametrize("at", [13, 25])
def test_an_interrupted_conversion_to_s3_goes_on(buckets: Buckets, images: Path, disk: Path, tmp_path: Path, at: int):
    """Writing is denied at a certain file, one after the other, until all are there."""
    url = f"{buckets.bucket()}/x"
    puts = lambda: sum(method == "PUT" for method, _ in buckets.seen)  # noqa: E731
    buckets.seen.clear()
    buckets.faults = lambda method, path, nth: 403 if method == "PUT" and puts() >= at else None
    assert url in refused(lambda: to(url, images), DISK)
    assert puts() > at  # a shard that was begun already may try, too
    done = [name for name in buckets.contents(url) if name.endswith(".json") and ".notes/0" in name]
    with pytest.raises(Refusal):
        resolve.sets((url,), "val", tmp_path, Store(tmp_path / "cache"))
    buckets.faults = lambda method, path, nth: None
    buckets.seen.clear()
    to(url, images)
    assert buckets.contents(url) == contents(disk)
    assert contents(tmp_path / "home") == {}
    sent_again = {name for name in stored(buckets) if name.endswith(".tar")}
    assert sent_again.isdisjoint(name.replace(".notes/", "").replace(".json", ".tar") for name in done)


def test_two_machines_convert_to_a_url(buckets: Buckets, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(write_pictures(tmp_path / "test", ["a/x.png"]), tmp_path / "excluded")
    options = {"exclude": (str(tmp_path / "excluded"),)}
    make(images, tmp_path / "alone", **SHARDS, **options)
    url, made = f"{buckets.bucket()}/x", []
    for rank in range(2):
        monkeypatch.setenv("HOME", str(tmp_path / f"machine{rank}"))
        made.append(to(url, images, rank, 2, **options))
    assert [set(one) for one in made] == [set(), {"train", "val"}]
    assert buckets.contents(url) == contents(tmp_path / "alone")
    assert contents(tmp_path / "machine1") == {}


def test_a_url_that_holds_something_else_is_refused_and_so_is_a_web_server(buckets: Buckets, images: Path):
    url = f"{buckets.bucket()}/x"
    buckets.put(f"{url}/train/letter.txt", b"dear")
    assert "is not empty" in refused(lambda: to(url, images), CANNOT_CREATE)
    assert buckets.contents(url) == {"train/letter.txt": b"dear"}
    to(f"{url}/other", images)
    before = buckets.contents(f"{url}/other")
    for changed in ({"resize": 8}, {"val_fraction": 0}):
        assert "another job" in refused(lambda changed=changed: to(f"{url}/other", images, **changed), CANNOT_CREATE)
    assert buckets.contents(f"{url}/other") == before
    assert "cannot be written" in refused(lambda: to(f"{servers.closed()}/x", images), CANNOT_CREATE)


@pytest.mark.parametrize("kind", ["http", "s3", "s3 folder", "s3 in place"])
def test_foreign_shards_at_a_url_are_read(disk: Path, host: Host, buckets: Buckets, tmp_path: Path, kind: str):
    """The tars alone of our own shards, so that the answer is known; what was indexed by its name is read by it."""
    tars = tmp_path / "tars" / "part"
    shutil.copytree(disk / "train", tars, ignore=shutil.ignore_patterns("*.npy", "*.json*"))
    url = host(kind.split()[0], tars.parent)
    here = index(IndexShards(shards=str(tars.parent), quiet=True, workers=1))
    given = url if "s3 " in kind else f"{url}/part/{{000000..{len(here.shards) - 1:06d}}}.tar"
    output = None if kind == "s3 in place" else str(tmp_path / "there")
    made = index(IndexShards(shards=given, output=output, quiet=True, workers=1))
    assert remote.is_url(str(made.at)) == (output is not None)
    samples = lambda one: Samples(one, Data(image_size=16, workers=0), 0, training=False)  # noqa: E731
    for name in (output or url, str(tars.parent)):
        loaded = resolve.sets((name,), "train", tmp_path, Store(tmp_path / "cache"))
        loaded.check()
        assert (loaded.samples, loaded.classes) == (here.samples, here.classes)
        assert np.array_equal(loaded.labels, here.labels)
        assert all(samples(loaded).read(i) == samples(here).read(i) for i in range(here.samples))
    assert contents(tmp_path / "home") == {}
    assert output or set(buckets.contents(url)) == set(contents(tars.parent))


def test_a_web_server_that_stays_away_ends_the_scan(web: Site, tmp_path: Path):
    shards = f"{servers.closed()}/{{000000..000003}}.tar"
    scan = lambda shards, **more: lambda: index(IndexShards(shards=shards, quiet=True, **more))  # noqa: E731
    assert ".tar" in refused(scan(shards, output=str(tmp_path / "x")), DISK)
    refused(scan(f"{web.url}/{{0..3}}.tar", output=str(tmp_path / "x")), DATA)
    refused(scan(f"{web.url}/0.tar"), USAGE)  # written to the web server
    assert not (tmp_path / "x" / "manifest.json").exists()


COUNT, EACH = 8, 4  # tars, images in each


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of plain squares: the colour is the number of the sample."""
    folder = tmp_path_factory.mktemp("coloured")
    for shard in range(COUNT):
        with TarWriter(str(folder / f"{shard}.tar"), encoder=False) as writer:
            for number in range(shard * EACH, (shard + 1) * EACH):
                png = encoded(Image.new("RGB", (9, 7), (number, 255 - number, 100)), "PNG")
                canary = b"cos\nsystem\n(S'touch canary'\ntR."
                writer.write({"__key__": str(number), "png": png, "cls": b"0", "pyd": canary})
    return folder


def stream(pattern: str, tmp_path: Path, **options: Any) -> SequentialStream:
    data = Data(**{"image_size": 8, "workers": 0, "flip": False, **options})
    return SequentialStream(tars((pattern,), Store(tmp_path / "cache")), data, seed=3, batch=2 * EACH)


def numbers(stream: SequentialStream, batches: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """The sample numbers of a process's batches of one tar's size."""
    made = islice(stream.batches(0, Share(rank, world, EACH), CPU), batches)
    return [batch["image"][:, 0, 4, 4].tolist() for batch in made]


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("disk", 2), ("http", 0), ("http", 2), ("s3", 0), pytest.param("s3", 2, marks=pytest.mark.process)],
)
def test_webdataset_deals_all_tars_anew_in_each_epoch(
    kind: str, workers: int, host: Host, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = str(coloured) if kind == "disk" else host(kind, coloured)
    pattern = url if kind == "s3" else f"{url}/{{0..{COUNT - 1}}}.tar"
    monkeypatch.setattr(webdataset_stream, "BUFFER", 1)  # the tars' own order, to tell which they are
    monkeypatch.chdir(tmp_path)
    epochs, each = 3, COUNT // 2
    dealt = [numbers(stream(pattern, tmp_path, workers=workers), epochs * each, rank, world=2) for rank in range(2)]
    orders = []
    for epoch in range(epochs):
        mine = [part[epoch * each : (epoch + 1) * each] for part in dealt]
        assert sorted(chain(*mine[0], *mine[1])) == list(range(COUNT * EACH))
        orders.append([batch[0] for part in mine for batch in part])
    assert len(set(map(tuple, orders))) == epochs
    assert set(orders[0][:each]) != set(orders[1][:each])
    assert not (tmp_path / "canary").exists()


def test_webdataset_shuffles_among_tars_and_is_the_same_again(coloured: Path, tmp_path: Path):
    pattern = f"{coloured}/*.tar"
    first, second = (numbers(stream(pattern, tmp_path), 2 * COUNT) for _ in range(2))
    assert first == second
    assert any(len({number // EACH for number in batch}) > 1 for batch in first)
    other = stream(pattern, tmp_path)
    other.seed = 4
    assert numbers(other, 2 * COUNT) != first


@pytest.mark.parametrize("workers", [0, 3])
def test_webdataset_has_no_end_though_tars_are_fewer_than_readers(coloured: Path, tmp_path: Path, workers: int):
    """Two tars for two processes of up to three workers: each takes as many steps as it is asked for."""
    for rank in range(2):
        batches = numbers(stream(f"{coloured}/{{0,1}}.tar", tmp_path, workers=workers), 12, rank, world=2)
        assert [len(batch) for batch in batches] == [EACH] * 12
        assert set(chain(*batches)) <= set(range(2 * EACH))


def test_webdataset_passes_over_what_it_cannot_read_or_ends(coloured: Path, tmp_path: Path, web: Site):
    for shard in (0, 1):
        shutil.copy(coloured / f"{shard}.tar", web.folder)
    for name in "267":
        (web.folder / f"{name}.tar").write_bytes(b"<html>no tar</html>")  # and 3.tar is not there
    some = stream(f"{web.url}/{{0..3}}.tar", tmp_path)
    assert set(chain(*numbers(some, 40))) == set(range(2 * EACH))
    said = " ".join(fault.reason for fault in some.faults.take())
    assert [f"{web.url}/{shard}.tar: " in said for shard in (0, 2, 3)] == [False, True, True]
    for url, code in ((web.url, DATA), (servers.closed(), DISK)):
        none = stream(f"{url}/{{6,7}}.tar", tmp_path)
        assert not next(none.batches(0, Share(0, 1, EACH), CPU))["valid"].any()
        assert none.faults.fatal is not None
        assert none.faults.fatal.code == code


def test_webdataset_says_what_it_does_not_promise(coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*TINY, "data.reader=webdataset", f"data.train={coloured}/{{0..3}}.tar", f"run={tmp_path}/run"]
    setup.sources(config.parse(recipes.Pretrain, words, recipes.FOLDER))
    assert "neither exactly once an epoch nor exactly resumable" in capsys.readouterr().out
