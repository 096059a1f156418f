"""dry_run=true: what a run would do and take, said, drawn and written down before anything is trained."""

import json
import os
import time
from pathlib import Path

import torch

from ssl_vit import config, runtime
from ssl_vit.commands.setup import build, flops, sources, streamed
from ssl_vit.data.loader import Share, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream
from ssl_vit.data.workers import default_workers
from ssl_vit.encoders import Encoder, weights
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.estimate import run_estimate
from ssl_vit.estimate.cluster import USABLE
from ssl_vit.estimate.render import SAMPLES, lines, sketch, warnings
from ssl_vit.estimate.run_estimate import Numbers, planned
from ssl_vit.estimate.trial import rehearse, together
from ssl_vit.files import made, write_bytes
from ssl_vit.model import Batch, Model
from ssl_vit.recipes import Recipe
from ssl_vit.train.config import shared


def preview(recipe: Recipe, tensors: weights.Weights | None, source: Encoder | None) -> int:
    """Say what a run would do and take, and draw its first images; trains nothing that stays."""
    if int(os.environ.get("RANK", "0")):
        return 0
    if getattr(recipe, "tasks", ()):
        raise Refusal(USAGE, "dry_run: of one data set at a time; give tasks=none and data.train, data.val of a task")
    train, val = sources(recipe)
    processes = recipe.world or runtime.world()
    share = shared(recipe, 0, processes)
    model = build(recipe, len(train.classes), tensors, source, say=print)
    stream = streamed(train, recipe)
    print(config.dump(recipe), flush=True)
    folder = made(Path(recipe.run))
    batch, data = first(stream, recipe)
    write_bytes(folder / "dry_run.png", sketch(recipe, model, batch))
    found = numbers(recipe, model, stream, val, share)
    found["here"]["loader"] = {"workers": workers_of(recipe), "images_per_second": 1 / data if data else None}
    plan = planned(recipe, model, train) if recipe.world is not None else []
    found["here"] |= here(recipe, model, found)  # spoils the model
    write_bytes(folder / "dry_run.json", (json.dumps(found, indent=1) + "\n").encode())
    print("\n".join([*lines(found, folder), *warnings(found), *plan]))
    return 0


def first(stream: TrainingStream | SequentialStream, recipe: Recipe) -> tuple[Batch, float]:
    """The first images of a training, as it takes them; and the seconds that a process takes to make one, or 0."""
    count = min(SAMPLES, recipe.batch)
    if isinstance(stream, SequentialStream):
        return stream.first(count), 0.0
    keys = next(stream.keys(0, Share(micro_batch=count)))
    stream.samples.batch(keys)  # opens, or fetches, shards
    began = time.perf_counter()
    batch, _ = stream.samples.batch(keys)
    return batch, (time.perf_counter() - began) / count


def workers_of(recipe: Recipe) -> int:
    """Loader processes of a training process."""
    return default_workers() if recipe.data.workers is None else recipe.data.workers


def numbers(
    recipe: Recipe, model: Model, stream: TrainingStream | SequentialStream, val: Manifest | None, share: Share
) -> Numbers:
    """All that is said of a run, but for what is tried."""
    train = stream.source if isinstance(stream, SequentialStream) else stream.samples.manifest
    classes = len(train.classes)
    micro, bf16, device = share.micro_batch, runtime.uses_bf16(recipe.precision), recipe.device
    mine, kind = recipe.batch // share.world, "cuda" if runtime.on_gpu() else "cpu"
    parts = on_gpu = run_estimate.memory_by_part(recipe, model, classes, micro, kind, bf16)
    if kind == "cpu":
        on_gpu = run_estimate.memory_by_part(recipe, model, classes, micro, "cuda", recipe.precision != "fp32")
    hours = run_estimate.hours(device, flops(model), recipe, share)
    for of in hours.values():
        of["memory"] = run_estimate.fits(on_gpu, micro, mine, of["memory_gb"])
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if kind == "cuda" else f"this CPU ({threads} thread{'s' * (threads > 1)})"
    room = runtime.memory()[1]
    return {
        "model": recipe.encoder.title,
        "parameters": run_estimate.parameters(model),
        "flops": {"image": flops(model), "run": flops(model) * recipe.steps * recipe.batch},
        "data": run_estimate.contents(train),
        "evaluation": run_estimate.contents(val) if val is not None else None,
        "length": run_estimate.length(recipe, stream),
        "step": {"processes": share.world, "micro_batches": mine // micro, "micro_batch": micro},
        "here": {"device": name, "precision": "bf16" if bf16 else "fp32", "memory": room, "bytes": parts}
        | {"micro_batch": run_estimate.at_once(parts, micro, mine, USABLE * room)},
        "gpus": {"mfu": device.mfu, "tflops_given": device.tflops, "bytes": on_gpu, "hours": hours},
        "disk": run_estimate.disk(recipe, model),
    }


def here(recipe: Recipe, model: Model, found: Numbers) -> Numbers:
    """How long it would take on this machine, by a few steps; the model is spoilt."""
    parts, step = found["here"]["bytes"], found["step"]
    each = (parts["activations"] + parts.get("computed again", 0)) / step["micro_batch"]
    held = sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer", "average"))
    tried = rehearse(recipe, model, step["micro_batch"], held, each)
    if isinstance(tried, str):
        return {"tried": tried}
    loader, length, micros = found["here"]["loader"], found["length"], step["micro_batches"]
    data = micros * step["micro_batch"] / loader["images_per_second"] if loader["images_per_second"] else 0.0
    computed = tried.step(micros)
    seconds = together(computed, data, loader["workers"])
    return {
        "seconds_a_step": seconds,
        "computed": computed,
        "data": data,
        "images_per_second": recipe.batch / seconds,
        "hours": seconds * length["steps"] * length["trainings"] / 3600,
        "images_tried": tried.images,
        "peak": tried.peak,
    }
