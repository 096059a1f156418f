"""The mean color of each patch (paper B.1.2), or of each cell of a patch (footnote 1), as classes."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_vit.heads.masked_prediction import ClassTarget, MaskedPrediction, MaskedPredictionHead
from ssl_vit.model import Encoder


def labels(image: Tensor, patch: int, bits: int = 3) -> Tensor:
    """The class of each patch's mean color: image uint8 [B, C, H, W] -> int64 [B, N] in raster order.

    Each channel's mean is cut into 2^bits equal bins; with 3 bits of RGB the class is 64 R + 8 G + B, 512 in all.
    Computed in integers, because a float mean falls on the wrong side of an edge now and then.
    """
    b, c, h, w = image.shape
    cells = image.reshape(b, c, h // patch, patch, w // patch, patch)
    total = cells.sum(dim=(3, 5), dtype=torch.int64)  # [B, C, rows, columns], at most 255 P^2
    level = ((total << bits) // (255 * patch * patch)).clamp(max=(1 << bits) - 1)
    label = level[:, 0]
    for channel in range(1, c):
        label = (label << bits) | level[:, channel]
    return label.flatten(1)


def label_colors(label: Tensor, bits: int = 3) -> Tensor:
    """The RGB in the middle of a class's bins: label int64 [...] -> uint8 [..., 3]."""
    level = torch.stack([label >> (bits * c) & (1 << bits) - 1 for c in (2, 1, 0)], dim=-1)
    return ((level + 0.5) * 255 / (1 << bits)).round().to(torch.uint8)


class MeanColor(MaskedPrediction):
    """Predict the mean color of corrupted patches."""

    kind: Literal["mean_color"] = "mean_color"
    bits: int = Field(default=3, ge=1, le=4, description="bits a channel of the target; 3 makes 512 classes")

    def build(self, encoder: Encoder, classes: int) -> MaskedPredictionHead:
        """The head for an encoder; the data's classes play no part. ValueError where no patch could be corrupted."""
        del classes
        self.check_encoder(encoder)
        return MaskedPredictionHead(self, encoder, MeanColorTarget(encoder, self.bits))


class MeanColorTarget(ClassTarget):
    """One class per patch."""

    def __init__(self, encoder: Encoder, bits: int):
        super().__init__(1 << (bits * encoder.channels))
        self.patch, self.bits = encoder.stride, bits

    def targets(self, encoder: Encoder, image: Tensor) -> Tensor:
        """The class of each patch [B, N, 1]."""
        return labels(image, self.patch, self.bits)[:, :, None]

    def render(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """Flat patches."""
        return label_colors(target[:, :, 0], self.bits).transpose(1, 2).repeat_interleave(self.patch**2, 1)


CELLS_PER_SIDE = 4


class PatchColors(MaskedPrediction):
    """Predict the colors of 4 x 4 cells of corrupted patches, 512 classes each."""

    kind: Literal["patch_colors"] = "patch_colors"

    def build(self, encoder: Encoder, classes: int) -> MaskedPredictionHead:
        """The head for an encoder; ValueError where 4 does not divide its patches."""
        del classes
        self.check_encoder(encoder)
        if encoder.stride % CELLS_PER_SIDE:
            raise ValueError(f"head.kind=patch_colors cuts patches into 4 x 4 cells; {encoder.stride} is no multiple")
        return MaskedPredictionHead(self, encoder, PatchColorsTarget(encoder))


class PatchColorsTarget(ClassTarget):
    """Sixteen classes per patch, in raster order."""

    def __init__(self, encoder: Encoder):
        super().__init__(1 << (3 * encoder.channels), CELLS_PER_SIDE**2)
        self.patch, self.grid = encoder.stride, encoder.grid

    def targets(self, encoder: Encoder, image: Tensor) -> Tensor:
        """The class of each cell [B, N, 16]: its area mean, quantized as a patch's is."""
        rows, columns = self.grid
        cells = labels(image, self.patch // CELLS_PER_SIDE).unflatten(
            1, (rows, CELLS_PER_SIDE, columns, CELLS_PER_SIDE)
        )
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)

    def render(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """Patches of flat cells."""
        side = self.patch // CELLS_PER_SIDE
        cells = label_colors(target).unflatten(2, (CELLS_PER_SIDE, CELLS_PER_SIDE))  # [B, N, 4, 4, 3]
        return cells.repeat_interleave(side, 2).repeat_interleave(side, 3).permute(0, 4, 2, 3, 1).flatten(1, 3)
