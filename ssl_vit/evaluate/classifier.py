"""A classifier judged on a split: by its own classes, by label sets, by classes of other names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_vit.convert.sample_names import names
from ssl_vit.data.loader import EvaluationStream
from ssl_vit.distributed import from_main
from ssl_vit.encoders import export, weights
from ssl_vit.encoders.weights import digest
from ssl_vit.errors import DATA, Refusal
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.config import Bench, Evaluate, built, sized, splits
from ssl_vit.evaluate.evaluators import HeldOut
from ssl_vit.evaluate.label_sets import read_class_map
from ssl_vit.evaluate.metrics import Predictions, measure
from ssl_vit.evaluate.report_sections import confusion, remarks, samples
from ssl_vit.heads.classifier import ClassificationHead
from ssl_vit.model import Batch, Model
from ssl_vit.report.format import per_cent
from ssl_vit.report.page import Page


class Unlabelled(nn.Module):
    """A classifier for images whose labels are of other classes than its own; of those it has, only `only` compete."""

    def __init__(self, model: Model, only: list[int] | None):
        super().__init__()
        self.model, self.only = model, only

    def forward(self, batch: Batch) -> Any:
        """As the model's, without loss."""
        output = self.model({**batch, "label": torch.full_like(batch["label"], -1)})
        output = output._replace(weight=batch["valid"].sum())
        if self.only is None:
            return output
        others = torch.full_like(output.logits, -torch.inf)
        others[:, self.only] = output.logits[:, self.only]
        return output._replace(logits=others)


def classifier(bench: Bench) -> tuple[dict[str, Any], Callable[[], Page]]:
    """A fine-tuned classifier on data.val: its own classes, label sets, or classes of other names; and a page of it."""
    recipe, accelerator, config = bench.recipe, bench.accelerator, bench.recipe.metrics
    source, head = weights.read_classifier(str(recipe.encoder))
    shape, data = sized(recipe, source.config)
    if "eval_crop" not in data.model_fields_set:
        data = data.model_copy(update={"eval_crop": head.crop})
    val = from_main(accelerator, lambda: splits(recipe, ("val",)))["val"]
    if config.class_map is None and not head.is_for(val.classes):
        cure = "give metrics.class_map=, a JSON of data.val's classes to the classifier's"
        raise Refusal(DATA, f"{val.name}: its classes are not those of {recipe.encoder}; {cure}")
    encoder = built(recipe, shape)
    weights.fill(encoder, source.config, export.tensors(source), str(recipe.encoder))
    layer = nn.Linear(encoder.width, head.count)
    model = Model(encoder, ClassificationHead(nn.Sequential(layer), "softmax"))
    layer.load_state_dict({"weight": head.weight, "bias": head.bias})
    model.to(accelerator.device).eval()
    results: dict[str, Any] = {"encoder": recipe.encoder}

    def predicted(model: nn.Module) -> tuple[Predictions, dict[str, float]]:
        kept: list[Predictions] = []
        stream = EvaluationStream(val, data, bench.share.micro_batch)
        report = (lambda *_: {}) if config.class_map else model.head.report  # type: ignore[union-attr]
        judge = HeldOut(stream, bench.share, accelerator.device, bench.total, report, kept.append)  # type: ignore[arg-type]
        with torch.no_grad():
            values = dict(judge.run(model))
        return kept[0], values

    if config.class_map is None:
        found, values = predicted(model)
        results |= values
        results |= from_main(accelerator, lambda: measure(found, val, head.names, config, bench.folder))
    else:
        right = from_main(accelerator, lambda: read_class_map(str(config.class_map), val.classes, head.names))
        only = sorted({number for one in right for number in one})
        for name, columns in (("mapped", None), ("mapped_only", only)):
            found, values = predicted(Unlabelled(model, columns))
            labels = val.labels[found.samples]
            found = Predictions(found.samples, labels.astype(np.int64), found.top, found.scores)
            results[name] = metrics.accuracy(found, head.count, [right[n] if n >= 0 else [] for n in labels])
            if columns is None:
                path = bench.folder / f"predictions.{config.predictions}"
                write = partial(metrics.write_predictions, found, names(val), head.names, path, val.classes)
                from_main(accelerator, write)
        results |= {"classes": len(only)}
    if notes := recipe.benchmark.differs(None, val):
        results["not_the_benchmark"] = notes
    results["digests"] = {"encoder": digest(source.state_dict()), "data.val": val.identity}
    results["protocol"] = {"image_size": list(shape.image_hw), "eval_crop": data.eval_crop, **config.model_dump()}

    def page() -> Page:
        made = classifier_page(recipe, results)
        if config.class_map is None:
            confusion(made, bench.folder)
            samples(made, val, data, found)
        return made

    return results, page


def classifier_page(recipe: Evaluate, results: dict[str, Any]) -> Page:
    """A page of a classifier's scores."""
    page = Page(f"{recipe.encoder} on {recipe.benchmark.name or ', '.join(recipe.data.val or ())}")
    rows = []
    whole = {"classes of the split": results} if "top1" in results else {}
    parts = {name: results[name] for name in ("label_sets", "mapped", "mapped_only") if name in results}
    for name, one in (whole | parts).items():
        rows.append([name, *(per_cent(one.get(n)) for n in ("top1", "top5", "mean_per_class")), one["samples"]])
    page.table(["", "top-1, %", "top-5, %", "mean per class, %", "images"], rows)
    remarks(page, results, recipe.benchmark.paper)
    page.section("Protocol")
    page.values(results["protocol"] | {f"digest of {n}": v for n, v in results["digests"].items()})
    return page
