"""Learned classes instead of the 512 of a regular grid: clusters of mean colors or of whole patches, by k-means.

iBOT (Table 20) found clusters of raw patches better than 3-bit colors. `tools/fit_clusters.py` fits them on shards.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.files import write_bytes
from ssl_vit.heads.masked_prediction import ClassTarget, MaskedPrediction, MaskedPredictionHead
from ssl_vit.model import Encoder

ClusterSpace = Literal["color", "patch"]


class Clusters(MaskedPrediction):
    """Predict the cluster that corrupted patches belong to."""

    kind: Literal["clusters"] = "clusters"
    codebook: str | None = Field(default=None, description="file of tools/fit_clusters.py; a copy is kept in the run")

    def build(self, encoder: Encoder, classes: int) -> MaskedPredictionHead:
        """The head for an encoder; ValueError where there is no codebook, or it is one of other patches."""
        del classes
        self.check_encoder(encoder)
        if self.codebook is None:
            raise ValueError("head.codebook: it must be given; tools/fit_clusters.py makes one from shards")
        return MaskedPredictionHead(self, encoder, ClusterTarget(encoder, read_codebook(self.codebook, encoder)))


def read_codebook(path: str, encoder: Encoder) -> Tensor:
    """The centers [K, d] of a file, of colors or of an encoder's patches; ValueError where they are neither."""
    try:
        with safe_open(path, framework="pt") as file:
            centers = file.get_tensor("centers")
    except (OSError, SafetensorError) as error:
        hint = "tools/fit_clusters.py makes one from shards, and a run keeps a copy, codebook.safetensors"
        raise ValueError(f"head.codebook={path}: cannot be read as a codebook ({error}); {hint}") from error
    sizes = {encoder.channels, encoder.channels * encoder.stride**2}
    if centers.ndim != 2 or centers.shape[1] not in sizes or not centers.isfinite().all():
        raise ValueError(f"head.codebook={path}: is not of colors, nor of patches of {encoder.stride} pixels")
    return centers.float()


def write_codebook(path: Path, centers: Tensor, metadata: dict[str, str]) -> None:
    """Write centers [K, d] and what they were made of, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"codebook": json.dumps(metadata)}  # in one key: of several safetensors writes any first
    write_bytes(path, save({"centers": centers.float().contiguous()}, metadata=header))


def patch_vectors(image: Tensor, patch: int, space: ClusterSpace) -> Tensor:
    """What is clustered, from 0 to 1: image uint8 [B, C, H, W] -> mean colors [B, N, C] or patches [B, N, C P^2]."""
    pixels = image.float() / 255
    if space == "color":
        return F.avg_pool2d(pixels, patch).flatten(2).transpose(1, 2)
    return F.unfold(pixels, patch, stride=patch).transpose(1, 2)


def nearest_center(points: Tensor, centers: Tensor) -> Tensor:
    """points [B, N, d] -> the number of the nearest of centers [K, d], int64 [B, N], in fp32 whatever the precision."""
    with torch.autocast(points.device.type, enabled=False):
        return (centers.square().sum(1) - 2 * points.float() @ centers.T).argmin(2)


def fit_kmeans(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Centers [K, d] of points [M, d] by mini-batch k-means (scikit-learn)."""
    from sklearn.cluster import MiniBatchKMeans

    options: dict[str, Any] = {"random_state": seed, "batch_size": max(4096, 4 * clusters), "n_init": 3}
    model = MiniBatchKMeans(clusters, **options).fit(points.numpy())
    return torch.from_numpy(model.cluster_centers_).float()


class ClusterTarget(ClassTarget):
    """One class per patch: the nearest of `centers` [K, d], by mean color (d = C) or by the patch (d = C P^2)."""

    centers: Tensor

    def __init__(self, encoder: Encoder, centers: Tensor):
        super().__init__(len(centers))
        self.patch = encoder.stride
        self.space: ClusterSpace = "color" if centers.shape[1] == encoder.channels else "patch"
        self.register_buffer("centers", centers, persistent=False)

    def targets(self, encoder: Encoder, image: Tensor) -> Tensor:
        """The cluster of each patch [B, N, 1]."""
        return nearest_center(patch_vectors(image, self.patch, self.space), self.centers)[:, :, None]

    def render(self, encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
        """The centers."""
        blocks = 255 * self.centers[target[:, :, 0]].transpose(1, 2)
        return blocks if self.space == "patch" else blocks.repeat_interleave(self.patch**2, 1)
