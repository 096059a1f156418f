"""One shard: a pure function of (job, shard number).

Any worker may write any shard, in any order, again after a kill, and the bytes are the same.
"""

import contextlib
import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_vit.data.decode import FORMATS, BadImage, open_image, to_rgb
from ssl_vit.data.folder import Source
from ssl_vit.data.manifest import ENTRY, Shard
from ssl_vit.durable import sha256, write_bytes, writing

NOTES = ".notes"  # the shards' notes, until the manifest takes their place


@dataclass(frozen=True)
class Job:
    """Everything that one split's shards are a function of."""

    root: Path
    folder: Path
    sources: list[Source]  # in their final order
    options: dict[str, object]  # what the manifest says of the job

    @cached_property
    def digest(self) -> str:
        """Equal for equal jobs over an unchanged input."""
        listing = json.dumps([asdict(source) for source in self.sources], separators=(",", ":"))
        return hashlib.sha256((json.dumps(self.options, sort_keys=True) + listing).encode()).hexdigest()


def write_shard(job: Job, number: int, sources: list[Source], shard_samples: int) -> dict:
    """Write shard `number`, its index and then its note; returns the note, at once where it is there already."""
    tar, note_path = job.folder / f"{number:06d}.tar", job.folder / NOTES / f"{number:06d}.json"
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(note_path.read_text())
        if tar.stat().st_size == note["shard"]["bytes"] and tar.with_suffix(".npy").exists():
            return note
    rows, rejects = [], []
    with writing(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for place, source in enumerate(sources, start=number * shard_samples):
            try:
                data, suffix = load(job.root / source.path, job.options["resize"], job.options["quality"])
            except BadImage as error:
                rejects.append({"path": source.path, "reason": str(error)})
                continue
            add(archive, f"{place:09d}.{suffix}", data)
            rows.append((archive.offset - -(-len(data) // 512) * 512, len(data), source.label, zlib.crc32(data)))
            if source.label >= 0:
                add(archive, f"{place:09d}.cls", str(source.label).encode())
            add(
                archive,
                f"{place:09d}.json",
                json.dumps({"path": source.path}, ensure_ascii=False).encode(errors="backslashreplace"),
            )
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=ENTRY), allow_pickle=False)
    write_bytes(tar.with_suffix(".npy"), buffer.getvalue())
    shard = Shard(name=tar.name, samples=len(rows), bytes=tar.stat().st_size, sha256=sha256(tar))
    note = {"shard": shard.model_dump(), "rejects": rejects}
    write_bytes(note_path, json.dumps(note, ensure_ascii=False).encode(errors="backslashreplace"))
    return note


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member whose header says nothing but its name and size, so that equal input gives equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def load(path: Path, resize: object, quality: object) -> tuple[bytes, str]:
    """An image file's bytes and suffix, decoded once to be sure; shrunk where asked. Raises BadImage."""
    try:
        if not path.is_file():
            raise BadImage("not a regular file")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
    image = open_image(data)
    suffix = FORMATS[str(image.format)]
    pixels = to_rgb(image)
    if not isinstance(resize, int) or min(pixels.size) <= resize:
        return data, suffix
    scale = resize / min(pixels.size)
    size = (max(resize, round(pixels.width * scale)), max(resize, round(pixels.height * scale)))
    buffer = io.BytesIO()
    pixels.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg"
