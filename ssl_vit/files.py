"""Files that are there whole or not at all: written beside their place, flushed to the disk, renamed into it."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ssl_vit.errors import CANNOT_CREATE, Refusal


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, without which a rename may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """A write that fails names no file; within this block it is `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def writing(path: Path, flush: bool = True) -> Iterator[BinaryIO]:
    """A file to write in; it takes the name `path` when the block ends well, and leaves nothing when it does not.

    Without `flush` it is not forced to the disk: for what can be made again, and whose loss is noticed.
    """
    draft = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")  # machines may share the folder
    try:
        with named(path), draft.open("w+b") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        try:
            os.replace(draft, path)
        except FileNotFoundError:
            if not path.exists():  # else another process made the same, and swept behind itself
                raise
        if flush:
            sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the drafts in a folder where all work is done: nobody has use for them, whether or not he is alive."""
    for draft in folder.glob(".*.tmp-*"):
        draft.unlink(missing_ok=True)


def made(folder: Path, key: str = "run") -> Path:
    """The folder of a key; raises Refusal(CANNOT_CREATE)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(CANNOT_CREATE, f"{key}={folder}: {error.strerror}; name another folder") from error
    return folder


def write_bytes(path: Path, data: bytes, flush: bool = True) -> None:
    """Write a whole file in one step."""
    with writing(path, flush) as file:
        file.write(data)


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
