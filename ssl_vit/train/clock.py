"""Where the time of a training goes, by the device's own clock, which is not waited for before a row is due."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from ssl_vit.train.environment import on_gpu

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
