"""Which patches are corrupted and how (paper 4.6 and B.1.2), drawn on the device from each sample's seed.

Of N patches K are corrupted; of these most become the `[mask]` embedding, some the embedding of another patch of the
same image, some stay. All counts are fixed, so shapes are static and the mean of rank means is the global mean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_vit.counter import device_words

MASK, SWAP, KEEP = 0, 1, 2


@dataclass(frozen=True)
class Corruption:
    """The K corrupted patches of each image: which, what becomes of them, and whose embedding they get."""

    index: Tensor  # int64 [B, K], raster positions, no two alike
    fate: Tensor  # int64 [B, K], MASK, SWAP or KEEP
    source: Tensor  # int64 [B, K], another patch where fate is SWAP, else index

    def apply(self, patches: Tensor, mask: Tensor) -> Tensor:
        """patches [B, N, D] and the mask embedding [D] -> corrupted patches; sources are taken uncorrupted."""
        wide = (-1, -1, patches.shape[2])
        content = patches.gather(1, self.source[:, :, None].expand(wide))
        content = torch.where((self.fate == MASK)[:, :, None], mask.to(patches.dtype), content)
        return patches.scatter(1, self.index[:, :, None].expand(wide), content)


def half_up(x: float) -> int:
    """Round to the nearest whole number, halves up (Python's `round` goes to the even one)."""
    return math.floor(x + 0.5 + 1e-9)


def counts(patches: int, ratio: float, mix: tuple[float, float, float]) -> tuple[int, int, int]:
    """How many patches are masked, swapped and kept: of 196 at 50 % and 80/10/10, 78, 10 and 10."""
    corrupted = half_up(ratio * patches)
    masked = half_up(mix[0] * corrupted)
    swapped = min(half_up(mix[1] * corrupted), corrupted - masked)
    return masked, swapped, corrupted - masked - swapped


def draw(
    seed: Tensor, patches: int, ratio: float = 0.5, mix: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> Corruption:
    """Draw the corruption of each image: seed int64 [B] -> tensors [B, K], a pure function of the seed.

    The first K patches of a random permutation are corrupted; fates are cut from it by the fixed counts.
    """
    masked, swapped, kept = counts(patches, ratio, mix)
    random = device_words(seed, 2 * patches)
    index = random[:, :patches].argsort(dim=1, stable=True)[:, : masked + swapped + kept]
    slot = torch.arange(masked + swapped + kept, device=seed.device)
    fate = ((slot >= masked).long() + (slot >= masked + swapped)).expand(len(seed), -1)  # no copy to the device
    offset = 1 + (random[:, patches : patches + index.shape[1]] >> 1 & (1 << 62) - 1) % max(1, patches - 1)
    source = torch.where(fate == SWAP, (index + offset) % patches, index)
    return Corruption(index, fate, source)
