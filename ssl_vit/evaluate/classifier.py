"""A classifier judged on a split: by its own classes, by label sets, by classes of other names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_vit.convert.sample_names import read_sample_names
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.weights import tensor_digest
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.config import Evaluate, EvaluationContext, load_labeled_splits, untrained_encoder, with_image_size
from ssl_vit.evaluate.evaluators import HeadEvaluator
from ssl_vit.evaluate.label_sets import read_class_map
from ssl_vit.evaluate.metrics import Predictions, measure_predictions
from ssl_vit.evaluate.report_sections import add_caveats, add_confusion, add_samples
from ssl_vit.heads.classifier import ClassificationHead
from ssl_vit.model import Batch, Model
from ssl_vit.report.format import format_percent
from ssl_vit.report.page import Page


class IgnoreLabels(nn.Module):
    """A classifier for images whose labels are of other classes; of its own, only `class_subset` compete."""

    def __init__(self, model: Model, class_subset: list[int] | None):
        super().__init__()
        self.model, self.class_subset = model, class_subset

    def forward(self, batch: Batch) -> Any:
        """As the model's, without loss."""
        output = self.model({**batch, "label": torch.full_like(batch["label"], -1)})
        output = output._replace(weight=batch["valid"].sum())
        if self.class_subset is None:
            return output
        logits = torch.full_like(output.logits, -torch.inf)
        logits[:, self.class_subset] = output.logits[:, self.class_subset]
        return output._replace(logits=logits)


def evaluate_classifier(context: EvaluationContext) -> tuple[dict[str, Any], Callable[[], Page]]:
    """A fine-tuned classifier on data.val: its own classes, label sets, or classes of other names; and a page of it."""
    recipe, processes, config = context.recipe, context.processes, context.recipe.metrics
    source, head = weights.read_classifier(str(recipe.encoder))
    encoder_config, data = with_image_size(recipe, source.config)
    if "eval_crop" not in data.model_fields_set:
        data = data.model_copy(update={"eval_crop": head.crop})
    val = processes.run_on_main(lambda: load_labeled_splits(recipe, ("val",)))["val"]
    if config.class_map is None and not head.has_classes(val.classes):
        hint = "give metrics.class_map=, a JSON of data.val's classes to the classifier's"
        raise ExitError(ExitCode.DATA, f"{val.name}: its classes are not those of {recipe.encoder}; {hint}")
    encoder = untrained_encoder(recipe, encoder_config)
    weights.load_weights(encoder, source.config, export.export_tensors(source), str(recipe.encoder))
    layer = nn.Linear(encoder.width, head.num_classes)
    model = Model(encoder, ClassificationHead(nn.Sequential(layer), "softmax"))
    layer.load_state_dict({"weight": head.weight, "bias": head.bias})
    model.to(processes.device).eval()
    results: dict[str, Any] = {"encoder": recipe.encoder}

    def collect_predictions(model: Any) -> tuple[Predictions, dict[str, float]]:
        collected: list[Predictions] = []
        stream = EvaluationStream(val, data, context.shard.micro_batch)
        report = (lambda *_: {}) if config.class_map else model.head.report
        evaluator = HeadEvaluator(stream, context.shard, processes, report, collected.append)
        with torch.no_grad():
            values = dict(evaluator.run(model))
        return collected[0], values

    if config.class_map is None:
        predictions, values = collect_predictions(model)
        results |= values
        results |= processes.run_on_main(
            lambda: measure_predictions(predictions, val, head.names, config, context.folder)
        )
    else:
        class_map = processes.run_on_main(lambda: read_class_map(str(config.class_map), val.classes, head.names))
        mapped_classes = sorted({class_id for mapped in class_map for class_id in mapped})
        for name, allowed in (("mapped", None), ("mapped_only", mapped_classes)):
            predictions, values = collect_predictions(IgnoreLabels(model, allowed))
            labels = val.labels[predictions.samples]
            predictions = Predictions(predictions.samples, labels.astype(np.int64), predictions.top, predictions.scores)
            results[name] = metrics.accuracy(
                predictions, head.num_classes, [class_map[n] if n >= 0 else [] for n in labels]
            )
            if allowed is None:
                path = context.folder / f"predictions.{config.predictions}"
                write_predictions = partial(
                    metrics.write_predictions, predictions, read_sample_names(val), head.names, path, val.classes
                )
                processes.run_on_main(write_predictions)
        results |= {"classes": len(mapped_classes)}
    if notes := recipe.benchmark.describe_mismatches(None, val):
        results["not_the_benchmark"] = notes
    results["digests"] = {"encoder": tensor_digest(source.state_dict()), "data.val": val.identity}
    results["protocol"] = {
        "image_size": list(encoder_config.image_hw),
        "eval_crop": data.eval_crop,
        **config.model_dump(),
    }

    def build_page() -> Page:
        page = classifier_page(recipe, results)
        if config.class_map is None:
            add_confusion(page, context.folder)
            add_samples(page, val, data, predictions)
        return page

    return results, build_page


def classifier_page(recipe: Evaluate, results: dict[str, Any]) -> Page:
    """A page of a classifier's scores."""
    page = Page(f"{recipe.encoder} on {recipe.benchmark.name or ', '.join(recipe.data.val or ())}")
    rows = []
    split_scores = {"classes of the split": results} if "top1" in results else {}
    variants = {name: results[name] for name in ("label_sets", "mapped", "mapped_only") if name in results}
    for name, scores in (split_scores | variants).items():
        rows.append(
            [name, *(format_percent(scores.get(n)) for n in ("top1", "top5", "mean_per_class")), scores["samples"]]
        )
    page.table(["", "top-1, %", "top-5, %", "mean per class, %", "images"], rows)
    add_caveats(page, results, recipe.benchmark.paper)
    page.section("Protocol")
    page.values(results["protocol"] | {f"digest of {n}": v for n, v in results["digests"].items()})
    return page
