"""Batches for the loop: the plan's samples, made by worker processes, on the device.

Workers keep no state: they are told (epoch, sample id) and everything else follows from it.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch

from ssl_vit.data.cache import FetchRequest, Prefetcher
from ssl_vit.data.dataset import BatchAndFaults, Data, Faults, SampleDataset, SampleIds
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.plan import Plan, sequential_plan
from ssl_vit.data.workers import worker_batches
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch
from ssl_vit.rng import hash_key, permutation

NUM_SUBSTITUTES = 3  # tried in the shuffle window of a bad sample, and as many in the whole set


@dataclass(frozen=True)
class ProcessShard:
    """Which part of every batch this process takes, in how many pieces."""

    rank: int = 0
    world: int = 1
    micro_batch: int = 1


class TrainingStream:
    """The endless training data of one process, from any position in it."""

    def __init__(self, manifest: Manifest, config: Data, seed: int, batch: int):
        self.config, self.batch, self.seed = config, batch, seed
        is_subset = config.subset < 1 or config.holdout > 0
        self.ids = split_holdout(manifest.samples, config)[0] if is_subset else None  # all: no list of them
        sizes = [shard.samples for shard in manifest.shards]
        self._sizes = sizes if self.ids is None else np.diff(np.searchsorted(self.ids, manifest.starts))
        self.plan = self._plan()
        self.samples = SampleDataset(manifest, config, seed, training=True, substitutes=self.substitutes)
        self.faults = Faults()

    def _plan(self) -> Plan:
        return Plan(self._sizes, self.seed, self.batch, self.config.lanes, self.config.shuffle_window)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return self.plan.total

    @property
    def identity(self) -> str:
        """A digest of what is streamed."""
        return self.samples.manifest.identity

    def _sample_id(self, position: int) -> int:
        return position if self.ids is None else int(self.ids[position])

    def keys(self, samples_seen: int, shard: ProcessShard) -> Iterator[SampleIds]:
        """The micro batches of this process from stream position `seen` (in samples) on."""
        while True:
            positions = self.plan.samples(samples_seen, self.batch, shard.rank, shard.world)
            sample_ids = [(epoch, self._sample_id(position)) for epoch, position in positions]
            for start in range(0, len(sample_ids), shard.micro_batch):
                yield sample_ids[start : start + shard.micro_batch]
            samples_seen += self.batch

    def names(self, batch: int) -> SampleIds:
        """The (epoch, sample) pairs of a whole batch, by its number in the stream."""
        return next(self.keys(batch * self.batch, ProcessShard(micro_batch=self.batch)))

    def substitutes(self, epoch: int, sample: int) -> Iterator[int]:
        """What may take the place of a sample: three of its shuffle window, then three of the whole set."""
        position = sample if self.ids is None else int(np.searchsorted(self.ids, sample))
        for attempt in range(NUM_SUBSTITUTES):
            yield self._sample_id(self.plan.substitute_in_window(epoch, position, attempt))
        for attempt in range(NUM_SUBSTITUTES):
            yield self._sample_id(hash_key(self.seed, "anywhere", epoch, sample, attempt) % self.epoch_samples)

    def batches(self, samples_seen: int, shard: ProcessShard, device: torch.device) -> Iterator[Batch]:
        """Micro batches on the device."""
        keys = self.keys(samples_seen, shard)
        prefetches = self._prefetch(samples_seen, shard) if self.samples.manifest.remote_files(0) else None
        answers = _load_batches(
            self.samples, _advance_prefetch(keys, prefetches) if prefetches else keys, shard.micro_batch, device
        )
        yield from prefetch_to_device(
            collect_bad_samples(answers, self.samples, shard.micro_batch, self.faults), device
        )

    def _prefetch(self, samples_seen: int, process_shard: ProcessShard) -> Iterator[None]:
        """Have remote shards fetched one shuffle window before they are needed; to be advanced once a micro batch."""
        plan, fetcher, requested = self._plan(), Prefetcher(), OrderedDict[int, None]()
        span = plan.lanes * plan.window  # samples of the whole stream until each lane is through a window
        span = min(span, plan.total // 20)  # of a small set, little of the next epoch, whose shards are another node's
        manifest = self.samples.manifest
        try:
            for start in count(samples_seen, self.batch):
                # the first call looks over the whole window, each later one at the batch that comes into sight
                first = start if start == samples_seen else start + span // self.batch * self.batch
                for position in range(first, start + span + self.batch, self.batch):
                    ids = [
                        self._sample_id(index)
                        for _, index in plan.samples(position, self.batch, process_shard.rank, process_shard.world)
                    ]
                    for shard in dict.fromkeys((np.searchsorted(manifest.starts, ids, side="right") - 1).tolist()):
                        if shard not in requested:
                            for cache, name, size, digest in manifest.remote_files(shard):
                                fetcher.fetch(
                                    FetchRequest(cache.url, str(cache.folder), cache.max_bytes, name, size, digest)
                                )
                        requested[shard] = None
                        requested.move_to_end(shard)
                while len(requested) > 4 * plan.lanes * self.config.shuffle_window:
                    requested.popitem(last=False)
                for _ in range(self.batch // process_shard.world // process_shard.micro_batch):
                    yield
        finally:
            fetcher.close()


class EvaluationStream:
    """Every sample of a split once, in order, the same for every run: central crops, seeds that do not change."""

    def __init__(self, manifest: Manifest, config: Data, batch: int, ids: np.ndarray | None = None):
        samples = SampleDataset(manifest, config, seed=0, training=False)
        self._init_stream(samples, manifest.samples if ids is None else len(ids), batch, ids)

    def _init_stream(self, samples: SampleDataset, count: int, batch: int, ids: np.ndarray | None) -> None:
        self.samples, self.count, self.batch, self.ids = samples, count, batch, ids
        self.faults = Faults()

    @classmethod
    def from_dataset(cls, samples: SampleDataset, count: int, batch: int) -> "EvaluationStream":
        """A stream of samples that are in no shards."""
        stream = cls.__new__(cls)
        stream._init_stream(samples, count, batch, None)
        return stream

    def keys(self, shard: ProcessShard) -> list[SampleIds]:
        """This process's batches of (0, sample id), padded with id -1."""
        batches = sequential_plan(self.count, self.batch, shard.rank, shard.world)
        if self.ids is None:
            return batches
        return [[(0, int(self.ids[index]) if index >= 0 else -1) for _, index in batch] for batch in batches]

    def batches(self, shard: ProcessShard, device: torch.device) -> Iterator[Batch]:
        """This process's batches, padded with valid=False; a sample that cannot be had is padding too."""
        keys = self.keys(shard)
        answers = _load_batches(self.samples, keys, self.batch, device)
        yield from prefetch_to_device(
            collect_bad_samples(answers, self.samples, self.batch, self.faults, len(keys)), device
        )

    def enumerate_batches(self, shard: ProcessShard, device: torch.device) -> Iterator[tuple[int, Batch]]:
        """The batches, and where in the order of all processes' samples each begins; padding comes last of all."""
        for step, batch in enumerate(self.batches(shard, device)):
            yield (step * shard.world + shard.rank) * self.batch, batch


