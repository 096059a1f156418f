"""Our step without each of its levers, one by one: what each of them gives."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import Rivals, Step, ours
from torch import Tensor, nn

from ssl_vit import recipe
from ssl_vit.encoders import linear
from ssl_vit.encoders.vit import Cut, at
from ssl_vit.model import Batch, Model
from ssl_vit.train.attention import pin

Change = Callable[[Model], None]


def levers(made: recipe.Recipe, model: Model, batch: Batch, output: Path) -> Rivals:
    """What builds our step with one thing changed, by what that is."""

    fresh = copy.deepcopy(model)  # the given one may have been compiled when these are built

    def step(change: Change | None = None, **keys: Any) -> Step:
        mine, asked = copy.deepcopy(fresh), made.model_copy(update=keys)
        if change is not None:
            change(mine)
        return ours(asked, mine, batch, output)

    found: Rivals = {
        "last block for all tokens": partial(step, whole_last_block),
        "norm and head for all tokens": partial(step, whole_head),
        "activation checkpointing": partial(step, activation_checkpointing=True),
        "loss read every step": lambda: reading(step()),
        "AdamW not fused": lambda: unfused(step),
    }
    if batch["image"].is_cuda:
        return found | {
            "not compiled": partial(step, compile=False),
            "patches by convolution": partial(step, convolved),
            "bf16_residual": partial(step, precision="bf16_residual"),
            "fp32 (TF32 as torch has it)": partial(step, precision="fp32"),
            **{f"attention={name}": lambda name=name: pinned(step(), name) for name in ("efficient", "cudnn", "math")},
        }
    threads = torch.get_num_threads()
    return found | {
        "linear layers by MKL": lambda: within(step(), partial(setattr, linear, "ONEDNN"), False, linear.ONEDNN),
        "one thread": lambda: within(step(), torch.set_num_threads, 1, threads),
    }


def whole_last_block(model: Model) -> None:
    """Every token through the last block, then those that are asked for."""
    through = model.encoder.through

    def all_of_them(block: nn.Module, x: Tensor, select: Tensor | None = None) -> Tensor:
        x = through(block, x)
        return x if select is None else at(x, select)

    model.encoder.through = all_of_them


def whole_head(model: Model) -> None:
    """Every token through the last block, the last norm and the head, then those that are asked for."""
    encoder, layer, asked = model.encoder, model.head.linear, []
    whole = encoder.forward

    def forward(image: Tensor, edit: Any = None, select: Tensor | None = None) -> Tensor:
        asked[:] = [select]
        return whole(image, edit)

    encoder.forward = forward
    layer.register_forward_hook(lambda _layer, _given, out: at(out, asked[0]))


def convolved(model: Model) -> None:
    """The patch embedding as a convolution."""
    cut: Cut = model.encoder.patch_embed.proj
    cut.forward = partial(nn.Conv2d.forward, cut)  # type: ignore[method-assign]


def reading(step: Step) -> Step:
    """The loss is waited for."""
    return lambda: step()[0].item()  # type: ignore[index]


def unfused(build: Callable[..., Step]) -> Step:
    """torch's default AdamW, which cannot skip an update by a flag: the norm is waited for."""
    from ssl_vit.train.engine import Engine

    can, Engine._can_fuse = Engine._can_fuse, lambda self: False  # type: ignore[method-assign]
    try:
        made = torch.optim.AdamW
        torch.optim.AdamW = lambda *given, **keys: made(*given, **{**keys, "fused": None})  # type: ignore
        return build()
    finally:
        torch.optim.AdamW, Engine._can_fuse = made, can  # type: ignore


def pinned(step: Step, name: Any) -> Step:
    """Another kernel for attention."""
    return within(step, pin, name, "auto")


def within(step: Step, change: Callable[[Any], object], during: Any, after: Any) -> Step:
    """A step during which something of the process is otherwise."""

    def changed() -> object:
        change(during)
        try:
            return step()
        finally:
            change(after)

    return changed
