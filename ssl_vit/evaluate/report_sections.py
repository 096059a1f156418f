"""Sections of a report that several tools share: remarks, confusion, samples."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.data.dataset import Data, Samples
from ssl_vit.data.manifest import Manifest
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.report import format
from ssl_vit.report.format import per_cent
from ssl_vit.report.page import Page, confused, gallery

MOST = 50  # classes that a page shows one by one
SHOWN = 8  # images that were right, and as many that were wrong


def remarks(page: Page, results: dict[str, Any], paper: str | None = None) -> None:
    """What belongs beside a number: its interval, the paper's, and where the data are not the benchmark's."""
    if results.get("top1_interval"):
        low, high = results["top1_interval"]
        page.text(f"95 % interval of top-1 by bootstrap over the images: {per_cent(low)} to {per_cent(high)}.")
    if paper:
        page.text(f"The paper reports: {format.plain(paper)}.")
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {format.plain(note)}.")


def flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """Names and values of a protocol, groups as GROUP.NAME."""
    groups = {name: one for name, one in protocol.items() if isinstance(one, dict)}
    said = {name: value for name, value in protocol.items() if name not in groups}
    return said | {f"{name}.{key}": value for name, one in groups.items() for key, value in one.items()}


def confusion(page: Page, folder: Path) -> None:
    """The classes and what was taken for what, where confusion.csv is in the folder."""
    if not (folder / "confusion.csv").exists():
        return
    with (folder / "confusion.csv").open(newline="", errors="backslashreplace") as file:
        classes, *rows = csv.reader(file)
    matrix, classes = np.array([[int(cell) for cell in row[1:]] for row in rows]), classes[1:]
    page.section("Classes")
    columns = ["class", "images", "right, %", "predicted", "precision, %"]
    table = [
        [name, one["samples"], per_cent(one["accuracy"]), one["predicted"], per_cent(one["precision"])]
        for name, one in zip(classes, metrics.per_class(matrix), strict=True)
    ]
    worst = sorted(table, key=lambda row: float(row[2]) if row[2] != "-" else 101.0)
    page.table(columns, worst[:MOST])
    if len(classes) <= MOST:
        page.picture("confusion", "confusion matrix", confused(matrix, classes))
        return
    page.text(f"The {MOST} classes with the lowest accuracy; all are in per_class.csv. The most frequent mistakes:")
    wrong = matrix * (1 - np.eye(len(classes), dtype=int))
    pairs = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None)[:20]]
    page.table(["true", "predicted", "images"], [[classes[a], classes[b], int(wrong[a, b])] for a, b in pairs])


def samples(page: Page, split: Manifest, data: Data, found: Predictions) -> None:
    """Images of a split that were right, and some that were wrong, the surest first."""
    source, images = Samples(split, data, seed=0, training=False), []
    right = metrics.hits(found.top[:, :1], found.labels)
    for truth in (True, False):
        chosen = np.flatnonzero((right == truth) & (found.labels >= 0))
        for place in chosen[np.argsort(-found.scores[chosen, 0], kind="stable")][:SHOWN].tolist():
            image, label = source.sample(int(found.samples[place]), 0)
            guess, score = split.classes[found.top[place, 0]], found.scores[place, 0]
            caption = f"{guess} {score:.2f}" if truth else f"{guess} {score:.2f}\nis {split.classes[label]}"
            images.append((image.permute(1, 2, 0).numpy(), caption, truth))
    if images:
        page.section("Images")
        page.text("Those that it was surest of: right, and (red) wrong.")
        page.picture("samples", "images with predictions", gallery(images))
