"""Bytes to pixels by one written rule for each odd kind of image, no image refused, and no photograph's place kept."""

import contextlib
import faulthandler
import io
import os
import resource
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageFile

from ssl_vit.convert.shard_writer import encode_image, strip_gps
from ssl_vit.data import decode as module
from ssl_vit.data.dataset import Data
from ssl_vit.data.decode import MAX_PIXELS, BadImage, decode_image, jpeg_size, open_image, to_rgb
from ssl_vit.data.loader import ProcessShard, TrainingStream
from tests.data.damage import (
    BAD_IMAGES,
    CPU,
    GOOD_IMAGES,
    MB,
    SMALL,
    decompression_bombs,
    lying_jpeg,
    make_exif,
    memory_growth,
    png_bomb,
)
from tests.data.pictures import (
    build_shards,
    contents,
    encode_pil,
    make_png,
    picture,
    png_chunk,
    read_rejects,
    read_samples,
    write_pictures,
)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference, levels of 255."""
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(float) - expected).mean())


def open_pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def rgb_pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_pil(data).convert("RGB"))


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_an_odd_image_is_decoded_by_the_written_rules(name: str):
    """Also where half its size would do: then it has that, or its own."""
    data, pixels, mean, halved = GOOD_IMAGES[name]
    assert difference(decode_image(data), pixels) <= mean
    half = decode_image(data, scale=2)
    if halved:
        size = tuple((side + 1) // 2 for side in pixels.shape[1::-1])
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
        assert difference(half, np.asarray(small)) < 4
    else:
        assert difference(half, pixels) <= mean
    if name.startswith("gray"):
        assert (half == half[..., :1]).all()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    data, of_header = BAD_IMAGES[name], name.startswith(("sides", "scans"))
    if of_header:  # none of its pixels is decoded, which took 6 s and 500 MB
        monkeypatch.delattr(ImageFile.ImageFile, "load")
        assert jpeg_size(data) is None
    messages = {"sides": r"over the limit|DecompressionBomb", "other": "not a readable JPEG, PNG or WebP"}
    for scale in (1, 2):
        with pytest.raises(BadImage, match=messages.get(name.partition("-")[0])):
            decode_image(data, scale)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 31), (200, 301)])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_simplejpeg_agrees_with_pillow(size: tuple[int, int], options: dict):
    data = encode_pil(picture(1, *size), "JPEG", quality=92, **options)
    assert jpeg_size(data) == size
    assert difference(decode_image(data), rgb_pixels(data)) < 0.5


@pytest.mark.parametrize("height", [64, 65])
@pytest.mark.parametrize("width", [96, 97])
def test_half_scale_has_half_the_size_and_the_same_picture(height: int, width: int):
    data = encode_pil(picture(3, height, width), "JPEG", quality=95)
    half = decode_image(data, scale=2)
    assert half.shape == ((height + 1) // 2, (width + 1) // 2, 3)
    twice = Image.fromarray(half).resize((2 * half.shape[1], 2 * half.shape[0]), Image.Resampling.BICUBIC)
    assert difference(np.asarray(twice)[:height, :width], rgb_pixels(data)) < 2


def test_the_largest_size_and_a_phones_jpeg_with_a_second_picture_are_taken():
    assert open_image(make_png(8000, MAX_PIXELS // 8000, 8, 2, b"\0")).size == (8000, 8000)
    assert jpeg_size(lying_jpeg(8000, 8000)) == (8000, 8000)
    assert encode_image(data := GOOD_IMAGES["twice.jpg"].data, None, None) == (data, "jpg")


def test_running_out_of_memory_is_no_fault_of_the_image():
    """Taken for a bad image, it would drop good samples for ever, and others on every machine."""
    image = open_image(encode_pil(picture(), "PNG"))
    with patch.object(module.ImageOps, "exif_transpose", side_effect=MemoryError), pytest.raises(MemoryError):
        to_rgb(image)


@pytest.mark.parametrize(("depth", "color"), [(8, 2), (8, 6), (16, 2), (16, 6), (16, 0)])
def test_the_memory_of_a_decompressed_image_is_bounded(depth: int, color: int):
    """A file of a few kB: it is 16 bytes a pixel at most, so 1 GB for the largest that is taken."""
    side = 2000
    data = png_bomb(side, depth, color)
    assert len(data) < 200_000
    assert memory_growth(lambda: decode_image(data)) < 16 * side * side + 20 * MB


@pytest.mark.parametrize("name", ["profile-bomb.png", "text-bomb.png", "sides-65000.png", "sides-long.png", "text"])
def test_the_memory_of_compressed_extras_is_bounded(name: str):
    """All are refused; but one text of 80 MB may as well be passed over."""

    def decode() -> None:
        with contextlib.suppress(BadImage):
            assert decode_image(data).shape == (1, 2, 3)
            assert name == "text"

    text = make_png(2, 1, 8, 0, b"\0\1\2", png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * MB), 9)))
    data = (BAD_IMAGES | decompression_bombs() | {"text": text})[name]
    assert memory_growth(decode) < 30 * MB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the tables as files."""
    folder = tmp_path_factory.mktemp("images")
    for name, data in (
        {name: good.data for name, good in GOOD_IMAGES.items()} | BAD_IMAGES | decompression_bombs()
    ).items():
        (folder / name).write_bytes(data)
    return folder


