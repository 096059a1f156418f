"""Position embeddings: learned 1-D tables, and how they change resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def learned(tokens: int, width: int) -> nn.Parameter:
    """A learned table [1, T, D], normal(0.02): it knows nothing of 2-D and must learn it (paper 3.1)."""
    return nn.Parameter(torch.randn(1, tokens, width) * 0.02)


def resize(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """A position table [1, P + h*w, D] for another grid (rows, columns), interpolated in 2-D (paper 3.2).

    Bilinear and corner-aligned, as the authors' released code does it: new index i sits at i * (old - 1) / (new - 1).
    The first `prefix` rows (class token) are kept as they are.
    """
    if old == new:
        return table
    rows = table[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    rows = F.interpolate(rows.float(), size=new, mode="bilinear", align_corners=True)
    rows = rows.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], rows], dim=1)
