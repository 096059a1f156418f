"""Tar files without trust: members by a walk over the headers, and which shards a path or pattern means."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ssl_vit.data import remote
from ssl_vit.errors import ExitCode, ExitError

BLOCK = 512
MAX_HEADER_BYTES = 1 << 16  # bytes of an extended header that are read; a longer one is an attack
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
DATALESS_TYPES = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)  # no data
MAX_DIGITS = 20  # of a number that is read
ZERO_BLOCK = bytes(BLOCK)


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


def iter_members(path: Path) -> Iterator[Member | Damage]:
    """Every file of a tar in its order, and every place that is damaged or is no file (links, devices)."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in the place of a shard must not block
    try:
        yield from _walk(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _walk(handle: int, end: int) -> Iterator[Member | Damage]:
    offset, name, size = 0, None, None  # name and size of the next member, where an extended header gave them
    tar_start = 0  # of the tar that is walked: they may stand one behind the other
    while offset + BLOCK <= end:
        block = os.pread(handle, BLOCK, offset)
        if block == ZERO_BLOCK:
            next_offset = _next_header(handle, offset + BLOCK, end)
            if next_offset is None:
                if end - offset < 2 * BLOCK:
                    yield Damage(offset, "the end mark is cut")
                return
            if (next_offset - tar_start) % tarfile.RECORDSIZE:  # no tar has its end there
                yield Damage(offset, f"{next_offset - offset} bytes are zeros")
            offset = tar_start = next_offset
            continue
        info = _parse_header(block)
        if info is None:
            next_offset = _next_header(handle, offset + BLOCK, end)
            yield Damage(offset, "a damaged header" if offset or next_offset is not None else "this is no tar file")
            if next_offset is None:
                return
            offset, name, size = next_offset, None, None
            continue
        length = 0 if info.type in DATALESS_TYPES else info.size if size is None else size
        data_offset = offset + BLOCK
        if data_offset + length > end:
            yield Damage(offset, f"the file ends within {name or info.name}")
            next_offset = _next_header(handle, data_offset, end)
            if next_offset is None:
                return
            offset, name, size = next_offset, None, None  # it was a claim only
            continue
        if info.type == tarfile.GNUTYPE_LONGNAME and length <= MAX_HEADER_BYTES:
            name = os.pread(handle, length, data_offset).split(b"\0")[0].decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE and length <= MAX_HEADER_BYTES:
            name, size = _parse_pax_header(os.pread(handle, length, data_offset), name)
        elif info.type in FILE_TYPES:
            yield Member(name or info.name, data_offset, length)
            name, size = None, None
        elif info.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield Damage(offset, f"{name or info.name} is no plain file (tar type {info.type.decode('latin-1')!r})")
            name, size = None, None
        offset = data_offset + -(-length // BLOCK) * BLOCK
    yield Damage(offset, "the end mark is missing: the file was cut")


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _next_header(handle: int, offset: int, end: int) -> int | None:
    """The offset of the next whole header, of those formats that can be told from other bytes."""
    while offset + BLOCK <= end:
        chunk = os.pread(handle, 2048 * BLOCK, offset)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar" and _parse_header(chunk[start : start + BLOCK]) is not None:
                return offset + start
        offset += max(BLOCK, len(chunk) // BLOCK * BLOCK)
    return None


def _parse_pax_header(data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Name and size that a pax header gives the next member."""
    size = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > MAX_DIGITS or not 0 < int(length) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size" and value.isdigit() and len(value) <= MAX_DIGITS:
            size = int(value)
        data = data[int(length) :]
    return name, size


IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}


def find_shards(shards: str) -> tuple[str, list[str]]:
    """The folder or URL that shards have in common, and their names in it, sorted."""
    is_folder, is_url = os.path.isdir(shards), remote.is_url(shards)  # unlike Path's is_dir, isdir takes any text
    if is_url:
        remote.check_url(shards)
    if is_url and not shards.endswith(".tar"):
        root = shards.rstrip("/")
        paths = [f"{root}/{name}" for name in remote.list_sizes(shards) if name.endswith(".tar")]
    elif is_folder:
        root = os.path.normpath(shards)
        paths = [str(path) for path in Path(shards).rglob("*.tar")]
    else:
        paths = expand_pattern(shards)
        scheme = f"{shards.partition('://')[0]}://" if is_url else ""
        root = scheme + (os.path.commonpath([os.path.dirname(n.removeprefix(scheme)) or "." for n in paths]) or ".")
    if not paths:
        raise ExitError(ExitCode.DATA, f"{shards}: has no .tar files")
    not_tars = [name for name in paths if not name.endswith(".tar")]
    if not_tars:
        raise ExitError(
            ExitCode.DATA, f"{not_tars[0]}: is no .tar file (compressed ones cannot be read in any order: unpack them)"
        )
    return root, sorted({name[len(root) + 1 :] if is_url else os.path.relpath(name, root) for name in paths})


def split_key(name: str, first: bool) -> tuple[str, str]:
    """Key and lower-case suffix of a member: cut at the first or at the last dot of its file name."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".") if first else file.rpartition(".")
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


MAX_NAMES = 1_000_000  # names that a pattern may stand for


def expand_pattern(pattern: str) -> list[str]:
    """The names that a pattern with `{000..999}`, `{a,b}` and, among local files, `*` stands for.

    Raises ExitError(USAGE) where they are too many, ExitError(DATA) where `*` finds nothing.
    """
    pieces: list[list[str]] = []
    count = 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        options = _expand_braces(piece)
        count *= max(1, len(options))
        if count > MAX_NAMES:
            raise ExitError(ExitCode.USAGE, f"{pattern}: stands for more than {MAX_NAMES:,} names")
        pieces.append(options)
    names = ["".join(parts) for parts in product(*pieces)]
    if remote.is_url(pattern) or not re.search(r"[*?]", pattern):
        return names
    paths = [
        str(path)
        for name in names
        for path in sorted(Path().glob(name) if not name.startswith("/") else Path("/").glob(name[1:]))
    ]
    if not paths:
        raise ExitError(ExitCode.DATA, f"{pattern}: finds no files")
    return paths


def _expand_braces(text: str) -> list[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
    if numbers:
        first, last = numbers.groups()
        if abs(int(last) - int(first)) >= MAX_NAMES:
            raise ExitError(ExitCode.USAGE, f"{text}: stands for more than {MAX_NAMES:,} names")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(last) >= int(first) else -1
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    if text.startswith("{") and "," in text:
        return text[1:-1].split(",")
    return [text]
