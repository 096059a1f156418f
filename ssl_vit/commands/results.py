"""What a finished training leaves: predictions, results.json, exported encoder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.commands.finetune_report import suite_page, tuned_page
from ssl_vit.commands.setup import sources
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import Tars
from ssl_vit.encoders.checkpoint_formats import Weights
from ssl_vit.encoders.export import export
from ssl_vit.encoders.weights import Classifier, digest
from ssl_vit.errors import MISMATCH, Refusal
from ssl_vit.evaluate import protocol
from ssl_vit.evaluate.metrics import Predictions, measure
from ssl_vit.evaluate.report_sections import samples
from ssl_vit.files import sha256, write_bytes
from ssl_vit.recipes import Finetune, Recipe
from ssl_vit.runtime import command
from ssl_vit.train import checkpoint
from ssl_vit.train.logger import best_row
from ssl_vit.train.run_folder import Run

KEPT = ".predictions-{:08d}.npz"  # of an evaluation, by its step


def keep_predictions(folder: Run, found: Predictions, split: str, every: bool) -> None:
    """Keep what an evaluation predicted of a split, by its identity, for results that a later start may make.

    Those of older evaluations are kept where `every` one may turn out to be the best.
    """
    with io.BytesIO() as buffer:
        np.savez(buffer, split=split, samples=found.samples, labels=found.labels, top=found.top, scores=found.scores)
        write_bytes(folder.folder / KEPT.format(folder.step), buffer.getvalue())
    for old in folder.folder.glob(".predictions-*.npz") if not every else ():
        if old.name != KEPT.format(folder.step):
            old.unlink()


def kept_predictions(folder: Path, step: int, split: str) -> Predictions:
    """What the evaluation of a step predicted; that of others is removed. Refusal where it was of another split."""
    path = folder / KEPT.format(step)
    for old in folder.glob(".predictions-*.npz"):
        if old != path:
            old.unlink()
    with np.load(path) as found:
        if "split" in found and str(found["split"]) != split:
            raise Refusal(MISMATCH, f"run={folder}: was judged on other data than data.val holds now")
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
    best = best_row(folder.folder, recipe.best)
    if best and (folder.checkpoints / f"step-{best['step']:08d}").is_dir():  # on_save_error=continue may have lost it
        row = best
    saved = checkpoint.trained(folder.checkpoints / f"step-{row['step']:08d}")
    encoder = recipe.encoder.build()
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in saved.items() if name.startswith("encoder.")}
    )
    opened: list[str] = []
    checkpoint.publish(folder.folder / "encoder", lambda draft: opened.append(export(encoder, draft)))
    judged = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
    results = {**judged, **{f"train_{n}": row[n] for n in ("loss", "unigram_entropy") if n in row}, "step": row["step"]}
    if recipe.best:
        results["best"] = {"metric": recipe.best, "step": row["step"], "value": row.get(recipe.best)}
    if isinstance(recipe, Finetune) and judged_on is not None:
        head = Classifier(
            saved["head.layers.0.weight"], saved["head.layers.0.bias"], data.classes, recipe.data.eval_crop
        )
        checkpoint.publish(folder.folder / "classifier", lambda draft: export(encoder, draft, head))
        found = kept_predictions(folder.folder, row["step"], judged_on.identity)
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
    results["protocol"] = describe_protocol(recipe)
    folder.write_results(results)
    if not recipe.quiet:
        shown = {
            name: value for name, value in judged.items() if name in ("loss", "accuracy", "top1", "top5", "samples")
        }
        text = "".join(
            f", {name} {value:.4f}" if name != "samples" else f" on {value}" for name, value in shown.items()
        )
        print(f"{folder.folder}: done, {row['step']} steps{text}; encoder in {folder.folder / 'encoder'}, {opened[0]}")
    return results


def describe_protocol(recipe: Recipe) -> dict[str, Any]:
    """What a number needs beside it, to be repeated."""
    return {
        "init": recipe.init,
        "head": recipe.head.kind,
        **{f"head.{name}": value for name, value in recipe.head.model_dump().items() if name != "kind"},
        "encoder": recipe.encoder.model_dump(),
        "data.train": recipe.data.train,
        "data.val": recipe.data.val,
        "data.subset": recipe.data.subset,
        "data.hold_out": recipe.data.hold_out,
        "image_size": recipe.data.image_size,
        **{f"data.{name}": getattr(recipe.data, name) for name in ("crop_area", "whole", "flip", "eval_crop")},
        "data.auto_augment": recipe.data.auto_augment,
        "pool": recipe.encoder.pool,
        "optim": recipe.optim.model_dump(),
        "average": recipe.average,
        "best": recipe.best,
        "precision": recipe.precision,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "seed": recipe.seed,
    } | ({"metrics": recipe.metrics.model_dump(mode="json")} if isinstance(recipe, Finetune) else {})


def write_tuned(
    recipe: Finetune, folder: Run, finals: Sequence[dict[str, Any]], tried: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The results of a fine-tuning with its sweep and its seeds, as results.json and as a page."""
    results = dict(finals[0]) if len(finals) == 1 else {**protocol.averaged(finals), "samples": finals[0]["samples"]}
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
    page = tuned_page(recipe, folder.folder, results)
    first = folder.folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder.folder
    train, val = sources(recipe)
    if isinstance(split := val or train, Manifest):
        step = results.get("step") or results["seeds"][0]["step"]
        samples(page, split, recipe.data, kept_predictions(first, step, split.identity))
    page.write(folder.folder)
    return results


def write_suite(recipe: Finetune, folder: Run, found: dict[str, dict[str, Any]]) -> None:
    """The results of a suite of tasks: its score, the groups', each task's."""
    kept = ("top1", "top1_sd", "top5", "mean_per_class", "samples", "not_the_benchmark", "lr", "digests")
    some = {name: {k: v for k, v in one.items() if k in kept} for name, one in found.items()}
    results = {**protocol.suite(recipe.tasks, some), "protocol": describe_protocol(recipe), "command": command()}
    folder.write_results(results)
    suite_page(recipe, results).write(folder.folder)
    if not recipe.quiet:
        print(f"{folder.folder}: done, mean of {len(recipe.tasks)} tasks: {results['mean']:.4f}", flush=True)
