"""The Vision Transformer of "An Image is Worth 16x16 Words" (paper 3.1 and appendix A).

Tensor names follow ssl_vit/model.py. Parameter names are timm's, so that weights travel both ways unchanged.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_vit.config import Config
from ssl_vit.encoders import positions
from ssl_vit.model import Edit

# width, depth, heads, MLP width: paper Table 1 for B, L, H; the authors' released code for Ti and S
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


class Vit(Config):
    """A plain ViT, by name or by its numbers."""

    kind: Literal["vit"] = "vit"
    size: Literal["Ti", "S", "B", "L", "H"] = Field(
        default="B", description="named size, the default of the four numbers below"
    )
    patch: int = Field(default=16, ge=1, description="side of a patch, pixels")
    image: int | tuple[int, int] = Field(
        default=224, description="input size, pixels (H,W or one side); data.image_size sets it"
    )
    channels: int = Field(default=3, ge=1, description="image channels")
    width: int | None = Field(default=None, ge=1, description="token width D (none: from size)")
    depth: int | None = Field(default=None, ge=1, description="blocks (none: from size)")
    heads: int | None = Field(
        default=None, ge=1, description="attention heads; they divide the width (none: from size)"
    )
    mlp: int | None = Field(default=None, ge=1, description="hidden width of the MLP (none: from size)")
    positions: Literal["1d", "none"] = Field(default="1d", description="position embedding: learned 1-D table, or none")
    pool: Literal["class", "mean"] = Field(
        default="class", description="read-out: class token, or mean of the patch tokens"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout rate, at the paper's four places (appendix B.1)"
    )
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="share of images for which the last block is skipped in training"
    )
    mean: tuple[float, ...] = Field(
        default=(0.5,), description="subtracted from pixels in [0,1], one value or one a channel"
    )
    std: tuple[float, ...] = Field(default=(0.5,), description="then divided by, one value or one a channel")

    @model_validator(mode="after")
    def _fits(self) -> "Vit":
        width, _, heads, _ = self.numbers
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} has to be above 0")
        if {len(self.mean), len(self.std)} - {1, self.channels}:
            raise ValueError(f"mean and std take one value, or one for each of the {self.channels} channels")
        return self

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Width, depth, heads and MLP width."""
        given = (self.width, self.depth, self.heads, self.mlp)
        width, depth, heads, mlp = (a or b for a, b in zip(given, SIZES[self.size], strict=True))
        if self.width and not self.mlp:
            mlp = 4 * width
        if self.width and not self.heads:
            heads = max(1, width // 64)
        return width, depth, heads, mlp

    @property
    def image_hw(self) -> tuple[int, int]:
        """Input height and width, pixels."""
        return (self.image, self.image) if isinstance(self.image, int) else self.image

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_hw
        return height // self.patch, width // self.patch

    def build(self) -> "VitEncoder":
        """A freshly initialised encoder; raises ValueError where patches do not tile the image."""
        height, width = self.image_hw
        if height % self.patch or width % self.patch:
            near = " x ".join(str(max(1, round(side / self.patch)) * self.patch) for side in self.image_hw)
            raise ValueError(f"an image of {height} x {width} cannot be cut into patches of {self.patch}; {near} can")
        return VitEncoder(self)


class Attention(nn.Module):
    """Multi-head self-attention (paper appendix A), [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two layers with GELU and dropout after each, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop1 = nn.Dropout(dropout)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a residual branch is dropped for a share of the images."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        kept = 1 - self.share
        return x * (x.new_empty(len(x), 1, 1).bernoulli_(kept) / kept)


class Block(nn.Module):
    """A pre-LN transformer block: attention, then MLP, each with its residual."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.drop(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Pixels [B, C, H, W] -> patches [B, N, D] in raster order: a convolution whose stride is its kernel."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VitEncoder(nn.Module):
    """image uint8 [B, C, H, W] -> tokens [B, 1 + N, D], the class token first."""

    prefix = 1
    activation_checkpointing = False  # in training, keep each block's input only and compute the rest again

    def __init__(self, config: Vit):
        super().__init__()
        width, depth, heads, mlp = config.numbers
        self.config = config
        self.width, self.stride, self.pool, self.grid = width, config.patch, config.pool, config.grid
        self.channels = config.channels
        self.patch_embed = PatchEmbed(config.channels, config.patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        patches = self.grid[0] * self.grid[1]
        self.pos_embed = positions.learned(self.prefix + patches, width) if config.positions == "1d" else None
        self.pos_drop = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(1, depth - 1) for i in range(depth)]  # growing with depth, from 0
        self.blocks = nn.ModuleList(Block(width, heads, mlp, config.dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """As in the authors' code: Xavier-uniform kernels, MLP biases normal(1e-6), LeCun-normal patch embedding."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for kernel in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                    nn.init.xavier_uniform_(kernel)  # q, k and v are kernels of their own
                nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
        kernel = self.patch_embed.proj.weight
        nn.init.trunc_normal_(kernel, std=1 / math.sqrt(kernel[0].numel()))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)

    def normalise(self, image: Tensor) -> Tensor:
        """image uint8 [B, C, H, W] -> pixels float [B, C, H, W]; [-1, 1] with the default mean and std."""
        return (image.float() / 255 - self.mean) / self.std

    def forward(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        """See `ssl_vit.model.Encoder`; raises ValueError where the image is not the size the encoder was built for."""
        x = self.embed(image, edit)
        again = self.activation_checkpointing and self.training
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        if select is not None:
            x = x.gather(1, select[:, :, None].expand(-1, -1, x.shape[2]))
        return self.norm(x)

    def layers(self, image: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """The tokens [B, T, D] after the blocks of these numbers, from 1, each through the final norm."""
        x, found = self.embed(image), {}
        for number, block in enumerate(self.blocks[: max(numbers)], start=1):  # type: ignore[arg-type]
            x = block(x)
            if number in numbers:
                found[number] = self.norm(x)
        return found

    def embed(self, image: Tensor, edit: Edit | None = None) -> Tensor:
        """What enters the first block."""
        if tuple(image.shape[2:]) != self.config.image_hw:
            raise ValueError(f"image is {tuple(image.shape[2:])}, the encoder takes {self.config.image_hw}")
        patches = self.patch_embed(self.normalise(image))
        if edit is not None:
            patches = edit(patches)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.pos_drop(x)
