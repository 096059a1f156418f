"""Attention, looked at from outside: maps by hooks, rollout (paper D.8), mean attention distance (paper D.7).

`maps` are float [B, heads, T, T]: what each of T = P + N tokens takes from each; every row adds up to 1.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_vit.encoders.vit import Attention

Query = Literal["class", "mean"]
Grid = tuple[int, int]


class Rollout:
    """Attention followed through the layers, as far as it was added: R = A_L ... A_1 with A the mean of the heads.

    The identity is added to each for the residual path and rows are normalised, as the authors do (their issue 18).
    """

    def __init__(self) -> None:
        self.joint: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """The next layer's maps."""
        through = maps.mean(1) + torch.eye(maps.shape[3], dtype=maps.dtype, device=maps.device)
        through = through / through.sum(2, keepdim=True)
        self.joint = through if self.joint is None else through @ self.joint

    def of(self, prefix: int, query: Query) -> Tensor:
        """What the class token has of each patch, [B, N]; or with `mean` the mean of what the patches have."""
        if self.joint is None:
            raise ValueError("a rollout takes the attention of at least one layer")
        if query == "class" and not prefix:
            raise ValueError("there is no class token to ask; take query='mean'")
        return self.joint[:, 0, prefix:] if query == "class" else self.joint[:, prefix:, prefix:].mean(1)


def rollout(maps: Iterable[Tensor], prefix: int = 1, query: Query = "class") -> Tensor:
    """Attention rollout [B, N] of maps [layers, B, heads, T, T] (paper D.8; Abnar and Zuidema 2020).

    `query="mean"` is for encoders whose class token learned nothing, as masked patch prediction leaves it.
    """
    found = Rollout()
    for layer in maps:
        found.add(layer)
    return found.of(prefix, query)


def distances(maps: Tensor, grid: Grid, stride: float) -> Tensor:
    """Mean attention distance of each image and head, pixels: maps [B, heads, T, T] -> [B, heads] (paper D.7).

    Euclidean, on the grid of patches, times the side of a patch; the mean over the patches that ask. The paper does not
    say what becomes of a class token: here it is left out, as who asks and as who answers, and rows are normalised.
    """
    rows, columns = grid
    place = torch.arange(rows * columns, device=maps.device)
    where = torch.stack([place // columns, place % columns], dim=1).to(maps.dtype)
    apart = stride * (where[:, None] - where).norm(dim=2)
    prefix = maps.shape[3] - rows * columns
    among = maps[:, :, prefix:, prefix:]
    far = torch.einsum("bhqk,qk->bhq", among, apart)
    return (far / among.sum(3).clamp(min=torch.finfo(maps.dtype).tiny)).mean(2)


def mean_distance(maps: Iterable[Tensor], grid: Grid, stride: float) -> Tensor:
    """Mean attention distance of each layer and head, pixels: maps [layers, B, heads, T, T] -> [layers, heads]."""
    return torch.stack([distances(layer, grid, stride).mean(0) for layer in maps])


def has_class_token(encoder: Any) -> bool:
    """Whether the first token is a class token; some of timm's models have registers alone."""
    return encoder.prefix > 0 and getattr(getattr(encoder, "model", encoder), "cls_token", None) is not None


def places(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention layers of an encoder that can be looked into, by name: ours, and those of timm."""
    return [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, Attention) or isinstance(getattr(module, "attn_drop", None), nn.Module)
    ]


@contextmanager
def watched(encoder: nn.Module, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, `take` gets the name and the maps of each attention layer, as the forward pass comes by.

    What the encoder computes stays the same to the bit: a layer's input is looked at a second time, beside it.
    """
    with ExitStack() as hooks:
        for name, module in places(encoder):

            def look(module: Any, given: tuple[Any, ...], named: dict[str, Any], _made: Any, name: str = name) -> None:
                with torch.no_grad():
                    made = _ours(module, *given) if isinstance(module, Attention) else _timms(module, given, named)
                if made is not None:
                    take(name, made)

            hooks.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        yield


def _ours(module: Attention, x: Tensor, shared: Tensor | None = None, *_: Any) -> Tensor:
    return module.maps(x, shared)


def _timms(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """What timm's layer hands to its dropout of attention when it is told to write attention out."""
    found: list[Tensor] = []
    hook = module.attn_drop.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    fused = getattr(module, "fused_attn", False)
    module.fused_attn = False
    try:
        module.forward(*given, **named)
    finally:
        module.fused_attn = fused
        hook.remove()
    return found[0].float() if found and found[0].ndim == 4 else None
