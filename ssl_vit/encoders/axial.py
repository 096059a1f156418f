"""Axial attention (paper D.6): along the rows of patches, then along the columns; in a ViT and in a ResNet-50."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ssl_vit.encoders import layers
from ssl_vit.encoders.inputs import ImageInput, Pool
from ssl_vit.encoders.timm_encoder import Bit, TimmEncoder
from ssl_vit.encoders.vit import Attention, Transformer, VitEncoder, gather_tokens


class Axial(Transformer):
    """Axial-ViT: each block of a ViT becomes two, one of row attention and MLP, one of column attention and MLP.

    The paper does not say where a class token would stand on the grid: there is none, and the read-out is the mean.
    """

    kind: Literal["axial"] = "axial"
    pool: Pool = Field(default="mean", description="read-out: there is no class token")

    @property
    def title(self) -> str:
        """Such as Axial-ViT-B/16."""
        return f"Axial-{super().title}"

    def build(self) -> "AxialEncoder":
        """A freshly initialized encoder; raises ValueError where patches do not tile the image."""
        self.check_config()
        if self.positions == "relative" and self.resolved_placement == "shared":
            raise ValueError("position_placement=shared: rows and columns cannot share relative positions; take every")
        return AxialEncoder(self)


class AxialAttention(Attention):
    """Attention among the patches of a row, or of a column, [B, N, D] -> [B, N, D]."""

    grid: tuple[int, int]
    columns: bool

    def forward(self, x: Tensor, shared: Tensor | None = None, select: Tensor | None = None) -> Tensor:
        x = self._split_lines(x)
        lines = x.shape[:2]
        x = super().forward(x.flatten(0, 1), shared).unflatten(0, lines)
        x = (x.transpose(1, 2) if self.columns else x).flatten(1, 2)
        return x if select is None else gather_tokens(x, select)

    def _split_lines(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> [B, lines, tokens of a line, D]."""
        x = x.unflatten(1, self.grid)
        return x.transpose(1, 2) if self.columns else x

    def attention_maps(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """What each patch takes from each, float [B, heads, N, N]; nothing from outside of its line."""
        x = self._split_lines(x)
        count, lines, length = x.shape[:3]
        line_maps = super().attention_maps(x.flatten(0, 1), shared).unflatten(0, (count, lines))  # [B, L, heads, S, S]
        maps = line_maps.new_zeros(count, line_maps.shape[2], lines, length, lines, length)
        maps.diagonal(dim1=2, dim2=4).copy_(line_maps.permute(0, 2, 3, 4, 1))
        maps = maps.permute(0, 1, 3, 2, 5, 4) if self.columns else maps
        return maps.flatten(4, 5).flatten(2, 3)


class AxialEncoder(VitEncoder):
    """image uint8 [B, C, H, W] -> tokens [B, N, D]."""

    def _num_blocks(self) -> int:
        return 2 * super()._num_blocks()

    def offset_grid(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        """The rows or the columns: blocks.N.attn.offsets has those of the N-th block's."""
        return 1, grid[0] if int(name.split(".")[1]) % 2 else grid[1]

    def _build_attention(self, number: int) -> AxialAttention:
        columns, placement = number % 2 == 1, self.config.resolved_placement
        line = self.offset_grid(f"blocks.{number}", self.grid)
        offsets = self._build_offsets(line) if placement == "every" or (placement == "stem" and number < 2) else None
        attention = AxialAttention(self.width, self.config.dims[2], 0, offsets)
        attention.grid, attention.columns = self.grid, columns
        return attention


class AxialResnet(ImageInput):
    """AxialResNet-50: each 3x3 convolution of a ResNet-50 becomes row attention, then column attention."""

    kind: Literal["axial_resnet"] = "axial_resnet"
    heads: int = Field(default=8, ge=1, description="heads of each attention; 8 in Axial-DeepLab")
    widen: int = Field(default=1, ge=1, description="times the usual width")
    pool: Pool = Field(default="mean", description="read-out: there is no class token")

    @property
    def title(self) -> str:
        """Such as AxialR50x1."""
        return f"AxialR50x{self.widen}"

    def create(self) -> Any:
        """timm's BiT ResNet-50 with its 3x3 convolutions replaced; relative positions want one image size."""
        model = Bit(image=self.image, channels=self.channels, widen=self.widen).create()
        sides = [-(-side // 4) for side in self.image_hw]  # behind the stem
        for stage in model.stages:
            for block in stage.blocks:
                old = block.conv2
                if old.in_channels % self.heads:
                    raise ValueError(f"heads={self.heads} do not divide {old.in_channels} channels")
                block.conv2 = AxialConv(old.in_channels, self.heads, (sides[0], sides[1]), old.stride[0])
                sides = [-(-side // old.stride[0]) for side in sides]
        return model

    def build(self) -> TimmEncoder:
        """A freshly initialized encoder."""
        return TimmEncoder(self)


class AxialConv(nn.Module):
    """In the place of a 3x3 convolution: row attention, column attention, and where it strode a mean of 2 x 2."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int], stride: int):
        super().__init__()
        lines = grid[1], grid[0]
        tables = [layers.learned_table(2 * line - 1, width // heads) for line in lines]
        self.rows = AxialAttention(width, heads, 0, tables[0])
        self.columns = AxialAttention(width, heads, 0, tables[1])
        for attention, columns in ((self.rows, False), (self.columns, True)):
            attention.grid, attention.columns = grid, columns
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, H / stride, W / stride]."""
        tokens = self.columns(self.rows(x.flatten(2).transpose(1, 2)))
        return self.pool(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
