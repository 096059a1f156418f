"""Files on https://, s3://, gs:// and hf://, through fsspec: guarded, with retries, time limits and a clear end."""

import contextlib
import errno
import functools
import ipaddress
import os
import queue
import socket
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import sha256 as digest_of

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
EXTRAS = {"gs": "gs", "hf": "hf"}  # of ours, which install these; the rest is in `remote`
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # failures of the local disk
TRIES = 5
PAUSE = 0.5  # seconds before the second try, doubled before each further one
STALL_TIMEOUT = 30.0  # seconds in which something has to come
MIN_BYTES_PER_SECOND = 32_768  # bytes a second that count as something
Value = TypeVar("Value")


class RemoteMismatch(Exception):
    """The source answers, and has something else than what was promised; the text says what."""


def is_url(path: str) -> bool:
    """Whether a path is no plain local one."""
    return "://" in path or "::" in path or path.startswith("pipe:")


def check_url(url: str) -> str:
    """The URL without its last slash, or ExitError(USAGE): other schemes, chained URLs, and link-local hosts."""
    scheme, _, host_and_path = url.partition("://")
    if "::" in url:
        raise ExitError(ExitCode.USAGE, f"{url}: chained URLs are not taken; give a folder, or one of {_schemes()}")
    if scheme not in PACKAGES or not host_and_path:
        raise ExitError(ExitCode.USAGE, f"{url}: is not taken; give a folder, or one of {_schemes()}")
    if scheme in ("http", "https"):
        _refuse_link_local(url)
        if host_and_path.startswith("/"):
            raise ExitError(ExitCode.USAGE, f"{url}: names no host")
    return url.rstrip("/")


def _schemes() -> str:
    return ", ".join(f"{scheme}://" for scheme in PACKAGES)


def _refuse_link_local(url: str) -> None:
    """Link-local addresses are where clouds keep a machine's own credentials."""
    try:
        host = unicodedata.normalize("NFKC", unquote(urlsplit(url).hostname or ""))  # digits have many spellings
        addresses = socket.getaddrinfo(host.replace("\u3002", "."), None)
    except (OSError, ValueError):
        return  # nobody there: fetching will say so
    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if (getattr(ip, "ipv4_mapped", None) or ip).is_link_local:
            raise ExitError(ExitCode.USAGE, f"{url}: is a link-local address, which is refused")


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it. Instances belong to a process: ask anew in each."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        options = _http_options() if scheme in ("http", "https") else {}
        fs, fs_path = fsspec.core.url_to_fs(check_url(url), **options)
    except ImportError as error:
        hint = f"pip install 'ssl_vit[{EXTRAS.get(scheme, 'remote')}]'"
        raise ExitError(ExitCode.USAGE, f"{url}: {PACKAGES[scheme]} is not installed: {hint}") from error
    fs.invalidate_cache()  # of listings: others write there too
    return fs, fs_path


@functools.cache  # the same options are the same file system to fsspec, which keeps its connections
def _http_options() -> dict[str, Any]:
    import aiohttp

    async def check_redirect(session: Any, context: Any, parameters: Any) -> None:
        del session, context
        location = parameters.response.headers.get("Location", "")
        _refuse_link_local(urljoin(str(parameters.url), location))

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(check_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_TIMEOUT, sock_read=STALL_TIMEOUT)
    headers = {"Accept-Encoding": "identity"}  # a compressed answer has no known size
    return {"client_kwargs": {"timeout": timeout, "trace_configs": [redirects], "headers": headers}}


