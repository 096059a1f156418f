"""What the loop costs: fit() beside the bare step, and from shards beside tensors in memory.

The bare step is forward, backward, clipping and a fused AdamW on a batch on the device, by the same model outfitted
alike. `fit() on tensors` is the whole loop with its counters, watches and rows, whose batches lie in memory; `fit()
from shards` reads, decodes and crops them from data.train, or from noise of a short side of 256 pixels. Timed are the
steps between two rows, so no start and no checkpoint (`safety` has those). Turns are taken by whole trainings.

`python tools/benchmark.py loop recipe=NAME data.train=SHARDS` runs it.
"""

import copy
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_vit import recipes
from ssl_vit.commands import setup
from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.data.dataset import Faults
from ssl_vit.model import Batch, Model
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Task, fit
from ssl_vit.train.prepare import outfit
from ssl_vit.train.run_folder import Run
from tools.benchmarks.contestants import Loss, Step, autocast, simple
from tools.benchmarks.racing import Rounds, Row, between, grid, images, wait

BARE, TENSORS, SHARDS = "bare step", "fit() on tensors", "fit() from shards"
KEPT = 4  # batches in memory


class Options(Rounds, recipes.Pretrain):
    """A recipe, and how to measure it."""


class InMemory:
    """A stream of batches that are there."""

    def __init__(self, batches: list[Batch], config: Any):
        self._batches, self.config, self.identity, self.epoch_samples = batches, config, "in memory", 1 << 30
        self.faults = Faults()

    def batches(self, seen: int, share: Any, device: torch.device) -> Iterator[Batch]:
        """Over and over."""
        del seen, share, device
        return itertools.cycle(self._batches)

    def names(self, batch: int) -> list[tuple[int, int]]:
        """There are none."""
        return [(0, batch)]


def measure(options: Options) -> Iterator[Row]:
    """A row each of the three."""
    made, tensors, source = recipes.resolve(options)
    count = 2 * options.round_steps + 1  # the second row is of steps only: the last step's has the checkpoint in it
    made = made.model_copy(
        update={"steps": count, "log_every": options.round_steps, "tracker": "none", "quiet": True, "save_every": count}
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if made.data.train is None:
            made = made.model_copy(update={"data": made.data.model_copy(update={"train": (noise(folder),)})})
        data, _ = setup.sources(made.model_copy(update={"data": made.data.model_copy(update={"val": None})}))
        model = setup.build(made, 1000, tensors, source)
        accelerator = start(made.asked(made.optim.clip, world=1), "none", folder)
        device = accelerator.device
        batches = [images(made.micro(1), made.encoder, device) for _ in range(KEPT)]
        memory = InMemory(batches, made.data)
        streams = {TENSORS: lambda: memory, SHARDS: lambda: setup.streamed(data, made)}
        step = bare(made, model, batches, accelerator)
        seconds: dict[str, list[float]] = {who: [] for who in (BARE, *streams)}
        for _ in range(options.rounds):
            seconds[BARE].append(timed(step, options.round_steps, made.batch, device))
            for who, stream in streams.items():
                seconds[who].append(trained(made, model, stream(), folder / "run", accelerator))
    case = f"{made.encoder.title} {made.encoder.image_hw[0]}x{made.encoder.image_hw[1]} batch {made.batch}"
    for who, against in ((BARE, BARE), (TENSORS, BARE), (SHARDS, TENSORS)):
        ratios = sorted(b / a for a, b in zip(seconds[who], seconds[against], strict=True))
        yield {
            "benchmark": "loop",
            "case": f"{case} {device.type}, workers {made.data.workers}",
            "who": who,
            "against": against,
            "images_per_second": round(1 / median(seconds[who]), 2),
            "ratio": round(median(ratios), 4),
            "ratio_spread": [round(ratios[0], 4), round(ratios[-1], 4)],
        }


def noise(folder: Path) -> str:
    """Shards of coloured noise, as large as photographs that were shrunk to a short side of 256 pixels."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(256):
        small = Image.fromarray(draw.integers(0, 256, (32, 44, 3), dtype=np.uint8))
        small.resize((352, 256), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
    convert(MakeShards(input=str(folder / "images"), output=str(folder / "shards"), quiet=True))
    return str(folder / "shards")


def bare(made: recipes.Recipe, model: Model, batches: list[Batch], accelerator: Any) -> Step:
    """The step without the loop, on batches in turn."""
    mine = copy.deepcopy(model).to(accelerator.device)
    outfit(mine, accelerator, made.precision, made.compile, made.activation_checkpointing)
    turns = itertools.cycle(batches)
    optimizer = made.optim.build(mine)
    loss = Loss(mine)
    return simple(loss, turns, optimizer, autocast(made, accelerator.device), made.optim.clip)


def timed(step: Step, steps: int, batch: int, device: torch.device) -> float:
    """Seconds an image, after as many steps to warm up as fit() has."""
    for _ in range(steps):
        step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - began) / steps / batch


def trained(made: recipes.Recipe, model: Model, stream: Any, folder: Path, accelerator: Any) -> float:
    """Seconds an image between the two rows of a training."""
    shutil.rmtree(folder, ignore_errors=True)
    run = Run(folder)
    run.claim(made)
    try:
        fit(run, accelerator, made, Task(copy.deepcopy(model), stream, made.optim, flops=setup.flops(model)))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finally:
        run.release()
        accelerator.free_memory()
    return 1 / next(row["images_per_second"] for row in rows if row["step"] == 2 * made.log_every)


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        [r["who"], f"{r['images_per_second']:.1f}", f"{r['ratio']:.3f}", between(r["ratio_spread"]), r["against"]]
        for r in rows
    ]
    return grid([rows[0]["case"], "images/s", "ratio", "spread", "of"], lines)
