"""Where a photograph was taken does not reach the shards, and nothing else of its file changes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_vit.data.privacy import without_location
from tests.data.pictures import chunk, encoded, one, picture, samples

SECRET = (48.0, 51.0, 29.5)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><exif:GPSLatitude>48,51.49N</exif:GPSLatitude></x:xmpmeta>'


def exif(gps: bool, orientation: int = 6) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010F] = orientation, "A maker of cameras"
    if gps:
        made.get_ifd(0x8825).update({1: "N", 2: SECRET, 3: "E", 4: (2.0, 17.0, 40.0), 29: "2026:11:22"})
    return made


def photograph(kind: str, gps: bool = True, **options: Any) -> bytes:
    return encoded(picture(3, 40, 60), kind, exif=exif(gps).tobytes(), **options)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_location_is_gone_and_the_rest_is_as_it_was(kind: str):
    data = photograph(kind)
    assert opened(data).getexif().get_ifd(0x8825)[2] == SECRET
    clean = without_location(data)
    image = opened(clean)
    image.load()  # also checks a PNG's checksums
    assert not image.getexif().get_ifd(0x8825)
    assert (image.getexif()[0x0112], image.getexif()[0x010F]) == (6, "A maker of cameras")
    assert np.array_equal(np.asarray(image), np.asarray(opened(data)))
    assert len(clean) == len(data)
    assert b"2026:11:22" in data
    assert b"2026:11:22" not in clean


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_xmp_that_holds_a_location_is_blanked(kind: str):
    data = encoded(picture(3), kind, xmp=XMP)
    assert b"GPSLatitude" in data
    clean = without_location(data)
    assert b"GPS" not in clean
    assert np.array_equal(np.asarray(opened(clean)), np.asarray(opened(data)))


def test_both_pictures_of_a_phones_file_lose_it():
    first, second = picture(1), picture(2)
    first.info["exif"] = second.info["exif"] = exif(gps=True).tobytes()
    data = encoded(first, "MPO", save_all=True, append_images=[second], exif=exif(gps=True).tobytes())
    assert data.count(b"2026:11:22") >= 1
    assert b"2026:11:22" not in without_location(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_has_no_location_keeps_every_byte(kind: str):
    for data in (photograph(kind, gps=False), encoded(picture(1), kind)):
        assert without_location(data) is data


@pytest.mark.parametrize("cut", range(20, 200, 7))
def test_damaged_exif_is_no_obstacle(cut: int):
    tiff = exif(gps=True).tobytes()
    for block in (tiff[:cut], tiff[:cut] + b"\xff" * 40, tiff[:cut] + bytes(40)):
        data = b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + photograph("JPEG", gps=False)[2:]
        without_location(data)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"eXIf", block[6:])
        without_location(png + b"\0\0\xff")


def test_shards_hold_no_location_unless_asked(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(photograph("JPEG"))
    clean, kept = (one(tmp_path / "in", tmp_path / f"out{k}", keep_location=k) for k in (False, True))
    assert samples(kept)["a.jpg"][1] == photograph("JPEG")
    assert samples(clean)["a.jpg"][1] == without_location(photograph("JPEG"))
    assert (clean.job["keep_location"], kept.job["keep_location"]) == (False, True)
