"""What a run sums between two rows of metrics, and the row it makes of it."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssl_vit.counter import WORD
from ssl_vit.train.clock import Clock
from ssl_vit.train.distributed import total
from ssl_vit.train.environment import memory
from ssl_vit.train.peak import Peak

if TYPE_CHECKING:
    from accelerate import Accelerator

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
