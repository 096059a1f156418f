"""What a training leaves behind when it is through: exports, results.json, predictions, and a page about them."""

import csv
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.names import names
from ssl_vit.data.samples import Samples
from ssl_vit.data.sequential import Tars
from ssl_vit.durable import sha256, write_bytes
from ssl_vit.encoders import weights
from ssl_vit.encoders.weights import Classifier, Weights
from ssl_vit.evaluate import metrics, report, sweep
from ssl_vit.evaluate.label_sets import mapped, read_label_sets
from ssl_vit.evaluate.metrics import Metrics, Predictions
from ssl_vit.evaluate.report import Page, per_cent
from ssl_vit.recipe import Finetune, Recipe, sources
from ssl_vit.train import checkpoint
from ssl_vit.train.run import Run
from ssl_vit.train.tracker import best_row

KEPT = ".predictions-{:08d}.npz"  # of an evaluation, by its step
MOST = 50  # classes that a page shows one by one


def keep_predictions(folder: Run, found: Predictions) -> None:
    """Keep what an evaluation predicted; results are made of it, also by a later start."""
    with io.BytesIO() as buffer:
        np.savez(buffer, samples=found.samples, labels=found.labels, top=found.top, scores=found.scores)
        write_bytes(folder.folder / KEPT.format(folder.step), buffer.getvalue())


def kept_predictions(folder: Path, step: int) -> Predictions:
    """What the evaluation of a step predicted; that of others is removed."""
    path = folder / KEPT.format(step)
    for old in folder.glob(".predictions-*.npz"):
        if old != path:
            old.unlink()
    with np.load(path) as found:
        return Predictions(found["samples"], found["labels"], found["top"], found["scores"])


def finish(
    recipe: Recipe,
    folder: Run,
    row: dict[str, Any],
    data: Manifest | Tars,
    judged_on: Manifest | None,
    started_from: Weights | None,
) -> dict[str, Any]:
    """Export the encoder, and a classifier, from the last checkpoint or the best; write results.json and return it."""
    row = best_row(folder.folder, recipe.best) or row
    saved = checkpoint.trained(folder.checkpoints / f"step-{row['step']:08d}")
    encoder = recipe.encoder.build()
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in saved.items() if name.startswith("encoder.")}
    )
    checkpoint.publish(folder.folder / "encoder", lambda draft: weights.export(encoder, draft))
    judged = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
    results = {**judged, **{f"train_{n}": row[n] for n in ("loss", "unigram_entropy") if n in row}, "step": row["step"]}
    if recipe.best:
        results["best"] = {"metric": recipe.best, "step": row["step"], "value": row.get(recipe.best)}
    if isinstance(recipe, Finetune) and judged_on is not None:
        head = Classifier(
            saved["head.layers.0.weight"], saved["head.layers.0.bias"], data.classes, recipe.data.eval_crop
        )
        checkpoint.publish(folder.folder / "classifier", lambda draft: weights.export(encoder, draft, head))
        found = kept_predictions(folder.folder, row["step"])
        results |= measure(found, judged_on, data.classes, recipe.metrics, folder.folder)
        results["digests"] = {
            "data.train": data.identity if isinstance(data, Manifest) else None,
            "data.val": judged_on.identity,
            "init": digest(started_from) if started_from is not None else None,
            "classifier": sha256(folder.folder / "classifier" / "model.safetensors"),
        }
        whole = None if recipe.data.hold_out else judged_on
        if notes := recipe.benchmark.differs(data if isinstance(data, Manifest) else None, whole):
            results["not_the_benchmark"] = notes
    results["protocol"] = protocol(recipe)
    folder.write_results(results)
    if not recipe.quiet:
        shown = {
            name: value for name, value in judged.items() if name in ("loss", "accuracy", "top1", "top5", "samples")
        }
        text = "".join(
            f", {name} {value:.4f}" if name != "samples" else f" on {value}" for name, value in shown.items()
        )
        print(f"{folder.folder}: done, {row['step']} steps{text}; encoder in {folder.folder / 'encoder'}")
    return results


