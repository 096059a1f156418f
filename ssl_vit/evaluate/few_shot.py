"""Few-shot accuracy in closed form: least squares from frozen features of a few images to targets -1 and 1 (paper 4.1).

Details as in the authors' later evaluator: features standardised by the support set, a constant feature of 100 in place
of a bias, l2 = 1024 on all weights, three draws of the support.
"""

from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ssl_vit.config import Config
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.rng import hash_key, permutation

CONSTANT = 100.0  # a feature that is always this: l2 hardly touches its weight


class FewShotConfig(Config):
    """Few-shot evaluation."""

    shots: tuple[int, ...] = Field(default=(1, 5, 10, 25), description="images a class to learn from")
    seeds: int = Field(default=3, ge=1, description="draws of these images")
    l2: float = Field(default=1024.0, gt=0, description="weight of the squared weights")

    @field_validator("shots")
    @classmethod
    def _check_shots(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if not shots or min(shots) < 1:
            raise ValueError("one or more numbers from 1, with commas between them")
        return shots


class FewShot(NamedTuple):
    """A linear map from features to a score a class."""

    weights: Tensor  # float64 [D + 1, classes]; the last row belongs to the constant feature
    mean: Tensor  # float64 [D]
    std: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """features [M, D] -> float64 [M, classes]."""
        return _with_constant((features.double() - self.mean) / self.std) @ self.weights

    def predict(self, features: Tensor) -> Tensor:
        """features [M, D] -> class numbers int64 [M]."""
        return self.scores(features).argmax(1)


def solve(features: Tensor, labels: Tensor, classes: int, l2: float = 1024.0) -> FewShot:
    """The ridge solution for features [N, D] and class numbers int64 [N], in float64.

    Solved over features where there are at least as many images, else over images: the same weights by less work.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} for {classes} classes")
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x = _with_constant((x - mean) / std)
    y = torch.full((len(x), classes), -1.0, dtype=x.dtype, device=x.device)
    y[torch.arange(len(x)), labels] = 1.0
    primal = x.shape[0] >= x.shape[1]
    gram = x.T @ x if primal else x @ x.T
    gram.diagonal().add_(l2)
    factor = torch.linalg.cholesky(gram)
    weights = torch.cholesky_solve(x.T @ y, factor) if primal else x.T @ torch.cholesky_solve(y, factor)
    return FewShot(weights, mean, std)


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_full((len(x), 1), CONSTANT)], 1)


def sample_support(labels: Tensor, classes: int, shots: int, seed: int) -> Tensor:
    """Ids int64 [classes * shots] of so many images a class; of one seed, fewer shots are among more.

    Raises ExitError(DATA) naming a class that has fewer.
    """
    support_ids = []
    for class_id in range(classes):
        class_samples = np.flatnonzero(labels.cpu().numpy() == class_id)
        if len(class_samples) < shots:
            raise ExitError(
                ExitCode.DATA, f"few_shot.shots={shots}: class number {class_id} has {len(class_samples)} images"
            )
        support_ids.append(class_samples[permutation(hash_key("support", seed, class_id), len(class_samples))[:shots]])
    return torch.from_numpy(np.concatenate(support_ids))


def few_shot_accuracies(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, config: FewShotConfig
) -> dict[int, list[float]]:
    """For each number of shots that all classes have, the accuracy on the test images [M, D] by seed."""
    max_shots = int(torch.bincount(train_labels[train_labels >= 0], minlength=classes).min())
    results = {}
    for shots in (n for n in config.shots if n <= max_shots):
        ids = [sample_support(train_labels, classes, shots, seed) for seed in range(config.seeds)]
        models = (solve(train[i], train_labels[i], classes, config.l2) for i in ids)
        results[shots] = [float((model.predict(test) == test_labels).double().mean()) for model in models]
    return results
