"""How a cost grows along an axis: exponents by least squares on logarithms, beside a formula's on the same points."""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from ssl_vit import config, errors, recipes
from ssl_vit.commands import setup
from ssl_vit.convert import resolve
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data import manifest
from ssl_vit.data.loader import ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest
from ssl_vit.distributed import Distributed
from ssl_vit.encoders.vit import Transformer
from ssl_vit.errors import ExitCode, ExitError, is_out_of_memory
from ssl_vit.files import sha256
from ssl_vit.report.format import format_number
from ssl_vit.runtime import die_with_launcher, on_gpu, world_size
from ssl_vit.train import launch
from ssl_vit.train.loop import TrainingTask, fit
from ssl_vit.train.run_folder import Run
from tools.benchmarks import baselines, engines
from tools.benchmarks.engines import reset_state
from tools.benchmarks.timing import Rounds, Row, Seconds, format_table, race, random_batch


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """The slope of the least-squares line through points, and its standard error, which two points do not have."""
    a, b = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    slope = float(a @ b / (a @ a))
    residual = b - slope * a
    return slope, float(np.sqrt(residual @ residual / (len(a) - 2) / (a @ a))) if len(a) > 2 else None


def exponent(values: Sequence[float], costs: Sequence[float]) -> float | None:
    """The p of cost = c value^p; None where there are not two different values."""
    return fit_line(np.log(values), np.log(costs))[0] if len(set(values)) > 1 else None  # type: ignore[arg-type]


def growth_row(
    axis: str,
    case: str,
    seconds: Mapping[int, Sequence[float]],
    formula: Callable[[int], float] | None = None,
    images: Callable[[int], int] | None = None,
    left_out: Mapping[int, str] | None = None,
) -> Row:
    """The row of an axis, of the seconds of each value in each round: a fit a round, their median, least and most.

    `formula` is what a value should cost, in any unit, where that is known; `images` how many a step of it takes;
    `left_out` are values that are no part of the fit, measured or not, and why. `ratio` is what the cost grew by from
    the first value to the last, beside what it should have by the formula; `last_two` are the exponents between the
    last two values alone, measured and by the formula, where what a step costs at any size weighs least.
    """
    left_out = left_out or {}
    measured, values = list(seconds), [value for value in seconds if value not in left_out]
    medians = {value: median(seconds[value]) for value in measured}
    predicted = [formula(value) for value in values] if formula else []
    rounds = list(zip(*(seconds[value] for value in values), strict=True))
    fits = sorted(fit for costs in rounds if (fit := exponent(values, costs)) is not None)
    ends = [fit for costs in rounds if (fit := exponent(values[-2:], costs[-2:])) is not None]
    ratios = (
        sorted(costs[-1] / costs[0] * predicted[0] / predicted[-1] for costs in rounds) if predicted and fits else None
    )
    return {
        "benchmark": "scaling",
        "axis": axis,
        "case": case,
        "who": "ssl_vit",
        "values": measured,
        "milliseconds": [round(medians[value] * 1e3, 4) for value in measured],
        "images_per_second": [round(images(value) / medians[value], 2) for value in measured] if images else None,
        "ratio": round(median(ratios), 3) if ratios else None,
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)] if ratios else None,
        "exponent": round(median(fits), 3) if fits else None,
        "exponent_spread": [round(fits[0], 3), round(fits[-1], 3)] if fits else None,
        "formula": round(exponent(values, predicted) or 0.0, 3) if ratios else None,
        "last_two": round(median(ends), 3) if ends else None,
        "last_two_formula": round(exponent(values[-2:], predicted[-2:]) or 0.0, 3) if ratios else None,
        "left_out": {str(value): reason for value, reason in left_out.items()},
    }


Axis = Literal["time", "image", "patch", "depth", "width", "batch", "samples", "shards", "workers", "processes"]
STEPS = {"image": "images", "patch": "patches", "depth": "depths", "width": "widths", "batch": "batches"}
"""The axes of the step itself, and the key with the values of each."""
Count = Annotated[int, Field(ge=1)]
Counts = tuple[Count, ...]


