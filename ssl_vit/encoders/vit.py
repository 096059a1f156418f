"""The Vision Transformer of "An Image is Worth 16x16 Words" (paper 3.1 and appendix A).

Tensor names follow ssl_vit/model.py. Parameter names are timm's, so that weights travel both ways unchanged.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_vit.encoders import layers
from ssl_vit.encoders.inputs import NO_CLASS_TOKEN, ImageInput, NormalizedEncoder
from ssl_vit.encoders.layers import Linear, Position1d, Position2d, convolve_in_fp32_on_cpu, learned_table, linear
from ssl_vit.model import Edit

# width, depth, heads, MLP width: paper Table 1 for B, L, H; the authors' released code for Ti and S
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


class Transformer(ImageInput):
    """What a ViT and an Axial-ViT share: a size by name or by its numbers, patches, positions."""

    size: Literal["Ti", "S", "B", "L", "H"] = Field(
        default="B", description="named size, the default of the four numbers below"
    )
    patch: int = Field(default=16, ge=1, description="side of a patch, pixels")
    width: int | None = Field(default=None, ge=1, description="token width D (none: from size)")
    depth: int | None = Field(default=None, ge=1, description="blocks (none: from size)")
    heads: int | None = Field(
        default=None, ge=1, description="attention heads; they divide the width (none: from size)"
    )
    mlp: int | None = Field(default=None, ge=1, description="hidden width of the MLP (none: from size)")
    positions: Literal["1d", "2d", "relative", "none"] = Field(
        default="1d", description="position embedding: learned 1-D or 2-D table, 1-D offsets in the attention, or none"
    )
    position_placement: Literal["stem", "every", "shared"] | None = Field(
        default=None,
        description="where they act: before the first block, or in every block, from tables of its own or a shared one "
        "(none: stem, and every for relative)",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout rate, at the paper's four places (appendix B.1)"
    )
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="share of images for which the last block is skipped in training"
    )

    @model_validator(mode="after")
    def _check_dims(self) -> "Transformer":
        width, _, heads, _ = self.dims
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if self.pool == "class" and not self.prefix:
            raise ValueError(NO_CLASS_TOKEN)
        return self

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return 0

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Width, depth, heads and MLP width."""
        explicit = (self.width, self.depth, self.heads, self.mlp)
        width, depth, heads, mlp = (a or b for a, b in zip(explicit, SIZES[self.size], strict=True))
        if self.width and not self.mlp:
            mlp = 4 * width
        if self.width and not self.heads:
            heads = max(1, width // 64)
        return width, depth, heads, mlp

    @property
    def title(self) -> str:
        """Such as ViT-B/16, or by numbers where those are not of a named size."""
        is_named = self.dims == SIZES[self.size]
        return f"ViT-{self.size if is_named else 'x'.join(map(str, self.dims))}/{self.patch}"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_hw
        return height // self.patch, width // self.patch

    @property
    def resolved_placement(self) -> str:
        """Where positions act: stem, every or shared."""
        return self.position_placement or ("every" if self.positions == "relative" else "stem")

    def check_config(self) -> None:
        """Raises ValueError where patches do not tile the image, or what is read out is not there."""
        if self.pool == "class" and not self.prefix:  # again: a config that was altered by a copy is not validated
            raise ValueError(NO_CLASS_TOKEN)
        height, width = self.image_hw
        if height % self.patch or width % self.patch or 0 in self.grid:
            suggestion = " x ".join(str(max(1, round(side / self.patch)) * self.patch) for side in self.image_hw)
            raise ValueError(
                f"an image of {height} x {width} cannot be cut into patches of {self.patch}; {suggestion} can"
            )


class Vit(Transformer):
    """A plain ViT, or with stem=r50 the paper's hybrid of a ResNet-50 and a ViT."""

    kind: Literal["vit"] = "vit"
    class_token: bool = Field(default=True, description="put a learned token before those of the patches")
    stem: Literal["patch", "r50"] = Field(
        default="patch",
        description="patches are cut from pixels, or are the positions of a ResNet-50's feature map (paper 3.1): of "
        "stage 4 with patch=32, of a longer stage 3 with patch=16",
    )

    @model_validator(mode="after")
    def _check_stem(self) -> "Vit":
        if self.stem == "r50" and self.patch not in (16, 32):
            raise ValueError("stem=r50 has feature maps for patch=16 and patch=32")
        return self

    @property
    def title(self) -> str:
        """Such as ViT-B/16 or R50+ViT-B/16."""
        return super().title if self.stem == "patch" else f"R50+{super().title}"

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token)

    def build(self) -> "VitEncoder":
        """A freshly initialized encoder; raises ValueError where patches do not tile the image."""
        self.check_config()
        return VitEncoder(self)


