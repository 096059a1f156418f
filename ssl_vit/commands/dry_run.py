"""dry_run=true: what a run would do and take, said, drawn and written down before anything is trained."""

import json
import os
import time
from pathlib import Path

import torch

from ssl_vit import config, runtime
from ssl_vit.commands.setup import build_model, flops_per_image, make_stream, prepare_data
from ssl_vit.data.loader import ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.webdataset_stream import SequentialStream
from ssl_vit.data.workers import default_workers
from ssl_vit.encoders import Encoder, weights
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import run_estimate
from ssl_vit.estimate.cluster import USABLE
from ssl_vit.estimate.render import NUM_IMAGES, draw_preview, estimate_warnings, format_estimate
from ssl_vit.estimate.run_estimate import Numbers, plan_lines
from ssl_vit.estimate.trial import step_time, time_steps
from ssl_vit.files import ensure_dir, write_bytes
from ssl_vit.model import Batch, Model
from ssl_vit.recipes import Recipe
from ssl_vit.train.config import process_shard


def preview(recipe: Recipe, tensors: weights.Weights | None, source: Encoder | None) -> int:
    """Say what a run would do and take, and draw its first images; trains nothing that stays."""
    if int(os.environ.get("RANK", "0")):
        return 0
    if getattr(recipe, "tasks", ()):
        raise ExitError(
            ExitCode.USAGE, "dry_run: of one data set at a time; give tasks=none and data.train, data.val of a task"
        )
    train, val = prepare_data(recipe)
    processes = recipe.world or runtime.world_size()
    share = process_shard(recipe, 0, processes)
    model = build_model(recipe, len(train.classes), tensors, source, say=print)
    stream = make_stream(train, recipe)
    print(config.dump(recipe), flush=True)
    folder = ensure_dir(Path(recipe.run))
    batch, seconds_per_image = first_batch(stream, recipe)
    write_bytes(folder / "dry_run.png", draw_preview(recipe, model, batch))
    estimates = estimate_run(recipe, model, stream, val, share)
    estimates["here"]["loader"] = {
        "workers": num_workers(recipe),
        "images_per_second": 1 / seconds_per_image if seconds_per_image else None,
    }
    plan = plan_lines(recipe, model, train) if recipe.world is not None else []
    estimates["here"] |= time_on_this_machine(recipe, model, estimates)  # spoils the model
    write_bytes(folder / "dry_run.json", (json.dumps(estimates, indent=1) + "\n").encode())
    print("\n".join([*format_estimate(estimates, folder), *estimate_warnings(estimates), *plan]))
    return 0


def first_batch(stream: TrainingStream | SequentialStream, recipe: Recipe) -> tuple[Batch, float]:
    """The first images of a training, as it takes them; and the seconds that a process takes to make one, or 0."""
    count = min(NUM_IMAGES, recipe.batch)
    if isinstance(stream, SequentialStream):
        return stream.first(count), 0.0
    keys = next(stream.keys(0, ProcessShard(micro_batch=count)))
    stream.samples.batch(keys)  # opens, or fetches, shards
    start = time.perf_counter()
    batch, _ = stream.samples.batch(keys)
    return batch, (time.perf_counter() - start) / count


def num_workers(recipe: Recipe) -> int:
    """Loader processes of a training process."""
    return default_workers() if recipe.data.workers is None else recipe.data.workers


def estimate_run(
    recipe: Recipe, model: Model, stream: TrainingStream | SequentialStream, val: Manifest | None, share: ProcessShard
) -> Numbers:
    """All that is said of a run, but for what is tried."""
    train = stream.source if isinstance(stream, SequentialStream) else stream.samples.manifest
    classes = len(train.classes)
    micro, bf16, hardware = share.micro_batch, runtime.uses_bf16(recipe.precision), recipe.hardware
    images_per_process, device_type = recipe.batch // share.world, "cuda" if runtime.on_gpu() else "cpu"
    parts = gpu_parts = run_estimate.memory_by_part(recipe, model, classes, micro, device_type, bf16)
    if device_type == "cpu":
        gpu_parts = run_estimate.memory_by_part(recipe, model, classes, micro, "cuda", recipe.precision != "fp32")
    hours = run_estimate.training_hours(hardware, flops_per_image(model), recipe, share)
    for gpu in hours.values():
        gpu["memory"] = run_estimate.fit_verdict(gpu_parts, micro, images_per_process, gpu["memory_gb"])
    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name() if device_type == "cuda" else f"this CPU ({threads} thread{'s' * (threads > 1)})"
    )
    memory_bytes = runtime.peak_and_total_memory()[1]
    return {
        "model": recipe.encoder.title,
        "parameters": run_estimate.parameter_counts(model),
        "flops": {"image": flops_per_image(model), "run": flops_per_image(model) * recipe.steps * recipe.batch},
        "data": run_estimate.describe_data(train),
        "evaluation": run_estimate.describe_data(val) if val is not None else None,
        "length": run_estimate.training_length(recipe, stream),
        "step": {"processes": share.world, "micro_batches": images_per_process // micro, "micro_batch": micro},
        "here": {"device": name, "precision": "bf16" if bf16 else "fp32", "memory": memory_bytes, "bytes": parts}
        | {"micro_batch": run_estimate.max_micro_batch(parts, micro, images_per_process, USABLE * memory_bytes)},
        "gpus": {"mfu": hardware.mfu, "tflops_given": hardware.tflops, "bytes": gpu_parts, "hours": hours},
        "disk": run_estimate.disk_usage(recipe, model),
    }


def time_on_this_machine(recipe: Recipe, model: Model, estimates: Numbers) -> Numbers:
    """How long it would take on this machine, by a few steps; the model is spoilt."""
    parts, step = estimates["here"]["bytes"], estimates["step"]
    bytes_per_image = (parts["activations"] + parts.get("computed again", 0)) / step["micro_batch"]
    state_bytes = sum(parts.get(name, 0) for name in ("weights", "gradients", "optimizer", "ema"))
    timing = time_steps(recipe, model, step["micro_batch"], state_bytes, bytes_per_image)
    if isinstance(timing, str):
        return {"tried": timing}
    loader, length, micro_batches = estimates["here"]["loader"], estimates["length"], step["micro_batches"]
    data_seconds = (
        micro_batches * step["micro_batch"] / loader["images_per_second"] if loader["images_per_second"] else 0.0
    )
    compute_seconds = timing.step(micro_batches)
    seconds = step_time(compute_seconds, data_seconds, loader["workers"])
    return {
        "seconds_a_step": seconds,
        "computed": compute_seconds,
        "data": data_seconds,
        "images_per_second": recipe.batch / seconds,
        "hours": seconds * length["steps"] * length["trainings"] / 3600,
        "images_tried": timing.images,
        "peak": timing.peak,
    }
