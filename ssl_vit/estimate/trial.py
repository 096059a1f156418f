"""A few steps of a training on this machine, timed before it: what `fit` computes, on invented images."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssl_vit.errors import is_out_of_memory
from ssl_vit.model import Batch, Model
from ssl_vit.recipes import Recipe
from ssl_vit.runtime import on_gpu, uses_bf16
from ssl_vit.train.prepare import pin_attention, prepare_model

if TYPE_CHECKING:
    pass

MAX_PASS_SECONDS = 1.0  # seconds that one pass may take on a CPU; where fewer images do, the rest is a straight line
MAX_ACTIVATION_BYTES = 2e9  # bytes of activations that it may take there
LOOP_OVERHEAD = (
    4e-3  # seconds of a step that the loop takes beside what is tried, where nothing hides it: measured on 2 cores
)
REPEATS, MAX_SECONDS = 7, 4.0  # of each measurement, and the seconds after which fewer will do


@dataclass(frozen=True)
class TimedSteps:
    """How long a step takes here."""

    passes: float  # seconds forward and backward, of one micro batch
    update: float  # seconds of the optimizer
    images: int  # at once that were tried
    peak: int | None  # bytes at the step's peak, on a GPU

    def step(self, micro_batches: int) -> float:
        """Seconds of a step, data left out."""
        return micro_batches * self.passes + self.update + (0.0 if on_gpu() else LOOP_OVERHEAD)


def time_steps(
    recipe: "Recipe", model: Model, micro: int, state_bytes: int, bytes_per_image: float
) -> TimedSteps | str:
    """Train a model, which is spoilt by it, on images at once as far as this machine has time; or why not, in words.

    `state_bytes` are the bytes of weights, gradients and moments, `bytes_per_image` those of an image's activations.
    """
    if state_bytes > free_memory() / 2:
        return "not tried here: weights, gradients and optimizer take more than half of the free memory"
    device = torch.device("cuda" if on_gpu() else "cpu")
    try:
        max_images = (
            max(2, int(min(MAX_ACTIVATION_BYTES, free_memory() / 4) / bytes_per_image)) // 2 * 2
        )  # mixup pairs images
        return StepTimer(recipe, model, device, micro).measure(max_images)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f"out of memory here with {micro:,} images at once"
    finally:
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def step_time(computed: float, data: float, workers: int) -> float:
    """Seconds of a step, of those of its computation and those of making its images in one process.

    Loader processes work beside the computation, and on a CPU share its cores; without any, it waits for each image.
    """
    if not workers:
        return computed + data
    core_bound = 0.0 if on_gpu() else (computed * torch.get_num_threads() + data) / len(os.sched_getaffinity(0))
    return max(computed, data / workers, core_bound)


def free_memory() -> int:
    """Bytes that nobody uses, of this process's GPU or else of the machine."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return 1 << 32


class StepTimer:
    """A model, its optimizer and a batch on a device."""

    def __init__(self, recipe: "Recipe", model: Model, device: torch.device, micro: int):
        self.device, self.clip, self.micro = device, recipe.optim.clip, micro
        self.model, self.height_width = model.to(device), recipe.data.image_hw
        accelerator: Any = SimpleNamespace(
            device=device, state=None
        )  # in place of Accelerate's handle: no process is met
        pin_attention(recipe.attention, model, device, uses_bf16(recipe.precision), micro)
        prepare_model(model, accelerator, recipe.precision, recipe.compile, recipe.activation_checkpointing)
        self.optimizer = recipe.optim.build(model)

    def measure(self, max_images: int) -> TimedSteps:
        """Of a micro batch: of all its images on a GPU, on a CPU of at most `max_images`."""
        micro, previous = self.micro, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(3):  # compiles, and lets the allocator settle
                self.run_once(micro)
            passes, update = self.run_repeatedly(micro)
            return TimedSteps(passes, update, micro, torch.cuda.max_memory_allocated(self.device))
        images = min(2, micro)
        self.run_once(images)  # loads libraries, makes gradients and moments
        while images < min(micro, max_images) and 4 * self.run_once(images)[0] < MAX_PASS_SECONDS:
            previous, images = images, min(4 * images, micro, max_images)
        passes, update = self.run_repeatedly(images)
        if images == micro:
            return TimedSteps(passes, update, images, None)
        slope = (passes - self.run_repeatedly(previous)[0]) / (images - previous) if previous else passes / images
        return TimedSteps(passes + max(0.0, slope) * (micro - images), update, images, None)

    def run_repeatedly(self, images: int) -> tuple[float, float]:
        """Medians of what `run_once` takes."""
        deadline, timings = time.perf_counter() + MAX_SECONDS, [self.run_once(images)]
        while len(timings) < REPEATS and time.perf_counter() < deadline:
            timings.append(self.run_once(images))
        passes, updates = zip(*timings, strict=True)
        return statistics.median(passes), statistics.median(updates)

    def run_once(self, images: int) -> tuple[float, float]:
        """A step of one micro batch: seconds forward and backward, and of the update."""
        batch = self.batch(images)
        return self._time(lambda: self.model(batch).loss.backward()), self._time(self._update)

    def batch(self, images: int) -> Batch:
        """Invented images; what is in them does not matter to their time."""
        indices = torch.arange(images, device=self.device)
        shape = images, self.model.encoder.channels, *self.height_width
        return {
            "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device),
            "label": torch.zeros_like(indices),
            "seed": indices,
            "valid": torch.ones_like(indices, dtype=torch.bool),
        }

    def _update(self) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, float("inf") if self.clip is None else self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _time(self, work: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
