"""Bytes to pixels: one written rule for each odd kind of image, and refusal of everything that is not an image."""

import contextlib
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import chunk, encoded, picture, png
from PIL import Image, ImageOps

from ssl_vit.data import decode as module
from ssl_vit.data.decode import MAX_PIXELS, MAX_SIDE, BadImage, decode, jpeg_size, open_image, to_rgb
from ssl_vit.data.write import checked

XMP = b"http://ns.adobe.com/xap/1.0/\0"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def difference(got: np.ndarray, wanted: np.ndarray | Image.Image) -> float:
    """Mean absolute difference, levels of 255."""
    wanted = pixels(wanted) if isinstance(wanted, Image.Image) else wanted
    assert got.dtype == np.uint8
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(int) - wanted).mean())


def segment(marker: int, data: bytes) -> bytes:
    """One segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = value
    return exif.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 31), (200, 301)])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_simplejpeg_agrees_with_pillow(size: tuple[int, int], options: dict):
    data = encoded(picture(1, *size), "JPEG", quality=92, **options)
    assert jpeg_size(data) == size
    assert difference(decode(data), Image.open(io.BytesIO(data))) < 0.5


def test_png_and_webp_are_decoded_exactly():
    image = picture(2)
    assert difference(decode(encoded(image, "PNG")), image) == 0
    assert difference(decode(encoded(image, "WEBP", lossless=True)), image) == 0


@pytest.mark.parametrize("height", [64, 65])
@pytest.mark.parametrize("width", [96, 97])
def test_half_scale_has_half_the_size_and_the_same_picture(height: int, width: int):
    data = encoded(picture(3, height, width), "JPEG", quality=95)
    half = decode(data, scale=2)
    assert half.shape == ((height + 1) // 2, (width + 1) // 2, 3)
    twice = Image.fromarray(half).resize((2 * half.shape[1], 2 * half.shape[0]), Image.Resampling.BICUBIC)
    assert difference(np.asarray(twice)[:height, :width], Image.open(io.BytesIO(data))) < 2


def test_grey_becomes_three_equal_channels():
    grey = picture(4, channels=1)
    assert grey.mode == "L"
    for kind in ("JPEG", "PNG"):
        got = decode(encoded(grey, kind))
        assert (got == got[..., :1]).all()
        assert difference(got, grey) < 1.5
    assert decode(png(8, 1, 1, 0, b"\0\xaa")).tolist() == [[[255] * 3, [0] * 3] * 4]  # one bit a pixel


@pytest.mark.parametrize("half", [False, True])
def test_cmyk_jpeg_becomes_rgb(half: bool):
    image = picture(5, 64, 64)
    data = encoded(image.convert("CMYK"), "JPEG", quality=95)
    wanted = image.resize((32, 32), Image.Resampling.BOX) if half and decode(data, 1 + half).shape[0] == 32 else image
    assert difference(decode(data, 1 + half), wanted) < 4


def test_sixteen_bits_become_the_upper_eight():
    values = [0, 255, 256, 30_000, 65_535]
    grey = decode(png(5, 1, 16, 0, b"\0" + struct.pack(">5H", *values)))
    assert grey[0].tolist() == [[v >> 8] * 3 for v in values]
    colour = decode(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 255, 256, 511, 40_000, 65_535)))
    assert colour[0].tolist() == [[0, 0, 1], [1, 40_000 >> 8, 255]]


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_lies_on_white(channels: int):
    image = picture(6, channels=channels)
    alpha = Image.linear_gradient("L").resize(image.size)
    share = np.asarray(alpha)[..., None] / 255
    wanted = pixels(image) * share + 255 * (1 - share)
    image.putalpha(alpha)
    assert image.mode == ("LA" if channels == 1 else "RGBA")
    assert difference(decode(encoded(image, "PNG")), wanted) < 1
    assert difference(decode(encoded(image, "WEBP", lossless=True, exact=True)), wanted) < 1


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(encoded(image, "PNG", transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "wanted"),
    [
        (8, 0, struct.pack(">3B", 0, 7, 200), struct.pack(">H", 0), [[255] * 3, [7] * 3, [200] * 3]),
        (16, 0, struct.pack(">3H", 0, 1800, 51_200), struct.pack(">H", 0), [[255] * 3, [7] * 3, [200] * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6, 7, 8, 9]), struct.pack(">3H", 1, 2, 3), [[255] * 3, [4, 5, 6], [7, 8, 9]]),
    ],
    ids=["grey", "grey 16 bits", "colour"],
)
def test_a_transparent_key_colour_is_white(depth: int, colour: int, row: bytes, key: bytes, wanted: list):
    assert decode(png(3, 1, depth, colour, b"\0" + row, chunk(b"tRNS", key)))[0].tolist() == wanted


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(value: int):
    image = picture(7, 40, 60)
    data = encoded(image, "JPEG", quality=95, exif=orientation(value))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((60, 40) if value < 5 else (40, 60))
    for half in (False, value > 1):  # the upright one is read as if it had no EXIF
        assert difference(decode(data, 1 + half), upright) < 0.8
    assert difference(decode(encoded(image, "PNG", exif=orientation(value))), pixels(upright)) < 1.5


def test_orientation_is_found_wherever_it_stands():
    """Behind a long comment or profile, or in XMP alone: Pillow applies it, so the fast decoder must not miss it."""
    data = encoded(picture(7, 40, 60), "JPEG", quality=95)
    first = b"\xff\xd8" + segment(0xFE, b"a comment " * 600)
    xmp = segment(0xE1, XMP + b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    for case in (first + segment(0xE1, orientation(6)) + data[2:], b"\xff\xd8" + xmp + data[2:]):
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(case))).size == (40, 60)
        assert decode(case).shape == (60, 40, 3)


def test_broken_exif_does_not_cost_the_image():
    broken = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage"
    data, plain = (encoded(picture(8), "JPEG", exif=exif) for exif in (broken, b""))
    assert difference(decode(data), Image.open(io.BytesIO(plain))) < 0.5


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str):
    frames = [picture(n) for n in (9, 10, 11)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **lossless)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert difference(decode(data), frames[0]) == 0


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "PDF", "EPS", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused_under_any_name(kind: str):
    data = encoded(picture(12, 32, 32), kind)
    with pytest.raises(BadImage, match="not a readable JPEG, PNG or WebP"):
        decode(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" * 50, b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(99)]
)
def test_scraps_are_refused(data: bytes):
    with pytest.raises(BadImage):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("half", [False, True])
def test_truncated_files_are_refused(kind: str, share: float, half: bool):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind, quality=90)
    with pytest.raises(BadImage):
        decode(data[: int(share * len(data))], 1 + half)


def lying_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        *(png(*size, 8, 2, b"\0") for size in [(65_000, 65_000), (MAX_SIDE + 1, 1), (1, 89_478_485), (8001, 8000)]),
        *(lying_jpeg(*size) for size in [(65_000, 65_000), (MAX_SIDE + 1, 1), (8001, 8000)]),
    ],
)
def test_dimensions_over_the_limit_are_refused_from_the_header(data: bytes):
    assert jpeg_size(data) is None
    began = time.process_time()
    with pytest.raises(BadImage, match=r"over the limit|DecompressionBomb"):
        decode(data)
    assert time.process_time() - began < 0.5  # decoding the largest took 6 s


def test_the_largest_size_is_within_the_limit():
    assert open_image(png(8000, MAX_PIXELS // 8000, 8, 2, b"\0")).size == (8000, 8000)
    assert jpeg_size(lying_jpeg(8000, 8000)) == (8000, 8000)


def test_a_compressed_text_bomb_is_refused_or_passed_over():
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20), 9))
    began = time.process_time()
    with contextlib.suppress(BadImage):
        assert decode(png(2, 1, 8, 0, b"\0\1\2", bomb)).shape == (1, 2, 3)
    assert time.process_time() - began < 1


def test_running_out_of_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch):
    """Taken for a bad image, it would drop good samples for ever, and others on every machine."""

    def starved(*_: object, **__: object) -> None:
        raise MemoryError

    image = open_image(encoded(picture(), "PNG"))
    monkeypatch.setattr(module.ImageOps, "exif_transpose", starved)
    with pytest.raises(MemoryError):
        to_rgb(image)


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg(tmp_path: Path):
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    data, suffix = checked((tmp_path / "a.jpg").read_bytes(), None, None)
    assert (data, suffix) == ((tmp_path / "a.jpg").read_bytes(), "jpg")
    assert decode(data)[0, 0, 0] > 200
