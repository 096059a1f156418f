"""From a recipe to what a training needs: model, data, probes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ssl_vit.convert.resolve import resolve_for_recipe
from ssl_vit.data.dataset import Data, SampleDataset
from ssl_vit.data.loader import TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream, TarList, list_tars
from ssl_vit.distributed import Distributed
from ssl_vit.encoders import Encoder, weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.evaluate.metrics import check_labels
from ssl_vit.model import Batch, Model
from ssl_vit.recipes import VISUALIZED_IMAGES, Finetune, Pretrain, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_model(
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
        say(str(weights.load_weights(encoder, source, tensors, recipe.init, recipe.init_min_fraction)))
    return Model(encoder, recipe.head.build(encoder, classes))


def prepare_data(recipe: Recipe) -> tuple[Manifest | TarList, Manifest | None]:
    """The training and evaluation data, complete; images are converted first, beside the run."""
    data = recipe.data
    if data.train is None:
        raise ExitError(ExitCode.USAGE, "data.train: it must be given: a folder of shards, or of images")
    if isinstance(recipe, Finetune) and data.val is None and not data.holdout:
        raise ExitError(ExitCode.USAGE, "data.val: it must be given: fine-tuning is judged on it")
    if data.holdout and data.reader == "webdataset":
        raise ExitError(
            ExitCode.USAGE, "data.holdout: needs shards with a manifest, which data.reader=webdataset does without"
        )
    find_split = partial(resolve_for_recipe, recipe)
    train = list_tars(data.train, data.cache_dir) if data.reader == "webdataset" else find_split(data.train, "train")
    val = find_split(data.val, "val") if data.val is not None else None
    check_shards(recipe, train, val)
    if isinstance(train, TarList):
        print(f"{train.name}: read by webdataset: neither exactly once an epoch nor exactly resumable", flush=True)
    if recipe.head.needs_labels:
        _check_labeled(recipe, train, val)
    return train, val


def _check_labeled(recipe: Recipe, train: Manifest | TarList, val: Manifest | None) -> None:
    """Refuse data that a classifier cannot be trained on, or judged."""
    if not train.classes:
        index = " (tools/index_shards.py finds them)" if isinstance(train, TarList) else ""
        raise ExitError(
            ExitCode.DATA, f"{train.name}: has no classes{index}, and head.kind={recipe.head.kind} needs labels"
        )
    if val is not None and val.classes != train.classes:
        hint = "convert both in one go, or give both the same class_map"
        raise ExitError(ExitCode.DATA, f"{val.name}: its classes are not those of {train.name}; {hint}")
    if isinstance(train, Manifest):
        check_labels(train.labels, train.classes, train.name, require_all=not recipe.data.empty_classes)
    if val is not None:
        check_labels(val.labels, val.classes, val.name, require_all=False)


def prepare_probe_data(recipe: Recipe) -> tuple[Manifest, Manifest] | None:
    """The labeled sets that a pretraining is probed with."""
    if not isinstance(recipe, Pretrain) or (recipe.online.train is None and recipe.online.val is None):
        return None
    if recipe.online.train is None or recipe.online.val is None:
        raise ExitError(
            ExitCode.USAGE, "online.train and online.val: give both, labeled shards to learn from and to be right on"
        )
    train, val = (
        resolve_for_recipe(recipe, recipe.online.train, "train"),
        resolve_for_recipe(recipe, recipe.online.val, "val"),
    )
    check_shards(recipe, train, val)
    if not train.classes or train.classes != val.classes:
        raise ExitError(ExitCode.DATA, f"{val.name}: online.train and online.val need classes, and the same ones")
    check_labels(train.labels, train.classes, train.name, require_all=True)
    check_labels(val.labels, val.classes, val.name, require_all=False)
    return train, val


def check_shards(recipe: Recipe, *sets: Manifest | TarList | None) -> None:
    """Refuse data of which shards are missing or altered on this machine."""
    for data in sets:
        if isinstance(data, Manifest):
            data.check_shards(full=recipe.data.verify)


def make_stream(train: Manifest | TarList, recipe: Recipe) -> TrainingStream | SequentialStream:
    """The training data as a stream."""
    kind = SequentialStream if isinstance(train, TarList) else TrainingStream
    return kind(train, recipe.data, recipe.seed, recipe.batch)  # type: ignore[arg-type]


def first_images(source: Manifest | TrainingStream | SequentialStream, data: Data) -> Batch:
    """The first few images of a split as evaluation sees them; of tars without a manifest, as training does."""
    if isinstance(source, SequentialStream):
        return source.first(VISUALIZED_IMAGES)
    manifest = source.samples.manifest if isinstance(source, TrainingStream) else source
    samples = SampleDataset(manifest, data, seed=0, training=False)
    batch, _ = samples.batch([(0, i) for i in range(min(VISUALIZED_IMAGES, manifest.samples))])
    return {name: value.contiguous() for name, value in batch.items()}


def flops_per_image(model: Model) -> int:
    """FLOPs of training on an image, by formula: 105.4e9 of ViT-B/16 with the mean-color head.

    Of the whole model, also where the last block computes some tokens only, so that figures of others compare.
    """
    return cost.image_flops(model.encoder.config, model.head.forward_macs)


@dataclass
class Session:
    """What all trainings of a start share."""

    accelerator: "Accelerator"
    processes: Distributed
    tensors: weights.Weights | None
    source: Encoder | None
    introduced: bool = False  # what is trained was told, of the first of several trainings