def protocol(recipe: Recipe) -> dict[str, Any]:
    """What a number needs beside it, to be repeated."""
    return {
        "init": recipe.init,
        "head": recipe.head.kind,
        "data.train": recipe.data.train,
        "data.val": recipe.data.val,
        "data.subset": recipe.data.subset,
        "data.hold_out": recipe.data.hold_out,
        "image_size": recipe.data.image_size,
        "pool": recipe.encoder.pool,
        "optim": recipe.optim.model_dump(),
        "average": recipe.average,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "seed": recipe.seed,
    }


def digest(tensors: Weights) -> str:
    """A digest of named tensors."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def measure(
    found: Predictions, split: Manifest, classes: Sequence[str], config: Metrics, folder: Path
) -> dict[str, Any]:
    """All that predictions for a split say; writes predictions, per_class.csv and confusion.csv beside it."""
    keys = names(split)
    metrics.write_predictions(found, keys, classes, folder / f"predictions.{config.predictions}")
    results: dict[str, Any] = {}
    if config.class_map is not None:
        results |= mapped(found, split.classes, classes, config.class_map)
    elif (found.labels >= 0).any():
        measured = metrics.accuracy(found, len(classes))
        right = metrics.hits(found.top[:, :1], found.labels)[found.labels >= 0]
        results["mean_per_class"] = measured["mean_per_class"]
        results["top1_interval"] = metrics.interval(right, resamples=config.bootstrap)
        matrix = metrics.confusion(found.labels, found.top[:, 0], len(classes))
        rows = metrics.per_class(matrix)
        table = [[name, *row.values()] for name, row in zip(classes, rows, strict=True)]
        metrics.write_table(["class", *rows[0]], table, folder / "per_class.csv")
        metrics.write_table(
            ["", *classes], [[n, *r] for n, r in zip(classes, matrix.tolist(), strict=True)], folder / "confusion.csv"
        )
    if config.label_sets is not None:
        accepted = read_label_sets(config.label_sets, [keys[i] for i in found.samples], len(classes))
        results["label_sets"] = metrics.accuracy(found, len(classes), accepted)
    return results


def command() -> str:
    """The command line of this start."""
    return shlex.join(["python", *sys.argv])


def write_tuned(
    recipe: Finetune, folder: Run, finals: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The results of a fine-tuning with its sweep and its seeds, as results.json and as a page."""
    results = dict(finals[0]) if len(finals) == 1 else {**sweep.averaged(finals), "samples": finals[0]["samples"]}
    if len(finals) > 1:
        kept = ("top1", "top5", "mean_per_class", "top1_interval", "label_sets", "digests", "step")
        results["seeds"] = [
            {"seed": one["protocol"]["seed"], **{name: one.get(name) for name in kept}} for one in finals
        ]
        results |= {name: finals[0][name] for name in ("not_the_benchmark", "protocol") if name in finals[0]}
    if tried:
        fraction = None if recipe.sweep.val else recipe.sweep.fraction
        results["lr"] = recipe.optim.lr
        results["sweep"] = {"fraction": fraction, "val": recipe.sweep.val, "tried": tried}
    results["command"] = command()
    folder.write_results(results)
    _page(recipe, folder.folder, results).write(folder.folder)
    return results


