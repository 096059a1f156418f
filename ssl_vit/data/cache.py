"""Remote shards on the node's own disk: fetched once a node, verified, under a cap of bytes.

Files are named by what they hold, so that equal shards are kept once and a replaced one is never taken for the old.
All processes of a node share a folder: whoever needs a file first holds its lock and fetches it, the others wait. The
files used longest ago make room; one that is open stays readable until it is closed.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ssl_vit.data import remote
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.rng import hash_key
from ssl_vit.runtime import detach_worker_signals

NUM_LOCKS = 64  # files of locks: two that fall on the same one are fetched one after the other
MAX_DOWNLOADS = 4  # downloads of the process that fetches ahead
STALE_SECONDS = 2.0  # seconds: a draft that was written to a moment ago is let be
FAILED_PREFIX = "failed "  # begins the note of a download that did not come
CORRUPT_PREFIX = "altered-"  # begins the name of a file whose bytes are not those that were promised


@dataclass(frozen=True)
class CacheDir:
    """A folder of the node for remote files, and how many bytes it may hold."""

    folder: Path = field(default_factory=lambda: Path("~/.cache/ssl_vit").expanduser())
    max_bytes: int = 100 * 10**9

    def cache_for(self, url: str) -> "Cache":
        """The files below a URL."""
        return Cache(url, self.folder, self.max_bytes)


@dataclass(frozen=True)
class Cache:
    """The files below a URL, on local disk."""

    url: str
    folder: Path
    max_bytes: int

    def fetch(self, name: str, size: int | None, sha256: str, accept_corrupt: bool = False) -> Path:
        """The local path of a file, fetched where it is not there yet; raises as `remote.get` does.

        With `accept_corrupt`, a file of the right size and other bytes is taken too, under another name.
        """
        stem = sha256 or f"{hash_key(self.url, name):016x}"
        path = self.folder / f"{stem}{Path(name).suffix}"
        corrupt_path = path.with_name(CORRUPT_PREFIX + path.name)
        for candidate in (path, corrupt_path) if accept_corrupt else (path,):
            if _touch_if_complete(candidate, size):
                return candidate
        self._prepare()
        wait_start = time.monotonic()
        with _hold_lock(self.folder / _lock_name(path.name)) as lock:
            if _touch_if_complete(path, size):
                return path
            _raise_recorded_failure(lock, wait_start)
            for temp_path in self.folder.glob(f".{path.name}.*.tmp"):  # of whoever held the lock and died
                temp_path.unlink(missing_ok=True)
            if size is None and not sha256:  # nothing but its name is known
                size = max(0, remote.file_size(f"{self.url}/{name}") or 0)
            self._make_room(size or 0, path, lock)
            try:
                remote.download(
                    f"{self.url}/{name}",
                    path,
                    size,
                    sha256,
                    corrupt_path if accept_corrupt and size is not None else None,
                )
            except remote.RemoteMismatch:
                if not (accept_corrupt and _touch_if_complete(corrupt_path, size)):
                    raise
                return corrupt_path
            except ExitError as error:
                _write_note(lock, f"{FAILED_PREFIX}{time.monotonic()} {error}")
                raise
            _write_note(lock, "")
        return path

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExitError(
                ExitCode.CANNOT_CREATE, f"{self.folder}: {error.strerror}; name another data.cache"
            ) from error

    def _make_room(self, size: int, target: Path, lock: int) -> None:
        """Delete what was used longest ago until `size` more bytes fit, and note in the held lock that they come.

        Downloads that are under way count whole; where they leave no room, wait for them.
        """
        if size > self.max_bytes:
            reason = f"{target.name} has {size} bytes, data.cache_gb allows {self.max_bytes}"
            raise ExitError(ExitCode.DISK, f"{self.folder}: {reason}; allow a few times a shard")
        while True:
            with _hold_lock(self.folder / ".room"):
                total = size + sum(map(_pending_bytes, self.folder.glob(".lock-*")))
                entries = self._cached_files()  # after: a download that ends in between counts twice, not never
                total += sum(stat.st_size for _, stat in entries)
                for path, stat in sorted(entries, key=lambda entry: entry[1].st_mtime):
                    if total <= self.max_bytes:
                        break
                    path.unlink(missing_ok=True)
                    total -= stat.st_size
                if total <= self.max_bytes:
                    _write_note(lock, str(size))
                    return
            time.sleep(0.05)

    def _cached_files(self) -> list[tuple[Path, os.stat_result]]:
        """The files that are kept; drafts of processes that died are removed."""
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if not entry.name.startswith("."):
                    files.append((Path(entry.path), entry.stat()))
                elif entry.name.endswith(".tmp"):
                    lock = self.folder / _lock_name(entry.name[1:])
                    is_stale = time.time() - entry.stat().st_mtime > STALE_SECONDS
                    if is_stale and (not lock.exists() or _is_free(lock)):
                        os.unlink(entry.path)
        return files


def _touch_if_complete(path: Path, size: int | None) -> bool:
    """Whether a file is there with all its bytes; it counts as used now."""
    try:
        os.utime(path)
        return path.stat().st_size == size if size is not None else path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock_name(name: str) -> str:
    """The lock that belongs to a file of the cache, or to its draft."""
    return f".lock-{hash_key(name.split('.')[0]) % NUM_LOCKS:02d}"


@contextlib.contextmanager
def _hold_lock(lock: Path) -> Iterator[int]:
    """Hold a lock among the processes and threads of the node; in it is noted how many bytes come, or what failed."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _write_note(lock: int, text: str) -> None:
    os.truncate(lock, 0)
    os.pwrite(lock, text.encode(errors="replace"), 0)


