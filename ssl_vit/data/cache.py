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
from ssl_vit.errors import CANNOT_CREATE, DISK, Refusal
from ssl_vit.rng import key
from ssl_vit.runtime import serve_parent

LOCKS = 64  # files of locks: two that fall on the same one are fetched one after the other
AT_ONCE = 4  # downloads of the process that fetches ahead
STALE = 2.0  # seconds: a draft that was written to a moment ago is let be
FAILED = "failed "  # begins the note of a download that did not come
ALTERED = "altered-"  # begins the name of a file whose bytes are not those that were promised


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

    def fetch(self, name: str, size: int | None, sha256: str, altered: bool = False) -> Path:
        """The local path of a file, fetched where it is not there yet; raises as `remote.get` does.

        With `altered`, a file of the right size and other bytes is taken too, under another name.
        """
        stem = sha256 or f"{key(self.url, name):016x}"
        path = self.folder / f"{stem}{Path(name).suffix}"
        other = path.with_name(ALTERED + path.name)
        for there in (path, other) if altered else (path,):
            if _touched(there, size):
                return there
        self._prepare()
        asked = time.monotonic()
        with _held(self.folder / _lock(path.name)) as lock:
            if _touched(path, size):
                return path
            _end_with_the_first(lock, asked)
            for draft in self.folder.glob(f".{path.name}.*.tmp"):  # of whoever held the lock and died
                draft.unlink(missing_ok=True)
            if size is None and not sha256:  # nothing but its name is known
                size = max(0, remote.size(f"{self.url}/{name}") or 0)
            self._make_room(size or 0, path, lock)
            try:
                remote.get(f"{self.url}/{name}", path, size, sha256, other if altered and size is not None else None)
            except remote.BadSource:
                if not (altered and _touched(other, size)):
                    raise
                return other
            except Refusal as refusal:
                _note(lock, f"{FAILED}{time.monotonic()} {refusal}")
                raise
            _note(lock, "")
        return path

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(CANNOT_CREATE, f"{self.folder}: {error.strerror}; name another data.cache") from error

    def _make_room(self, size: int, wanted: Path, lock: int) -> None:
        """Delete what was used longest ago until `size` more bytes fit, and note in the held lock that they come.

        Downloads that are under way count whole; where they leave no room, wait for them.
        """
        if size > self.room:
            need = f"{wanted.name} has {size} bytes, data.cache_gb allows {self.room}"
            raise Refusal(DISK, f"{self.folder}: {need}; allow a few times a shard")
        while True:
            with _held(self.folder / ".room"):
                total = size + sum(map(_under_way, self.folder.glob(".lock-*")))
                kept = self._kept()  # after: a download that ends in between counts twice, not never
                total += sum(stat.st_size for _, stat in kept)
                for path, stat in sorted(kept, key=lambda one: one[1].st_mtime):
                    if total <= self.room:
                        break
                    path.unlink(missing_ok=True)
                    total -= stat.st_size
                if total <= self.room:
                    _note(lock, str(size))
                    return
            time.sleep(0.05)

    def _kept(self) -> list[tuple[Path, os.stat_result]]:
        """The files that are kept; drafts of processes that died are removed."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if not entry.name.startswith("."):
                    found.append((Path(entry.path), entry.stat()))
                elif entry.name.endswith(".tmp"):
                    whose = self.folder / _lock(entry.name[1:])
                    old = time.time() - entry.stat().st_mtime > STALE
                    if old and (not whose.exists() or _free(whose)):
                        os.unlink(entry.path)
        return found


def _touched(path: Path, size: int | None) -> bool:
    """Whether a file is there with all its bytes; it counts as used now."""
    try:
        os.utime(path)
        return path.stat().st_size == size if size is not None else path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock(name: str) -> str:
    """The lock that belongs to a file of the cache, or to its draft."""
    return f".lock-{key(name.split('.')[0]) % LOCKS:02d}"


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[int]:
    """Hold a lock among the processes and threads of the node; in it is noted how many bytes come, or what failed."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _note(lock: int, text: str) -> None:
    os.truncate(lock, 0)
    os.pwrite(lock, text.encode(errors="replace"), 0)


def _end_with_the_first(lock: int, asked: float) -> None:
    """Raise what whoever held the lock before met, while we waited for it: the source is away for us too."""
    told = os.pread(lock, 4096, 0).decode(errors="replace")
    if told.startswith(FAILED):
        when, _, reason = told.removeprefix(FAILED).partition(" ")
        if float(when) > asked:
            raise Refusal(DISK, reason)
    _note(lock, "")


def _free(lock: Path) -> bool:
    """Whether nobody holds a lock."""
    handle = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _under_way(lock: Path) -> int:
    """The bytes that the holder of a lock is fetching; none where it died with its note left behind."""
    if _free(lock):
        return 0
    told = lock.read_text(errors="replace")
    return int(told) if told.isdigit() else 0


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
        silent = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=silent, text=True, start_new_session=True
        )

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

    serve_parent()

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
