"""Is an encoder worth it? Frozen features judged by linear probe, k-NN and few-shot; classifiers judged on a split."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.data import find
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data
from ssl_vit.data.stream import EvaluationStream, Share
from ssl_vit.durable import write_bytes
from ssl_vit.encoders import weights
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.evaluate import features, few_shot, knn, linear, metrics
from ssl_vit.evaluate.accuracy import HeldOut
from ssl_vit.evaluate.features import Features, Name, Split
from ssl_vit.evaluate.few_shot import FewShotConfig
from ssl_vit.evaluate.knn import Knn
from ssl_vit.evaluate.label_sets import read_class_map
from ssl_vit.evaluate.linear import LinearProbe
from ssl_vit.evaluate.metrics import TOP, Metrics, Predictions, check_labels, spread
from ssl_vit.evaluate.report import Page, per_cent, plain
from ssl_vit.evaluate.sweep import Benchmark
from ssl_vit.exits import CANNOT_CREATE, DATA, USAGE, Refusal
from ssl_vit.family import follow_launcher
from ssl_vit.heads.classifier import ClassificationHead
from ssl_vit.model import Batch, Model
from ssl_vit.outcome import command, digest, measure
from ssl_vit.train.distributed import from_main, total
from ssl_vit.train.environment import world
from ssl_vit.train.launch import start
from ssl_vit.train.plugins import Asked

if TYPE_CHECKING:
    from accelerate import Accelerator

LONG = 86_400.0  # seconds that processes wait for the first, which alone fits what is fitted
Method = Literal["knn", "linear", "few_shot", "classifier"]


class Evaluate(Config):
    """Judge an encoder, or a classifier."""

    run: str = Field(default="runs/evaluate", min_length=1, description="output folder")
    encoder: str | None = Field(
        default=None, description="what to judge: a run, an encoder or classifier folder, a weights file, timm:NAME"
    )
    methods: tuple[Method, ...] = Field(
        default=("knn", "linear", "few_shot"), min_length=1, description="knn, linear, few_shot; or classifier"
    )
    random: bool = Field(default=True, description="the same of an untrained encoder of the same shape, beside it")
    compare: tuple[str, ...] = Field(default=(), description="runs whose results to put side by side, and nothing else")
    batch: int = Field(default=256, ge=1, description="images a process takes at once")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of the untrained encoder")
    quiet: bool = Field(default=False, description="no table on the screen")
    data: Data = Data()
    features: Features = Features()
    knn: Knn = Knn()
    linear: LinearProbe = LinearProbe()
    few_shot: FewShotConfig = FewShotConfig()
    metrics: Metrics = Metrics()
    benchmark: Benchmark = Benchmark()


@dataclass
class Bench:
    """What the parts of an evaluation share."""

    recipe: Evaluate
    accelerator: "Accelerator"
    folder: Path
    share: Share
    total: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def run(recipe: Evaluate) -> int:
    """Do what the recipe says; returns the exit code."""
    folder = Path(recipe.run)
    if recipe.compare:
        page = compared(recipe.compare)
        print("\n\n".join(page.parts))
        page.write(made(folder))
        return 0
    if recipe.encoder is None:
        raise Refusal(USAGE, "encoder: it must be given: a run, an encoder folder, a weights file or timm:NAME")
    if "classifier" in recipe.methods and len(recipe.methods) > 1:
        raise Refusal(USAGE, "methods: classifier judges another thing than frozen features; give it alone")
    follow_launcher()
    asked = Asked(recipe.batch * world(), recipe.batch, 1, None, "fp32", False, LONG)
    accelerator = start(asked, "none", folder)
    try:
        from_main(accelerator, lambda: made(folder))
        share = Share(accelerator.process_index, accelerator.num_processes, recipe.batch)
        bench = Bench(recipe, accelerator, folder, share, partial(total, accelerator))
        results, page = classifier(bench) if recipe.methods == ("classifier",) else frozen(bench)
        from_main(accelerator, lambda: tell(bench, results, page))
    finally:
        accelerator.end_training()
    return 0


def made(folder: Path) -> Path:
    """The output folder; raises Refusal(CANNOT_CREATE)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(CANNOT_CREATE, f"run={folder}: {error.strerror}; name another folder") from error
    return folder


