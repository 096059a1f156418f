"""Frozen features, judged: linear probe, k-NN and few-shot, beside those of an untrained encoder."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssl_vit.data.dataset import Data, printable
from ssl_vit.data.loader import EvaluationStream, parts
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import everyone, from_main, refuse_first
from ssl_vit.encoders import weights
from ssl_vit.encoders.weights import digest
from ssl_vit.errors import DATA, Refusal
from ssl_vit.evaluate import features, few_shot, knn, linear, metrics
from ssl_vit.evaluate.config import Bench, Evaluate, built, sized, splits
from ssl_vit.evaluate.features import Name, Split
from ssl_vit.evaluate.metrics import TOP, Predictions, spread
from ssl_vit.evaluate.report_sections import flat, remarks
from ssl_vit.files import made
from ssl_vit.report.format import per_cent
from ssl_vit.report.page import Page, curves

if TYPE_CHECKING:
    from accelerate import Accelerator

NOWHERE = Split({}, np.empty(0, np.int64))  # what processes have that judge nothing


def frozen(bench: Bench) -> tuple[dict[str, Any], Callable[[], Page]]:
    """Linear probe, k-NN and few-shot of the encoder's features and of an untrained one's; and a page of it."""
    recipe, accelerator = bench.recipe, bench.accelerator
    source, tensors = weights.read(str(recipe.encoder))
    config, data = sized(recipe, source)
    sets = from_main(accelerator, lambda: splits(recipe, ("train", "val")))
    encoder = built(recipe, config)
    weights.fill(encoder, source, tensors, str(recipe.encoder))
    who = {"pretrained": encoder} | ({"random": built(recipe, config)} if recipe.random else {})
    rows, found = [], {}
    for name, one in who.items():
        one = one.to(accelerator.device).eval()
        names = recipe.features.names(one)
        found = {split: computed(bench, one, names, split, manifest, data) for split, manifest in sets.items()}
        classes = len(sets["train"].classes)
        judge = partial(judged, bench, name, found["train"], found["val"], names, classes)
        rows += from_main(accelerator, judge)
    results: dict[str, Any] = {"encoder": recipe.encoder, "rows": rows}
    results["samples"] = int((found["val"].labels >= 0).sum())
    results["bad_samples"] = {split: one.bad_samples for split, one in found.items()}
    results["classes"] = sets["val"].classes
    results["digests"] = {
        "encoder": digest(tensors),
        **{f"data.{split}": manifest.identity for split, manifest in sets.items()},
    }
    if notes := recipe.benchmark.differs(sets["train"], sets["val"]):
        results["not_the_benchmark"] = notes
    results["protocol"] = {
        "image_size": list(config.image_hw),
        "eval_crop": data.eval_crop,
        **{name: getattr(recipe, name).model_dump() for name in ("knn", "linear", "few_shot")},
        "seed": recipe.seed,
    }
    return results, partial(page_of, results)


def computed(
    bench: Bench, encoder: weights.AnyEncoder, names: list[Name], split: str, manifest: Manifest, data: Data
) -> Split:
    """The features of a split, from the cache where they are in it; all processes compute, the first keeps them."""
    recipe, accelerator = bench.recipe, bench.accelerator
    some = parts(manifest.samples, data)[0] if split == "train" and data.subset < 1 else None
    stream = EvaluationStream(manifest, data, bench.share.micro_batch, some)
    cache = Path(recipe.features.cache or bench.folder / "features")
    from_main(accelerator, lambda: made(cache, "features.cache"))
    folder = cache / features.digest(encoder, names, stream)

    found: Split | None = NOWHERE

    def usable() -> bool:
        nonlocal found
        found = features.load(folder, names)
        return found is not None and not found.bad_samples  # what could not be read may have been mended

    with features.alone(folder) if accelerator.is_main_process else nullcontext():
        if not from_main(accelerator, usable):
            rows = features.extract(encoder, names, stream, bench.share, accelerator.device, bench.total)
            sound = partial(_sound, accelerator, stream)
            if accelerator.is_main_process:
                features.write(folder, rows, stream.count, sound)
                found = features.load(folder, names)
            else:
                for _ in rows:
                    pass
                sound()
    if found is None:
        raise Refusal(DATA, f"{folder}: features that were just written cannot be read")
    return found


def _sound(accelerator: "Accelerator", stream: EvaluationStream) -> None:
    """Say what could not be read; where a source stayed away from any process, all end."""
    for fault in stream.faults.take():
        print(f"evaluation leaves out sample {fault.sample}: {printable(fault.reason)}", flush=True)
    fatal = stream.faults.fatal
    refuse_first(everyone(accelerator, (fatal.code, fatal.message) if fatal else None))


def judged(bench: Bench, who: str, train: Split, val: Split, names: list[Name], classes: int) -> list[dict[str, Any]]:
    """A row for every method, layer and read-out."""
    recipe, device, rows = bench.recipe, bench.accelerator.device, []
    for name in names:
        learn, labels = _tensors(train, name, device)
        test, truth = _tensors(val, name, device)
        if not len(learn) or not len(test):
            raise Refusal(DATA, f"{recipe.data.train} and {recipe.data.val}: no labelled image that can be read")
        for case, values in _methods(recipe, learn, labels, test, truth, classes):
            rows.append({"who": who, "layer": name[0], "readout": name[1], **case, **values})
            if not recipe.quiet:
                text = f"{who}, layer {name[0]}, {name[1]}, {' '.join(map(str, case.values()))}"
                print(f"{text}: top-1 {per_cent(values['top1'], values.get('top1_sd'))} %", flush=True)
    return rows


def _tensors(split: Split, name: Name, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features and class numbers of the labelled images, whole in memory."""
    known = np.flatnonzero(split.labels >= 0)
    array = split.features[name]
    chosen = np.array(array) if len(known) == len(array) else array[known]
    return torch.from_numpy(chosen).to(device), torch.from_numpy(split.labels[known]).to(device)


