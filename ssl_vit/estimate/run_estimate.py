"""What a run will need: memory, disk and hours, before it starts."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_vit.data.loader import ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream, TarList
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.estimate.activations import saved_activation_bytes
from ssl_vit.estimate.cluster import GB, LAUNCH_SECONDS_PER_BLOCK, USABLE, Job, oom_suggestions, plan_run
from ssl_vit.model import Model, count_parameters
from ssl_vit.runtime import current_engine, peak_and_total_memory, world_size
from ssl_vit.train.hardware import Hardware
from ssl_vit.train.optim import num_moments

if TYPE_CHECKING:
    from ssl_vit.recipes import Recipe

Numbers = dict[str, Any]
REFERENCE_GPUS = ("H200", "H100", "A100", "L40S", "RTX 4090")  # beside the one that was asked for
HEADER_BYTES = 100  # bytes of a file for each tensor beside its name: measured
METADATA_BYTES = 8000  # bytes of a checkpoint's JSON and of the sums of its window: measured


def count_trainings(recipe: "Recipe") -> int:
    """How many trainings a recipe is made of: those of a sweep, and the final ones."""
    sweep: Any = getattr(recipe, "sweep", None)
    return len(sweep.lr) + getattr(recipe, "seeds", 1) if sweep is not None else 1


def training_length(recipe: "Recipe", stream: TrainingStream | SequentialStream) -> Numbers:
    """Steps, samples and epochs of one training."""
    result: Numbers = {"steps": recipe.steps, "batch": recipe.batch, "samples": recipe.steps * recipe.batch}
    if isinstance(stream, TrainingStream):
        result |= {"epochs": result["samples"] / stream.epoch_samples, "epoch_samples": stream.epoch_samples}
    return result | {"trainings": count_trainings(recipe)}


def describe_data(data: Manifest | TarList) -> Numbers:
    """What a set holds, as far as it is known."""
    if isinstance(data, TarList):
        return {"name": data.name}
    size = sum(shard.bytes for shard in data.shards)
    counts = {"samples": data.samples, "classes": len(data.classes), "shards": len(data.shards)}
    return {"name": data.name, **counts, "bytes": size}


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

    parts = cost.state_bytes(model, recipe.optim.state)
    if recipe.ema_decay is not None:
        parts["ema"] = sum(parameter.nbytes for parameter in model.parameters())
    saved, recomputed = saved_activation_bytes(build, (images, *recipe.data.image_hw), device, bf16)
    parts |= {"activations": saved} | ({"computed again": recomputed} if recomputed else {})
    return parts | {"sum": sum(parts.values())}


def max_micro_batch(parts: dict[str, int], images: int, share: int, room: float) -> int:
    """The most images at once that divide a process's share and fit into `room` bytes; 0 for none."""
    per_image = (parts["activations"] + parts.get("computed again", 0)) / images
    fixed = parts["sum"] - per_image * images
    return next((n for n in range(share, 0, -1) if share % n == 0 and fixed + n * per_image <= room), 0)


