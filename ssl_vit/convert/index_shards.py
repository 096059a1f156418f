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
from ssl_vit.convert.output import Target, resolve_target
from ssl_vit.convert.worker_pool import run_resilient
from ssl_vit.data import decode, manifest, remote
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.dataset import printable
from ssl_vit.data.decode import BadImage
from ssl_vit.data.manifest import ENTRY, MANIFEST_FILE, Manifest, Shard, index_name
from ssl_vit.data.tar import IMAGE_SUFFIXES, Damage, Member, find_shards, iter_members, split_key
from ssl_vit.errors import ExitCode, ExitError

LABEL_KEYS = ("label", "cls", "class", "target")  # JSON fields that are looked at, in this order
REJECTS = "rejects.jsonl"
MAX_TEXT_BYTES = 1 << 20  # bytes of a cls or json member that are read
MAX_NAME_CHARS = 200  # characters of a name in a report

Label = int | str | None
Row = tuple[int, int, Label, int]
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
        default=None,
        description=f"JSON field that holds the class (none: cls, else the first of {', '.join(LABEL_KEYS)})",
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


def index_tars(options: IndexShards) -> Manifest:
    """Write the manifest of foreign shards, and an index for each; raises ExitError(DATA) where there is no sample."""
    root, names = find_shards(options.shards)
    target = _resolve_output(options, root)
    target.prepare()
    previous_files = _previous_files(target, names)
    scans: dict[str, Scan] = {}
    bar = tqdm(total=len(names), unit="shard", desc=options.shards, disable=options.quiet or None)
    count = options.workers or len(os.sched_getaffinity(0))
    with bar:
        for name, scan in run_resilient(
            names, count, fetch_and_scan, lambda name: (root, name, options.label_key, options.full)
        ):
            scans[name] = scan
            bar.update()
    dataset = _publish([scans[name] for name in names], root, target, options)
    current_files = {shard.index for shard in dataset.shards} | ({REJECTS} if dataset.job["rejects"] else set())
    for name in previous_files - current_files:
        target.remove(name)
    print_report(dataset, [scans[name] for name in names], target)
    return dataset


def _previous_files(target: Target, names: list[str]) -> set[str]:
    """The files of an earlier scan in the output; raises ExitError(CANNOT_CREATE) where it holds something else."""
    text, files = target.read(MANIFEST_FILE), {REJECTS}
    if text is not None:
        previous = manifest.parse_manifest(text, f"{target.name}/{MANIFEST_FILE}", target.folder)
        if "scan" not in previous.job:
            raise ExitError(
                ExitCode.CANNOT_CREATE, f"{target.name}: has a {MANIFEST_FILE} of make_shards; name another output"
            )
        files |= {shard.index for shard in previous.shards}
    for name in map(index_name, names):
        if name not in files and (data := target.read(name)) is not None and not _is_index(data):
            raise ExitError(
                ExitCode.CANNOT_CREATE, f"{target.name}/{name}: is in the way of an index; name another output"
            )
    return files


def _is_index(data: bytes) -> bool:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False).dtype == ENTRY
    except (ValueError, EOFError, OSError):
        return False


def _resolve_output(options: IndexShards, root: str) -> Target:
    output = options.output or root
    if remote.is_url(output) and output.startswith("http"):
        raise ExitError(ExitCode.USAGE, f"{output}: cannot be written to; give output=FOLDER")
    return resolve_target(output)


def fetch_and_scan(root: str, name: str, label_key: str | None, full: bool) -> Scan:
    """Scan one tar, which is fetched first where it is remote."""
    path = f"{root}/{name}"
    if printable(name) != name:
        reason = "its name has letters that a manifest cannot hold; rename it"
        return Scan(name, 0, "", [], [{"shard": printable(name), "key": "", "reason": reason}], Counter())
    try:
        if not remote.is_url(path):
            return scan_tar(Path(path), name, label_key, full)
        with tempfile.TemporaryDirectory() as folder:
            remote.download(path, Path(folder) / "shard.tar")
            return scan_tar(Path(folder) / "shard.tar", name, label_key, full)
    except (OSError, remote.RemoteMismatch) as error:
        message = getattr(error, "strerror", None) or str(error)
        return Scan(name, 0, "", [], [{"shard": name, "key": "", "reason": f"cannot be read: {message}"}], Counter())


