"""What a folder of shards holds: `manifest.json`, written last, and one index a shard.

A shard is `NNNNNN.tar`, a plain WebDataset tar; its index `NNNNNN.npy` is a numpy array of ENTRY, opened by memory map.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssl_vit.durable import write_bytes
from ssl_vit.exits import DATA, Refusal

FORMAT = "ssl_vit.shards"
VERSION = 1
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
"""Where a sample's image bytes are in its tar, its class (-1 = none) and the checksum of the bytes."""


class Shard(BaseModel):
    """One tar: its file name, how many samples and bytes it has, and its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[0-9]+\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class _File(BaseModel):
    format: str
    version: int
    job: dict[str, Any]
    classes: list[str]
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """The shards of a folder, with the job that made them."""

    folder: Path
    job: dict[str, Any]
    classes: list[str]
    shards: list[Shard]

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

    def index(self, shard: int) -> np.ndarray:
        """The ENTRY rows of a shard, memory-mapped; raises Refusal where the index does not fit the manifest."""
        path = (self.folder / self.shards[shard].name).with_suffix(".npy")
        try:
            rows = np.load(path, mmap_mode="r" if self.shards[shard].samples else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Refusal(DATA, f"{path}: the shard's index cannot be read ({error}); convert again") from error
        if rows.dtype != ENTRY or len(rows) != self.shards[shard].samples:
            raise Refusal(DATA, f"{path}: the index does not fit the manifest; convert again")
        return rows

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every sample, int32 [samples], -1 where there is none."""
        parts = [self.index(shard)["label"] for shard in range(len(self.shards))]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def check(self) -> None:
        """Compare every shard's size with the manifest; one Refusal names all that are missing or differ."""
        bad = []
        for shard in self.shards:
            path = self.folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                bad.append(f"{shard.name} ({'missing' if size is None else f'{size} bytes, not {shard.bytes}'})")
            elif not path.with_suffix(".npy").is_file():
                bad.append(f"{shard.name} (its index is missing)")
        if bad:
            raise Refusal(DATA, f"{self.folder}: {len(bad)} of {len(self.shards)} shards are bad: {', '.join(bad)}")


def load(path: str | Path) -> Manifest:
    """Read the manifest of a folder of shards; raises Refusal(DATA) where there is none or it is not ours."""
    folder = Path(path)
    file = folder / "manifest.json"
    if not folder.is_dir():
        raise Refusal(DATA, f"{folder}: no such folder")
    if not file.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/manifest.json"))
        hint = f"its splits do: {', '.join(str(folder / name) for name in inside)}" if inside else ""
        hint = hint or "convert the images with tools/make_shards.py input=IMAGES output=SHARDS"
        raise Refusal(DATA, f"{folder}: has no manifest.json; {hint}")
    try:
        content = _File.model_validate(json.loads(file.read_text()))
    except (ValidationError, ValueError) as error:
        raise Refusal(DATA, f"{file}: not a manifest ({' '.join(str(error).split())[:200]})") from error
    if content.format != FORMAT or content.version != VERSION:
        raise Refusal(DATA, f"{file}: {content.format} version {content.version}, this reads {FORMAT} {VERSION}")
    return Manifest(folder, content.job, content.classes, content.shards)


def save(manifest: Manifest) -> None:
    """Write `manifest.json` in one step, which is what makes a folder of tars a data set."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "job": manifest.job,
        "samples": manifest.samples,
        "classes": manifest.classes,
        "shards": [shard.model_dump() for shard in manifest.shards],
    }
    write_bytes(manifest.folder / "manifest.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
