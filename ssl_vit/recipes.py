"""Recipes: the configs of the parts put together and checked against each other; builds nothing."""

from typing import Any

import torch
from pydantic import Field, field_validator

from ssl_vit.data.dataset import Data
from ssl_vit.encoders import Encoder, weights
from ssl_vit.encoders.vit import Transformer, Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate.evaluators import OnlineProbe
from ssl_vit.evaluate.metrics import Metrics
from ssl_vit.evaluate.protocol import Benchmark, SuiteTask, Sweep
from ssl_vit.heads import Head
from ssl_vit.heads.classifier import Transfer
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.train.config import TrainConfig
from ssl_vit.train.hardware import Hardware
from ssl_vit.train.optim import AdamW, Optim, Sgd
from ssl_vit.train.run_folder import ALLOW_LISTED

VISUALIZED_IMAGES = 8  # images in a picture
SOURCE_INDEPENDENT_KEYS = {"image", "pool", "dropout", "drop_path"}  # what a source of weights leaves open


class TrainRecipe(TrainConfig):
    """What pretraining and fine-tuning share."""

    run: str = Field(default="runs/run", min_length=1, description="output folder (default: runs/RECIPE)")
    dry_run: bool = Field(
        default=False, description="say what a run would do and take, draw its first images, and stop"
    )
    world: int | None = Field(default=None, ge=1, description="with dry_run: GPUs to plan the run for")
    hardware: Hardware = Hardware()
    restart: bool = Field(
        default=False, description="put aside what the run folder holds and begin anew (a launcher's restart goes on)"
    )
    allow_recipe_change: tuple[str, ...] = Field(
        default=(), description=f"keys that may differ from the run's, of: {' '.join(sorted(ALLOW_LISTED))}"
    )
    init: str = Field(
        default="none", description="weights to start from: a run, an encoder folder, a weights file, timm:NAME, none"
    )
    init_min_fraction: float = Field(
        default=1.0, gt=0, le=1, description="least share of the encoder's numbers that init has to fill"
    )
    data: Data = Data()
    encoder: Encoder = Vit()

    @field_validator("allow_recipe_change")
    @classmethod
    def _is_safe(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in ALLOW_LISTED:
                raise ValueError(f"{name} may not change in a run; these may: {' '.join(sorted(ALLOW_LISTED))}")
        return names


class Pretrain(TrainRecipe):
    """Pretrain an encoder: by masked patch prediction, or supervised with head.kind=classifier."""

    head: Head = MeanColor()
    optim: Optim = AdamW()
    online: OnlineProbe = OnlineProbe()


class Finetune(TrainRecipe):
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
    def _may_be_none(cls, value: Any) -> Any:
        return () if value == ["none"] else value  # on the command line, to take one data set with a suite's setting


Recipe = Pretrain | Finetune


def resolve_recipe(recipe: Recipe) -> tuple[Recipe, weights.Weights | None, Encoder | None]:
    """The recipe with its encoder's config complete, and where `init` names a source, its weights and config.

    A source's architecture is the encoder's; ExitError(USAGE) names encoder keys that contradict it.
    """
    requested, source, tensors = recipe.encoder, None, None
    encoder = requested.model_copy(update={"image": recipe.data.image_size})
    if "image" in requested.model_fields_set and requested.image_hw != encoder.image_hw:
        raise ExitError(
            ExitCode.USAGE, f"encoder.image: leave it out, it follows data.image_size={recipe.data.image_size}"
        )
    if recipe.init != "none":
        source, tensors = weights.read_source(recipe.init, classifier=keeps_classifier(recipe))
        _check_source_matches(requested, source, recipe.init)
        override_keys = (
            requested.model_fields_set & (SOURCE_INDEPENDENT_KEYS - {"image"}) & set(type(source).model_fields)
        )
        overrides = {name: getattr(requested, name) for name in override_keys}
        encoder = source.model_copy(update={"image": recipe.data.image_size, **overrides})
    elif keeps_classifier(recipe):
        raise ExitError(ExitCode.USAGE, "head.keep: there is no classifier to keep with init=none")
    if encoder.channels != 3:
        raise ExitError(ExitCode.USAGE, f"encoder.channels={encoder.channels}: images are read as RGB, which has 3")
    if getattr(recipe.optim, "layer_decay", None) is not None and not isinstance(encoder, Transformer):
        raise ExitError(ExitCode.USAGE, f"optim.layer_decay: encoder.kind={encoder.kind} has no plain stack of blocks")
    try:
        with torch.device("meta"):
            recipe.head.build(encoder.build(), classes=1)
    except ValueError as error:
        raise ExitError(
            ExitCode.USAGE, f"encoder.kind={encoder.kind} with data.image_size={recipe.data.image_size}: {error}"
        ) from error
    return recipe.model_copy(update={"encoder": encoder}), tensors, source


def keeps_classifier(recipe: Recipe) -> bool:
    """Whether training goes on from the source's classifier."""
    return getattr(recipe.head, "keep", False)


def _check_source_matches(requested: Encoder, source: Encoder, name: str) -> None:
    """Refuse encoder keys that were given and say something else than the source of the weights."""
    if requested.kind != source.kind and requested.model_fields_set - SOURCE_INDEPENDENT_KEYS:
        mismatch = f"is {source.title}, and the encoder keys say {requested.title}"
        raise ExitError(
            ExitCode.USAGE, f"init={name} {mismatch}; give encoder.kind={source.kind}, which drops the others"
        )
    explicit_keys = requested.model_fields_set - SOURCE_INDEPENDENT_KEYS
    requested_values, source_values = (
        {key: getattr(config, key, "none") for key in explicit_keys} for config in (requested, source)
    )
    if isinstance(requested, Transformer) and isinstance(source, Transformer):
        dim_names = ("width", "depth", "heads", "mlp")  # a size is but their name
        compared = (
            dim_names if requested_values.pop("size", None) else [key for key in dim_names if key in explicit_keys]
        )
        source_values |= dict(zip(dim_names, source.dims, strict=True))
        requested_values |= {
            key: value for key, value in zip(dim_names, requested.dims, strict=True) if key in compared
        }
    conflicts = [key for key, value in sorted(requested_values.items()) if value != source_values[key]]
    if conflicts:
        hint = " ".join(f"encoder.{key}={source_values[key]}" for key in conflicts)
        raise ExitError(
            ExitCode.USAGE, f"init={name} is another encoder than the encoder keys say; give {hint}, or none of them"
        )
