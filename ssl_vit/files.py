"""Files that are there whole or not at all: written beside their place, flushed to the disk, renamed into it."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ssl_vit.errors import ExitCode, ExitError


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, without which a rename may be lost with the power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def annotate_os_error(path: Path) -> Iterator[None]:
    """A write that fails names no file; within this block it is `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: Path, flush: bool = True) -> Iterator[BinaryIO]:
    """A file to write in; it takes the name `path` when the block ends well, and leaves nothing when it does not.

    Without `flush` it is not forced to the disk: for what can be made again, and whose loss is noticed.
    """
    temp_path = path.with_name(
        f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    )  # machines may share the folder
    try:
        with annotate_os_error(path), temp_path.open("w+b") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        try:
            os.replace(temp_path, path)
        except FileNotFoundError:
            if not path.exists():  # else another process made the same, and swept behind itself
                raise
        if flush:
            sync_folder(path.parent)
    finally:
        temp_path.unlink(missing_ok=True)


def remove_temp_files(folder: Path) -> None:
    """Remove the drafts in a folder where all work is done: nobody has use for them, whether or not he is alive."""
    for temp_path in folder.glob(".*.tmp-*"):
        temp_path.unlink(missing_ok=True)


def ensure_dir(folder: Path, key: str = "run") -> Path:
    """The folder of a key; raises ExitError(CANNOT_CREATE)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExitError(ExitCode.CANNOT_CREATE, f"{key}={folder}: {error.strerror}; name another folder") from error
    return folder


def write_bytes(path: Path, data: bytes, flush: bool = True) -> None:
    """Write a whole file in one step."""
    with atomic_write(path, flush) as file:
        file.write(data)


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
