"""Weighted k nearest neighbors on frozen features: cosine similarity, votes weighted by exp(similarity / temperature).

The protocol of instance discrimination (Wu et al. 2018) and DINO; iBOT took it for masked patch prediction too.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_vit.config import Config

CHUNK = 1 << 24  # similarities that are held at once


class Knn(Config):
    """k-NN evaluation."""

    k: int = Field(default=20, ge=1, description="neighbors that vote")
    temperature: float = Field(default=0.07, gt=0, description="of their votes' weight, exp(similarity / temperature)")


def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes [M, classes] for test features [M, D] by training features [N, D] of class numbers int64 [N]."""
    train, k = F.normalize(train.float(), dim=1), min(k, len(train))
    chunks = []
    for chunk in test.split(max(1, CHUNK // len(train))):
        similarity, nearest = (F.normalize(chunk.float(), dim=1) @ train.T).topk(k, 1)
        # relative to the nearest: the same order, and no overflow at small temperatures
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        chunks.append(votes.scatter_add_(1, labels[nearest], weight))
    return torch.cat(chunks)
