"""The masked objectives in a small size, and their targets by plain loops."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.encoders.vit import Vit
from ssl_vit.heads import clusters
from ssl_vit.heads.mean_color import MeanColor, PatchColors
from ssl_vit.heads.patch_pixels import PatchPixels

SIDE, PATCH = 16, 4  # a grid of 4 x 4
SIZES: dict[str, Any] = {"size": "Ti", "width": 32, "depth": 2, "heads": 2, "patch": PATCH, "image": SIDE}
MASKINGS: dict[str, dict[str, Any]] = {
    "single": {},
    "units": {"mask_unit": 2, "mix": (0.5, 0.3, 0.2)},
    "blocks": {"mask_blockwise": True},
}
KINDS = ("mean_color", "patch_colors", "pixels", "normalized", "colors", "patches")
PIXELS = ("pixels", "normalized")


def vit(**update: Any) -> Vit:
    return Vit(**SIZES | update)


def make_codebook(folder: Path, space: str, patch: int = PATCH, count: int = 7, seed: int = 2) -> str:
    width = 3 if space == "color" else 3 * patch**2
    centers = torch.rand(count, width, generator=torch.Generator().manual_seed(seed))
    clusters.write_codebook(folder / f"{space}.safetensors", centers, {"space": space})
    return str(folder / f"{space}.safetensors")


def head_config(kind: str, folder: Path, **masking: Any) -> Any:
    if kind in ("colors", "patches"):
        return clusters.Clusters(
            codebook=make_codebook(folder, {"colors": "color", "patches": "patch"}[kind]), **masking
        )
    if kind in PIXELS:
        return PatchPixels(normalize=kind == "normalized", **masking)
    return {"mean_color": MeanColor, "patch_colors": PatchColors}[kind](**masking)


def make_encoder_and_head(kind: str, folder: Path, encoder: Any = None, **masking: Any) -> tuple[Any, Any]:
    """An encoder and the head of a kind for it."""
    torch.manual_seed(0)
    built_encoder = (encoder or vit()).build()
    return built_encoder, head_config(kind, folder, **masking).build(built_encoder, classes=0)


def make_batch(count: int = 5, side: int = SIDE, classes: int = 0) -> dict[str, Tensor]:
    """Noise over flat patches, labeled in turn where there are classes."""
    random = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 64, (count, 3, side, side), generator=random)
    color = torch.randint(0, 192, (count, 3, side // 4, side // 4), generator=random)
    return {
        "image": (noise + color.repeat_interleave(4, 2).repeat_interleave(4, 3)).to(torch.uint8),
        "label": torch.arange(count) % classes if classes else torch.full((count,), -1),
        "seed": torch.arange(count) * 977 + 5,
        "valid": torch.ones(count, dtype=torch.bool),
    }


def patches_of(image: Tensor, patch: int) -> np.ndarray:
    """[B, N, C, P, P] by a plain loop over rows and columns."""
    patches = []
    for picture in image.numpy():
        for top in range(0, picture.shape[1], patch):
            for left in range(0, picture.shape[2], patch):
                patches.append(picture[:, top : top + patch, left : left + patch])
    return np.stack(patches).reshape(len(image), -1, image.shape[1], patch, patch)


def color_class(cell: np.ndarray, bits: int = 3) -> int:
    """Of [C, h, w], 512-way with three bits: in integers, as reference 2.4 has it."""
    label = 0
    for channel in cell:
        label = (label << bits) + min(2**bits - 1, (int(channel.astype(int).sum()) << bits) // (255 * channel.size))
    return label


def expected_targets(kind: str, head: Any, image: Tensor) -> np.ndarray:
    """The target of each patch, [B, N, ...]."""
    patches = patches_of(image, PATCH)
    if kind == "mean_color":
        return np.array([[[color_class(patch)] for patch in row] for row in patches])
    if kind == "patch_colors":
        cells = [
            [patch[:, r : r + 1, c : c + 1] for r in range(4) for c in range(4)] for row in patches for patch in row
        ]
        return np.array([[color_class(cell) for cell in row] for row in cells]).reshape(*patches.shape[:2], 16)
    flat = patches.reshape(*patches.shape[:2], -1).astype(np.float64)
    if kind in PIXELS:
        flat = flat / 127.5 - 1
        if kind == "normalized":
            flat = (flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + 1e-6)
        return flat
    points = (flat if kind == "patches" else patches.reshape(*patches.shape[:3], -1).mean(3)) / 255
    distance = ((points[:, :, None] - head.target.centers.double().numpy()) ** 2).sum(3)
    return distance.argmin(2)[:, :, None]
