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
from ssl_vit.convert.output import Target, resolve_target
from ssl_vit.convert.shard_writer import DIGEST, EXCLUDED, SHARD_STATE_DIR, Job, shard_state_path, write_shard
from ssl_vit.convert.worker_pool import run_resilient
from ssl_vit.data import manifest, remote
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.manifest import MANIFEST_FILE, Manifest, Shard
from ssl_vit.data.tar import Member, iter_members
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import atomic_write, remove_temp_files
from ssl_vit.rng import hash_key, permutation

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
    def _is_outside_input(self) -> "MakeShards":
        if remote.is_url(self.output):
            remote.check_url(self.output)
            return self
        source, target = Path(self.input).resolve(), Path(self.output).resolve()
        if target == source or source in target.parents:
            raise ValueError(f"output {self.output} lies inside the input; name a folder outside it")
        return self

    @property
    def target(self) -> Target:
        """Where the shards go."""
        return resolve_target(self.output)


def convert_images(options: MakeShards, rank: int = 0, world: int = 1) -> dict[str, Manifest]:
    """Write the shards of every split; a split that is complete is left alone, one begun is continued.

    Process `rank` of `world` writes its share. Returns the manifests by split name ("" where there are no splits), and
    nothing where other processes are still at work. Raises ExitError on empty input and where the output belongs to
    another job.
    """
    listing = image_list.read_listing(Path(options.input), options.val_fraction, options.follow_links)
    classes, class_to_idx = image_list.number_classes(listing.class_of.values(), options.class_map)
    with _lock_output(options.target, is_shared=world > 1):
        excluded = _excluded_digests(options)
        jobs = {split: _job(options, listing, split, classes, class_to_idx, excluded) for split in listing.splits}
        _acquire_outputs(options, jobs)
        for job in jobs.values():
            _acquire_output(job)
        for job in jobs.values():
            _write_shards(job, options, excluded, rank, world)
        manifests = _finish(jobs, classes, options)
    if listing.left_out and rank == 0:
        kinds = "images of other formats, or links that are not followed"
        print(f"{len(listing.left_out)} were left out, {kinds} (first: {listing.left_out[0]})")
    return manifests


def num_workers(options: MakeShards) -> int:
    """Worker processes of this process: as asked, or the node's cores shared by the launcher's processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return options.workers or max(1, len(os.sched_getaffinity(0)) // local)


def _excluded_digests(options: MakeShards) -> np.ndarray | None:
    """The digests of what is to be left out."""
    if not options.exclude:
        return None
    manifests = manifest.load_splits(options.exclude)
    for dataset in manifests:
        dataset.check_shards()  # what a damaged set lost would not be left out
    return content_digests(manifests, num_workers(options))


def _job(
    options: MakeShards,
    listing: Listing,
    split: str,
    classes: list[str],
    class_to_idx: dict[str, int],
    excluded: np.ndarray | None,
) -> Job:
    names = listing.splits[split]
    order = permutation(hash_key(options.seed, "shuffle", split), len(names))
    sources = image_list.list_sources(listing, [names[i] for i in order], class_to_idx)
    settings = {
        name: getattr(options, name) for name in ("resize", "val_fraction", "shard_samples", "seed", "keep_location")
    }
    settings |= {"quality": options.quality if options.resize else None, "split": split}
    exclude_digest = hashlib.sha256(excluded.tobytes()).hexdigest() if excluded is not None else None
    settings |= {"exclude": exclude_digest}
    target = options.target.subfolder(split)
    return Job(listing.root, target, sources, settings, tuple(classes), excluded is not None)


def _acquire_outputs(options: MakeShards, jobs: dict[str, Job]) -> None:
    """Refuse an output that holds shards in splits where this job has none, or the reverse."""
    targets = {job.target for job in jobs.values()}
    for other in (options.target, *map(options.target.subfolder, ("train", "val"))):
        if other not in targets and (other.size(MANIFEST_FILE) or other.size(f"{SHARD_STATE_DIR}/job")):
            reason = (
                f"val_fraction or split folders: this one writes {', '.join(split or 'no split' for split in jobs)}"
            )
            raise ExitError(
                ExitCode.CANNOT_CREATE, f"{other.name}: holds the shards of another job ({reason}); name another output"
            )


def _acquire_output(job: Job) -> None:
    """Make the output this job's, or refuse: it may hold this job's shards, and nothing else's."""
    target = job.target
    target.prepare()
    names = [] if target.size(MANIFEST_FILE) or target.size(f"{SHARD_STATE_DIR}/job") else target.list_files()
    text = target.read(
        MANIFEST_FILE
    )  # read after the files were listed: another process of this job may have begun meanwhile
    state = target.read(f"{SHARD_STATE_DIR}/job") if text is None else None
    if text is not None:
        previous = manifest.parse_manifest(text, f"{target.name}/{MANIFEST_FILE}", target.folder).job
    elif state is not None:
        previous = json.loads(state)
    elif any(not name.startswith(f"{SHARD_STATE_DIR}/") for name in names):
        raise ExitError(ExitCode.CANNOT_CREATE, f"{target.name}: is not empty and holds no shards; name another output")
    else:
        target.write(f"{SHARD_STATE_DIR}/job", json.dumps(job.options | {"digest": job.digest}).encode())
        return
    if previous.get("digest") != job.digest:
        changed = [
            f"{name} {previous.get(name)} -> {value}"
            for name, value in job.options.items()
            if previous.get(name) != value
        ]
        reason = ", ".join(changed) or "the input or the options changed"
        raise ExitError(
            ExitCode.CANNOT_CREATE, f"{target.name}: holds the shards of another job ({reason}); name another output"
        )


