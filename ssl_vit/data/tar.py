"""The members of a tar file, damaged or not: where they are, and what is wrong in between.

The standard library (and so webdataset) takes a damaged header for the end of the archive and loses the rest without a
word. This walk goes on at the next header that is whole, and says where it had to.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
