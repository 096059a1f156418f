"""What benchmarks measure, from the predictions for each image: accuracies, label sets, intervals, confusion."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.convert.sample_names import read_sample_names
from ssl_vit.data.manifest import Manifest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.label_sets import read_label_sets
from ssl_vit.files import write_bytes

TOP_K = 5  # predictions that are kept for an image
Accepted = np.ndarray | Sequence[Any]
"""The right answers of each image: one class number (int [N]), or a set of them each."""


class Metrics(Config):
    """What is measured beside top-1 and top-5."""

    label_sets: str | None = Field(
        default=None, description="JSON with each image's accepted class numbers (ImageNet-ReaL)"
    )
    class_map: str | None = Field(
        default=None, description="JSON: class folder of data.val -> classes of the classifier (ObjectNet)"
    )
    bootstrap: int = Field(default=1000, ge=1, description="resamples for the 95 % interval")
    predictions: Literal["csv", "parquet"] = Field(default="csv", description="format of the predictions file")


@dataclass(frozen=True)
class Predictions:
    """The best few classes of every image that could be read."""

    samples: np.ndarray  # int64 [N], ids in the split
    labels: np.ndarray  # int64 [N], -1 = none
    top: np.ndarray  # int64 [N, k], the best first, k at most TOP
    scores: np.ndarray  # float32 [N, k], their probabilities


def is_correct(top: np.ndarray, accepted: Accepted) -> np.ndarray:
    """Whether one of an image's predictions [N, k] is right, bool [N]."""
    if isinstance(accepted, np.ndarray) and accepted.ndim == 1 and accepted.dtype != object:
        return (top == accepted[:, None]).any(1)
    return np.array([bool(set(row.tolist()) & set(answers)) for row, answers in zip(top, accepted, strict=True)], bool)


def accuracy(predictions: Predictions, classes: int, accepted: Accepted | None = None) -> dict[str, float]:
    """top1, top5, mean_per_class (of the classes that occur) and samples; images without a right answer do not count.

    With label sets there is no mean per class: an image belongs to several.
    """
    targets = predictions.labels if accepted is None else accepted
    mask = (
        targets >= 0 if isinstance(targets, np.ndarray) else np.array([len(answers) > 0 for answers in targets], bool)
    )
    top = predictions.top[mask]
    targets = targets[mask] if isinstance(targets, np.ndarray) else [answers for answers in targets if len(answers)]
    if not len(top):
        return {"top1": 0.0, "top5": 0.0, "samples": 0}
    top1_correct = is_correct(top[:, :1], targets)
    values = {"top1": float(top1_correct.mean()), "top5": float(is_correct(top, targets).mean())}
    if accepted is None:
        counts = np.bincount(targets, minlength=classes)
        values["mean_per_class"] = float(
            (np.bincount(targets, top1_correct, classes)[counts > 0] / counts[counts > 0]).mean()
        )
    return {**values, "samples": len(top)}


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often the row's class was taken for the column's, int64 [classes, classes]; images without label left out."""
    labeled = labels >= 0
    pairs = labels[labeled] * classes + predicted[labeled]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class_metrics(matrix: np.ndarray) -> list[dict[str, float | None]]:
    """For each class of a confusion matrix: samples, right, accuracy (recall), predicted, precision; None for 0 / 0."""
    rows = []
    for index, row in enumerate(matrix):
        samples, correct, predicted = int(row.sum()), int(row[index]), int(matrix[:, index].sum())
        recall = correct / samples if samples else None
        precision = correct / predicted if predicted else None
        values = {"samples": samples, "right": correct, "accuracy": recall}
        rows.append({**values, "predicted": predicted, "precision": precision})
    return rows


def bootstrap_interval(
    correct: np.ndarray, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `correct` [N]: of a share, resampling is a binomial draw."""
    mean = float(np.mean(correct))
    draws = np.random.Generator(np.random.PCG64(seed)).binomial(len(correct), mean, resamples) / len(correct)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are at least two."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


ID_COLUMNS = ["sample", "key", "label"]


