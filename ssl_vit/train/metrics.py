"""What a training measures of itself: norms, phases of time, FLOP/s, rows of metrics, health."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from ssl_vit.distributed import total
from ssl_vit.encoders.layers import linear
from ssl_vit.rng import WORD
from ssl_vit.runtime import memory, on_gpu
from ssl_vit.train.hardware import data_sheet

if TYPE_CHECKING:
    from accelerate import Accelerator


def layer_of(name: str) -> str:
    """The layer of a parameter: its block, or else the part of encoder or head that it belongs to.

    `encoder.blocks.3.attn.qkv.weight` -> `encoder.blocks.03`; numbers have two digits, so that charts are in order.
    """
    parts = name.split(".")
    blocks = [i + 1 for i, part in enumerate(parts[:-1]) if part == "blocks"]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    last = (blocks[-1:] or numbers[:1] or [2 if parts[1] == "model" else 1])[0]
    return ".".join(part.zfill(2) if part.isdigit() else part for part in parts[: last + 1])


def squares(tensors: Iterable[tuple[str, Tensor | None]], copies: int = 1) -> dict[str, Tensor]:
    """The sum of squares of this process's part of each layer, of which there are so many copies.

    Of tensors by parameter; None for those without.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors:
        if tensor is not None:
            found[layer_of(name)].append(local(tensor))
    return {layer: get_total_norm(parts).double().square() / copies for layer, parts in found.items()}


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


PHASES = ("data", "forward", "backward", "update", "checkpoint", "other")


class Clock:
    """Seconds of each phase; what is in none of them is `other`."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = [("", self._now())]
        self._within = ["other"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is this phase's; a profile's trace shows it by this name."""
        self._marks.append((self._within[-1], self._now()))
        self._within.append(name)
        try:
            with record_function(name):
                yield
        finally:
            self._marks.append((self._within.pop(), self._now()))

    def shares(self) -> dict[str, float]:
        """The share of each phase of the time so far; waits for the device."""
        self._marks.append((self._within[-1], self._now()))
        seconds: dict[str, float] = defaultdict(float)
        if on_gpu():
            self._marks[-1][1].synchronize()
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += before.elapsed_time(after) / 1e3 if on_gpu() else after - before
        whole = sum(seconds.values()) or 1.0
        return {name: seconds[name] / whole for name in PHASES}

    def _now(self) -> Any:
        if not on_gpu():
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark


LASTING = 0.1  # seconds of trying


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device."""

    measured: float
    sheet: float | None

    @classmethod
    def of(cls, device: torch.device, half: bool) -> "Peak":
        """Of this process's device, in the precision of training."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(measured(device, half), data_sheet(name, half))

    def shares(self, rate: float) -> dict[str, float]:
        """What share of them FLOP/s a device are: model FLOPs utilisation."""
        found = {"mfu": round(rate / self.measured, 4)}
        return found | ({"mfu_data_sheet": round(rate / self.sheet, 4)} if self.sheet else {})


