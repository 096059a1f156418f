"""Bytes to pixels: one written rule for each odd kind of image, and refusal of everything that is not an image."""

import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from ssl_vit.data import decode as module
from ssl_vit.data.decode import MAX_PIXELS, BadImage, decode, jpeg_size, open_image, to_rgb
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import Share, TrainingStream
from ssl_vit.data.write import checked
from tests.data.damage import BAD_IMAGES, CPU, GOOD_IMAGES, MB, SMALL, bomb, bombs, growth, lying_jpeg
from tests.data.pictures import chunk, contents, encoded, one, picture, png, samples, write_pictures


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Mean absolute difference, levels of 255."""
    assert got.dtype == np.uint8
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(float) - wanted).mean())


def seen(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_an_odd_image_is_decoded_by_the_written_rules(name: str):
    """Also where half its size would do: then it has that, or its own."""
    data, pixels, mean, halved = GOOD_IMAGES[name]
    assert difference(decode(data), pixels) <= mean
    half = decode(data, scale=2)
    if halved:
        size = tuple((side + 1) // 2 for side in pixels.shape[1::-1])
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
        assert difference(half, np.asarray(small)) < 4
    else:
        assert difference(half, pixels) <= mean
    if name.startswith("grey"):
        assert (half == half[..., :1]).all()


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    data, of_header = BAD_IMAGES[name], name.startswith(("sides", "scans"))
    if of_header:  # none of its pixels is decoded, which took 6 s and 500 MB
        monkeypatch.delattr(ImageFile.ImageFile, "load")
        assert jpeg_size(data) is None
    says = {"sides": r"over the limit|DecompressionBomb", "other": "not a readable JPEG, PNG or WebP"}
    for scale in (1, 2):
        with pytest.raises(BadImage, match=says.get(name.partition("-")[0])):
            decode(data, scale)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 31), (200, 301)])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_simplejpeg_agrees_with_pillow(size: tuple[int, int], options: dict):
    data = encoded(picture(1, *size), "JPEG", quality=92, **options)
    assert jpeg_size(data) == size
    assert difference(decode(data), seen(data)) < 0.5


@pytest.mark.parametrize("height", [64, 65])
@pytest.mark.parametrize("width", [96, 97])
def test_half_scale_has_half_the_size_and_the_same_picture(height: int, width: int):
    data = encoded(picture(3, height, width), "JPEG", quality=95)
    half = decode(data, scale=2)
    assert half.shape == ((height + 1) // 2, (width + 1) // 2, 3)
    twice = Image.fromarray(half).resize((2 * half.shape[1], 2 * half.shape[0]), Image.Resampling.BICUBIC)
    assert difference(np.asarray(twice)[:height, :width], seen(data)) < 2


def test_the_largest_size_is_within_the_limit():
    assert open_image(png(8000, MAX_PIXELS // 8000, 8, 2, b"\0")).size == (8000, 8000)
    assert jpeg_size(lying_jpeg(8000, 8000)) == (8000, 8000)


def test_running_out_of_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch):
    """Taken for a bad image, it would drop good samples for ever, and others on every machine."""

    def starved(*_: object, **__: object) -> None:
        raise MemoryError

    image = open_image(encoded(picture(), "PNG"))
    monkeypatch.setattr(module.ImageOps, "exif_transpose", starved)
    with pytest.raises(MemoryError):
        to_rgb(image)


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg():
    data = GOOD_IMAGES["twice.jpg"].data
    assert checked(data, None, None) == (data, "jpg")


@pytest.mark.parametrize(
    ("depth", "colour"),
    [
        *(pytest.param(8, 2, id="rgb"), pytest.param(8, 6, id="rgba")),
        *(pytest.param(16, 2, id="rgb16"), pytest.param(16, 6, id="rgba16")),
        pytest.param(16, 0, id="grey16"),
    ],
)
def test_the_memory_of_a_decompressed_image_is_bounded(depth: int, colour: int):
    """A file of a few kB: it is 16 bytes a pixel at most, so 1 GB for the largest that is taken."""
    side = 2000
    data = bomb(side, depth, colour)
    assert len(data) < 200_000
    assert growth(lambda: decode(data)) < 16 * side * side + 20 * MB


@pytest.mark.parametrize("name", ["profile-bomb.png", "text-bomb.png", "sides-65000.png", "sides-long.png"])
def test_the_memory_of_compressed_extras_is_bounded(name: str):
    def refused() -> None:
        with pytest.raises(BadImage):
            decode(data)

    data = (BAD_IMAGES | bombs())[name]
    assert growth(refused) < 30 * MB


def test_a_compressed_text_bomb_is_refused_or_passed_over():
    def decoded() -> None:
        with contextlib.suppress(BadImage):
            assert decode(data).shape == (1, 2, 3)

    data = png(2, 1, 8, 0, b"\0\1\2", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * MB), 9)))
    assert growth(decoded) < 30 * MB


# on their way into shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the tables as files."""
    folder = tmp_path_factory.mktemp("images")
    for name, data in ({name: good.data for name, good in GOOD_IMAGES.items()} | BAD_IMAGES | bombs()).items():
        (folder / name).write_bytes(data)
    return folder


