"""Optimizers, and the learning rate as a pure function of the step: nothing to save, nothing to fall out of step."""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from ssl_vit.config import Config

Moment = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "linear", "constant"]
LINEAR_END = 1e-5  # where linear decay ends in the authors' code


def learning_rate(
    step: int, lr: float = 1.0, steps: int = 1, warmup_steps: int = 0, schedule: Schedule = "cosine"
) -> float:
    """The rate of a step (paper Tables 3 and 4): linear warm-up from 0, then decay over the steps that remain.

    Cosine ends at 0, linear at 1e-5, as in the authors' code; `step` counts from 0.
    """
    progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
    if schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        lr = LINEAR_END + (lr - LINEAR_END) * (1 - progress)
    return lr * min(1.0, step / warmup_steps) if warmup_steps else lr


class _Optim(Config):
    lr: float = Field(default=1e-3, ge=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up from 0")
    schedule: Schedule = Field(default="cosine", description="decay after the warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="on kernels only; times the learning rate under adamw")
    clip: float | None = Field(
        default=1.0, gt=0, description="global norm that gradients are clipped to (none: no clipping)"
    )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.lr, steps, self.warmup_steps, self.schedule)


class AdamW(_Optim):
    """Adam with decoupled weight decay; the paper's "Adam" with a decay is this."""

    kind: Literal["adamw"] = "adamw"
    state: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    betas: tuple[Moment, Moment] = Field(default=(0.9, 0.999), description="decay of the running moments")

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over a model's parameters."""
        return torch.optim.AdamW(groups(model, self.weight_decay), lr=self.lr, betas=self.betas, fused=True)


class Sgd(_Optim):
    """Stochastic gradient descent with momentum, the paper's for fine-tuning."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum")

    @property
    def state(self) -> tuple[str, ...]:
        """The tensors it keeps for a parameter."""
        return ("momentum_buffer",) if self.momentum else ()

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over a model's parameters; torch's decay enters before the momentum here."""
        return torch.optim.SGD(groups(model, self.weight_decay), lr=self.lr, momentum=self.momentum, fused=True)


Optim = Annotated[AdamW | Sgd, Field(discriminator="kind")]


def moments(optim: Optim) -> int:
    """Numbers that an optimizer keeps a parameter: AdamW 2, SGD with momentum 1."""
    return len(set(optim.state) - {"step"})


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: kernels, which decay; biases, norms, class token, positions and mask, which do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kernels = [p for name, p in named if is_kernel(name, p)]
    rest = [p for name, p in named if not is_kernel(name, p)]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a dense or convolution layer."""
    return name.endswith("weight") and parameter.ndim > 1


def set_rate(groups: Iterable[dict], lr: float) -> None:
    """Write the learning rate into an optimizer's groups; done before backward, which steps under DeepSpeed."""
    for group in groups:
        group["lr"] = lr
