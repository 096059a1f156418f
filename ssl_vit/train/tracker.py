"""What a run tells while it trains: metrics.jsonl, TensorBoard by Accelerate, a progress bar."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_vit.durable import write_bytes
from ssl_vit.train.run import none_for_nan

if TYPE_CHECKING:
    from accelerate import Accelerator

TrackerName = Literal["tensorboard", "none"]
COLLAPSED = 0.9  # share of the commonest label from which on its prediction teaches nothing
SHOWN = ("loss", "accuracy", "top1", "images_per_second", "val_loss", "val_accuracy", "val_top1")


class Tracker:
    """Writes on the main process, does nothing on the others."""

    def __init__(self, accelerator: "Accelerator", folder: Path, start: int, steps: int, quiet: bool):
        self.active = accelerator.is_main_process
        self._accelerator = accelerator
        self._path = folder / "metrics.jsonl"
        self._bar = None
        self._lines = False
        self._collapsed = False
        accelerator.trackers.clear()  # of an earlier training in this process: rows would go to its folder too
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start + 1}})
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

    def row(self, values: dict[str, Any], seconds_left: float) -> None:
        """One log step: `values` holds `step` and numbers."""
        if not self.active:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({name: none_for_nan(value) for name, value in values.items()}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a write names no file
        step = values["step"]
        if values.get("top_label", 0.0) > COLLAPSED and not self._collapsed:
            self._collapsed = True
            share, cure = f"{values['top_label']:.0%}", "look at first_batch.png (dry_run=true), or take a finer target"
            print(
                f"step {step}: {share} of the patches have the same label, so there is little to learn: {cure}",
                flush=True,
            )
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        self._accelerator.log({_group(name): value for name, value in numbers.items()}, step=step)
        shown = {name: f"{values[name]:.4g}" for name in SHOWN if name in values}
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif self._lines:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}  {text}  left {seconds_left:.0f} s", file=sys.stderr, flush=True)

    def picture(self, name: str, image: Tensor, step: int, folder: Path) -> None:
        """A picture uint8 [3, h, w]: for TensorBoard, and the newest as a PNG in the run's folder."""
        if not self.active:
            return
        write_png(image, folder / f"{name}.png")
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, image.cpu(), step)

    def close(self) -> None:
        """Flush and end."""
        if self._bar is not None:
            self._bar.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _group(name: str) -> str:
    """TensorBoard groups by the part before the slash."""
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


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


def write_png(image: Tensor, path: Path) -> None:
    """Write a picture uint8 [3, h, w]."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