def scan_tar(path: Path, name: str, label_key: str | None = None, full: bool = False) -> Scan:
    """Every sample of a tar with its class and checksum, and what is none with the reason."""
    if not path.is_file():
        raise FileNotFoundError(2, "not a regular file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        result = Scan(name, os.fstat(file.fileno()).st_size, digest, [], [], Counter())

        def reject(key: str, reason: str) -> None:
            short_key = printable(key)[:MAX_NAME_CHARS]
            result.rejects.append({"shard": name, "key": short_key, "reason": reason})

        members = []
        for item in iter_members(path):
            if isinstance(item, Damage):
                reject("", f"at byte {item.offset}: {printable(item.reason)[:MAX_NAME_CHARS]}")
            else:
                members.append(item)
        damaged = bool(result.rejects)
        rows: list[tuple[str, Row]] = []
        for stem, parts in _group_by_key(members, result.ignored):
            try:
                rows.append((stem, _row(file.fileno(), parts, label_key, full)))
            except BadImage as error:
                reject(stem, str(error))
        labeled = any(row[2] is not None for _, row in rows)
        for stem, row in rows:
            if damaged and labeled and row[2] is None:
                reject(stem, "its class was lost to the damage")
            else:
                result.rows.append(row)
    return result


def _group_by_key(members: list[Member], ignored: Counter[str]) -> Iterator[tuple[str, dict[str, list[Member]]]]:
    """Key and members by suffix (image, cls, json) of every sample, in the order of their first members."""
    keys = [split_key(member.name, first=True) for member in members]
    if not any(suffix in IMAGE_SUFFIXES for _, suffix in keys):
        keys = [split_key(member.name, first=False) for member in members]
    samples: dict[str, dict[str, list[Member]]] = {}
    for (stem, suffix), member in zip(keys, members, strict=True):
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind in ("image", "cls", "json"):
            samples.setdefault(stem, {}).setdefault(kind, []).append(member)
        else:
            ignored[printable(suffix[:32]) or "(no suffix)"] += 1
    yield from samples.items()


def _row(handle: int, parts: dict[str, list[Member]], label_key: str | None, full: bool) -> Row:
    duplicates = [kind for kind, members in parts.items() if len(members) > 1]
    if duplicates:
        raise BadImage(f"{len(parts[duplicates[0]])} members are its {duplicates[0]}: the key is not unique")
    if "image" not in parts:
        raise BadImage("has no image")
    (image,) = parts["image"]
    if image.size > decode.MAX_BYTES:
        raise BadImage(f"its image has {image.size} bytes, over the limit of {decode.MAX_BYTES}")
    data = os.pread(handle, image.size, image.offset)
    decode.decode_image(data) if full else decode.open_image(data)
    return image.offset, image.size, _read_label(handle, parts, label_key), zlib.crc32(data)


def _read_label(handle: int, parts: dict[str, list[Member]], label_key: str | None) -> Label:
    """A sample's class, a number or a name; raises BadImage where it says one that cannot be read."""
    texts = {
        kind: os.pread(handle, min(MAX_TEXT_BYTES, parts[kind][0].size), parts[kind][0].offset)
        for kind in ("cls", "json")
        if kind in parts
    }
    if "cls" in texts and label_key is None:
        label: Any = texts["cls"].decode("utf-8", "replace").strip()
    else:
        try:
            fields = json.loads(texts.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            raise BadImage("its json cannot be read") from error
        fields = fields if isinstance(fields, dict) else {}
        label = next((fields[name] for name in ([label_key] if label_key else LABEL_KEYS) if name in fields), None)
    if label is None or label == "" or label == -1 or label == "-1":
        return None
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 1 << 31:
        return label
    if isinstance(label, str) and len(label) <= MAX_NAME_CHARS:
        return int(label) if label.isascii() and label.isdigit() and len(label) < 10 else label
    raise BadImage(f"its class is {str(label)[:MAX_NAME_CHARS]!r}, neither a number nor a name")


def _publish(scans: list[Scan], root: str, target: Target, options: IndexShards) -> Manifest:
    if options.class_map is None:
        _reject_minority_names(scans)
    classes, class_to_idx = resolve_classes({row[2] for scan in scans for row in scan.rows} - {None}, options.class_map)
    shards = []
    for scan in scans:
        if not scan.rows:
            continue
        rows = [(offset, size, class_to_idx[label], crc) for offset, size, label, crc in scan.rows]
        buffer = io.BytesIO()
        np.save(buffer, np.array(rows, dtype=ENTRY), allow_pickle=False)
        data = buffer.getvalue()
        target.write(index_name(scan.name), data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(
            Shard(name=scan.name, samples=len(rows), bytes=scan.bytes, sha256=scan.sha256, index_sha256=digest)
        )
    rejects = [reject for scan in scans for reject in scan.rejects]
    if rejects:
        target.write(REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    if not shards:
        reason = f"{rejects[0]['shard']}: {rejects[0]['key']} {rejects[0]['reason']}" if rejects else "no images"
        raise ExitError(ExitCode.DATA, f"{options.shards}: not one sample can be used (first: {reason})")
    in_place = options.output is None or target.name == root
    tar_root = None if in_place else root if remote.is_url(root) else str(Path(root).resolve())
    tars = None if tar_root is None else CacheDir().cache_for(tar_root) if remote.is_url(tar_root) else Path(tar_root)
    indexes = CacheDir().cache_for(target.url) if target.url else None
    job = {"scan": options.shards, "full": options.full, "rejects": len(rejects)}
    dataset = Manifest(target.folder, job, classes, shards, indexes=indexes, tars=tars, at=tar_root)
    target.write(MANIFEST_FILE, manifest.encode_manifest(dataset))
    return dataset


def _reject_minority_names(scans: list[Scan]) -> None:
    """Reject the samples whose class is a name among numbers: a damaged byte must not make names of all numbers."""
    type_counts = Counter(type(row[2]) for scan in scans for row in scan.rows)
    if not 4 * type_counts[str] < type_counts[int]:  # then names are meant
        return
    for scan in scans:
        for offset, _, label, _ in scan.rows:
            if isinstance(label, str):
                reason = f"its class {printable(label)[:MAX_NAME_CHARS]!r} is a name, those of others are numbers"
                scan.rejects.append({"shard": scan.name, "key": f"at byte {offset}", "reason": reason})
        scan.rows = [row for row in scan.rows if not isinstance(row[2], str)]


def resolve_classes(labels: set[Any], class_map: str | None) -> tuple[list[str], dict[Label, int]]:
    """The classes, and the number of each that was said: numbers stand for themselves, names are sorted or mapped."""
    if class_map is not None:
        classes, name_to_idx = (
            image_list.number_classes(map(str, labels), class_map)
            if not _all_numeric(labels)
            else _map_numeric(labels, class_map)
        )
        return classes, {label: name_to_idx[str(label)] for label in labels} | {None: -1}
    if _all_numeric(labels):
        max_label = max(labels, default=-1)
        if max_label >= MOST_CLASSES:
            raise ExitError(
                ExitCode.DATA, f"class {max_label} was found: numbers of classes count from 0; give class_map="
            )
        return [str(number) for number in range(max_label + 1)], {number: number for number in labels} | {None: -1}
    classes, class_to_idx = image_list.number_classes(map(str, labels), None)
    return classes, {label: class_to_idx[str(label)] for label in labels} | {None: -1}


MOST_CLASSES = 1_000_000


def _all_numeric(labels: set[Any]) -> bool:
    return all(isinstance(label, int) for label in labels)


def _map_numeric(labels: set[int], class_map: str) -> tuple[list[str], dict[str, int]]:
    """A map that names what numbers mean."""
    class_to_idx = image_list.read_class_map(class_map)
    if {str(label) for label in labels} <= set(class_to_idx):
        return image_list.number_classes(map(str, labels), class_map)
    classes = image_list.number_classes([], class_map)[0]
    out_of_range = sorted(label for label in labels if label >= len(classes))
    if out_of_range:
        raise ExitError(
            ExitCode.DATA,
            f"class_map={class_map}: has {len(classes)} classes, the shards have number {out_of_range[0]}",
        )
    return classes, {str(label): label for label in labels}


def print_report(dataset: Manifest, scans: list[Scan], target: Target) -> None:
    """Say what can be used and what cannot, shard by shard where anything was lost."""
    bad = [scan for scan in scans if scan.rejects]
    for scan in bad[:20]:
        reasons = Counter(reject["reason"] for reject in scan.rejects)
        summary = "; ".join(f"{reason} ({count})" if count > 1 else reason for reason, count in reasons.most_common(3))
        samples = len(scan.rows) + sum(bool(reject["key"]) for reject in scan.rejects)
        print(f"{printable(scan.name)}: {len(scan.rows)} of {samples} samples can be used: {summary}")
    if len(bad) > 20:
        print(f"... and {len(bad) - 20} more shards")
    ignored = sum((scan.ignored for scan in scans), Counter())
    if ignored:
        print("not read: " + ", ".join(f"{count} .{suffix}" for suffix, count in ignored.most_common(8)))
    num_unlabeled = sum(
        int((dataset.index(shard)["label"] < 0).sum()) for shard in range(len(dataset.shards)) if not target.url
    )
    labels_text = f", {num_unlabeled} without a class" if dataset.classes and num_unlabeled else ""
    faults_text = f", {dataset.job['rejects']} faults (see {target.name}/{REJECTS})" if bad else ""
    print(
        f"{target.name}: {dataset.samples} samples{labels_text}, {len(dataset.classes)} classes, "
        f"{len(dataset.shards)} shards{faults_text}"
    )


class VerifyShards(Config):
    """Compare shards with their manifest."""

    shards: tuple[str, ...] = Field(description="folder or URL of shards, or several with commas; splits are all taken")
    full: bool = Field(default=False, description="compare every sha256, which reads all bytes; else sizes only")
    workers: int | None = Field(default=None, ge=1, description="processes (none: one a core)")
    quiet: bool = Field(default=False, description="no progress bar")


@dataclass
class ShardStatus:
    """What is left of one shard."""

    shard: str
    samples: int
    readable: int
    fault: str | None  # none: it is whole


def verify_all_shards(options: VerifyShards) -> list[ShardStatus]:
    """Every shard's state, in order; raises ExitError(DATA) where there is no manifest."""
    statuses = []
    for dataset in manifest.load_splits(options.shards):
        faults = dataset.faults()
        to_verify = [number for number in range(len(dataset.shards)) if options.full or number in faults]
        states = {
            n: ShardStatus(dataset.describe_shard(n), shard.samples, shard.samples, None)
            for n, shard in enumerate(dataset.shards)
        }
        bar = tqdm(total=len(states), unit="shard", desc=dataset.name, disable=options.quiet or None)
        with bar:
            bar.update(len(states) - len(to_verify))
            count = options.workers or len(os.sched_getaffinity(0))
            for number, state in run_resilient(
                to_verify,
                count,
                verify_shard,
                lambda n, m=dataset, k=faults: (replace(m, shards=[m.shards[n]]), k.get(n)),
            ):
                states[number] = state
                bar.update()
        statuses += states.values()
    return statuses


def verify_shard(dataset: Manifest, known_fault: str | None) -> ShardStatus:
    """The state of a manifest's one shard, whose fault is `known` or told by its digests.

    Where there is a fault, every sample is read.
    """
    samples = dataset.shards[0].samples
    fault = known_fault or dataset.find_corruption(0)
    return ShardStatus(dataset.describe_shard(0), samples, count_readable(dataset, 0) if fault else samples, fault)


def count_readable(dataset: Manifest, number: int) -> int:
    """How many samples of a shard have the bytes that the index promises."""
    try:
        rows = dataset.index(number)
        handle = os.open(dataset.tar(number), os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, remote.RemoteMismatch):
        return 0
    except ExitError as error:
        if error.code != ExitCode.DATA:
            raise
        return 0
    try:
        return sum(_is_intact(handle, row) for row in rows)
    finally:
        os.close(handle)


def _is_intact(handle: int, row: np.void) -> bool:
    try:
        data = os.pread(handle, int(row["size"]), int(row["offset"]))
    except OSError:
        return False
    return len(data) == row["size"] and zlib.crc32(data) == row["crc32"]
