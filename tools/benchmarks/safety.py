"""What it costs to be safe: a run as any other, in which the calls that only safety needs are timed.

Shares are of the time between two checkpoints, each of which is one measurement; the first, which warms up, is left
out. On a GPU a call may wait for work that has to be done anyway: there the shares are upper bounds.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from pydantic import Field

from ssl_vit import recipes
from ssl_vit.commands import pretrain
from ssl_vit.distributed import StopSignal
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.runtime import current_engine, world_size
from ssl_vit.train import loop
from ssl_vit.train.anomalies import AnomalyGuard, BadDataGuard
from ssl_vit.train.watchdog import Watchdog

PARTS: dict[str, tuple[Any, str]] = {
    "checkpoints": (loop, "save"),
    "comparing the processes' weights": (loop, "check_replicas"),
    "agreeing on signals": (StopSignal, "stop_requested"),
    "judging loss and gradient norm": (AnomalyGuard, "check"),
    "counting bad samples": (BadDataGuard, "check"),
    "the watchdog's heartbeats": (Watchdog, "heartbeat"),
}


class Options(recipes.Pretrain):
    """A recipe, which runs for `steps` steps; its checkpoints cut them into measurements."""

    output: str = Field(default="runs/benchmark", description="folder for the JSON")


class Clock:
    """Seconds of each part, by the number of the checkpoint that ends its interval."""

    def __init__(self, save_every: int):
        self.save_every, self.steps, self.inside = save_every, 0, False
        self.seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def wrap(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, its time noted; what runs within another part counts as that one's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside and name != "all":
                return work(*args, **kwargs)
            self.inside, start = name != "all", time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds[name][self.steps // self.save_every] += time.perf_counter() - start
                self.inside = False
                self.steps += name == "all"

        return run


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each part, and one for all of them."""
    if options.steps < 3 * options.save_every:
        raise ExitError(ExitCode.USAGE, f"steps={options.steps}: at least three times save_every={options.save_every}")
    clock = Clock(options.save_every)
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, clock.wrap(name, getattr(owner, method)))
    loop.train_step = clock.wrap("all", loop.train_step)
    pretrain.run(options)
    intervals = range(1, options.steps // options.save_every)
    parts = {name: [clock.seconds[name][k] / clock.seconds["all"][k] for k in intervals] for name in PARTS}
    parts["all of it"] = [sum(shares) for shares in zip(*parts.values(), strict=True)]
    case = f"{current_engine()}, {world_size()} processes, save_every={options.save_every}"
    step = median(clock.seconds["all"][k] / options.save_every for k in intervals)
    return [
        {
            "benchmark": "safety",
            "case": case,
            "who": name,
            "share": median(shares),
            "least": min(shares),
            "most": max(shares),
            "intervals": len(intervals),
            "step_ms": 1e3 * step,
        }
        for name, shares in parts.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The shares in per cent, and their spread."""
    head = f"{rows[0]['case']}, {rows[0]['step_ms']:.1f} ms a step, {rows[0]['intervals']} intervals; % of the time"
    lines = [f"{row['who']:<34}{row['share']:8.3%}  ({row['least']:.3%} to {row['most']:.3%})" for row in rows]
    return "\n".join([head, *lines])
