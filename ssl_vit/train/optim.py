"""Optimizers, and the learning rate as a pure function of the step: nothing to save, nothing to fall out of step."""

import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from ssl_vit.config import Config

Moment = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "linear", "constant", "step"]
LINEAR_END = 1e-5  # where linear decay ends in the authors' code


def learning_rate(
    step: int,
    lr: float = 1.0,
    steps: int = 1,
    warmup_steps: int = 0,
    schedule: Schedule = "cosine",
    drops: tuple[int, ...] = (),
) -> float:
    """The rate of a step (paper Tables 3 and 4): linear warm-up from 0, then decay over the steps that remain.

    Cosine ends at 0, linear at 1e-5, as in the authors' code; step is a tenth from each of `drops` on, as in BiT's
    recipe. `step` counts from 0.
    """
    progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
    if schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        lr = LINEAR_END + (lr - LINEAR_END) * (1 - progress)
    elif schedule == "step":
        lr /= 10 ** sum(step >= drop for drop in drops)
    return lr * min(1.0, step / warmup_steps) if warmup_steps else lr


class _Optim(Config):
    lr: float = Field(default=1e-3, ge=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up from 0")
    schedule: Schedule = Field(default="cosine", description="decay after the warm-up")
    drops: tuple[int, ...] = Field(
        default=(), description="with schedule=step: steps at which the rate becomes a tenth"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="on kernels only; times the learning rate under adamw")
    clip: float | None = Field(
        default=1.0, gt=0, description="global norm that gradients are clipped to (none: no clipping)"
    )
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="the rate of each block is that of the next one times this (none: equal)"
    )

    @model_validator(mode="after")
    def _check_drops(self) -> "_Optim":
        if bool(self.drops) != (self.schedule == "step"):
            raise ValueError("schedule=step and drops=STEPS,... belong together; give both or neither")
        return self

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.lr, steps, self.warmup_steps, self.schedule, self.drops)

    def param_groups(self, model: nn.Module) -> list[dict]:
        """The parameter groups of a model."""
        return param_groups(model, self.weight_decay, self.layer_decay)


class AdamW(_Optim):
    """Adam with decoupled weight decay; the paper's "Adam" with a decay is this."""

    kind: Literal["adamw"] = "adamw"
    state: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    betas: tuple[Moment, Moment] = Field(default=(0.9, 0.999), description="decay of the running moments")

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over a model's parameters."""
        return torch.optim.AdamW(
            param_groups(model, self.weight_decay, self.layer_decay), lr=self.lr, betas=self.betas, fused=True
        )


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
        return torch.optim.SGD(
            param_groups(model, self.weight_decay, self.layer_decay), lr=self.lr, momentum=self.momentum, fused=True
        )


Optim = Annotated[AdamW | Sgd, Field(discriminator="kind")]


def num_moments(optim: Optim) -> int:
    """Numbers that an optimizer keeps a parameter: AdamW 2, SGD with momentum 1."""
    return len(set(optim.state) - {"step"})


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Parameter groups: kernels, which decay; biases, norms, class token, positions and mask, which do not.

    With `layer_decay` (BEiT, MAE) such a pair for every block, for what is below and what is above them, each with its
    `scale` of the rate.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    num_blocks = len({name.split(".")[2] for name, _ in trainable if name.startswith("encoder.blocks.")})
    groups = []
    for layer in range(num_blocks + 1, -1, -1) if layer_decay else [None]:
        layer_params = [(name, p) for name, p in trainable if layer in (None, layer_index(name, num_blocks))]
        scale = {} if layer is None or layer_decay is None else {"scale": layer_decay ** (num_blocks + 1 - layer)}
        kernels = [p for name, p in layer_params if is_kernel(name, p)]
        no_decay = [p for name, p in layer_params if not is_kernel(name, p)]
        groups += [{"params": kernels, "weight_decay": weight_decay, **scale}]
        groups += [{"params": no_decay, "weight_decay": 0.0, **scale}]
    return [group for group in groups if group["params"]] if layer_decay else groups


def layer_index(name: str, num_blocks: int) -> int:
    """A parameter's layer: 0 below the blocks, 1 to `num_blocks` in them, above them one more."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return (
        0
        if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed", "encoder.offsets"))
        else num_blocks + 1
    )


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the kernel of a dense or convolution layer."""
    return name.endswith("weight") and parameter.ndim > 1


def set_lr(groups: Iterable[dict], lr: float) -> None:
    """Write the learning rate into an optimizer's groups; done before backward, which steps under DeepSpeed."""
    for group in groups:
        group["lr"] = lr * group.get("scale", 1.0)
