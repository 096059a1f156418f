"""bf16 on a CPU is compared with fp32 before the first step: torch's kernels are wrong for some shapes (issue 17)."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_vit.distributed import together, total
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.model import Batch, Model
from ssl_vit.train.engine import Engine
from ssl_vit.train.prepare import in_fp32

if TYPE_CHECKING:
    from accelerate import Accelerator

LIMIT = 0.1  # relative L2 distance: rounding moves a ViT by 1 %, kernels that are wrong by more than 100 %


def compare_with_fp32(
    accelerator: "Accelerator", engine: Engine, model: Model, batches: Iterator[Batch]
) -> Iterator[Batch]:
    """The same batches, after the first gave nearly the same tokens and gradients in bf16 as in fp32 on every process.

    Through the wrapped model in eval mode, so that nothing random takes part. Raises Refusal(USAGE) on all processes.
    """
    batch = next(batches)

    def check() -> None:
        for name, difference in _differences(accelerator, engine, model, batch).items():
            if not difference <= LIMIT:  # of NaN too
                text = f"precision=bf16: {name} are {difference:.0%} off those of fp32 on this CPU"
                raise Refusal(USAGE, f"{text} ({LIMIT:.0%} would do): set precision=fp32")

    with torch.random.fork_rng(devices=[]):
        engine.model.eval()
        together(accelerator, check)
        engine.model.train()
    return chain([batch], batches)


def _differences(accelerator: "Accelerator", engine: Engine, model: Model, batch: Batch) -> dict[str, float]:
    """How far bf16 is from fp32: relative L2 over all elements, of what the encoder gives and of all gradients.

    Those of the loss, and those of a random mix of the tokens' channels, averaged over tokens and images: a head that
    starts at zero gives the encoder no gradient.
    """

    def tokens() -> Tensor:
        return engine.model(batch, tokens=True).float()

    def no_gradient() -> list[Tensor]:
        with torch.no_grad():
            return [tokens()]

    def of_tokens() -> Tensor:
        made = tokens()
        return (made @ torch.randn(made.shape[2], generator=torch.Generator().manual_seed(0))).mean()

    passes: dict[str, Callable[[], list[Tensor]]] = {
        "the encoder's tokens": no_gradient,
        "the gradients of the tokens": lambda: engine.gradients(of_tokens),
        "the gradients of the loss": lambda: engine.gradients(lambda: engine.model(batch).loss),
    }
    found = {}
    for name, made in passes.items():
        low = made()
        with in_fp32(model):
            exact = made()
        squares = {
            "difference": _square_sum(a.double() - b.double() for a, b in zip(low, exact, strict=True)),
            "exact": _square_sum(b.double() for b in exact),
        }
        if engine.cuts_gradients:
            squares = total(accelerator, squares)
        difference, whole = squares["difference"].item(), squares["exact"].item()
        found[name] = math.sqrt(difference / whole) if whole else math.inf * difference if difference else 0.0
    return found


def _square_sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()
