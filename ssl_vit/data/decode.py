"""Bytes become pixels. Only JPEG, PNG and WebP are ever decoded, and nothing else is even tried.

simplejpeg reads ordinary JPEGs; Pillow is the reference and reads the rest by one written rule each: EXIF orientation
is applied, an animation gives its first frame, transparency lies on white, 16 bits become the upper 8, any other mode
becomes RGB.
"""

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with a second picture behind it
MAX_PIXELS = 64_000_000  # a PNG just below Pillow's own limit took 6 s and 500 MB before it failed
MAX_SIDE = 20_000
SCAN_MARKER, MAX_SCANS = (
    b"\xff\xda",
    100,
)  # of a progressive JPEG: each takes the time of a whole decoding; ten are usual
MAX_BYTES = 1 << 28  # of an encoded image


class BadImage(ValueError):
    """Bytes that are not an image we take; the text says why."""


def open_image(data: bytes) -> Image.Image:
    """A Pillow image, its header read and its size within the limits; raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF warns here already; our own limit of pixels is lower
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except MemoryError:
        raise  # no fault of the image
    except Exception as error:  # Pillow raises many kinds on hostile bytes
        raise BadImage(f"not a readable JPEG, PNG or WebP ({type(error).__name__})") from error
    if data[:2] == b"\xff\xd8" and data.count(SCAN_MARKER) > MAX_SCANS:
        raise BadImage(f"more than {MAX_SCANS} scans")
    if image.format not in FORMATS:
        raise BadImage(f"{image.format} is not taken")
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height} pixels is over the limit of {MAX_PIXELS} pixels, {MAX_SIDE} a side")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image by the rules above; raises BadImage where the pixels cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and transparency chunks warn; the pixels are what counts
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                values = np.asarray(image)
                gray = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
                gray[values == image.info.get("transparency", -1)] = 255
                return Image.fromarray(gray).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(f"damaged pixels ({type(error).__name__}: {error})") from error


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an ordinary upright JPEG within the limits, None for anything that only Pillow reads."""
    if data[:3] != b"\xff\xd8\xff" or _orientation(data) != 1 or data.count(SCAN_MARKER) > MAX_SCANS:
        return None
    try:
        height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
    except ValueError:
        return None
    return (height, width) if height * width <= MAX_PIXELS and max(height, width) <= MAX_SIDE else None


def _orientation(data: bytes) -> int | None:
    """A JPEG's EXIF orientation, 1 = upright, also where it has none; None where that takes Pillow to say."""
    exif = None
    for marker, start, end in _segments(data):
        if marker is None:
            return None
        if marker == APP1 and data[start : start + 6] == b"Exif\0\0":
            if exif is not None:
                return None
            exif = data[start + 6 : end]
        elif marker == APP1 and data.find(b"tiff:Orientation", start, end) >= 0:
            return None
    return 1 if exif is None else _exif_orientation(exif)


APP1, START_OF_SCAN = 0xE1, 0xDA  # a JPEG's markers: of EXIF and XMP, and of the pixels' begin


def _segments(data: bytes) -> Iterator[tuple[int | None, int, int]]:
    """Marker, start and end of what stands before a JPEG's pixels; a marker of None where that is not in order."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == START_OF_SCAN:
            return
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        yield marker, offset + 4, offset + 2 + length
        offset += 2 + max(2, length)
    yield None, offset, offset


def _exif_orientation(tiff: bytes) -> int | None:
    """The orientation in a block of EXIF, by its first directory."""
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if byte_order is None:
        return None
    try:
        (start,) = struct.unpack_from(byte_order + "I", tiff, 4)
        (count,) = struct.unpack_from(byte_order + "H", tiff, start)
        entries = [struct.unpack_from(byte_order + "HHIH", tiff, start + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return None
    orientations = [entry for entry in entries if entry[0] == 0x0112]
    if not orientations:
        return 1
    return orientations[0][3] if len(orientations) == 1 and orientations[0][1:3] == (3, 1) else None


def verify_image(data: bytes) -> str:
    """The suffix of an image of which every byte was decoded; raises BadImage.

    An ordinary JPEG is decoded at an eighth of its size: that reads all of its code, where the faults are, and saves
    the arithmetic behind it (of 720 damaged files it refused the very same as at full size).
    """
    size = jpeg_size(data)
    if size is not None:
        decode_jpeg(data, size, 8)
        return "jpg"
    image = open_image(data)
    suffix = FORMATS[str(image.format)]
    to_rgb(image)
    return suffix


def decode_image(data: bytes, scale: int = 1) -> np.ndarray:
    """Pixels uint8 [H, W, 3]; an ordinary JPEG comes at 1/2, 1/4 or 1/8 of its size where `scale` says so.

    Its DCT gives small sizes nearly free. Raises BadImage.
    """
    size = jpeg_size(data)
    return decode_jpeg(data, size, scale) if size else decode_other(data)


def decode_jpeg(data: bytes, size: tuple[int, int], scale: int = 1) -> np.ndarray:
    """Pixels of an image of which `jpeg_size` gave the size; raises BadImage."""
    height, width = (-(-side // scale) for side in size)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=scale)
    except ValueError:
        return decode_other(data)  # CMYK, or an oddity that only Pillow reads


def decode_other(data: bytes) -> np.ndarray:
    """Pixels of any image by the rules above; raises BadImage."""
    return np.array(to_rgb(open_image(data)))
