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
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.decode import BadImage, decode_jpeg, decode_other, jpeg_size
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.workers import report_current_sample
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch
from ssl_vit.rng import sample_seed

MIN_TOLERATED_FAULTS, TOLERATED_FAULT_RATE = 10, 1e-4  # borne in an epoch: this many, or this share of its samples
MAX_CONSECUTIVE_FAULTS = 100


def printable(text: str) -> str:
    """Text that may come from a hostile file, fit for a terminal and a log: no control characters, no surrogates."""
    return "".join(char if char.isprintable() else "?" for char in text)


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
        self.pending: list[Fault] = []  # since they were last taken
        self.num_consecutive = 0
        self.fatal: ExitError | None = None  # a failure that no substitute cures

    def record(self, samples: int, faults: list[Fault]) -> None:
        """Note a batch of so many samples, and the faults among them."""
        self.pending += faults
        bad = {fault.slot for fault in faults}
        for slot in range(samples):
            self.num_consecutive = self.num_consecutive + 1 if slot in bad else 0

    def drain(self) -> list[Fault]:
        """The faults since the last call."""
        faults, self.pending = self.pending, []
        return faults


def tolerated_faults(epoch_samples: int, max_faults: int | None) -> int:
    """How many faults of an epoch are borne, over all processes."""
    return max(MIN_TOLERATED_FAULTS, int(TOLERATED_FAULT_RATE * epoch_samples)) if max_faults is None else max_faults