def _num_shards(job: Job) -> int:
    return -(-len(job.sources) // int(str(job.options["shard_samples"])))


def _write_shards(job: Job, options: MakeShards, excluded: np.ndarray | None, rank: int, world: int) -> None:
    """Write this process's shards: every `world`-th, so that each is written by one."""
    if job.target.size(MANIFEST_FILE):
        return
    if excluded is not None:
        (job.target.folder / SHARD_STATE_DIR).mkdir(parents=True, exist_ok=True)
        with atomic_write(job.target.folder / EXCLUDED, flush=False) as file:
            np.save(file, excluded)
    size, base_job = options.shard_samples, replace(job, sources=[])  # a piece is sent with its own images only
    shard_sources = {
        number: job.sources[number * size : (number + 1) * size] for number in range(rank, _num_shards(job), world)
    }
    crashing_paths: set[str] = set()

    def on_crash(number: int) -> bool:
        """Find the image at which a worker died, and have it rejected."""
        marker = job.target.folder / shard_state_path(number, "at")
        if not marker.exists() or not (position := marker.read_bytes()):
            return False
        path = shard_sources[number][int.from_bytes(position, "little")].path
        already_known = path in crashing_paths
        crashing_paths.add(path)
        return not already_known

    images = sum(map(len, shard_sources.values()))
    bar = tqdm(total=images, unit="img", desc=job.target.name, disable=options.quiet or rank > 0 or None)
    with bar:
        arguments = lambda number: (base_job, number, shard_sources[number], size, frozenset(crashing_paths))  # noqa: E731
        for number, _ in run_resilient(list(shard_sources), num_workers(options), write_shard, arguments, on_crash):
            bar.update(len(shard_sources[number]))


def _finish(jobs: dict[str, Job], classes: list[str], options: MakeShards) -> dict[str, Manifest]:
    """Write what comes last, where every shard of every split is done; nothing is returned where one is not."""
    if all(job.target.size(MANIFEST_FILE) for job in jobs.values()):  # another process was first, or an earlier start
        manifests = {split: _read_manifest(job) for split, job in jobs.items()}
    else:
        states = {split: _read_shard_states(job) for split, job in jobs.items()}
        duplicates = _find_duplicates(jobs)
        if duplicates is None or any(split_states is None for split_states in states.values()):
            is_finished = all(
                job.target.size(MANIFEST_FILE) for job in jobs.values()
            )  # another has finished while we looked
            return _finish(jobs, classes, options) if is_finished else {}
        manifests = {
            split: _build_manifest(job, states[split] or [], classes, duplicates[0][split])
            for split, job in jobs.items()
        }
        if "" not in jobs:
            options.target.write("_info.json", encode_info(manifests, below=True))
            _write_duplicates(duplicates[1], options.target)
        for split, job in jobs.items():
            _publish_split(job, states[split] or [], manifests[split])
    for job in jobs.values():
        job.target.remove(SHARD_STATE_DIR)
        remove_temp_files(job.target.folder)
    remove_temp_files(options.target.folder)
    if options.target.url:
        return {
            split: replace(manifests[split], indexes=CacheDir().cache_for(job.target.name))
            for split, job in jobs.items()
        }
    return manifests


def _read_manifest(job: Job) -> Manifest:
    return manifest.parse_manifest(
        job.target.read(MANIFEST_FILE) or b"", f"{job.target.name}/{MANIFEST_FILE}", job.target.folder
    )


def _read_shard_states(job: Job) -> list[dict[str, Any]] | None:
    """What was noted of every shard, None where a note is missing."""
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(job.target.read, map(shard_state_path, range(_num_shards(job)))))
    return None if None in texts else [json.loads(text or b"") for text in texts]


