"""Frozen-feature scores while an encoder is pretrained: k-NN and few-shot on a labelled split, at every evaluation."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.data.faults import printable
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.evaluate import few_shot, knn
from ssl_vit.evaluate.few_shot import FewShotConfig
from ssl_vit.exits import DATA, Refusal

SHOWN = 10  # faults that a process prints
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
        for fault in faults[:SHOWN]:
            print(f"online probe leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
        failed = torch.tensor(fatal is not None, device=self.device).long()
        whole = self.total({"features": features, "labels": labels, "failed": failed})
        if whole["failed"]:
            raise fatal or Refusal(DATA, "another process cannot read the online probe's data; see its message")
        used = whole["labels"] > 0
        return whole["features"][used].to(self.device), (whole["labels"][used] - 1).to(self.device)
