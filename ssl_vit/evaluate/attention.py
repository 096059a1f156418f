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

    The identity is added to each for the residual path and rows are normalized, as the authors do (their issue 18).
    """

    def __init__(self) -> None:
        self.joint: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """The next layer's maps."""
        attention = maps.mean(1) + torch.eye(maps.shape[3], dtype=maps.dtype, device=maps.device)
        attention = attention / attention.sum(2, keepdim=True)
        self.joint = attention if self.joint is None else attention @ self.joint

    def to_patches(self, prefix: int, query: Query) -> Tensor:
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
    accumulator = Rollout()
    for layer in maps:
        accumulator.add(layer)
    return accumulator.to_patches(prefix, query)


def attention_distances(maps: Tensor, grid: Grid, stride: float) -> Tensor:
    """Mean attention distance of each image and head, pixels: maps [B, heads, T, T] -> [B, heads] (paper D.7).

    Euclidean, on the grid of patches, times the side of a patch; the mean over the patches that ask. The paper does not
    say what becomes of a class token: here it is left out, as who asks and as who answers, and rows are normalized.
    """
    rows, columns = grid
    index = torch.arange(rows * columns, device=maps.device)
    positions = torch.stack([index // columns, index % columns], dim=1).to(maps.dtype)
    pairwise = stride * (positions[:, None] - positions).norm(dim=2)
    prefix = maps.shape[3] - rows * columns
    patch_maps = maps[:, :, prefix:, prefix:]
    weighted = torch.einsum("bhqk,qk->bhq", patch_maps, pairwise)
    return (weighted / patch_maps.sum(3).clamp(min=torch.finfo(maps.dtype).tiny)).mean(2)


def mean_distance(maps: Iterable[Tensor], grid: Grid, stride: float) -> Tensor:
    """Mean attention distance of each layer and head, pixels: maps [layers, B, heads, T, T] -> [layers, heads]."""
    return torch.stack([attention_distances(layer, grid, stride).mean(0) for layer in maps])


def has_class_token(encoder: Any) -> bool:
    """Whether the first token is a class token; some of timm's models have registers alone."""
    return encoder.prefix > 0 and getattr(getattr(encoder, "model", encoder), "cls_token", None) is not None


def find_attention_layers(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention layers of an encoder that can be looked into, by name: ours, and those of timm."""
    return [
        (name, module)
        for name, module in encoder.named_modules()
        if isinstance(module, Attention) or isinstance(getattr(module, "attn_drop", None), nn.Module)
    ]


@contextmanager
def capture_attention(encoder: nn.Module, on_maps: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, `on_maps` gets the name and the maps of each attention layer, as the forward pass comes by.

    What the encoder computes stays the same to the bit: a layer's input is looked at a second time, beside it.
    """
    with ExitStack() as hooks:
        for name, module in find_attention_layers(encoder):

            def hook(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any, name: str = name
            ) -> None:
                with torch.no_grad():
                    maps = (
                        _vit_attention(module, *args)
                        if isinstance(module, Attention)
                        else _timm_attention(module, args, kwargs)
                    )
                if maps is not None:
                    on_maps(name, maps)

            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _vit_attention(module: Attention, x: Tensor, shared: Tensor | None = None, *_: Any) -> Tensor:
    return module.attention_maps(x, shared)


def _timm_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What timm's layer hands to its dropout of attention when it is told to write attention out."""
    captured: list[Tensor] = []
    hook = module.attn_drop.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    fused = getattr(module, "fused_attn", False)
    module.fused_attn = False
    try:
        module.forward(*args, **kwargs)
    finally:
        module.fused_attn = fused
        hook.remove()
    return captured[0].float() if captured and captured[0].ndim == 4 else None
