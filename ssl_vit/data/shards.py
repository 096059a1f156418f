"""A folder of images becomes shards: splits and classes, worker processes, what is done already, the manifest.

The manifest is written last; until then a shard's note says that it is done.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from pydantic import Field, model_validator
from tqdm import tqdm

from ssl_vit.config import Config
from ssl_vit.counter import key, permutation
from ssl_vit.data import folder, manifest
from ssl_vit.data.manifest import Manifest, Shard
from ssl_vit.data.write import NOTES, Job, write_shard
from ssl_vit.durable import write_bytes
from ssl_vit.exits import CANNOT_CREATE, DATA, Refusal
from ssl_vit.family import serve_parent

REJECTS = "rejects.jsonl"


class MakeShards(Config):
    """Convert a folder of images to shards."""

    input: str = Field(
        description="folder of images: class folders of any depth, or flat; split folders are kept apart"
    )
    output: str = Field(description="folder for the shards; with splits, one folder each in it")
    resize: int | None = Field(
        default=None, ge=1, description="shrink to this short side, pixels (none: original bytes)"
    )
    quality: int = Field(default=90, ge=1, le=100, description="JPEG quality of images that are shrunk")
    val_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of images for output/val, chosen by a stable hash"
    )
    shard_samples: int = Field(default=1000, ge=1, description="images a shard")
    workers: int | None = Field(default=None, ge=1, description="processes (none: one a core)")
    seed: int = Field(default=0, description="of the shuffle")
    quiet: bool = Field(default=False, description="no progress bar")

    @model_validator(mode="after")
    def _apart(self) -> "MakeShards":
        source, target = Path(self.input).resolve(), Path(self.output).resolve()
        if target == source or source in target.parents:
            raise ValueError(f"output {self.output} lies inside the input; name a folder outside it")
        return self


def convert(options: MakeShards) -> dict[str, Manifest]:
    """Write the shards of every split; a split that is complete is left alone, one begun is continued.

    Returns the manifests by split name ("" where there are no splits). Raises Refusal on empty input and where the
    output belongs to another job.
    """
    root = Path(options.input)
    names, others = folder.images(root)
    splits = folder.splits(names, options.val_fraction)
    classes = sorted({folder.class_of(name, split) for split, names in splits.items() for name in names} - {""})
    jobs = {split: _job(options, root, split, names, classes) for split, names in splits.items()}
    with _alone_in(Path(options.output)):
        _claim_splits(options, jobs)
        for job in jobs.values():
            _claim(job)
        done = {split: _write_split(job, classes, options) for split, job in jobs.items()}
    if others:
        print(f"{len(others)} were left out, images of other formats or links to folders (first: {others[0]})")
    return done


def _job(options: MakeShards, root: Path, split: str, names: list[str], classes: list[str]) -> Job:
    order = permutation(key(options.seed, "shuffle", split), len(names))
    sources = folder.sources(root, [names[i] for i in order], split, classes)
    settings = {name: getattr(options, name) for name in ("resize", "val_fraction", "shard_samples", "seed")}
    settings |= {"quality": options.quality if options.resize else None, "split": split}
    return Job(root, Path(options.output) / split, sources, settings)


def _claim_splits(options: MakeShards, jobs: dict[str, Job]) -> None:
    """Refuse an output that holds shards in splits where this job has none, or the reverse."""
    output, folders = Path(options.output), {job.folder for job in jobs.values()}
    for other in (output, *(output / split for split in ("train", "val"))):
        if other not in folders and ((other / "manifest.json").exists() or (other / NOTES).exists()):
            why = f"val_fraction or split folders: this one writes {', '.join(split or 'no split' for split in jobs)}"
            raise Refusal(CANNOT_CREATE, f"{other}: holds the shards of another job ({why}); name another output")


def _claim(job: Job) -> None:
    """Make the output folder this job's, or refuse: it may hold this job's shards, and nothing else's."""
    note = job.folder / NOTES / "job"
    if (job.folder / "manifest.json").exists():
        found = manifest.load(job.folder).job
    elif note.exists():
        found = json.loads(note.read_text())
    elif job.folder.exists() and any(path.name != NOTES for path in job.folder.iterdir()):
        raise Refusal(CANNOT_CREATE, f"{job.folder}: is not empty and holds no shards; name another output")
    else:
        (job.folder / NOTES).mkdir(parents=True, exist_ok=True)
        write_bytes(note, json.dumps(job.options | {"digest": job.digest}).encode())
        return
    if found.get("digest") != job.digest:
        changed = [
            f"{name} {found.get(name)} -> {value}" for name, value in job.options.items() if found.get(name) != value
        ]
        why = ", ".join(changed) or "the input or the options changed"
        raise Refusal(CANNOT_CREATE, f"{job.folder}: holds the shards of another job ({why}); name another output")