def _methods(
    recipe: Evaluate, train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, classes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What each method measures, with what names it."""
    bad = int((~train.isfinite().all(1)).sum() + (~test.isfinite().all(1)).sum())
    if bad:
        text = f"the features of {bad} images are not finite numbers; its weights are bad"
        raise Refusal(DATA, f"{recipe.encoder}: {text}")
    right = truth.cpu().numpy()
    if "knn" in recipe.methods:
        votes = knn.scores(train, labels, test, classes, recipe.knn.k, recipe.knn.temperature)
        yield {"method": "knn", "case": f"k={recipe.knn.k}"}, _values(recipe, votes, right, classes)
    if "linear" in recipe.methods:
        made, chosen = linear.probe(train, labels, classes, recipe.linear)
        what = "l2" if recipe.linear.solver == "lbfgs" else "lr"
        yield {"method": "linear", "case": f"{what}={chosen:g}"}, _values(recipe, made.scores(test), right, classes)
    if "few_shot" in recipe.methods:
        found = few_shot.accuracies(train, labels, test, truth, classes, recipe.few_shot)
        left_out = [shots for shots in recipe.few_shot.shots if shots not in found]
        if left_out:
            least = int(torch.bincount(labels, minlength=classes).min())
            text = f"few_shot.shots: the smallest class has {least} images"
            if not found:
                cure = f"give few_shot.shots={least} or fewer" if least else "leave few_shot out of methods"
                raise Refusal(DATA, f"{text}; {cure}")
            print(f"{text}: left out {', '.join(map(str, left_out))}", flush=True)
        for shots, values in found.items():
            mean, deviation = spread(values)
            more = {} if deviation is None else {"top1_sd": deviation}
            yield {"method": "few_shot", "case": f"shots={shots}"}, {"top1": mean, **more, "draws": values}


def _values(recipe: Evaluate, scores: Tensor, truth: np.ndarray, classes: int) -> dict[str, Any]:
    best, top = scores.float().topk(min(TOP, classes))
    found = Predictions(np.arange(len(truth)), truth, top.cpu().numpy(), best.cpu().numpy())
    values: dict[str, Any] = metrics.accuracy(found, classes)
    right = metrics.hits(found.top[:, :1], truth)
    return {**values, "top1_interval": metrics.interval(right, resamples=recipe.metrics.bootstrap)}


COLUMNS = ["encoder", "layer", "read-out", "method", "setting", "top-1, %", "95 % interval", "top-5, %"]


def page_of(results: dict[str, Any]) -> Page:
    """A page of the frozen features' scores."""
    page = Page(f"Frozen features of {results['encoder']}")
    rows = []
    for row in results["rows"]:
        low, high = row.get("top1_interval") or (None, None)
        interval = "" if low is None else f"{per_cent(low)} to {per_cent(high)}"
        where = [row["who"], row["layer"], row["readout"], row["method"], row["case"]]
        rows.append([*where, per_cent(row["top1"], row.get("top1_sd")), interval, per_cent(row.get("top5"))])
    page.table(COLUMNS, rows)
    page.text("± is the deviation over draws of the images to learn from; the interval a bootstrap over test images.")
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in (row for row in results["rows"] if row["method"] == "few_shot"):
        at, values = lines.setdefault(f"{row['who']}, {row['readout']}, {row['layer']}", ([], []))
        at.append(int(row["case"].removeprefix("shots=")))
        values.append(100 * row["top1"])
    if lines:
        page.picture("few_shot", "few-shot by images a class", curves(lines, "images a class", "top-1, %"))
    remarks(page, results)
    page.section("Protocol")
    digests = {f"digest of {name}": value for name, value in results["digests"].items()}
    page.values(flat(results["protocol"]) | digests)
    return page
