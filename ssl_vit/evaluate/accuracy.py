"""The head's own measures over a whole split: accuracy of a classifier, masked loss of masked prediction."""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ssl_vit.data.faults import printable
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.evaluate.metrics import TOP, Predictions
from ssl_vit.exits import DATA, Refusal
from ssl_vit.model import Batch

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

    `total` adds sums over the processes, `report` is the head's; `keep`, if there is one, is handed a classifier's
    predictions for each image, on every process.
    """

    def __init__(
        self,
        stream: EvaluationStream,
        share: Share,
        device: torch.device,
        total: Callable[[Sums], Sums],
        report: Callable[[Sums, float], dict[str, float]],
        keep: Callable[[Predictions], None] | None = None,
    ):
        self.stream, self.share, self.device = stream, share, device
        self.total, self.report, self.keep = total, report, keep

    def run(self, model: nn.Module, between: Callable[[], None] = lambda: None) -> Iterator[tuple[str, float]]:
        """The head's report, and how many `samples` were counted, how many `bad_samples` could not be."""
        sums: Sums = {}
        rows = None
        for place, batch in self.stream.placed(self.share, self.device):
            output = model(batch)
            if self.keep is not None and output.logits is not None:
                rows = _noted(rows, self.stream.count, place, batch, output.logits)
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
        if self.keep is not None and rows is not None:
            self.keep(_predictions(self.total({"rows": rows})["rows"].numpy(), self.stream.ids))
        yield from self.report(sums, max(1.0, weight)).items()
        yield "samples", int(weight)
        yield "bad_samples", bad


def _noted(rows: Tensor | None, count: int, place: int, batch: Batch, logits: Tensor) -> Tensor:
    """Rows [count, 2 + 2k] of all samples, with this batch's: how often it was seen, label, best classes, their scores.

    Every process fills its own, so that their sum is the whole.
    """
    scores, top = logits.softmax(1).topk(min(TOP, logits.shape[1]))
    if rows is None:
        rows = torch.zeros(count, 2 + 2 * scores.shape[1], dtype=torch.float64, device=logits.device)
    seen = batch["valid"][:, None].double()
    made = torch.cat([seen, batch["label"][:, None], top, scores], 1) * seen
    mine = rows[place : place + len(made)]
    mine += made[: len(mine)]
    return rows


def _predictions(rows: np.ndarray, ids: np.ndarray | None) -> Predictions:
    seen, k = np.flatnonzero(rows[:, 0]), rows.shape[1] // 2 - 1
    found = rows[seen]
    labels, top = found[:, 1].astype(np.int64), found[:, 2 : 2 + k].astype(np.int64)
    return Predictions(seen if ids is None else ids[seen], labels, top, found[:, 2 + k :].astype(np.float32))
