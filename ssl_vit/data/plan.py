"""The order of samples: a pure function of (samples a shard, seed, epoch, lanes, window) and of nothing else.

Each epoch permutes the shards, cuts their samples into L lanes of equal length, and permutes inside windows of a lane;
the stream deals the lanes round robin, and epochs follow one another with nothing dropped, padded or repeated. A batch
is a cut of the stream whose slots are grouped by lane, of which each rank takes its contiguous share. So the position
is one integer, resuming is arithmetic, and every world size and worker count takes the same global batches.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssl_vit.rng import hash_key, permutation


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # shards in this epoch's order
    ranks: np.ndarray  # each shard's rank in it
    ends: np.ndarray  # samples in the shards up to and with each of them


class Plan:
    """The sample stream over shards of `shard_samples` samples each.

    `lanes` is how many shards are read side by side, `window` how many (average) shards a shuffle window spans:
    a lane holds one window at a time, so `lanes * window` shards are in use, and a sample moves within its window.
    """

    def __init__(
        self, shard_samples: Sequence[int] | np.ndarray, seed: int = 0, batch: int = 1, lanes: int = 8, window: int = 4
    ):
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        self.total = int(self.sizes.sum())
        if self.total == 0:
            raise ValueError("there are no samples to plan")
        self.seed, self.batch_size, self.lanes = seed, batch, max(1, min(lanes, self.total))
        self.window = max(1, window * -(-self.total // len(self.sizes)))  # in samples
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """The (epoch, sample id) pairs that rank `rank` of `world` takes in a step."""
        return self.samples(step * self.batch_size, self.batch_size, rank, world)

    def samples(self, start: int, count: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """A rank's share of `count` samples from stream position `start`; ValueError where world does not divide it."""
        if count % world:
            raise ValueError(f"{world} processes do not divide a batch of {count}")
        epoch, position = np.divmod(np.arange(start, start + count, dtype=np.int64), self.total)
        lane, index = position % self.lanes, position // self.lanes
        slots = np.argsort(lane, kind="stable")[rank * count // world : (rank + 1) * count // world]
        epoch, lane, index = epoch[slots], lane[slots], index[slots]
        ids = np.empty(len(slots), dtype=np.int64)
        groups = np.stack([epoch, lane, index // self.window], axis=1)
        for group in np.unique(groups, axis=0):
            mask = (groups == group).all(axis=1)
            ids[mask] = self._window(*map(int, group))[index[mask] % self.window]
        return list(zip(epoch.tolist(), ids.tolist(), strict=True))

    def substitute_in_window(self, epoch: int, sample: int, attempt: int) -> int:
        """Another sample id from the shuffle window in which a sample lies (it may be the same where that is small)."""
        shards = self._shards(epoch)
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        rank = int(shards.ranks[shard])
        position = int(shards.ends[rank] - self.sizes[shard]) + sample - int(self.starts[shard])
        base, remainder = divmod(self.total, self.lanes)
        lane = position // (base + 1) if position < remainder * (base + 1) else (position - remainder) // base
        first = lane * base + min(lane, remainder)
        window = self._window(epoch, lane, (position - first) // self.window)
        return int(window[hash_key(self.seed, "substitute", epoch, sample, attempt) % len(window)])

    def _window(self, epoch: int, lane: int, number: int) -> np.ndarray:
        """The sample ids of one window in their shuffled order."""
        key = (epoch, lane, number)
        if key not in self._windows:
            base, remainder = divmod(self.total, self.lanes)
            first = lane * base + min(lane, remainder) + number * self.window
            last = (lane + 1) * base + min(lane + 1, remainder)
            count = min(self.window, last - first)
            positions = first + permutation(hash_key(self.seed, "window", epoch, lane, number), count)
            self._windows[key] = self._ids(epoch, positions)
            while len(self._windows) > 2 * self.lanes:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _shards(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            order = permutation(hash_key(self.seed, "shards", epoch), len(self.sizes))
            self._epochs[epoch] = _Epoch(order, np.argsort(order), np.cumsum(self.sizes[order]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids at places of the epoch's shard order."""
        shards = self._shards(epoch)
        shard_ranks = np.searchsorted(shards.ends, positions, side="right")
        shard = shards.order[shard_ranks]
        return self.starts[shard] + positions - (shards.ends[shard_ranks] - self.sizes[shard])


def sequential_plan(samples: int, batch: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    """Evaluation: this rank's batches over samples 0..N-1, each once, padded at the end with id -1; epoch is 0.

    All ranks get the same number of batches.
    """
    steps = -(-samples // (batch * world))
    ids = np.full(steps * batch * world, -1, dtype=np.int64)
    ids[:samples] = np.arange(samples)
    rank_ids = ids.reshape(steps, world, batch)[:, rank]
    return [[(0, int(i)) for i in row] for row in rank_ids]
