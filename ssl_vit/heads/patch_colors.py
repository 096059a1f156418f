"""The paper's second target: a patch shrunk to 4 x 4 cells, the 3-bit mean colour of each (B.1.2)."""

from typing import Literal

from torch import Tensor

from ssl_vit.heads.masked import ColorHead, Masked
from ssl_vit.heads.mean_color import colors, labels
from ssl_vit.model import Encoder

CELLS = 4  # along a side


class PatchColors(Masked):
    """Predict the colours of 4 x 4 cells of corrupted patches, 512 classes each."""

    kind: Literal["patch_colors"] = "patch_colors"

    def build(self, encoder: Encoder, classes: int) -> "PatchColorsHead":
        """The head for an encoder; ValueError where 4 does not divide its patches."""
        del classes
        self.check(encoder)
        if encoder.stride % CELLS:
            raise ValueError(f"head.kind=patch_colors cuts patches into 4 x 4 cells; {encoder.stride} is no multiple")
        return PatchColorsHead(self, encoder)


class PatchColorsHead(ColorHead):
    """Sixteen classes a patch, in raster order."""

    def __init__(self, config: PatchColors, encoder: Encoder):
        super().__init__(config, encoder, 1 << (3 * encoder.channels), CELLS**2)

    def target(self, encoder: Encoder, image: Tensor) -> Tensor:
        """The class of each cell [B, N, 16]: its area mean, quantised as a patch's is."""
        rows, columns = self.grid
        cells = labels(image, self.patch // CELLS).unflatten(1, (rows, CELLS, columns, CELLS))
        return cells.transpose(2, 3).flatten(3).flatten(1, 2)

    def paint(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """Patches of flat cells."""
        side = self.patch // CELLS
        cells = colors(target).unflatten(2, (CELLS, CELLS))  # [B, N, 4, 4, 3]
        return cells.repeat_interleave(side, 2).repeat_interleave(side, 3).permute(0, 4, 2, 3, 1).flatten(1, 3)
