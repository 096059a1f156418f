"""Real servers on this machine: a web server that keeps count and fails as it is told, and moto's S3."""

import functools
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote

import pytest

from ssl_vit.data import remote
from ssl_vit.errors import ExitError
from tests.data.pictures import contents


@dataclass(frozen=True)
class Answer:
    """What a web server sends for a file."""

    code: int = 200  # 0: the connection is closed without a word
    change: Callable[[bytes], bytes] = bytes  # other bytes than the file's, honestly announced
    extra_length: int | None = 0  # bytes announced beyond those that come; None: no length, the end tells
    cut: int | None = None  # the connection breaks after so many bytes
    drip: tuple[int, float] | None = None  # so many bytes at a time, and seconds of pause after each
    delay: float = 0  # seconds before the first word
    location: str = ""  # another place

    def send(self, handler: "Handler", data: bytes) -> None:
        time.sleep(self.delay)
        handler.close_connection |= not self.code or self.extra_length != 0 or self.cut is not None
        if not self.code:
            return
        data = self.change(data) if self.code == 200 else b"" if self.location else b"error"
        length = (
            ("Connection", "close")
            if self.extra_length is None
            else ("Content-Length", str(len(data) + self.extra_length))
        )
        handler.send_response(self.code)
        for name, value in (length, *([("Location", self.location)] if self.location else [])):
            handler.send_header(name, value)
        handler.end_headers()
        data = b"" if handler.command == "HEAD" else data[: self.cut]
        size, pause = self.drip or (len(data) or 1, 0)
        for first in range(0, len(data), size):
            handler.write_body(data[first : first + size])
            time.sleep(pause)


CLOSED_CONNECTION = Answer(0)


@dataclass
class Site:
    """A folder on the web: who asked for what, how many bytes left, and what is answered instead of the file."""

    folder: Path
    url: str = ""
    faults: Callable[[str, int], Answer | None] = lambda path, nth: None  # nth: 0 for the first GET of a path
    get_counts: Counter[str] = field(default_factory=Counter)  # GET requests by path
    head_counts: Counter[str] = field(default_factory=Counter)  # HEAD requests by path
    bytes_sent: Counter[str] = field(default_factory=Counter)  # body bytes by path
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    lock: Lock = field(default_factory=Lock)

    def put(self, url: str, data: bytes | None) -> None:
        """Store a file; none: delete it."""
        path = self.folder / url.removeprefix(f"{self.url}/")
        path.unlink() if data is None else path.write_bytes(data)

    def count(self, counter: Counter[str], suffix: str = ".tar") -> int:
        """Of `got`, `asked` or `sent`, for all files of a kind."""
        return sum(count for path, count in counter.items() if path.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments: Any, site: Site):
        self.site = site
        site.connections += 1
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.relative_path = unquote(self.path).lstrip("/")
        counts = self.site.get_counts if self.command == "GET" else self.site.head_counts
        with self.site.lock:
            nth = counts[self.relative_path]
            counts[self.relative_path] += 1
            self.site.headers.append(dict(self.headers))
        file = self.site.folder / self.relative_path
        answer = self.site.faults(self.relative_path, nth) or Answer(200 if file.is_file() else 404)
        answer.send(self, file.read_bytes() if file.is_file() else b"")

    do_HEAD = do_GET

    def write_body(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        with self.site.lock:
            self.site.bytes_sent[self.relative_path] += len(data)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        pass


class Server(ThreadingHTTPServer):
    """Whose clients may go away in the middle of an answer."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serve_folder(folder: Path) -> Iterator[Site]:
    """A folder on http://127.0.0.1."""
    site = Site(folder)
    with Server(("127.0.0.1", 0), partial(Handler, site=site)) as server:
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
        thread.start()
        try:
            yield site
        finally:
            site.faults = lambda path, nth: CLOSED_CONNECTION  # for connections that are kept open
            server.shutdown()
            thread.join()


def closed_url() -> str:
    """A URL where nobody listens."""
    with Server(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


@dataclass
class Buckets:
    """An S3 API: its requests, and what is answered instead (a status, or other bytes for the body)."""

    client: Any  # boto3's
    environment: dict[str, str]  # in which it is found
    faults: Callable[[str, str, int], int | Callable[[bytes], bytes] | None] = lambda method, path, nth: None
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of every request, in order

    def bucket(self) -> str:
        """A new bucket's URL."""
        name = uuid.uuid4().hex
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, url: str, data: bytes | None) -> None:
        """Store an object; none: delete it."""
        name, _, key = url.removeprefix("s3://").partition("/")
        operation, body = (self.client.delete_object, {}) if data is None else (self.client.put_object, {"Body": data})
        operation(Bucket=name, Key=key, **body)

    def contents(self, url: str) -> dict[str, bytes]:
        """Name -> bytes of all below a URL, by boto3 alone."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        entries = self.client.list_objects_v2(Bucket=name, Prefix=f"{prefix}/" if prefix else "").get("Contents", [])
        read_object = lambda key: self.client.get_object(Bucket=name, Key=key)["Body"].read()  # noqa: E731
        return {entry["Key"].removeprefix(prefix).lstrip("/"): read_object(entry["Key"]) for entry in entries}

    def upload(self, folder: Path, url: str) -> None:
        """All files of a folder, by boto3 alone."""
        for name, data in contents(folder).items():
            self.put(f"{url}/{name}", data)


@contextmanager
def serve_s3() -> Iterator[Buckets]:
    """moto's S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    environment = {name.upper(): value for name, value in keys.items()}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}
    environment |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    buckets = Buckets(boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys), environment)
    original_app = server._server.app  # type: ignore[union-attr]

    def app_with_faults(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        request = environment["REQUEST_METHOD"], environment["PATH_INFO"].lstrip("/")
        fault = buckets.faults(*request, buckets.requests.count(request))  # nth: 0 for the first of its kind
        buckets.requests.append(request)
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        answer = original_app(environment, start_response)
        return answer if fault is None else [fault(b"".join(answer))]

    server._server.app = app_with_faults  # type: ignore[union-attr]
    try:
        yield buckets
    finally:
        server.stop()


@contextmanager
def use_s3(buckets: Buckets, home: Path) -> Iterator[None]:
    """Have this process, and those it starts, use that S3; nothing is kept in the user's own home."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (buckets.environment | {"HOME": str(home)}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of another test's server
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def shorten_timeouts(patch: pytest.MonkeyPatch, tries: int = 3, pause: float = 0.01, patience: float = 0.5) -> None:
    """Shorter times than those for the internet; processes forked later have them too, others have not."""
    for name, value in {"TRIES": tries, "PAUSE": pause, "STALL_TIMEOUT": patience}.items():
        patch.setattr(remote, name, value)
    patch.setattr(
        remote, "_http_options", functools.cache(remote._http_options.__wrapped__)
    )  # it remembers the patience, too


def assert_refused(call: Callable[[], Any], code: int) -> str:
    """The one line of a refusal."""
    with pytest.raises(ExitError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)