def tell(bench: Bench, results: dict[str, Any], page: Page) -> None:
    """Write results.json and the page."""
    results["command"] = command()
    page.section("To repeat it")
    page.code(results["command"])
    write_bytes(bench.folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    page.write(bench.folder)
    if not bench.recipe.quiet:
        print("\n".join(page.parts[0].splitlines()))
        print(f"{bench.folder}: results.json, report.md, report.html", flush=True)


def splits(recipe: Evaluate, wanted: tuple[str, ...]) -> dict[str, Manifest]:
    """The labelled sets `train` and `val`, as far as they are wanted; raises Refusal where one cannot be used."""
    found = {}
    for name in wanted:
        given = getattr(recipe.data, name)
        if given is None:
            raise Refusal(USAGE, f"data.{name}: it must be given: labelled shards or images")
        converted = Path(recipe.run).parent / "shards"
        try:
            found[name] = find.sets(given, name, converted, recipe.data.store, may_convert=world() == 1)
        except Refusal as refusal:
            if recipe.benchmark.get is None or refusal.code != DATA:
                raise
            raise Refusal(DATA, f"{refusal}; {recipe.benchmark.name}: {recipe.benchmark.get}") from refusal
        one = found[name]
        one.check(full=recipe.data.verify)
        if not one.classes:
            raise Refusal(DATA, f"{one.name}: has no classes, and an evaluation needs labels")
        check_labels(one.labels, one.classes, one.name, every=name == "train")
    if len({tuple(one.classes) for one in found.values()}) > 1:
        cure = "convert both in one go, or give both the same class_map"
        raise Refusal(DATA, f"{found['val'].name}: its classes are not those of {found['train'].name}; {cure}")
    return found


def sized(recipe: Evaluate, config: Vit) -> tuple[Vit, Data]:
    """An encoder's config and the data's for the size that was asked for, or else the encoder's own."""
    data = recipe.data
    if "image_size" not in data.model_fields_set:
        data = data.model_copy(update={"image_size": config.image})
    if config.channels != 3:
        raise Refusal(USAGE, f"{recipe.encoder}: takes {config.channels} channels; images are read as RGB, which has 3")
    return config.model_copy(update={"image": data.image_size}), data


def built(recipe: Evaluate, config: Vit) -> VitEncoder:
    """The untrained encoder of a config."""
    torch.manual_seed(recipe.seed)
    try:
        return config.build()
    except ValueError as error:
        raise Refusal(USAGE, f"data.image_size={recipe.data.image_size}: {error}") from error


def frozen(bench: Bench) -> tuple[dict[str, Any], Page]:
    """Linear probe, k-NN and few-shot of the encoder's features and of an untrained one's."""
    recipe, accelerator = bench.recipe, bench.accelerator
    source, tensors = weights.read(str(recipe.encoder))
    config, data = sized(recipe, source)
    sets = from_main(accelerator, lambda: splits(recipe, ("train", "val")))
    encoder = built(recipe, config)
    weights.fill(encoder, source, tensors, str(recipe.encoder))
    who = {"pretrained": encoder} | ({"random": built(recipe, config)} if recipe.random else {})
    rows = []
    for name, one in who.items():
        one = one.to(accelerator.device).eval()
        names = recipe.features.names(one)
        found = {split: computed(bench, one, names, manifest, data) for split, manifest in sets.items()}
        classes = len(sets["train"].classes)
        judge = partial(judged, bench, name, found["train"], found["val"], names, classes)
        rows += from_main(accelerator, judge)
    results: dict[str, Any] = {"encoder": recipe.encoder, "rows": rows, "samples": sets["val"].samples}
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
    return results, page_of(results)


def computed(bench: Bench, encoder: VitEncoder, names: list[Name], manifest: Manifest, data: Data) -> Split:
    """The features of a split, from the cache where they are in it; all processes compute, the first keeps them."""
    recipe, accelerator = bench.recipe, bench.accelerator
    stream = EvaluationStream(manifest, data, bench.share.micro_batch)
    cache = Path(recipe.features.cache or bench.folder / "features")
    folder = cache / features.digest(encoder, names, stream)
    there = from_main(accelerator, lambda: features.load(folder, names) is not None)
    if not there:
        rows = features.extract(encoder, names, stream, bench.share, accelerator.device, bench.total)
        if accelerator.is_main_process:
            features.write(folder, rows, stream.count)
        else:
            for _ in rows:
                pass
        for fault in stream.faults.take():
            print(f"evaluation leaves out sample {fault.sample}: {fault.reason}", flush=True)
        if stream.faults.fatal:
            raise stream.faults.fatal
    split = from_main(accelerator, lambda: None if not accelerator.is_main_process else features.load(folder, names))
    if split is None:
        raise Refusal(DATA, f"{folder}: features that were just written cannot be read")
    return split


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
                raise Refusal(DATA, f"{text}; give few_shot.shots={max(1, least)} or fewer")
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
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {plain(note)}.")
    page.section("Protocol")
    flat = {f"{n}.{k}": v for n, one in results["protocol"].items() if isinstance(one, dict) for k, v in one.items()}
    said = {n: v for n, v in results["protocol"].items() if not isinstance(v, dict)}
    page.values({**said, **flat, **{f"digest of {n}": v for n, v in results["digests"].items()}})
    return page


class Unlabelled(nn.Module):
    """A classifier for images whose labels are of other classes than its own; of those it has, only `only` compete."""

    def __init__(self, model: Model, only: list[int] | None):
        super().__init__()
        self.model, self.only = model, only

    def forward(self, batch: Batch) -> Any:
        """As the model's, without loss."""
        output = self.model({**batch, "label": torch.full_like(batch["label"], -1)})
        if self.only is None:
            return output
        others = torch.full_like(output.logits, -torch.inf)
        others[:, self.only] = output.logits[:, self.only]
        return output._replace(logits=others)


def classifier(bench: Bench) -> tuple[dict[str, Any], Page]:
    """A fine-tuned classifier on data.val: its own classes, label sets, or classes of other names."""
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
    weights.fill(encoder, source.config, source.state_dict(), str(recipe.encoder))
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
        results |= {"classes": len(only)}
    if notes := recipe.benchmark.differs(None, val):
        results["not_the_benchmark"] = notes
    results["digests"] = {"encoder": digest(source.state_dict()), "data.val": val.identity}
    results["protocol"] = {"image_size": list(shape.image_hw), "eval_crop": data.eval_crop, **config.model_dump()}
    return results, classifier_page(recipe, results)


def classifier_page(recipe: Evaluate, results: dict[str, Any]) -> Page:
    """A page of a classifier's scores."""
    page = Page(f"{recipe.encoder} on {recipe.benchmark.name or ', '.join(recipe.data.val or ())}")
    rows = []
    whole = {"classes of the split": results} if "top1" in results else {}
    parts = {name: results[name] for name in ("label_sets", "mapped", "mapped_only") if name in results}
    for name, one in (whole | parts).items():
        rows.append([name, *(per_cent(one.get(n)) for n in ("top1", "top5", "mean_per_class")), one["samples"]])
    page.table(["", "top-1, %", "top-5, %", "mean per class, %", "images"], rows)
    if "top1_interval" in results:
        low, high = results["top1_interval"]
        page.text(f"95 % interval of top-1 by bootstrap over the images: {per_cent(low)} to {per_cent(high)}.")
    if recipe.benchmark.paper:
        page.text(f"The paper reports: {plain(recipe.benchmark.paper)}.")
    for note in results.get("not_the_benchmark", ()):
        page.text(f"**Not the benchmark's data**: {plain(note)}.")
    page.section("Protocol")
    page.values(results["protocol"] | {f"digest of {n}": v for n, v in results["digests"].items()})
    return page


def compared(runs: tuple[str, ...]) -> Page:
    """Runs side by side: a line for each thing that was measured, a column for each run."""
    columns: dict[str, dict[str, str]] = {}
    for name in runs:
        path = Path(name) / "results.json"
        try:
            columns[name] = lines_of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(DATA, f"compare: {path} is not the results of a run ({type(error).__name__})") from error
    page = Page("Runs side by side")
    lines = list(dict.fromkeys(line for column in columns.values() for line in column))
    rows = [[line, *(one.get(line, "-") for one in columns.values())] for line in lines]
    page.table(["%", *map(plain, columns)], rows)
    return page


def lines_of(results: dict[str, Any]) -> dict[str, str]:
    """What a results.json says, as lines of a comparison."""
    found = {}
    for row in results.get("rows", ()):
        who = "" if row["who"] == "pretrained" else f", {row['who']}"
        case = row["case"] if row["method"] == "few_shot" else ""
        name = " ".join(filter(None, [row["method"], case, f"(layer {row['layer']}, {row['readout']}{who})"]))
        found[name] = per_cent(row["top1"], row.get("top1_sd"))
    for name in ("top1", "top5", "mean_per_class", "accuracy", "knn_top1", "mean"):
        if isinstance(results.get(name), float):
            found[name] = per_cent(results[name], results.get(f"{name}_sd"))
    found |= {f"mean of {group}": per_cent(value) for group, value in results.get("groups", {}).items()}
    found |= {task: per_cent(one["top1"]) for task, one in results.get("tasks", {}).items()}
    for name in ("label_sets", "mapped", "mapped_only"):
        found |= {f"{name} {n}": per_cent(results[name][n]) for n in ("top1", "top5") if name in results}
    return found
