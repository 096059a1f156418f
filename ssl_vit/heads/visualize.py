"""Small pictures made of tensors."""

import torch
from torch import Tensor

MIN_SIDE = 96  # pixels of an image's longer side


def outline(side: int, device: torch.device) -> Tensor:
    """The border of a square, bool [side * side] in raster order."""
    edge = torch.ones(side, side, dtype=torch.bool, device=device)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def image_grid(columns: list[Tensor], gap: int = 2) -> Tensor:
    """Columns of images, each uint8 [B, 3, h, w], side by side and one row an image -> uint8 [3, H, W].

    Small images are drawn larger, each pixel as a square.
    """
    cells = torch.stack(columns, dim=1)  # [B, columns, 3, h, w]
    scale = max(1, MIN_SIDE // max(cells.shape[3:]))
    cells = cells.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    cells = torch.nn.functional.pad(cells, (gap, 0, gap, 0), value=255)
    b, n, c, h, w = cells.shape
    return cells.permute(2, 0, 3, 1, 4).reshape(c, b * h, n * w)


def split_grid(picture: Tensor, height: int, width: int, gap: int = 2) -> Tensor:
    """What `grid` put side by side, uint8 [3, H, W] -> [B, columns, 3, height, width]."""
    scale = max(1, MIN_SIDE // max(height, width))
    rows = picture.unflatten(2, (-1, gap + scale * width)).unflatten(1, (-1, gap + scale * height))
    return rows.permute(1, 3, 0, 2, 4)[..., gap::scale, gap::scale]  # a pixel of each square
