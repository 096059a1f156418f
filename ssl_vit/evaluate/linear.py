"""A linear probe: logistic regression on frozen features, whole-batch by L-BFGS or in batches by SGD."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.rng import hash_key, permutation

CHUNK = 1 << 26  # numbers of features that are worked on at once


class LinearProbe(Config):
    """Linear probe; its l2 or rate is chosen on a part of the training features, then it is fitted to all of them."""

    solver: Literal["lbfgs", "sgd"] = Field(
        default="lbfgs", description="whole batch with l2, or BatchNorm and SGD 0.9 (as in MAE)"
    )
    l2: tuple[float, ...] = Field(default=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1), description="lbfgs: values to try")
    lr: tuple[float, ...] = Field(default=(0.01, 0.03, 0.1, 0.3, 1.0), description="sgd: rates to try")
    fraction: float = Field(default=0.1, gt=0, lt=1, description="of the training images, to choose by")
    steps: int = Field(default=300, ge=1, description="lbfgs: most iterations")
    epochs: int = Field(default=90, ge=1, description="sgd: epochs")
    batch: int = Field(default=1024, ge=2, description="sgd: images a step")

    @field_validator("l2", "lr")
    @classmethod
    def _check_values(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) <= 0:
            raise ValueError("one or more numbers above 0, with commas between them")
        return values


class Linear(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # [classes, D]
    bias: Tensor  # [classes]

    def scores(self, features: Tensor) -> Tensor:
        """features [M, D] -> logits [M, classes]."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit_lbfgs(
    features: Tensor, labels: Tensor, classes: int, l2: float, steps: int = 300, start: Linear | None = None
) -> Linear:
    """The minimum of mean cross-entropy + l2 / 2 * |weight|^2, the bias left free, for features [N, D].

    scikit-learn's LogisticRegression(C=1 / (l2 * N)) is the same problem. Features are taken in chunks. `start` is
    where the search begins, zero without it.
    """
    x = torch.zeros(classes, features.shape[1] + 1, dtype=features.dtype, device=features.device)
    if start is not None:
        x = torch.cat([start.weight, start.bias[:, None]], 1)
    x.requires_grad_()
    chunk_size = max(1, CHUNK // features.shape[1])
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total_loss = torch.zeros((), dtype=torch.float64, device=x.device)
        for chunk, chunk_labels in zip(features.split(chunk_size), labels.split(chunk_size), strict=True):
            logits = chunk @ x[:, :-1].T + x[:, -1]
            loss = F.cross_entropy(logits, chunk_labels, reduction="sum") / len(features)
            loss.backward()
            total_loss += loss.detach()
        penalty = l2 / 2 * x[:, :-1].square().sum()
        penalty.backward()
        return total_loss + penalty.detach()

    optimizer.step(closure)  # type: ignore[arg-type]
    solution = x.detach()
    return Linear(solution[:, :-1], solution[:, -1])


def fit_sgd(features: Tensor, labels: Tensor, classes: int, lr: float, config: LinearProbe, seed: int = 0) -> Linear:
    """BatchNorm without affine parameters, then a linear layer from zero; SGD 0.9, cosine, no decay, as MAE probes.

    Unlike MAE's, the features are of central crops, computed once. The norm is folded into the layer that is returned.
    """
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6, momentum=None).to(features)
    layer = nn.Linear(features.shape[1], classes).to(features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    batch = min(config.batch, len(features))
    steps = config.epochs * (len(features) // batch)
    for step in range(steps):
        epoch, start = divmod(step * batch, len(features) // batch * batch)
        if start == 0:
            order = torch.from_numpy(permutation(hash_key("probe", seed, epoch), len(features)))
        ids = order[start : start + batch]  # type: ignore[possibly-undefined]
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        F.cross_entropy(layer(norm(features[ids])), labels[ids]).backward()
        optimizer.step()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return Linear(weight, layer.bias.detach() - weight @ norm.running_mean)


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, config: LinearProbe, seed: int = 0
) -> tuple[Linear, float]:
    """The probe of features [N, D], standardised for the solver's sake, and the l2 or rate that was chosen for it.

    Chosen is what is best on the held-out part; of equals, the largest. Where that part would leave a class without an
    image to learn from, the middle value is taken.
    """
    mean, std = features.mean(0), features.std(0, correction=0) + 1e-5
    x = (features - mean) / std
    values = sorted(config.l2 if config.solver == "lbfgs" else config.lr, reverse=True)

    def fit_value(x: Tensor, labels: Tensor, value: float, start: Linear | None = None) -> Linear:
        if config.solver == "lbfgs":
            return fit_lbfgs(x, labels, classes, value, config.steps, start)
        return fit_sgd(x, labels, classes, value, config, seed)

    best_value, initial = values[len(values) // 2], None
    order = torch.from_numpy(permutation(hash_key("probe", seed), len(x)))
    val_ids, train_ids = order.tensor_split([round(len(x) * config.fraction)])
    if len(values) > 1 and len(val_ids) and bool(torch.bincount(labels[train_ids], minlength=classes).all()):
        num_correct, candidates = [], []
        for value in values:  # from the smoothest problem on, each from the solution of the last
            candidates.append(fit_value(x[train_ids], labels[train_ids], value, candidates[-1] if candidates else None))
            num_correct.append((candidates[-1].scores(x[val_ids]).argmax(1) == labels[val_ids]).sum())
        best_index = int(torch.stack(num_correct).argmax())
        best_value, initial = values[best_index], candidates[best_index]
    layer = fit_value(x, labels, best_value, initial)
    weight = layer.weight / std
    return Linear(weight, layer.bias - weight @ mean), best_value
