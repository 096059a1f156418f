"""Sections of a report that several tools share: remarks, confusion, samples."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.manifest import Manifest
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.report import format
from ssl_vit.report.format import format_percent
from ssl_vit.report.page import Page, plot_confusion, plot_gallery

MAX_CLASSES = 50  # classes that a page shows one by one
MAX_IMAGES = 8  # images that were right, and as many that were wrong


def add_caveats(page: Page, results: dict[str, Any], paper: str | None = None) -> None:
    """What belongs beside a number: its interval, the paper's, and where the data are not the benchmark's."""
    if results.get("top1_interval"):
        low, high = results["top1_interval"]
        page.text(
            f"95 % interval of top-1 by bootstrap over the images: {format_percent(low)} to {format_percent(high)}."
        )
    if paper:
        page.text(f"The paper reports: {format.escape(paper)}.")
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {format.escape(note)}.")


def flatten_protocol(protocol: dict[str, Any]) -> dict[str, Any]:
    """Names and values of a protocol, groups as GROUP.NAME."""
    groups = {name: value for name, value in protocol.items() if isinstance(value, dict)}
    scalars = {name: value for name, value in protocol.items() if name not in groups}
    return scalars | {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}


def add_confusion(page: Page, folder: Path) -> None:
    """The classes and what was taken for what, where confusion.csv is in the folder."""
    if not (folder / "confusion.csv").exists():
        return
    with (folder / "confusion.csv").open(newline="", errors="backslashreplace") as file:
        classes, *rows = csv.reader(file)
    matrix, classes = np.array([[int(cell) for cell in row[1:]] for row in rows]), classes[1:]
    page.section("Classes")
    columns = ["class", "images", "right, %", "predicted", "precision, %"]
    table = [
        [name, row["samples"], format_percent(row["accuracy"]), row["predicted"], format_percent(row["precision"])]
        for name, row in zip(classes, metrics.per_class_metrics(matrix), strict=True)
    ]
    worst = sorted(table, key=lambda row: float(row[2]) if row[2] != "-" else 101.0)
    page.table(columns, worst[:MAX_CLASSES])
    if len(classes) <= MAX_CLASSES:
        page.picture("confusion", "confusion matrix", plot_confusion(matrix, classes))
        return
    page.text(
        f"The {MAX_CLASSES} classes with the lowest accuracy; all are in per_class.csv. The most frequent mistakes:"
    )
    wrong = matrix * (1 - np.eye(len(classes), dtype=int))
    pairs = [divmod(int(index), len(classes)) for index in np.argsort(-wrong, axis=None)[:20]]
    page.table(["true", "predicted", "images"], [[classes[a], classes[b], int(wrong[a, b])] for a, b in pairs])


def add_samples(page: Page, split: Manifest, data: Data, predictions: Predictions) -> None:
    """Images of a split that were right, and some that were wrong, the surest first."""
    dataset, images = SampleDataset(split, data, seed=0, training=False), []
    correct = metrics.is_correct(predictions.top[:, :1], predictions.labels)
    for outcome in (True, False):
        indices = np.flatnonzero((correct == outcome) & (predictions.labels >= 0))
        for index in indices[np.argsort(-predictions.scores[indices, 0], kind="stable")][:MAX_IMAGES].tolist():
            image, label = dataset.load_sample(int(predictions.samples[index]), 0)
            predicted, score = split.classes[predictions.top[index, 0]], predictions.scores[index, 0]
            caption = f"{predicted} {score:.2f}" if outcome else f"{predicted} {score:.2f}\nis {split.classes[label]}"
            images.append((image.permute(1, 2, 0).numpy(), caption, outcome))
    if images:
        page.section("Images")
        page.text("Those that it was surest of: right, and (red) wrong.")
        page.picture("samples", "images with predictions", plot_gallery(images))