def _page(recipe: Finetune, folder: Path, results: dict[str, Any]) -> Page:
    name = recipe.benchmark.name or ", ".join(recipe.data.val or recipe.data.train or ())
    page = Page(f"Fine-tuning on {name}")
    first = folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder
    low, high = results.get("top1_interval") or (None, None)
    rows = [[n, per_cent(results.get(n), results.get(f"{n}_sd"))] for n in ("top1", "top5", "mean_per_class")]
    page.table(["on the test split", "%"], [row for row in rows if row[1] != "-"])
    for one in ("label_sets", "mapped", "mapped_only"):
        if one in results:
            page.table([one, "%"], [[n, per_cent(results[one].get(n))] for n in ("top1", "top5")])
    if low is not None:
        page.text(f"95 % interval of top-1 by bootstrap over the images: {per_cent(low)} to {per_cent(high)}.")
    if recipe.benchmark.paper:
        page.text(f"The paper reports: {report.plain(recipe.benchmark.paper)}.")
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {report.plain(note)}.")
    page.section("Protocol")
    said = {n: v for n, v in results["protocol"].items() if n != "optim"} | results["protocol"]["optim"]
    digests = results.get("digests") or results["seeds"][0]["digests"]
    page.values({"seeds": recipe.seeds, **said, **{f"digest of {n}": v for n, v in digests.items()}})
    page.text("To repeat it:")
    page.code(results["command"])
    if "sweep" in results:
        page.section("Learning rate")
        tried = results["sweep"]["tried"]
        page.table(["rate", "top-1 on the held-out part, %"], [[f"{t['lr']:g}", per_cent(t["top1"])] for t in tried])
        lines = {"held out": ([t["lr"] for t in tried], [100 * t["top1"] for t in tried])}
        page.picture("sweep", "top-1 by learning rate", report.curves(lines, "learning rate", "top-1, %", log=True))
        page.text(f"Taken for the final training: {recipe.optim.lr:g}.")
    if "seeds" in results:
        page.section("Seeds")
        page.table(["seed", "top-1, %"], [[str(one["seed"]), per_cent(one["top1"])] for one in results["seeds"]])
    _curves(page, first)
    if (first / "confusion.csv").exists():
        _confusion(page, first)
    if (first / KEPT.format(results.get("step") or results["seeds"][0]["step"])).exists():
        _samples(page, recipe, first, results.get("step") or results["seeds"][0]["step"])
    return page


def _curves(page: Page, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    page.section("Training")
    for name, what in (("loss", "loss"), ("top1", "top-1")):
        lines = {
            label: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for key, label in ((name, "training"), (f"val_{name}", "test split"))
        }
        page.picture(name, f"{what} by step", report.curves(lines, "step", what))


def _confusion(page: Page, folder: Path) -> None:
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


def _samples(page: Page, recipe: Finetune, folder: Path, step: int) -> None:
    """A row of images that were right, and one of those that were wrong, the surest first."""
    found = kept_predictions(folder, step)
    train, val = sources(recipe)
    split = val or train
    if not isinstance(split, Manifest):
        return
    samples, images = Samples(split, recipe.data, seed=0, training=False), []
    right = metrics.hits(found.top[:, :1], found.labels)
    for truth in (True, False):
        chosen = np.flatnonzero(right == truth)
        for place in chosen[np.argsort(-found.scores[chosen, 0], kind="stable")][:8].tolist():
            image, label = samples.sample(int(found.samples[place]), 0)
            guess, score = split.classes[found.top[place, 0]], found.scores[place, 0]
            caption = f"{guess} {score:.2f}" if truth else f"{guess} {score:.2f}\nis {split.classes[label]}"
            images.append((image.permute(1, 2, 0).numpy(), caption, truth))
    page.section("Images")
    page.text("Those that it was surest of: right, and (red) wrong.")
    page.picture("samples", "images with predictions", report.gallery(images))


def write_suite(recipe: Finetune, folder: Run, found: dict[str, dict[str, Any]]) -> None:
    """The results of a suite of tasks: its score, the groups', each task's."""
    kept = ("top1", "top1_sd", "top5", "mean_per_class", "samples", "not_the_benchmark", "lr", "digests")
    some = {name: {k: v for k, v in one.items() if k in kept} for name, one in found.items()}
    results = {**sweep.suite(recipe.tasks, some), "protocol": protocol(recipe), "command": command()}
    folder.write_results(results)
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
    said = {n: v for n, v in results["protocol"].items() if n != "optim" and not n.startswith("data.")}
    page.values(said | results["protocol"]["optim"])
    page.text("To repeat it:")
    page.code(results["command"])
    page.write(folder.folder)
    if not recipe.quiet:
        print(f"{folder.folder}: done, mean of {len(recipe.tasks)} tasks: {results['mean']:.4f}", flush=True)
