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
from ssl_vit.convert.sample_names import names
from ssl_vit.data.manifest import Manifest
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.evaluate.label_sets import read_label_sets
from ssl_vit.files import write_bytes

TOP = 5  # predictions that are kept for an image
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


def hits(top: np.ndarray, accepted: Accepted) -> np.ndarray:
    """Whether one of an image's predictions [N, k] is right, bool [N]."""
    if isinstance(accepted, np.ndarray) and accepted.ndim == 1 and accepted.dtype != object:
        return (top == accepted[:, None]).any(1)
    return np.array([bool(set(row.tolist()) & set(right)) for row, right in zip(top, accepted, strict=True)], bool)


def accuracy(found: Predictions, classes: int, accepted: Accepted | None = None) -> dict[str, float]:
    """top1, top5, mean_per_class (of the classes that occur) and samples; images without a right answer do not count.

    With label sets there is no mean per class: an image belongs to several.
    """
    right = found.labels if accepted is None else accepted
    counted = right >= 0 if isinstance(right, np.ndarray) else np.array([len(one) > 0 for one in right], bool)
    top = found.top[counted]
    right = right[counted] if isinstance(right, np.ndarray) else [one for one in right if len(one)]
    if not len(top):
        return {"top1": 0.0, "top5": 0.0, "samples": 0}
    first = hits(top[:, :1], right)
    values = {"top1": float(first.mean()), "top5": float(hits(top, right).mean())}
    if accepted is None:
        seen = np.bincount(right, minlength=classes)
        values["mean_per_class"] = float((np.bincount(right, first, classes)[seen > 0] / seen[seen > 0]).mean())
    return {**values, "samples": len(top)}


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often the row's class was taken for the column's, int64 [classes, classes]; images without label left out."""
    known = labels >= 0
    pairs = labels[known] * classes + predicted[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class(matrix: np.ndarray) -> list[dict[str, float | None]]:
    """For each class of a confusion matrix: samples, right, accuracy (recall), predicted, precision; None for 0 / 0."""
    rows = []
    for number, row in enumerate(matrix):
        samples, right, predicted = int(row.sum()), int(row[number]), int(matrix[:, number].sum())
        accuracy = right / samples if samples else None
        precision = right / predicted if predicted else None
        values = {"samples": samples, "right": right, "accuracy": accuracy}
        rows.append({**values, "predicted": predicted, "precision": precision})
    return rows


def interval(right: np.ndarray, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `right` [N]: of a share, resampling is a binomial draw."""
    share = float(np.mean(right))
    draws = np.random.Generator(np.random.PCG64(seed)).binomial(len(right), share, resamples) / len(right)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are at least two."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


HEAD = ["sample", "key", "label"]


def write_predictions(
    found: Predictions, keys: Sequence[str], names: Sequence[str], path: Path, labels: Sequence[str] | None = None
) -> None:
    """Write sample, key, label and the best classes with their probabilities, as CSV or Parquet by the suffix.

    `labels` are the names of the true classes where they are others than the classifier's.
    """
    columns = HEAD + [f"{what}{i + 1}" for i in range(found.top.shape[1]) for what in ("top", "score")]
    truth = [(labels or names)[i] if i >= 0 else "" for i in found.labels.tolist()]
    rows = [
        [sample, keys[sample], label, *(v for i, p in zip(top, scores, strict=True) for v in (names[i], p))]
        for sample, label, top, scores in zip(
            found.samples.tolist(), truth, found.top.tolist(), found.scores.tolist(), strict=True
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
            raise Refusal(
                USAGE, "metrics.predictions=parquet: needs the package pyarrow, or csv in its place"
            ) from error
        table = pa.table({name: [_unicode(row[i]) for row in rows] for i, name in enumerate(columns)})
        with io.BytesIO() as buffer:
            parquet.write_table(table, buffer)
            write_bytes(path, buffer.getvalue())
        return
    with io.StringIO(newline="") as text:
        writer = csv.writer(text, lineterminator="\r\n")  # RFC 4180; else a \r in a name is not quoted
        writer.writerow(columns)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
        write_bytes(path, text.getvalue().encode(errors="backslashreplace"))


def _unicode(value: Any) -> Any:
    """Bytes of a file name that are no UTF-8, which are lone surrogates in Python, written out as in CSV."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def groups(tasks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean score of each group of tasks, given as (group, score)."""
    names = list(dict.fromkeys(group for group, _ in tasks))
    return {name: float(np.mean([score for group, score in tasks if group == name])) for name in names}


def check_labels(labels: np.ndarray, classes: list[str], name: str, every: bool) -> None:
    """Raise Refusal(DATA) for labels outside the classes and, where `every` class has to occur, for empty ones."""
    strange = labels[(labels >= len(classes)) | (labels < -1)]
    if len(strange):
        text = f"{len(strange)} samples have labels outside its {len(classes)} classes (such as {strange[0]})"
        raise Refusal(DATA, f"{name}: {text}; convert or index it again")
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(counts == 0)[:3]] if every else []
    if empty:
        number = int((counts == 0).sum())
        cure = "a classifier cannot learn them: add images, or leave them out of the classes"
        raise Refusal(DATA, f"{name}: {number} of {len(classes)} classes have no image ({', '.join(empty)}); {cure}")


def measure(
    found: Predictions, split: Manifest, classes: Sequence[str], config: Metrics, folder: Path
) -> dict[str, Any]:
    """All that predictions for a split say; writes predictions, per_class.csv and confusion.csv beside it."""
    keys = names(split)
    write_predictions(found, keys, classes, folder / f"predictions.{config.predictions}")
    results: dict[str, Any] = {}
    if (found.labels >= 0).any():
        measured = accuracy(found, len(classes))
        right = hits(found.top[:, :1], found.labels)[found.labels >= 0]
        results["mean_per_class"] = measured["mean_per_class"]
        results["top1_interval"] = interval(right, resamples=config.bootstrap)
        matrix = confusion(found.labels, found.top[:, 0], len(classes))
        rows = per_class(matrix)
        table = [[name, *row.values()] for name, row in zip(classes, rows, strict=True)]
        write_table(["class", *rows[0]], table, folder / "per_class.csv")
        write_table(
            ["", *classes], [[n, *r] for n, r in zip(classes, matrix.tolist(), strict=True)], folder / "confusion.csv"
        )
    if config.label_sets is not None:
        accepted = read_label_sets(config.label_sets, [keys[i] for i in found.samples], len(classes))
        results["label_sets"] = accuracy(found, len(classes), accepted)
    return results
