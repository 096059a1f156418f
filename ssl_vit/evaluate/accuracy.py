"""The head's own measures over a whole split: accuracy of a classifier, masked loss of masked prediction."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ssl_vit.data.faults import printable
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.exits import DATA, Refusal

SHOWN = 10  # faults that a process prints
Sums = dict[str, Tensor]


class Evaluator(Protocol):
    """Judges a model, wrapped or not, that is in eval mode."""

    def run(self, model: nn.Module, between: Callable[[], None]) -> Iterator[tuple[str, float]]:
        """What was measured, name by name; the same on every process.

        All processes call `between` after every batch; it raises where they are to leave.
        """
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

    def run(self, model: nn.Module, between: Callable[[], None] = lambda: None) -> Iterator[tuple[str, float]]:
        """The head's report, and how many `samples` were counted, how many `bad_samples` could not be."""
        sums: Sums = {}
        for batch in self.stream.batches(self.share, self.device):
            output = model(batch)
            parts = {**output.sums, "_weight": output.weight}
            sums = {name: sums[name] + part if name in sums else part for name, part in parts.items()}
            between()
        faults, fatal = self.stream.faults.take(), self.stream.faults.fatal
        for fault in faults[:SHOWN]:
            print(f"evaluation leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
        mine = torch.tensor([len(faults), fatal is not None], device=self.device)
        sums = self.total({**sums, "_faults": mine})
        bad, failed = sums.pop("_faults").tolist()
        if failed:
            raise fatal or Refusal(DATA, "another process cannot read the evaluation data; see its message")
        weight = float(sums.pop("_weight"))
        if bad and not weight:
            raise Refusal(DATA, f"not one sample of {self.stream.samples.manifest.name} can be read")
        yield from self.report(sums, max(1.0, weight)).items()
        yield "samples", int(weight)
        yield "bad_samples", bad