def write_predictions(
    predictions: Predictions,
    keys: Sequence[str],
    class_names: Sequence[str],
    path: Path,
    labels: Sequence[str] | None = None,
) -> None:
    """Write sample, key, label and the best classes with their probabilities, as CSV or Parquet by the suffix.

    `labels` are the names of the true classes where they are others than the classifier's.
    """
    columns = ID_COLUMNS + [f"{kind}{i + 1}" for i in range(predictions.top.shape[1]) for kind in ("top", "score")]
    true_labels = [(labels or class_names)[i] if i >= 0 else "" for i in predictions.labels.tolist()]
    rows = [
        [sample, keys[sample], label, *(v for i, p in zip(top, scores, strict=True) for v in (class_names[i], p))]
        for sample, label, top, scores in zip(
            predictions.samples.tolist(),
            true_labels,
            predictions.top.tolist(),
            predictions.scores.tolist(),
            strict=True,
        )
    ]
    write_table(columns, rows, path)


def write_table(columns: list[str], rows: list[list[Any]], path: Path) -> None:
    """Write a table as CSV, or as Parquet where the path ends so; numbers keep six digits in CSV."""
    if path.suffix == ".parquet":
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise ExitError(
                ExitCode.USAGE, "metrics.predictions=parquet: needs the package pyarrow, or csv in its place"
            ) from error
        table = pa.table({name: [_escape_surrogates(row[i]) for row in rows] for i, name in enumerate(columns)})
        with io.BytesIO() as buffer:
            parquet.write_table(table, buffer)
            write_bytes(path, buffer.getvalue())
        return
    with io.StringIO(newline="") as text:
        writer = csv.writer(text, lineterminator="\r\n")  # RFC 4180; else a \r in a name is not quoted
        writer.writerow(columns)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
        write_bytes(path, text.getvalue().encode(errors="backslashreplace"))


def _escape_surrogates(value: Any) -> Any:
    """Bytes of a file name that are no UTF-8, which are lone surrogates in Python, written out as in CSV."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def group_means(tasks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each group of tasks, given as (group, score)."""
    group_names = list(dict.fromkeys(group for group, _ in tasks))
    return {name: float(np.mean([score for group, score in tasks if group == name])) for name in group_names}


def check_labels(labels: np.ndarray, classes: list[str], name: str, require_all: bool) -> None:
    """Raise ExitError(DATA) for labels outside the classes and, with `require_all`, for classes without a label."""
    invalid = labels[(labels >= len(classes)) | (labels < -1)]
    if len(invalid):
        text = f"{len(invalid)} samples have labels outside its {len(classes)} classes (such as {invalid[0]})"
        raise ExitError(ExitCode.DATA, f"{name}: {text}; convert or index it again")
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(counts == 0)[:3]] if require_all else []
    if empty:
        num_empty = int((counts == 0).sum())
        hint = "a classifier cannot learn them: add images, or leave them out of the classes"
        raise ExitError(
            ExitCode.DATA, f"{name}: {num_empty} of {len(classes)} classes have no image ({', '.join(empty)}); {hint}"
        )


def measure_predictions(
    predictions: Predictions, split: Manifest, classes: Sequence[str], config: Metrics, folder: Path
) -> dict[str, Any]:
    """All that predictions for a split say; writes predictions, per_class.csv and confusion.csv beside it."""
    keys = read_sample_names(split)
    write_predictions(predictions, keys, classes, folder / f"predictions.{config.predictions}")
    results: dict[str, Any] = {}
    if (predictions.labels >= 0).any():
        scores = accuracy(predictions, len(classes))
        correct = is_correct(predictions.top[:, :1], predictions.labels)[predictions.labels >= 0]
        results["mean_per_class"] = scores["mean_per_class"]
        results["top1_interval"] = bootstrap_interval(correct, resamples=config.bootstrap)
        matrix = confusion_matrix(predictions.labels, predictions.top[:, 0], len(classes))
        rows = per_class_metrics(matrix)
        table = [[name, *row.values()] for name, row in zip(classes, rows, strict=True)]
        write_table(["class", *rows[0]], table, folder / "per_class.csv")
        write_table(
            ["", *classes], [[n, *r] for n, r in zip(classes, matrix.tolist(), strict=True)], folder / "confusion.csv"
        )
    if config.label_sets is not None:
        accepted = read_label_sets(config.label_sets, [keys[i] for i in predictions.samples], len(classes))
        results["label_sets"] = accuracy(predictions, len(classes), accepted)
    return results
