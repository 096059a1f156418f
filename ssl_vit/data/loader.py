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

from ssl_vit.data.cache import Ahead, Wanted
from ssl_vit.data.dataset import Data, Faults, Keys, Made, Samples
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.plan import Plan, in_order
from ssl_vit.data.workers import loaded
from ssl_vit.errors import DATA, Refusal
from ssl_vit.model import Batch
from ssl_vit.rng import key, permutation

SUBSTITUTES = 3  # tried in the shuffle window of a bad sample, and as many in the whole set


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process takes, in how many pieces."""

    rank: int = 0
    world: int = 1
    micro_batch: int = 1


class TrainingStream:
    """The endless training data of one process, from any position in it."""

    def __init__(self, manifest: Manifest, config: Data, seed: int, batch: int):
        self.config, self.batch, self.seed = config, batch, seed
        some = config.subset < 1 or config.hold_out > 0
        self.ids = parts(manifest.samples, config)[0] if some else None  # all: no list of them
        sizes = [shard.samples for shard in manifest.shards]
        self._sizes = sizes if self.ids is None else np.diff(np.searchsorted(self.ids, manifest.starts))
        self.plan = self._plan()
        self.samples = Samples(manifest, config, seed, training=True, substitutes=self.substitutes)
        self.faults = Faults()

    def _plan(self) -> Plan:
        return Plan(self._sizes, self.seed, self.batch, self.config.lanes, self.config.window)

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return self.plan.total

    @property
    def identity(self) -> str:
        """A digest of what is streamed."""
        return self.samples.manifest.identity

    def _id(self, place: int) -> int:
        return place if self.ids is None else int(self.ids[place])

    def keys(self, seen: int, share: Share) -> Iterator[Keys]:
        """The micro batches of this process from stream position `seen` (in samples) on."""
        while True:
            mine = self.plan.samples(seen, self.batch, share.rank, share.world)
            chosen = [(epoch, self._id(place)) for epoch, place in mine]
            for first in range(0, len(chosen), share.micro_batch):
                yield chosen[first : first + share.micro_batch]
            seen += self.batch

    def names(self, batch: int) -> Keys:
        """The (epoch, sample) pairs of a whole batch, by its number in the stream."""
        return next(self.keys(batch * self.batch, Share(micro_batch=self.batch)))

    def substitutes(self, epoch: int, sample: int) -> Iterator[int]:
        """What may take the place of a sample: three of its shuffle window, then three of the whole set."""
        place = sample if self.ids is None else int(np.searchsorted(self.ids, sample))
        for attempt in range(SUBSTITUTES):
            yield self._id(self.plan.neighbour(epoch, place, attempt))
        for attempt in range(SUBSTITUTES):
            yield self._id(key(self.seed, "anywhere", epoch, sample, attempt) % self.epoch_samples)

    def batches(self, seen: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Micro batches on the device."""
        keys = self.keys(seen, share)
        ahead = self._ahead(seen, share) if self.samples.manifest.wanted(0) else None
        made = _made(self.samples, _following(keys, ahead) if ahead else keys, share.micro_batch, device)
        yield from on_device(accepted(made, self.samples, share.micro_batch, self.faults), device)

    def _ahead(self, seen: int, share: Share) -> Iterator[None]:
        """Have remote shards fetched one shuffle window before they are needed; to be advanced once a micro batch."""
        plan, fetcher, asked = self._plan(), Ahead(), OrderedDict[int, None]()
        span = plan.lanes * plan.window  # samples of the whole stream until each lane is through a window
        span = min(span, plan.total // 20)  # of a small set, little of the next epoch, whose shards are another node's
        shards = self.samples.manifest
        try:
            for start in count(seen, self.batch):
                # the first call looks over the whole window, each later one at the batch that comes into sight
                first = start if start == seen else start + span // self.batch * self.batch
                for at in range(first, start + span + self.batch, self.batch):
                    ids = [self._id(place) for _, place in plan.samples(at, self.batch, share.rank, share.world)]
                    for shard in dict.fromkeys((np.searchsorted(shards.starts, ids, side="right") - 1).tolist()):
                        if shard not in asked:
                            for cache, name, size, digest in shards.wanted(shard):
                                fetcher.fetch(Wanted(cache.url, str(cache.folder), cache.room, name, size, digest))
                        asked[shard] = None
                        asked.move_to_end(shard)
                while len(asked) > 4 * plan.lanes * self.config.window:
                    asked.popitem(last=False)
                for _ in range(self.batch // share.world // share.micro_batch):
                    yield
        finally:
            fetcher.close()


class EvaluationStream:
    """Every sample of a split once, in order, the same for every run: central crops, seeds that do not change."""

    def __init__(self, manifest: Manifest, config: Data, batch: int, ids: np.ndarray | None = None):
        samples = Samples(manifest, config, seed=0, training=False)
        self._over(samples, manifest.samples if ids is None else len(ids), batch, ids)

    def _over(self, samples: Samples, count: int, batch: int, ids: np.ndarray | None) -> None:
        self.samples, self.count, self.batch, self.ids = samples, count, batch, ids
        self.faults = Faults()

    @classmethod
    def over(cls, samples: Samples, count: int, batch: int) -> "EvaluationStream":
        """A stream of samples that are in no shards."""
        stream = cls.__new__(cls)
        stream._over(samples, count, batch, None)
        return stream

    def keys(self, share: Share) -> list[Keys]:
        """This process's batches of (0, sample id), padded with id -1."""
        places = in_order(self.count, self.batch, share.rank, share.world)
        if self.ids is None:
            return places
        return [[(0, int(self.ids[place]) if place >= 0 else -1) for _, place in batch] for batch in places]

    def batches(self, share: Share, device: torch.device) -> Iterator[Batch]:
        """This process's batches, padded with valid=False; a sample that cannot be had is padding too."""
        keys = self.keys(share)
        made = _made(self.samples, keys, self.batch, device)
        yield from on_device(accepted(made, self.samples, self.batch, self.faults, len(keys)), device)

    def placed(self, share: Share, device: torch.device) -> Iterator[tuple[int, Batch]]:
        """The batches, and where in the order of all processes' samples each begins; padding comes last of all."""
        for step, batch in enumerate(self.batches(share, device)):
            yield (step * share.world + share.rank) * self.batch, batch


def parts(samples: int, config: Data) -> tuple[np.ndarray, np.ndarray]:
    """The ids to train on and those held out, ascending: the whole, or its fixed random share `subset`, cut in two.

    A smaller subset is part of a larger one. Raises Refusal(DATA) where one of the two would be empty.
    """
    chosen = permutation(key("subset", samples), samples)[: max(1, round(samples * config.subset))]
    held = round(len(chosen) * config.hold_out)
    if config.hold_out and not 0 < held < len(chosen):
        raise Refusal(DATA, f"data.hold_out={config.hold_out:g} of {len(chosen)} images leaves a part empty")
    return np.sort(chosen[: len(chosen) - held]), np.sort(chosen[len(chosen) - held :])


def _following(keys: Iterator[Keys], ahead: Iterator[None]) -> Iterator[Keys]:
    for micro_batch in keys:
        next(ahead)
        yield micro_batch


def _made(samples: Samples, keys: Iterable[Keys], batch: int, device: torch.device) -> Any:
    """What the workers make of the keys, in their order."""
    config = samples.config
    return loaded(samples, config.workers, config.timeout, config.bytes(batch), device, batch_sampler=keys)


def accepted(
    made: Iterable[Made | Refusal], samples: Samples, size: int, faults: Faults, left: float = math.inf
) -> Iterator[Batch]:
    """The `left` batches of `size`, their faults noted.

    After a fatal fault the rest is empty batches: no process may leave the others alone.
    """
    for answer in made:
        if isinstance(answer, Refusal):
            faults.fatal = answer
            break
        batch, bad = answer
        faults.met(len(batch["valid"]), bad)
        left -= 1
        yield batch
    while faults.fatal is not None and left > 0:
        left -= 1
        yield samples.empty(size)


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Move batches to the device; on a GPU one ahead, on a stream of its own beside the computation."""
    if device.type != "cuda":
        for batch in batches:
            yield {name: value.contiguous() for name, value in batch.items()}
        return
    side = torch.cuda.Stream(device)
    ready: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            coming = {name: value.to(device, non_blocking=True).contiguous() for name, value in batch.items()}
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(side)
        for value in coming.values():
            value.record_stream(torch.cuda.current_stream(device))
        ready = coming
    if ready is not None:
        yield ready
