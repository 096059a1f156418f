"""bf16 on a CPU is compared with fp32 before the first step: torch's kernels are wrong for some shapes (issue 17)."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch, Model
from ssl_vit.train.engine import Engine
from ssl_vit.train.prepare import in_fp32

MAX_DIFFERENCE = 0.1  # relative L2 distance: rounding moves a ViT by 1 %, kernels that are wrong by more than 100 %


def compare_with_fp32(
    processes: Distributed, engine: Engine, model: Model, batches: Iterator[Batch]
) -> Iterator[Batch]:
    """The same batches, after the first gave nearly the same tokens and gradients in bf16 as in fp32 on every process.

    Through the wrapped model in eval mode, so that nothing random takes part. Raises ExitError(USAGE) on all processes.
    """
    batch = next(batches)

    def check() -> None:
        for name, difference in _relative_differences(processes, engine, model, batch).items():
            if not difference <= MAX_DIFFERENCE:  # of NaN too
                text = f"precision=bf16: {name} are {difference:.0%} off those of fp32 on this CPU"
                raise ExitError(ExitCode.USAGE, f"{text} ({MAX_DIFFERENCE:.0%} would do): set precision=fp32")

    with torch.random.fork_rng(devices=[]):
        engine.model.eval()
        processes.run_on_all(check)
        engine.model.train()
    return chain([batch], batches)


def _relative_differences(processes: Distributed, engine: Engine, model: Model, batch: Batch) -> dict[str, float]:
    """How far bf16 is from fp32: relative L2 over all elements, of what the encoder gives and of all gradients.

    Those of the loss, and those of a random mix of the tokens' channels, averaged over tokens and images: a head that
    starts at zero gives the encoder no gradient.
    """

    def tokens() -> Tensor:
        return engine.model(batch, tokens=True).float()

    def tokens_without_grad() -> list[Tensor]:
        with torch.no_grad():
            return [tokens()]

    def mixed_tokens() -> Tensor:
        encoded = tokens()
        return (encoded @ torch.randn(encoded.shape[2], generator=torch.Generator().manual_seed(0))).mean()

    passes: dict[str, Callable[[], list[Tensor]]] = {
        "the encoder's tokens": tokens_without_grad,
        "the gradients of the tokens": lambda: engine.gradients(mixed_tokens),
        "the gradients of the loss": lambda: engine.gradients(lambda: engine.model(batch).loss),
    }
    differences = {}
    for name, compute in passes.items():
        bf16_values = compute()
        with in_fp32(model):
            fp32_values = compute()
        squares = {
            "difference": _square_sum(a.double() - b.double() for a, b in zip(bf16_values, fp32_values, strict=True)),
            "exact": _square_sum(b.double() for b in fp32_values),
        }
        if engine.shards_gradients:
            squares = processes.all_reduce(squares)
        difference, reference = squares["difference"].item(), squares["exact"].item()
        differences[name] = (
            math.sqrt(difference / reference) if reference else math.inf * difference if difference else 0.0
        )
    return differences


def _square_sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()