MAX_OPEN_SHARDS = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # file handles a process keeps
TRIES, PAUSE = 5, 0.1  # of an operation of the disk that fails, and seconds before the second try, then doubled
PERMANENT_ERRNOS = (errno.ENOTDIR, errno.EISDIR, errno.EACCES)  # failures that no other try cures
SampleIds = list[tuple[int, int]]
"""(epoch, sample id); id -1 is padding."""
BatchAndFaults = tuple[Batch, list[Fault]]
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
    max_bad_samples: int | None = Field(
        default=None, ge=0, description="damaged samples borne in an epoch (none: 10, or 0.01 % where that is more)"
    )
    image_size: int | tuple[int, int] = Field(default=224, description="input size, pixels: one side, or H,W")
    crop_area: tuple[float, float] = Field(
        default=(0.05, 1.0), description="share of the area that a random crop takes"
    )
    crop: Literal["random", "none"] = Field(
        default="random",
        description="random, and central in evaluation; or none: the whole image, resized to the input size",
    )
    flip: bool = Field(default=True, description="mirror half of the training images")
    eval_crop: float = Field(
        default=0.875, gt=0, le=1, description="side of the central crop in evaluation, of the short side"
    )
    subset: float = Field(
        default=1.0, gt=0, le=1, description="share of the training samples to use; smaller are nested in larger"
    )
    holdout: float = Field(
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
    shuffle_window: int = Field(default=4, ge=1, description="shards in a shuffle window of a lane")

    @field_validator("image_size")
    @classmethod
    def _is_positive(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError("a side has at least one pixel")
        return size

    @field_validator("auto_augment")
    @classmethod
    def _is_known_augmentation(cls, name: str | None) -> str | None:
        if name and not re.match(r"(rand|augmix|original|v0|3a)", name):
            raise ValueError("timm's names begin with rand, augmix, original, v0 or 3a; such as rand-m9-mstd0.5-inc1")
        if name:
            try:
                augment.timm_transform(name, 224)
            except Exception as error:  # timm asserts, or lets float() fail
                raise ValueError(f"timm does not know it ({error}); such as rand-m9-mstd0.5-inc1") from error
        return name

    @field_validator("crop_area")
    @classmethod
    def _is_area_range(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("two shares within 0 and 1, the smaller first, such as 0.05,1")
        return area

    @property
    def cache_dir(self) -> CacheDir:
        """The cache of remote shards."""
        max_bytes = int(self.cache_gb * 1e9)
        return CacheDir(Path(self.cache).expanduser(), max_bytes) if self.cache else CacheDir(max_bytes=max_bytes)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width, pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def pixel_bytes(self, images: int) -> int:
        """Bytes of the pixels of so many images."""
        return 3 * images * self.image_hw[0] * self.image_hw[1]


class SampleDataset(Dataset[Any]):
    """Samples by (epoch, id), whole batches at a time: image, label, seed, valid.

    A sample that cannot be had is replaced by the first of its `substitutes` that can, under its own seed; where there
    is none it is left out (valid=False). A fault that no other sample cures, such as a source that stays away, is a
    ExitError.
    """

    def __init__(
        self, manifest: Manifest, config: Data, seed: int, training: bool, substitutes: Substitutes | None = None
    ):
        self.manifest, self.config, self.seed, self.training = manifest, config, seed, training
        self.substitutes = substitutes
        self._shards: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        window = (
            2 * config.lanes * config.shuffle_window
        )  # of a cache: a file that is open takes disk when it was deleted
        self._max_open = (
            min(MAX_OPEN_SHARDS, window) if manifest.shards and manifest.remote_files(0) else MAX_OPEN_SHARDS
        )
        self._failed_shards: dict[int, str] = {}  # shards that could not be opened, and why

    def __getitems__(self, sample_ids: SampleIds) -> BatchAndFaults | ExitError:
        """A batch; or, as a value, why there is none: an exception would not leave a worker in one line."""
        try:
            return self.batch(sample_ids)
        except ExitError as error:
            return error

    def batch(self, sample_ids: SampleIds) -> BatchAndFaults:
        """The samples of these keys, and the faults among them; raises ExitError."""
        batch, faults = self._empty_arrays(len(sample_ids)), []
        for slot, (epoch, sample) in enumerate(sample_ids):
            if sample < 0:
                continue  # padding
            report_current_sample(sample)
            seed = sample_seed(self.seed, epoch, sample)
            try:
                image, label = self.load_sample(sample, seed)
            except BadSample as error:
                substitute, image, label = self._load_substitute(epoch, sample, seed)
                faults.append(Fault(slot, epoch, sample, substitute, str(error)))
                if substitute is None:
                    continue
            batch["image"][slot] = image.permute(1, 2, 0).numpy()
            batch["label"][slot], batch["seed"][slot], batch["valid"][slot] = label, seed, True
        batch["image"][~batch["valid"]] = 0
        return _to_tensors(batch), faults

    def empty(self, count: int) -> Batch:
        """A batch in which nothing is valid."""
        batch = self._empty_arrays(count)
        batch["image"][:] = 0
        return _to_tensors(batch)

    def _empty_arrays(self, count: int) -> dict[str, np.ndarray]:
        """A batch in which nothing is valid and the pixels are any."""
        return {
            "image": np.empty((count, *self.config.image_hw, 3), np.uint8),
            "label": np.full(count, -1),
            "seed": np.zeros(count, np.int64),
            "valid": np.zeros(count, bool),
        }

    def _load_substitute(self, epoch: int, sample: int, seed: int) -> tuple[int | None, torch.Tensor, int]:
        """The first substitute that can be had, its image and its label."""
        for substitute in self.substitutes(epoch, sample) if self.substitutes else ():
            try:
                return substitute, *self.load_sample(substitute, seed)
            except BadSample:
                continue
        return None, torch.empty(0), -1

    def load_sample(self, sample: int, seed: int) -> tuple[torch.Tensor, int]:
        """The augmented image and the label of a sample; raises BadSample."""
        data, label = self.read_sample(sample)
        try:
            return self.crop(data, seed), label
        except BadImage as error:
            raise BadSample(f"{self.describe_sample(sample)} cannot be decoded: {error}") from error

    def read_sample(self, sample: int) -> tuple[bytes, int]:
        """The image bytes and the label of a sample; raises BadSample where they are damaged or gone."""
        shard = self._shard_of(sample)
        for attempt in range(2):  # what was damaged on its way is whole when it is read again
            if shard in self._failed_shards:
                raise BadSample(self._failed_shards[shard])
            handle, rows = self._open_shard(shard)
            offset, size, label, crc = rows[sample - int(self.manifest.starts[shard])].item()
            try:
                data = self._retry_io(sample, lambda h=handle, s=size, o=offset: os.pread(h, s, o))
                if len(data) == size and zlib.crc32(data) == crc:
                    return data, label
                reason = "its checksum differs" if len(data) == size else "the shard is too short"
                raise BadSample(f"{self.describe_sample(sample)} is damaged ({reason})")
            except BadSample:
                self._close_shard(shard)
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def _retry_io(self, sample: int, operation: Callable[[], Any]) -> Any:
        """Do what the disk may fail at; raises BadSample where it keeps failing."""
        for attempt in range(TRIES):
            try:
                return operation()
            except OSError as error:
                if attempt == TRIES - 1 or error.errno in PERMANENT_ERRNOS:
                    raise BadSample(f"{self.describe_sample(sample)} cannot be read: {error.strerror}") from error
                time.sleep(PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _shard_of(self, sample: int) -> int:
        return int(np.searchsorted(self.manifest.starts, sample, side="right")) - 1

    def describe_sample(self, sample: int) -> str:
        """The shard that a sample lies in, and its number there."""
        shard = self._shard_of(sample)
        return f"{self.manifest.describe_shard(shard)}: sample {sample - int(self.manifest.starts[shard])}"

    def crop(self, data: bytes, seed: int) -> torch.Tensor:
        """The augmented image, uint8 [3, h, w]; raises BadImage."""
        image = self._decode_and_crop(data, seed)
        if self.training and self.config.auto_augment:
            image = augment.timm_augment(image, self.config.auto_augment, seed)
        return image

    def _decode_and_crop(self, data: bytes, seed: int) -> torch.Tensor:
        """Decoded at half its size where the crop is large enough for it."""
        size = self.config.image_hw
        flip = self.training and self.config.flip and augment.should_flip(seed)
        full = jpeg_size(data)
        if full is None:
            pixels = decode_other(data)
            return augment.crop_and_resize(pixels, self.crop_box(pixels.shape[0], pixels.shape[1], seed), size, flip)
        box = self.crop_box(*full, seed)
        use_half = box.height >= 2 * size[0] and box.width >= 2 * size[1]
        pixels = decode_jpeg(data, full, 2 if use_half else 1)
        is_halved = pixels.shape[:2] != full
        return augment.crop_and_resize(pixels, box.halved() if is_halved else box, size, flip)

    def crop_box(self, height: int, width: int, seed: int) -> augment.Box:
        """The part of an image that is used: a random one in training, else the central one."""
        if self.config.crop == "none":
            return augment.Box(0, 0, height, width)
        if self.training:
            return augment.random_box(height, width, self.config.crop_area, seed)
        size = self.config.image_hw
        ratio = size[1] / size[0]
        return augment.central_box(height, width, (ratio, ratio), self.config.eval_crop)

    def _open_shard(self, shard: int) -> tuple[int, np.ndarray]:
        if shard not in self._shards:
            first = int(self.manifest.starts[shard])
            try:
                rows = self.manifest.index(shard)
                handle = self._retry_io(first, lambda: os.open(self.manifest.tar(shard), os.O_RDONLY | os.O_NONBLOCK))
                self._shards[shard] = handle, rows
            except (BadSample, remote.RemoteMismatch, ExitError) as error:
                if isinstance(error, ExitError) and error.code != ExitCode.DATA:
                    raise
                self._failed_shards[shard] = str(error)
                raise BadSample(str(error)) from error
            if len(self._shards) > self._max_open:
                self._close_shard(next(iter(self._shards)))
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _close_shard(self, shard: int) -> None:
        os.close(self._shards.pop(shard)[0])


def _to_tensors(batch: dict[str, np.ndarray]) -> Batch:
    """A batch of tensors; the image [B, 3, h, w] keeps its rows of pixels: the device makes planes of them for less."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    return tensors | {"image": tensors["image"].permute(0, 3, 1, 2)}
