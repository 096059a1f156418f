"""Data sets of a benchmark's layout made of noise: the right classes, folders and names, no content."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_vit.convert.make_shards import MakeShards, convert

SIDE = 6  # pixels


def names(classes: int) -> list[str]:
    """Class names that sort as their numbers do."""
    return [f"class_{number:04d}" for number in range(classes)]


def draw(
    folder: Path,
    labels: Iterable[int],
    classes: Sequence[str],
    seed: int = 0,
    form: str = "{:06d}.png",
    first: int = 0,
    wide: int = 1,
) -> None:
    """Write one image of noise a label, folder/CLASS/FORM, numbered from `first`, `wide` times as wide as high."""
    random = np.random.default_rng([seed, *folder.as_posix().encode()])
    for number, label in enumerate(labels, first):
        place = folder / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (SIDE, SIDE * wide, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / form.format(number))


def shards(images: Path, output: Path, classes: Sequence[str]) -> Path:
    """Convert a folder, under these class numbers."""
    listed = output.parent / f"{output.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(json.dumps(list(classes)))
    options = {"class_map": str(listed), "workers": 1, "quiet": True, "shard_samples": 400}
    convert(MakeShards(input=str(images), output=str(output), **options))
    return output


def made(folder: Path, classes: int, splits: dict[str, int]) -> Path:
    """Shards of splits of so many images, which hold every class that they have room for: folder/shards/SPLIT."""
    for split, count in splits.items():
        draw(folder / "images" / split, (number % classes for number in range(count)), names(classes))
    return shards(folder / "images", folder / "shards", names(classes))


def hard(folder: Path) -> Path:
    """Shards train/ and val/ of three kinds of noise that a tiny model tells apart now and then: 48 and 60 images."""
    random = np.random.default_rng(0)
    for split, count in {"train": 48, "val": 60}.items():
        for number in range(count):
            place = folder / "images" / split / names(3)[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = random.normal(128, 40, (SIDE, SIDE, 3)) + 12 * (np.arange(3) == number % 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:03d}.png")
    return shards(folder / "images", folder / "shards", names(3))
