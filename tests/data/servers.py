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
from ssl_vit.errors import Refusal
from tests.data.pictures import contents


@dataclass(frozen=True)
class Answer:
    """What a web server sends for a file."""

    code: int = 200  # 0: the connection is closed without a word
    change: Callable[[bytes], bytes] = bytes  # other bytes than the file's, honestly announced
    more: int | None = 0  # bytes announced beyond those that come; None: no length, the end tells
    cut: int | None = None  # the connection breaks after so many bytes
    drip: tuple[int, float] | None = None  # so many bytes at a time, and seconds of pause after each
    late: float = 0  # seconds before the first word
    where: str = ""  # another place

    def send(self, handler: "Handler", data: bytes) -> None:
        time.sleep(self.late)
        handler.close_connection |= not self.code or self.more != 0 or self.cut is not None
        if not self.code:
            return
        data = self.change(data) if self.code == 200 else b"" if self.where else b"error"
        length = ("Connection", "close") if self.more is None else ("Content-Length", str(len(data) + self.more))
        handler.send_response(self.code)
        for name, value in (length, *([("Location", self.where)] if self.where else [])):
            handler.send_header(name, value)
        handler.end_headers()
        data = b"" if handler.command == "HEAD" else data[: self.cut]
        size, pause = self.drip or (len(data) or 1, 0)
        for first in range(0, len(data), size):
            handler.body(data[first : first + size])
            time.sleep(pause)


GONE = Answer(0)


@dataclass
class Site:
    """A folder on the web: who asked for what, how many bytes left, and what is answered instead of the file."""

    folder: Path
    url: str = ""
    faults: Callable[[str, int], Answer | None] = lambda path, nth: None  # nth: 0 for the first GET of a path
    got: Counter[str] = field(default_factory=Counter)  # GET requests by path
    asked: Counter[str] = field(default_factory=Counter)  # HEAD requests by path
    sent: Counter[str] = field(default_factory=Counter)  # body bytes by path
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
        self.place = unquote(self.path).lstrip("/")
        seen = self.site.got if self.command == "GET" else self.site.asked
        with self.site.lock:
            nth = seen[self.place]
            seen[self.place] += 1
            self.site.headers.append(dict(self.headers))
        file = self.site.folder / self.place
        answer = self.site.faults(self.place, nth) or Answer(200 if file.is_file() else 404)
        answer.send(self, file.read_bytes() if file.is_file() else b"")

    do_HEAD = do_GET

    def body(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        with self.site.lock:
            self.site.sent[self.place] += len(data)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        pass


class Server(ThreadingHTTPServer):
    """Whose clients may go away in the middle of an answer."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A folder on http://127.0.0.1."""
    made = Site(folder)
    with Server(("127.0.0.1", 0), partial(Handler, site=made)) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
        thread.start()
        try:
            yield made
        finally:
            made.faults = lambda path, nth: GONE  # for connections that are kept open
            server.shutdown()
            thread.join()


def closed() -> str:
    """A URL where nobody listens."""
    with Server(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


@dataclass
class Buckets:
    """An S3 API: its requests, and what is answered instead (a status, or other bytes for the body)."""

    client: Any  # boto3's
    environment: dict[str, str]  # in which it is found
    faults: Callable[[str, str, int], int | Callable[[bytes], bytes] | None] = lambda method, path, nth: None
    seen: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of every request, in order

    def bucket(self) -> str:
        """A new bucket's URL."""
        name = uuid.uuid4().hex
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, url: str, data: bytes | None) -> None:
        """Store an object; none: delete it."""
        name, _, key = url.removeprefix("s3://").partition("/")
        do, body = (self.client.delete_object, {}) if data is None else (self.client.put_object, {"Body": data})
        do(Bucket=name, Key=key, **body)

    def contents(self, url: str) -> dict[str, bytes]:
        """Name -> bytes of all below a URL, by boto3 alone."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        found = self.client.list_objects_v2(Bucket=name, Prefix=f"{prefix}/" if prefix else "").get("Contents", [])
        read = lambda key: self.client.get_object(Bucket=name, Key=key)["Body"].read()  # noqa: E731
        return {entry["Key"].removeprefix(prefix).lstrip("/"): read(entry["Key"]) for entry in found}

    def upload(self, folder: Path, url: str) -> None:
        """All files of a folder, by boto3 alone."""
        for name, data in contents(folder).items():
            self.put(f"{url}/{name}", data)


@contextmanager
def s3() -> Iterator[Buckets]:
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
    made = Buckets(boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys), environment)
    inner = server._server.app  # type: ignore[union-attr]

    def outer(environment: dict[str, Any], begin: Callable[..., Any]) -> Any:
        place = environment["REQUEST_METHOD"], environment["PATH_INFO"].lstrip("/")
        fault = made.faults(*place, made.seen.count(place))  # nth: 0 for the first of its kind
        made.seen.append(place)
        if isinstance(fault, int):
            begin(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        answer = inner(environment, begin)
        return answer if fault is None else [fault(b"".join(answer))]

    server._server.app = outer  # type: ignore[union-attr]
    try:
        yield made
    finally:
        server.stop()


@contextmanager
def at_s3(buckets: Buckets, home: Path) -> Iterator[None]:
    """Have this process, and those it starts, use that S3; nothing is kept in the user's own home."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (buckets.environment | {"HOME": str(home)}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of another test's server
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def hurry(patch: pytest.MonkeyPatch, tries: int = 3, pause: float = 0.01, patience: float = 0.5) -> None:
    """Shorter times than those for the internet; processes forked later have them too, others have not."""
    for name, value in {"TRIES": tries, "PAUSE": pause, "PATIENCE": patience}.items():
        patch.setattr(remote, name, value)
    patch.setattr(remote, "_web", functools.cache(remote._web.__wrapped__))  # it remembers the patience, too


def refused(call: Callable[[], Any], code: int) -> str:
    """The one line of a refusal."""
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)
