"""Write one shard: a pure function of (job, shard number), without locations."""

import contextlib
import hashlib
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Container
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ssl_vit.convert.image_list import Source
from ssl_vit.convert.output import Target
from ssl_vit.data import decode
from ssl_vit.data.decode import BadImage
from ssl_vit.data.manifest import ENTRY, FILE, Shard, name_of_index
from ssl_vit.files import writing

NOTES = ".notes"  # what is known of each shard, until the manifest takes its place
DIGEST = np.dtype("S32")  # a sha256; zeros stand for none
NO_DIGEST = bytes(32)
EXCLUDED = f"{NOTES}/excluded.npy"  # a sorted array of DIGEST, of the images to leave out


@dataclass(frozen=True)
class Job:
    """Everything that one split's shards are a function of."""

    root: Path
    target: Target
    sources: list[Source]  # in their final order
    options: dict[str, object]  # what the manifest says of the job
    classes: tuple[str, ...] = ()
    excluded: bool = False  # what EXCLUDED holds is left out

    @cached_property
    def digest(self) -> str:
        """Equal for equal jobs over an unchanged input."""
        listing = json.dumps([self.classes, [asdict(source) for source in self.sources]], separators=(",", ":"))
        return hashlib.sha256((json.dumps(self.options, sort_keys=True) + listing).encode()).hexdigest()


