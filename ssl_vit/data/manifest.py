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
from ssl_vit.data.cache import Cache, Store
from ssl_vit.errors import DATA, Refusal
from ssl_vit.files import sha256, write_bytes

FILE = "manifest.json"
FORMAT = "ssl_vit.shards"
VERSION = 2
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
"""Where a sample's image bytes are in its tar, its class (-1 = none) and the checksum of the bytes."""

HEADER = 192  # bytes of numpy's header before the rows
EVICTED = 3  # times that a file may be taken out of the cache between fetching and opening it
Place = Path | Cache
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
        return name_of_index(self.name)


def name_of_index(name: str) -> str:
    """`a/000000.npy` of `a/000000.tar`."""
    return name.removesuffix(".tar") + ".npy"


class _File(BaseModel):
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
    indexes: Place | None = None  # none: in the folder
    tars: Place | None = None  # none: beside the indexes
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

    def _place(self, tars: bool) -> Place:
        return (self.tars if tars else None) or self.indexes or self.folder

    def where(self, shard: int) -> str:
        """A shard's path or URL, for people."""
        place = self._place(tars=True)
        return f"{place.url if isinstance(place, Cache) else place}/{self.shards[shard].name}"

    def tar(self, shard: int) -> Path:
        """A local path of a shard's tar, which is fetched first where it is remote; raises as `Cache.fetch` does."""
        place, entry = self._place(tars=True), self.shards[shard]
        if not isinstance(place, Cache):
            return place / entry.name
        return place.fetch(
            entry.name, entry.bytes, entry.sha256, altered=True
        )  # each sample is compared when it is read

    def wanted(self, shard: int) -> list[tuple[Cache, str, int | None, str]]:
        """What `tar` and `index` would fetch for a shard: cache, name, size and digest."""
        entry, indexes, tars = self.shards[shard], self._place(tars=False), self._place(tars=True)
        files = [(indexes, entry.index, None, entry.index_sha256), (tars, entry.name, entry.bytes, entry.sha256)]
        return [(place, *file) for place, *file in files if isinstance(place, Cache)]  # type: ignore[misc]

    def index(self, shard: int) -> np.ndarray:
        """The ENTRY rows of a shard, memory-mapped; raises Refusal where the index does not fit the manifest."""
        place, entry = self._place(tars=False), self.shards[shard]
        path = self._index(place, entry)
        for _ in range(EVICTED):
            if path.exists() or not isinstance(place, Cache):
                break
            path = self._index(place, entry)
        try:
            if (
                entry.index_sha256 and not isinstance(place, Cache) and sha256(path) != entry.index_sha256
            ):  # a cache has compared it
                raise ValueError("it is altered")
            rows = np.load(path, mmap_mode="r" if entry.samples else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Refusal(DATA, f"{path}: the shard's index cannot be read ({error}); convert again") from error
        if rows.dtype != ENTRY or len(rows) != entry.samples:
            raise Refusal(DATA, f"{path}: the index does not fit the manifest; convert again")
        return rows

    @staticmethod
    def _index(place: Place, entry: Shard) -> Path:
        return place.fetch(entry.index, None, entry.index_sha256) if isinstance(place, Cache) else place / entry.index

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every sample, int32 [samples], -1 where there is none."""
        parts = [self.index(shard)["label"] for shard in range(len(self.shards))]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def faults(self) -> dict[int, str]:
        """The shards that are missing, short, grown, or without index, by their sizes, and what is wrong with each."""
        tars, indexes = self._place(tars=True), self._place(tars=False)
        tar_size = sizer(tars)
        index_size = tar_size if indexes == tars else sizer(indexes)

        def fault(entry: Shard) -> str | None:
            size = tar_size(entry.name)
            if size is None:
                return "missing"
            if size not in (entry.bytes, -1):
                return f"{size} bytes, not {entry.bytes}"
            size = index_size(entry.index)
            if size is None:
                return "its index is missing"
            return None if size in (-1, HEADER + ENTRY.itemsize * entry.samples) else f"its index has {size} bytes"

        with ThreadPoolExecutor(32) as pool:
            return {number: found for number, found in enumerate(pool.map(fault, self.shards)) if found}

    def altered(self, shard: int) -> str | None:
        """What is wrong with a shard by the digests of tar and index, which reads all its bytes."""
        entry = self.shards[shard]
        for tars, name, digest in ((True, entry.name, entry.sha256), (False, entry.index, entry.index_sha256)):
            place = self._place(tars)
            try:
                path = place.fetch(name, None, digest) if isinstance(place, Cache) else place / name
                if sha256(path) != digest:
                    return "altered" if tars else "its index is altered"
            except (remote.BadSource, OSError) as error:
                return getattr(error, "strerror", None) or str(error)
        return None

    def check(self, full: bool = False) -> None:
        """Raise one Refusal(DATA) that names all shards at fault, by their sizes or, with `full`, by their digests."""
        bad = self.faults()
        if full:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                left = [number for number in range(len(self.shards)) if number not in bad]
                bad |= {
                    number: found for number, found in zip(left, pool.map(self.altered, left), strict=True) if found
                }
        if bad:
            named = ", ".join(f"{self.shards[number].name} ({what})" for number, what in sorted(bad.items()))
            raise Refusal(DATA, f"{self.name}: {len(bad)} of {len(self.shards)} shards are bad: {named}")


def sizer(place: Place) -> Callable[[str], int | None]:
    """Name -> bytes of a file in a place, None where it is missing; one listing where the place can be listed."""
    if isinstance(place, Path):
        return lambda name: (place / name).stat().st_size if (place / name).is_file() else None
    if place.url.startswith("http"):
        return lambda name: remote.size(f"{place.url}/{name}")
    return remote.sizes(place.url).get


@dataclass(frozen=True)
class Joined(Manifest):
    """Several sets as one; their classes are put together by name."""

    parts: tuple[Manifest, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part.shards) for part in self.parts))

    @cached_property
    def _numbers(self) -> list[np.ndarray]:
        """For each part: its class number -> the number here; the last row stands for -1."""
        here = {name: number for number, name in enumerate(self.classes)}
        return [np.array([*(here[name] for name in part.classes), -1], np.int32) for part in self.parts]

    def _find(self, shard: int) -> tuple[int, int]:
        part = bisect_right(self._ends, shard)
        return part, shard - (self._ends[part - 1] if part else 0)

    def where(self, shard: int) -> str:
        part, number = self._find(shard)
        return self.parts[part].where(number)

    def tar(self, shard: int) -> Path:
        part, number = self._find(shard)
        return self.parts[part].tar(number)

    def wanted(self, shard: int) -> list[tuple[Cache, str, int | None, str]]:
        part, number = self._find(shard)
        return self.parts[part].wanted(number)

    def index(self, shard: int) -> np.ndarray:
        part, number = self._find(shard)
        rows = self.parts[part].index(number)
        if self.parts[part].classes == self.classes:
            return rows
        rows = np.array(rows)
        rows["label"] = self._numbers[part][rows["label"]]
        return rows

    def faults(self) -> dict[int, str]:
        found = [part.faults() for part in self.parts]
        begins = [0, *self._ends]
        return {begins[i] + number: what for i, part in enumerate(found) for number, what in part.items()}

    def altered(self, shard: int) -> str | None:
        part, number = self._find(shard)
        return self.parts[part].altered(number)


def join(parts: list[Manifest]) -> Manifest:
    """One manifest of several sets, in their order."""
    if len(parts) == 1:
        return parts[0]
    alike = all(part.classes == parts[0].classes for part in parts)
    classes = parts[0].classes if alike else sorted({name for part in parts for name in part.classes})
    shards = [shard for part in parts for shard in part.shards]
    return Joined(parts[0].folder, {}, classes, shards, parts=tuple(parts))


def load(path: str | Path, store: Store | None = None) -> Manifest:
    """Read the manifest of a folder of shards; raises Refusal(DATA) where there is none or it is not ours."""
    folder = Path(path)
    file = folder / FILE
    if not folder.is_dir():
        raise Refusal(DATA, f"{folder}: no such folder")
    if not file.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{FILE}"))
        hint = f"its splits do: {', '.join(str(folder / name) for name in inside)}" if inside else ""
        hint = hint or "convert the images with tools/make_shards.py input=IMAGES output=SHARDS"
        raise Refusal(DATA, f"{folder}: has no {FILE}; {hint}")
    made = read(file.read_bytes(), str(file), folder)
    if made.at is None:
        return made
    return replace(
        made, tars=(store or Store()).of(remote.check(made.at)) if remote.is_url(made.at) else folder / made.at
    )


def every(names: tuple[str, ...]) -> list[Manifest]:
    """The manifests of folders and URLs, of all their splits; raises Refusal(DATA) where one has none."""
    made = []
    for name in names:
        if remote.is_url(name):
            url = remote.check(name)
            parts = [fetch(f"{url}{split}", Store()) for split in ("", "/train", "/val", "/test")]
            made += [part for part in parts if part is not None]
            if not any(parts):
                raise Refusal(DATA, f"{url}: has no {FILE}")
        else:
            inside = [] if (Path(name) / FILE).exists() else sorted(Path(name).glob(f"*/{FILE}"))
            made += [load(path.parent) for path in inside] or [load(name)]
    return made


def fetch(url: str, store: Store) -> Manifest | None:
    """The manifest at a URL, whose files come through a store; None where there is none.

    Raises Refusal: DATA where it is not ours, DISK where the source stays away.
    """
    data = remote.read(f"{url}/{FILE}")
    if data is None:
        return None
    made = read(data, f"{url}/{FILE}", store.folder)
    if made.at is not None and not remote.is_url(made.at):
        raise Refusal(DATA, f"{url}/{FILE}: its tars lie in {made.at}, which only a manifest on disk may say")
    return replace(made, indexes=store.of(url), tars=store.of(remote.check(made.at)) if made.at else None)


def read(data: bytes, name: str, folder: Path) -> Manifest:
    """The manifest in a file's content; `name` is what a refusal calls it."""
    try:
        content = _File.model_validate(json.loads(data))
    except (ValidationError, ValueError) as error:
        raise Refusal(DATA, f"{name}: not a manifest ({' '.join(str(error).split())[:200]})") from error
    if content.format != FORMAT or content.version != VERSION:
        raise Refusal(DATA, f"{name}: {content.format} version {content.version}, this reads {FORMAT} {VERSION}")
    digests = (digest for shard in content.shards for digest in (shard.sha256, shard.index_sha256))
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
        raise Refusal(DATA, f"{name}: not a manifest (a sha256 is none)")
    return Manifest(folder, content.job, content.classes, content.shards, at=content.at)


def encode(manifest: Manifest) -> bytes:
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


def save(manifest: Manifest) -> None:
    """Write `manifest.json` in one step, which is what makes a folder of tars a data set."""
    write_bytes(manifest.folder / FILE, encode(manifest))
