"""What a run tells while it trains: metrics.jsonl, a tracker's curves and pictures, a progress bar, warnings."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from ssl_vit.durable import named, write_bytes
from ssl_vit.heads.panel import png
from ssl_vit.train import trackers
from ssl_vit.train.health import Health
from ssl_vit.train.run import none_for_nan

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = {  # of a row on the screen
    "loss": "loss",
    "accuracy": "accuracy",
    "top1": "top1",
    "images_per_second": "images/s",
    "data_wait": "waiting",
    "val_loss": "val_loss",
    "val_accuracy": "val_accuracy",
    "val_top1": "val_top1",
}


class Tracker:
    """Writes on the main process, does nothing on the others."""

    def __init__(self, accelerator: "Accelerator", folder: Path, start: int, steps: int, quiet: bool, health: Health):
        self.active = accelerator.is_main_process
        self._accelerator = accelerator
        self._path = folder / "metrics.jsonl"
        self._health = health
        self._bar = None
        self._lines = False
        trackers.start(accelerator, folder, start)
        if self.active:
            self._lines = not quiet and not sys.stderr.isatty()
            if not quiet and not self._lines:
                self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line between the others, where there is progress to see."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def row(self, values: dict[str, Any], labels: Tensor | None, seconds_left: float) -> None:
        """One log step: `values` holds `step`, numbers, and by layer numbers; `labels` [classes] how often each was."""
        if not self.active:
            return
        step = values["step"]
        values = none_for_nan(values)
        with named(self._path), self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._accelerator.log(dict(_numbers(values)), step=step)
        if labels is not None:
            trackers.histogram(self._accelerator, "labels", labels, step)
        shown = "  ".join(
            f"{SHOWN[name]} {_short(name, values[name])}" for name in SHOWN if values.get(name) is not None
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        elif self._lines:
            print(f"step {step}  {shown}  left {_duration(seconds_left)}", file=sys.stderr, flush=True)
        for warning in self._health.look(values):
            self.warn(warning, step)

    def warn(self, text: str, step: int) -> None:
        """Words that are to be read, also where progress is not wanted."""
        trackers.text(self._accelerator, "warnings", text, step)
        if self._bar is not None:
            self._bar.clear()
        print(f"warning: {text}", flush=True)

    def picture(self, name: str, image: Tensor, step: int, folder: Path) -> None:
        """A picture uint8 [3, h, w]: for the tracker, and the newest as a PNG in the run's folder."""
        if self.active:
            path = folder / f"{name}.png"
            write_bytes(path, png(image))
            trackers.picture(self._accelerator, name, image, path, step)

    def close(self) -> None:
        """Flush and end."""
        if self._bar is not None:
            self._bar.close()
        trackers.end(self._accelerator)


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row by the names of their charts, which are grouped by what is before the slash."""
    for name, value in row.items():
        if isinstance(value, dict):
            group = name.removesuffix("_by_layer")
            yield from ((f"{group}/{layer}", number) for layer, number in value.items() if number is not None)
        elif isinstance(value, int | float) and name != "step":
            yield (f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"), value


def _short(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "data_wait" else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 7 h 05 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def rewind(folder: Path, step: int) -> None:
    """Drop the rows after the step that a run goes on from, which will be written again, and torn ones."""
    path = folder / "metrics.jsonl"
    if path.exists():
        rows = [line for line in _lines(path) if _step(line) in range(1, step + 1)]
        write_bytes(path, "".join(row + "\n" for row in rows).encode())


def row_of(folder: Path, step: int) -> dict[str, Any] | None:
    """The row of a step in a run's metrics; None where it was not written, or torn."""
    path = folder / "metrics.jsonl"
    return next((json.loads(line) for line in _lines(path) if _step(line) == step), None) if path.exists() else None


def best_row(folder: Path, name: str | None) -> dict[str, Any] | None:
    """The row of a run's metrics in which a value is best, the first of equals; a loss is best where it is least."""
    path = folder / "metrics.jsonl"
    if name is None or not path.exists():
        return None
    rows = [json.loads(line) for line in _lines(path) if _step(line)]
    rows = [row for row in rows if isinstance(row.get(name), int | float)]
    return max(rows, key=lambda row: -row[name] if "loss" in name else row[name], default=None)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _step(line: str) -> int:
    """A row's step, or 0 for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