def _raise_recorded_failure(lock: int, wait_start: float) -> None:
    """Raise what whoever held the lock before met, while we waited for it: the source is away for us too."""
    note = os.pread(lock, 4096, 0).decode(errors="replace")
    if note.startswith(FAILED_PREFIX):
        failed_at, _, reason = note.removeprefix(FAILED_PREFIX).partition(" ")
        if float(failed_at) > wait_start:
            raise ExitError(ExitCode.DISK, reason)
    _write_note(lock, "")


def _is_free(lock: Path) -> bool:
    """Whether nobody holds a lock."""
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _pending_bytes(lock: Path) -> int:
    """The bytes that the holder of a lock is fetching; none where it died with its note left behind."""
    if _is_free(lock):
        return 0
    note = lock.read_text(errors="replace")
    return int(note) if note.isdigit() else 0


@dataclass(frozen=True)
class FetchRequest:
    """A file to fetch."""

    url: str
    folder: str
    max_bytes: int
    name: str
    size: int | None
    sha256: str


class Prefetcher:
    """A process that fetches files before they are asked for; it ends with this one.

    It is a process and not a thread, so that the loader's workers can be forked beside it. It only ever helps: what it
    could not fetch, whoever needs it fetches, and says so.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "ssl_vit.data.cache"]
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=devnull, text=True, start_new_session=True
        )

    def fetch(self, request: FetchRequest) -> None:
        """Fetch a file after those that were asked for before."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End it, in the middle of what it does: what it has not fetched leaves no trace."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Fetch what standard input asks for, a JSON object a line, until it ends."""

    detach_worker_signals()

    def fetch(line: str) -> None:
        request = FetchRequest(**json.loads(line))
        with contextlib.suppress(remote.RemoteMismatch, ExitError, OSError):
            Cache(request.url, Path(request.folder), request.max_bytes).fetch(
                request.name, request.size, request.sha256
            )

    with ThreadPoolExecutor(MAX_DOWNLOADS) as pool:
        for line in sys.stdin:
            pool.submit(fetch, line)
        os._exit(0)  # the process that asked is gone


if __name__ == "__main__":
    main()
