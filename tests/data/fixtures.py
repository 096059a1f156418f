"""What the tests of the data path share: a small class folder, a web server without patience, moto's S3."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ssl_vit.convert import index_shards, make_shards, worker_pool
from tests.data import servers
from tests.data.pictures import NAMES, write_pictures
from tests.data.servers import Buckets, Site


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """For a module that is not about workers: one is this process itself, several are processes as ever."""

    def run_pieces(
        pieces: list[Any], count: int, work: Callable[..., Any], arguments: Callable[..., Any], *extra_args: Any
    ) -> Any:
        if count > 1:
            yield from worker_pool.run_resilient(pieces, count, work, arguments, *extra_args)
        else:
            yield from ((piece, work(*arguments(piece))) for piece in list(pieces))

    with pytest.MonkeyPatch.context() as patch:
        for module in (make_shards, index_shards, make_shards):
            patch.setattr(module, "run_resilient", run_pieces)
        yield


@pytest.fixture(autouse=True)
def no_old_connections() -> Iterator[None]:
    """Close what a test has open: a forked child waits a second for each session that it inherits and cannot close."""
    yield
    for name in ("fsspec.implementations.http.HTTPFileSystem", "s3fs.core.S3FileSystem"):
        module, _, kind = name.rpartition(".")
        if module in sys.modules:
            getattr(sys.modules[module], kind).clear_instance_cache()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 images of three classes."""
    return write_pictures(tmp_path / "images", NAMES)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server of an empty folder, which is asked again soon."""
    (tmp_path / "web").mkdir()
    servers.shorten_timeouts(monkeypatch, patience=10)
    with servers.serve_folder(tmp_path / "web") as site:
        yield site


@pytest.fixture(scope="session")
def moto() -> Iterator[Buckets]:
    with servers.serve_s3() as server:
        yield server


@pytest.fixture
def buckets(moto: Buckets, tmp_path: Path) -> Iterator[Buckets]:
    """S3, with this test's own home for what is on its way there."""
    moto.requests.clear()
    with servers.use_s3(moto, tmp_path / "home"):
        yield moto
    moto.faults = lambda method, path, nth: None


@pytest.fixture
def host(buckets: Buckets) -> Iterator[Callable[[str, Path], str]]:
    """Put a folder on the web ("http") or on S3 ("s3"): its URL."""
    with ExitStack() as stack:

        def publish(kind: str, folder: Path) -> str:
            if kind == "http":
                return stack.enter_context(servers.serve_folder(folder)).url
            url = f"{buckets.bucket()}/x"
            buckets.upload(folder, url)
            return url

        yield publish
