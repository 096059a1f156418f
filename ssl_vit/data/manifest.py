"""What a folder of shards holds: `manifest.json`, written last, and one index a shard.

A shard is a plain WebDataset tar; its index is a numpy array of ENTRY under the same name with `.npy`, opened by memory
map. Manifest, indexes and tars lie together, in a folder or at a URL; shards that others wrote may lie elsewhere.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ssl_vit.data import remote
from ssl_vit.data.cache import Cache, CacheDir
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import sha256, write_bytes

MANIFEST_FILE = "manifest.json"
FORMAT = "ssl_vit.shards"
VERSION = 2
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
"""Where a sample's image bytes are in its tar, its class (-1 = none) and the checksum of the bytes."""

INDEX_HEADER_BYTES = 192  # bytes of numpy's header before the rows
MAX_EVICTIONS = 3  # times that a file may be taken out of the cache between fetching and opening it
Location = Path | Cache
"""Where files lie: in a folder, or at a URL, from which they come through a cache."""


class Shard(BaseModel):
    """One tar: its name, how many samples and bytes it has, its digest and that of its index."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[^/\\].*\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str
    index_sha256: str

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if ".." in PurePosixPath(name).parts:
            raise ValueError("leads out of the folder")
        return name

    @property
    def index(self) -> str:
        """The name of its index."""
        return index_name(self.name)


def index_name(name: str) -> str:
    """`a/000000.npy` of `a/000000.tar`."""
    return name.removesuffix(".tar") + ".npy"


class _ManifestFile(BaseModel):
    format: str
    version: int
    job: dict[str, Any]
    classes: list[str]
    shards: list[Shard]
    at: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The shards of a folder or a URL, with the job that made them."""

    folder: Path  # of the manifest; what messages name
    job: dict[str, Any]
    classes: list[str]
    shards: list[Shard]
    indexes: Location | None = None  # none: in the folder
    tars: Location | None = None  # none: beside the indexes
    at: str | None = None  # as the file says it, where the tars lie elsewhere

    @property
    def name(self) -> str:
        """The folder or URL, for people."""
        return self.indexes.url if isinstance(self.indexes, Cache) else str(self.folder)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def starts(self) -> np.ndarray:
        """The id of each shard's first sample, int64 [shards + 1]: ids count through the shards in order."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)])

    @cached_property
    def identity(self) -> str:
        """A digest of the content: equal for equal shards, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def _location(self, tars: bool) -> Location:
        return (self.tars if tars else None) or self.indexes or self.folder

    def describe_shard(self, shard: int) -> str:
        """A shard's path or URL, for people."""
        location = self._location(tars=True)
        return f"{location.url if isinstance(location, Cache) else location}/{self.shards[shard].name}"

    def tar(self, shard: int) -> Path:
        """A local path of a shard's tar, which is fetched first where it is remote; raises as `Cache.fetch` does."""
        location, entry = self._location(tars=True), self.shards[shard]
        if not isinstance(location, Cache):
            return location / entry.name
        return location.fetch(
            entry.name, entry.bytes, entry.sha256, accept_corrupt=True
        )  # each sample is compared when it is read

    def remote_files(self, shard: int) -> list[tuple[Cache, str, int | None, str]]:
        """What `tar` and `index` would fetch for a shard: cache, name, size and digest."""
        entry, indexes, tars = self.shards[shard], self._location(tars=False), self._location(tars=True)
        files = [(indexes, entry.index, None, entry.index_sha256), (tars, entry.name, entry.bytes, entry.sha256)]
        return [(location, *file) for location, *file in files if isinstance(location, Cache)]  # type: ignore[misc]

    def index(self, shard: int) -> np.ndarray:
        """The ENTRY rows of a shard, memory-mapped; raises ExitError where the index does not fit the manifest."""
        location, entry = self._location(tars=False), self.shards[shard]
        path = self._index_path(location, entry)
        for _ in range(MAX_EVICTIONS):
            if path.exists() or not isinstance(location, Cache):
                break
            path = self._index_path(location, entry)
        try:
            if (
                entry.index_sha256 and not isinstance(location, Cache) and sha256(path) != entry.index_sha256
            ):  # a cache has compared it
                raise ValueError("it is altered")
            rows = np.load(path, mmap_mode="r" if entry.samples else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ExitError(
                ExitCode.DATA, f"{path}: the shard's index cannot be read ({error}); convert again"
            ) from error
        if rows.dtype != ENTRY or len(rows) != entry.samples:
            raise ExitError(ExitCode.DATA, f"{path}: the index does not fit the manifest; convert again")
        return rows

    @staticmethod
    def _index_path(location: Location, entry: Shard) -> Path:
        return (
            location.fetch(entry.index, None, entry.index_sha256)
            if isinstance(location, Cache)
            else location / entry.index
        )

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every sample, int32 [samples], -1 where there is none."""
        parts = [self.index(shard)["label"] for shard in range(len(self.shards))]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def faults(self) -> dict[int, str]:
        """The shards that are missing, short, grown, or without index, by their sizes, and what is wrong with each."""
        tars, indexes = self._location(tars=True), self._location(tars=False)
        tar_size = size_lookup(tars)
        index_size = tar_size if indexes == tars else size_lookup(indexes)

        def fault(entry: Shard) -> str | None:
            size = tar_size(entry.name)
            if size is None:
                return "missing"
            if size not in (entry.bytes, -1):
                return f"{size} bytes, not {entry.bytes}"
            size = index_size(entry.index)
            if size is None:
                return "its index is missing"
            return (
                None
                if size in (-1, INDEX_HEADER_BYTES + ENTRY.itemsize * entry.samples)
                else f"its index has {size} bytes"
            )

        with ThreadPoolExecutor(32) as pool:
            return {number: reason for number, reason in enumerate(pool.map(fault, self.shards)) if reason}

    def find_corruption(self, shard: int) -> str | None:
        """What is wrong with a shard by the digests of tar and index, which reads all its bytes."""
        entry = self.shards[shard]
        for tars, name, digest in ((True, entry.name, entry.sha256), (False, entry.index, entry.index_sha256)):
            location = self._location(tars)
            try:
                path = location.fetch(name, None, digest) if isinstance(location, Cache) else location / name
                if sha256(path) != digest:
                    return "altered" if tars else "its index is altered"
            except (remote.RemoteMismatch, OSError) as error:
                return getattr(error, "strerror", None) or str(error)
        return None

    def check_shards(self, full: bool = False) -> None:
        """Raise ExitError(DATA) that names all shards at fault, by their sizes or, with `full`, by their digests."""
        bad = self.faults()
        if full:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                remaining = [number for number in range(len(self.shards)) if number not in bad]
                bad |= {
                    number: reason
                    for number, reason in zip(remaining, pool.map(self.find_corruption, remaining), strict=True)
                    if reason
                }
        if bad:
            details = ", ".join(f"{self.shards[number].name} ({reason})" for number, reason in sorted(bad.items()))
            raise ExitError(ExitCode.DATA, f"{self.name}: {len(bad)} of {len(self.shards)} shards are bad: {details}")


def size_lookup(location: Location) -> Callable[[str], int | None]:
    """Name -> bytes of a file in a place, None where it is missing; one listing where the place can be listed."""
    if isinstance(location, Path):
        return lambda name: (location / name).stat().st_size if (location / name).is_file() else None
    if location.url.startswith("http"):
        return lambda name: remote.file_size(f"{location.url}/{name}")
    return remote.list_sizes(location.url).get


@dataclass(frozen=True)
class JoinedManifest(Manifest):
    """Several sets as one; their classes are put together by name."""

    parts: tuple[Manifest, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part.shards) for part in self.parts))

    @cached_property
    def _label_maps(self) -> list[np.ndarray]:
        """For each part: its class number -> the number here; the last row stands for -1."""
        class_to_idx = {name: number for number, name in enumerate(self.classes)}
        return [np.array([*(class_to_idx[name] for name in part.classes), -1], np.int32) for part in self.parts]

    def _locate(self, shard: int) -> tuple[int, int]:
        part = bisect_right(self._ends, shard)
        return part, shard - (self._ends[part - 1] if part else 0)

    def describe_shard(self, shard: int) -> str:
        part, number = self._locate(shard)
        return self.parts[part].describe_shard(number)

    def tar(self, shard: int) -> Path:
        part, number = self._locate(shard)
        return self.parts[part].tar(number)

    def remote_files(self, shard: int) -> list[tuple[Cache, str, int | None, str]]:
        part, number = self._locate(shard)
        return self.parts[part].remote_files(number)

    def index(self, shard: int) -> np.ndarray:
        part, number = self._locate(shard)
        rows = self.parts[part].index(number)
        if self.parts[part].classes == self.classes:
            return rows
        rows = np.array(rows)
        rows["label"] = self._label_maps[part][rows["label"]]
        return rows

    def faults(self) -> dict[int, str]:
        part_faults = [part.faults() for part in self.parts]
        offsets = [0, *self._ends]
        return {offsets[i] + number: reason for i, part in enumerate(part_faults) for number, reason in part.items()}

    def find_corruption(self, shard: int) -> str | None:
        part, number = self._locate(shard)
        return self.parts[part].find_corruption(number)


def join_manifests(parts: list[Manifest]) -> Manifest:
    """One manifest of several sets, in their order."""
    if len(parts) == 1:
        return parts[0]
    same_classes = all(part.classes == parts[0].classes for part in parts)
    classes = parts[0].classes if same_classes else sorted({name for part in parts for name in part.classes})
    shards = [shard for part in parts for shard in part.shards]
    return JoinedManifest(parts[0].folder, {}, classes, shards, parts=tuple(parts))


def load(path: str | Path, cache_dir: CacheDir | None = None) -> Manifest:
    """Read the manifest of a folder of shards; raises ExitError(DATA) where there is none or it is not ours."""
    folder = Path(path)
    file = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ExitError(ExitCode.DATA, f"{folder}: no such folder")
    if not file.is_file():
        split_names = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST_FILE}"))
        hint = f"its splits do: {', '.join(str(folder / name) for name in split_names)}" if split_names else ""
        hint = hint or "convert the images with tools/make_shards.py input=IMAGES output=SHARDS"
        raise ExitError(ExitCode.DATA, f"{folder}: has no {MANIFEST_FILE}; {hint}")
    manifest = parse_manifest(file.read_bytes(), str(file), folder)
    if manifest.at is None:
        return manifest
    return replace(
        manifest,
        tars=(cache_dir or CacheDir()).cache_for(remote.check_url(manifest.at))
        if remote.is_url(manifest.at)
        else folder / manifest.at,
    )


def load_splits(names: tuple[str, ...]) -> list[Manifest]:
    """The manifests of folders and URLs, of all their splits; raises ExitError(DATA) where one has none."""
    manifests = []
    for name in names:
        if remote.is_url(name):
            url = remote.check_url(name)
            splits = [fetch_manifest(f"{url}{split}", CacheDir()) for split in ("", "/train", "/val", "/test")]
            manifests += [manifest for manifest in splits if manifest is not None]
            if not any(splits):
                raise ExitError(ExitCode.DATA, f"{url}: has no {MANIFEST_FILE}")
        else:
            paths = [] if (Path(name) / MANIFEST_FILE).exists() else sorted(Path(name).glob(f"*/{MANIFEST_FILE}"))
            manifests += [load(path.parent) for path in paths] or [load(name)]
    return manifests


def fetch_manifest(url: str, cache_dir: CacheDir) -> Manifest | None:
    """The manifest at a URL, whose files come through a store; None where there is none.

    Raises ExitError: DATA where it is not ours, DISK where the source stays away.
    """
    data = remote.read_file(f"{url}/{MANIFEST_FILE}")
    if data is None:
        return None
    manifest = parse_manifest(data, f"{url}/{MANIFEST_FILE}", cache_dir.folder)
    if manifest.at is not None and not remote.is_url(manifest.at):
        raise ExitError(
            ExitCode.DATA,
            f"{url}/{MANIFEST_FILE}: its tars lie in {manifest.at}, which only a manifest on disk may say",
        )
    return replace(
        manifest,
        indexes=cache_dir.cache_for(url),
        tars=cache_dir.cache_for(remote.check_url(manifest.at)) if manifest.at else None,
    )


def parse_manifest(data: bytes, name: str, folder: Path) -> Manifest:
    """The manifest in a file's content; `name` is what a refusal calls it."""
    try:
        content = _ManifestFile.model_validate(json.loads(data))
    except (ValidationError, ValueError) as error:
        raise ExitError(ExitCode.DATA, f"{name}: not a manifest ({' '.join(str(error).split())[:200]})") from error
    if content.format != FORMAT or content.version != VERSION:
        raise ExitError(
            ExitCode.DATA, f"{name}: {content.format} version {content.version}, this reads {FORMAT} {VERSION}"
        )
    digests = (digest for shard in content.shards for digest in (shard.sha256, shard.index_sha256))
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise ExitError(ExitCode.DATA, f"{name}: not a manifest (a sha256 is none)")
    return Manifest(folder, content.job, content.classes, content.shards, at=content.at)


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "job": manifest.job,
        "samples": manifest.samples,
        "classes": manifest.classes,
        **({"at": manifest.at} if manifest.at is not None else {}),
        "shards": [shard.model_dump() for shard in manifest.shards],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def save_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` in one step, which is what makes a folder of tars a data set."""
    write_bytes(manifest.folder / MANIFEST_FILE, encode_manifest(manifest))
