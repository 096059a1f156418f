"""Whether shards are what their manifest says, and of those that are not, which samples can still be read."""

import os
import zlib
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field
from tqdm import tqdm

from ssl_vit.config import Config
from ssl_vit.data import manifest, remote
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.pool import do
from ssl_vit.exits import DATA, Refusal


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