class Options(Rounds, recipes.Pretrain):
    """A recipe, the axes, and the values along each; the defaults suit recipe=mpp_demo on a few CPU cores."""

    axes: tuple[Axis, ...] = Field(default=get_args(Axis), min_length=1, description="what to measure")
    images: Counts = Field(default=(32, 48, 64, 96), min_length=1, description="sides of the image, pixels")
    patches: Counts = Field(default=(4, 8, 16), min_length=1, description="sides of a patch, pixels")
    depths: Counts = Field(default=(2, 4, 8), min_length=1, description="blocks")
    widths: Counts = Field(
        default=(96, 192, 384), min_length=1, description="token widths; heads keep theirs, the MLP its share"
    )
    batches: Counts = Field(default=(16, 32, 64, 128), min_length=1, description="images a step")
    samples: Counts = Field(
        default=(10_000, 100_000, 1_000_000, 10_000_000), min_length=1, description="samples, 1,000 a shard"
    )
    shards: Counts = Field(
        default=(10, 100, 1000, 10_000), min_length=1, description="shards of as many samples in all"
    )
    workers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2, 4), min_length=1, description="loader processes; 0 is none beside the training's"
    )
    processes: Counts = Field(default=(1, 2), min_length=1, description="training processes")
    steps_over_time: int = Field(default=1000, ge=40, description="steps of the training whose memory is watched")
    flat_below: float = Field(default=1024, gt=0, description="bytes a step up to which memory is called flat")


def measure(options: Options) -> Iterator[Row]:
    """The rows of every axis that is asked for; ExitError before anything is measured where a value cannot be."""
    if world_size() > 1:
        raise ExitError(ExitCode.USAGE, "scaling: it starts its processes itself; leave the launcher out")
    options = resolve_options(options.model_copy(update={"init": "none", "micro_batch": None}))
    cases = {axis: recipes_along(options, axis) for axis in STEPS if axis in options.axes}
    runners: dict[str, Callable[[Options, str], Iterable[Row]]] = {
        "time": measure_memory_over_time,
        "samples": measure_data,
        "shards": measure_data,
        "workers": measure_workers,
        "processes": measure_processes,
    }
    for axis in get_args(Axis):  # memory first: what others freed would hide that it grows
        if axis in options.axes:
            yield from [measure_steps(options, axis, cases[axis])] if axis in cases else runners[axis](options, axis)
            reset_state()


def resolve_options(options: Options) -> Options:
    """The recipe with its encoder complete; raises ExitError where it cannot be built."""
    return recipes.resolve_recipe(options)[0]  # type: ignore[return-value]


def recipes_along(options: Options, axis: str) -> dict[int, Options]:
    """The recipe at each value of an axis, the cheapest first: what is tried last meets the weights of all."""
    if axis not in ("image", "batch") and not isinstance(options.encoder, Transformer):
        raise ExitError(ExitCode.USAGE, f"axes: {axis} is no number of encoder.kind={options.encoder.kind}")
    values = sorted(set(getattr(options, STEPS[axis])), reverse=axis == "patch")
    return {value: resolve_options(with_value(options, axis, value)) for value in values}


def with_value(options: Options, axis: str, value: int) -> Options:
    """The recipe with one number changed; a wider encoder has more heads, of the same width, and as much wider MLPs."""
    if axis == "batch":
        return options.model_copy(update={"batch": value})
    if axis == "image":
        encoder = options.encoder.model_copy(update={"image": value})
        return options.model_copy(
            update={"data": options.data.model_copy(update={"image_size": value}), "encoder": encoder}
        )
    update: dict[str, Any] = {axis: value}
    if axis == "width":
        width, _, heads, mlp = options.encoder.dims  # type: ignore[union-attr]
        max_heads = max(1, round(value * heads / width))
        heads = max(count for count in range(1, max_heads + 1) if value % count == 0)
        update |= {"heads": heads, "mlp": round(value * mlp / width)}
    return options.model_copy(update={"encoder": options.encoder.model_copy(update=update)})


