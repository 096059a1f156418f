"""Which patches are corrupted and how (paper 4.6 and B.1.2), drawn on the device from each sample's seed.

Of N patches K are corrupted; of these most become the `[mask]` embedding, some the embedding of another patch of the
same image, some stay. All counts are fixed, so shapes are static and the mean of rank means is the global mean.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ssl_vit.rng import random_words_on_device

MASK, SWAP, KEEP = 0, 1, 2
RECTANGLES_PER_IMAGE = 24  # rectangles drawn an image; what they leave uncovered is filled at random


@dataclass(frozen=True)
class Corruption:
    """The K corrupted patches of each image: which, what becomes of them, and whose embedding they get."""

    index: Tensor  # int64 [B, K], raster positions, no two alike
    fate: Tensor  # int64 [B, K], MASK, SWAP or KEEP
    source: Tensor  # int64 [B, K], another patch where fate is SWAP, else index

    def apply(self, patches: Tensor, mask: Tensor) -> Tensor:
        """patches [B, N, D] and the mask embedding [D] -> corrupted patches; sources are taken uncorrupted."""
        shape = (-1, -1, patches.shape[2])
        content = patches.gather(1, self.source[:, :, None].expand(shape))
        content = torch.where((self.fate == MASK)[:, :, None], mask.to(patches.dtype), content)
        return patches.scatter(1, self.index[:, :, None].expand(shape), content)


def round_half_up(x: float) -> int:
    """Round to the nearest whole number, halves up (Python's `round` goes to the even one)."""
    return math.floor(x + 0.5 + 1e-9)


def counts(patches: int, ratio: float, mix: tuple[float, float, float], up: bool = False) -> tuple[int, int, int]:
    """How many patches are masked, swapped and kept: of 196 at 50 % and 80/10/10, 78, 10 and 10.

    The share of the corrupted is rounded half up, or with `up` always up.
    """
    corrupted = math.ceil(ratio * patches - 1e-9) if up else round_half_up(ratio * patches)
    masked = round_half_up(mix[0] * corrupted)
    swapped = min(round_half_up(mix[1] * corrupted), corrupted - masked)
    return masked, swapped, corrupted - masked - swapped


def draw(
    seed: Tensor, patches: int, ratio: float = 0.5, mix: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> Corruption:
    """Draw the corruption of each image: seed int64 [B] -> tensors [B, K], a pure function of the seed.

    The first K patches of a random permutation are corrupted; fates are cut from it by the fixed counts.
    """
    return _draw_with_counts(seed, patches, counts(patches, ratio, mix))


def draw_units(
    seed: Tensor, grid: tuple[int, int], unit: int, ratio: float, mix: tuple[float, float, float]
) -> Corruption:
    """The same of squares of unit x unit patches, which share a fate, as SimMIM masks (their number is rounded up)."""
    rows, columns = grid[0] // unit, grid[1] // unit
    unit_corruption = _draw_with_counts(seed, rows * columns, counts(rows * columns, ratio, mix, up=True))
    step = torch.arange(unit, device=seed.device)
    offsets = (step[:, None] * grid[1] + step).flatten()  # of a unit's patches, from its first one

    def patch_index(units: Tensor) -> Tensor:
        top_left = units // columns * unit * grid[1] + units % columns * unit
        return (top_left[:, :, None] + offsets).flatten(1)

    fate = unit_corruption.fate.repeat_interleave(unit * unit, dim=1)
    return Corruption(patch_index(unit_corruption.index), fate, patch_index(unit_corruption.source))


def draw_blocks(
    seed: Tensor, grid: tuple[int, int], shapes: Tensor, ratio: float, mix: tuple[float, float, float]
) -> Corruption:
    """The same of rectangles, as BEiT masks: of `shapes` int64 [S, 2], at random places, until K patches are covered.

    The last rectangle is cut so that K is exact, which BEiT leaves open; fates fall at random over all that is covered.
    """
    rows, columns = grid
    patches, fate_counts = rows * columns, counts(rows * columns, ratio, mix)
    sizes = [patches, patches, 3 * RECTANGLES_PER_IMAGE, patches]
    order_words, swap_words, place_words, fate_words = random_words_on_device(seed, sum(sizes)).split(sizes, dim=1)
    shape_index, top, left = (place_words & (1 << 62) - 1).unflatten(1, (3, RECTANGLES_PER_IMAGE)).unbind(1)
    height, width = shapes[shape_index % len(shapes)].unbind(2)
    top, left = (side[:, :, None] for side in (top % (rows - height + 1), left % (columns - width + 1)))
    row, column = torch.arange(rows, device=seed.device), torch.arange(columns, device=seed.device)
    in_rows = (row >= top) & (row < top + height[:, :, None])
    in_columns = (column >= left) & (column < left + width[:, :, None])
    number = torch.arange(RECTANGLES_PER_IMAGE, device=seed.device)[None, :, None, None]
    first_rectangle = (
        torch.where(in_rows[:, :, :, None] & in_columns[:, :, None, :], number, RECTANGLES_PER_IMAGE).amin(1).flatten(1)
    )
    order = order_words.argsort(dim=1, stable=True)
    covered = order.gather(1, first_rectangle.gather(1, order).argsort(dim=1, stable=True))[:, : sum(fate_counts)]
    # words of its own: those of `order` are small in what the cut left of the last rectangle
    index = covered.gather(1, fate_words.gather(1, covered).argsort(dim=1, stable=True))
    return _assign_fates(index, swap_words, patches, fate_counts)


def block_shapes(grid: tuple[int, int], corrupted: int) -> list[tuple[int, int]]:
    """Heights and widths of BEiT's rectangles: at least 16 of 14 x 14 patches, at most all; sides from 0.3 to 1/0.3."""
    min_area = round_half_up(16 * grid[0] * grid[1] / 196)
    shapes = []
    for area, aspect in product(range(16), range(16)):
        size = min_area + (max(min_area, corrupted) - min_area) * (area + 0.5) / 16
        ratio = 0.3 ** (1 - (aspect + 0.5) / 8)
        height, width = round_half_up(math.sqrt(size * ratio)), round_half_up(math.sqrt(size / ratio))
        if height <= grid[0] and width <= grid[1] and height * width >= max(1, min_area):
            shapes.append((height, width))
    return shapes or [(1, 1)]


def _draw_with_counts(seed: Tensor, patches: int, fate_counts: tuple[int, int, int]) -> Corruption:
    words = random_words_on_device(seed, 2 * patches)
    index = words[:, :patches].argsort(dim=1, stable=True)[:, : sum(fate_counts)]
    return _assign_fates(index, words[:, patches:], patches, fate_counts)


def _assign_fates(index: Tensor, words: Tensor, patches: int, fate_counts: tuple[int, int, int]) -> Corruption:
    """The first of `index` are masked, the next swapped for another of so many patches, the last kept."""
    masked, swapped, _ = fate_counts
    slot = torch.arange(index.shape[1], device=index.device)
    fate = ((slot >= masked).long() + (slot >= masked + swapped)).expand(len(index), -1)  # no copy to the device
    offset = 1 + (words[:, : index.shape[1]] >> 1 & (1 << 62) - 1) % max(1, patches - 1)
    source = torch.where(fate == SWAP, (index + offset) % patches, index)
    return Corruption(index, fate, source)
