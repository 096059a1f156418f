"""What an encoder's tables and features look like: filters, positions (paper 4.5, Figure 7), features of images."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssl_vit.encoders.positions import Axes, Table


def first_convolution(encoder: Any) -> nn.Conv2d | None:
    """What meets the pixels first: the patch embedding, or of a hybrid or a ResNet its root."""
    found = (module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return next((conv for conv in found if conv.in_channels == encoder.channels), None)


def principal_components(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Of D filters [D, C, h, w]: components [K, C, h, w], orthonormal, and the variance of each [K], falling.

    The paper does not say whether filters were centred: here they are, and each component's largest weight is positive.
    """
    flat = filters.flatten(1).double()
    flat = flat - flat.mean(0)
    _, spread, components = torch.linalg.svd(flat, full_matrices=False)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    return components.unflatten(1, filters.shape[1:]), spread.square() / max(1, len(flat) - 1)


def position_table(encoder: Any) -> Tensor | None:
    """The row [N, D] of each patch in the table of positions, where an encoder has one; of every block, the first's."""
    inner = getattr(encoder, "model", encoder)
    own = getattr(inner, "pos_embed", None)
    if own is None:
        own = next((module for module in encoder.modules() if isinstance(module, Table | Axes)), None)
    if isinstance(own, Table | Axes):
        own = own()
    if not isinstance(own, Tensor):
        return None
    rows = own.detach().flatten(1, -2)[0] if own.ndim >= 3 else own.detach()  # some of timm's are maps [1, h, w, D]
    patches = encoder.grid[0] * encoder.grid[1]
    return rows[-patches:] if len(rows) >= patches else None


def similarity(table: Tensor) -> Tensor:
    """Cosine similarity of each row of a table [N, D] with each, [N, N] (paper Figure 7, centre)."""
    rows = normalize(table.double(), dim=1)
    return rows @ rows.T


def nearest(features: Tensor, asked: Tensor, count: int) -> Tensor:
    """The `count` images nearest to each of those `asked` int64 [S], by the cosine of features [M, D]; [S, count].

    An image is not its own neighbour.
    """
    rows = normalize(features, dim=1)
    found = []
    for some in asked.split(1024):  # all with all would grow with the square of the images
        alike = rows[some] @ rows.T
        alike[torch.arange(len(some)), some] = -2.0
        found.append(alike.topk(min(count, len(features) - 1), dim=1).indices)
    return torch.cat(found)


def two_dimensions(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of features [M, D] as places [M, 2], and their shares of the variance [2]."""
    components, variance = principal_components(features)
    places = (features.double() - features.double().mean(0)) @ components[:2].T
    return places, variance[:2] / variance.sum().clamp(min=1e-300)