def measure_steps(options: Options, axis: str, cases: dict[int, Options]) -> Row:
    """The row of an axis of the step; values that do not fit into the memory are left out."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    steps, flops, left_out = {}, {}, {}
    with compile_separately() if on_gpu() or options.compile else nullcontext():
        for value, case in cases.items():
            try:
                steps[value], flops[value] = build_step(case, device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                left_out[value] = "does not fit into the memory"
            if value in left_out:  # here the failed step's tensors are no longer held by its traceback
                gc.collect()
                torch.cuda.empty_cache()
        seconds = race({str(value): step for value, step in steps.items()}, options.rounds, options.round_steps, device)
    times = {value: seconds[str(value)] for value in steps}
    name = "" if axis == "batch" else f" batch {options.batch}"
    row = growth_row(axis, options.encoder.title + name, times, flops.__getitem__, lambda v: cases[v].batch, left_out)
    row["tflops"] = [round(flops[v] / ms / 1e9, 4) for v, ms in zip(row["values"], row["milliseconds"], strict=True)]
    return row


@contextmanager
def compile_separately() -> Iterator[None]:
    """Each value is compiled for itself: else from the second size on for any size, and after eight not at all."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):  # type: ignore[attr-defined]
        yield


def build_step(options: Options, device: torch.device) -> tuple[Callable[[], object], int]:
    """A case's step, which was tried once, and its FLOPs by formula."""
    model = setup.build_model(options, 1000).to(device)
    step = baselines.ssl_vit_step(
        options, model, random_batch(options.batch, options.encoder, device), Path(options.output)
    )
    step()
    return step, options.batch * setup.flops_per_image(model)


def table(rows: list[Row]) -> str:
    """The rows for reading: one a line, then what was left out, then memory."""
    heads = ["", "values", "ms", "exponent", "of the rounds", "formula", "growth / formula", "last two", "formula"]
    lines, notes = [], []
    for row in rows:
        if row["axis"] == "time":
            notes.append(describe_memory(row))
            continue
        values = " ".join(f"{value:,}" for value in row["values"])
        times = " ".join(map(format_number, row["milliseconds"]))
        keys = ("exponent", "formula", "ratio", "last_two", "last_two_formula")
        fit = [f"{row[key]:.2f}" if row[key] is not None else "" for key in keys]
        spread = " to ".join(f"{value:.2f}" for value in row["exponent_spread"] or ())
        lines.append([f"{row['axis']}: {row['case']}", values, times, fit[0], spread, *fit[1:]])
        notes += [f"{row['axis']} {value}: {reason}" for value, reason in row["left_out"].items()]
    return "\n".join([*([format_table(heads, lines)] if lines else []), *notes])


CPU = torch.device("cpu")
Steps = dict[str, Callable[[], object]]
PICTURES = 64  # different images of a set
SAMPLES_PER_SHARD = 1000  # samples, of the sets that differ in their number
WARM_UP_SAMPLES = (
    1024  # samples until the shards of the first shuffle windows have been opened, which is no batch's cost
)
PLANS_PER_READ = 100  # batches planned for each that is read: one takes too little time for a clock