def split_holdout(samples: int, config: Data) -> tuple[np.ndarray, np.ndarray]:
    """The ids to train on and those held out, ascending: the whole, or its fixed random share `subset`, cut in two.

    A smaller subset is part of a larger one. Raises ExitError(DATA) where one of the two would be empty.
    """
    ids = permutation(hash_key("subset", samples), samples)[: max(1, round(samples * config.subset))]
    num_holdout = round(len(ids) * config.holdout)
    if config.holdout and not 0 < num_holdout < len(ids):
        raise ExitError(ExitCode.DATA, f"data.holdout={config.holdout:g} of {len(ids)} images leaves a part empty")
    return np.sort(ids[: len(ids) - num_holdout]), np.sort(ids[len(ids) - num_holdout :])


def _advance_prefetch(keys: Iterator[SampleIds], prefetches: Iterator[None]) -> Iterator[SampleIds]:
    for micro_batch in keys:
        next(prefetches)
        yield micro_batch


def _load_batches(samples: SampleDataset, keys: Iterable[SampleIds], batch: int, device: torch.device) -> Any:
    """What the workers make of the keys, in their order."""
    config = samples.config
    return worker_batches(
        samples, config.workers, config.timeout, config.pixel_bytes(batch), device, batch_sampler=keys
    )


def collect_bad_samples(
    answers: Iterable[BatchAndFaults | ExitError],
    samples: SampleDataset,
    size: int,
    faults: Faults,
    remaining: float = math.inf,
) -> Iterator[Batch]:
    """The `remaining` batches of `size`, their faults noted.

    After a fatal fault the rest is empty batches: no process may leave the others alone.
    """
    for answer in answers:
        if isinstance(answer, ExitError):
            faults.fatal = answer
            break
        batch, batch_faults = answer
        faults.record(len(batch["valid"]), batch_faults)
        remaining -= 1
        yield batch
    while faults.fatal is not None and remaining > 0:
        remaining -= 1
        yield samples.empty(size)


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Move batches to the device; on a GPU one ahead, on a stream of its own beside the computation."""
    if device.type != "cuda":
        for batch in batches:
            yield {name: value.contiguous() for name, value in batch.items()}
        return
    copy_stream = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copy_stream):
            next_batch = {name: value.to(device, non_blocking=True).contiguous() for name, value in batch.items()}
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(copy_stream)
        for value in next_batch.values():
            value.record_stream(torch.cuda.current_stream(device))
        ready = next_batch
    if ready is not None:
        yield ready
