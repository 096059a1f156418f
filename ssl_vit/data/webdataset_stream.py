"""Tars without a manifest, streamed by webdataset's own pipeline: a quick look, neither exact nor exactly resumable.

What is ours in it closes its traps: shards are dealt anew each epoch over all workers of all processes, without an end,
so that every process takes as many steps; tars are walked and images decoded by us, and no other member is; nothing is
unpickled and no shell is started. webdataset puts the members together to samples.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ssl_vit.data import remote, tar
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.dataset import MAX_CONSECUTIVE_FAULTS, BatchAndFaults, Data, Fault, Faults, SampleDataset, printable
from ssl_vit.data.decode import BadImage
from ssl_vit.data.loader import ProcessShard, collect_bad_samples, prefetch_to_device
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Damage, Member, iter_members
from ssl_vit.data.workers import worker_batches
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch
from ssl_vit.rng import hash_key, permutation

BUFFER, BUFFER_BYTES = 1000, 1 << 28  # samples, and bytes of them, among which a worker shuffles
MAX_IMAGE_BYTES = 1 << 25  # of an image
MAX_REASON_CHARS = 400  # characters of a fault
NUM_PROBED_MEMBERS = 64  # members by whose names the keys of a tar are judged
EPOCH_SAMPLES = 1_000_000  # samples: how many there are is not known, and bad ones are counted in so many


@dataclass(frozen=True)
class TarList:
    """Tars of which nothing is known but their names."""

    names: list[str]
    cache_dir: CacheDir
    classes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.names[0]} and {len(self.names) - 1} more tars" if len(self.names) > 1 else self.names[0]

    def path(self, number: int) -> Path:
        """A local path of a tar, fetched first where it is remote."""
        name = self.names[number]
        if not remote.is_url(name):
            return Path(name)
        folder, _, file = name.rpartition("/")
        return self.cache_dir.cache_for(folder).fetch(file, None, "")


def list_tars(patterns: tuple[str, ...], cache_dir: CacheDir) -> TarList:
    """The tars that folders, URLs and patterns name; ExitError where there are none, or webdataset is missing."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ExitError(
            ExitCode.USAGE, "data.reader=webdataset: it is not installed: pip install 'ssl_vit[webdataset]'"
        ) from error
    names = []
    for pattern in patterns:
        root, tar_names = tar.find_shards(pattern)
        names += [f"{root}/{name}" for name in tar_names]
    return TarList(names, cache_dir)


class SequentialStream:
    """Training data of one process, from tars read from their beginning to their end."""

    epoch_samples = EPOCH_SAMPLES

    def __init__(self, source: TarList, config: Data, seed: int, batch: int):
        self.source, self.config, self.seed, self.batch = source, config, seed, batch
        self.samples = SampleDataset(
            Manifest(Path(), {}, [], []), config, seed, training=True
        )  # for its decoding and crop
        self.faults = Faults()
        self.identity = hashlib.sha256("\n".join(source.names).encode(errors="surrogateescape")).hexdigest()

    def batches(self, samples_seen: int, shard: ProcessShard, device: torch.device) -> Iterator[Batch]:
        """Micro batches on the device; after a resumption at `seen` samples the order is a new one."""
        size = self.config.pixel_bytes(shard.micro_batch)
        answers = worker_batches(
            _Reader(self, samples_seen, shard), self.config.workers, self.config.timeout, size, device
        )
        yield from prefetch_to_device(
            collect_bad_samples(answers, self.samples, shard.micro_batch, self.faults), device
        )

    def names(self, batch: int) -> list[tuple[int, int]]:
        """The samples of a batch: nobody knows them here."""
        del batch
        return []

    def first(self, count: int) -> Batch:
        """A few samples, for a picture."""
        return next(self.batches(0, ProcessShard(micro_batch=count), torch.device("cpu")))


