"""What is to be converted: a folder of images, or a table of them (CSV, Parquet) with columns path, label and split."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_vit.data import folder, manifest
from ssl_vit.exits import DATA, USAGE, Refusal

TABLES = {".csv", ".parquet"}


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


def read(path: Path, val_fraction: float, follow_links: bool = False) -> Listing:
    """List a folder or a table; raises Refusal(DATA) where there is nothing to convert."""
    if path.suffix.lower() in TABLES and path.is_file():
        return _of_table(path, val_fraction)
    names, others = folder.images(path, follow_links)
    splits = folder.splits(names, val_fraction)
    return Listing(path, splits, {n: folder.class_of(n, s) for s, part in splits.items() for n in part}, others)


def _of_table(path: Path, val_fraction: float) -> Listing:
    classes, splits = {}, {}
    for number, row in enumerate(_parquet(path) if path.suffix.lower() == ".parquet" else _csv(path), start=1):
        name = row.get("path") or ""
        if not name:
            raise Refusal(DATA, f"{path}: row {number} has no path; the columns are path, label and split")
        if name in classes:
            raise Refusal(DATA, f"{path}: {name} is listed twice (again in row {number})")
        classes[name] = row.get("label") or ""
        splits.setdefault(row.get("split") or "", []).append(name)
    if not classes:
        raise Refusal(DATA, f"{path}: lists no images")
    if set(splits) == {""}:
        splits = folder.hashed_splits(splits[""], val_fraction)
    elif val_fraction or not set(splits) <= folder.SPLITS:
        why = "leave val_fraction out" if val_fraction else f"they are {', '.join(sorted(folder.SPLITS))}"
        raise Refusal(DATA, f"{path}: its column split names {', '.join(map(repr, sorted(splits)))}; {why}")
    return Listing(path.parent, splits, classes, [])


def _csv(path: Path) -> Iterable[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refusal(DATA, f"{path}: not a CSV file in UTF-8 ({error})") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    named = "path" in header
    columns = header if named else ["path", "label", "split"]
    return [dict(zip(columns, (cell.strip() for cell in row), strict=False)) for row in rows[named:] if row]


def _parquet(path: Path) -> Iterable[dict[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise Refusal(USAGE, f"{path}: pyarrow is not installed: pip install 'ssl_vit[parquet]'") from error
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise Refusal(DATA, f"{path}: not a Parquet file ({' '.join(str(error).split())[:200]})") from error
    columns = [name for name in ("path", "label", "split") if name in table.column_names]
    rows = table.select(columns).to_pylist()
    return [{name: _cell(value) for name, value in row.items()} for row in rows]


def _cell(value: Any) -> str:
    """The text of a value; whole numbers that became floats, as beside missing ones in pandas, are whole again."""
    if value is None or value != value:  # none, or not a number
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def numbers(names: Iterable[str], class_map: str | None) -> tuple[list[str], dict[str, int]]:
    """The classes in their order, and the number of each name.

    Without a map they are sorted by name, or by value where all are numbers.

    Raises Refusal(DATA) where the map does not know a name.
    """
    found = set(names) - {""}
    if class_map is None:
        as_numbers = all(name.isascii() and name.isdigit() for name in found)
        classes = sorted(found, key=lambda name: (int(name), name)) if as_numbers else sorted(found)
        return classes, {name: number for number, name in enumerate(classes)}
    number = read_map(class_map)
    strange = sorted(found - set(number))
    if strange:
        raise Refusal(DATA, f"class_map={class_map}: does not have {len(strange)} of the classes (first: {strange[0]})")
    first = {n: name for name, n in reversed(number.items())}
    return [first[n] for n in range(len(first))], number


def read_map(path: str) -> dict[str, int]:
    """Class name -> number from a text file (a name a line), JSON (names, or name -> number), or a folder of shards."""
    file = Path(path)
    if file.is_dir():
        return {name: number for number, name in enumerate(manifest.load(file).classes)}
    try:
        text = file.read_text(encoding="utf-8-sig")
        content: Any = json.loads(text) if file.suffix == ".json" else text.strip().splitlines()
    except (OSError, ValueError) as error:
        raise Refusal(DATA, f"class_map={path}: cannot be read ({error})") from error
    if isinstance(content, list):
        content = {str(name).strip(): number for number, name in enumerate(content)}
    values = list(content.values()) if isinstance(content, dict) else []
    counted = all(type(value) is int for value in values) and set(values) == set(range(len(set(values))))
    if not values or "" in content or not counted:
        raise Refusal(
            DATA, f"class_map={path}: give class names, or a JSON object of name -> number from 0 without gaps"
        )
    return {str(name): number for name, number in content.items()}


def sources(listing: Listing, names: list[str], number: dict[str, int]) -> list[Source]:
    """The files of these names, in their order, with the number of their class (-1 = none)."""
    found = []
    for name in names:
        label = number.get(listing.class_of[name], -1)
        try:
            stat = (listing.root / name).stat()
            found.append(Source(name, stat.st_size, stat.st_mtime_ns, label))
        except (OSError, ValueError):  # a dead link: rejected when it is read
            found.append(Source(name, 0, 0, label))
    return found
