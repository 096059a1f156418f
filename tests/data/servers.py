"""Real servers on this machine: a web server that keeps count and fails as it is told, and moto's S3."""

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
from ssl_vit.exits import Refusal


@dataclass
class Site:
    """A folder on the web: who asked for what, how many bytes left, and what is answered instead of the file."""

    folder: Path
    url: str = ""
    faults: "Callable[[str, int], Answer | None]" = lambda path, nth: None  # nth: 0 for the first GET of a path
    got: Counter[str] = field(default_factory=Counter)  # GET requests by path
    asked: Counter[str] = field(default_factory=Counter)  # HEAD requests by path
    sent: Counter[str] = field(default_factory=Counter)  # body bytes by path
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    lock: Lock = field(default_factory=Lock)

    def bytes(self, suffix: str = ".tar") -> int:
        """Body bytes of all files of a kind."""
        return sum(count for path, count in self.sent.items() if path.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments: Any, site: Site):
        self.site = site
        site.connections += 1
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._do(self.site.got)

    def do_HEAD(self) -> None:
        self._do(self.site.asked)

    def _do(self, seen: Counter[str]) -> None:
        path = unquote(self.path).lstrip("/")
        with self.site.lock:
            nth = seen[path]
            seen[path] += 1
            self.site.headers.append(dict(self.headers))
        file = self.site.folder / path
        answer = self.site.faults(path, nth)
        if answer is not None:
            answer(self, file.read_bytes() if file.is_file() else b"")
        elif file.is_file():
            self.head(200, file.stat().st_size)
            self.body(file.read_bytes())
        else:
            self.head(404, 0)

    def head(self, code: int, length: int | None, **more: str) -> None:
        self.send_response(code)
        for name, value in more.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def body(self, data: bytes) -> None:
        if self.command == "HEAD":
            return
        self.wfile.write(data)
        self.wfile.flush()
        with self.site.lock:
            self.site.sent[unquote(self.path).lstrip("/")] += len(data)

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        pass


Answer = Callable[[Handler, bytes], None]


def status(code: int) -> Answer:
    """An error of the server."""

    def answer(handler: Handler, data: bytes) -> None:
        del data
        handler.head(code, 5)
        handler.body(b"error")

    return answer


def cut(at: int) -> Answer:
    """The connection breaks after so many bytes."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.head(200, len(data))
        handler.body(data[:at])
        handler.hang_up()

    return answer


def drip(size: int, pause: float) -> Answer:
    """So few bytes at a time, and a pause after each."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.head(200, len(data))
        for first in range(0, len(data), size):
            handler.body(data[first : first + size])
            time.sleep(pause)

    return answer


def late(pause: float) -> Answer:
    """Nothing for a while, then the file."""

    def answer(handler: Handler, data: bytes) -> None:
        time.sleep(pause)
        handler.head(200, len(data))
        handler.body(data)

    return answer


def other(change: Callable[[bytes], bytes]) -> Answer:
    """Other bytes than the file's, honestly announced."""

    def answer(handler: Handler, data: bytes) -> None:
        data = change(data)
        handler.head(200, len(data))
        handler.body(data)

    return answer


def lying(by: int) -> Answer:
    """More (or fewer) bytes announced than there are."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.head(200, len(data) + by)
        handler.body(data)
        handler.hang_up()

    return answer


def unsaid(handler: Handler, data: bytes) -> None:
    """No length: the end of the connection is the end of the file."""
    handler.head(200, None)
    handler.body(data)


def redirect(where: str) -> Answer:
    """Another place."""

    def answer(handler: Handler, data: bytes) -> None:
        del data
        handler.head(302, 0, Location=where)

    return answer


def gone(handler: Handler, data: bytes) -> None:
    """The connection is closed without a word."""
    del data
    handler.hang_up()


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
            made.faults = lambda path, nth: gone  # for connections that are kept open
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
    faults: Callable[[str, str, int], int | Callable[[bytes], bytes] | None] = lambda method, path, nth: None
    seen: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of every request, in order

    def bucket(self) -> str:
        """A new bucket's URL."""
        name = uuid.uuid4().hex
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, url: str, data: bytes) -> None:
        name, _, key = url.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=name, Key=key, Body=data)

    def delete(self, url: str) -> None:
        name, _, key = url.removeprefix("s3://").partition("/")
        self.client.delete_object(Bucket=name, Key=key)

    def contents(self, url: str) -> dict[str, bytes]:
        """Name -> bytes of all below a URL, by boto3 alone."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        found = self.client.list_objects_v2(Bucket=name, Prefix=f"{prefix}/" if prefix else "").get("Contents", [])
        read = lambda key: self.client.get_object(Bucket=name, Key=key)["Body"].read()  # noqa: E731
        return {entry["Key"].removeprefix(prefix).lstrip("/"): read(entry["Key"]) for entry in found}

    def upload(self, folder: Path, url: str) -> None:
        """All files of a folder, by boto3 alone."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@contextmanager
def s3() -> Iterator[tuple[Buckets, dict[str, str]]]:
    """moto's S3, and the environment in which it is found."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **credentials)
    made = Buckets(client)
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
    environment = {name.upper(): value for name, value in credentials.items() if name != "region_name"}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    environment |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    try:
        yield made, environment
    finally:
        server.stop()


@contextmanager
def at_s3(environment: dict[str, str], home: Path) -> Iterator[None]:
    """Have this process, and those it starts, use that S3; nothing is kept in the user's own home."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | {"HOME": str(home)}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # those of another test's server
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def hurry(patch: pytest.MonkeyPatch, tries: int = 3, pause: float = 0.01, patience: float = 0.5) -> None:
    """Shorter times than those for the internet; processes forked later have them too, others have not."""
    patch.setattr(remote, "TRIES", tries)
    patch.setattr(remote, "PAUSE", pause)
    patch.setattr(remote, "PATIENCE", patience)


def refused(call: Callable[[], Any], code: int) -> str:
    """The one line of a refusal."""
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)
