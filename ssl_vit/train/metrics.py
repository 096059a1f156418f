"""What a training measures of itself: norms, phases of time, FLOP/s, rows of metrics, health."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from ssl_vit.distributed import Distributed
from ssl_vit.encoders.layers import linear
from ssl_vit.model import Sums
from ssl_vit.rng import MASK64
from ssl_vit.runtime import on_gpu, peak_and_total_memory
from ssl_vit.train.hardware import spec_flops


def layer_name(name: str) -> str:
    """The layer of a parameter: its block, or else the part of encoder or head that it belongs to.

    `encoder.blocks.3.attn.qkv.weight` -> `encoder.blocks.03`; numbers have two digits, so that charts are in order.
    """
    parts = name.split(".")
    blocks = [i + 1 for i, part in enumerate(parts[:-1]) if part == "blocks"]
    digits = [i for i, part in enumerate(parts) if part.isdigit()]
    last = (blocks[-1:] or digits[:1] or [2 if parts[1] == "model" else 1])[0]
    return ".".join(part.zfill(2) if part.isdigit() else part for part in parts[: last + 1])


def squared_norms(tensors: Iterable[tuple[str, Tensor | None]], copies: int = 1) -> dict[str, Tensor]:
    """The sum of squares of this process's part of each layer, of which there are so many copies.

    Of tensors by parameter; None for those without.
    """
    by_layer: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors:
        if tensor is not None:
            by_layer[layer_name(name)].append(local_tensor(tensor))
    return {layer: get_total_norm(parts).double().square() / copies for layer, parts in by_layer.items()}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


PHASES = ("data", "forward", "backward", "update", "checkpoint", "other")


class Clock:
    """Seconds of each phase; what is in none of them is `other`."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = [("", self._now())]
        self._phase_stack = ["other"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is this phase's; a profile's trace shows it by this name."""
        self._marks.append((self._phase_stack[-1], self._now()))
        self._phase_stack.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._marks.append((self._phase_stack.pop(), self._now()))

    def fractions(self) -> dict[str, float]:
        """The share of each phase of the time so far; waits for the device."""
        self._marks.append((self._phase_stack[-1], self._now()))
        seconds: dict[str, float] = defaultdict(float)
        if on_gpu():
            self._marks[-1][1].synchronize()
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += start.elapsed_time(end) / 1e3 if on_gpu() else end - start
        total_seconds = sum(seconds.values()) or 1.0
        return {name: seconds[name] / total_seconds for name in PHASES}

    def _now(self) -> Any:
        if not on_gpu():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


PEAK_SECONDS = 0.1  # seconds of trying


@dataclass(frozen=True)
class PeakFlops:
    """FLOP/s of one device."""

    measured: float
    spec: float | None

    @classmethod
    def for_device(cls, device: torch.device, half: bool) -> "PeakFlops":
        """Of this process's device, in the precision of training."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(measure_peak_flops(device, half), spec_flops(name, half))

    def utilization(self, rate: float) -> dict[str, float]:
        """What share of them FLOP/s a device are: model FLOPs utilisation."""
        mfu = {"mfu": round(rate / self.measured, 4)}
        return mfu | ({"mfu_data_sheet": round(rate / self.spec, 4)} if self.spec else {})


def measure_peak_flops(device: torch.device, half: bool) -> float:
    """FLOP/s of the best of some products of large square matrices, in the precision of training."""
    side = 8192 if device.type == "cuda" else 1024  # 1.1 TFLOP, 2 GFLOP
    generator = torch.Generator(device).manual_seed(0)  # its own: a training's numbers stay what they are
    a = torch.randn(side, side, generator=generator, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    with torch.no_grad():
        while time.perf_counter() < end or best == float("inf"):  # the first one loads the library
            start = time.perf_counter()
            linear(a, a, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


HeadReport = Callable[[Sums, float], dict[str, float]]
"""A head's: sums and the weight they were summed over -> numbers."""


class StepMetrics:
    """What was summed since the last row of metrics.

    The sums travel in the checkpoint, so that a row is the same whether or not the run was stopped within it; the
    clocks do not, so that speed is that of this process.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.start_time = time.monotonic()
        self.clock = Clock()
        self.data_wait = 0.0
        self.num_images = 0
        self.label_counts: Tensor | None = None  # of all processes, when it was reported: how often each class was one

    def add(self, sums: Sums) -> None:
        """Add sums, wherever they are; nothing is read from the device."""
        for name, value in sums.items():
            value = value.detach()
            if value.is_floating_point():  # exact, so that it does not matter which process had which part
                value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def state_dict(self, processes: Distributed) -> Sums:
        """The sums over all processes, which call it together."""
        return processes.all_reduce(self.sums)

    def load_state_dict(self, sums: Sums, processes: Distributed) -> None:
        """Go on from sums over all processes: rank 0 keeps them, the others zeros."""
        local_sums = ((name, v if processes.is_main else torch.zeros_like(v)) for name, v in sums.items())
        self.sums = {name: value.to(processes.device) for name, value in local_sums}

    def report(
        self, processes: Distributed, head_report: HeadReport, flops_per_image: int, peak_flops: PeakFlops
    ) -> dict[str, Any]:
        """The row of metrics of these sums: what the head reports, then the loop's own.

        Time and memory are this process's.
        """
        sums = processes.all_reduce(self.sums)
        loop_sums = {name: sums.pop(name) for name in list(sums) if name.startswith("_")}
        self.label_counts = sums.get("histogram")
        seconds = time.monotonic() - self.start_time
        updates, skipped = float(loop_sums["_updates"]), float(loop_sums["_skipped"])
        images_per_second = self.num_images * processes.world / seconds
        return {
            **head_report(sums, max(1.0, float(loop_sums["_weight"]))),
            "grad_norm": float(loop_sums["_norm"]) / max(1.0, updates - skipped),
            "images_per_second": round(images_per_second, 2),
            "tflops": round(images_per_second * flops_per_image / 1e12, 6),
            **peak_flops.utilization(images_per_second * flops_per_image / processes.world),
            "data_wait": round(self.data_wait / seconds, 4),
            **{f"time_{name}": round(fraction, 4) for name, fraction in self.clock.fractions().items()},
            "peak_memory_gib": round(peak_and_total_memory()[0] / 2**30, 3),
            "skipped_updates": round(skipped / processes.world),
            "samples_digest": f"{int(loop_sums['_digest']) & MASK64:016x}",  # of (epoch, sample) pairs in any order
            "updates": round(updates / processes.world),
            **_norms_by_layer(loop_sums, "gradient"),
            **_norms_by_layer(loop_sums, "weight"),
        }


def _norms_by_layer(sums: dict[str, Tensor], kind: str) -> dict[str, dict[str, float]]:
    """Norms by layer, of which squares were summed; nothing under engines that do not tell."""
    layers = {name.removeprefix(f"_{kind}/"): value for name, value in sums.items() if name.startswith(f"_{kind}/")}
    norms = {layer: float(f"{math.sqrt(float(value)):.4g}") for layer, value in layers.items()}
    return {f"{kind}_norm_by_layer": norms} if norms else {}


COLLAPSED_FRACTION = 0.9  # share of the commonest label from which on its prediction teaches nothing
CHANCE_FRACTION = 0.98  # of the loss of a guess by frequency: nothing was learned
PATIENCE_STEPS = 500  # steps after the warm-up in which a loss should have left it
MAX_DATA_WAIT = 0.3  # of the time, from which on the loader is the limit
MIN_ROWS = 3  # in a row that have to show it, where one may be an accident
WORSE_FRACTION = 0.2  # of the best loss, or of what a guess costs: how much more it may be


class HealthMonitor:
    """Looks at one row after the other; `warmup` steps are not judged by their loss."""

    def __init__(self, warmup: int):
        self._first_checked_step = warmup + PATIENCE_STEPS
        self._reported: set[str] = set()
        self._streaks: dict[str, int] = {}  # rows in a row that showed it
        self._best_loss = math.inf
        self._num_bad = 0

    def check_row(self, row: dict[str, Any]) -> list[str]:
        """What is wrong by this row, and was not said before."""
        warnings = {}
        for name, min_rows, text in self.checks(row):
            self._streaks[name] = self._streaks.get(name, 0) + 1 if text else 0
            if text and self._streaks[name] >= min_rows and name not in self._reported:
                warnings[name] = f"step {row['step']}: {text}"
        self._reported |= set(warnings)
        self._best_loss = min(self._best_loss, math.inf if row.get("loss") is None else row["loss"])
        self._num_bad = row.get("bad_samples", 0)
        return list(warnings.values())

    def checks(self, row: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
        """Of each sign its name, how many rows in a row have to show it, and what to say; nothing where it is well."""
        step = row["step"]
        loss = math.inf if row.get("loss") is None else row["loss"]
        top_fraction = row.get("top_label", 0.0)
        text = (
            f"{top_fraction:.0%} of the patches have the same label, so there is little to learn: look at dry_run.png "
        )
        yield (
            "collapsed",
            1,
            f"{text}(dry_run=true), or take a finer target" if top_fraction > COLLAPSED_FRACTION else "",
        )

        baseline = row.get("unigram_entropy", row.get("variance", 0.0))  # of classified images none
        text = f"the loss, {loss:.3f}, is still that of guessing by frequency, {baseline:.3f}: "
        text += "another optim.lr, more warm-up, or something is wrong with the data"
        yield (
            "chance",
            1,
            text
            if step >= self._first_checked_step
            and loss > CHANCE_FRACTION * baseline > 0
            and top_fraction <= COLLAPSED_FRACTION
            else "",
        )

        data_wait = row.get("data_wait", 0.0)
        text = f"{data_wait:.0%} of the time is spent waiting for data: more data.workers, shards made with resize=, "
        yield "loader", MIN_ROWS, f"{text}or a faster disk" if data_wait > MAX_DATA_WAIT else ""

        is_worse = loss - self._best_loss > WORSE_FRACTION * max(self._best_loss, baseline or 1.0)
        text = f"the loss was {self._best_loss:.3f} and is {loss:.3f}: the learning rate may be too high; "
        yield "rate", MIN_ROWS, f"{text}a smaller optim.lr or optim.clip" if is_worse else ""

        num_bad = row.get("bad_samples", 0)
        text = f"bad samples keep coming, {num_bad:,} so far: they are listed in bad_samples-*.jsonl; "
        yield (
            "bad samples",
            MIN_ROWS,
            f"{text}tools/verify_shards.py says which shards" if num_bad > self._num_bad else "",
        )
