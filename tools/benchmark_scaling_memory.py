"""Whether memory stays: a training by the real loop, from shards, whose bytes are looked at again and again.

Bytes are those of this process and its children (the loader's) that are in no file, Linux's RssAnon and RssShmem; and
what torch has allocated on the GPU. What processes share counts with each of them, so that it is no growth where one
writes to a page of the heap that a fork gave to both. The slope over the steps is fitted by least squares, after the
first half, in which heaps and caches fill.
"""

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from benchmark_scaling_data import training_set
from exponents import line
from racing import Row

from ssl_vit import recipe
from ssl_vit.train import launch
from ssl_vit.train.environment import on_gpu
from ssl_vit.train.loop import Task, fit
from ssl_vit.train.run import Run

if TYPE_CHECKING:
    from benchmark_scaling import Options

LOOKS = 40  # of a training
Course = list[tuple[int, int, int]]
"""At some steps: the step, bytes of all processes, bytes of the GPU."""


def measure(made: "Options", axis: str) -> list[Row]:
    """The row of a training's memory over its steps."""
    with TemporaryDirectory() as place:
        course = watched(made, Path(place))
    steps, host, gpu = zip(*[look for look in course if look[0] >= made.steps_over_time / 2], strict=True)
    (slope, error), (gpu_slope, _) = line(steps, host), line(steps, gpu)
    return [
        {
            "benchmark": "scaling",
            "axis": axis,
            "case": f"memory of {made.encoder.title} batch {made.batch}",
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
            "flat_below": made.flat_below,
            "flat": max(slope, gpu_slope) <= made.flat_below,
            "steps": made.steps_over_time,
        }
    ]


def told(row: Row) -> str:
    """The row in a line."""
    gpu = f", {row['gpu_bytes_a_step']:+,.0f} on the GPU" if row["gpu_bytes_a_step"] is not None else ""
    text = f"{row['case']} over {row['steps']:,} steps: {row['bytes'][-1] / 2**20:,.0f} MiB, "
    text += f"{row['bytes_a_step']:+,.0f} bytes a step (+-{row['standard_error']:,.0f}){gpu}: "
    return text + f"{'flat' if row['flat'] else 'NOT flat'}, which is up to {row['flat_below']:,.0f}"


def watched(made: "Options", place: Path) -> Course:
    """The memory of a training at its steps; it has at least one loader process, and checkpoints like any other."""
    steps, course = made.steps_over_time, Course()
    often = {"steps": steps, "log_every": max(1, steps // 20), "save_every": max(1, steps // 4), "quiet": True}
    data = made.data.model_copy(update={"workers": made.data.workers or 1, "hold_out": 0.0})
    made = made.model_copy(update={**often, "eval_every": None, "best": None, "data": data})
    shards, run = training_set(made, place, 2000, 20), Run(place / "run")
    run.checkpoints.mkdir(parents=True)
    accelerator = launch.start(made.asked(made.optim.clip, 1), made.tracker, run.folder)
    model = recipe.build(made, max(1, len(shards.classes)))

    def beat(where: str) -> None:
        if where == "the data of step 1":
            gc.collect()
            trim()  # before the loader's processes are forked
        if where == f"step {run.step + 1}" and run.step % max(1, steps // LOOKS) == 0:
            trim()
            course.append((run.step, resident(), torch.cuda.memory_allocated() if on_gpu() else 0))

    task = Task(model, recipe.streamed(shards, made), made.optim, flops=recipe.flops(model))
    fit(run, accelerator, made, task, beat)
    accelerator.free_memory()
    return course


def trim() -> None:
    """Have the heap give what is free in it back to the system, where that can be asked (glibc): growth would hide."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process and its children."""
    return sum(map(own, [os.getpid(), *children(os.getpid())]))


def children(process: int) -> list[int]:
    """The processes that a process has started and that still are."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        found += [int(status.parent.name)] if parent == process else []
    return found


def own(process: int) -> int:
    """Bytes that a process has in memory and in no file; all it has where the system does not tell them apart."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if " kB" in rest}
    return 1024 * (found["RssAnon"] + found["RssShmem"] if "RssAnon" in found else found.get("VmRSS", 0))
