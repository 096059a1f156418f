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

from ssl_vit.counter import key
from ssl_vit.data import remote
from ssl_vit.exits import CANNOT_CREATE, DISK, Refusal

LOCKS = 64  # files of locks: two that fall on the same one are fetched one after the other
AT_ONCE = 4  # downloads of the process that fetches ahead
STALE = 3600.0  # seconds after which a draft that nobody writes to is rubbish


@dataclass(frozen=True)
class Store:
    """A folder of the node for remote files, and how many bytes it may hold."""

    folder: Path = field(default_factory=lambda: Path("~/.cache/ssl_vit").expanduser())
    room: int = 100 * 10**9

    def of(self, url: str) -> "Cache":
        """The files below a URL."""
        return Cache(url, self.folder, self.room)


@dataclass(frozen=True)
class Cache:
    """The files below a URL, on local disk."""

    url: str
    folder: Path
    room: int

    def fetch(self, name: str, size: int | None, sha256: str) -> Path:
        """The local path of a file, fetched where it is not there yet; raises as `remote.get` does."""
        stem = sha256 or f"{key(self.url, name):016x}"
        path = self.folder / f"{stem}{Path(name).suffix}"
        if _touched(path):
            return path
        self._prepare()
        with _held(self.folder / f".lock-{int(stem[:8], 16) % LOCKS:02d}", size or 0):
            if not _touched(path):
                self._make_room(size or 0, path)
                remote.get(f"{self.url}/{name}", path, size, sha256)
        return path

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(CANNOT_CREATE, f"{self.folder}: {error.strerror}; name another data.cache") from error

    def _make_room(self, size: int, wanted: Path) -> None:
        """Delete what was used longest ago until `size` more bytes fit; downloads that are under way count whole."""
        with _held(self.folder / ".room", 0):
            kept, total = [], sum(_under_way(lock) for lock in self.folder.glob(".lock-*"))  # this download too
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    if entry.name.endswith(".tmp") and time.time() - stat.st_mtime > STALE:
                        os.unlink(entry.path)
                    elif not entry.name.startswith("."):
                        kept.append((stat.st_mtime, stat.st_size, entry.path))
                        total += stat.st_size
            for _, bytes_, path in sorted(kept):
                if total <= self.room:
                    return
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= bytes_
            if size > self.room:
                need = f"{wanted.name} has {size} bytes, data.cache_gb allows {self.room}"
                raise Refusal(DISK, f"{self.folder}: {need}; allow a few times a shard")


def _touched(path: Path) -> bool:
    """Whether a file is there; it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _held(lock: Path, size: int) -> Iterator[None]:
    """Hold a lock among the processes and threads of the node; what is under way in it is `size` bytes."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.truncate(handle, 0)
        os.pwrite(handle, str(size).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(handle, 0)
        os.close(handle)


def _under_way(lock: Path) -> int:
    """The bytes that the holder of a lock is fetching; none where it died with its note left behind."""
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 0
    except OSError:
        return int(os.pread(handle, 32, 0) or b"0")
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Wanted:
    """A file to fetch."""

    url: str
    folder: str
    room: int
    name: str
    size: int | None
    sha256: str


class Ahead:
    """A process that fetches files before they are asked for; it ends with this one.

    It is a process and not a thread, so that the loader's workers can be forked beside it. It only ever helps: what it
    could not fetch, whoever needs it fetches, and says so.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "ssl_vit.data.cache"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def fetch(self, wanted: Wanted) -> None:
        """Fetch a file after those that were asked for before."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(wanted)) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End it, in the middle of what it does: what it has not fetched leaves no trace."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Fetch what standard input asks for, a JSON object a line, until it ends."""

    def fetch(line: str) -> None:
        wanted = Wanted(**json.loads(line))
        with contextlib.suppress(remote.BadSource, Refusal, OSError):
            Cache(wanted.url, Path(wanted.folder), wanted.room).fetch(wanted.name, wanted.size, wanted.sha256)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for line in sys.stdin:
            pool.submit(fetch, line)
        os._exit(0)  # the process that asked is gone


if __name__ == "__main__":
    main()
