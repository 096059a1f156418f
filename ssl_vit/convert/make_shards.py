"""Convert images to shards: who writes what, equal images, and the manifest last."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from ssl_vit.config import Config
from ssl_vit.convert import image_list
from ssl_vit.convert.image_list import Listing
from ssl_vit.convert.output import Target, destination
from ssl_vit.convert.shard_writer import DIGEST, EXCLUDED, NOTES, Job, name_of_note, write_shard
from ssl_vit.convert.worker_pool import do
from ssl_vit.data import manifest, remote
from ssl_vit.data.cache import Store
from ssl_vit.data.manifest import FILE, Manifest, Shard
from ssl_vit.data.tar import Member, walk
from ssl_vit.errors import CANNOT_CREATE, DATA, Refusal
from ssl_vit.files import sweep, writing
from ssl_vit.rng import key, permutation

REJECTS = "rejects.jsonl"
DUPLICATES = "duplicates.jsonl"


class MakeShards(Config):
    """Convert images to shards."""

    input: str = Field(
        description="folder of images: class folders of any depth, or flat; split folders are kept apart. "
        "Or a .csv or .parquet file with columns path, label and split (the last two may be missing)"
    )
    output: str = Field(description="folder or URL (s3://, gs://, hf://) for the shards; with splits, one folder each")
    resize: int | None = Field(
        default=None, ge=1, description="shrink to this short side, pixels (none: original bytes)"
    )
    quality: int = Field(default=90, ge=1, le=100, description="JPEG quality of images that are shrunk")
    val_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of images for output/val, chosen by a stable hash"
    )
    class_map: str | None = Field(
        default=None,
        description="the classes and their numbers: .txt (a name a line), .json (names, or name -> number), or shards",
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="shards (folders, URLs) whose images are left out: of the sets one will be tested on"
    )
    keep_location: bool = Field(default=False, description="keep where an image was taken (GPS in EXIF and XMP)")
    follow_links: bool = Field(default=False, description="follow links to folders, and out of the input")
    shard_samples: int = Field(default=1000, ge=1, description="images a shard")
    workers: int | None = Field(default=None, ge=1, description="processes (none: one a core)")
    seed: int = Field(default=0, description="of the shuffle")
    quiet: bool = Field(default=False, description="no progress bar")

    @model_validator(mode="after")
    def _apart(self) -> "MakeShards":
        if remote.is_url(self.output):
            remote.check(self.output)
            return self
        source, target = Path(self.input).resolve(), Path(self.output).resolve()
        if target == source or source in target.parents:
            raise ValueError(f"output {self.output} lies inside the input; name a folder outside it")
        return self

    @property
    def target(self) -> Target:
        """Where the shards go."""
        return destination(self.output)


def convert(options: MakeShards, rank: int = 0, world: int = 1) -> dict[str, Manifest]:
    """Write the shards of every split; a split that is complete is left alone, one begun is continued.

    Process `rank` of `world` writes its share. Returns the manifests by split name ("" where there are no splits), and
    nothing where other processes are still at work. Raises Refusal on empty input and where the output belongs to
    another job.
    """
    found = image_list.read(Path(options.input), options.val_fraction, options.follow_links)
    classes, number = image_list.numbers(found.class_of.values(), options.class_map)
    with _at_work_in(options.target, several=world > 1):
        excluded = _excluded(options)
        jobs = {split: _job(options, found, split, classes, number, excluded) for split in found.splits}
        _claim_splits(options, jobs)
        for job in jobs.values():
            _claim(job)
        for job in jobs.values():
            _write(job, options, excluded, rank, world)
        made = _finish(jobs, classes, options)
    if found.left_out and rank == 0:
        what = "images of other formats, or links that are not followed"
        print(f"{len(found.left_out)} were left out, {what} (first: {found.left_out[0]})")
    return made


def processes(options: MakeShards) -> int:
    """Worker processes of this process: as asked, or the node's cores shared by the launcher's processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return options.workers or max(1, len(os.sched_getaffinity(0)) // local)


def _excluded(options: MakeShards) -> np.ndarray | None:
    """The digests of what is to be left out."""
    if not options.exclude:
        return None
    sets = manifest.every(options.exclude)
    for made in sets:
        made.check()  # what a damaged set lost would not be left out
    return held(sets, processes(options))


def _job(
    options: MakeShards,
    found: Listing,
    split: str,
    classes: list[str],
    number: dict[str, int],
    excluded: np.ndarray | None,
) -> Job:
    names = found.splits[split]
    order = permutation(key(options.seed, "shuffle", split), len(names))
    sources = image_list.sources(found, [names[i] for i in order], number)
    settings = {
        name: getattr(options, name) for name in ("resize", "val_fraction", "shard_samples", "seed", "keep_location")
    }
    settings |= {"quality": options.quality if options.resize else None, "split": split}
    left_out = hashlib.sha256(excluded.tobytes()).hexdigest() if excluded is not None else None
    settings |= {"exclude": left_out}
    target = options.target.below(split)
    return Job(found.root, target, sources, settings, tuple(classes), excluded is not None)


def _claim_splits(options: MakeShards, jobs: dict[str, Job]) -> None:
    """Refuse an output that holds shards in splits where this job has none, or the reverse."""
    mine = {job.target for job in jobs.values()}
    for other in (options.target, *map(options.target.below, ("train", "val"))):
        if other not in mine and (other.size(FILE) or other.size(f"{NOTES}/job")):
            why = f"val_fraction or split folders: this one writes {', '.join(split or 'no split' for split in jobs)}"
            raise Refusal(CANNOT_CREATE, f"{other.name}: holds the shards of another job ({why}); name another output")


def _claim(job: Job) -> None:
    """Make the output this job's, or refuse: it may hold this job's shards, and nothing else's."""
    target = job.target
    target.prepare()
    names = [] if target.size(FILE) or target.size(f"{NOTES}/job") else target.names()
    text = target.read(FILE)  # read after the files were listed: another process of this job may have begun meanwhile
    note = target.read(f"{NOTES}/job") if text is None else None
    if text is not None:
        known = manifest.read(text, f"{target.name}/{FILE}", target.folder).job
    elif note is not None:
        known = json.loads(note)
    elif any(not name.startswith(f"{NOTES}/") for name in names):
        raise Refusal(CANNOT_CREATE, f"{target.name}: is not empty and holds no shards; name another output")
    else:
        target.write(f"{NOTES}/job", json.dumps(job.options | {"digest": job.digest}).encode())
        return
    if known.get("digest") != job.digest:
        changed = [
            f"{name} {known.get(name)} -> {value}" for name, value in job.options.items() if known.get(name) != value
        ]
        why = ", ".join(changed) or "the input or the options changed"
        raise Refusal(CANNOT_CREATE, f"{target.name}: holds the shards of another job ({why}); name another output")


def _parts(job: Job) -> int:
    return -(-len(job.sources) // int(str(job.options["shard_samples"])))


def _write(job: Job, options: MakeShards, excluded: np.ndarray | None, rank: int, world: int) -> None:
    """Write this process's shards: every `world`-th, so that each is written by one."""
    if job.target.size(FILE):
        return
    if excluded is not None:
        (job.target.folder / NOTES).mkdir(parents=True, exist_ok=True)
        with writing(job.target.folder / EXCLUDED, flush=False) as file:
            np.save(file, excluded)
    size, lean = options.shard_samples, replace(job, sources=[])  # a piece is sent with its own images only
    parts = {number: job.sources[number * size : (number + 1) * size] for number in range(rank, _parts(job), world)}
    deadly: set[str] = set()

    def learn(number: int) -> bool:
        """Find the image at which a worker died, and have it rejected."""
        mark = job.target.folder / name_of_note(number, "at")
        if not mark.exists() or not (place := mark.read_bytes()):
            return False
        path = parts[number][int.from_bytes(place, "little")].path
        known = path in deadly
        deadly.add(path)
        return not known

    images = sum(map(len, parts.values()))
    bar = tqdm(total=images, unit="img", desc=job.target.name, disable=options.quiet or rank > 0 or None)
    with bar:
        arguments = lambda number: (lean, number, parts[number], size, frozenset(deadly))  # noqa: E731
        for number, _ in do(list(parts), processes(options), write_shard, arguments, learn):
            bar.update(len(parts[number]))


def _finish(jobs: dict[str, Job], classes: list[str], options: MakeShards) -> dict[str, Manifest]:
    """Write what comes last, where every shard of every split is done; nothing is returned where one is not."""
    if all(job.target.size(FILE) for job in jobs.values()):  # another process was first, or an earlier start
        made = {split: _read(job) for split, job in jobs.items()}
    else:
        notes = {split: _notes(job) for split, job in jobs.items()}
        equal = _duplicates(jobs)
        if equal is None or any(found is None for found in notes.values()):
            again = all(job.target.size(FILE) for job in jobs.values())  # another has finished while we looked
            return _finish(jobs, classes, options) if again else {}
        made = {split: _manifest(job, notes[split] or [], classes, equal[0][split]) for split, job in jobs.items()}
        if "" not in jobs:
            options.target.write("_info.json", info(made, below=True))
            _list_doubled(equal[1], options.target)
        for split, job in jobs.items():
            _publish(job, notes[split] or [], made[split])
    for job in jobs.values():
        job.target.remove(NOTES)
        sweep(job.target.folder)
    sweep(options.target.folder)
    if options.target.url:
        return {split: replace(made[split], indexes=Store().of(job.target.name)) for split, job in jobs.items()}
    return made


def _read(job: Job) -> Manifest:
    return manifest.read(job.target.read(FILE) or b"", f"{job.target.name}/{FILE}", job.target.folder)


def _notes(job: Job) -> list[dict[str, Any]] | None:
    """What was noted of every shard, None where a note is missing."""
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(job.target.read, map(name_of_note, range(_parts(job)))))
    return None if None in found else [json.loads(note or b"") for note in found]


def _manifest(job: Job, notes: list[dict[str, Any]], classes: list[str], doubled: int) -> Manifest:
    rejects = [reject for note in notes for reject in note["rejects"]]
    shards = [Shard(**note["shard"]) for note in notes if note["shard"]["samples"]]
    if not shards:
        raise Refusal(DATA, f"{job.root}: not one image could be decoded (first: {rejects[0]})")
    said = job.options | {"digest": job.digest, "rejects": len(rejects), "duplicates": doubled}
    return Manifest(job.target.folder, said, classes, shards)


def _publish(job: Job, notes: list[dict[str, Any]], made: Manifest) -> None:
    """Write a split's manifest, and before it what stands beside it."""
    rejects = [reject for note in notes for reject in note["rejects"]]
    for shard in (Shard(**note["shard"]) for note in notes):
        if not shard.samples:  # every image of it was rejected
            job.target.remove(shard.name)
            job.target.remove(shard.index)
    if rejects:
        job.target.write(REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    job.target.write("sizes.json", sizes(made))
    job.target.write("_info.json", info({str(job.options["split"]): made}, below=False))
    job.target.write(FILE, manifest.encode(made))


def _duplicates(jobs: dict[str, Job]) -> tuple[dict[str, int], list[dict[str, Any]]] | None:
    """How many images each split has twice, and those that stand in two splits; None where digests are missing."""
    splits = {}
    for split, job in jobs.items():
        parts = [job.target.read(name_of_note(number, "sha256")) for number in range(_parts(job))]
        if None in parts:
            return None
        digests = np.frombuffer(b"".join(part or b"" for part in parts), DIGEST)
        splits[split] = digests, [source.path for source in job.sources]
    return {s: within(digests) for s, (digests, _) in splits.items()}, list(across(splits))


def _list_doubled(rows: list[dict[str, Any]], target: Target) -> None:
    """List the images that stand in two splits in a file, and say so."""
    if rows:
        target.write(DUPLICATES, "".join(json.dumps(row) + "\n" for row in rows).encode())
        shown = ", ".join(f"{split}: {path}" for split, path in rows[0].items() if split != "sha256")
        print(f"{len(rows)} images stand in two splits (first: {shown}); all are in {target.name}/{DUPLICATES}")


@contextlib.contextmanager
def _at_work_in(target: Target, several: bool) -> Iterator[None]:
    """Hold a folder: a second conversion of this machine into it waits, and then finds the work done.

    The processes of one launcher hold it together.
    """
    target.prepare()
    handle = os.open(target.folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if several else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


MAX_JSON = 1 << 20  # bytes of a sample's JSON that are read


def held(manifests: list[Manifest], workers: int) -> np.ndarray:
    """The sorted digests of all images of some sets: of their bytes, and of the files they were made from.

    Raises Refusal(DATA) where a shard is damaged: what it lost would not be left out.
    """
    pieces = [(m, n) for m in range(len(manifests)) for n in range(len(manifests[m].shards))]
    found = do(pieces, workers, _of_shard, lambda piece: (manifests[piece[0]].tar(piece[1]),))
    return np.unique(np.concatenate([np.empty(0, DIGEST), *(digests for _, digests in found)]))


def _of_shard(tar: Path) -> np.ndarray:
    digests = []
    with tar.open("rb") as file:
        for member in walk(tar):
            if not isinstance(member, Member):
                raise Refusal(DATA, f"{tar}: {member.reason} at byte {member.offset}; tools/verify_shards.py says more")
            suffix = member.name.rsplit(".", 1)[-1].lower()
            if suffix in ("jpg", "jpeg", "png", "webp"):
                digests.append(hashlib.sha256(os.pread(file.fileno(), member.size, member.offset)).digest())
            elif suffix == "json" and member.size <= MAX_JSON:
                digests += _said(os.pread(file.fileno(), member.size, member.offset))
    return np.frombuffer(b"".join(digests), DIGEST)


def _said(data: bytes) -> list[bytes]:
    """The digest of the original that a sample's JSON names: ours, and img2dataset's."""
    try:
        digest = bytes.fromhex(json.loads(data)["sha256"])
    except (ValueError, TypeError, KeyError):
        return []
    return [digest] if len(digest) == DIGEST.itemsize else []


def across(splits: dict[str, tuple[np.ndarray, list[str]]]) -> Iterator[dict[str, Any]]:
    """A row for each image that stands in more than one split: its sha256, and its (first) path in each of the two.

    `splits` holds for each split the digests (DIGEST, empty = none) and paths of its images.
    """
    firsts = {split: np.unique(digests, return_index=True) for split, (digests, _) in splits.items()}
    for one, other in combinations(splits, 2):
        common, mine, theirs = np.intersect1d(firsts[one][0], firsts[other][0], return_indices=True)
        for digest, a, b in zip(common, mine, theirs, strict=True):
            if digest:
                paths = {one: splits[one][1][firsts[one][1][a]], other: splits[other][1][firsts[other][1][b]]}
                yield {"sha256": bytes(digest).ljust(32, b"\0").hex(), **paths}


def within(digests: np.ndarray) -> int:
    """How many images are equal to an earlier one of the same split."""
    known = digests[digests != b""]
    return len(known) - len(np.unique(known))


def sizes(made: Manifest) -> bytes:
    """`sizes.json`, by which open_clip counts samples: file name -> samples."""
    return _encoded({shard.name: shard.samples for shard in made.shards})


def info(splits: dict[str, Manifest], below: bool) -> bytes:
    """`_info.json`, by which timm's `wds/` reader finds splits and counts; `below`: each split in its folder."""
    described = {}
    for split, made in splits.items():
        name = split or "train"
        described[name] = {
            "name": name,
            "num_samples": made.samples,
            "filenames": [f"{split}/{shard.name}" if below else shard.name for shard in made.shards],
            "shard_lengths": [shard.samples for shard in made.shards],
        }
    return _encoded({"splits": described})


def _encoded(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