def disk_usage(recipe: "Recipe", model: Model) -> Numbers:
    """Bytes of a checkpoint, of an export, and of all that is there at one time; and what is free."""
    size, encoder = checkpoint_bytes(recipe, model), safetensors_bytes(model.encoder.state_dict())
    runs, best = getattr(recipe, "seeds", 1), int(recipe.best is not None)
    num_written = -(-recipe.steps // recipe.save_every)
    num_written += best * (-(-recipe.steps // recipe.eval_every) if recipe.eval_every else 1)
    num_kept = min(recipe.keep + best, num_written)
    num_partial = int(num_kept < num_written)
    exports = 2 if hasattr(recipe, "sweep") else 1  # a fine-tuning writes its classifier too
    path = Path(recipe.run).absolute()
    while not path.exists():
        path = path.parent
    return {
        "checkpoint": size,
        "kept": runs * num_kept,
        "in_the_making": num_partial,
        "encoder": encoder,
        "exports": runs * exports,
        "sum": (runs * num_kept + num_partial) * size + runs * exports * encoder,
        "free": shutil.disk_usage(path).free,
        "place": str(path),
    }


def checkpoint_bytes(recipe: "Recipe", model: Model) -> int:
    """A checkpoint: every parameter, what the optimizer keeps of it, and its average where there is one."""
    parameters = dict(model.named_parameters())
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    scalar = torch.zeros(())
    moments = {
        f"{name}/{key}": scalar if key == "step" else parameter
        for name, parameter in trainable.items()
        for key in recipe.optim.state
    }
    average = parameters if recipe.ema_decay else {}
    return METADATA_BYTES + sum(map(safetensors_bytes, (parameters, moments, average)))


def safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a file of safetensors."""
    return sum(tensor.nbytes + len(name) + HEADER_BYTES for name, tensor in tensors.items())


def training_hours(device: Hardware, flops: int, recipe: "Recipe", share: ProcessShard) -> Numbers:
    """On so many GPUs of the kind that is asked for, and of some others, were they never to wait for data or network.

    A step takes as long as its computation, or as launching its kernels where these are too small to fill a GPU.
    """
    images_per_process = recipe.batch // share.world
    launches = (
        LAUNCH_SECONDS_PER_BLOCK
        * len(cost.parameters_per_block(recipe.encoder))
        * (images_per_process // share.micro_batch)
    )
    gpus = {device.gpu: device}
    for name in REFERENCE_GPUS:
        gpus.setdefault(name, device.model_copy(update={"gpu": name, "tflops": None, "memory_gb": None}))
    estimates = {}
    for name, hardware in gpus.items():
        compute_seconds = hardware.compute_seconds(flops * images_per_process, recipe.activation_checkpointing)
        total_hours = max(compute_seconds, launches) * recipe.steps * count_trainings(recipe) / 3600
        kind = {
            "tflops": hardware.sustained_tflops,
            "memory_gb": hardware.gpu_memory_gb,
            "launches": launches > compute_seconds,
        }
        estimates[name] = {"hours": total_hours, **kind}
    return estimates


def fit_verdict(parts: dict[str, int], images: int, share: int, gigabytes: float) -> str:
    """Whether a step fits into a GPU, in words."""
    room = USABLE * gigabytes * GB
    if parts["sum"] <= room:
        return "fits"
    smaller = max_micro_batch(parts, images, share, room)
    return f"fits with micro_batch={smaller}" if smaller else "too small"


def parameter_counts(model: Model) -> Numbers:
    """How many numbers are learned."""
    return {"encoder": count_parameters(model.encoder), "head": count_parameters(model.head)}


def plan_lines(recipe: "Recipe", model: Model, train: Manifest | TarList) -> list[str]:
    """The lines of what `world` GPUs would make of the run: docs/scaling.md."""
    if isinstance(train, TarList):
        raise ExitError(
            ExitCode.USAGE, f"world={recipe.world}: a plan needs a manifest; tools/index_shards.py makes one"
        )
    size = sum(shard.bytes for shard in train.shards) / train.samples
    lanes = recipe.data.lanes if train.remote_files(0) else None
    job = _job(recipe, model, recipe.world or 1, sample_bytes=size, samples=train.samples, lanes=lanes)
    lines, warnings = plan_run(job, recipe.hardware)
    return ["", *lines, *(f"warning     {text}" for text in warnings)]


def _job(recipe: "Recipe", model: Model, world: int, **data: Any) -> Job:
    """The numbers of a run that its plan, and its memory, depend on; `data` are those of its images."""
    return Job(
        encoder=recipe.encoder,
        head_macs=model.head.forward_macs,
        parameters=count_parameters(model),
        moments=num_moments(recipe.optim),
        batch=recipe.batch,
        micro_batch=recipe.micro_batch,
        steps=recipe.steps,
        world=world,
        activation_checkpointing=recipe.activation_checkpointing,
        bf16=recipe.precision != "fp32",
        **data,
    )


def explain_out_of_memory(recipe: "Recipe") -> str:
    """What was asked, what there is and what to set instead, all in figures, for a run whose memory did not suffice."""
    with torch.device("meta"):
        encoder = recipe.encoder.build()
        job = _job(
            recipe, Model(encoder, recipe.head.build(encoder, 1)), world_size(), sample_bytes=1.0, samples=1, lanes=None
        )
    peak, room = peak_and_total_memory()
    height, width = recipe.data.image_hw
    engine_name = current_engine()
    suggestions = oom_suggestions(job, engine_name, room)
    layout = f"batch={job.batch}, {job.world} processes, {job.share // job.micro} micro batches a step"
    formula = job.memory(engine_name, job.micro, job.activation_checkpointing)[1]
    lines = [
        f"out of memory with micro_batch={job.micro} images of {height} x {width} ({layout})",
        f"  used        {peak / 1e9:.3g} GB at the peak, of {room / 1e9:.3g} GB",
        f"  by formula  {formula / 1e9:.3g} GB under {engine_name}",
        *(f"  instead     {hint}: {size / 1e9:.3g} GB by formula" for hint, size in suggestions),
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    hint = " or ".join(hint for hint, _ in suggestions) or "a smaller encoder or image, or an engine that shards"
    return f"out of memory: set {hint}; the last checkpoint is whole, the same command then goes on from it"
