"""From decoded pixels to the network's input size: a random crop and flip, or the central crop, all uint8.

Crops are drawn from the sample's own seed, so they are the same on any world size, worker count and after any resume.
"""

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_vit.rng import hash_key, uniform

RATIO = (3 / 4, 4 / 3)  # width to height of a random crop
TRIES = 10


@dataclass(frozen=True)
class Box:
    """A part of an image, pixels."""

    top: int
    left: int
    height: int
    width: int

    def halved(self) -> "Box":
        """The same part of the image at half its size."""
        return Box(self.top // 2, self.left // 2, max(1, self.height // 2), max(1, self.width // 2))


def random_box(height: int, width: int, area: tuple[float, float], seed: int) -> Box:
    """An "inception crop" (paper B.1): a share of the area and a log-uniform aspect ratio, else the central one."""
    draws = iter(uniform(hash_key(seed, "crop"), 4 * TRIES).tolist())
    for _ in range(TRIES):
        target = height * width * (area[0] + (area[1] - area[0]) * next(draws))
        low, high = map(math.log, RATIO)
        aspect = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        y, x = next(draws), next(draws)
        if 0 < w <= width and 0 < h <= height:
            return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
    return central_box(height, width, RATIO, 1.0)


def central_box(height: int, width: int, ratio: tuple[float, float], share: float) -> Box:
    """The largest central box whose width/height lies in `ratio`, its sides then taken times `share`."""
    w = min(width, round(height * ratio[1]))
    h = min(height, round(w / ratio[0]))
    h, w = max(1, round(h * share)), max(1, round(w * share))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def should_flip(seed: int) -> bool:
    """Whether a sample is mirrored."""
    return bool(uniform(hash_key(seed, "flip"), 1)[0] < 0.5)


def crop_and_resize(pixels: np.ndarray, box: Box, size: tuple[int, int], flip: bool) -> Tensor:
    """Cut a box out of pixels uint8 [H, W, C] and resize it, antialiased -> uint8 [C, h, w], in rows of pixels."""
    crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # so torch sees rows of pixels, and resizes them as such
    if image.shape[2:] != size:
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    return (image.flip(3) if flip else image)[0]


def timm_augment(image: Tensor, name: str, seed: int) -> Tensor:
    """timm's RandAugment or AutoAugment of an image uint8 [C, h, w], drawn from the sample's own seed."""
    transform = timm_transform(name, min(image.shape[1:]))
    rng_states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(hash_key(seed, "augment") % (1 << 32))
    try:
        augmented = transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    finally:
        random.setstate(rng_states[0])
        np.random.set_state(rng_states[1])
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


@cache
def timm_transform(name: str, side: int) -> Any:
    """timm's transform of that name for images of a side; raises what timm raises where it knows none."""
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    factories = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    factory = next(
        (candidate for prefix, candidate in factories.items() if name.startswith(prefix)), auto_augment_transform
    )
    gray = (128, 128, 128)  # the mean of what is normalized to [-1, 1]
    return factory(name, {"translate_const": int(side * 0.45), "img_mean": gray})
