"""What data costs as there is more of it, or more loader processes; on pictures that the benchmark makes itself.

All shards of a set are one file under many numbers: what is measured is what the processor does, not the disk. The
loader of `workers` reads data.train where that is given.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from exponents import growth
from PIL import Image
from racing import Row, Seconds, race

from ssl_vit import recipe
from ssl_vit.data import manifest
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.shards import MakeShards, convert
from ssl_vit.data.stream import Share, TrainingStream
from ssl_vit.durable import sha256
from ssl_vit.exits import DATA, Refusal

if TYPE_CHECKING:
    from benchmark_scaling import Options

CPU = torch.device("cpu")
Steps = dict[str, Callable[[], object]]
PICTURES = 64  # different images of a set
SHARD = 1000  # samples, of the sets that differ in their number
OPENING = 1024  # samples until the shards of the first shuffle windows have been opened, which is no batch's cost
PLANS = 100  # batches planned for each that is read: one takes too little time for a clock


def sized(made: "Options", axis: str) -> list[Row]:
    """Rows of a stream over sets of several sizes: its first batch, the plan of a batch, a batch."""
    counts = {samples: (samples, max(1, samples // SHARD)) for samples in sorted(set(made.samples))}
    if axis == "shards":
        total = 100 * max(made.shards)
        counts = {shards: (total, shards) for shards in sorted(set(made.shards))}
    with TemporaryDirectory() as place:
        plain = pictures(Path(place), made.data.image_hw)
        folders = {value: enlarged(plain, Path(place) / str(value), *count) for value, count in counts.items()}
        starts: Steps = {str(value): partial(first, made, folder) for value, folder in folders.items()}
        streams = {value: stream_of(made, manifest.load(folder), 0) for value, folder in folders.items()}
        share = Share(micro_batch=made.batch)
        keys: Steps = {str(value): partial(next, stream.keys(0, share)) for value, stream in streams.items()}
        begin = race(starts, made.rounds, warm_up=1)
        plan = race(keys, made.rounds, PLANS * made.round_steps)
        batches = {value: stream.batches(0, share, CPU) for value, stream in streams.items()}
        reads: Steps = {str(value): partial(next, one) for value, one in batches.items()}
        read = race(reads, made.rounds, made.round_steps, warm_up=3 + OPENING // made.batch)
        for stream in streams.values():
            close(stream)
    flat, each = (lambda _: 1.0), (lambda _: made.batch)
    return [
        growth(axis, "start to first batch", by_value(begin)),  # reads the manifest, shuffles a window of each lane
        growth(axis, f"plan of a batch of {made.batch}", by_value(plan), flat, each),
        growth(axis, f"batch of {made.batch}", by_value(read), flat, each),
    ]


def by_value(seconds: Seconds) -> dict[int, list[float]]:
    """A race's times under the numbers themselves."""
    return {int(value): times for value, times in seconds.items()}


def workers(made: "Options", axis: str) -> list[Row]:
    """The row of the loader, of batches made by 0, 1, ... processes; the fit is over those that have a core each."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted(set(made.workers))
    left_out = {count: f"more than the {cores} cores" for count in counts if count > cores}
    left_out |= {0: "in the training's own process"} if 0 in counts else {}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with TemporaryDirectory() as place:
        data = training_set(made, Path(place), 100 * SHARD, 100)
        for _ in range(made.rounds):
            for count in counts:
                seconds[count].append(loading(made, data, count))
    case = f"batches of {made.batch} on {cores} cores"
    row = growth(axis, case, seconds, lambda count: 1 / count, lambda _: made.batch, left_out)
    return [row | {"cores": cores}]


def loading(made: "Options", data: Manifest, count: int) -> float:
    """Seconds a batch of a loader of so many processes, which is built anew: others' would work on beside it."""
    stream = stream_of(made, data, count)
    batches: Any = stream.batches(0, Share(micro_batch=made.batch), CPU)
    threads, steps = torch.get_num_threads(), made.round_steps * max(1, count)
    torch.set_num_threads(1)  # as a worker has
    try:
        with closing(batches), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more of them than cores
            for _ in range((3 + OPENING // made.batch) * max(1, count)):
                next(batches)
            began = time.perf_counter()
            for _ in range(steps):
                next(batches)
            return (time.perf_counter() - began) / steps
    finally:
        torch.set_num_threads(threads)
        close(stream)


def first(made: "Options", folder: Path) -> None:
    """From a manifest on disk to a stream's first batch."""
    stream = stream_of(made, manifest.load(folder), 0)
    next(stream.batches(0, Share(micro_batch=made.batch), CPU))
    close(stream)


def stream_of(made: "Options", data: Manifest, count: int) -> TrainingStream:
    """The training's stream over all samples of a set, by so many loader processes."""
    config = made.data.model_copy(update={"workers": count, "subset": 1.0, "hold_out": 0.0})
    return TrainingStream(data, config, made.seed, made.batch)


def close(stream: TrainingStream) -> None:
    """Close the shards that this process read; raises Refusal where what was measured was no reading."""
    for shard in list(stream.samples._shards):
        stream.samples._close(shard)
    if stream.faults.fatal is not None:
        raise stream.faults.fatal
    if stream.faults.fresh:
        raise Refusal(DATA, stream.faults.fresh[0].reason)


def training_set(made: "Options", place: Path, samples: int, shards: int) -> Manifest:
    """data.train, or where it is not given a set of the benchmark's own."""
    if made.data.train is not None:
        return recipe.found(made, made.data.train, "train")
    return manifest.load(enlarged(pictures(place, made.data.image_hw), place / "train", samples, shards))


def pictures(place: Path, image_hw: tuple[int, int]) -> Manifest:
    """A shard of smooth JPEGs, a little larger than what the encoder takes."""
    random, (height, width) = np.random.default_rng(0), (max(8, side * 8 // 7) for side in image_hw)
    folder = place / "images" / "picture"  # the class of all
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        few = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        few.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    output = place / "plain"
    return convert(MakeShards(input=str(place / "images"), output=str(output), workers=1, quiet=True))[""]


def enlarged(plain: Manifest, folder: Path, samples: int, shards: int) -> Path:
    """The folder of a set that has the shard's images again and again: at most so many samples, in so many shards."""
    folder.mkdir()
    shutil.copy(plain.tar(0), folder / "0.tar")
    np.save(folder / "0.npy", np.resize(plain.index(0), max(1, samples // shards)))
    update = {"name": "0.tar", "samples": max(1, samples // shards), "index_sha256": sha256(folder / "0.npy")}
    manifest.save(replace(plain, folder=folder, shards=[plain.shards[0].model_copy(update=update)] * shards))
    return folder
