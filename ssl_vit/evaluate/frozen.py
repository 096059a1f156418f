"""Frozen features, judged: linear probe, k-NN and few-shot, beside those of an untrained encoder."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.dataset import Data, printable
from ssl_vit.data.loader import EvaluationStream, split_holdout
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import Distributed, raise_first
from ssl_vit.encoders import weights
from ssl_vit.encoders.weights import tensor_digest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import features, few_shot, knn, linear, metrics
from ssl_vit.evaluate.config import Evaluate, EvaluationContext, load_labeled_splits, untrained_encoder, with_image_size
from ssl_vit.evaluate.features import FeatureName, Split
from ssl_vit.evaluate.metrics import TOP_K, Predictions, mean_std
from ssl_vit.evaluate.report_sections import add_caveats, flatten_protocol
from ssl_vit.files import ensure_dir
from ssl_vit.report.format import format_percent
from ssl_vit.report.page import Page, plot_curves

EMPTY_SPLIT = Split({}, np.empty(0, np.int64))  # what processes have that judge nothing


def evaluate_frozen(context: EvaluationContext) -> tuple[dict[str, Any], Callable[[], Page]]:
    """Linear probe, k-NN and few-shot of the encoder's features and of an untrained one's; and a page of it."""
    recipe, processes = context.recipe, context.processes
    source_config, tensors = weights.read_source(str(recipe.encoder))
    config, data = with_image_size(recipe, source_config)
    manifests = processes.run_on_main(lambda: load_labeled_splits(recipe, ("train", "val")))
    encoder = untrained_encoder(recipe, config)
    weights.load_weights(encoder, source_config, tensors, str(recipe.encoder))
    encoders = {"pretrained": encoder} | ({"random": untrained_encoder(recipe, config)} if recipe.random else {})
    rows, split_features = [], {}
    for name, model in encoders.items():
        model = model.to(processes.device).eval()
        names = recipe.features.names(model)
        split_features = {
            split: cached_features(context, model, names, split, manifest, data)
            for split, manifest in manifests.items()
        }
        classes = len(manifests["train"].classes)
        score = partial(score_features, context, name, split_features["train"], split_features["val"], names, classes)
        rows += processes.run_on_main(score)
    results: dict[str, Any] = {"encoder": recipe.encoder, "rows": rows}
    results["samples"] = int((split_features["val"].labels >= 0).sum())
    results["bad_samples"] = {split: values.bad_samples for split, values in split_features.items()}
    results["classes"] = manifests["val"].classes
    results["digests"] = {
        "encoder": tensor_digest(tensors),
        **{f"data.{split}": manifest.identity for split, manifest in manifests.items()},
    }
    if mismatches := recipe.benchmark.describe_mismatches(manifests["train"], manifests["val"]):
        results["not_the_benchmark"] = mismatches
    results["protocol"] = {
        "image_size": list(config.image_hw),
        "eval_crop": data.eval_crop,
        **{name: getattr(recipe, name).model_dump() for name in ("knn", "linear", "few_shot")},
        "seed": recipe.seed,
    }
    return results, partial(build_page, results)


def cached_features(
    context: EvaluationContext,
    encoder: weights.AnyEncoder,
    names: list[FeatureName],
    split: str,
    manifest: Manifest,
    data: Data,
) -> Split:
    """The features of a split, from the cache where they are in it; all processes compute, the first keeps them."""
    recipe, processes = context.recipe, context.processes
    ids = split_holdout(manifest.samples, data)[0] if split == "train" and data.subset < 1 else None
    stream = EvaluationStream(manifest, data, context.shard.micro_batch, ids)
    cache = Path(recipe.features.cache or context.folder / "features")
    processes.run_on_main(lambda: ensure_dir(cache, "features.cache"))
    folder = cache / features.features_digest(encoder, names, stream)

    split_features: Split | None = EMPTY_SPLIT

    def load_cached() -> bool:
        nonlocal split_features
        split_features = features.load_features(folder, names)
        return (
            split_features is not None and not split_features.bad_samples
        )  # what could not be read may have been mended

    with features.exclusive(folder) if processes.is_main else nullcontext():
        if not processes.run_on_main(load_cached):
            parts = features.extract_features(encoder, names, stream, context.shard, processes)
            report_faults = partial(_report_faults, processes, stream)
            if processes.is_main:
                features.write_features(folder, parts, stream.count, report_faults)
                split_features = features.load_features(folder, names)
            else:
                for _ in parts:
                    pass
                report_faults()
    if split_features is None:
        raise ExitError(ExitCode.DATA, f"{folder}: features that were just written cannot be read")
    return split_features


def _report_faults(processes: Distributed, stream: EvaluationStream) -> None:
    """Say what could not be read; where a source stayed away from any process, all end."""
    for fault in stream.faults.drain():
        print(f"evaluation leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
    fatal = stream.faults.fatal
    raise_first(processes.all_gather((fatal.code, fatal.message) if fatal else None))


def score_features(
    context: EvaluationContext, encoder_name: str, train: Split, val: Split, names: list[FeatureName], classes: int
) -> list[dict[str, Any]]:
    """A row for every method, layer and read-out."""
    recipe, device, rows = context.recipe, context.processes.device, []
    for name in names:
        train_features, train_labels = _labeled_tensors(train, name, device)
        test_features, test_labels = _labeled_tensors(val, name, device)
        if not len(train_features) or not len(test_features):
            raise ExitError(
                ExitCode.DATA, f"{recipe.data.train} and {recipe.data.val}: no labeled image that can be read"
            )
        for case, values in _evaluate_methods(
            recipe, train_features, train_labels, test_features, test_labels, classes
        ):
            rows.append({"who": encoder_name, "layer": name[0], "readout": name[1], **case, **values})
            if not recipe.quiet:
                text = f"{encoder_name}, layer {name[0]}, {name[1]}, {' '.join(map(str, case.values()))}"
                print(f"{text}: top-1 {format_percent(values['top1'], values.get('top1_sd'))} %", flush=True)
    return rows


def _labeled_tensors(split: Split, name: FeatureName, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and class numbers of the labeled images, whole in memory."""
    labeled = np.flatnonzero(split.labels >= 0)
    array = split.features[name]
    selected = np.array(array) if len(labeled) == len(array) else array[labeled]
    return torch.from_numpy(selected).to(device), torch.from_numpy(split.labels[labeled]).to(device)


