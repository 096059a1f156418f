"""Look into an encoder by hooks, and what its weights and features show."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssl_vit.data.loader import EvaluationStream, Share
from ssl_vit.encoders.layers import Axes, Table
from ssl_vit.evaluate.attention import Query, Rollout, distances, has_class_token, places, watched
from ssl_vit.model import Batch, read_out

NUMBERS = 1 << 27  # of attention that are held at once, 0.5 GB
HEADS = 16  # assumed of a layer, to know how many images that are

Parts = dict[str, list[Tensor]]


@dataclass
class Found:
    """What was measured, on the CPU; layers by the name of the module, in their order."""

    rollouts: Parts = field(default_factory=lambda: defaultdict(list))  # by query: [B, N], of images that are drawn
    maps: Parts = field(default_factory=lambda: defaultdict(list))  # by layer: [B, heads, N], of the same
    distances: Parts = field(default_factory=lambda: defaultdict(list))  # by layer: [B, heads], pixels
    drawn: list[Batch] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # [B, D]
    labels: list[Tensor] = field(default_factory=list)
    at: list[Tensor] = field(default_factory=list)  # which of the stream's samples

    def mean_distances(self) -> dict[str, Tensor]:
        """Of each layer its heads' mean over the images, [heads]."""
        return {name: torch.cat(parts).mean(0) for name, parts in self.distances.items()}


@dataclass(frozen=True)
class Wanted:
    """How many images are drawn and measured, and what is kept of those that are drawn."""

    drawn: int
    measured: int
    compared: int  # whose features are kept
    layers: frozenset[str]  # whose maps are drawn
    query: Query
    readout: str


@torch.no_grad()
def look(encoder: Any, stream: EvaluationStream, wanted: Wanted) -> Found:
    """Look at every sample of a stream; samples that cannot be read are left out."""
    found, seen = Found(), 0
    tokens = encoder.prefix + encoder.grid[0] * encoder.grid[1]
    at_once = max(1, NUMBERS // (HEADS * tokens**2))
    for start, batch in stream.placed(Share(micro_batch=stream.batch), next(encoder.parameters()).device):
        rows = torch.nonzero(batch["valid"])[:, 0]
        batch = {name: value[rows] for name, value in batch.items()}
        drawn, measured, compared = (
            max(0, most - seen) for most in (wanted.drawn, wanted.measured, max(wanted.compared, wanted.drawn))
        )
        if drawn:
            found.drawn.append({name: value[:drawn].cpu() for name, value in batch.items()})
        for part in batch["image"][:drawn].split(at_once):
            _look(encoder, part, found, wanted, draw=True)
        for part in batch["image"][drawn : max(drawn, measured)].split(at_once):
            _look(encoder, part, found, wanted, draw=False)
        if compared:
            vectors = read_out(encoder(batch["image"][:compared]), wanted.readout, encoder.prefix)
            found.features.append(vectors.float().cpu().clone())  # a view would hold all tokens
            found.labels.append(batch["label"][:compared].cpu())
            found.at.append(start + rows[:compared].cpu())
        seen += len(rows)
    return found


def _look(encoder: Any, image: Tensor, found: Found, wanted: Wanted, draw: bool) -> None:
    """The attention of some images; of layers whose tokens are the encoder's own, which windows and maps are not."""
    if not len(image) or not places(encoder):
        return
    patches = encoder.grid[0] * encoder.grid[1]
    whole = (encoder.prefix + patches,) * 2
    joint, layers = Rollout(), 0

    def take(name: str, maps: Tensor) -> None:
        nonlocal layers
        if maps.shape[0] != len(image) or maps.shape[2:] != whole:
            return
        layers += 1
        found.distances[name].append(distances(maps, encoder.grid, encoder.stride).cpu())
        if draw:
            joint.add(maps)
        if draw and name in wanted.layers:
            asked = maps[:, :, 0] if wanted.query == "class" else maps[:, :, encoder.prefix :].mean(2)
            found.maps[name].append(asked[:, :, encoder.prefix :].cpu())

    with watched(encoder, take):
        encoder(image)
    if draw and layers == len(places(encoder)):
        for query in ("class", "mean") if has_class_token(encoder) else ("mean",):
            found.rollouts[query].append(joint.of(encoder.prefix, query).cpu())


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
