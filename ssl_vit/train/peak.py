"""What the machine could do: a large matrix product, measured, and what the data sheet promises."""

import time
from dataclasses import dataclass

import torch

from ssl_vit.encoders.linear import linear
from ssl_vit.gpus import data_sheet

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
