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
from ssl_vit.data.manifest import ENTRY, MANIFEST_FILE, Shard, index_name
from ssl_vit.files import atomic_write

SHARD_STATE_DIR = ".notes"  # what is known of each shard, until the manifest takes its place
DIGEST = np.dtype("S32")  # a sha256; zeros stand for none
NO_DIGEST = bytes(32)
EXCLUDED = f"{SHARD_STATE_DIR}/excluded.npy"  # a sorted array of DIGEST, of the images to leave out


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


def shard_state_path(number: int, suffix: str = "json") -> str:
    """Where what is known of a shard is written down."""
    return f"{SHARD_STATE_DIR}/{number:06d}.{suffix}"


class _HashingFile:
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
    job: Job, number: int, sources: list[Source], shard_samples: int, crashing_paths: Container[str] = ()
) -> dict[str, Any]:
    """Write shard `number`, its index and then its note; returns the note, at once where it is there already.

    `crashing_paths` are the paths of images at which a decoder crashed.
    """
    target, name = job.target, f"{number:06d}.tar"
    with contextlib.suppress(ValueError, KeyError):
        state = json.loads(target.read(shard_state_path(number)) or b"")
        sizes = [target.size(file) for file in (name, index_name(name), shard_state_path(number, "sha256"))]
        if sizes[0] == state["shard"]["bytes"] and sizes[1] and sizes[2] == len(sources) * DIGEST.itemsize:
            return state
    (target.folder / SHARD_STATE_DIR).mkdir(parents=True, exist_ok=True)
    marker = target.folder / shard_state_path(number, "at")
    excluded = np.load(target.folder / EXCLUDED, mmap_mode="r") if job.excluded else None
    rows, rejects, digests = [], [], [NO_DIGEST] * len(sources)
    with atomic_write(target.folder / name) as file, marker.open("wb", buffering=0) as marker_file:
        hashed = _HashingFile(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
            for position, source in enumerate(sources):
                os.pwrite(marker_file.fileno(), position.to_bytes(8, "little"), 0)  # whoever finds us dead sees where
                try:
                    if source.path in crashing_paths:
                        raise BadImage("its decoder crashes")
                    original = read_source(job.root / source.path, source)
                    digest = hashlib.sha256(original).digest()
                    if excluded is not None and contains_digest(excluded, digest):
                        raise BadImage("it is in what exclude= names")
                    stripped = original if job.options["keep_location"] else strip_gps(original)
                    data, suffix = encode_image(stripped, job.options["resize"], job.options["quality"])
                except BadImage as error:
                    rejects.append({"path": source.path, "reason": str(error)})
                    continue
                digests[position] = digest
                stem = f"{number * shard_samples + position:09d}"
                add_member(archive, f"{stem}.{suffix}", data)
                rows.append((archive.offset - -(-len(data) // 512) * 512, len(data), source.label, zlib.crc32(data)))
                if source.label >= 0:
                    add_member(archive, f"{stem}.cls", str(source.label).encode())
                metadata = json.dumps({"path": source.path, "sha256": digest.hex()}, ensure_ascii=False)
                add_member(archive, f"{stem}.json", metadata.encode(errors="backslashreplace"))
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
    target.upload(name)
    target.write(shard.index, index)
    state = {"shard": shard.model_dump(), "rejects": rejects}
    text = json.dumps(state, ensure_ascii=False).encode(errors="backslashreplace")
    try:
        target.write(shard_state_path(number, "sha256"), b"".join(digests), flush=False)
        target.write(shard_state_path(number), text, flush=False)
    except FileNotFoundError:
        if (
            target.size(MANIFEST_FILE) is None
        ):  # else another process did the same shard, ended it all and took the notes away
            raise
    marker.unlink(missing_ok=True)
    return state


def contains_digest(digests: np.ndarray, digest: bytes) -> bool:
    """Whether a sorted array of DIGEST holds a digest."""
    target = np.frombuffer(digest, DIGEST)[0]
    position = int(np.searchsorted(digests, target))
    return position < len(digests) and digests[position] == target


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member whose header says nothing but its name and size, so that equal input gives equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def read_source(path: Path, source: Source) -> bytes:
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


def encode_image(data: bytes, resize: object, quality: object) -> tuple[bytes, str]:
    """Bytes and suffix of an image that was decoded once to be sure; shrunk where asked. Raises BadImage."""
    if not isinstance(resize, int):
        return data, decode.verify_image(data)
    image = decode.open_image(data)
    if min(image.size) <= resize:
        return data, decode.verify_image(data)
    pixels = decode.to_rgb(image)
    scale = resize / min(pixels.size)
    size = (max(resize, round(pixels.width * scale)), max(resize, round(pixels.height * scale)))
    buffer = io.BytesIO()
    pixels.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), "jpg"


GPS = 0x8825  # the EXIF tag that points to the directory of the location
EXIF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of EXIF's types
EXIF_HEADER = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", re.DOTALL)  # as JPEG, PNG and WebP hold them
XMP_PACKET = re.compile(rb"<x:xmpmeta.*?</x:xmpmeta>", re.DOTALL)


def strip_gps(data: bytes) -> bytes:
    """An image file's bytes with the location in its EXIF and XMP blanked; the very same bytes where there is none."""
    if not any(marker in data for marker in (b"Exif\0\0", b"eXIf", b"EXIF", b"x:xmpmeta")):
        return data
    blanked = bytearray(data)
    for match in EXIF_HEADER.finditer(data):
        _blank_gps(blanked, match.end())
    for match in XMP_PACKET.finditer(data):
        if b"GPS" in match[0]:
            blanked[match.start() : match.end()] = b" " * len(match[0])
    if blanked == data:
        return data
    return bytes(_update_png_checksums(blanked)) if data.startswith(b"\x89PNG\r\n\x1a\n") else bytes(blanked)


def _blank_gps(data: bytearray, start: int) -> None:
    """Blank the location in the EXIF that begins at `start`; damaged EXIF is left as it is."""
    byte_order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(byte_order + "I", data, start + 4)
        for tag, _, _, pointer in _read_entries(data, start + directory, byte_order):
            if tag != GPS:
                continue
            entries = _read_entries(data, start + pointer, byte_order)
            for _, kind, count, value_offset in entries:
                length = EXIF_TYPE_BYTES.get(kind, 1) * count
                if 4 < length <= len(data) - start - value_offset:
                    data[start + value_offset : start + value_offset + length] = bytes(length)
            length = 2 + 12 * len(entries)
            data[start + pointer : start + pointer + length] = bytes(length)
    except struct.error:
        return


def _read_entries(data: bytearray, offset: int, byte_order: str) -> list[tuple[int, int, int, int]]:
    """Tag, type, count and value or offset of every entry of an EXIF directory."""
    (count,) = struct.unpack_from(byte_order + "H", data, offset)
    return [struct.unpack_from(byte_order + "HHII", data, offset + 2 + 12 * i) for i in range(count)]


def _update_png_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks were changed, with checksums that fit."""
    offset = 8
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        if offset + 12 + length > len(data):
            break
        data[offset + 8 + length : offset + 12 + length] = struct.pack(
            ">I", zlib.crc32(data[offset + 4 : offset + 8 + length])
        )
        offset += 12 + length
    return data
