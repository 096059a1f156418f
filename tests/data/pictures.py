"""Small images that the tests of the data path make themselves, and shards of them."""

import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data.manifest import Manifest

CLASSES = ["animals/cat", "animals/dog", "plants"]
NAMES = [f"{c}/{i}.{kind}" for c in CLASSES for i, kind in enumerate(("jpg", "png", "JPG", "jpeg"))]


def picture(number: int = 0, height: int = 20, width: int = 24, channels: int = 3) -> Image.Image:
    """A smooth image, the same for the same arguments; JPEG keeps it to within a few levels."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return Image.fromarray(coarse.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def encode_pil(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def make_png(width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand: what Pillow cannot write, such as 16-bit color, or a header that lies."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def write_pictures(root: Path, names: Iterable[str], **size: int) -> Path:
    """A picture under each of these names; returns the root."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        path.write_bytes(encode_pil(picture(number, **size), kind))
    return root


def read_rejects(folder: Path) -> dict[str, str]:
    """Path -> reason of what a conversion left out."""
    file = folder / "rejects.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["path"]: row["reason"] for row in rows}


def tar_members(tar: Path) -> dict[str, bytes]:
    """Name -> content of a tar, by the standard library."""
    with tarfile.open(tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def build_splits(source: Path, output: Path, **options: Any) -> dict[str, Manifest]:
    return convert_images(MakeShards(input=str(source), output=str(output), **{"workers": 1, "quiet": True} | options))


def build_shards(source: Path, output: Path, **options: Any) -> Manifest:
    """The manifest of a conversion without splits."""
    return build_splits(source, output, **options)[""]


def read_samples(manifest: Manifest) -> dict[str, tuple[str, bytes, int]]:
    """Source path -> (key, image bytes, label) of every sample, as the tar files alone tell it."""
    samples = {}
    for shard in manifest.shards:
        files = tar_members(manifest.folder / shard.name)
        for name in (name for name in files if name.endswith(".json")):
            stem = name.removesuffix(".json")
            (image,) = (data for member, data in files.items() if re.fullmatch(rf"{stem}\.(jpg|png|webp)", member))
            samples[json.loads(files[name])["path"]] = (stem, image, int(files.get(f"{stem}.cls", b"-1")))
    return samples
