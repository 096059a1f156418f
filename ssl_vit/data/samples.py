"""Samples by (epoch, id): read by offset, decoded, cropped; uint8 until they are on the device.

Nothing here keeps a state: everything about a sample follows from its epoch, its id and the run's seed.
"""

import os
import resource
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.utils.data import Dataset

from ssl_vit.config import Config
from ssl_vit.counter import sample_seed
from ssl_vit.data import augment
from ssl_vit.data.decode import BadImage, decode, jpeg_size
from ssl_vit.data.manifest import Manifest
from ssl_vit.exits import DATA, DISK, Refusal
from ssl_vit.model import Batch

OPEN_SHARDS = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # file handles a process keeps
Keys = list[tuple[int, int]]
"""(epoch, sample id); id -1 is padding."""


class Data(Config):
    """Where the images are and how they reach the encoder."""

    train: str | None = Field(
        default=None, description="shards to train on, or a folder of images, which is converted first"
    )
    val: str | None = Field(default=None, description="shards or images to evaluate on (none: no evaluation)")
    image_size: int | tuple[int, int] = Field(default=224, description="input size, pixels: one side, or H,W")
    crop_area: tuple[float, float] = Field(
        default=(0.05, 1.0), description="share of the area that a random crop takes"
    )
    flip: bool = Field(default=True, description="mirror half of the training images")
    eval_crop: float = Field(
        default=0.875, gt=0, le=1, description="side of the central crop in evaluation, of the short side"
    )
    subset: float = Field(
        default=1.0, gt=0, le=1, description="share of the training samples to use; smaller are nested in larger"
    )
    workers: int | None = Field(
        default=None, ge=0, description="loader processes a training process (none: by the cores)"
    )
    lanes: int = Field(default=16, ge=1, description="shards read side by side")
    window: int = Field(default=4, ge=1, description="shards in a shuffle window of a lane")

    @field_validator("image_size")
    @classmethod
    def _has_pixels(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError("a side has at least one pixel")
        return size

    @field_validator("crop_area")
    @classmethod
    def _is_a_share(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError("two shares within 0 and 1, the smaller first, such as 0.05,1")
        return area

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width, pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class Samples(Dataset[Any]):
    """Samples by (epoch, id), whole batches at a time: image, label, seed, valid."""

    def __init__(self, manifest: Manifest, config: Data, seed: int, training: bool):
        self.manifest, self.config, self.seed, self.training = manifest, config, seed, training
        self._shards: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __getitems__(self, keys: Keys) -> Batch | Refusal:
        """A batch; or, as a value, why there is none: an exception would not leave a worker in one line."""
        try:
            return self.batch(keys)
        except Refusal as refusal:
            return refusal

    def batch(self, keys: Keys) -> Batch:
        """The samples of these keys; raises Refusal where one cannot be had."""
        size = self.config.image_hw
        batch = {
            "image": torch.zeros(len(keys), 3, *size, dtype=torch.uint8),
            "label": torch.full((len(keys),), -1),
            "seed": torch.zeros(len(keys), dtype=torch.int64),
            "valid": torch.zeros(len(keys), dtype=torch.bool),
        }
        for slot, (epoch, sample) in enumerate(keys):
            if sample < 0:
                continue  # padding
            data, label = self.read(sample)
            seed = sample_seed(self.seed, epoch, sample)
            batch["image"][slot] = self.crop(data, seed, sample)
            batch["label"][slot], batch["seed"][slot], batch["valid"][slot] = label, seed, True
        return batch

    def read(self, sample: int) -> tuple[bytes, int]:
        """The image bytes and the label of a sample; raises Refusal(DATA) where the shard is damaged."""
        shard = int(np.searchsorted(self.manifest.starts, sample, side="right")) - 1
        handle, rows = self._open(shard)
        row = rows[sample - int(self.manifest.starts[shard])]
        path = self.manifest.folder / self.manifest.shards[shard].name
        try:
            data = os.pread(handle, int(row["size"]), int(row["offset"]))
        except OSError as error:
            raise Refusal(DISK, f"{path}: {error.strerror}; look after the disk and start again") from error
        if len(data) != row["size"] or zlib.crc32(data) != row["crc32"]:
            where = f"{path} at byte {row['offset']}"
            raise Refusal(DATA, f"{where}: sample {sample} is damaged (its checksum differs); convert the shard again")
        return data, int(row["label"])

    def crop(self, data: bytes, seed: int, sample: int) -> torch.Tensor:
        """The augmented image, uint8 [3, h, w]; decoded at half its size where the crop is large enough for it."""
        size = self.config.image_hw
        flip = self.training and self.config.flip and augment.flips(seed)
        try:
            full = jpeg_size(data)
            if full is None:
                pixels = decode(data)
                return augment.resized(pixels, self.box(pixels.shape[0], pixels.shape[1], seed), size, flip)
            box = self.box(*full, seed)
            half = box.height >= 2 * size[0] and box.width >= 2 * size[1]
            pixels = decode(data, half)
            halved = pixels.shape[:2] != full
            return augment.resized(pixels, box.halved() if halved else box, size, flip)
        except BadImage as error:
            raise Refusal(DATA, f"{self.manifest.folder}: sample {sample} cannot be decoded: {error}") from error

    def box(self, height: int, width: int, seed: int) -> augment.Box:
        """The part of an image that is used: a random one in training, else the central one."""
        if self.training:
            return augment.random_box(height, width, self.config.crop_area, seed)
        wanted = self.config.image_hw
        ratio = wanted[1] / wanted[0]
        return augment.central_box(height, width, (ratio, ratio), self.config.eval_crop)

    def _open(self, shard: int) -> tuple[int, np.ndarray]:
        if shard not in self._shards:
            path = self.manifest.folder / self.manifest.shards[shard].name
            try:
                self._shards[shard] = os.open(path, os.O_RDONLY), self.manifest.index(shard)
            except OSError as error:
                raise Refusal(DATA, f"{path}: {error.strerror}; the shard was there at the start") from error
            if len(self._shards) > OPEN_SHARDS:
                os.close(self._shards.popitem(last=False)[1][0])
        self._shards.move_to_end(shard)
        return self._shards[shard]