def measure_data(options: "Options", axis: str) -> list[Row]:
    """Rows of a stream over sets of several sizes: its first batch, the plan of a batch, a batch."""
    counts = {samples: (samples, max(1, samples // SAMPLES_PER_SHARD)) for samples in sorted(set(options.samples))}
    if axis == "shards":
        total = 100 * max(options.shards)
        counts = {shards: (total, shards) for shards in sorted(set(options.shards))}
    with TemporaryDirectory() as directory:
        shard = make_picture_shard(Path(directory), options.data.image_hw)
        folders = {value: repeat_shard(shard, Path(directory) / str(value), *count) for value, count in counts.items()}
        starts: Steps = {str(value): partial(read_first_batch, options, folder) for value, folder in folders.items()}
        streams = {value: make_stream(options, manifest.load(folder), 0) for value, folder in folders.items()}
        share = ProcessShard(micro_batch=options.batch)
        keys: Steps = {str(value): partial(next, stream.keys(0, share)) for value, stream in streams.items()}
        start_times = race(starts, options.rounds, warm_up=1)
        plan_times = race(keys, options.rounds, PLANS_PER_READ * options.round_steps)
        batches = {value: stream.batches(0, share, CPU) for value, stream in streams.items()}
        reads: Steps = {str(value): partial(next, iterator) for value, iterator in batches.items()}
        read_times = race(reads, options.rounds, options.round_steps, warm_up=3 + WARM_UP_SAMPLES // options.batch)
        for stream in streams.values():
            close_stream(stream)
    constant, images_per_step = (lambda _: 1.0), (lambda _: options.batch)
    return [
        growth_row(
            axis, "start to first batch", by_value(start_times)
        ),  # reads the manifest, shuffles a window of each lane
        growth_row(axis, f"plan of a batch of {options.batch}", by_value(plan_times), constant, images_per_step),
        growth_row(axis, f"batch of {options.batch}", by_value(read_times), constant, images_per_step),
    ]


def by_value(seconds: Seconds) -> dict[int, list[float]]:
    """A race's times under the numbers themselves."""
    return {int(value): times for value, times in seconds.items()}


def measure_workers(options: "Options", axis: str) -> list[Row]:
    """The row of the loader, of batches made by 0, 1, ... processes; the fit is over those that have a core each."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted(set(options.workers))
    left_out = {count: f"more than the {cores} cores" for count in counts if count > cores}
    left_out |= {0: "in the training's own process"} if 0 in counts else {}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    with TemporaryDirectory() as directory:
        data = training_set(options, Path(directory), 100 * SAMPLES_PER_SHARD, 100)
        for _ in range(options.rounds):
            for count in counts:
                seconds[count].append(time_loader(options, data, count))
    case = f"batches of {options.batch} on {cores} cores"
    row = growth_row(axis, case, seconds, lambda count: 1 / count, lambda _: options.batch, left_out)
    return [row | {"cores": cores}]


def time_loader(options: "Options", data: Manifest, count: int) -> float:
    """Seconds a batch of a loader of so many processes, which is built anew: others' would work on beside it."""
    stream = make_stream(options, data, count)
    batches: Any = stream.batches(0, ProcessShard(micro_batch=options.batch), CPU)
    threads, steps = torch.get_num_threads(), options.round_steps * max(1, count)
    torch.set_num_threads(1)  # as a worker has
    try:
        with closing(batches), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more of them than cores
            for _ in range((3 + WARM_UP_SAMPLES // options.batch) * max(1, count)):
                next(batches)
            start = time.perf_counter()
            for _ in range(steps):
                next(batches)
            return (time.perf_counter() - start) / steps
    finally:
        torch.set_num_threads(threads)
        close_stream(stream)


def read_first_batch(options: "Options", folder: Path) -> None:
    """From a manifest on disk to a stream's first batch."""
    stream = make_stream(options, manifest.load(folder), 0)
    next(stream.batches(0, ProcessShard(micro_batch=options.batch), CPU))
    close_stream(stream)


def make_stream(options: "Options", data: Manifest, count: int) -> TrainingStream:
    """The training's stream over all samples of a set, by so many loader processes."""
    config = options.data.model_copy(update={"workers": count, "subset": 1.0, "holdout": 0.0})
    return TrainingStream(data, config, options.seed, options.batch)


def close_stream(stream: TrainingStream) -> None:
    """Close the shards that this process read; raises ExitError where what was measured was no reading."""
    for shard in list(stream.samples._shards):
        stream.samples._close_shard(shard)
    if stream.faults.fatal is not None:
        raise stream.faults.fatal
    if stream.faults.pending:
        raise ExitError(ExitCode.DATA, stream.faults.pending[0].reason)


def training_set(options: "Options", directory: Path, samples: int, shards: int) -> Manifest:
    """data.train, or where it is not given a set of the benchmark's own."""
    if options.data.train is not None:
        return resolve.resolve_for_recipe(options, options.data.train, "train")
    return manifest.load(
        repeat_shard(make_picture_shard(directory, options.data.image_hw), directory / "train", samples, shards)
    )


def make_picture_shard(directory: Path, image_hw: tuple[int, int]) -> Manifest:
    """A shard of smooth JPEGs, a little larger than what the encoder takes."""
    generator, (height, width) = np.random.default_rng(0), (max(8, side * 8 // 7) for side in image_hw)
    folder = directory / "images" / "picture"  # the class of all
    folder.mkdir(parents=True)
    for index in range(PICTURES):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
    output = directory / "plain"
    return convert_images(MakeShards(input=str(directory / "images"), output=str(output), workers=1, quiet=True))[""]


def repeat_shard(source: Manifest, folder: Path, samples: int, shards: int) -> Path:
    """The folder of a set that has the shard's images again and again: at most so many samples, in so many shards."""
    folder.mkdir()
    shutil.copy(source.tar(0), folder / "0.tar")
    np.save(folder / "0.npy", np.resize(source.index(0), max(1, samples // shards)))
    update = {"name": "0.tar", "samples": max(1, samples // shards), "index_sha256": sha256(folder / "0.npy")}
    manifest.save_manifest(replace(source, folder=folder, shards=[source.shards[0].model_copy(update=update)] * shards))
    return folder


MEMORY_SAMPLES = 40  # of a training
MemoryTrace = list[tuple[int, int, int]]
"""At some steps: the step, bytes of all processes, bytes of the GPU."""


def measure_memory_over_time(options: "Options", axis: str) -> list[Row]:
    """The row of a training's memory over its steps."""
    with TemporaryDirectory() as directory:
        trace = record_memory(options, Path(directory))
    steps, host, gpu = zip(*[sample for sample in trace if sample[0] >= options.steps_over_time / 2], strict=True)
    (slope, error), (gpu_slope, _) = fit_line(steps, host), fit_line(steps, gpu)
    return [
        {
            "benchmark": "scaling",
            "axis": axis,
            "case": f"memory of {options.encoder.title} batch {options.batch}",
            "who": "ssl_vit",
            "values": list(steps),
            "milliseconds": None,
            "images_per_second": None,
            "ratio": None,
            "bytes": list(host),
            "bytes_a_step": round(slope, 1),
            "standard_error": round(error or 0.0, 1),
            "gpu_bytes": list(gpu) if on_gpu() else None,
            "gpu_bytes_a_step": round(gpu_slope, 1) if on_gpu() else None,
            "flat_below": options.flat_below,
            "flat": max(slope, gpu_slope) <= options.flat_below,
            "steps": options.steps_over_time,
        }
    ]


def describe_memory(row: Row) -> str:
    """The row in a line."""
    gpu = f", {row['gpu_bytes_a_step']:+,.0f} on the GPU" if row["gpu_bytes_a_step"] is not None else ""
    text = f"{row['case']} over {row['steps']:,} steps: {row['bytes'][-1] / 2**20:,.0f} MiB, "
    text += f"{row['bytes_a_step']:+,.0f} bytes a step (+-{row['standard_error']:,.0f}){gpu}: "
    return text + f"{'flat' if row['flat'] else 'NOT flat'}, which is up to {row['flat_below']:,.0f}"


def record_memory(options: "Options", directory: Path) -> MemoryTrace:
    """The memory of a training at its steps; it has at least one loader process, and checkpoints like any other."""
    steps, trace = options.steps_over_time, MemoryTrace()
    intervals = {"steps": steps, "log_every": max(1, steps // 20), "save_every": max(1, steps // 4), "quiet": True}
    data = options.data.model_copy(update={"workers": options.data.workers or 1, "holdout": 0.0})
    options = options.model_copy(update={**intervals, "eval_every": None, "best": None, "data": data})
    shards, run = training_set(options, directory, 2000, 20), Run(directory / "run")
    run.checkpoints.mkdir(parents=True)
    accelerator = launch.start_accelerator(options.launch_settings(options.optim.clip, 1), options.tracker, run.folder)
    model = setup.build_model(options, max(1, len(shards.classes)))

    def beat(position: str) -> None:
        if position == "the data of step 1":
            gc.collect()
            trim_heap()  # before the loader's processes are forked
        if position == f"step {run.step + 1}" and run.step % max(1, steps // MEMORY_SAMPLES) == 0:
            trim_heap()
            trace.append((run.step, resident_bytes(), torch.cuda.memory_allocated() if on_gpu() else 0))

    task = TrainingTask(
        model, setup.make_stream(shards, options), options.optim, flops_per_image=setup.flops_per_image(model)
    )
    processes = Distributed.from_accelerator(accelerator)
    processes.heartbeat = beat
    fit(run, accelerator, processes, options, task)
    accelerator.free_memory()
    return trace


def trim_heap() -> None:
    """Have the heap give what is free in it back to the system, where that can be asked (glibc): growth would hide."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Bytes of this process and its children."""
    return sum(map(private_bytes, [os.getpid(), *child_processes(os.getpid())]))


def child_processes(process: int) -> list[int]:
    """The processes that a process has started and that still are."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        pids += [int(status.parent.name)] if parent == process else []
    return pids


def private_bytes(process: int) -> int:
    """Bytes that a process has in memory and in no file; all it has where the system does not tell them apart."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if " kB" in value
    }
    return 1024 * (fields["RssAnon"] + fields["RssShmem"] if "RssAnon" in fields else fields.get("VmRSS", 0))


ROOT = Path(__file__).parents[2]  # the checkout


def measure_processes(options: "Options", axis: str) -> list[Row]:
    """The row of an axis whose formula is that a step takes as long however many processes there are."""
    counts = sorted(set(options.processes))
    available = torch.cuda.device_count() if on_gpu() else len(os.sched_getaffinity(0))
    left_out = {
        count: f"more than the {available} {'GPUs' if on_gpu() else 'cores'}" for count in counts if count > available
    }
    if on_gpu():
        counts = [count for count in counts if count <= available]
    threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // max(counts, default=1)))
    seconds = {count: time_launch(options, count, threads) for count in counts}
    case = f"{options.encoder.title} batch {options.batch} a process, {threads} threads each"
    row = growth_row(axis, case, seconds, lambda _: 1.0, lambda count: options.batch * count, left_out)
    row["efficiency"] = [round(row["milliseconds"][0] / ms, 3) for ms in row["milliseconds"]]
    return [row]


def time_launch(options: "Options", count: int, threads: int) -> list[float]:
    """Seconds a step in each round of a launch of so many processes."""
    values = {name: getattr(options, name) for name in engines.Options.model_fields} | {"batch": options.batch * count}
    with TemporaryDirectory() as directory:
        recipe_path, result_path = Path(directory) / "given.yaml", Path(directory) / "answer.json"
        recipe_path.write_text(config.dump(engines.Options.model_validate(values)))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        command = [sys.executable, *launcher, __file__, str(recipe_path), str(result_path)]
        completed = subprocess.run(command, env=environment, capture_output=True, text=True)
        if completed.returncode:
            sys.stderr.write(completed.stderr)
            raise ExitError(
                ExitCode.INTERNAL, f"processes: a launch of {count} ended with {completed.returncode}; see above"
            )
        return json.loads(result_path.read_text())


def main(arguments: list[str]) -> int:
    """A process of a launch: all measure, the first writes down what it found."""
    die_with_launcher()
    options: engines.Options = config.parse(engines.Options, [f"recipe={arguments[0]}"])
    seconds = [engines.run_turn("ddp", options)[0] for _ in range(options.rounds)]
    if os.environ["RANK"] == "0":
        Path(arguments[1]).write_text(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    errors.run_main(main)
