"""What a run will take, in numbers: length, memory by part, disk, hours."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_vit import cost
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.sequential import SequentialStream, Tars
from ssl_vit.data.stream import Share, TrainingStream
from ssl_vit.gpus import Device
from ssl_vit.model import Model, count_parameters
from ssl_vit.scaling import GB, HOST, USABLE
from ssl_vit.traced import activations

if TYPE_CHECKING:
    from ssl_vit.recipe import Recipe

Numbers = dict[str, Any]
SHOWN = ("H200", "H100", "A100", "L40S", "RTX 4090")  # beside the one that was asked for
HEADER = 100  # bytes of a file for each tensor beside its name: measured
SAID = 8000  # bytes of a checkpoint's JSON and of the sums of its window: measured


def trainings(recipe: "Recipe") -> int:
    """How many trainings a recipe is made of: those of a sweep, and the final ones."""
    sweep: Any = getattr(recipe, "sweep", None)
    return len(sweep.lr) + getattr(recipe, "seeds", 1) if sweep is not None else 1


def length(recipe: "Recipe", stream: TrainingStream | SequentialStream) -> Numbers:
    """Steps, samples and epochs of one training."""
    made: Numbers = {"steps": recipe.steps, "batch": recipe.batch, "samples": recipe.steps * recipe.batch}
    if isinstance(stream, TrainingStream):
        made |= {"epochs": made["samples"] / stream.epoch_samples, "epoch_samples": stream.epoch_samples}
    return made | {"trainings": trainings(recipe)}


def contents(made: Manifest | Tars) -> Numbers:
    """What a set holds, as far as it is known."""
    if isinstance(made, Tars):
        return {"name": made.name}
    size = sum(shard.bytes for shard in made.shards)
    counts = {"samples": made.samples, "classes": len(made.classes), "shards": len(made.shards)}
    return {"name": made.name, **counts, "bytes": size}


def memory(recipe: "Recipe", model: Model, classes: int, images: int, device: str, bf16: bool) -> dict[str, int]:
    """Bytes of a process that holds the whole model, in a step of so many images at once, by part; eager."""

    def build() -> Model:
        encoder: Any = recipe.encoder.build()
        encoder.activation_checkpointing = recipe.activation_checkpointing
        if recipe.precision == "bf16_residual":
            encoder.residual = torch.bfloat16
        return Model(encoder, recipe.head.build(encoder, classes))

    parts = cost.held(model, recipe.optim.state)
    if recipe.average is not None:
        parts["average"] = sum(parameter.nbytes for parameter in model.parameters())
    kept, again = activations(build, (images, *recipe.data.image_hw), device, bf16)
    parts |= {"activations": kept} | ({"computed again": again} if again else {})
    return parts | {"sum": sum(parts.values())}


def at_once(parts: dict[str, int], images: int, share: int, room: float) -> int:
    """The most images at once that divide a process's share and fit into `room` bytes; 0 for none."""
    each = (parts["activations"] + parts.get("computed again", 0)) / images
    fixed = parts["sum"] - each * images
    return next((n for n in range(share, 0, -1) if share % n == 0 and fixed + n * each <= room), 0)


def disk(recipe: "Recipe", model: Model) -> Numbers:
    """Bytes of a checkpoint, of an export, and of all that is there at one time; and what is free."""
    size, encoder = checkpoint_bytes(recipe, model), stored(model.encoder.state_dict())
    runs, best = getattr(recipe, "seeds", 1), int(recipe.best is not None)
    written = -(-recipe.steps // recipe.save_every)
    written += best * (-(-recipe.steps // recipe.eval_every) if recipe.eval_every else 1)
    kept = min(recipe.keep + best, written)
    making = int(kept < written)
    exports = 2 if hasattr(recipe, "sweep") else 1  # a fine-tuning writes its classifier too
    place = Path(recipe.run).absolute()
    while not place.exists():
        place = place.parent
    return {
        "checkpoint": size,
        "kept": runs * kept,
        "in_the_making": making,
        "encoder": encoder,
        "exports": runs * exports,
        "sum": (runs * kept + making) * size + runs * exports * encoder,
        "free": shutil.disk_usage(place).free,
        "place": str(place),
    }


def checkpoint_bytes(recipe: "Recipe", model: Model) -> int:
    """A checkpoint: every parameter, what the optimizer keeps of it, and its average where there is one."""
    every = dict(model.named_parameters())
    learned = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    single = torch.zeros(())
    moments = {
        f"{name}/{key}": single if key == "step" else parameter
        for name, parameter in learned.items()
        for key in recipe.optim.state
    }
    average = {f"average.{name}": parameter for name, parameter in every.items()} if recipe.average else {}
    return SAID + sum(map(stored, (every, moments, average)))


def stored(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a file of safetensors."""
    return sum(tensor.nbytes + len(name) + HEADER for name, tensor in tensors.items())


def hours(device: Device, flops: int, recipe: "Recipe", share: Share) -> Numbers:
    """On so many GPUs of the kind that is asked for, and of some others, were they never to wait for data or network.

    A step takes as long as its computation, or as launching its kernels where these are too small to fill a GPU.
    """
    mine = recipe.batch // share.world
    launches = HOST * len(cost.blocks(recipe.encoder)) * (mine // share.micro_batch)
    kinds = {device.gpu: device}
    for name in SHOWN:
        kinds.setdefault(name, device.model_copy(update={"gpu": name, "tflops": None, "memory_gb": None}))
    found = {}
    for name, one in kinds.items():
        computed = one.seconds(flops * mine, recipe.activation_checkpointing)
        whole = max(computed, launches) * recipe.steps * trainings(recipe) / 3600
        kind = {"tflops": one.sustained, "memory_gb": one.gigabytes, "launches": launches > computed}
        found[name] = {"hours": whole, **kind}
    return found


def fits(parts: dict[str, int], images: int, share: int, gigabytes: float) -> str:
    """Whether a step fits into a GPU, in words."""
    room = USABLE * gigabytes * GB
    if parts["sum"] <= room:
        return "fits"
    fewer = at_once(parts, images, share, room)
    return f"fits with micro_batch={fewer}" if fewer else "too small"


def parameters(model: Model) -> Numbers:
    """How many numbers are learned."""
    return {"encoder": count_parameters(model.encoder), "head": count_parameters(model.head)}
