"""What a finished training leaves: predictions, results.json, exported encoder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.commands.finetune_report import finetune_page, suite_page
from ssl_vit.commands.setup import prepare_data
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import TarList
from ssl_vit.encoders.checkpoint_formats import Weights
from ssl_vit.encoders.export import export_encoder
from ssl_vit.encoders.weights import PretrainedClassifier, tensor_digest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import protocol
from ssl_vit.evaluate.metrics import Predictions, measure_predictions
from ssl_vit.evaluate.report_sections import add_samples
from ssl_vit.files import sha256, write_bytes
from ssl_vit.recipes import Finetune, Recipe
from ssl_vit.runtime import command_line
from ssl_vit.train import checkpoint
from ssl_vit.train.logger import find_best_row
from ssl_vit.train.run_folder import Run

PREDICTIONS_FILE = ".predictions-{:08d}.npz"  # of an evaluation, by its step


def keep_predictions(folder: Run, predictions: Predictions, split: str, keep_all: bool) -> None:
    """Keep what an evaluation predicted of a split, by its identity, for results that a later start may make.

    Those of older evaluations are kept where `every` one may turn out to be the best.
    """
    with io.BytesIO() as buffer:
        np.savez(
            buffer,
            split=split,
            samples=predictions.samples,
            labels=predictions.labels,
            top=predictions.top,
            scores=predictions.scores,
        )
        write_bytes(folder.folder / PREDICTIONS_FILE.format(folder.step), buffer.getvalue())
    for path in folder.folder.glob(".predictions-*.npz") if not keep_all else ():
        if path.name != PREDICTIONS_FILE.format(folder.step):
            path.unlink()


def load_predictions(folder: Path, step: int, split: str) -> Predictions:
    """What the evaluation of a step predicted; that of others is removed. ExitError where it was of another split."""
    path = folder / PREDICTIONS_FILE.format(step)
    for other in folder.glob(".predictions-*.npz"):
        if other != path:
            other.unlink()
    with np.load(path) as arrays:
        if "split" in arrays and str(arrays["split"]) != split:
            raise ExitError(ExitCode.MISMATCH, f"run={folder}: was judged on other data than data.val holds now")
        return Predictions(arrays["samples"], arrays["labels"], arrays["top"], arrays["scores"])


def export_and_write_results(
    recipe: Recipe,
    folder: Run,
    row: dict[str, Any],
    data: Manifest | TarList,
    val: Manifest | None,
    init_weights: Weights | None,
) -> dict[str, Any]:
    """Export the encoder, and a classifier, from the last checkpoint or the best; write results.json and return it."""
    best = find_best_row(folder.folder, recipe.best)
    if best and (folder.checkpoints / f"step-{best['step']:08d}").is_dir():  # on_save_error=continue may have lost it
        row = best
    weights = checkpoint.trained_weights(folder.checkpoints / f"step-{row['step']:08d}")
    encoder = recipe.encoder.build()
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    )
    descriptions: list[str] = []
    checkpoint.publish(folder.folder / "encoder", lambda draft: descriptions.append(export_encoder(encoder, draft)))
    metrics = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
    results = {
        **metrics,
        **{f"train_{n}": row[n] for n in ("loss", "unigram_entropy") if n in row},
        "step": row["step"],
    }
    if recipe.best:
        results["best"] = {"metric": recipe.best, "step": row["step"], "value": row.get(recipe.best)}
    if isinstance(recipe, Finetune) and val is not None:
        head = PretrainedClassifier(
            weights["head.layers.0.weight"], weights["head.layers.0.bias"], data.classes, recipe.data.eval_crop
        )
        checkpoint.publish(folder.folder / "classifier", lambda draft: export_encoder(encoder, draft, head))
        predictions = load_predictions(folder.folder, row["step"], val.identity)
        results |= measure_predictions(predictions, val, data.classes, recipe.metrics, folder.folder)
        results["digests"] = {
            "data.train": data.identity if isinstance(data, Manifest) else None,
            "data.val": val.identity,
            "init": tensor_digest(init_weights) if init_weights is not None else None,
            "classifier": sha256(folder.folder / "classifier" / "model.safetensors"),
        }
        full_val = None if recipe.data.holdout else val
        if notes := recipe.benchmark.describe_mismatches(data if isinstance(data, Manifest) else None, full_val):
            results["not_the_benchmark"] = notes
    results["protocol"] = describe_protocol(recipe)
    folder.write_results(results)
    if not recipe.quiet:
        summary = {
            name: value for name, value in metrics.items() if name in ("loss", "accuracy", "top1", "top5", "samples")
        }
        text = "".join(
            f", {name} {value:.4f}" if name != "samples" else f" on {value}" for name, value in summary.items()
        )
        print(
            f"{folder.folder}: done, {row['step']} steps{text}; encoder in {folder.folder / 'encoder'}, "
            f"{descriptions[0]}"
        )
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
        "data.holdout": recipe.data.holdout,
        "image_size": recipe.data.image_size,
        **{f"data.{name}": getattr(recipe.data, name) for name in ("crop", "crop_area", "flip", "eval_crop")},
        "data.auto_augment": recipe.data.auto_augment,
        "pool": recipe.encoder.pool,
        "optim": recipe.optim.model_dump(),
        "ema_decay": recipe.ema_decay,
        "best": recipe.best,
        "precision": recipe.precision,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "seed": recipe.seed,
    } | ({"metrics": recipe.metrics.model_dump(mode="json")} if isinstance(recipe, Finetune) else {})


def write_finetune_results(
    recipe: Finetune, folder: Run, finals: Sequence[dict[str, Any]], trials: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The results of a fine-tuning with its sweep and its seeds, as results.json and as a page."""
    results = (
        dict(finals[0]) if len(finals) == 1 else {**protocol.average_results(finals), "samples": finals[0]["samples"]}
    )
    if len(finals) > 1:
        keys = ("top1", "top5", "mean_per_class", "top1_interval", "label_sets", "digests", "step")
        results["seeds"] = [
            {"seed": result["protocol"]["seed"], **{name: result.get(name) for name in keys}} for result in finals
        ]
        results |= {name: finals[0][name] for name in ("not_the_benchmark", "protocol") if name in finals[0]}
    if trials:
        fraction = None if recipe.sweep.val else recipe.sweep.fraction
        results["lr"] = recipe.optim.lr
        results["sweep"] = {"fraction": fraction, "val": recipe.sweep.val, "tried": trials}
    results["command"] = command_line()
    folder.write_results(results)
    page = finetune_page(recipe, folder.folder, results)
    first = folder.folder / f"seed-{recipe.seed}" if recipe.seeds > 1 else folder.folder
    train, val = prepare_data(recipe)
    if isinstance(split := val or train, Manifest):
        step = results.get("step") or results["seeds"][0]["step"]
        add_samples(page, split, recipe.data, load_predictions(first, step, split.identity))
    page.write(folder.folder)
    return results


def write_suite(recipe: Finetune, folder: Run, task_results: dict[str, dict[str, Any]]) -> None:
    """The results of a suite of tasks: its score, the groups', each task's."""
    keys = ("top1", "top1_sd", "top5", "mean_per_class", "samples", "not_the_benchmark", "lr", "digests")
    summaries = {name: {k: v for k, v in result.items() if k in keys} for name, result in task_results.items()}
    results = {
        **protocol.suite_results(recipe.tasks, summaries),
        "protocol": describe_protocol(recipe),
        "command": command_line(),
    }
    folder.write_results(results)
    suite_page(recipe, results).write(folder.folder)
    if not recipe.quiet:
        print(f"{folder.folder}: done, mean of {len(recipe.tasks)} tasks: {results['mean']:.4f}", flush=True)