def download(
    url: str, path: Path, size: int | None = None, sha256: str | None = None, accept_corrupt: Path | None = None
) -> None:
    """Fetch a file, verify it, and give it its name in one step.

    Raises RemoteMismatch where it is not there or has other bytes, ExitError(DISK) where the source stays away. A file
    of the right size and other bytes is then left at `accept_corrupt`.
    """

    def attempt_download() -> None:
        temp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            fs, fs_path = _filesystem(url)
            _with_stall_timeout(lambda: fs.get_file(fs_path, str(temp_path)), temp_path)
            num_bytes = temp_path.stat().st_size
            if size is not None and num_bytes != size:
                raise RemoteMismatch(f"{url}: {num_bytes} bytes came, not {size}")
            if sha256 and digest_of(temp_path) != sha256:
                if accept_corrupt is not None:
                    os.replace(temp_path, accept_corrupt)
                raise RemoteMismatch(f"{url}: other bytes than the manifest says")
            with temp_path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temp_path, path)
        finally:
            temp_path.unlink(missing_ok=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    _retry(url, attempt_download)


def read_file(url: str) -> bytes | None:
    """A small file's content, None where there is none."""
    fs, fs_path = _filesystem(url)
    try:
        return _retry(url, lambda: _with_stall_timeout(lambda: fs.cat_file(fs_path)))
    except RemoteMismatch:
        return None


def upload(path: Path, url: str) -> None:
    """Store a local file; whoever reads the URL sees all of it or nothing."""
    fs, fs_path = _filesystem(check_writable(url))
    _retry(url, lambda: _with_stall_timeout(lambda: fs.put_file(str(path), fs_path), size=path.stat().st_size))


def write_file(url: str, data: bytes) -> None:
    """Store a small file."""
    fs, fs_path = _filesystem(check_writable(url))
    _retry(url, lambda: _with_stall_timeout(lambda: fs.pipe_file(fs_path, data), size=len(data)))


def check_writable(url: str) -> str:
    """The URL without its last slash, or ExitError where nothing can be written to it."""
    if url.startswith("http"):
        raise ExitError(ExitCode.CANNOT_CREATE, f"{url}: cannot be written to; give a folder, s3://, gs:// or hf://")
    return check_url(url)


def list_sizes(url: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder and below; ExitError(USAGE) on plain web servers, which list nothing."""
    if url.startswith("http"):
        raise ExitError(
            ExitCode.USAGE, f"{url}: a web server lists no files; name them, as in {url}/{{000000..000099}}.tar"
        )
    fs, fs_path = _filesystem(url)
    entries = _retry(url, lambda: _with_stall_timeout(lambda: fs.find(fs_path, detail=True)))
    return {name.removeprefix(fs_path).lstrip("/"): entry["size"] for name, entry in entries.items()}


def file_size(url: str) -> int | None:
    """A file's bytes, None where it is missing; -1 where the server does not say."""
    fs, fs_path = _filesystem(url)

    def query_size() -> int:
        return _http_file_size(fs, fs_path) if url.startswith("http") else int(fs.info(fs_path)["size"])

    try:
        return _retry(url, lambda: _with_stall_timeout(query_size))
    except RemoteMismatch:
        return None


def _http_file_size(fs: Any, url: str) -> int:
    """What a web server says a file's size is; fsspec's own question takes any failure for a missing file."""
    from fsspec.asyn import sync

    async def head() -> int:
        session = await fs.set_session()
        async with session.head(url, allow_redirects=True) as response:
            if response.status in (404, 410):
                raise FileNotFoundError(url)
            if response.status in (405, 501):  # it does not say
                return -1
            response.raise_for_status()
            return int(response.headers.get("Content-Length", -1))

    return int(sync(fs.loop, head) or 0)


def remove_tree(url: str) -> None:
    """Delete a folder and what is in it; missing is fine."""
    fs, fs_path = _filesystem(check_writable(url))
    with contextlib.suppress(RemoteMismatch):
        _retry(url, lambda: _with_stall_timeout(lambda: fs.rm(fs_path, recursive=True)))


def _retry(url: str, operation: Callable[[], Value]) -> Value:
    """Try again what may pass. What is missing is not asked for again; wrong bytes are, and stay RemoteMismatch."""
    start_time, last_error = time.monotonic(), None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return operation()
        except FileNotFoundError as error:
            raise RemoteMismatch(f"{url}: is not there") from error
        except (ExitError, MemoryError, ImportError):
            raise
        except Exception as error:  # every store raises kinds of its own
            if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                message = " ".join(str(error).split())[:200]
                raise ExitError(
                    ExitCode.DISK, f"{url}: access is denied ({message}); look after the credentials"
                ) from error
            if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                raise
            mismatch = type(error).__name__ == "FlexibleChecksumError"  # of S3, by a checksum of its own
            last_error = RemoteMismatch(f"{url}: other bytes than were stored") if mismatch else error
    if isinstance(last_error, RemoteMismatch):
        raise last_error
    reason = f"{type(last_error).__name__}: {' '.join(str(last_error).split())[:200]}".removesuffix(": ")
    attempts = f"{TRIES} tries in {time.monotonic() - start_time:.0f} s"
    raise ExitError(
        ExitCode.DISK, f"{url}: cannot be reached ({attempts}; {reason}); when it can, the same command goes on"
    ) from last_error


def _with_stall_timeout(call: Callable[[], Value], temp_path: Path | None = None, size: int = 0) -> Value:
    """Run a call that may hang; TimeoutError where nothing, or hardly anything, came within STALL_TIMEOUT seconds.

    Progress is seen by the growth of `temp_path`; a call that sends `size` bytes has the time that the slowest takes.
    """
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def run_call() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))
        if abandoned.is_set() and temp_path is not None:
            temp_path.unlink(missing_ok=True)

    threading.Thread(target=run_call, daemon=True).start()
    prev_bytes, timeout = 0, max(STALL_TIMEOUT, size / MIN_BYTES_PER_SECOND)
    while True:
        try:
            value, error = results.get(timeout=timeout)
        except queue.Empty:
            num_bytes = temp_path.stat().st_size if temp_path is not None and temp_path.exists() else 0
            if num_bytes - prev_bytes < MIN_BYTES_PER_SECOND * STALL_TIMEOUT:
                abandoned.set()
                raise TimeoutError(f"{num_bytes - prev_bytes} bytes in {timeout:.0f} s") from None
            prev_bytes = num_bytes
            continue
        if error is not None:
            raise error
        return value