def name_of_note(number: int, suffix: str = "json") -> str:
    """Where what is known of a shard is written down."""
    return f"{NOTES}/{number:06d}.{suffix}"


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def write_shard(
    job: Job, number: int, sources: list[Source], shard_samples: int, deadly: Container[str] = ()
) -> dict[str, Any]:
    """Write shard `number`, its index and then its note; returns the note, at once where it is there already.

    `deadly` are the paths of images at which a decoder crashed.
    """
    target, name = job.target, f"{number:06d}.tar"
    with contextlib.suppress(ValueError, KeyError):
        note = json.loads(target.read(name_of_note(number)) or b"")
        sizes = [target.size(file) for file in (name, name_of_index(name), name_of_note(number, "sha256"))]
        if sizes[0] == note["shard"]["bytes"] and sizes[1] and sizes[2] == len(sources) * DIGEST.itemsize:
            return note
    (target.folder / NOTES).mkdir(parents=True, exist_ok=True)
    mark = target.folder / name_of_note(number, "at")
    excluded = np.load(target.folder / EXCLUDED, mmap_mode="r") if job.excluded else None
    rows, rejects, digests = [], [], [NO_DIGEST] * len(sources)
    with writing(target.folder / name) as file, mark.open("wb", buffering=0) as at:
        hashed = _Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
            for place, source in enumerate(sources):
                os.pwrite(at.fileno(), place.to_bytes(8, "little"), 0)  # whoever finds us dead sees where
                try:
                    if source.path in deadly:
                        raise BadImage("its decoder crashes")
                    original = read(job.root / source.path, source)
                    digest = hashlib.sha256(original).digest()
                    if excluded is not None and contains(excluded, digest):
                        raise BadImage("it is in what exclude= names")
                    whole = original if job.options["keep_location"] else without_location(original)
                    data, suffix = checked(whole, job.options["resize"], job.options["quality"])
                except BadImage as error:
                    rejects.append({"path": source.path, "reason": str(error)})
                    continue
                digests[place] = digest
                stem = f"{number * shard_samples + place:09d}"
                add(archive, f"{stem}.{suffix}", data)
                rows.append((archive.offset - -(-len(data) // 512) * 512, len(data), source.label, zlib.crc32(data)))
                if source.label >= 0:
                    add(archive, f"{stem}.cls", str(source.label).encode())
                said = json.dumps({"path": source.path, "sha256": digest.hex()}, ensure_ascii=False)
                add(archive, f"{stem}.json", said.encode(errors="backslashreplace"))
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=ENTRY), allow_pickle=False)
    index = buffer.getvalue()
    shard = Shard(
        name=name,
        samples=len(rows),
        bytes=hashed.size,
        sha256=hashed.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    target.send(name)
    target.write(shard.index, index)
    note = {"shard": shard.model_dump(), "rejects": rejects}
    text = json.dumps(note, ensure_ascii=False).encode(errors="backslashreplace")
    try:
        target.write(name_of_note(number, "sha256"), b"".join(digests), flush=False)
        target.write(name_of_note(number), text, flush=False)
    except FileNotFoundError:
        if target.size(FILE) is None:  # else another process did the same shard, ended it all and took the notes away
            raise
    mark.unlink(missing_ok=True)
    return note


def contains(digests: np.ndarray, digest: bytes) -> bool:
    """Whether a sorted array of DIGEST holds a digest."""
    wanted = np.frombuffer(digest, DIGEST)[0]
    place = int(np.searchsorted(digests, wanted))
    return place < len(digests) and digests[place] == wanted


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member whose header says nothing but its name and size, so that equal input gives equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def read(path: Path, source: Source) -> bytes:
    """An image file as it was when it was listed. Raises BadImage."""
    try:
        if not path.is_file():
            raise BadImage("not a regular file")
        if source.size > decode.MAX_BYTES:
            raise BadImage(f"{source.size} bytes are over the limit of {decode.MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
    if len(data) != source.size:
        raise BadImage("it changed while it was converted")
    return data


def checked(data: bytes, resize: object, quality: object) -> tuple[bytes, str]:
    """Bytes and suffix of an image that was decoded once to be sure; shrunk where asked. Raises BadImage."""
    if not isinstance(resize, int):
        return data, decode.check(data)
    image = decode.open_image(data)
    if min(image.size) <= resize:
        return data, decode.check(data)
    pixels = decode.to_rgb(image)
    scale = resize / min(pixels.size)
    size = (max(resize, round(pixels.width * scale)), max(resize, round(pixels.height * scale)))
    buffer = io.BytesIO()
    pixels.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg"


GPS = 0x8825  # the EXIF tag that points to the directory of the location
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of EXIF's types
BLOCKS = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", re.DOTALL)  # as JPEG, PNG and WebP hold them
PACKET = re.compile(rb"<x:xmpmeta.*?</x:xmpmeta>", re.DOTALL)


def without_location(data: bytes) -> bytes:
    """An image file's bytes with the location in its EXIF and XMP blanked; the very same bytes where there is none."""
    if not any(mark in data for mark in (b"Exif\0\0", b"eXIf", b"EXIF", b"x:xmpmeta")):
        return data
    blanked = bytearray(data)
    for found in BLOCKS.finditer(data):
        _blank_directory(blanked, found.end())
    for found in PACKET.finditer(data):
        if b"GPS" in found[0]:
            blanked[found.start() : found.end()] = b" " * len(found[0])
    if blanked == data:
        return data
    return bytes(_with_checksums(blanked)) if data.startswith(b"\x89PNG\r\n\x1a\n") else bytes(blanked)


def _blank_directory(data: bytearray, start: int) -> None:
    """Blank the location in the EXIF that begins at `start`; damaged EXIF is left as it is."""
    order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", data, start + 4)
        for tag, _, _, pointer in _entries(data, start + first, order):
            if tag != GPS:
                continue
            entries = _entries(data, start + pointer, order)
            for _, kind, count, where in entries:
                length = SIZES.get(kind, 1) * count
                if 4 < length <= len(data) - start - where:
                    data[start + where : start + where + length] = bytes(length)
            length = 2 + 12 * len(entries)
            data[start + pointer : start + pointer + length] = bytes(length)
    except struct.error:
        return


def _entries(data: bytearray, at: int, order: str) -> list[tuple[int, int, int, int]]:
    """Tag, type, count and value or offset of every entry of an EXIF directory."""
    (count,) = struct.unpack_from(order + "H", data, at)
    return [struct.unpack_from(order + "HHII", data, at + 2 + 12 * i) for i in range(count)]


def _with_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks were changed, with checksums that fit."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return data