def rejected(folder: Path) -> dict[str, str]:
    """Path -> reason of what a conversion left out."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {reject["path"]: reject["reason"] for reject in map(json.loads, lines)}


def test_odd_images_are_converted_as_they_are_and_bad_ones_listed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made = one(folder, tmp_path / "out", shard_samples=7)
    rejects = rejected(tmp_path / "out")
    assert rejects.keys() == (BAD_IMAGES | bombs()).keys()
    assert all(reason and "\n" not in reason for reason in rejects.values())
    assert made.samples == len(GOOD_IMAGES)
    found = {name: image for name, (_, image, _) in samples(made).items()}
    assert found == {name: good.data for name, good in GOOD_IMAGES.items()}
    stream = TrainingStream(made, Data(**SMALL), seed=0, batch=made.samples)
    assert bool(next(stream.batches(0, Share(0, 1, made.samples), CPU))["valid"].all())
    assert stream.faults.take() == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing was executed


def test_bad_images_are_refused_when_they_are_shrunk_too(folder: Path, tmp_path: Path):
    made = one(folder, tmp_path / "out", resize=9, quality=95)
    assert rejected(tmp_path / "out").keys() == (BAD_IMAGES | bombs()).keys()
    for name, (_, image, _) in samples(made).items():
        pixels = GOOD_IMAGES[name].pixels
        sides = Image.open(io.BytesIO(image)).size
        assert min(sides) == min(9, *pixels.shape[:2])
        assert (sides[0] > sides[1]) == (pixels.shape[1] > pixels.shape[0]), name  # upright


def test_an_image_at_which_the_decoder_crashes_is_listed_and_the_rest_is_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [f"{'ab'[number % 2]}/{number:02d}.png" for number in range(20)]
    write_pictures(tmp_path / "in", names)
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    deadly = {names[3], names[8]}
    killers = {(tmp_path / "in" / name).read_bytes() for name in deadly}
    for name in deadly:  # what the shards are to be: the same files, of which these are rejected
        (tmp_path / "other" / name).write_bytes(bytes((tmp_path / "in" / name).stat().st_size))
    wanted = one(tmp_path / "other", tmp_path / "wanted", shard_samples=3)
    right = module.open_image

    def crashing(data: bytes) -> Image.Image:
        if data in killers:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()  # pytest's, which would write much
            os.abort()
        return right(data)

    monkeypatch.setattr(module, "open_image", crashing)
    for workers in (1, 2):
        made = one(tmp_path / "in", tmp_path / f"out{workers}", shard_samples=3, workers=workers)
        assert rejected(made.folder) == dict.fromkeys(deadly, "its decoder crashes")
        assert made.samples == wanted.samples == len(names) - len(deadly)
        assert {n: d for n, d in contents(made.folder).items() if n.endswith((".tar", ".npy"))} == {
            n: d for n, d in contents(wanted.folder).items() if n.endswith((".tar", ".npy"))
        }
