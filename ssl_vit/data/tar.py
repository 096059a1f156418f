"""Tar files without trust: members by a walk over the headers, and which shards a path or pattern means."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ssl_vit.data import remote
from ssl_vit.errors import DATA, USAGE, Refusal

BLOCK = 512
LONGEST = 1 << 16  # bytes of an extended header that are read; a longer one is an attack
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
BARE = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)  # no data
DIGITS = 20  # of a number that is read
ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """Something in a tar that is no whole file."""

    offset: int
    reason: str


def walk(path: Path) -> Iterator[Member | Damage]:
    """Every file of a tar in its order, and every place that is damaged or is no file (links, devices)."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in the place of a shard must not block
    try:
        yield from _walk(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _walk(handle: int, end: int) -> Iterator[Member | Damage]:
    at, name, size = 0, None, None  # name and size of the next member, where an extended header gave them
    begin = 0  # of the tar that is walked: they may stand one behind the other
    while at + BLOCK <= end:
        block = os.pread(handle, BLOCK, at)
        if block == ZEROS:
            following = _next_header(handle, at + BLOCK, end)
            if following is None:
                if end - at < 2 * BLOCK:
                    yield Damage(at, "the end mark is cut")
                return
            if (following - begin) % tarfile.RECORDSIZE:  # no tar has its end there
                yield Damage(at, f"{following - at} bytes are zeros")
            at = begin = following
            continue
        info = _header(block)
        if info is None:
            following = _next_header(handle, at + BLOCK, end)
            yield Damage(at, "a damaged header" if at or following is not None else "this is no tar file")
            if following is None:
                return
            at, name, size = following, None, None
            continue
        length = 0 if info.type in BARE else info.size if size is None else size
        inside = at + BLOCK
        if inside + length > end:
            yield Damage(at, f"the file ends within {name or info.name}")
            following = _next_header(handle, inside, end)
            if following is None:
                return
            at, name, size = following, None, None  # it was a claim only
            continue
        if info.type == tarfile.GNUTYPE_LONGNAME and length <= LONGEST:
            name = os.pread(handle, length, inside).split(b"\0")[0].decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE and length <= LONGEST:
            name, size = _extended(os.pread(handle, length, inside), name)
        elif info.type in FILES:
            yield Member(name or info.name, inside, length)
            name, size = None, None
        elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield Damage(at, f"{name or info.name} is no plain file (tar type {info.type.decode('latin-1')!r})")
            name, size = None, None
        at = inside + -(-length // BLOCK) * BLOCK
    yield Damage(at, "the end mark is missing: the file was cut")


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _next_header(handle: int, at: int, end: int) -> int | None:
    """The offset of the next whole header, of those formats that can be told from other bytes."""
    while at + BLOCK <= end:
        part = os.pread(handle, 2048 * BLOCK, at)
        for start in range(0, len(part) - BLOCK + 1, BLOCK):
            if part[start + 257 : start + 262] == b"ustar" and _header(part[start : start + BLOCK]) is not None:
                return at + start
        at += max(BLOCK, len(part) // BLOCK * BLOCK)
    return None


def _extended(data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Name and size that a pax header gives the next member."""
    size = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > DIGITS or not 0 < int(length) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size" and value.isdigit() and len(value) <= DIGITS:
            size = int(value)
        data = data[int(length) :]
    return name, size


IMAGES = {"jpg", "jpeg", "png", "webp"}


def find(shards: str) -> tuple[str, list[str]]:
    """The folder or URL that shards have in common, and their names in it, sorted."""
    folder, url = os.path.isdir(shards), remote.is_url(shards)  # unlike Path's is_dir, isdir takes any text
    if url:
        remote.check(shards)
    if url and not shards.endswith(".tar"):
        root = shards.rstrip("/")
        found = [f"{root}/{name}" for name in remote.sizes(shards) if name.endswith(".tar")]
    elif folder:
        root = os.path.normpath(shards)
        found = [str(path) for path in Path(shards).rglob("*.tar")]
    else:
        found = expand(shards)
        scheme = f"{shards.partition('://')[0]}://" if url else ""
        root = scheme + (os.path.commonpath([os.path.dirname(n.removeprefix(scheme)) or "." for n in found]) or ".")
    if not found:
        raise Refusal(DATA, f"{shards}: has no .tar files")
    strange = [name for name in found if not name.endswith(".tar")]
    if strange:
        raise Refusal(DATA, f"{strange[0]}: is no .tar file (compressed ones cannot be read in any order: unpack them)")
    return root, sorted({name[len(root) + 1 :] if url else os.path.relpath(name, root) for name in found})


def cut(name: str, first: bool) -> tuple[str, str]:
    """Key and lower-case suffix of a member: cut at the first or at the last dot of its file name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".") if first else file.rpartition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


MOST = 1_000_000  # names that a pattern may stand for


def expand(pattern: str) -> list[str]:
    """The names that a pattern with `{000..999}`, `{a,b}` and, among local files, `*` stands for.

    Raises Refusal(USAGE) where they are too many, Refusal(DATA) where `*` finds nothing.
    """
    pieces: list[list[str]] = []
    count = 1
    for text in re.split(r"(\{[^{}]*\})", pattern):
        options = _options(text)
        count *= max(1, len(options))
        if count > MOST:
            raise Refusal(USAGE, f"{pattern}: stands for more than {MOST:,} names")
        pieces.append(options)
    names = ["".join(parts) for parts in product(*pieces)]
    if remote.is_url(pattern) or not re.search(r"[*?]", pattern):
        return names
    found = [
        str(path)
        for name in names
        for path in sorted(Path().glob(name) if not name.startswith("/") else Path("/").glob(name[1:]))
    ]
    if not found:
        raise Refusal(DATA, f"{pattern}: finds no files")
    return found


def _options(text: str) -> list[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
    if numbers:
        first, last = numbers.groups()
        if abs(int(last) - int(first)) >= MOST:
            raise Refusal(USAGE, f"{text}: stands for more than {MOST:,} names")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(last) >= int(first) else -1
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    if text.startswith("{") and "," in text:
        return text[1:-1].split(",")
    return [text]