def _write_split(job: Job, classes: list[str], options: MakeShards) -> Manifest:
    if (job.folder / "manifest.json").exists():
        return manifest.load(job.folder)
    size = options.shard_samples
    numbers = range(-(-len(job.sources) // size))
    bar = tqdm(total=len(job.sources), unit="img", desc=str(job.folder), disable=options.quiet or None)
    with bar, _workers(options.workers) as pool:
        parts = [job.sources[n * size : (n + 1) * size] for n in numbers]
        lean = replace(job, sources=[])  # a piece of work is sent with its own images only
        futures = [pool.submit(write_shard, lean, n, part, size) for n, part in zip(numbers, parts, strict=True)]
        notes = []
        for future, part in zip(futures, parts, strict=True):
            notes.append(future.result())
            bar.update(len(part))
    rejects = [reject for note in notes for reject in note["rejects"]]
    shards = [Shard(**note["shard"]) for note in notes if note["shard"]["samples"]]
    if not shards:
        raise Refusal(DATA, f"{job.root}: not one image could be decoded (first: {rejects[0]})")
    for note in notes:
        if not note["shard"]["samples"]:  # every image of it was rejected
            for suffix in (".tar", ".npy"):
                (job.folder / note["shard"]["name"]).with_suffix(suffix).unlink(missing_ok=True)
    if rejects:
        write_bytes(job.folder / REJECTS, "".join(json.dumps(r) + "\n" for r in rejects).encode())
    made = Manifest(job.folder, job.options | {"digest": job.digest, "rejects": len(rejects)}, classes, shards)
    for draft in job.folder.glob(".*.tmp-*"):  # of a run that was killed
        draft.unlink()
    manifest.save(made)
    shutil.rmtree(job.folder / NOTES)
    return made


@contextlib.contextmanager
def _workers(count: int | None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one; when it is interrupted, work that has not begun is dropped."""
    pool = ProcessPoolExecutor(count, initializer=serve_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Hold a folder: a second conversion of this machine into it waits, and then finds the work done."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise Refusal(CANNOT_CREATE, f"{output}: {error.strerror}; name another output") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def resolve(path: str, split: str, cache: Path, may_convert: bool = True) -> Manifest:
    """The manifest of a folder of shards; a folder of images is converted first, into a folder under `cache`.

    Where the folder holds splits, `split` (train or val) is taken. Raises Refusal(DATA) where the folder is missing,
    has tars but no manifest, or would have to be converted and `may_convert` is False.
    """
    given = Path(path)
    if not given.is_dir() or (given / "manifest.json").exists():
        return manifest.load(given)
    parts = {p.parent.name: manifest.load(p.parent) for p in given.glob("*/manifest.json")}
    if parts:
        return _part(parts, split, given)
    if any(given.glob("*.tar")):
        raise Refusal(
            DATA, f"{given}: has tars but no manifest.json; its conversion did not end: run make_shards again"
        )
    listing = folder.sources(given, folder.images(given)[0], "", [])  # other images in it are another data set
    target = cache / f"{given.resolve().name}-{key(str(given.resolve()), *map(str, listing)):016x}"
    command = f"tools/make_shards.py input={given} output={target}"
    if not may_convert:
        raise Refusal(DATA, f"{given}: is a folder of images, which several processes cannot convert; first: {command}")
    print(f"{given} is a folder of images; doing {command}", flush=True)
    made = convert(MakeShards(input=path, output=str(target)))
    return made[""] if "" in made else _part(made, split, given)


def _part(parts: dict[str, Manifest], split: str, given: Path) -> Manifest:
    names = ("train",) if split == "train" else ("val", "validation", "valid", "test")
    found = next((parts[name] for name in names if name in parts), None)
    if found is None:
        raise Refusal(DATA, f"{given}: has no split {split}, only {', '.join(sorted(parts))}")
    return found
