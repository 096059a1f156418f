"""The head's own measures over a whole split: accuracy of a classifier, masked loss of masked prediction."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ssl_vit.data.stream import EvaluationStream, Share

Sums = dict[str, Tensor]


class Evaluator(Protocol):
    """Judges a model, wrapped or not, that is in eval mode."""

    def run(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """What was measured, name by name; the same on every process."""
        ...


class HeldOut:
    """Runs the head over every sample of a split exactly once. Sums cross processes, never means.

    `total` adds sums over the processes, `report` is the head's.
    """

    def __init__(
        self,
        stream: EvaluationStream,
        share: Share,
        device: torch.device,
        total: Callable[[Sums], Sums],
        report: Callable[[Sums, float], dict[str, float]],
    ):
        self.stream, self.share, self.device = stream, share, device
        self.total, self.report = total, report

    def run(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """The head's report, and `samples`: how many were counted."""
        sums: Sums = {}
        for batch in self.stream.batches(self.share, self.device):
            output = model(batch)
            parts = {**output.sums, "_weight": output.weight}
            sums = {name: sums[name] + part if name in sums else part for name, part in parts.items()}
        sums = self.total(sums)
        weight = float(sums.pop("_weight"))
        yield from self.report(sums, max(1.0, weight)).items()
        yield "samples", int(weight)
