"""What a recipe needs: its plan on many GPUs, and what to set where its memory ran out."""

import sys
from typing import TYPE_CHECKING, Any

import torch

from ssl_vit.data.manifest import Manifest
from ssl_vit.data.sequential import Tars
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.model import Model, count_parameters
from ssl_vit.scaling import Job, plan, relief
from ssl_vit.train.environment import engine, memory, world
from ssl_vit.train.optim import moments

if TYPE_CHECKING:
    from ssl_vit.recipe import Recipe


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
