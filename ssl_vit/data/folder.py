"""A folder of images as it is found: its files, its splits, its classes."""

import os
from collections.abc import Iterator
from pathlib import Path

from ssl_vit.counter import key
from ssl_vit.exits import DATA, Refusal

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
OTHER_IMAGES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"}
LINK = "/"  # stands for the suffix of a link that is not followed: to a folder, or out of the input
SPLITS = {"train", "val", "valid", "validation", "test"}


def images(root: Path, follow_links: bool = False) -> tuple[list[str], list[str]]:
    """Relative paths of the images below a folder, and of what is left out: other formats, links not followed.

    Raises Refusal(DATA) where there are none, or a folder cannot be read.
    """
    files = list(_scan(root, follow_links))
    names = [name for name, suffix in files if suffix in SUFFIXES]
    others = [name for name, suffix in files if suffix in {*OTHER_IMAGES, LINK}]
    if not names:
        links = "; there are links, which follow_links=true follows" if any(s == LINK for _, s in files) else ""
        raise Refusal(DATA, f"{root}: no images (looked for {', '.join(sorted(SUFFIXES))} in it and below){links}")
    return names, others


def _scan(root: Path, follow_links: bool) -> Iterator[tuple[str, str]]:
    """Relative path and lower-case suffix of every file, sorted, and links; hidden ones are passed over."""
    if not root.is_dir():
        raise Refusal(DATA, f"{root}: no such folder")

    def unreadable(error: OSError) -> None:
        raise Refusal(DATA, f"{error.filename}: {error.strerror}")

    real = os.path.realpath(root)
    for folder, below, files in os.walk(root, onerror=unreadable, followlinks=follow_links):
        relative = Path(folder).relative_to(root)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in list(below):
            path = os.path.join(folder, name)
            if os.path.islink(path) and (not follow_links or _circles(path, root)):
                below.remove(name)
                yield (relative / name).as_posix(), LINK
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            out = not follow_links and os.path.islink(path) and not _inside(path, real)
            yield (relative / name).as_posix(), LINK if out else Path(name).suffix.lower()


def _circles(link: str, root: Path) -> bool:
    """Whether a link leads to a folder that it lies in, also by way of other links."""
    target, folder = os.path.realpath(link), Path(link).parent
    passed = [folder, *(above for above in folder.parents if above.is_relative_to(root))]
    return any(os.path.commonpath([target, os.path.realpath(above)]) == target for above in passed)


def _inside(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


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
    return hashed_splits(names, val_fraction)


def hashed_splits(names: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Split name -> files by a hash of each path, so that a file keeps its split when others come."""
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
