"""Look into an encoder by hooks, and what its weights and features show."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.encoders.layers import Position1d, Position2d
from ssl_vit.evaluate.attention import (
    Query,
    Rollout,
    attention_distances,
    capture_attention,
    find_attention_layers,
    has_class_token,
)
from ssl_vit.model import Batch, pool_tokens

MAX_ATTENTION_ELEMENTS = 1 << 27  # of attention that are held at once, 0.5 GB
ASSUMED_HEADS = 16  # assumed of a layer, to know how many images that are

TensorLists = dict[str, list[Tensor]]


@dataclass
class Measurements:
    """What was measured, on the CPU; layers by the name of the module, in their order."""

    rollouts: TensorLists = field(
        default_factory=lambda: defaultdict(list)
    )  # by query: [B, N], of images that are drawn
    maps: TensorLists = field(default_factory=lambda: defaultdict(list))  # by layer: [B, heads, N], of the same
    distances: TensorLists = field(default_factory=lambda: defaultdict(list))  # by layer: [B, heads], pixels
    drawn_batches: list[Batch] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # [B, D]
    labels: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)  # which of the stream's samples

    def mean_distances(self) -> dict[str, Tensor]:
        """Of each layer its heads' mean over the images, [heads]."""
        return {name: torch.cat(parts).mean(0) for name, parts in self.distances.items()}


@dataclass(frozen=True)
class Request:
    """How many images are drawn and measured, and what is kept of those that are drawn."""

    drawn: int
    measured: int
    compared: int  # whose features are kept
    layers: frozenset[str]  # whose maps are drawn
    query: Query
    readout: str


@torch.no_grad()
def collect(encoder: Any, stream: EvaluationStream, request: Request) -> Measurements:
    """Look at every sample of a stream; samples that cannot be read are left out."""
    measurements, num_seen = Measurements(), 0
    tokens = encoder.prefix + encoder.grid[0] * encoder.grid[1]
    chunk_size = max(1, MAX_ATTENTION_ELEMENTS // (ASSUMED_HEADS * tokens**2))
    for start, batch in stream.enumerate_batches(
        ProcessShard(micro_batch=stream.batch), next(encoder.parameters()).device
    ):
        rows = torch.nonzero(batch["valid"])[:, 0]
        batch = {name: value[rows] for name, value in batch.items()}
        num_drawn, num_measured, num_compared = (
            max(0, limit - num_seen)
            for limit in (request.drawn, request.measured, max(request.compared, request.drawn))
        )
        if num_drawn:
            measurements.drawn_batches.append({name: value[:num_drawn].cpu() for name, value in batch.items()})
        for chunk in batch["image"][:num_drawn].split(chunk_size):
            _measure_attention(encoder, chunk, measurements, request, draw=True)
        for chunk in batch["image"][num_drawn : max(num_drawn, num_measured)].split(chunk_size):
            _measure_attention(encoder, chunk, measurements, request, draw=False)
        if num_compared:
            vectors = pool_tokens(encoder(batch["image"][:num_compared]), request.readout, encoder.prefix)
            measurements.features.append(vectors.float().cpu().clone())  # a view would hold all tokens
            measurements.labels.append(batch["label"][:num_compared].cpu())
            measurements.indices.append(start + rows[:num_compared].cpu())
        num_seen += len(rows)
    return measurements


def _measure_attention(encoder: Any, image: Tensor, measurements: Measurements, request: Request, draw: bool) -> None:
    """The attention of some images; of layers whose tokens are the encoder's own, which windows and maps are not."""
    if not len(image) or not find_attention_layers(encoder):
        return
    patches = encoder.grid[0] * encoder.grid[1]
    shape = (encoder.prefix + patches,) * 2
    rollout, num_layers = Rollout(), 0

    def on_maps(name: str, maps: Tensor) -> None:
        nonlocal num_layers
        if maps.shape[0] != len(image) or maps.shape[2:] != shape:
            return
        num_layers += 1
        measurements.distances[name].append(attention_distances(maps, encoder.grid, encoder.stride).cpu())
        if draw:
            rollout.add(maps)
        if draw and name in request.layers:
            query_maps = maps[:, :, 0] if request.query == "class" else maps[:, :, encoder.prefix :].mean(2)
            measurements.maps[name].append(query_maps[:, :, encoder.prefix :].cpu())

    with capture_attention(encoder, on_maps):
        encoder(image)
    if draw and num_layers == len(find_attention_layers(encoder)):
        for query in ("class", "mean") if has_class_token(encoder) else ("mean",):
            measurements.rollouts[query].append(rollout.to_patches(encoder.prefix, query).cpu())


def first_convolution(encoder: Any) -> nn.Conv2d | None:
    """What meets the pixels first: the patch embedding, or of a hybrid or a ResNet its root."""
    convolutions = (module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return next((conv for conv in convolutions if conv.in_channels == encoder.channels), None)


def principal_components(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Of D filters [D, C, h, w]: components [K, C, h, w], orthonormal, and the variance of each [K], falling.

    The paper does not say whether filters were centerd: here they are, and each component's largest weight is positive.
    """
    flat = filters.flatten(1).double()
    flat = flat - flat.mean(0)
    _, singular_values, components = torch.linalg.svd(flat, full_matrices=False)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    return components.unflatten(1, filters.shape[1:]), singular_values.square() / max(1, len(flat) - 1)


def position_table(encoder: Any) -> Tensor | None:
    """The row [N, D] of each patch in the table of positions, where an encoder has one; of every block, the first's."""
    inner = getattr(encoder, "model", encoder)
    positions = getattr(inner, "pos_embed", None)
    if positions is None:
        positions = next((module for module in encoder.modules() if isinstance(module, Position1d | Position2d)), None)
    if isinstance(positions, Position1d | Position2d):
        positions = positions()
    if not isinstance(positions, Tensor):
        return None
    rows = (
        positions.detach().flatten(1, -2)[0] if positions.ndim >= 3 else positions.detach()
    )  # some of timm's are maps [1, h, w, D]
    patches = encoder.grid[0] * encoder.grid[1]
    return rows[-patches:] if len(rows) >= patches else None


def similarity(table: Tensor) -> Tensor:
    """Cosine similarity of each row of a table [N, D] with each, [N, N] (paper Figure 7, center)."""
    rows = normalize(table.double(), dim=1)
    return rows @ rows.T


def nearest(features: Tensor, queries: Tensor, count: int) -> Tensor:
    """The `count` images nearest to each of those `queries` int64 [S], by the cosine of features [M, D]; [S, count].

    An image is not its own neighbor.
    """
    rows = normalize(features, dim=1)
    neighbors = []
    for chunk in queries.split(1024):  # all with all would grow with the square of the images
        similarities = rows[chunk] @ rows.T
        similarities[torch.arange(len(chunk)), chunk] = -2.0
        neighbors.append(similarities.topk(min(count, len(features) - 1), dim=1).indices)
    return torch.cat(neighbors)


def two_dimensions(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of features [M, D] as places [M, 2], and their shares of the variance [2]."""
    components, variance = principal_components(features)
    points = (features.double() - features.double().mean(0)) @ components[:2].T
    return points, variance[:2] / variance.sum().clamp(min=1e-300)