class _Reader(IterableDataset[BatchAndFaults | ExitError]):
    """One worker's micro batches, without an end."""

    def __init__(self, stream: SequentialStream, samples_seen: int, shard: ProcessShard):
        self.stream, self.samples_seen, self.shard = stream, samples_seen, shard
        self._current_tar = ""  # that is read
        self._num_tars_since_image = 0  # tars since the last image

    def __iter__(self) -> Iterator[BatchAndFaults | ExitError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        worker_index = self.shard.rank * workers + number
        try:
            yield from self._batches(worker_index, self.shard.world * workers)
        except ExitError as error:
            yield error

    def _batches(self, worker_index: int, num_workers: int) -> Iterator[BatchAndFaults]:
        import webdataset

        stream, faults = self.stream, []
        members = self._members(islice(self._tar_order(), worker_index, None, num_workers), faults)
        handler = partial(self._handle, faults)
        samples = webdataset.tariterators.group_by_keys(members, handler=handler)
        shuffled = _shuffle(samples, Random(hash_key(stream.seed, "shuffle", self.samples_seen, worker_index)))
        batch, slot, num_consecutive = stream.samples.empty(self.shard.micro_batch), 0, 0
        for number, sample in enumerate(shuffled):
            seed = hash_key(stream.seed, "sequential", self.samples_seen, worker_index, number) >> 1
            try:
                image = stream.samples.crop(_image_bytes(sample), seed)
            except BadImage as error:
                self._record_fault(faults, f"{sample['__key__']} cannot be used: {error}", sample["__url__"])
                num_consecutive += 1
                if num_consecutive >= MAX_CONSECUTIVE_FAULTS:
                    raise ExitError(
                        ExitCode.DATA, f"{faults[-1].reason}; it is the {MAX_CONSECUTIVE_FAULTS}th in a row"
                    ) from error
                continue
            batch["image"][slot], batch["seed"][slot], batch["valid"][slot] = image, seed, True
            num_consecutive, slot = 0, slot + 1
            if slot == self.shard.micro_batch:
                yield batch, faults.copy()
                batch, slot = stream.samples.empty(slot), 0
                faults.clear()

    def _tar_order(self) -> Iterator[int]:
        """The numbers of all tars, shuffled anew in each epoch, for all workers together."""
        for epoch in count():
            yield from permutation(
                hash_key(self.stream.seed, "tars", self.samples_seen, epoch), len(self.stream.source.names)
            ).tolist()

    def _members(self, numbers: Iterator[int], faults: list[Fault]) -> Iterator[dict[str, Any]]:
        """The images of tars, for webdataset: its own opening may start a shell, and its own walk ends at damage."""
        for number in numbers:
            self._current_tar = self.stream.source.names[number]
            self._num_tars_since_image += 1
            if self._num_tars_since_image > 2 * len(self.stream.source.names) + 1:
                raise ExitError(
                    ExitCode.DATA,
                    f"{printable(self._current_tar)}: no image can be used, neither here nor in the other tars",
                )
            try:
                path = self.stream.source.path(number)
                if not path.is_file():
                    raise FileNotFoundError(0, "is no file")
                yield from self._iter_images(path, faults)
                yield {}  # the end of the tar: its last sample is complete
            except (OSError, remote.RemoteMismatch) as error:
                self._record_fault(faults, getattr(error, "strerror", None) or str(error))

    def _iter_images(self, path: Path, faults: list[Fault]) -> Iterator[dict[str, Any]]:
        probed_names = [
            item.name for item in islice(iter_members(path), NUM_PROBED_MEMBERS) if isinstance(item, Member)
        ]
        split_at_first = any(tar.split_key(name, first=True)[1] in tar.IMAGE_SUFFIXES for name in probed_names)
        with path.open("rb") as file:
            for item in iter_members(path):
                if isinstance(item, Damage):
                    self._record_fault(faults, f"at byte {item.offset}: {item.reason}")
                    continue
                stem, suffix = tar.split_key(
                    item.name, first=split_at_first
                )  # keys may have dots, as in val.00001.JPEG
                if suffix not in tar.IMAGE_SUFFIXES or not stem.rpartition("/")[2]:
                    continue
                if item.size > MAX_IMAGE_BYTES:
                    self._record_fault(
                        faults, f"{item.name} has {item.size} bytes, over the limit of {MAX_IMAGE_BYTES}"
                    )
                else:
                    self._num_tars_since_image = 0
                    data = os.pread(file.fileno(), item.size, item.offset)
                    yield {"fname": f"{stem.replace('.', '_')}.{suffix}", "data": data, "__url__": self._current_tar}

    def _handle(self, faults: list[Fault], error: Exception) -> bool:
        """What webdataset met in a tar is counted, and the member passed over."""
        if isinstance(error, (ExitError, MemoryError)):
            raise error
        self._record_fault(faults, " ".join(str(part) for part in error.args if part is not None))
        return True

    def _record_fault(self, faults: list[Fault], reason: str, tar_name: str | None = None) -> None:
        faults.append(
            Fault(-1, 0, -1, None, printable(f"{tar_name or self._current_tar}: {reason}")[:MAX_REASON_CHARS])
        )


def _shuffle(samples: Iterator[dict[str, Any]], random: Random) -> Iterator[dict[str, Any]]:
    """An endless stream in a random order; webdataset's own shuffle counts samples only, however large they are."""
    buffer: list[tuple[int, dict[str, Any]]] = []
    buffer_bytes = 0
    for sample in samples:
        size = sum(len(value) for value in sample.values() if isinstance(value, bytes))
        buffer.append((size, sample))
        buffer_bytes += size
        while len(buffer) >= BUFFER or buffer_bytes > BUFFER_BYTES:
            index = random.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            size, shuffled_sample = buffer.pop()
            buffer_bytes -= size
            yield shuffled_sample


def _image_bytes(sample: dict[str, Any]) -> bytes:
    for suffix, data in sample.items():
        if suffix in tar.IMAGE_SUFFIXES:
            return data
    raise BadImage("has no image")
