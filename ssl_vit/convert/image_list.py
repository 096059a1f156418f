"""Which images are converted and what their classes are: class folders, tables, class maps."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_vit.data import manifest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.rng import hash_key

TABLE_SUFFIXES = {".csv", ".parquet"}


@dataclass(frozen=True)
class Source:
    """One image file of the input."""

    path: str  # relative to the input's folder, with forward slashes, or absolute
    size: int
    changed: int  # modification time, ns
    label: int  # -1 = none


@dataclass(frozen=True)
class Listing:
    """The images of the input by split, and the class of each."""

    root: Path
    splits: dict[str, list[str]]
    class_of: dict[str, str]  # path -> class name, "" = none
    left_out: list[str]


def read_listing(path: Path, val_fraction: float, follow_links: bool = False) -> Listing:
    """List a folder or a table; raises ExitError(DATA) where there is nothing to convert."""
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return _read_table(path, val_fraction)
    names, left_out = list_images(path, follow_links)
    splits = find_splits(names, val_fraction)
    return Listing(path, splits, {n: class_of(n, s) for s, part in splits.items() for n in part}, left_out)


def _read_table(path: Path, val_fraction: float) -> Listing:
    classes, splits = {}, {}
    for number, row in enumerate(
        _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path), start=1
    ):
        name = row.get("path") or ""
        if not name:
            raise ExitError(ExitCode.DATA, f"{path}: row {number} has no path; the columns are path, label and split")
        if name in classes:
            raise ExitError(ExitCode.DATA, f"{path}: {name} is listed twice (again in row {number})")
        classes[name] = row.get("label") or ""
        splits.setdefault(row.get("split") or "", []).append(name)
    if not classes:
        raise ExitError(ExitCode.DATA, f"{path}: lists no images")
    if set(splits) == {""}:
        splits = hashed_splits(splits[""], val_fraction)
    elif val_fraction or not set(splits) <= SPLIT_NAMES:
        hint = "leave val_fraction out" if val_fraction else f"they are {', '.join(sorted(SPLIT_NAMES))}"
        raise ExitError(ExitCode.DATA, f"{path}: its column split names {', '.join(map(repr, sorted(splits)))}; {hint}")
    return Listing(path.parent, splits, classes, [])


def _read_csv(path: Path) -> Iterable[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExitError(ExitCode.DATA, f"{path}: not a CSV file in UTF-8 ({error})") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    has_header = "path" in header
    columns = header if has_header else ["path", "label", "split"]
    return [dict(zip(columns, (cell.strip() for cell in row), strict=False)) for row in rows[has_header:] if row]


def _read_parquet(path: Path) -> Iterable[dict[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ExitError(ExitCode.USAGE, f"{path}: pyarrow is not installed: pip install 'ssl_vit[parquet]'") from error
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise ExitError(ExitCode.DATA, f"{path}: not a Parquet file ({' '.join(str(error).split())[:200]})") from error
    columns = [name for name in ("path", "label", "split") if name in table.column_names]
    rows = table.select(columns).to_pylist()
    return [{name: _cell_text(value) for name, value in row.items()} for row in rows]


def _cell_text(value: Any) -> str:
    """The text of a value; whole numbers that became floats, as beside missing ones in pandas, are whole again."""
    if value is None or value != value:  # none, or not a number
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def number_classes(names: Iterable[str], class_map: str | None) -> tuple[list[str], dict[str, int]]:
    """The classes in their order, and the number of each name.

    Without a map they are sorted by name, or by value where all are numbers.

    Raises ExitError(DATA) where the map does not know a name.
    """
    unique_names = set(names) - {""}
    if class_map is None:
        as_numbers = all(name.isascii() and name.isdigit() for name in unique_names)
        classes = sorted(unique_names, key=lambda name: (int(name), name)) if as_numbers else sorted(unique_names)
        return classes, {name: number for number, name in enumerate(classes)}
    class_to_idx = read_class_map(class_map)
    unknown = sorted(unique_names - set(class_to_idx))
    if unknown:
        raise ExitError(
            ExitCode.DATA, f"class_map={class_map}: does not have {len(unknown)} of the classes (first: {unknown[0]})"
        )
    idx_to_class = {n: name for name, n in reversed(class_to_idx.items())}
    return [idx_to_class[n] for n in range(len(idx_to_class))], class_to_idx


def read_class_map(path: str) -> dict[str, int]:
    """Class name -> number from a text file (a name a line), JSON (names, or name -> number), or a folder of shards."""
    file = Path(path)
    if file.is_dir():
        return {name: number for number, name in enumerate(manifest.load(file).classes)}
    try:
        text = file.read_text(encoding="utf-8-sig")
        content: Any = json.loads(text) if file.suffix == ".json" else text.strip().splitlines()
    except (OSError, ValueError) as error:
        raise ExitError(ExitCode.DATA, f"class_map={path}: cannot be read ({error})") from error
    if isinstance(content, list):
        content = {str(name).strip(): number for number, name in enumerate(content)}
    values = list(content.values()) if isinstance(content, dict) else []
    is_contiguous = all(type(value) is int for value in values) and set(values) == set(range(len(set(values))))
    if not values or "" in content or not is_contiguous:
        raise ExitError(
            ExitCode.DATA, f"class_map={path}: give class names, or a JSON object of name -> number from 0 without gaps"
        )
    return {str(name): number for name, number in content.items()}


def list_sources(listing: Listing, names: list[str], class_to_idx: dict[str, int]) -> list[Source]:
    """The files of these names, in their order, with the number of their class (-1 = none)."""
    sources = []
    for name in names:
        label = class_to_idx.get(listing.class_of[name], -1)
        try:
            stat = (listing.root / name).stat()
            sources.append(Source(name, stat.st_size, stat.st_mtime_ns, label))
        except (OSError, ValueError):  # a dead link: rejected when it is read
            sources.append(Source(name, 0, 0, label))
    return sources


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
OTHER_IMAGE_SUFFIXES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm"}
LINK = "/"  # stands for the suffix of a link that is not followed: to a folder, or out of the input
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def list_images(root: Path, follow_links: bool = False) -> tuple[list[str], list[str]]:
    """Relative paths of the images below a folder, and of what is left out: other formats, links not followed.

    Raises ExitError(DATA) where there are none, or a folder cannot be read.
    """
    files = list(_walk_files(root, follow_links))
    names = [name for name, suffix in files if suffix in IMAGE_SUFFIXES]
    left_out = [name for name, suffix in files if suffix in {*OTHER_IMAGE_SUFFIXES, LINK}]
    if not names:
        links = "; there are links, which follow_links=true follows" if any(s == LINK for _, s in files) else ""
        raise ExitError(
            ExitCode.DATA, f"{root}: no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))} in it and below){links}"
        )
    return names, left_out


def _walk_files(root: Path, follow_links: bool) -> Iterator[tuple[str, str]]:
    """Relative path and lower-case suffix of every file, sorted, and links; hidden ones are passed over."""
    if not root.is_dir():
        raise ExitError(ExitCode.DATA, f"{root}: no such folder")

    def unreadable(error: OSError) -> None:
        raise ExitError(ExitCode.DATA, f"{error.filename}: {error.strerror}")

    real_root = os.path.realpath(root)
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=follow_links):
        relative = Path(folder).relative_to(root)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            path = os.path.join(folder, name)
            if os.path.islink(path) and (not follow_links or _is_circular(path, root)):
                subfolders.remove(name)
                yield (relative / name).as_posix(), LINK
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            is_outside = not follow_links and os.path.islink(path) and not _is_inside(path, real_root)
            yield (relative / name).as_posix(), LINK if is_outside else Path(name).suffix.lower()


def _is_circular(link: str, root: Path) -> bool:
    """Whether a link leads to a folder that it lies in, also by way of other links."""
    target, folder = os.path.realpath(link), Path(link).parent
    ancestors = [folder, *(ancestor for ancestor in folder.parents if ancestor.is_relative_to(root))]
    return any(os.path.commonpath([target, os.path.realpath(ancestor)]) == target for ancestor in ancestors)


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def find_splits(names: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Split name -> files: by folders named train, val, ... that stand at the top, else by a hash of the path."""
    tops = {name.split("/", 1)[0] for name in names if "/" in name}
    if "train" in tops and tops <= SPLIT_NAMES and all("/" in name for name in names):
        if val_fraction:
            raise ExitError(
                ExitCode.DATA, f"the input has split folders ({', '.join(sorted(tops))}): leave val_fraction out"
            )
        return {top: [name for name in names if name.startswith(top + "/")] for top in sorted(tops)}
    if "train" in tops and len(tops & SPLIT_NAMES) > 1:
        unexpected = sorted(tops - SPLIT_NAMES) or [next(name for name in names if "/" not in name)]
        raise ExitError(
            ExitCode.DATA,
            f"beside the split folders {', '.join(sorted(tops & SPLIT_NAMES))} stands {unexpected[0]}; move it",
        )
    return hashed_splits(names, val_fraction)


def hashed_splits(names: list[str], val_fraction: float) -> dict[str, list[str]]:
    """Split name -> files by a hash of each path, so that a file keeps its split when others come."""
    if not val_fraction:
        return {"": names}
    limit = int(val_fraction * 2**64)
    in_val = {name: hash_key("split", name) < limit for name in names}
    splits = {"train": [n for n in names if not in_val[n]], "val": [n for n in names if in_val[n]]}
    empty = [split for split, part in splits.items() if not part]
    if empty:
        raise ExitError(ExitCode.DATA, f"val_fraction={val_fraction} of {len(names)} images leaves {empty[0]} empty")
    return splits


def class_of(name: str, split: str) -> str:
    """An image's class: the folders between the split and the file; "" for a file in no folder."""
    relative = name[len(split) + 1 :] if split and name.startswith(split + "/") else name
    return relative.rpartition("/")[0]
