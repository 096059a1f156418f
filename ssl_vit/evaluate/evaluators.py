"""Judge a model while it trains: top-1 and top-5 of a held-out set, and online k-NN and few-shot."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.data.dataset import printable
from ssl_vit.data.loader import EvaluationStream, ProcessShard
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import few_shot, knn
from ssl_vit.evaluate.few_shot import FewShotConfig
from ssl_vit.evaluate.metrics import TOP_K, Predictions
from ssl_vit.model import Batch, Sums

MAX_PRINTED_FAULTS = 10  # faults that a process prints


class HeadEvaluator:
    """Runs the head over every sample of a split exactly once. Sums cross processes, never means.

    `report` is the head's; `on_predictions`, if given, receives a classifier's predictions for all images, on every
    process.
    """

    def __init__(
        self,
        stream: EvaluationStream,
        shard: ProcessShard,
        processes: Distributed,
        report: Callable[[Sums, float], dict[str, float]],
        on_predictions: Callable[[Predictions], None] | None = None,
    ):
        self.stream, self.shard, self.processes = stream, shard, processes
        self.report, self.on_predictions = report, on_predictions

    def run(self, model: nn.Module, on_batch: Callable[[], None] = lambda: None) -> Iterator[tuple[str, float]]:
        """The head's report, and how many `samples` were counted, how many `bad_samples` could not be."""
        sums: Sums = {}
        rows = None
        for start, batch in self.stream.enumerate_batches(self.shard, self.processes.device):
            output = model(batch)
            if self.on_predictions is not None and output.logits is not None:
                rows = _add_predictions(rows, self.stream.count, start, batch, output.logits)
            batch_sums = {**output.sums, "_weight": output.weight}
            sums = {name: sums[name] + value if name in sums else value for name, value in batch_sums.items()}
            on_batch()
        num_faults, fatal = _print_faults(self.stream, "evaluation")
        flags = torch.tensor([num_faults, fatal is not None], device=self.processes.device)
        sums = self.processes.all_reduce({**sums, "_faults": flags})
        num_bad, failed = sums.pop("_faults").tolist()
        if failed:
            raise fatal or ExitError(ExitCode.DATA, "another process cannot read the evaluation data; see its message")
        weight = float(sums.pop("_weight"))
        if num_bad and not weight:
            raise ExitError(ExitCode.DATA, f"not one sample of {self.stream.samples.manifest.name} can be read")
        if self.on_predictions is not None and rows is not None:
            rows = self.processes.all_reduce({"rows": rows})["rows"].numpy()
            self.on_predictions(_to_predictions(rows, self.stream.ids))
        yield from self.report(sums, max(1.0, weight)).items()
        yield "samples", int(weight)
        yield "bad_samples", num_bad


def _add_predictions(rows: Tensor | None, count: int, start: int, batch: Batch, logits: Tensor) -> Tensor:
    """Rows [count, 2 + 2k] of all samples, with this batch's: how often it was seen, label, best classes, their scores.

    Every process fills its own, so that their sum is the whole.
    """
    scores, top = logits.softmax(1).topk(min(TOP_K, logits.shape[1]))
    if rows is None:
        rows = torch.zeros(count, 2 + 2 * scores.shape[1], dtype=torch.float64, device=logits.device)
    valid = batch["valid"][:, None].double()
    batch_rows = torch.cat([valid, batch["label"][:, None], top, scores], 1) * valid
    target = rows[start : start + len(batch_rows)]
    target += batch_rows[: len(target)]
    return rows


