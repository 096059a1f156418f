"""Index the shards of others, and verify those that are there."""

import hashlib
import io
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from ssl_vit.config import Config
from ssl_vit.convert import image_list
from ssl_vit.convert.output import Target, destination
from ssl_vit.convert.worker_pool import do
from ssl_vit.data import decode, manifest, remote
from ssl_vit.data.cache import Store
from ssl_vit.data.dataset import printable
from ssl_vit.data.decode import BadImage
from ssl_vit.data.manifest import ENTRY, FILE, Manifest, Shard, name_of_index
from ssl_vit.data.tar import IMAGES, Damage, Member, cut, find, walk
from ssl_vit.errors import CANNOT_CREATE, DATA, USAGE, Refusal

LABELS = ("label", "cls", "class", "target")  # JSON fields that are looked at, in this order
REJECTS = "rejects.jsonl"
TEXT = 1 << 20  # bytes of a cls or json member that are read
SHOWN = 200  # characters of a name in a report

Class = int | str | None
Row = tuple[int, int, Class, int]
"""Offset, size, class and crc32 of a sample."""


class IndexShards(Config):
    """Index WebDataset shards that others wrote."""

    shards: str = Field(description="folder or URL of tars, or a pattern such as s3://bucket/{000000..000999}.tar")
    output: str | None = Field(
        default=None, description="folder or URL for manifest and indexes (none: beside the shards)"
    )
    class_map: str | None = Field(
        default=None,
        description="the classes and their numbers: .txt (a name a line), .json (names, or name -> number), or shards",
    )
    label_key: str | None = Field(
        default=None, description=f"JSON field that holds the class (none: cls, else the first of {', '.join(LABELS)})"
    )
    full: bool = Field(default=False, description="decode every image, instead of reading its header")
    workers: int | None = Field(default=None, ge=1, description="processes (none: one a core)")
    quiet: bool = Field(default=False, description="no progress bar")


@dataclass
class Scan:
    """What one tar holds."""

    name: str
    bytes: int
    sha256: str
    rows: list[Row]
    rejects: list[dict[str, str]]  # what could be a sample and is none
    ignored: Counter[str]  # suffixes of members that are not read


def index(options: IndexShards) -> Manifest:
    """Write the manifest of foreign shards, and an index for each; raises Refusal(DATA) where there is no sample."""
    root, names = find(options.shards)
    target = _target(options, root)
    target.prepare()
    old = _replaced(target, names)
    scans: dict[str, Scan] = {}
    bar = tqdm(total=len(names), unit="shard", desc=options.shards, disable=options.quiet or None)
    count = options.workers or len(os.sched_getaffinity(0))
    with bar:
        for name, scan in do(names, count, scan_at, lambda name: (root, name, options.label_key, options.full)):
            scans[name] = scan
            bar.update()
    made = _publish([scans[name] for name in names], root, target, options)
    kept = {shard.index for shard in made.shards} | ({REJECTS} if made.job["rejects"] else set())
    for name in old - kept:
        target.remove(name)
    report(made, [scans[name] for name in names], target)
    return made


def _replaced(target: Target, names: list[str]) -> set[str]:
    """The files of an earlier scan in the output; raises Refusal(CANNOT_CREATE) where it holds something else."""
    text, ours = target.read(FILE), {REJECTS}
    if text is not None:
        found = manifest.read(text, f"{target.name}/{FILE}", target.folder)
        if "scan" not in found.job:
            raise Refusal(CANNOT_CREATE, f"{target.name}: has a {FILE} of make_shards; name another output")
        ours |= {shard.index for shard in found.shards}
    for name in map(name_of_index, names):
        if name not in ours and (data := target.read(name)) is not None and not _is_index(data):
            raise Refusal(CANNOT_CREATE, f"{target.name}/{name}: is in the way of an index; name another output")
    return ours


def _is_index(data: bytes) -> bool:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False).dtype == ENTRY
    except (ValueError, EOFError, OSError):
        return False


def _target(options: IndexShards, root: str) -> Target:
    output = options.output or root
    if remote.is_url(output) and output.startswith("http"):
        raise Refusal(USAGE, f"{output}: cannot be written to; give output=FOLDER")
    return destination(output)


