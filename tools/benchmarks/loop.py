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
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data.dataset import Faults
from ssl_vit.distributed import Distributed
from ssl_vit.model import Batch, Model
from ssl_vit.train.launch import start_accelerator
from ssl_vit.train.loop import TrainingTask, fit
from ssl_vit.train.prepare import prepare_model
from ssl_vit.train.run_folder import Run
from tools.benchmarks.baselines import Loss, Step, autocast, simple_step
from tools.benchmarks.timing import Rounds, Row, format_spread, format_table, random_batch, synchronize

BARE, TENSORS, SHARDS = "bare step", "fit() on tensors", "fit() from shards"
NUM_BATCHES = 4  # batches in memory


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
    recipe, tensors, source = recipes.resolve_recipe(options)
    count = 2 * options.round_steps + 1  # the second row is of steps only: the last step's has the checkpoint in it
    recipe = recipe.model_copy(
        update={"steps": count, "log_every": options.round_steps, "tracker": "none", "quiet": True, "save_every": count}
    )
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if recipe.data.train is None:
            recipe = recipe.model_copy(
                update={"data": recipe.data.model_copy(update={"train": (make_noise_shards(folder),)})}
            )
        data, _ = setup.prepare_data(recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": None})}))
        model = setup.build_model(recipe, 1000, tensors, source)
        accelerator = start_accelerator(recipe.launch_settings(recipe.optim.clip, world=1), "none", folder)
        device = accelerator.device
        batches = [random_batch(recipe.local_micro_batch(1), recipe.encoder, device) for _ in range(NUM_BATCHES)]
        memory = InMemory(batches, recipe.data)
        streams = {TENSORS: lambda: memory, SHARDS: lambda: setup.make_stream(data, recipe)}
        step = bare_step(recipe, model, batches, accelerator)
        seconds: dict[str, list[float]] = {name: [] for name in (BARE, *streams)}
        for _ in range(options.rounds):
            seconds[BARE].append(time_bare_step(step, options.round_steps, recipe.batch, device))
            for name, stream in streams.items():
                seconds[name].append(time_training(recipe, model, stream(), folder / "run", accelerator))
    case = f"{recipe.encoder.title} {recipe.encoder.image_hw[0]}x{recipe.encoder.image_hw[1]} batch {recipe.batch}"
    for name, baseline in ((BARE, BARE), (TENSORS, BARE), (SHARDS, TENSORS)):
        ratios = sorted(b / a for a, b in zip(seconds[name], seconds[baseline], strict=True))
        yield {
            "benchmark": "loop",
            "case": f"{case} {device.type}, workers {recipe.data.workers}",
            "who": name,
            "against": baseline,
            "images_per_second": round(1 / median(seconds[name]), 2),
            "ratio": round(median(ratios), 4),
            "ratio_spread": [round(ratios[0], 4), round(ratios[-1], 4)],
        }


def make_noise_shards(folder: Path) -> str:
    """Shards of colored noise, as large as photographs that were shrunk to a short side of 256 pixels."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(256):
        small = Image.fromarray(generator.integers(0, 256, (32, 44, 3), dtype=np.uint8))
        small.resize((352, 256), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
    convert_images(MakeShards(input=str(folder / "images"), output=str(folder / "shards"), quiet=True))
    return str(folder / "shards")


def bare_step(recipe: recipes.Recipe, model: Model, batches: list[Batch], accelerator: Any) -> Step:
    """The step without the loop, on batches in turn."""
    replica = copy.deepcopy(model).to(accelerator.device)
    prepare_model(replica, accelerator, recipe.precision, recipe.compile, recipe.activation_checkpointing)
    turns = itertools.cycle(batches)
    optimizer = recipe.optim.build(replica)
    loss = Loss(replica)
    return simple_step(loss, turns, optimizer, autocast(recipe, accelerator.device), recipe.optim.clip)


def time_bare_step(step: Step, steps: int, batch: int, device: torch.device) -> float:
    """Seconds an image, after as many steps to warm up as fit() has."""
    for _ in range(steps):
        step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / steps / batch


def time_training(recipe: recipes.Recipe, model: Model, stream: Any, folder: Path, accelerator: Any) -> float:
    """Seconds an image between the two rows of a training."""
    shutil.rmtree(folder, ignore_errors=True)
    run = Run(folder)
    run.acquire(recipe)
    try:
        fit(
            run,
            accelerator,
            Distributed.from_accelerator(accelerator),
            recipe,
            TrainingTask(copy.deepcopy(model), stream, recipe.optim, flops_per_image=setup.flops_per_image(model)),
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finally:
        run.release()
        accelerator.free_memory()
    return 1 / next(row["images_per_second"] for row in rows if row["step"] == 2 * recipe.log_every)


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        [r["who"], f"{r['images_per_second']:.1f}", f"{r['ratio']:.3f}", format_spread(r["ratio_spread"]), r["against"]]
        for r in rows
    ]
    return format_table([rows[0]["case"], "images/s", "ratio", "spread", "of"], lines)