class Qkv(Linear):
    """tokens [B, T, D] -> queries, keys and values, each [B, heads, T, D / heads]; queries [B, heads, S, ...] of some.

    `select` int64 [B, S] names the tokens that ask.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(self, input: Tensor, select: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        if select is None:
            q, k, v = self._split_heads(linear(input, self.weight, self.bias))
            return q, k, v
        sizes = [self.in_features, 2 * self.in_features]
        (q_weight, kv_weight), (q_bias, kv_bias) = self.weight.split(sizes), self.bias.split(sizes)
        (q,) = self._split_heads(linear(gather_tokens(input, select), q_weight, q_bias))
        k, v = self._split_heads(linear(input, kv_weight, kv_bias))
        return q, k, v

    def _split_heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n D] -> n times [B, heads, T, D / heads]."""
        return projected.unflatten(2, (-1, self.heads, self.in_features // self.heads)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    """Multi-head self-attention (paper appendix A), [B, T, D] -> [B, T, D].

    `offsets` [2N - 1, D / heads] are relative positions, the block's own or those that all blocks share. With `select`
    int64 [B, S] only these tokens ask, and all answer: [B, S, D].
    """

    def __init__(self, width: int, heads: int, prefix: int = 1, offsets: nn.Parameter | None = None):
        super().__init__()
        self.heads, self.prefix = heads, prefix
        self.qkv = Qkv(width, heads)
        self.proj = Linear(width, width)
        self.offsets = offsets

    def forward(self, x: Tensor, shared: Tensor | None = None, select: Tensor | None = None) -> Tensor:
        offsets = shared if self.offsets is None else self.offsets
        if offsets is None:
            output = F.scaled_dot_product_attention(*self.qkv(x, select))
        else:  # written out: fused kernels take a mask slowly, and cuDNN some wrongly (pytorch#196678)
            q, k, v = self.qkv(x)
            output = self.attention_weights(q, k, offsets).to(v.dtype) @ v
        output = self.proj(output.transpose(1, 2).flatten(2))
        return output if select is None or offsets is None else gather_tokens(output, select)

    def attention_weights(self, q: Tensor, k: Tensor, offsets: Tensor | None) -> Tensor:
        """What each token takes from each, float [B, heads, T, T]; every row adds up to 1."""
        logits = q @ k.transpose(2, 3)
        if offsets is not None:
            logits = logits + layers.relative_logits(q, offsets, self.prefix)
        return (logits.float() / math.sqrt(q.shape[3])).softmax(3)

    def attention_maps(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """The same of what this layer is given [B, T, D], for those who look inside; training takes fused kernels."""
        q, k, _ = self.qkv(x)
        return self.attention_weights(q, k, shared if self.offsets is None else self.offsets)


class Mlp(nn.Module):
    """Two layers with GELU and dropout after each, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.drop1 = nn.Dropout(dropout)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(F.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a residual branch is dropped for a share of the images."""

    keep_prob: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.active = rate > 0
        # a buffer: as a number it would be a constant of its graph, and each block one of its own
        if self.active:
            self.register_buffer("keep_prob", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.active:
            return x
        return x * (torch.bernoulli(self.keep_prob.expand(len(x), 1, 1)).to(x.dtype) / self.keep_prob)


class Block(nn.Module):
    """A pre-LN transformer block: attention, then MLP, each with its residual; before them its positions, if any.

    With `select` int64 [B, S] it gives these tokens only, [B, S, D]: the same as of all, for less work.
    """

    def __init__(
        self,
        attention: Attention,
        width: int,
        mlp: int,
        dropout: float,
        drop_path: float = 0.0,
        positions: nn.Module | None = None,
    ):
        super().__init__()
        self.pos = positions
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, offsets: Tensor | None = None, select: Tensor | None = None) -> Tensor:
        if self.pos is not None:
            x = (x + self.pos()).to(x.dtype)  # a table is fp32, also where blocks add in bf16
        output = self.attn(self.norm1(x), offsets, select)
        x = (x if select is None else gather_tokens(x, select)) + self.drop_path(self.drop(output))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def gather_tokens(x: Tensor, select: Tensor) -> Tensor:
    """Of x [B, T, D] the tokens that `select` [B, S] names, [B, S, D]."""
    return x.gather(1, select[:, :, None].expand(-1, -1, x.shape[2]))


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel: pixels [B, C, H, W] -> [B, D, H / P, W / P]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.as_matmul(input) if input.is_cuda else super().forward(input)

    def as_matmul(self, pixels: Tensor) -> Tensor:
        """The same as one matrix product, which on a GPU needs no other order of channels and fuses what is before."""
        side = self.stride[0]
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Pixels [B, C, H, W] -> patches [B, N, D] in raster order."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = PatchConv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VitEncoder(NormalizedEncoder):
    """image uint8 [B, C, H, W] -> tokens [B, P + N, D], the class token first."""

    config: Any  # Vit or Axial
    state_dict_prefix = ""  # what precedes timm's names of its tensors
    maskable = True
    activation_checkpointing = False  # in training, keep each block's input only and compute the rest again
    residual: torch.dtype | None = None  # what blocks add to (none: that of the weights, fp32)

    def __init__(self, config: Transformer):
        super().__init__(config)
        width, _, _, _ = config.dims
        self.width, self.stride, self.grid, self.prefix = width, config.patch, config.grid, config.prefix
        self.patch_embed = self._build_patch_embed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if self.prefix else None
        self.pos_embed = self._build_position_table() if config.resolved_placement != "every" else None
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self._build_blocks())
        self.offsets = self._build_offsets(config.grid) if config.resolved_placement == "shared" else None
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialize()
        convolve_in_fp32_on_cpu(self.patch_embed)

    def _build_patch_embed(self) -> nn.Module:
        if isinstance(self.config, Vit) and self.config.stem == "r50":
            from ssl_vit.encoders.timm_encoder import hybrid

            return hybrid(self.config.channels, self.config.patch, self.width, self.config.image_hw)
        return PatchEmbed(self.config.channels, self.config.patch, self.width)

    def _build_position_table(self) -> nn.Parameter | nn.Module | None:
        """What is added at the stem, or by all blocks: under timm's name, as a plain tensor, where it is 1-D."""
        if self.config.positions == "1d":
            return learned_table(1, self.prefix + self.grid[0] * self.grid[1], self.width)
        return Position2d(self.grid, self.width, self.prefix) if self.config.positions == "2d" else None

    def _build_offsets(self, grid: tuple[int, int]) -> nn.Parameter | None:
        """Relative positions of the patches of a grid."""
        if self.config.positions != "relative":
            return None
        return learned_table(2 * grid[0] * grid[1] - 1, self.width // self.config.dims[2])

    def offset_grid(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid that a tensor of relative positions stands for, in an image of this grid."""
        del name
        return grid

    def _build_attention(self, number: int) -> Attention:
        """The attention of the block of a number, from 0."""
        in_stem = self.config.resolved_placement == "stem" and number == 0
        offsets = self._build_offsets(self.grid) if in_stem or self.config.resolved_placement == "every" else None
        return Attention(self.width, self.config.dims[2], self.prefix, offsets)

    def _num_blocks(self) -> int:
        return self.config.dims[1]

    def _build_blocks(self) -> Iterator[Block]:
        config, tokens = self.config, self.prefix + self.grid[0] * self.grid[1]
        depth, mlp = self._num_blocks(), config.dims[3]
        for number in range(depth):
            rate = config.drop_path * number / max(1, depth - 1)  # growing with depth, from 0
            positions: nn.Module | None = None
            if config.resolved_placement == "every" and config.positions == "1d":
                positions = Position1d(tokens, self.width)
            elif config.resolved_placement == "every" and config.positions == "2d":
                positions = Position2d(self.grid, self.width, self.prefix)
            yield Block(self._build_attention(number), self.width, mlp, config.dropout, rate, positions)

    def _initialize(self) -> None:
        """As in the authors' code: Xavier-uniform kernels, MLP biases normal(1e-6), LeCun-normal patch embedding."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for kernel in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                    nn.init.xavier_uniform_(kernel)  # q, k and v are kernels of their own
                nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
        embed = self.patch_embed.proj
        assert isinstance(embed, nn.Conv2d)
        nn.init.trunc_normal_(embed.weight, std=1 / math.sqrt(embed.weight[0].numel()))
        if embed.bias is not None:
            nn.init.zeros_(embed.bias)

    @property
    def attention_shape(self) -> tuple[int, int, int] | None:
        """Heads, tokens and the width of a head; None if the blocks do not use torch's attention kernel as it is."""
        if not isinstance(self.config, Vit) or self.config.positions == "relative":
            return None
        heads = self.config.dims[2]
        return heads, self.prefix + self.grid[0] * self.grid[1], self.width // heads

    @property
    def depth(self) -> int:
        """How many layers there are to take tokens from."""
        return len(self.blocks)

    def forward(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        """See `ssl_vit.model.Encoder`; raises ValueError where the image is not the size the encoder was built for."""
        x = self.embed(image, edit)
        *earlier_blocks, last_block = self.blocks
        for block in earlier_blocks:
            x = self.run_block(block, x)
        return self.norm(self.run_block(last_block, x, select))  # no later block asks for the other tokens

    def layers(self, image: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """The tokens [B, T, D] after the blocks of these numbers, from 1, each through the final norm."""
        x, outputs = self.embed(image), {}
        for number, block in enumerate(self.blocks[: max(numbers)], start=1):  # type: ignore[arg-type]
            x = self.run_block(block, x)
            if number in numbers:
                outputs[number] = self.norm(x)
        return outputs

    def embed(self, image: Tensor, edit: Edit | None = None) -> Tensor:
        """What enters the first block."""
        self.check_size(image)
        x = self.patch_embed(self.normalize(image))
        if edit is not None:
            x = edit(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # len(x) would fix it in an export
        x = self.pos_drop(self._add_positions(x) if self.config.resolved_placement == "stem" else x)
        return x.to(self.residual or self.norm.weight.dtype)  # patches alone come out of autocast in bf16

    def run_block(self, block: nn.Module, x: Tensor, select: Tensor | None = None) -> Tensor:
        """Tokens through a block, with what all blocks share; only those of `select` come out."""
        if self.config.resolved_placement == "shared":
            x = self._add_positions(x).to(x.dtype)
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, self.offsets, select, use_reentrant=False)
        return block(x, self.offsets, select)

    def _add_positions(self, x: Tensor) -> Tensor:
        table = self.pos_embed() if isinstance(self.pos_embed, nn.Module) else self.pos_embed
        return x if table is None else x + table
