"""Batches for the loop: the plan's samples, made by worker processes, on the device.

Workers keep no state: they are told (epoch, sample id) and everything else follows from it.
"""

import atexit
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ssl_vit.counter import key, permutation
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.plan import Plan, in_order
from ssl_vit.data.samples import Data, Keys, Samples
from ssl_vit.exits import Refusal
from ssl_vit.family import serve_parent
from ssl_vit.model import Batch


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process takes, in how many pieces."""

    rank: int = 0
    world: int = 1
    micro_batch: int = 1


class TrainingStream:
    """The endless training data of one process, from any position in it."""

    def __init__(self, manifest: Manifest, config: Data, seed: int, batch: int):
        self.samples = Samples(manifest, config, seed, training=True)
        self.config, self.batch = config, batch
        self.ids = subset(manifest.samples, config.subset)
        per_shard = np.diff(np.searchsorted(self.ids, manifest.starts))
        self.plan = Plan(per_shard, seed, batch, config.lanes, config.window)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return len(self.ids)

    def keys(self, seen: int, share: Share) -> Iterator[Keys]:
        """The micro batches of this process from stream position `seen` (in samples) on."""
        while True:
            mine = self.plan.samples(seen, self.batch, share.rank, share.world)
            chosen = [(epoch, int(self.ids[i])) for epoch, i in mine]
            for first in range(0, len(chosen), share.micro_batch):
                yield chosen[first : first + share.micro_batch]
            seen += self.batch

    def batches(self, seen: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Micro batches on the device."""
        return _batches(self.samples, self.keys(seen, share), self.config.workers, device)


class EvaluationStream:
    """Every sample of a split once, in order, the same for every run: central crops, seeds that do not change."""

    def __init__(self, manifest: Manifest, config: Data, batch: int):
        self.samples = Samples(manifest, config, seed=0, training=False)
        self.batch, self.count = batch, manifest.samples

    def batches(self, share: Share, device: torch.device) -> Iterator[Batch]:
        """This process's batches, padded with valid=False."""
        keys = in_order(self.count, self.batch, share.rank, share.world)
        return _batches(self.samples, keys, self.samples.config.workers, device)


def subset(samples: int, share: float) -> np.ndarray:
    """The ids of a fixed random share of the samples, ascending; a smaller share is part of a larger one."""
    count = max(1, round(samples * share))
    return np.sort(permutation(key("subset", samples), samples)[:count]) if share < 1 else np.arange(samples)


def default_workers() -> int:
    """Loader processes for this process: the node's cores but one, shared by its training processes, at most 12."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(12, len(os.sched_getaffinity(0)) // local - 1))


def _batches(samples: Samples, keys: Iterable[Keys], workers: int | None, device: torch.device) -> Iterator[Batch]:
    workers = default_workers() if workers is None else workers
    loader = DataLoader(
        samples,
        batch_sampler=keys,  # type: ignore[arg-type]  # any iterable of lists of keys does
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_work if workers else None,
        prefetch_factor=4 if workers else None,
    )
    iterator = iter(loader)
    if workers:
        _working.add(iterator)
    return _on_device(iterator, device)


_working: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _dismiss() -> None:
    """Tell the workers to go: they ignore the signal by which Python would end them, and it would wait for ever."""
    for iterator in list(_working):
        iterator._shutdown_workers()


def _as_is(batch: Any) -> Any:
    return batch


def _begin_work(worker: int) -> None:
    """A worker that dies of a signal to the process group would cost the checkpoint."""
    del worker
    serve_parent()


def _on_device(batches: Iterator[Batch | Refusal], device: torch.device) -> Iterator[Batch]:
    """Move batches to the device; on a GPU one ahead, on a stream of its own beside the computation."""
    if device.type != "cuda":
        yield from map(_accept, batches)
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            coming = {name: value.to(device, non_blocking=True) for name, value in _accept(batch).items()}
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(side)
        for value in coming.values():
            value.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready


def _accept(batch: Batch | Refusal) -> Batch:
    if isinstance(batch, Refusal):
        raise batch
    return batch