def _print_faults(stream: EvaluationStream, evaluator: str) -> tuple[int, ExitError | None]:
    """Print the first samples that this process could not read; returns their number and the fatal error."""
    faults = stream.faults.drain()
    for fault in faults[:MAX_PRINTED_FAULTS]:
        print(f"{evaluator} leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
    return len(faults), stream.faults.fatal


def _to_predictions(rows: np.ndarray, ids: np.ndarray | None) -> Predictions:
    indices, k = np.flatnonzero(rows[:, 0]), rows.shape[1] // 2 - 1
    valid_rows = rows[indices]
    labels, top = valid_rows[:, 1].astype(np.int64), valid_rows[:, 2 : 2 + k].astype(np.int64)
    return Predictions(indices if ids is None else ids[indices], labels, top, valid_rows[:, 2 + k :].astype(np.float32))


class OnlineProbe(Config):
    """What is measured beside the loss at every evaluation (`eval_every`), where labeled splits are given."""

    train: tuple[str, ...] | None = Field(default=None, description="labeled shards or images to learn from")
    val: tuple[str, ...] | None = Field(default=None, description="labeled shards or images to be right on")
    samples: int = Field(default=10_000, ge=1, description="most images of each, a fixed random choice")
    k: int = Field(default=20, ge=1, description="neighbors that vote in k-NN")
    shots: tuple[int, ...] = Field(default=(1, 5, 10), description="images a class in few-shot, which has 3 draws")


class FrozenProbe:
    """Judges the frozen features of the model that trains; `pool_tokens` makes one vector of an image's tokens."""

    def __init__(
        self,
        splits: tuple[EvaluationStream, EvaluationStream],
        shard: ProcessShard,
        processes: Distributed,
        config: OnlineProbe,
        pool: Callable[[Tensor], Tensor],
    ):
        self.splits, self.shard, self.processes, self.device = splits, shard, processes, processes.device
        self.config, self.pool = config, pool
        self.classes = len(splits[0].samples.manifest.classes)

    def run(self, model: nn.Module, on_batch: Callable[[], None] = lambda: None) -> Iterator[tuple[str, float]]:
        """`knn_top1` and `few_shot_N`, the mean over three draws, for those N that every class has."""
        train, train_labels = self._extract_features(self.splits[0], model, on_batch)
        test, test_labels = self._extract_features(self.splits[1], model, on_batch)
        if not len(train) or not len(test):
            raise ExitError(
                ExitCode.DATA, "online.train and online.val: not one labeled image of them can be read", shared=True
            )
        votes = knn.knn_scores(train, train_labels, test, self.classes, self.config.k)
        yield "knn_top1", float((votes.argmax(1) == test_labels).double().mean())
        config = FewShotConfig(shots=self.config.shots)
        for shots, accuracies in few_shot.few_shot_accuracies(
            train, train_labels, test, test_labels, self.classes, config
        ).items():
            yield f"few_shot_{shots}", float(np.mean(accuracies))

    def _extract_features(
        self, stream: EvaluationStream, model: nn.Module, on_batch: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Features [N, D] and class numbers [N] of a split, on the device of every process.

        Every process fills the rows of its own samples, so that their sum is the whole.
        """
        features, labels = torch.empty(0), torch.zeros(stream.count, dtype=torch.int64, device=self.device)
        for start, batch in stream.enumerate_batches(self.shard, self.device):
            vectors = self.pool(model(batch, tokens=True)).float()
            if not len(features):
                features = torch.zeros(stream.count, vectors.shape[1], device=self.device)
            rows = slice(start, start + min(len(vectors), max(0, stream.count - start)))
            usable = batch["valid"] & (batch["label"] >= 0)
            features[rows] = vectors[: rows.stop - rows.start]
            labels[rows] = (batch["label"] + 1).mul(usable)[: rows.stop - rows.start]  # 0: not to be used
            on_batch()
        _, fatal = _print_faults(stream, "online probe")
        failed = torch.tensor(fatal is not None, device=self.device).long()
        totals = self.processes.all_reduce({"features": features, "labels": labels, "failed": failed})
        if totals["failed"]:
            raise fatal or ExitError(
                ExitCode.DATA, "another process cannot read the online probe's data; see its message"
            )
        labeled = totals["labels"] > 0
        return totals["features"][labeled].to(self.device), (totals["labels"][labeled] - 1).to(self.device)
