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
from ssl_vit.data.cache import Store
from ssl_vit.data.dataset import IN_A_ROW, Data, Fault, Faults, Made, Samples, printable
from ssl_vit.data.decode import BadImage
from ssl_vit.data.loader import Share, accepted, on_device
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.tar import Damage, Member, walk
from ssl_vit.data.workers import loaded
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.model import Batch
from ssl_vit.rng import key, permutation

BUFFER, BUFFER_BYTES = 1000, 1 << 28  # samples, and bytes of them, among which a worker shuffles
MAX_BYTES = 1 << 25  # of an image
SHOWN = 400  # characters of a fault
SOME = 64  # members by whose names the keys of a tar are judged
EPOCH = 1_000_000  # samples: how many there are is not known, and bad ones are counted in so many


@dataclass(frozen=True)
class Tars:
    """Tars of which nothing is known but their names."""

    names: list[str]
    store: Store
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
        return self.store.of(folder).fetch(file, None, "")


def tars(patterns: tuple[str, ...], store: Store) -> Tars:
    """The tars that folders, URLs and patterns name; raises Refusal where there are none, or webdataset is missing."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise Refusal(
            USAGE, "data.reader=webdataset: it is not installed: pip install 'ssl_vit[webdataset]'"
        ) from error
    names = []
    for pattern in patterns:
        root, found = tar.find(pattern)
        names += [f"{root}/{name}" for name in found]
    return Tars(names, store)


class SequentialStream:
    """Training data of one process, from tars read from their beginning to their end."""

    epoch_samples = EPOCH

    def __init__(self, source: Tars, config: Data, seed: int, batch: int):
        self.source, self.config, self.seed, self.batch = source, config, seed, batch
        self.samples = Samples(Manifest(Path(), {}, [], []), config, seed, training=True)  # for its decoding and crop
        self.faults = Faults()
        self.identity = hashlib.sha256("\n".join(source.names).encode(errors="surrogateescape")).hexdigest()

    def batches(self, seen: int, share: Share, device: torch.device) -> Iterator[Batch]:
        """Micro batches on the device; after a resumption at `seen` samples the order is a new one."""
        size = self.config.bytes(share.micro_batch)
        made = loaded(_Reader(self, seen, share), self.config.workers, self.config.timeout, size, device)
        yield from on_device(accepted(made, self.samples, share.micro_batch, self.faults), device)

    def names(self, batch: int) -> list[tuple[int, int]]:
        """The samples of a batch: nobody knows them here."""
        del batch
        return []

    def first(self, count: int) -> Batch:
        """A few samples, for a picture."""
        return next(self.batches(0, Share(micro_batch=count), torch.device("cpu")))


class _Reader(IterableDataset[Made | Refusal]):
    """One worker's micro batches, without an end."""

    def __init__(self, stream: SequentialStream, seen: int, share: Share):
        self.stream, self.seen, self.share = stream, seen, share
        self._tar = ""  # that is read
        self._barren = 0  # tars since the last image

    def __iter__(self) -> Iterator[Made | Refusal]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place = self.share.rank * workers + number
        try:
            yield from self._batches(place, self.share.world * workers)
        except Refusal as refusal:
            yield refusal

    def _batches(self, place: int, of: int) -> Iterator[Made]:
        import webdataset

        stream, faults = self.stream, []
        members = self._members(islice(self._dealt(), place, None, of), faults)
        handler = partial(self._handle, faults)
        samples = webdataset.tariterators.group_by_keys(members, handler=handler)
        shuffled = _shuffled(samples, Random(key(stream.seed, "shuffle", self.seen, place)))
        batch, slot, in_a_row = stream.samples.empty(self.share.micro_batch), 0, 0
        for number, sample in enumerate(shuffled):
            seed = key(stream.seed, "sequential", self.seen, place, number) >> 1
            try:
                image = stream.samples.crop(_image(sample), seed)
            except BadImage as error:
                self._note(faults, f"{sample['__key__']} cannot be used: {error}", sample["__url__"])
                in_a_row += 1
                if in_a_row >= IN_A_ROW:
                    raise Refusal(DATA, f"{faults[-1].reason}; it is the {IN_A_ROW}th in a row") from error
                continue
            batch["image"][slot], batch["seed"][slot], batch["valid"][slot] = image, seed, True
            in_a_row, slot = 0, slot + 1
            if slot == self.share.micro_batch:
                yield batch, faults.copy()
                batch, slot = stream.samples.empty(slot), 0
                faults.clear()

    def _dealt(self) -> Iterator[int]:
        """The numbers of all tars, shuffled anew in each epoch, for all workers together."""
        for epoch in count():
            yield from permutation(
                key(self.stream.seed, "tars", self.seen, epoch), len(self.stream.source.names)
            ).tolist()

    def _members(self, numbers: Iterator[int], faults: list[Fault]) -> Iterator[dict[str, Any]]:
        """The images of tars, for webdataset: its own opening may start a shell, and its own walk ends at damage."""
        for number in numbers:
            self._tar = self.stream.source.names[number]
            self._barren += 1
            if self._barren > 2 * len(self.stream.source.names) + 1:
                raise Refusal(DATA, f"{printable(self._tar)}: no image can be used, neither here nor in the other tars")
            try:
                path = self.stream.source.path(number)
                if not path.is_file():
                    raise FileNotFoundError(0, "is no file")
                yield from self._of_tar(path, faults)
                yield {}  # the end of the tar: its last sample is complete
            except (OSError, remote.BadSource) as error:
                self._note(faults, getattr(error, "strerror", None) or str(error))

    def _of_tar(self, path: Path, faults: list[Fault]) -> Iterator[dict[str, Any]]:
        some = [item.name for item in islice(walk(path), SOME) if isinstance(item, Member)]
        plain = any(tar.cut(name, first=True)[1] in tar.IMAGES for name in some)
        with path.open("rb") as file:
            for item in walk(path):
                if isinstance(item, Damage):
                    self._note(faults, f"at byte {item.offset}: {item.reason}")
                    continue
                stem, suffix = tar.cut(item.name, first=plain)  # keys may have dots, as in val.00001.JPEG
                if suffix not in tar.IMAGES or not stem.rpartition("/")[2]:
                    continue
                if item.size > MAX_BYTES:
                    self._note(faults, f"{item.name} has {item.size} bytes, over the limit of {MAX_BYTES}")
                else:
                    self._barren = 0
                    data = os.pread(file.fileno(), item.size, item.offset)
                    yield {"fname": f"{stem.replace('.', '_')}.{suffix}", "data": data, "__url__": self._tar}

    def _handle(self, faults: list[Fault], error: Exception) -> bool:
        """What webdataset met in a tar is counted, and the member passed over."""
        if isinstance(error, (Refusal, MemoryError)):
            raise error
        self._note(faults, " ".join(str(part) for part in error.args if part is not None))
        return True

    def _note(self, faults: list[Fault], reason: str, tar: str | None = None) -> None:
        faults.append(Fault(-1, 0, -1, None, printable(f"{tar or self._tar}: {reason}")[:SHOWN]))


def _shuffled(samples: Iterator[dict[str, Any]], random: Random) -> Iterator[dict[str, Any]]:
    """An endless stream in a random order; webdataset's own shuffle counts samples only, however large they are."""
    kept: list[tuple[int, dict[str, Any]]] = []
    held = 0
    for sample in samples:
        size = sum(len(value) for value in sample.values() if isinstance(value, bytes))
        kept.append((size, sample))
        held += size
        while len(kept) >= BUFFER or held > BUFFER_BYTES:
            chosen = random.randrange(len(kept))
            kept[chosen], kept[-1] = kept[-1], kept[chosen]
            size, one = kept.pop()
            held -= size
            yield one


def _image(sample: dict[str, Any]) -> bytes:
    for suffix, data in sample.items():
        if suffix in tar.IMAGES:
            return data
    raise BadImage("has no image")