def _build_manifest(job: Job, states: list[dict[str, Any]], classes: list[str], num_duplicates: int) -> Manifest:
    rejects = [reject for state in states for reject in state["rejects"]]
    shards = [Shard(**state["shard"]) for state in states if state["shard"]["samples"]]
    if not shards:
        raise ExitError(ExitCode.DATA, f"{job.root}: not one image could be decoded (first: {rejects[0]})")
    metadata = job.options | {"digest": job.digest, "rejects": len(rejects), "duplicates": num_duplicates}
    return Manifest(job.target.folder, metadata, classes, shards)


def _publish_split(job: Job, states: list[dict[str, Any]], dataset: Manifest) -> None:
    """Write a split's manifest, and before it what stands beside it."""
    rejects = [reject for state in states for reject in state["rejects"]]
    for shard in (Shard(**state["shard"]) for state in states):
        if not shard.samples:  # every image of it was rejected
            job.target.remove(shard.name)
            job.target.remove(shard.index)
    if rejects:
        job.target.write(REJECTS, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
    job.target.write("sizes.json", encode_sizes(dataset))
    job.target.write("_info.json", encode_info({str(job.options["split"]): dataset}, below=False))
    job.target.write(MANIFEST_FILE, manifest.encode_manifest(dataset))


def _find_duplicates(jobs: dict[str, Job]) -> tuple[dict[str, int], list[dict[str, Any]]] | None:
    """How many images each split has twice, and those that stand in two splits; None where digests are missing."""
    splits = {}
    for split, job in jobs.items():
        parts = [job.target.read(shard_state_path(number, "sha256")) for number in range(_num_shards(job))]
        if None in parts:
            return None
        digests = np.frombuffer(b"".join(part or b"" for part in parts), DIGEST)
        splits[split] = digests, [source.path for source in job.sources]
    return {s: duplicates_within(digests) for s, (digests, _) in splits.items()}, list(duplicates_across(splits))


def _write_duplicates(rows: list[dict[str, Any]], target: Target) -> None:
    """List the images that stand in two splits in a file, and say so."""
    if rows:
        target.write(DUPLICATES, "".join(json.dumps(row) + "\n" for row in rows).encode())
        example = ", ".join(f"{split}: {path}" for split, path in rows[0].items() if split != "sha256")
        print(f"{len(rows)} images stand in two splits (first: {example}); all are in {target.name}/{DUPLICATES}")


@contextlib.contextmanager
def _lock_output(target: Target, is_shared: bool) -> Iterator[None]:
    """Hold a folder: a second conversion of this machine into it waits, and then finds the work done.

    The processes of one launcher hold it together.
    """
    target.prepare()
    handle = os.open(target.folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


MAX_JSON_BYTES = 1 << 20  # bytes of a sample's JSON that are read


def content_digests(manifests: list[Manifest], workers: int) -> np.ndarray:
    """The sorted digests of all images of some sets: of their bytes, and of the files they were made from.

    Raises ExitError(DATA) where a shard is damaged: what it lost would not be left out.
    """
    pieces = [(m, n) for m in range(len(manifests)) for n in range(len(manifests[m].shards))]
    results = run_resilient(pieces, workers, _shard_digests, lambda piece: (manifests[piece[0]].tar(piece[1]),))
    return np.unique(np.concatenate([np.empty(0, DIGEST), *(digests for _, digests in results)]))


def _shard_digests(tar: Path) -> np.ndarray:
    digests = []
    with tar.open("rb") as file:
        for member in iter_members(tar):
            if not isinstance(member, Member):
                raise ExitError(
                    ExitCode.DATA, f"{tar}: {member.reason} at byte {member.offset}; tools/verify_shards.py says more"
                )
            suffix = member.name.rsplit(".", 1)[-1].lower()
            if suffix in ("jpg", "jpeg", "png", "webp"):
                digests.append(hashlib.sha256(os.pread(file.fileno(), member.size, member.offset)).digest())
            elif suffix == "json" and member.size <= MAX_JSON_BYTES:
                digests += _original_digest(os.pread(file.fileno(), member.size, member.offset))
    return np.frombuffer(b"".join(digests), DIGEST)


def _original_digest(data: bytes) -> list[bytes]:
    """The digest of the original that a sample's JSON names: ours, and img2dataset's."""
    try:
        digest = bytes.fromhex(json.loads(data)["sha256"])
    except (ValueError, TypeError, KeyError):
        return []
    return [digest] if len(digest) == DIGEST.itemsize else []


def duplicates_across(splits: dict[str, tuple[np.ndarray, list[str]]]) -> Iterator[dict[str, Any]]:
    """A row for each image that stands in more than one split: its sha256, and its (first) path in each of the two.

    `splits` holds for each split the digests (DIGEST, empty = none) and paths of its images.
    """
    firsts = {split: np.unique(digests, return_index=True) for split, (digests, _) in splits.items()}
    for first, second in combinations(splits, 2):
        common, first_indices, second_indices = np.intersect1d(firsts[first][0], firsts[second][0], return_indices=True)
        for digest, a, b in zip(common, first_indices, second_indices, strict=True):
            if digest:
                paths = {first: splits[first][1][firsts[first][1][a]], second: splits[second][1][firsts[second][1][b]]}
                yield {"sha256": bytes(digest).ljust(32, b"\0").hex(), **paths}


def duplicates_within(digests: np.ndarray) -> int:
    """How many images are equal to an earlier one of the same split."""
    present = digests[digests != b""]
    return len(present) - len(np.unique(present))


def encode_sizes(dataset: Manifest) -> bytes:
    """`sizes.json`, by which open_clip counts samples: file name -> samples."""
    return _to_json({shard.name: shard.samples for shard in dataset.shards})


def encode_info(splits: dict[str, Manifest], below: bool) -> bytes:
    """`_info.json`, by which timm's `wds/` reader finds splits and counts; `below`: each split in its folder."""
    entries = {}
    for split, dataset in splits.items():
        name = split or "train"
        entries[name] = {
            "name": name,
            "num_samples": dataset.samples,
            "filenames": [f"{split}/{shard.name}" if below else shard.name for shard in dataset.shards],
            "shard_lengths": [shard.samples for shard in dataset.shards],
        }
    return _to_json({"splits": entries})


def _to_json(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