def test_odd_images_are_converted_as_they_are_and_bad_ones_listed(folder: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    manifest = build_shards(folder, tmp_path / "out", shard_samples=7)
    rejects = read_rejects(tmp_path / "out")
    assert rejects.keys() == (BAD_IMAGES | decompression_bombs()).keys()
    assert all(reason and "\n" not in reason for reason in rejects.values())
    assert (manifest.samples, manifest.job["rejects"]) == (len(GOOD_IMAGES), len(rejects))
    images = {name: image for name, (_, image, _) in read_samples(manifest).items()}
    assert images == {name: good.data for name, good in GOOD_IMAGES.items()}
    stream = TrainingStream(manifest, Data(**SMALL), seed=0, batch=manifest.samples)
    assert bool(next(stream.batches(0, ProcessShard(0, 1, manifest.samples), CPU))["valid"].all())
    assert stream.faults.drain() == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing was executed


def test_bad_images_are_refused_when_they_are_shrunk_too(folder: Path, tmp_path: Path):
    manifest = build_shards(folder, tmp_path / "out", resize=9, quality=95)
    assert read_rejects(tmp_path / "out").keys() == (BAD_IMAGES | decompression_bombs()).keys()
    for name, (_, image, _) in read_samples(manifest).items():
        pixels, sides = GOOD_IMAGES[name].pixels, open_pil(image).size
        assert min(sides) == min(9, *pixels.shape[:2])
        assert (sides[0] > sides[1]) == (pixels.shape[1] > pixels.shape[0]), name  # upright


def test_an_image_at_which_the_decoder_crashes_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(20)]
    write_pictures(tmp_path / "in", names)
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    crash_inputs = {name: (tmp_path / "in" / name).read_bytes() for name in (names[3], names[8])}
    for name, data in crash_inputs.items():  # what the shards are to be: the same files, of which these are rejected
        (tmp_path / "other" / name).write_bytes(bytes(len(data)))

    def open_or_crash(data: bytes, original: Any = module.open_image) -> Image.Image:
        if data in crash_inputs.values():
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()  # pytest's, which would write much
            os.abort()
        return original(data)

    expected = build_shards(tmp_path / "other", tmp_path / "wanted", shard_samples=3)
    monkeypatch.setattr(module, "open_image", open_or_crash)
    suffixes = (".tar", ".npy")
    for workers in (1, 2):
        manifest = build_shards(tmp_path / "in", tmp_path / f"out{workers}", shard_samples=3, workers=workers)
        assert read_rejects(manifest.folder) == dict.fromkeys(crash_inputs, "its decoder crashes")
        assert manifest.samples == expected.samples == len(names) - len(crash_inputs)
        files, expected_files = (contents(m.folder).items() for m in (manifest, expected))
        assert {f for f in files if f[0].endswith(suffixes)} == {f for f in expected_files if f[0].endswith(suffixes)}


