"""Where a conversion puts its files: a folder, or a URL by way of a folder on the way to it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.data import remote
from ssl_vit.data.cache import CacheDir
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import write_bytes
from ssl_vit.rng import hash_key


@dataclass(frozen=True)
class Target:
    """A folder in which files are made, and the URL where each goes as soon as it is complete (none: it stays)."""

    folder: Path
    url: str | None = None

    @property
    def name(self) -> str:
        """The folder or URL, for people."""
        return self.url or str(self.folder)

    def subfolder(self, name: str) -> "Target":
        """A folder in it; "" is the target itself."""
        return Target(self.folder / name, f"{self.url}/{name}" if self.url else None) if name else self

    def prepare(self) -> None:
        """Make the folder, or raise ExitError(CANNOT_CREATE)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExitError(ExitCode.CANNOT_CREATE, f"{self.folder}: {error.strerror}; name another output") from error

    def read(self, name: str) -> bytes | None:
        """A small file's content, None where it is missing."""
        if self.url:
            return remote.read_file(f"{self.url}/{name}")
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, data: bytes, flush: bool = True) -> None:
        """Write a small file, whole or not at all; `flush` as for files.atomic_write."""
        if self.url:
            remote.write_file(f"{self.url}/{name}", data)
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / name, data, flush)

    def size(self, name: str) -> int | None:
        """A file's bytes, None where it is missing."""
        if self.url:
            return remote.file_size(f"{self.url}/{name}")
        return (self.folder / name).stat().st_size if (self.folder / name).is_file() else None

    def list_files(self) -> list[str]:
        """The files in it and below."""
        if self.url:
            return sorted(remote.list_sizes(self.url))
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def upload(self, name: str) -> None:
        """Bring a file that was made in the folder to where it belongs."""
        if self.url:
            remote.upload(self.folder / name, f"{self.url}/{name}")
            os.unlink(self.folder / name)

    def remove(self, name: str) -> None:
        """Delete a file or a folder; missing is fine."""
        if self.url:
            remote.remove_tree(f"{self.url}/{name}")
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def resolve_target(output: str) -> Target:
    """The target that a folder or a URL names; raises ExitError where nothing can be written to it."""
    if not remote.is_url(output):
        return Target(Path(output))
    url = remote.check_writable(output)
    return Target(CacheDir().folder / f"sending-{hash_key(url):016x}", url)
