"""Encoders that timm builds: any of its models by name, BiT ResNets by depth and width, the ResNet of a hybrid.

timm is imported when one is built, not before.
"""

import inspect
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.encoders.inputs import NO_CLASS_TOKEN, ImageInput, NormalizedEncoder, Pool
from ssl_vit.encoders.layers import convolve_in_fp32_on_cpu
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Edit

BLOCKS_PER_STAGE = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}  # bottlenecks of a stage
EPS = 1e-8  # of the weight standardisation, timm's for released BiT weights


class TimmZoo(ImageInput):
    """Any model of timm, by its name; its weights come with init=timm:NAME.

    Tokens are those of `forward_features`. Some models (BEiT, EVA-02) have their last norm behind the pooling, as a
    part of their head: there tokens, and their mean, come without it.
    """

    kind: Literal["timm"] = "timm"
    name: str = Field(default="vit_base_patch16_224", min_length=1, description="timm's name of the model")
    pool: Pool = Field(default="mean", description="read-out: mean of the patch tokens, or a class token if it has one")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth, timm's drop_path_rate")

    @property
    def title(self) -> str:
        """timm's name."""
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """What timm is told beside the name."""
        from timm import is_model, list_models

        name = self.name.split(".")[0]
        if not is_model(name):
            suggestions = ", ".join(get_close_matches(name, list_models(), 3))
            raise ValueError(
                f"encoder.name={self.name}: timm has no such model{'; it has ' + suggestions if suggestions else ''}"
            )
        kwargs: dict[str, Any] = {"in_chans": self.channels, "num_classes": 0}
        kwargs |= {"drop_path_rate": self.drop_path} if self.drop_path else {}
        return kwargs | ({"img_size": self.image_hw} if _takes_image_size(name) else {})

    def create(self) -> Any:
        """timm's model; ValueError where timm does not make it so."""
        from timm import create_model

        arguments = self.arguments
        try:
            return create_model(self.name, pretrained=False, **arguments)
        except (TypeError, AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"timm's {self.name} cannot be built with {arguments}: {error}") from error

    def build(self) -> "TimmEncoder":
        """A freshly initialized encoder; raises ValueError where timm cannot build it, or it has no tokens."""
        return TimmEncoder(self)


@cache
def _takes_image_size(name: str) -> bool:
    """Whether timm's model is built for an image size; convolutional networks take any, and no such argument."""
    from timm import create_model

    with torch.device("meta"):
        return hasattr(getattr(create_model(name, num_classes=0), "patch_embed", None), "img_size")


class Bit(ImageInput):
    """A ResNet of Big Transfer, the paper's baseline (4.1): GroupNorm, weight-standardised convolutions."""

    kind: Literal["bit"] = "bit"
    depth: Literal[50, 101, 152, 200] = Field(default=50, description="layers: 50, 101, 152 or 200")
    widen: int = Field(default=1, ge=1, description="times the usual width; R50x2 is depth=50 widen=2")
    pool: Pool = Field(default="mean", description="read-out: there is no class token")

    @property
    def title(self) -> str:
        """Such as R50x1."""
        return f"R{self.depth}x{self.widen}"

    def create(self) -> Any:
        """timm's pre-activation ResNetV2, also in the sizes that timm gives no name."""
        from timm.layers.std_conv import StdConv2d
        from timm.models.resnetv2 import ResNetV2

        return ResNetV2(
            layers=list(BLOCKS_PER_STAGE[self.depth]),
            width_factor=self.widen,
            in_chans=self.channels,
            num_classes=0,
            stem_type="fixed",
            conv_layer=partial(StdConv2d, eps=EPS),
            global_pool="",
        )

    def build(self) -> "TimmEncoder":
        """A freshly initialized encoder."""
        return TimmEncoder(self)


def hybrid(channels: int, patch: int, width: int, image_hw: tuple[int, int]) -> nn.Module:
    """Patches [B, N, D] of a ResNet-50's feature map, each position one patch (paper 3.1 and 4.1).

    Of stage 4 (blocks 3, 4, 6, 3) where a position stands for 32 pixels; for 16, stage 4 is left out and its blocks
    lengthen stage 3 (3, 4, 9). Post-activation, as in the authors' code.
    """
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.layers.std_conv import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2

    backbone = ResNetV2(
        layers=[3, 4, 6, 3] if patch == 32 else [3, 4, 9],
        num_classes=0,
        global_pool="",
        in_chans=channels,
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=EPS),
        zero_init_last=True,
    )
    return HybridEmbed(backbone, img_size=image_hw, patch_size=1, in_chans=channels, embed_dim=width)


