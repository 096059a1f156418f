"""What a run will need: memory, disk and hours, before it starts."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_vit.data.loader import Share, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream, Tars
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.estimate import cost
from ssl_vit.estimate.activations import activations
from ssl_vit.estimate.cluster import GB, HOST, USABLE, Job, plan, relief
from ssl_vit.model import Model, count_parameters
from ssl_vit.runtime import engine, memory, world
from ssl_vit.train.hardware import Device
from ssl_vit.train.optim import moments

if TYPE_CHECKING:
    from ssl_vit.recipes import Recipe

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


def memory_by_part(
    recipe: "Recipe", model: Model, classes: int, images: int, device: str, bf16: bool
) -> dict[str, int]:
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


def planned(recipe: "Recipe", model: Model, train: Manifest | Tars) -> list[str]:
    """The lines of what `world` GPUs would make of the run: docs/scaling.md."""
    if isinstance(train, Tars):
        raise Refusal(USAGE, f"world={recipe.world}: a plan needs a manifest; tools/index_shards.py makes one")
    size = sum(shard.bytes for shard in train.shards) / train.samples
    lanes = recipe.data.lanes if train.wanted(0) else None
    job = _job(recipe, model, recipe.world or 1, sample_bytes=size, samples=train.samples, lanes=lanes)
    lines, warnings = plan(job, recipe.device)
    return ["", *lines, *(f"warning     {text}" for text in warnings)]


def _job(recipe: "Recipe", model: Model, world: int, **data: Any) -> Job:
    """The numbers of a run that its plan, and its memory, depend on; `data` are those of its images."""
    return Job(
        encoder=recipe.encoder,
        head_macs=model.head.macs,
        parameters=count_parameters(model),
        moments=moments(recipe.optim),
        batch=recipe.batch,
        micro_batch=recipe.micro_batch,
        steps=recipe.steps,
        world=world,
        activation_checkpointing=recipe.activation_checkpointing,
        bf16=recipe.precision != "fp32",
        **data,
    )


def relieved(recipe: "Recipe") -> str:
    """What was asked, what there is and what to set instead, all in figures, for a run whose memory did not suffice."""
    with torch.device("meta"):
        encoder = recipe.encoder.build()
        job = _job(
            recipe, Model(encoder, recipe.head.build(encoder, 1)), world(), sample_bytes=1.0, samples=1, lanes=None
        )
    peak, room = memory()
    height, width = recipe.data.image_hw
    kind = engine()
    cures = relief(job, kind, room)
    pieces = f"batch={job.batch}, {job.world} processes, {job.share // job.micro} micro batches a step"
    lines = [
        f"out of memory with micro_batch={job.micro} images of {height} x {width} ({pieces})",
        f"  used        {peak / 1e9:.3g} GB at the peak, of {room / 1e9:.3g} GB",
        f"  by formula  {job.memory(kind, job.micro, job.activation_checkpointing)[1] / 1e9:.3g} GB under {kind}",
        *(f"  instead     {cure}: {size / 1e9:.3g} GB by formula" for cure, size in cures),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    cure = " or ".join(cure for cure, _ in cures) or "a smaller encoder or image, or an engine that shards"
    return f"out of memory: set {cure}; the last checkpoint is whole, the same command then goes on from it"
