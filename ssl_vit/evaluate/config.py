"""What an evaluation is asked for, and what its parts share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.convert.resolve import resolve_for_recipe
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import ProcessShard
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import Distributed
from ssl_vit.encoders import Encoder
from ssl_vit.encoders.weights import AnyEncoder
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.features import Features
from ssl_vit.evaluate.few_shot import FewShotConfig
from ssl_vit.evaluate.knn import Knn
from ssl_vit.evaluate.linear import LinearProbe
from ssl_vit.evaluate.metrics import Metrics, check_labels
from ssl_vit.evaluate.protocol import Benchmark

TIMEOUT_SECONDS = 86_400.0  # seconds that processes wait for the first, which alone fits what is fitted
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
class EvaluationContext:
    """What the parts of an evaluation share."""

    recipe: Evaluate
    processes: Distributed
    folder: Path
    shard: ProcessShard


def load_labeled_splits(recipe: Evaluate, names: tuple[str, ...]) -> dict[str, Manifest]:
    """The labeled sets `train` and `val`, as far as they are wanted; raises ExitError where one cannot be used."""
    manifests: dict[str, Manifest] = {}
    for name in names:
        source = getattr(recipe.data, name)
        if source is None:
            raise ExitError(ExitCode.USAGE, f"data.{name}: it must be given: labeled shards or images")
        manifest = manifests[name] = resolve_for_recipe(recipe, source, name)
        manifest.check_shards(full=recipe.data.verify)
        if not manifest.classes:
            raise ExitError(ExitCode.DATA, f"{manifest.name}: has no classes, and an evaluation needs labels")
        check_labels(
            manifest.labels,
            manifest.classes,
            manifest.name,
            require_all=name == "train" and not recipe.data.empty_classes,
        )
    if len({tuple(manifest.classes) for manifest in manifests.values()}) > 1:
        hint = "convert both in one go, or give both the same class_map"
        raise ExitError(
            ExitCode.DATA, f"{manifests['val'].name}: its classes are not those of {manifests['train'].name}; {hint}"
        )
    return manifests


def with_image_size(recipe: Evaluate, config: Encoder) -> tuple[Encoder, Data]:
    """An encoder's config and the data's for the size that was asked for, or else the encoder's own."""
    data = recipe.data
    if "image_size" not in data.model_fields_set:
        data = data.model_copy(update={"image_size": config.image})
    if config.channels != 3:
        raise ExitError(
            ExitCode.USAGE, f"{recipe.encoder}: takes {config.channels} channels; images are read as RGB, which has 3"
        )
    return config.model_copy(update={"image": data.image_size}), data


def untrained_encoder(recipe: Evaluate, config: Encoder) -> AnyEncoder:
    """The untrained encoder of a config."""
    torch.manual_seed(recipe.seed)
    try:
        return config.build()
    except ValueError as error:
        raise ExitError(ExitCode.USAGE, f"data.image_size={recipe.data.image_size}: {error}") from error