class TimmEncoder(NormalizedEncoder):
    """image uint8 [B, C, H, W] -> tokens: a transformer's, or the positions of a feature map in raster order."""

    state_dict_prefix = "model."
    config: Any  # TimmZoo, Bit or AxialResnet: what has `create`
    grid: tuple[int, int]

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = config.create()
        convolve_in_fp32_on_cpu(self.model)
        with torch.device("meta"), torch.enable_grad():
            meta_model, patch_outputs = config.create().eval(), []
            if hasattr(meta_model, "patch_embed"):
                meta_model.patch_embed.register_forward_hook(
                    lambda _module, _inputs, output: patch_outputs.append(output)
                )
            try:
                output = meta_model.forward_features(torch.empty(1, config.channels, *config.image_hw))
            except (AssertionError, RuntimeError, ValueError) as error:
                size = " x ".join(map(str, config.image_hw))
                raise ValueError(f"timm's {config.title} takes no image of {size}: {error}") from error
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise ValueError(f"timm's {config.title} gives neither tokens nor a feature map")
        self.width = int(self.model.num_features)
        self.channels_last = output.ndim == 4 and output.shape[1] != self.width
        self.prefix = int(getattr(meta_model, "num_prefix_tokens", 0)) if output.ndim == 3 else 0
        height, width = config.image_hw
        if output.ndim == 4:
            rows, columns = output.shape[1:3] if self.channels_last else output.shape[2:]
            self.grid = rows, columns
        else:
            patches = output.shape[1] - self.prefix
            rows = max(1, round((patches * height / width) ** 0.5))
            rows, columns = getattr(getattr(meta_model, "patch_embed", None), "grid_size", (rows, patches // rows))
            self.grid = rows, columns
        if output.ndim == 3 and self.grid[0] * self.grid[1] != output.shape[1] - self.prefix:
            raise ValueError(f"timm's {config.title}: its tokens are no grid of patches")
        self.stride = -(-height // self.grid[0])
        patch = getattr(getattr(meta_model, "patch_embed", None), "patch_size", None)
        if output.ndim == 3 and isinstance(patch, tuple) and (height % patch[0] or width % patch[1]) and patch[0] > 1:
            raise ValueError(
                f"timm's {config.title} cuts patches of {patch[0]} x {patch[1]}; {height} x {width} leaves some"
            )
        with torch.enable_grad():
            output.sum().backward()  # what no token comes from, as timm's pooling, learns nothing: DDP would wait
        for name, parameter in meta_model.named_parameters():
            self.model.get_parameter(name).requires_grad_(parameter.grad is not None)
        patches = _flatten_patches(patch_outputs[0]) if patch_outputs and isinstance(patch_outputs[0], Tensor) else None
        self.maskable = (
            output.ndim == 3
            and patches is not None
            and patches.shape[1:] == (output.shape[1] - self.prefix, self.width)
            and (self.stride * self.grid[0], self.stride * self.grid[1]) == (height, width)
        )
        if config.pool == "class" and not self.prefix:
            raise ValueError(NO_CLASS_TOKEN)
        self._edit: Edit | None = None
        self._checkpoints_blocks = False
        if self.maskable:
            self.model.patch_embed.register_forward_hook(self._apply_edit)

    def _apply_edit(self, _module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        if self._edit is None:
            return patches
        return self._edit(_flatten_patches(patches)).view(patches.shape)

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts that follow one another."""
        if hasattr(self.model, "blocks"):
            return list(self.model.blocks)
        return [block for stage in getattr(self.model, "stages", ()) for block in getattr(stage, "blocks", (stage,))]

    @property
    def depth(self) -> int:
        """How many layers there are to take tokens from; one, the last, of what is no plain stack of blocks."""
        return len(self.model.blocks) if self.maskable and hasattr(self.model, "forward_intermediates") else 1

    @property
    def activation_checkpointing(self) -> bool:
        """In training, keep each block's input only and compute the rest again."""
        return self._checkpoints_blocks

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        if enabled != self._checkpoints_blocks:  # some models refuse to be asked at all
            try:
                self.model.set_grad_checkpointing(enabled)
            except (AssertionError, AttributeError) as error:
                text = f"activation_checkpointing: timm's {self.config.title} has none; leave it out"
                raise ExitError(ExitCode.USAGE, text) from error
            self._checkpoints_blocks = enabled

    def forward(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        """See `ssl_vit.model.Encoder`; raises ValueError where the image is not the size the encoder was built for."""
        self.check_size(image)
        if edit is not None and not self.maskable:
            raise ValueError("this encoder has no patch embeddings to edit")
        self._edit = edit
        try:
            x = self._to_tokens(self.model.forward_features(self.normalize(image)))
        finally:
            self._edit = None
        return x if select is None else x.gather(1, select[:, :, None].expand(-1, -1, x.shape[2]))

    def layers(self, image: Tensor, numbers: Collection[int]) -> dict[int, Tensor]:
        """The tokens [B, T, D] after the blocks of these numbers, from 1, each through the final norm."""
        if self.depth == 1:
            return {number: self(image) for number in numbers}
        indices = sorted(numbers)
        options = {"indices": [n - 1 for n in indices], "norm": True, "output_fmt": "NLC", "intermediates_only": True}
        if "return_prefix_tokens" in inspect.signature(self.model.forward_intermediates).parameters:
            options["return_prefix_tokens"] = True
        intermediates = self.model.forward_intermediates(self.normalize(image), **options)
        tokens = [item if isinstance(item, Tensor) else torch.cat([item[1], item[0]], dim=1) for item in intermediates]
        return dict(zip(indices, tokens, strict=True))

    def _to_tokens(self, output: Tensor) -> Tensor:
        if output.ndim == 3:
            return output
        return output.flatten(1, 2) if self.channels_last else output.flatten(2).transpose(1, 2)


def _flatten_patches(patches: Tensor) -> Tensor:
    """Patches [B, N, D] of what timm's patch embedding gives, which is a map [B, h, w, D] where any size may come."""
    return patches.flatten(1, 2) if patches.ndim == 4 else patches
