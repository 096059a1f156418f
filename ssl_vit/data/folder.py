"""A folder of images as it is found: its files, its splits, its classes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.counter import key
from ssl_vit.exits import DATA, Refusal

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
OTHER_IMAGES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"}
LINK = "/"  # stands for the suffix of a link to a folder, which is not followed: it may lead in a circle
SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Source:
    """One image file of the input."""

    path: str  # relative to the input, with forward slashes
    size: int
    changed: int  # modification time, ns
    label: int  # -1 = none


def images(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths of the images below a folder, and of what is left out: other formats, links to folders.

    Raises Refusal(DATA) where there are none, or a folder cannot be read.
    """
    files = list(_scan(root))
    names = [name for name, suffix in files if suffix in SUFFIXES]
    if not names:
        raise Refusal(DATA, f"{root}: no images (looked for {', '.join(sorted(SUFFIXES))} in it and below)")
    return names, [name for name, suffix in files if suffix in {*OTHER_IMAGES, LINK}]


def _scan(root: Path) -> Iterator[tuple[str, str]]:
    """Relative path and lower-case suffix of every file, sorted, and links to folders; hidden ones are passed over."""
    if not root.is_dir():
        raise Refusal(DATA, f"{root}: no such folder")

    def unreadable(error: OSError) -> None:
        raise Refusal(DATA, f"{error.filename}: {error.strerror}")

    for folder, below, files in os.walk(root, onerror=unreadable):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in below:
            if (Path(folder) / name).is_symlink():
                yield (Path(folder) / name).relative_to(root).as_posix(), LINK
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix(), Path(name).suffix.lower()


def splits(names: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Split name -> files: by folders named train, val, ... that stand at the top, else by a hash of the path."""
    tops = {name.split("/", 1)[0] for name in names if "/" in name}
    if "train" in tops and tops <= SPLITS and all("/" in name for name in names):
        if val_fraction:
            raise Refusal(DATA, f"the input has split folders ({', '.join(sorted(tops))}): leave val_fraction out")
        return {top: [name for name in names if name.startswith(top + "/")] for top in sorted(tops)}
    if "train" in tops and len(tops & SPLITS) > 1:
        strange = sorted(tops - SPLITS) or [next(name for name in names if "/" not in name)]
        raise Refusal(DATA, f"beside the split folders {', '.join(sorted(tops & SPLITS))} stands {strange[0]}; move it")
    if not val_fraction:
        return {"": names}
    limit = int(val_fraction * 2**64)
    chosen = {name: key("split", name) < limit for name in names}
    splits = {"train": [n for n in names if not chosen[n]], "val": [n for n in names if chosen[n]]}
    empty = [split for split, part in splits.items() if not part]
    if empty:
        raise Refusal(DATA, f"val_fraction={val_fraction} of {len(names)} images leaves {empty[0]} empty")
    return splits


def class_of(name: str, split: str) -> str:
    """An image's class: the folders between the split and the file; "" for a file in no folder."""
    inside = name[len(split) + 1 :] if split and name.startswith(split + "/") else name
    return inside.rpartition("/")[0]


def sources(root: Path, names: list[str], split: str, classes: list[str]) -> list[Source]:
    """The files of these names, in their order, with the number of their class (-1 = in no class folder)."""
    number = {name: i for i, name in enumerate(classes)}
    found = []
    for name in names:
        label = number.get(class_of(name, split), -1)
        try:
            stat = (root / name).stat()
            found.append(Source(name, stat.st_size, stat.st_mtime_ns, label))
        except OSError:  # a dead link: rejected when it is read
            found.append(Source(name, 0, 0, label))
    return found
