"""Pages about fine-tunings, from their results and the files beside them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.evaluate import metrics, report
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.evaluate.report import Page, per_cent
from ssl_vit.recipe import Finetune

MOST = 50  # classes that a page shows one by one
SHOWN = 8  # images that were right, and as many that were wrong


def tuned_page(recipe: Finetune, folder: Path, results: dict[str, Any]) -> Page:
    """A page of a fine-tuning with its sweep and its seeds, from its results and the files in its folder."""
    name = recipe.benchmark.name or ", ".join(recipe.data.val or recipe.data.train or ())
    page = Page(f"Fine-tuning on {name}")
    first = folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder
    rows = [[n, per_cent(results.get(n), results.get(f"{n}_sd"))] for n in ("top1", "top5", "mean_per_class")]
    page.table(["on the test split", "%"], [row for row in rows if row[1] != "-"])
    if sets := results.get("label_sets"):
        table = [[n, per_cent(sets.get(n), sets.get(f"{n}_sd"))] for n in ("top1", "top5")]
        page.table(["by label sets", "%"], table)
    remarks(page, results, recipe.benchmark.paper)
    page.section("Protocol")
    said = flat(results["protocol"])
    digests = results.get("digests") or results["seeds"][0]["digests"]
    page.values({"seeds": recipe.seeds, **said, **{f"digest of {n}": v for n, v in digests.items()}})
    page.text("To repeat it:")
    page.code(results["command"])
    if "sweep" in results:
        page.section("Learning rate")
        tried = results["sweep"]["tried"]
        page.table(
            ["rate", "top-1 on the held-out part, %"],
            [[f"{t['lr']:g}", "diverged" if "diverged" in t else per_cent(t["top1"])] for t in tried],
        )
        lines = {"held out": ([t["lr"] for t in tried], [100 * t["top1"] for t in tried])}
        page.picture("sweep", "top-1 by learning rate", report.curves(lines, "learning rate", "top-1, %", log=True))
        page.text(f"Taken for the final training: {recipe.optim.lr:g}.")
    if "seeds" in results:
        page.section("Seeds")
        page.table(["seed", "top-1, %"], [[str(one["seed"]), per_cent(one["top1"])] for one in results["seeds"]])
    _curves(page, first)
    confusion(page, first)
    return page


def remarks(page: Page, results: dict[str, Any], paper: str | None = None) -> None:
    """What belongs beside a number: its interval, the paper's, and where the data are not the benchmark's."""
    if results.get("top1_interval"):
        low, high = results["top1_interval"]
        page.text(f"95 % interval of top-1 by bootstrap over the images: {per_cent(low)} to {per_cent(high)}.")
    if paper:
        page.text(f"The paper reports: {report.plain(paper)}.")
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {report.plain(note)}.")


def flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """Names and values of a protocol, groups as GROUP.NAME."""
    groups = {name: one for name, one in protocol.items() if isinstance(one, dict)}
    said = {name: value for name, value in protocol.items() if name not in groups}
    return said | {f"{name}.{key}": value for name, one in groups.items() for key, value in one.items()}


def _curves(page: Page, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    page.section("Training")
    for name, what in (("loss", "loss"), ("top1", "top-1")):
        lines = {
            label: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for key, label in ((name, "training"), (f"val_{name}", "test split"))
        }
        page.picture(name, f"{what} by step", report.curves(lines, "step", what))


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
        page.picture("confusion", "confusion matrix", report.confused(matrix, classes))
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
        page.picture("samples", "images with predictions", report.gallery(images))


def suite_page(recipe: Finetune, results: dict[str, Any]) -> Page:
    """A page of a suite of tasks."""
    page = Page(recipe.benchmark.name or "Suite of tasks")
    page.table(["mean of", "top-1, %"], [["all tasks", per_cent(results["mean"])]])
    page.table(["group", "top-1, %"], [[name, per_cent(value)] for name, value in results["groups"].items()])
    table = [
        [name, one["group"], per_cent(one["top1"], one.get("top1_sd")), one["samples"], one["paper"]]
        for name, one in results["tasks"].items()
    ]
    page.table(["task", "group", "top-1, %", "test images", "paper, %"], table)
    for name, one in results["tasks"].items():
        for note in one.get("not_the_benchmark", ()):
            page.text(f"**Not the benchmark's data**, {report.plain(name)}: {report.plain(note)}.")
    page.section("Protocol")
    page.values({n: v for n, v in flat(results["protocol"]).items() if not n.startswith("data.")})
    page.text("To repeat it:")
    page.code(results["command"])
    return page
