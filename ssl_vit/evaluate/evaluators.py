"""Judge a model while it trains: top-1 and top-5 of a held-out set, and online k-NN and few-shot."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.data.dataset import printable
from ssl_vit.data.loader import EvaluationStream, Share
from ssl_vit.errors import DATA, Refusal
from ssl_vit.evaluate import few_shot, knn
from ssl_vit.evaluate.few_shot import FewShotConfig
from ssl_vit.evaluate.metrics import TOP, Predictions
from ssl_vit.model import Batch, Sums

SHOWN = 10  # faults that a process prints


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


SHOWN_ONLINE = 10  # faults that a process prints
Total = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Online(Config):
    """What is measured beside the loss at every evaluation (`eval_every`), where labelled splits are given."""

    train: tuple[str, ...] | None = Field(default=None, description="labelled shards or images to learn from")
    val: tuple[str, ...] | None = Field(default=None, description="labelled shards or images to be right on")
    samples: int = Field(default=10_000, ge=1, description="most images of each, a fixed random choice")
    k: int = Field(default=20, ge=1, description="neighbours that vote in k-NN")
    shots: tuple[int, ...] = Field(default=(1, 5, 10), description="images a class in few-shot, which has 3 draws")


class Probe:
    """Judges the frozen features of the model that trains; `read_out` makes one vector of an image's tokens."""

    def __init__(
        self,
        splits: tuple[EvaluationStream, EvaluationStream],
        share: Share,
        device: torch.device,
        total: Total,
        config: Online,
        read_out: Callable[[Tensor], Tensor],
    ):
        self.splits, self.share, self.device, self.total, self.config = splits, share, device, total, config
        self.read_out = read_out
        self.classes = len(splits[0].samples.manifest.classes)

    def run(self, model: nn.Module, between: Callable[[], None] = lambda: None) -> Iterator[tuple[str, float]]:
        """`knn_top1` and `few_shot_N`, the mean over three draws, for those N that every class has."""
        train, labels = self._features(self.splits[0], model, between)
        test, truth = self._features(self.splits[1], model, between)
        if not len(train) or not len(test):
            raise Refusal(DATA, "online.train and online.val: not one labelled image of them can be read", shared=True)
        votes = knn.scores(train, labels, test, self.classes, self.config.k)
        yield "knn_top1", float((votes.argmax(1) == truth).double().mean())
        config = FewShotConfig(shots=self.config.shots)
        for shots, found in few_shot.accuracies(train, labels, test, truth, self.classes, config).items():
            yield f"few_shot_{shots}", float(np.mean(found))

    def _features(
        self, stream: EvaluationStream, model: nn.Module, between: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Features [N, D] and class numbers [N] of a split, on the device of every process.

        Every process fills the rows of its own samples, so that their sum is the whole.
        """
        features, labels = torch.empty(0), torch.zeros(stream.count, dtype=torch.int64, device=self.device)
        for place, batch in stream.placed(self.share, self.device):
            made = self.read_out(model(batch, tokens=True)).float()
            if not len(features):
                features = torch.zeros(stream.count, made.shape[1], device=self.device)
            mine = slice(place, place + min(len(made), max(0, stream.count - place)))
            usable = batch["valid"] & (batch["label"] >= 0)
            features[mine] = made[: mine.stop - mine.start]
            labels[mine] = (batch["label"] + 1).mul(usable)[: mine.stop - mine.start]  # 0: not to be used
            between()
        faults, fatal = stream.faults.take(), stream.faults.fatal
        for fault in faults[:SHOWN_ONLINE]:
            print(f"online probe leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
        failed = torch.tensor(fatal is not None, device=self.device).long()
        whole = self.total({"features": features, "labels": labels, "failed": failed})
        if whole["failed"]:
            raise fatal or Refusal(DATA, "another process cannot read the online probe's data; see its message")
        used = whole["labels"] > 0
        return whole["features"][used].to(self.device), (whole["labels"][used] - 1).to(self.device)
