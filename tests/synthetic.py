"""Data sets of a benchmark's layout made of noise: the right classes, folders and names, no content."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_vit.convert.make_shards import MakeShards, convert_images

SIDE = 6  # pixels


def class_names(classes: int) -> list[str]:
    """Class names that sort as their numbers do."""
    return [f"class_{number:04d}" for number in range(classes)]


def draw_noise(
    folder: Path,
    labels: Iterable[int],
    classes: Sequence[str],
    seed: int = 0,
    name_format: str = "{:06d}.png",
    first: int = 0,
    aspect: int = 1,
) -> None:
    """Write one image of noise a label, folder/CLASS/FORM, numbered from `first`, `wide` times as wide as high."""
    rng = np.random.default_rng([seed, *folder.as_posix().encode()])
    for number, label in enumerate(labels, first):
        class_dir = folder / classes[label]
        class_dir.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE * aspect, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(class_dir / name_format.format(number))


def convert_shards(images: Path, output: Path, classes: Sequence[str]) -> Path:
    """Convert a folder, under these class numbers."""
    class_map = output.parent / f"{output.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    class_map.write_text(json.dumps(list(classes)))
    options = {"class_map": str(class_map), "workers": 1, "quiet": True, "shard_samples": 400}
    convert_images(MakeShards(input=str(images), output=str(output), **options))
    return output


def make_noise_shards(folder: Path, classes: int, splits: dict[str, int]) -> Path:
    """Shards of splits of so many images, which hold every class that they have room for: folder/shards/SPLIT."""
    for split, count in splits.items():
        draw_noise(folder / "images" / split, (number % classes for number in range(count)), class_names(classes))
    return convert_shards(folder / "images", folder / "shards", class_names(classes))


def make_hard_shards(folder: Path) -> Path:
    """Shards train/ and val/ of three kinds of noise that a tiny model tells apart now and then: 48 and 60 images."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 48, "val": 60}.items():
        for number in range(count):
            class_dir = folder / "images" / split / class_names(3)[number % 3]
            class_dir.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(128, 40, (SIDE, SIDE, 3)) + 12 * (np.arange(3) == number % 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(class_dir / f"{number:03d}.png")
    return convert_shards(folder / "images", folder / "shards", class_names(3))
