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

from ssl_vit.errors import CANNOT_CREATE, DISK, USAGE, Refusal
from ssl_vit.files import sha256 as digest_of

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
EXTRAS = {"gs": "gs", "hf": "hf"}  # of ours, which install these; the rest is in `remote`
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # failures of the local disk
TRIES = 5
PAUSE = 0.5  # seconds before the second try, doubled before each further one
PATIENCE = 30.0  # seconds in which something has to come
SLOWEST = 32_768  # bytes a second that count as something
Value = TypeVar("Value")


class BadSource(Exception):
    """The source answers, and has something else than what was promised; the text says what."""


def is_url(path: str) -> bool:
    """Whether a path is no plain local one."""
    return "://" in path or "::" in path or path.startswith("pipe:")


def check(url: str) -> str:
    """The URL without its last slash, or Refusal(USAGE): other schemes, chained URLs, and link-local hosts."""
    scheme, _, rest = url.partition("://")
    if "::" in url:
        raise Refusal(USAGE, f"{url}: chained URLs are not taken; give a folder, or one of {_schemes()}")
    if scheme not in PACKAGES or not rest:
        raise Refusal(USAGE, f"{url}: is not taken; give a folder, or one of {_schemes()}")
    if scheme in ("http", "https"):
        _refuse_link_local(url)
        if rest.startswith("/"):
            raise Refusal(USAGE, f"{url}: names no host")
    return url.rstrip("/")


def _schemes() -> str:
    return ", ".join(f"{scheme}://" for scheme in PACKAGES)


def _refuse_link_local(url: str) -> None:
    """Link-local addresses are where clouds keep a machine's own credentials."""
    try:
        host = unicodedata.normalize("NFKC", unquote(urlsplit(url).hostname or ""))  # digits have many spellings
        found = socket.getaddrinfo(host.replace("\u3002", "."), None)
    except (OSError, ValueError):
        return  # nobody there: fetching will say so
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if (getattr(ip, "ipv4_mapped", None) or ip).is_link_local:
            raise Refusal(USAGE, f"{url}: is a link-local address, which is refused")


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it. Instances belong to a process: ask anew in each."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        options = _web() if scheme in ("http", "https") else {}
        source, inside = fsspec.core.url_to_fs(check(url), **options)
    except ImportError as error:
        cure = f"pip install 'ssl_vit[{EXTRAS.get(scheme, 'remote')}]'"
        raise Refusal(USAGE, f"{url}: {PACKAGES[scheme]} is not installed: {cure}") from error
    source.invalidate_cache()  # of listings: others write there too
    return source, inside


@functools.cache  # the same options are the same file system to fsspec, which keeps its connections
def _web() -> dict[str, Any]:
    import aiohttp

    async def look(session: Any, context: Any, parameters: Any) -> None:
        del session, context
        where = parameters.response.headers.get("Location", "")
        _refuse_link_local(urljoin(str(parameters.url), where))

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(look)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    plain = {"Accept-Encoding": "identity"}  # a compressed answer has no known size
    return {"client_kwargs": {"timeout": limits, "trace_configs": [redirects], "headers": plain}}


def get(url: str, path: Path, size: int | None = None, sha256: str | None = None, altered: Path | None = None) -> None:
    """Fetch a file, verify it, and give it its name in one step.

    Raises BadSource where it is not there or has other bytes, Refusal(DISK) where the source stays away. A file of the
    right size and other bytes is then left at `altered`.
    """

    def once() -> None:
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            source, inside = _filesystem(url)
            _watched(lambda: source.get_file(inside, str(draft)), draft)
            found = draft.stat().st_size
            if size is not None and found != size:
                raise BadSource(f"{url}: {found} bytes came, not {size}")
            if sha256 and digest_of(draft) != sha256:
                if altered is not None:
                    os.replace(draft, altered)
                raise BadSource(f"{url}: other bytes than the manifest says")
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    _tried(url, once)


def read(url: str) -> bytes | None:
    """A small file's content, None where there is none."""
    source, inside = _filesystem(url)
    try:
        return _tried(url, lambda: _watched(lambda: source.cat_file(inside)))
    except BadSource:
        return None


