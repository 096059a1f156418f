"""Norms of gradients and weights, layer by layer, as sums of squares that add up over processes."""

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import get_total_norm


def layer_of(name: str) -> str:
    """The layer of a parameter: its block, or else the part of encoder or head that it belongs to.

    `encoder.blocks.3.attn.qkv.weight` -> `encoder.blocks.03`; numbers have two digits, so that charts are in order.
    """
    parts = name.split(".")
    blocks = [i + 1 for i, part in enumerate(parts[:-1]) if part == "blocks"]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    last = (blocks[-1:] or numbers[:1] or [2 if parts[1] == "model" else 1])[0]
    return ".".join(part.zfill(2) if part.isdigit() else part for part in parts[: last + 1])


def squares(tensors: Iterable[tuple[str, Tensor | None]], copies: int = 1) -> dict[str, Tensor]:
    """The sum of squares of this process's part of each layer, of which there are so many copies.

    Of tensors by parameter; None for those without.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors:
        if tensor is not None:
            found[layer_of(name)].append(local(tensor))
    return {layer: get_total_norm(parts).double().square() / copies for layer, parts in found.items()}


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]
