"""Samples of shards by number: read, decoded, cropped, and what is done with those that are bad."""

import errno
import os
import re
import resource
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.utils.data import Dataset

from ssl_vit.config import Config
from ssl_vit.data import augment, remote
from ssl_vit.data.cache import Store
from ssl_vit.data.decode import BadImage, decode_jpeg, decode_other, jpeg_size
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.workers import now_at
from ssl_vit.errors import DATA, Refusal
from ssl_vit.model import Batch
from ssl_vit.rng import sample_seed

FEWEST, SHARE = 10, 1e-4  # borne in an epoch: this many, or this share of its samples
IN_A_ROW = 100


def printable(text: str) -> str:
    """Text that may come from a hostile file, fit for a terminal and a log: no control characters, no surrogates."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class BadSample(Exception):
    """A sample whose bytes are damaged or gone; the text says where and why."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be had, where it lies and why; `substitute` is the sample that took its place."""

    slot: int  # in its batch
    epoch: int
    sample: int
    substitute: int | None
    reason: str


class Faults:
    """The faults that one process met, in the order of its samples."""

    def __init__(self) -> None:
        self.fresh: list[Fault] = []  # since they were last taken
        self.in_a_row = 0
        self.fatal: Refusal | None = None  # a failure that no substitute cures

    def met(self, samples: int, faults: list[Fault]) -> None:
        """Note a batch of so many samples, and the faults among them."""
        self.fresh += faults
        bad = {fault.slot for fault in faults}
        for slot in range(samples):
            self.in_a_row = self.in_a_row + 1 if slot in bad else 0

    def take(self) -> list[Fault]:
        """The faults since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh


def borne(epoch_samples: int, most: int | None) -> int:
    """How many faults of an epoch are borne, over all processes."""
    return max(FEWEST, int(SHARE * epoch_samples)) if most is None else most


OPEN_SHARDS = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # file handles a process keeps
TRIES, PAUSE = 5, 0.1  # of an operation of the disk that fails, and seconds before the second try, then doubled
LASTING = (errno.ENOTDIR, errno.EISDIR, errno.EACCES)  # failures that no other try cures
Keys = list[tuple[int, int]]
"""(epoch, sample id); id -1 is padding."""
Made = tuple[Batch, list[Fault]]
Substitutes = Callable[[int, int], Iterator[int]]
"""(epoch, sample id) -> samples to take in its place, one after the other; the same on any process."""


class Data(Config):
    """Where the images are and how they reach the encoder."""

    train: tuple[str, ...] | None = Field(
        default=None,
        description="shards to train on: a folder, a URL (s3://, gs://, https://, hf://), or several with commas; "
        "or a folder of images, which is converted first",
    )
    val: tuple[str, ...] | None = Field(
        default=None, description="shards or images to evaluate on, as for train (none: no evaluation)"
    )
    reader: Literal["indexed", "webdataset"] = Field(
        default="indexed",
        description="webdataset streams tars that have no manifest; neither exactly once nor exactly resumable",
    )
    cache: str | None = Field(default=None, description="this node's folder for remote shards (none: ~/.cache/ssl_vit)")
    cache_gb: float = Field(default=100.0, gt=0, description="most that the cache may hold, 10^9 bytes")
    verify: bool = Field(default=False, description="compare every shard's sha256 with the manifest before training")
    max_bad: int | None = Field(
        default=None, ge=0, description="damaged samples borne in an epoch (none: 10, or 0.01 % where that is more)"
    )
    image_size: int | tuple[int, int] = Field(default=224, description="input size, pixels: one side, or H,W")
    crop_area: tuple[float, float] = Field(
        default=(0.05, 1.0), description="share of the area that a random crop takes"
    )
    whole: bool = Field(
        default=False,
        description="the whole image, squeezed to the input size, in the place of any crop",
    )
    flip: bool = Field(default=True, description="mirror half of the training images")
    eval_crop: float = Field(
        default=0.875, gt=0, le=1, description="side of the central crop in evaluation, of the short side"
    )
    subset: float = Field(
        default=1.0, gt=0, le=1, description="share of the training samples to use; smaller are nested in larger"
    )
    hold_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of these that is not trained on, and is evaluated on in the place of data.val",
    )
    empty_classes: bool = Field(
        default=False, description="let classes without a training image pass, as benchmarks of few labels have them"
    )
    auto_augment: str | None = Field(
        default=None, description="timm's RandAugment or AutoAugment of the crops, such as rand-m9-mstd0.5-inc1"
    )
    workers: int | None = Field(
        default=None, ge=0, description="loader processes a training process (none: by the cores)"
    )
    timeout: float = Field(default=600, gt=0, description="seconds that a loader process may take for a batch")
    lanes: int = Field(default=16, ge=1, description="shards read side by side")
    window: int = Field(default=4, ge=1, description="shards in a shuffle window of a lane")

    @field_validator("image_size")
    @classmethod
    def _has_pixels(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError("a side has at least one pixel")
        return size

    @field_validator("auto_augment")
    @classmethod
    def _is_timms(cls, name: str | None) -> str | None:
        if name and not re.match(r"(rand|augmix|original|v0|3a)", name):
            raise ValueError("timm's names begin with rand, augmix, original, v0 or 3a; such as rand-m9-mstd0.5-inc1")
        if name:
            try:
                augment.timms(name, 224)
            except Exception as error:  # timm asserts, or lets float() fail
                raise ValueError(f"timm does not know it ({error}); such as rand-m9-mstd0.5-inc1") from error
        return name

    @field_validator("crop_area")
    @classmethod
    def _is_a_share(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("two shares within 0 and 1, the smaller first, such as 0.05,1")
        return area

    @property
    def store(self) -> Store:
        """The cache of remote shards."""
        room = int(self.cache_gb * 1e9)
        return Store(Path(self.cache).expanduser(), room) if self.cache else Store(room=room)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width, pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def bytes(self, images: int) -> int:
        """Bytes of the pixels of so many images."""
        return 3 * images * self.image_hw[0] * self.image_hw[1]


class Samples(Dataset[Any]):
    """Samples by (epoch, id), whole batches at a time: image, label, seed, valid.

    A sample that cannot be had is replaced by the first of its `substitutes` that can, under its own seed; where there
    is none it is left out (valid=False). A fault that no other sample cures, such as a source that stays away, is a
    Refusal.
    """

    def __init__(
        self, manifest: Manifest, config: Data, seed: int, training: bool, substitutes: Substitutes | None = None
    ):
        self.manifest, self.config, self.seed, self.training = manifest, config, seed, training
        self.substitutes = substitutes
        self._shards: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        window = 2 * config.lanes * config.window  # of a cache: a file that is open takes disk when it was deleted
        self._most_open = min(OPEN_SHARDS, window) if manifest.shards and manifest.wanted(0) else OPEN_SHARDS
        self._lost: dict[int, str] = {}  # shards that could not be opened, and why

    def __getitems__(self, keys: Keys) -> Made | Refusal:
        """A batch; or, as a value, why there is none: an exception would not leave a worker in one line."""
        try:
            return self.batch(keys)
        except Refusal as refusal:
            return refusal

    def batch(self, keys: Keys) -> Made:
        """The samples of these keys, and the faults among them; raises Refusal."""
        batch, faults = self._empty(len(keys)), []
        for slot, (epoch, sample) in enumerate(keys):
            if sample < 0:
                continue  # padding
            now_at(sample)
            seed = sample_seed(self.seed, epoch, sample)
            try:
                image, label = self.sample(sample, seed)
            except BadSample as error:
                substitute, image, label = self._instead(epoch, sample, seed)
                faults.append(Fault(slot, epoch, sample, substitute, str(error)))
                if substitute is None:
                    continue
            batch["image"][slot] = image.permute(1, 2, 0).numpy()
            batch["label"][slot], batch["seed"][slot], batch["valid"][slot] = label, seed, True
        batch["image"][~batch["valid"]] = 0
        return _tensors(batch), faults

    def empty(self, count: int) -> Batch:
        """A batch in which nothing is valid."""
        batch = self._empty(count)
        batch["image"][:] = 0
        return _tensors(batch)

    def _empty(self, count: int) -> dict[str, np.ndarray]:
        """A batch in which nothing is valid and the pixels are any."""
        return {
            "image": np.empty((count, *self.config.image_hw, 3), np.uint8),
            "label": np.full(count, -1),
            "seed": np.zeros(count, np.int64),
            "valid": np.zeros(count, bool),
        }

    def _instead(self, epoch: int, sample: int, seed: int) -> tuple[int | None, torch.Tensor, int]:
        """The first substitute that can be had, its image and its label."""
        for substitute in self.substitutes(epoch, sample) if self.substitutes else ():
            try:
                return substitute, *self.sample(substitute, seed)
            except BadSample:
                continue
        return None, torch.empty(0), -1

    def sample(self, sample: int, seed: int) -> tuple[torch.Tensor, int]:
        """The augmented image and the label of a sample; raises BadSample."""
        data, label = self.read(sample)
        try:
            return self.crop(data, seed), label
        except BadImage as error:
            raise BadSample(f"{self.where(sample)} cannot be decoded: {error}") from error

    def read(self, sample: int) -> tuple[bytes, int]:
        """The image bytes and the label of a sample; raises BadSample where they are damaged or gone."""
        shard = self._shard_of(sample)
        for attempt in range(2):  # what was damaged on its way is whole when it is read again
            if shard in self._lost:
                raise BadSample(self._lost[shard])
            handle, rows = self._open(shard)
            offset, size, label, crc = rows[sample - int(self.manifest.starts[shard])].item()
            try:
                data = self._tried(sample, lambda h=handle, s=size, o=offset: os.pread(h, s, o))
                if len(data) == size and zlib.crc32(data) == crc:
                    return data, label
                why = "its checksum differs" if len(data) == size else "the shard is too short"
                raise BadSample(f"{self.where(sample)} is damaged ({why})")
            except BadSample:
                self._close(shard)
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def _tried(self, sample: int, operation: Callable[[], Any]) -> Any:
        """Do what the disk may fail at; raises BadSample where it keeps failing."""
        for attempt in range(TRIES):
            try:
                return operation()
            except OSError as error:
                if attempt == TRIES - 1 or error.errno in LASTING:
                    raise BadSample(f"{self.where(sample)} cannot be read: {error.strerror}") from error
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.manifest.starts, sample, side="right")) - 1

    def where(self, sample: int) -> str:
        """The shard that a sample lies in, and its number there."""
        shard = self._shard_of(sample)
        return f"{self.manifest.where(shard)}: sample {sample - int(self.manifest.starts[shard])}"

    def crop(self, data: bytes, seed: int) -> torch.Tensor:
        """The augmented image, uint8 [3, h, w]; raises BadImage."""
        image = self._cropped(data, seed)
        if self.training and self.config.auto_augment:
            image = augment.by_timm(image, self.config.auto_augment, seed)
        return image

    def _cropped(self, data: bytes, seed: int) -> torch.Tensor:
        """Decoded at half its size where the crop is large enough for it."""
        size = self.config.image_hw
        flip = self.training and self.config.flip and augment.flips(seed)
        full = jpeg_size(data)
        if full is None:
            pixels = decode_other(data)
            return augment.resized(pixels, self.box(pixels.shape[0], pixels.shape[1], seed), size, flip)
        box = self.box(*full, seed)
        half = box.height >= 2 * size[0] and box.width >= 2 * size[1]
        pixels = decode_jpeg(data, full, 2 if half else 1)
        halved = pixels.shape[:2] != full
        return augment.resized(pixels, box.halved() if halved else box, size, flip)

    def box(self, height: int, width: int, seed: int) -> augment.Box:
        """The part of an image that is used: a random one in training, else the central one."""
        if self.config.whole:
            return augment.Box(0, 0, height, width)
        if self.training:
            return augment.random_box(height, width, self.config.crop_area, seed)
        wanted = self.config.image_hw
        ratio = wanted[1] / wanted[0]
        return augment.central_box(height, width, (ratio, ratio), self.config.eval_crop)

    def _open(self, shard: int) -> tuple[int, np.ndarray]:
        if shard not in self._shards:
            first = int(self.manifest.starts[shard])
            try:
                rows = self.manifest.index(shard)
                handle = self._tried(first, lambda: os.open(self.manifest.tar(shard), os.O_RDONLY | os.O_NONBLOCK))
                self._shards[shard] = handle, rows
            except (BadSample, remote.BadSource, Refusal) as error:
                if isinstance(error, Refusal) and error.code != DATA:
                    raise
                self._lost[shard] = str(error)
                raise BadSample(str(error)) from error
            if len(self._shards) > self._most_open:
                self._close(next(iter(self._shards)))
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _close(self, shard: int) -> None:
        os.close(self._shards.pop(shard)[0])


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    """A batch of tensors; the image [B, 3, h, w] keeps its rows of pixels: the device makes planes of them for less."""
    made = {name: torch.from_numpy(value) for name, value in batch.items()}
    return made | {"image": made["image"].permute(0, 3, 1, 2)}
