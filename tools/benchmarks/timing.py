"""What all benchmarks share: contestants take turns in one process, and rows say who was how much faster, and where."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.encoders.inputs import ImageInput
from ssl_vit.files import write_bytes
from ssl_vit.model import Batch

Row = dict[str, Any]
Seconds = dict[str, list[float]]
"""Of each contestant, a step's in each round."""


class Rounds(Config):
    """How long is measured, and where what was found goes."""

    rounds: int = Field(default=5, ge=1, description="interleaved rounds")
    round_steps: int = Field(default=10, ge=1, description="steps of each contestant in a round")
    output: str = Field(default="runs/benchmark", description="folder for the JSON")


def race(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int = 1,
    device: torch.device | None = None,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds a step of each contestant in each round; they take turns, after steps of warm-up each.

    Each round begins with the next one: who follows whom matters where caches and clocks are shared.
    """
    times: Seconds = {name: [] for name in contestants}
    for step in contestants.values():
        for _ in range(warm_up):
            step()
    turns = list(contestants.items())
    for number in range(rounds):
        first = number % max(1, len(turns))
        for name, step in turns[first:] + turns[:first]:
            synchronize(device)
            start = clock()
            for _ in range(steps):
                step()
            synchronize(device)
            times[name].append((clock() - start) / steps)
    return times


def synchronize(device: torch.device | None) -> None:
    """Let the device finish before the clock is read."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_stats(seconds: Seconds, name: str, images: int, rival: str | None) -> Row:
    """Images/s, and how often that is the rival's: the median of the rounds, and the least and the most of them."""
    ratios = sorted(b / a for a, b in zip(seconds[name], seconds[rival], strict=True)) if rival else None
    return {
        "images_per_second": round(images / median(seconds[name]), 2),
        "milliseconds": round(median(seconds[name]) * 1e3, 4),
        "ratio": round(median(ratios), 3) if ratios else None,
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)] if ratios else None,
    }


def format_spread(spread: list[float] | None) -> str:
    """A spread for reading."""
    return "-".join(f"{value:.2f}" for value in spread or ())


def format_table(header: list[str], lines: list[list[str]]) -> str:
    """A table for reading: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) + 2 for column in zip(header, *lines, strict=True)]
    return "\n".join(
        cells[0].ljust(widths[0]) + "".join(map(str.rjust, cells[1:], widths[1:])) for cells in [header, *lines]
    )


def random_batch(count: int, config: ImageInput, device: torch.device) -> Batch:
    """A batch of random images on the device."""
    shape = (count, config.channels, *config.image_hw)
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "label": torch.randint(0, 1000, (count,), device=device),
        "seed": torch.arange(count, device=device),
        "valid": torch.ones(count, dtype=torch.bool, device=device),
    }


def machine_info() -> Row:
    """Where and with what it was measured."""
    return {
        "date": time.strftime("%F"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if torch.cuda.is_available() else {}),
    }


def _processor() -> str:
    """Such as AMD EPYC, and what torch makes use of."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def write_rows(rows: list[Row], path: Path) -> None:
    """Write the rows with where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps({"machine": machine_info(), "rows": rows}, indent=1) + "\n").encode())
