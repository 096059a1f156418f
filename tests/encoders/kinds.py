"""One small encoder of every kind and variant, and what tests of their contract compare."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ssl_vit.encoders.axial import Axial, AxialResnet
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit

TINY: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": (12, 16)}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{kind}-{placement}": {"positions": kind, "position_placement": placement}
    for kind in ("1d", "2d", "relative")
    for placement in ("stem", "every", "shared")
} | {"none-None": {"positions": "none", "position_placement": None}}

TRANSFORMERS: dict[str, Any] = {
    **{f"vit-{name}": Vit(**TINY, **variant) for name, variant in VARIANTS.items()},
    **{
        f"vit-{name}-mean": Vit(**TINY, **variant, class_token=False, pool="mean") for name, variant in VARIANTS.items()
    },
    **{f"axial-{name}": Axial(**TINY, **variant) for name, variant in VARIANTS.items() if name != "relative-shared"},
    "vit-class-mean": Vit(**TINY, pool="mean"),
    "vit-gray": Vit(**TINY, channels=1),
    "vit-four-channels": Vit(**TINY, channels=4, mean=(0.1, 0.2, 0.3, 0.4)),
}
FEATURES: dict[str, Any] = {
    "hybrid-16": Vit(size="Ti", width=16, depth=1, heads=2, patch=16, image=(32, 48), stem="r50"),
    "hybrid-32": Vit(size="Ti", width=16, depth=1, heads=2, patch=32, image=(64, 32), stem="r50", channels=1),
    "bit": Bit(image=(32, 64)),
    "axial_resnet": AxialResnet(image=(64, 96)),
    "timm-vit": TimmZoo(name="vit_tiny_patch16_224", image=(32, 48), channels=4),
    "timm-resnet": TimmZoo(name="test_resnet", image=(64, 32)),
}
CONFIGS = TRANSFORMERS | FEATURES
PREFIX = {name: 1 if name.startswith(("vit", "hybrid", "timm-vit")) else 0 for name in CONFIGS}
PREFIX |= {f"vit-{name}-mean": 0 for name in VARIANTS}


def random_images(config: Any, count: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, config.channels, *config.image_hw), dtype=torch.uint8, generator=random)


def build_fresh(config: Any) -> Any:
    torch.manual_seed(0)
    return config.build()


@cache
def _cached_encoder(config: Any) -> Any:
    """Kept: to draw the weights of a ResNet takes a second."""
    return build_fresh(config)


def make_encoder(config: Any) -> Any:
    """An encoder of seed 0, a new one."""
    return copy.deepcopy(_cached_encoder(config)) if config in FEATURES.values() else build_fresh(config)


def gather_tokens(tokens: Tensor, select: Tensor) -> Tensor:
    """Tokens [B, T, D] of select [B, S], by a plain loop."""
    return torch.stack([row[index] for row, index in zip(tokens, select, strict=True)])


def selections(encoder: Any, count: int) -> dict[str, Tensor]:
    """Tokens to ask for, of T."""
    num_tokens = encoder.prefix + encoder.grid[0] * encoder.grid[1]
    random = torch.Generator().manual_seed(7)
    shuffled = torch.stack([torch.randperm(num_tokens, generator=random) for _ in range(count)])
    return {
        "half": shuffled[:, : num_tokens // 2],
        "one": shuffled[:, :1],
        "all, unordered": shuffled,
        "all": torch.arange(num_tokens).expand(count, -1),
        "the first": torch.zeros(count, 1, dtype=torch.int64),
        "repeated": shuffled[:, [0, 1, 0, 0, 1]],
    }
