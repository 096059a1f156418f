"""Recipes: the parts' configs put together, checked against each other, and run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from ssl_vit import cost
from ssl_vit.data import find
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.sequential import SequentialStream, Tars, tars
from ssl_vit.data.stream import TrainingStream
from ssl_vit.encoders import Encoder, weights
from ssl_vit.encoders.vit import Transformer, Vit
from ssl_vit.evaluate.metrics import Metrics, check_labels
from ssl_vit.evaluate.online import Online
from ssl_vit.evaluate.sweep import Benchmark, SuiteTask, Sweep
from ssl_vit.exits import DATA, USAGE, Refusal
from ssl_vit.gpus import Device
from ssl_vit.heads import Head
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.heads.transfer import Transfer
from ssl_vit.model import Batch, Model
from ssl_vit.train.environment import world
from ssl_vit.train.optim import AdamW, Optim, Sgd
from ssl_vit.train.pace import Loop
from ssl_vit.train.run import SAFE

FOLDER = Path(__file__).parent.parent / "recipes"
PANEL = 8  # images in a picture
FREE_OF_SOURCE = {"image", "pool", "dropout", "drop_path"}  # what a source of weights leaves open


class Train(Loop):
    """What pretraining and fine-tuning share."""

    run: str = Field(default="runs/run", min_length=1, description="output folder (default: runs/RECIPE)")
    dry_run: bool = Field(
        default=False, description="say what a run would do and take, draw its first images, and stop"
    )
    world: int | None = Field(default=None, ge=1, description="with dry_run: GPUs to plan the run for")
    device: Device = Device()
    fresh: bool = Field(
        default=False, description="put aside what the run folder holds and begin anew (a launcher's restart goes on)"
    )
    allow_change: tuple[str, ...] = Field(
        default=(), description=f"keys that may differ from the run's, of: {' '.join(sorted(SAFE))}"
    )
    init: str = Field(
        default="none", description="weights to start from: a run, an encoder folder, a weights file, timm:NAME, none"
    )
    init_share: float = Field(
        default=1.0, gt=0, le=1, description="least share of the encoder's numbers that init has to fill"
    )
    data: Data = Data()
    encoder: Encoder = Vit()

    @field_validator("allow_change")
    @classmethod
    def _is_safe(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SAFE:
                raise ValueError(f"{name} may not change in a run; these may: {' '.join(sorted(SAFE))}")
        return names


class Pretrain(Train):
    """Pretrain an encoder: by masked patch prediction, or supervised with head.kind=classifier."""

    head: Head = MeanColor()
    optim: Optim = AdamW()
    online: Online = Online()


class Finetune(Train):
    """Fine-tune a pretrained encoder to classify images, or train one from scratch with init=none."""

    head: Transfer = Transfer()
    optim: Optim = Sgd()
    sweep: Sweep = Sweep()
    seeds: int = Field(default=1, ge=1, description="final trainings, with seeds from `seed` on; mean and deviation")
    metrics: Metrics = Metrics()
    benchmark: Benchmark = Benchmark()
    tasks: tuple[SuiteTask, ...] = Field(
        default=(), description="data sets under tasks_root to do this with, one by one"
    )
    tasks_root: str | None = Field(default=None, description="folder of the tasks' shards, NAME/train800 and so on")

    @field_validator("tasks", mode="before")
    @classmethod
    def _may_be_none(cls, given: Any) -> Any:
        return () if given == ["none"] else given  # on the command line, to take one data set with a suite's setting


Recipe = Pretrain | Finetune


def resolve(recipe: Recipe) -> tuple[Recipe, weights.Weights | None, Encoder | None]:
    """The recipe with its encoder's config complete, and where `init` names a source, its weights and config.

    A source's architecture is the encoder's; Refusal(USAGE) names encoder keys that contradict it.
    """
    given, source, tensors = recipe.encoder, None, None
    encoder = given.model_copy(update={"image": recipe.data.image_size})
    if "image" in given.model_fields_set and given.image_hw != encoder.image_hw:
        raise Refusal(USAGE, f"encoder.image: leave it out, it follows data.image_size={recipe.data.image_size}")
    if recipe.init != "none":
        source, tensors = weights.read(recipe.init, classifier=kept_head(recipe))
        _agree(given, source, recipe.init)
        chosen = given.model_fields_set & (FREE_OF_SOURCE - {"image"}) & set(type(source).model_fields)
        free = {name: getattr(given, name) for name in chosen}
        encoder = source.model_copy(update={"image": recipe.data.image_size, **free})
    elif kept_head(recipe):
        raise Refusal(USAGE, "head.keep: there is no classifier to keep with init=none")
    if encoder.channels != 3:
        raise Refusal(USAGE, f"encoder.channels={encoder.channels}: images are read as RGB, which has 3")
    if getattr(recipe.optim, "layer_decay", None) is not None and not isinstance(encoder, Transformer):
        raise Refusal(USAGE, f"optim.layer_decay: encoder.kind={encoder.kind} has no plain stack of blocks")
    try:
        with torch.device("meta"):
            recipe.head.build(encoder.build(), classes=1)
    except ValueError as error:
        raise Refusal(
            USAGE, f"encoder.kind={encoder.kind} with data.image_size={recipe.data.image_size}: {error}"
        ) from error
    return recipe.model_copy(update={"encoder": encoder}), tensors, source


def kept_head(recipe: Recipe) -> bool:
    """Whether training goes on from the source's classifier."""
    return getattr(recipe.head, "keep", False)