def scan_at(root: str, name: str, label_key: str | None, full: bool) -> Scan:
    """Scan one tar, which is fetched first where it is remote."""
    where = f"{root}/{name}"
    if printable(name) != name:
        said = "its name has letters that a manifest cannot hold; rename it"
        return Scan(name, 0, "", [], [{"shard": printable(name), "key": "", "reason": said}], Counter())
    try:
        if not remote.is_url(where):
            return scan(Path(where), name, label_key, full)
        with tempfile.TemporaryDirectory() as folder:
            remote.get(where, Path(folder) / "shard.tar")
            return scan(Path(folder) / "shard.tar", name, label_key, full)
    except (OSError, remote.BadSource) as error:
        why = getattr(error, "strerror", None) or str(error)
        return Scan(name, 0, "", [], [{"shard": name, "key": "", "reason": f"cannot be read: {why}"}], Counter())


def scan(path: Path, name: str, label_key: str | None = None, full: bool = False) -> Scan:
    """Every sample of a tar with its class and checksum, and what is none with the reason."""
    if not path.is_file():
        raise FileNotFoundError(2, "not a regular file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = Scan(name, os.fstat(file.fileno()).st_size, digest, [], [], Counter())

        def reject(key: str, reason: str) -> None:
            shown = printable(key)[:SHOWN]
            found.rejects.append({"shard": name, "key": shown, "reason": reason})

        members = []
        for item in walk(path):
            if isinstance(item, Damage):
                reject("", f"at byte {item.offset}: {printable(item.reason)[:SHOWN]}")
            else:
                members.append(item)
        damaged = bool(found.rejects)
        rows: list[tuple[str, Row]] = []
        for stem, parts in _samples(members, found.ignored):
            try:
                rows.append((stem, _row(file.fileno(), parts, label_key, full)))
            except BadImage as error:
                reject(stem, str(error))
        labelled = any(row[2] is not None for _, row in rows)
        for stem, row in rows:
            if damaged and labelled and row[2] is None:
                reject(stem, "its class was lost to the damage")
            else:
                found.rows.append(row)
    return found


def _samples(members: list[Member], ignored: Counter[str]) -> Iterator[tuple[str, dict[str, list[Member]]]]:
    """Key and members by suffix (image, cls, json) of every sample, in the order of their first members."""
    keys = [cut(member.name, first=True) for member in members]
    if not any(suffix in IMAGES for _, suffix in keys):
        keys = [cut(member.name, first=False) for member in members]
    samples: dict[str, dict[str, list[Member]]] = {}
    for (stem, suffix), member in zip(keys, members, strict=True):
        kind = "image" if suffix in IMAGES else suffix
        if kind in ("image", "cls", "json"):
            samples.setdefault(stem, {}).setdefault(kind, []).append(member)
        else:
            ignored[printable(suffix[:32]) or "(no suffix)"] += 1
    yield from samples.items()


def _row(handle: int, parts: dict[str, list[Member]], label_key: str | None, full: bool) -> Row:
    doubled = [kind for kind, members in parts.items() if len(members) > 1]
    if doubled:
        raise BadImage(f"{len(parts[doubled[0]])} members are its {doubled[0]}: the key is not unique")
    if "image" not in parts:
        raise BadImage("has no image")
    (image,) = parts["image"]
    if image.size > decode.MAX_BYTES:
        raise BadImage(f"its image has {image.size} bytes, over the limit of {decode.MAX_BYTES}")
    data = os.pread(handle, image.size, image.offset)
    decode.decode(data) if full else decode.open_image(data)
    return image.offset, image.size, _class(handle, parts, label_key), zlib.crc32(data)


def _class(handle: int, parts: dict[str, list[Member]], label_key: str | None) -> Class:
    """A sample's class, a number or a name; raises BadImage where it says one that cannot be read."""
    text = {
        kind: os.pread(handle, min(TEXT, parts[kind][0].size), parts[kind][0].offset)
        for kind in ("cls", "json")
        if kind in parts
    }
    if "cls" in text and label_key is None:
        said: Any = text["cls"].decode("utf-8", "replace").strip()
    else:
        try:
            fields = json.loads(text.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise BadImage("its json cannot be read") from error
        fields = fields if isinstance(fields, dict) else {}
        said = next((fields[name] for name in ([label_key] if label_key else LABELS) if name in fields), None)
    if said is None or said == "" or said == -1 or said == "-1":
        return None
    if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 1 << 31:
        return said
    if isinstance(said, str) and len(said) <= SHOWN:
        return int(said) if said.isascii() and said.isdigit() and len(said) < 10 else said
    raise BadImage(f"its class is {str(said)[:SHOWN]!r}, neither a number nor a name")


def _publish(scans: list[Scan], root: str, target: Target, options: IndexShards) -> Manifest:
    if options.class_map is None:
        _reject_few(scans)
    classes, number = classes_of({row[2] for scan in scans for row in scan.rows} - {None}, options.class_map)
    shards = []
    for scan in scans:
        if not scan.rows:
            continue
        rows = [(offset, size, number[label], crc) for offset, size, label, crc in scan.rows]
        buffer = io.BytesIO()
        np.save(buffer, np.array(rows, dtype=ENTRY), allow_pickle=False)
        data = buffer.getvalue()
        target.write(name_of_index(scan.name), data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(
            Shard(name=scan.name, samples=len(rows), bytes=scan.bytes, sha256=scan.sha256, index_sha256=digest)
        )
    rejects = [reject for scan in scans for reject in scan.rejects]
    if rejects:
        target.write(REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    if not shards:
        why = f"{rejects[0]['shard']}: {rejects[0]['key']} {rejects[0]['reason']}" if rejects else "no images"
        raise Refusal(DATA, f"{options.shards}: not one sample can be used (first: {why})")
    beside = options.output is None or target.name == root
    at = None if beside else root if remote.is_url(root) else str(Path(root).resolve())
    tars = None if at is None else Store().of(at) if remote.is_url(at) else Path(at)
    indexes = Store().of(target.url) if target.url else None
    job = {"scan": options.shards, "full": options.full, "rejects": len(rejects)}
    made = Manifest(target.folder, job, classes, shards, indexes=indexes, tars=tars, at=at)
    target.write(FILE, manifest.encode(made))
    return made


def _reject_few(scans: list[Scan]) -> None:
    """Reject the samples whose class is a name among numbers: a damaged byte must not make names of all numbers."""
    said = Counter(type(row[2]) for scan in scans for row in scan.rows)
    if not 4 * said[str] < said[int]:  # then names are meant
        return
    for scan in scans:
        for offset, _, label, _ in scan.rows:
            if isinstance(label, str):
                reason = f"its class {printable(label)[:SHOWN]!r} is a name, those of others are numbers"
                scan.rejects.append({"shard": scan.name, "key": f"at byte {offset}", "reason": reason})
        scan.rows = [row for row in scan.rows if not isinstance(row[2], str)]


def classes_of(said: set[Any], class_map: str | None) -> tuple[list[str], dict[Class, int]]:
    """The classes, and the number of each that was said: numbers stand for themselves, names are sorted or mapped."""
    if class_map is not None:
        classes, mapped = (
            image_list.numbers(map(str, said), class_map) if not _numeric(said) else _mapped(said, class_map)
        )
        return classes, {label: mapped[str(label)] for label in said} | {None: -1}
    if _numeric(said):
        most = max(said, default=-1)
        if most >= MOST_CLASSES:
            raise Refusal(DATA, f"class {most} was found: numbers of classes count from 0; give class_map=")
        return [str(number) for number in range(most + 1)], {number: number for number in said} | {None: -1}
    classes, number = image_list.numbers(map(str, said), None)
    return classes, {label: number[str(label)] for label in said} | {None: -1}


MOST_CLASSES = 1_000_000


def _numeric(said: set[Any]) -> bool:
    return all(isinstance(label, int) for label in said)


def _mapped(said: set[int], class_map: str) -> tuple[list[str], dict[str, int]]:
    """A map that names what numbers mean."""
    number = image_list.read_map(class_map)
    if {str(label) for label in said} <= set(number):
        return image_list.numbers(map(str, said), class_map)
    classes = image_list.numbers([], class_map)[0]
    strange = sorted(label for label in said if label >= len(classes))
    if strange:
        raise Refusal(DATA, f"class_map={class_map}: has {len(classes)} classes, the shards have number {strange[0]}")
    return classes, {str(label): label for label in said}


def report(made: Manifest, scans: list[Scan], target: Target) -> None:
    """Say what can be used and what cannot, shard by shard where anything was lost."""
    bad = [scan for scan in scans if scan.rejects]
    for scan in bad[:20]:
        reasons = Counter(reject["reason"] for reject in scan.rejects)
        said = "; ".join(f"{reason} ({count})" if count > 1 else reason for reason, count in reasons.most_common(3))
        samples = len(scan.rows) + sum(bool(reject["key"]) for reject in scan.rejects)
        print(f"{printable(scan.name)}: {len(scan.rows)} of {samples} samples can be used: {said}")
    if len(bad) > 20:
        print(f"... and {len(bad) - 20} more shards")
    ignored = sum((scan.ignored for scan in scans), Counter())
    if ignored:
        print("not read: " + ", ".join(f"{count} .{suffix}" for suffix, count in ignored.most_common(8)))
    none = sum(int((made.index(shard)["label"] < 0).sum()) for shard in range(len(made.shards)) if not target.url)
    labels = f", {none} without a class" if made.classes and none else ""
    lost = f", {made.job['rejects']} faults (see {target.name}/{REJECTS})" if bad else ""
    print(
        f"{target.name}: {made.samples} samples{labels}, {len(made.classes)} classes, {len(made.shards)} shards{lost}"
    )


class VerifyShards(Config):
    """Compare shards with their manifest."""

    shards: tuple[str, ...] = Field(description="folder or URL of shards, or several with commas; splits are all taken")
    full: bool = Field(default=False, description="compare every sha256, which reads all bytes; else sizes only")
    workers: int | None = Field(default=None, ge=1, description="processes (none: one a core)")
    quiet: bool = Field(default=False, description="no progress bar")


@dataclass
class Found:
    """What is left of one shard."""

    shard: str
    samples: int
    readable: int
    fault: str | None  # none: it is whole


def verify(options: VerifyShards) -> list[Found]:
    """Every shard's state, in order; raises Refusal(DATA) where there is no manifest."""
    found = []
    for made in manifest.every(options.shards):
        known = made.faults()
        suspects = [number for number in range(len(made.shards)) if options.full or number in known]
        states = {n: Found(made.where(n), shard.samples, shard.samples, None) for n, shard in enumerate(made.shards)}
        bar = tqdm(total=len(states), unit="shard", desc=made.name, disable=options.quiet or None)
        with bar:
            bar.update(len(states) - len(suspects))
            count = options.workers or len(os.sched_getaffinity(0))
            for number, state in do(
                suspects, count, look, lambda n, m=made, k=known: (replace(m, shards=[m.shards[n]]), k.get(n))
            ):
                states[number] = state
                bar.update()
        found += states.values()
    return found


def look(made: Manifest, known: str | None) -> Found:
    """The state of a manifest's one shard, whose fault is `known` or told by its digests.

    Where there is a fault, every sample is read.
    """
    samples = made.shards[0].samples
    fault = known or made.altered(0)
    return Found(made.where(0), samples, readable(made, 0) if fault else samples, fault)


def readable(made: Manifest, number: int) -> int:
    """How many samples of a shard have the bytes that the index promises."""
    try:
        rows = made.index(number)
        handle = os.open(made.tar(number), os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, remote.BadSource):
        return 0
    except Refusal as error:
        if error.code != DATA:
            raise
        return 0
    try:
        return sum(_whole(handle, row) for row in rows)
    finally:
        os.close(handle)


def _whole(handle: int, row: np.void) -> bool:
    try:
        data = os.pread(handle, int(row["size"]), int(row["offset"]))
    except OSError:
        return False
    return len(data) == row["size"] and zlib.crc32(data) == row["crc32"]
