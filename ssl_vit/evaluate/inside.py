"""One pass over images that looks into an encoder: rollouts, maps, attention distances, features; little is held."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssl_vit.data.stream import EvaluationStream, Share
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