# where a photograph was taken does not reach the shards, and nothing else of its file changes

SECRET, DATE = (48.0, 51.0, 29.5), b"2026:11:22"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><exif:GPSLatitude>48,51.49N</exif:GPSLatitude></x:xmpmeta>'


def location_exif(gps: bool = True) -> Image.Exif:
    block = make_exif(6)
    block[0x010F] = "A maker of cameras"
    if gps:
        block.get_ifd(0x8825).update({1: "N", 2: SECRET, 3: "E", 4: (2.0, 17.0, 40.0), 29: DATE.decode()})
    return block


def photograph(kind: str, gps: bool = True) -> bytes:
    return encode_pil(picture(3, 40, 60), kind, exif=location_exif(gps).tobytes())


def files_with_location() -> Iterator[Any]:
    """A file with a location, and what of it tells that one is there."""
    for kind in ("JPEG", "PNG", "WEBP"):
        yield pytest.param(photograph(kind), DATE, id=kind)
    for kind in ("JPEG", "WEBP"):
        yield pytest.param(encode_pil(picture(3), kind, xmp=XMP), b"GPS", id=f"XMP in {kind}")
    second = picture(2)  # both pictures of a phone's file lose it
    second.info["exif"] = location_exif().tobytes()
    mpo = encode_pil(picture(1), "MPO", save_all=True, append_images=[second], exif=location_exif().tobytes())
    yield pytest.param(mpo, DATE, id="MPO")


@pytest.mark.parametrize(("data", "secret"), [*files_with_location()])
def test_the_location_is_gone_and_the_rest_is_as_it_was(data: bytes, secret: bytes):
    assert secret in data
    clean = strip_gps(data)
    assert secret not in clean
    assert len(clean) == len(data)
    image, original = open_pil(clean), open_pil(data)
    image.load()  # also checks a PNG's checksums
    assert np.array_equal(np.asarray(image), np.asarray(original))
    assert original.getexif().get_ifd(0x8825).get(2) == (SECRET if secret == DATE else None)
    assert not image.getexif().get_ifd(0x8825)
    assert [image.getexif().get(tag) for tag in (0x112, 0x10F)] == [
        original.getexif().get(tag) for tag in (0x112, 0x10F)
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_has_no_location_keeps_every_byte(kind: str):
    for data in (photograph(kind, gps=False), encode_pil(picture(1), kind)):
        assert strip_gps(data) is data


@pytest.mark.parametrize("cut", range(20, 200, 7))
def test_damaged_exif_is_no_obstacle(cut: int):
    tiff = location_exif().tobytes()[:cut]
    for block in (tiff, tiff + b"\xff" * 40, tiff + bytes(40)):
        jpeg = b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + photograph("JPEG", gps=False)[2:]
        assert len(strip_gps(jpeg)) == len(jpeg)
        png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"eXIf", block[6:]) + b"\0\0\xff"
        assert (strip_gps(png)[:16], strip_gps(png)[-3:]) == (png[:16], png[-3:])


def test_shards_hold_no_location_unless_asked(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(photograph("JPEG"))
    clean, with_location = (build_shards(tmp_path / "in", tmp_path / f"out{k}", keep_location=k) for k in (False, True))
    assert read_samples(with_location)["a.jpg"][1] == photograph("JPEG")
    assert read_samples(clean)["a.jpg"][1] == strip_gps(photograph("JPEG"))
    assert (clean.job["keep_location"], with_location.job["keep_location"]) == (False, True)
