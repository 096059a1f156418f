"""TODO"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from ssl_vit.data.dataset import Data
from ssl_vit.encoders import Encoder, weights
from ssl_vit.encoders.vit import Transformer, Vit
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.evaluate.evaluators import Online
from ssl_vit.evaluate.metrics import Metrics
from ssl_vit.evaluate.protocol import Benchmark, SuiteTask, Sweep
from ssl_vit.heads import Head
from ssl_vit.heads.classifier import Transfer
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.train.config import Loop
from ssl_vit.train.hardware import Device
from ssl_vit.train.optim import AdamW, Optim, Sgd
from ssl_vit.train.run_folder import SAFE

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