def measured(device: torch.device, half: bool) -> float:
    """FLOP/s of the best of some products of large square matrices, in the precision of training."""
    side = 8192 if device.type == "cuda" else 1024  # 1.1 TFLOP, 2 GFLOP
    random = torch.Generator(device).manual_seed(0)  # its own: a training's numbers stay what they are
    a = torch.randn(side, side, generator=random, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best, end = float("inf"), time.perf_counter() + LASTING
    with torch.no_grad():
        while time.perf_counter() < end or best == float("inf"):  # the first one loads the library
            began = time.perf_counter()
            linear(a, a, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


Report = Callable[[dict[str, Tensor], float], dict[str, float]]
"""A head's: sums and the weight they were summed over -> numbers."""


class Window:
    """What was summed since the last row of metrics.

    The sums travel in the checkpoint, so that a row is the same whether or not the run was stopped within it; the
    clocks do not, so that speed is that of this process.
    """

    def __init__(self, sums: dict[str, Tensor] | None = None):
        self.sums: dict[str, Tensor] = sums or {}
        self.began = time.monotonic()
        self.clock = Clock()
        self.waited = 0.0
        self.images = 0
        self.labels: Tensor | None = None  # of all processes, when it was reported: how often each class was one

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add sums, wherever they are; nothing is read from the device."""
        for name, value in sums.items():
            value = value.detach()
            if value.is_floating_point():  # exact, so that it does not matter which process had which part
                value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def report(self, accelerator: "Accelerator", head: Report, flops: int, peak: Peak) -> dict[str, Any]:
        """The row of metrics of these sums: what the head reports of its own, then the loop's; `flops` an image.

        Time and memory are this process's.
        """
        sums = total(accelerator, self.sums)
        own = {name: sums.pop(name) for name in list(sums) if name.startswith("_")}
        self.labels = sums.get("histogram")
        seconds = time.monotonic() - self.began
        updates, skipped = float(own["_updates"]), float(own["_skipped"])
        speed = self.images * accelerator.num_processes / seconds
        return {
            **head(sums, max(1.0, float(own["_weight"]))),
            "grad_norm": float(own["_norm"]) / max(1.0, updates - skipped),
            "images_per_second": round(speed, 2),
            "tflops": round(speed * flops / 1e12, 6),
            **peak.shares(speed * flops / accelerator.num_processes),
            "data_wait": round(self.waited / seconds, 4),
            **{f"time_{name}": round(share, 4) for name, share in self.clock.shares().items()},
            "peak_memory_gib": round(memory()[0] / 2**30, 3),
            "skipped_updates": round(skipped / accelerator.num_processes),
            "samples_digest": f"{int(own['_digest']) & WORD:016x}",  # of the (epoch, sample) pairs, in any order
            "updates": round(updates / accelerator.num_processes),
            **_norms(own, "gradient"),
            **_norms(own, "weight"),
        }


def _norms(own: dict[str, Tensor], kind: str) -> dict[str, dict[str, float]]:
    """Norms by layer, of which squares were summed; nothing under engines that do not tell."""
    layers = {name.removeprefix(f"_{kind}/"): value for name, value in own.items() if name.startswith(f"_{kind}/")}
    norms = {layer: float(f"{math.sqrt(float(value)):.4g}") for layer, value in layers.items()}
    return {f"{kind}_norm_by_layer": norms} if norms else {}


COLLAPSED = 0.9  # share of the commonest label from which on its prediction teaches nothing
CHANCE = 0.98  # of the loss of a guess by frequency: nothing was learned
PATIENCE = 500  # steps after the warm-up in which a loss should have left it
WAITING = 0.3  # of the time, from which on the loader is the limit
ROWS = 3  # in a row that have to show it, where one may be an accident
WORSE = 0.2  # of the best loss, or of what a guess costs: how much more it may be


class Health:
    """Looks at one row after the other; `warmup` steps are not judged by their loss."""

    def __init__(self, warmup: int):
        self._settled = warmup + PATIENCE
        self._said: set[str] = set()
        self._signs: dict[str, int] = {}  # rows in a row that showed it
        self._best = math.inf
        self._bad = 0

    def look(self, row: dict[str, Any]) -> list[str]:
        """What is wrong by this row, and was not said before."""
        found = {}
        for name, rows, text in self._signs_of(row):
            self._signs[name] = self._signs.get(name, 0) + 1 if text else 0
            if text and self._signs[name] >= rows and name not in self._said:
                found[name] = f"step {row['step']}: {text}"
        self._said |= set(found)
        self._best = min(self._best, math.inf if row.get("loss") is None else row["loss"])
        self._bad = row.get("bad_samples", 0)
        return list(found.values())

    def _signs_of(self, row: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
        """Of each sign its name, how many rows in a row have to show it, and what to say; nothing where it is well."""
        step = row["step"]
        loss = math.inf if row.get("loss") is None else row["loss"]
        same = row.get("top_label", 0.0)
        text = f"{same:.0%} of the patches have the same label, so there is little to learn: look at dry_run.png "
        yield "collapsed", 1, f"{text}(dry_run=true), or take a finer target" if same > COLLAPSED else ""

        guess = row.get("unigram_entropy", row.get("variance", 0.0))  # of classified images none
        text = f"the loss, {loss:.3f}, is still that of guessing by frequency, {guess:.3f}: "
        text += "another optim.lr, more warm-up, or something is wrong with the data"
        yield "chance", 1, text if step >= self._settled and loss > CHANCE * guess > 0 and same <= COLLAPSED else ""

        waits = row.get("data_wait", 0.0)
        text = f"{waits:.0%} of the time is spent waiting for data: more data.workers, shards made with resize=, "
        yield "loader", ROWS, f"{text}or a faster disk" if waits > WAITING else ""

        worse = loss - self._best > WORSE * max(self._best, guess or 1.0)
        text = f"the loss was {self._best:.3f} and is {loss:.3f}: the learning rate may be too high; "
        yield "rate", ROWS, f"{text}a smaller optim.lr or optim.clip" if worse else ""

        bad = row.get("bad_samples", 0)
        text = f"bad samples keep coming, {bad:,} so far: they are listed in bad_samples-*.jsonl; "
        yield "bad samples", ROWS, f"{text}tools/verify_shards.py says which shards" if bad > self._bad else ""
