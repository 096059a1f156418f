"""The contract between batches, encoders and heads.

Legend, for every tensor file: B images, H x W pixels, C channels, N patches, P prefix tokens (class token and
registers), T = P + N tokens, D width, K corrupted patches. `image` is uint8 [B, C, H, W]; `pixels` are the encoder's
normalized floats; `patches` [B, N, D] are patch embeddings before positions; `tokens` are encoder output.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]
"""image uint8 [B,C,H,W], label int64 [B] (-1 = none), seed int64 [B], valid bool [B] (False = padding)."""

Sums = dict[str, Tensor]
"""Summed over a batch, or over more: scalars, or histograms [classes]."""

Tensors = dict[str, Tensor]
"""By name: `encoder.norm.weight` of a model, `encoder.norm.weight/exp_avg` of an optimizer."""

Edit = Callable[[Tensor], Tensor]
"""Maps patches [B, N, D] to patches of the same shape."""


class Output(NamedTuple):
    """What a head returns: the loss to step on, sums over the batch to report, and how much was summed.

    A classifier in eval mode adds its logits [B, classes].
    """

    loss: Tensor
    sums: Sums
    weight: Tensor
    logits: Tensor | None = None


class Encoder(Protocol):
    """image uint8 [B, C, H, W] -> tokens [B, P + N, D], or [B, S, D] with `select`."""

    width: int
    channels: int
    stride: int  # side of the square of pixels that a token stands for
    grid: tuple[int, int]
    prefix: int
    pool: str
    maskable: bool  # whether there are patch embeddings, one for each token, that `edit` can replace
    blocks: Any  # the parts that it applies one after the other, an nn.ModuleList
    mean: Tensor
    std: Tensor

    @property
    def attention_shape(self) -> tuple[int, int, int] | None:
        """Heads, tokens and head width of torch's attention kernel in its blocks; None: they do not use it."""
        ...

    def normalize(self, image: Tensor) -> Tensor:
        """image uint8 [B, C, H, W] -> pixels float [B, C, H, W]."""
        ...

    def __call__(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        """`edit` is applied to the patches before positions; `select` int64 [B, S] names the token positions wanted."""
        ...


class Head(Protocol):
    """Tokens -> loss. Owns its targets and its masking."""

    forward_macs: int  # multiply-accumulates per image
    query_count: int | None  # tokens that it reads of the encoder's last block; None: all
    visualize: Callable[[Encoder, Batch], Tensor] | None
    """A picture uint8 [3, h, w], one row per image, the corrupted images in its second column; None: nothing to see."""

    def __call__(self, encoder: Encoder, batch: Batch, log_metrics: bool = False) -> Output:
        """The loss and sums; with `log_metrics` also the sums that only a row of metrics needs."""
        ...

    def report(self, sums: Sums, weight: float) -> dict[str, float]:
        """Metrics from sums over `weight` images."""
        ...


class Model(nn.Module):
    """An encoder and a head: the one module that is compiled, wrapped, stepped and saved."""

    encoder: Any  # an nn.Module that is an Encoder
    head: Any  # an nn.Module that is a Head

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: Batch, tokens: bool = False, visualize: bool = False, log_metrics: bool = False):
        """The head's Output; or with `tokens` the encoder's tokens; or with `visualize` a picture uint8 [3, h, w].

        All three go through one call, because DDP, FSDP2 and ZeRO-3 act on `__call__` of the outer module only.
        """
        if tokens:
            return self.encoder(batch["image"])
        if visualize:
            return self.head.visualize(self.encoder, batch)
        return self.head(self.encoder, batch, log_metrics)


def masked_mean(valid: Tensor, values: Tensor) -> Tensor:
    """The mean of the per-image `values` [B] over the images that count."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def pool_features(encoder: Encoder, image: Tensor) -> Tensor:
    """One vector an image, [B, D], as `encoder.pool` says."""
    return pool_tokens(encoder(image), encoder.pool, encoder.prefix)


def pool_tokens(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """tokens [B, T, D] -> [B, D]: the class token, or the mean of the patch tokens."""
    return tokens[:, 0] if pool == "class" else tokens[:, prefix:].mean(1)


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class Evaluator(Protocol):
    """Judges a model, wrapped or not, that is in eval mode."""

    def run(self, model: nn.Module, on_batch: Callable[[], None]) -> Iterator[tuple[str, float]]:
        """What was measured, name by name; the same on every process.

        All processes call `on_batch` after every batch; it raises where they are to leave.
        """
        ...