def _agree(given: Encoder, source: Encoder, name: str) -> None:
    """Refuse encoder keys that were given and say something else than the source of the weights."""
    if given.kind != source.kind and given.model_fields_set - FREE_OF_SOURCE:
        said = f"is {source.title}, and the encoder keys say {given.title}"
        raise Refusal(USAGE, f"init={name} {said}; give encoder.kind={source.kind}, which drops the others")
    said = given.model_fields_set - FREE_OF_SOURCE
    mine, theirs = ({key: getattr(one, key, "none") for key in said} for one in (given, source))
    if isinstance(given, Transformer) and isinstance(source, Transformer):
        numbers = ("width", "depth", "heads", "mlp")  # a size is but their name
        wanted = numbers if mine.pop("size", None) else [key for key in numbers if key in said]
        theirs |= dict(zip(numbers, source.numbers, strict=True))
        mine |= {key: value for key, value in zip(numbers, given.numbers, strict=True) if key in wanted}
    wrong = [key for key, value in sorted(mine.items()) if value != theirs[key]]
    if wrong:
        cure = " ".join(f"encoder.{key}={theirs[key]}" for key in wrong)
        raise Refusal(USAGE, f"init={name} is another encoder than the encoder keys say; give {cure}, or none of them")


def build(
    recipe: Recipe,
    classes: int,
    tensors: weights.Weights | None = None,
    source: Encoder | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """The model of a resolved recipe: weights drawn from its seed, the encoder's from the source where there is one.

    `say` is told what became of the source's tensors.
    """
    torch.manual_seed(recipe.seed)
    encoder = recipe.encoder.build()
    if tensors is not None and source is not None:
        say(str(weights.fill(encoder, source, tensors, recipe.init, recipe.init_share)))
    return Model(encoder, recipe.head.build(encoder, classes))


def sources(recipe: Recipe) -> tuple[Manifest | Tars, Manifest | None]:
    """The training and evaluation data, complete; images are converted first, beside the run."""
    data = recipe.data
    if data.train is None:
        raise Refusal(USAGE, "data.train: it must be given: a folder of shards, or of images")
    if isinstance(recipe, Finetune) and data.val is None and not data.hold_out:
        raise Refusal(USAGE, "data.val: it must be given: fine-tuning is judged on it")
    if data.hold_out and data.reader == "webdataset":
        raise Refusal(USAGE, "data.hold_out: needs shards with a manifest, which data.reader=webdataset does without")
    search = partial(found, recipe)
    train = tars(data.train, data.store) if data.reader == "webdataset" else search(data.train, "train")
    val = search(data.val, "val") if data.val is not None else None
    sound(recipe, train, val)
    if isinstance(train, Tars):
        print(f"{train.name}: read by webdataset: neither exactly once an epoch nor exactly resumable", flush=True)
    if recipe.head.needs_labels:
        _labelled(recipe, train, val)
    return train, val


def found(recipe: Any, paths: tuple[str, ...], split: str) -> Manifest:
    """A set of a recipe or an evaluation, converted first where it is images; raises Refusal.

    Where a benchmark's data is missing, how to get it is said too.
    """
    converted = Path(recipe.run).parent / "shards"
    try:
        return find.sets(paths, split, converted=converted, store=recipe.data.store, may_convert=world() == 1)
    except Refusal as refusal:
        wanted: Benchmark | None = getattr(recipe, "benchmark", None)
        if wanted is None or wanted.get is None or refusal.code != DATA:
            raise
        text = f"{refusal}; {wanted.name or 'its data'}: {wanted.get}"
        raise Refusal(DATA, text, refusal.shared) from refusal


def _labelled(recipe: Recipe, train: Manifest | Tars, val: Manifest | None) -> None:
    """Refuse data that a classifier cannot be trained on, or judged."""
    if not train.classes:
        index = " (tools/index_shards.py finds them)" if isinstance(train, Tars) else ""
        raise Refusal(DATA, f"{train.name}: has no classes{index}, and head.kind={recipe.head.kind} needs labels")
    if val is not None and val.classes != train.classes:
        cure = "convert both in one go, or give both the same class_map"
        raise Refusal(DATA, f"{val.name}: its classes are not those of {train.name}; {cure}")
    if isinstance(train, Manifest):
        check_labels(train.labels, train.classes, train.name, every=not recipe.data.empty_classes)
    if val is not None:
        check_labels(val.labels, val.classes, val.name, every=False)


def probes(recipe: Recipe) -> tuple[Manifest, Manifest] | None:
    """The labelled sets that a pretraining is probed with."""
    if not isinstance(recipe, Pretrain) or (recipe.online.train is None and recipe.online.val is None):
        return None
    if recipe.online.train is None or recipe.online.val is None:
        raise Refusal(USAGE, "online.train and online.val: give both, labelled shards to learn from and to be right on")
    train, val = found(recipe, recipe.online.train, "train"), found(recipe, recipe.online.val, "val")
    sound(recipe, train, val)
    if not train.classes or train.classes != val.classes:
        raise Refusal(DATA, f"{val.name}: online.train and online.val need classes, and the same ones")
    check_labels(train.labels, train.classes, train.name, every=True)
    check_labels(val.labels, val.classes, val.name, every=False)
    return train, val


def sound(recipe: Recipe, *sets: Manifest | Tars | None) -> None:
    """Refuse data of which shards are missing or altered on this machine."""
    for made in sets:
        if isinstance(made, Manifest):
            made.check(full=recipe.data.verify)


def streamed(train: Manifest | Tars, recipe: Recipe) -> TrainingStream | SequentialStream:
    """The training data as a stream."""
    kind = SequentialStream if isinstance(train, Tars) else TrainingStream
    return kind(train, recipe.data, recipe.seed, recipe.batch)  # type: ignore[arg-type]


def first_images(source: Manifest | TrainingStream | SequentialStream, data: Data) -> Batch:
    """The first few images of a split as evaluation sees them; of tars without a manifest, as training does."""
    if isinstance(source, SequentialStream):
        return source.first(PANEL)
    manifest = source.samples.manifest if isinstance(source, TrainingStream) else source
    samples = Samples(manifest, data, seed=0, training=False)
    batch, _ = samples.batch([(0, i) for i in range(min(PANEL, manifest.samples))])
    return {name: value.contiguous() for name, value in batch.items()}


def flops(model: Model) -> int:
    """FLOPs of training on an image, by formula: 105.4e9 of ViT-B/16 with the mean-colour head.

    Of the whole model, also where the last block computes some tokens only, so that figures of others compare.
    """
    return cost.image_flops(model.encoder.config, model.head.macs)