def _evaluate_methods(
    recipe: Evaluate, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What each method measures, with what names it."""
    num_nonfinite = int((~train.isfinite().all(1)).sum() + (~test.isfinite().all(1)).sum())
    if num_nonfinite:
        text = f"the features of {num_nonfinite} images are not finite numbers; its weights are bad"
        raise ExitError(ExitCode.DATA, f"{recipe.encoder}: {text}")
    targets = test_labels.cpu().numpy()
    if "knn" in recipe.methods:
        votes = knn.knn_scores(train, train_labels, test, classes, recipe.knn.k, recipe.knn.temperature)
        yield {"method": "knn", "case": f"k={recipe.knn.k}"}, _score_metrics(recipe, votes, targets, classes)
    if "linear" in recipe.methods:
        classifier, best_value = linear.fit_probe(train, train_labels, classes, recipe.linear)
        parameter = "l2" if recipe.linear.solver == "lbfgs" else "lr"
        yield (
            {"method": "linear", "case": f"{parameter}={best_value:g}"},
            _score_metrics(recipe, classifier.scores(test), targets, classes),
        )
    if "few_shot" in recipe.methods:
        accuracies = few_shot.few_shot_accuracies(train, train_labels, test, test_labels, classes, recipe.few_shot)
        skipped = [shots for shots in recipe.few_shot.shots if shots not in accuracies]
        if skipped:
            smallest = int(torch.bincount(train_labels, minlength=classes).min())
            text = f"few_shot.shots: the smallest class has {smallest} images"
            if not accuracies:
                hint = f"give few_shot.shots={smallest} or fewer" if smallest else "leave few_shot out of methods"
                raise ExitError(ExitCode.DATA, f"{text}; {hint}")
            print(f"{text}: left out {', '.join(map(str, skipped))}", flush=True)
        for shots, values in accuracies.items():
            mean, deviation = mean_std(values)
            extra = {} if deviation is None else {"top1_sd": deviation}
            yield {"method": "few_shot", "case": f"shots={shots}"}, {"top1": mean, **extra, "draws": values}


def _score_metrics(recipe: Evaluate, scores: Tensor, labels: np.ndarray, classes: int) -> dict[str, Any]:
    top_scores, top_classes = scores.float().topk(min(TOP_K, classes))
    predictions = Predictions(np.arange(len(labels)), labels, top_classes.cpu().numpy(), top_scores.cpu().numpy())
    values: dict[str, Any] = metrics.accuracy(predictions, classes)
    correct = metrics.is_correct(predictions.top[:, :1], labels)
    return {**values, "top1_interval": metrics.bootstrap_interval(correct, resamples=recipe.metrics.bootstrap)}


COLUMNS = ["encoder", "layer", "read-out", "method", "setting", "top-1, %", "95 % interval", "top-5, %"]


def build_page(results: dict[str, Any]) -> Page:
    """A page of the frozen features' scores."""
    page = Page(f"Frozen features of {results['encoder']}")
    rows = []
    for row in results["rows"]:
        low, high = row.get("top1_interval") or (None, None)
        interval = "" if low is None else f"{format_percent(low)} to {format_percent(high)}"
        cells = [row["who"], row["layer"], row["readout"], row["method"], row["case"]]
        rows.append(
            [*cells, format_percent(row["top1"], row.get("top1_sd")), interval, format_percent(row.get("top5"))]
        )
    page.table(COLUMNS, rows)
    page.text("± is the deviation over draws of the images to learn from; the interval a bootstrap over test images.")
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in (row for row in results["rows"] if row["method"] == "few_shot"):
        shots, values = lines.setdefault(f"{row['who']}, {row['readout']}, {row['layer']}", ([], []))
        shots.append(int(row["case"].removeprefix("shots=")))
        values.append(100 * row["top1"])
    if lines:
        page.picture("few_shot", "few-shot by images a class", plot_curves(lines, "images a class", "top-1, %"))
    add_caveats(page, results)
    page.section("Protocol")
    digests = {f"digest of {name}": value for name, value in results["digests"].items()}
    page.values(flatten_protocol(results["protocol"]) | digests)
    return page