def put(path: Path, url: str) -> None:
    """Store a local file; whoever reads the URL sees all of it or nothing."""
    source, inside = _filesystem(writable(url))
    _tried(url, lambda: _watched(lambda: source.put_file(str(path), inside), size=path.stat().st_size))


def write(url: str, data: bytes) -> None:
    """Store a small file."""
    source, inside = _filesystem(writable(url))
    _tried(url, lambda: _watched(lambda: source.pipe_file(inside, data), size=len(data)))


def writable(url: str) -> str:
    """The URL without its last slash, or Refusal where nothing can be written to it."""
    if url.startswith("http"):
        raise Refusal(CANNOT_CREATE, f"{url}: cannot be written to; give a folder, s3://, gs:// or hf://")
    return check(url)


def sizes(url: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder and below; Refusal(USAGE) on plain web servers, which list nothing."""
    if url.startswith("http"):
        raise Refusal(USAGE, f"{url}: a web server lists no files; name them, as in {url}/{{000000..000099}}.tar")
    source, inside = _filesystem(url)
    found = _tried(url, lambda: _watched(lambda: source.find(inside, detail=True)))
    return {name.removeprefix(inside).lstrip("/"): entry["size"] for name, entry in found.items()}


def size(url: str) -> int | None:
    """A file's bytes, None where it is missing; -1 where the server does not say."""
    source, inside = _filesystem(url)

    def ask() -> int:
        return _web_size(source, inside) if url.startswith("http") else int(source.info(inside)["size"])

    try:
        return _tried(url, lambda: _watched(ask))
    except BadSource:
        return None


def _web_size(source: Any, url: str) -> int:
    """What a web server says a file's size is; fsspec's own question takes any failure for a missing file."""
    from fsspec.asyn import sync

    async def head() -> int:
        session = await source.set_session()
        async with session.head(url, allow_redirects=True) as answer:
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            if answer.status in (405, 501):  # it does not say
                return -1
            answer.raise_for_status()
            return int(answer.headers.get("Content-Length", -1))

    return int(sync(source.loop, head) or 0)


def remove(url: str) -> None:
    """Delete a folder and what is in it; missing is fine."""
    source, inside = _filesystem(writable(url))
    with contextlib.suppress(BadSource):
        _tried(url, lambda: _watched(lambda: source.rm(inside, recursive=True)))


def _tried(url: str, once: Callable[[], Value]) -> Value:
    """Try again what may pass. What is missing is not asked for again; wrong bytes are, and stay BadSource."""
    began, last = time.monotonic(), None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return once()
        except FileNotFoundError as error:
            raise BadSource(f"{url}: is not there") from error
        except (Refusal, MemoryError, ImportError):
            raise
        except Exception as error:  # every store raises kinds of its own
            if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                said = " ".join(str(error).split())[:200]
                raise Refusal(DISK, f"{url}: access is denied ({said}); look after the credentials") from error
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            mismatch = type(error).__name__ == "FlexibleChecksumError"  # of S3, by a checksum of its own
            last = BadSource(f"{url}: other bytes than were stored") if mismatch else error
    if isinstance(last, BadSource):
        raise last
    reason = f"{type(last).__name__}: {' '.join(str(last).split())[:200]}".removesuffix(": ")
    waited = f"{TRIES} tries in {time.monotonic() - began:.0f} s"
    raise Refusal(
        DISK, f"{url}: cannot be reached ({waited}; {reason}); when it can, the same command goes on"
    ) from last


def _watched(call: Callable[[], Value], draft: Path | None = None, size: int = 0) -> Value:
    """Run a call that may hang; TimeoutError where nothing, or hardly anything, came within PATIENCE seconds.

    Progress is seen by the growth of `draft`; a call that sends `size` bytes has the time that the slowest takes.
    """
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    given_up = threading.Event()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))
        if given_up.is_set() and draft is not None:
            draft.unlink(missing_ok=True)

    threading.Thread(target=work, daemon=True).start()
    had, patience = 0, max(PATIENCE, size / SLOWEST)
    while True:
        try:
            value, error = box.get(timeout=patience)
        except queue.Empty:
            has = draft.stat().st_size if draft is not None and draft.exists() else 0
            if has - had < SLOWEST * PATIENCE:
                given_up.set()
                raise TimeoutError(f"{has - had} bytes in {patience:.0f} s") from None
            had = has
            continue
        if error is not None:
            raise error
        return value
