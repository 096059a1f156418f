"""Where a training's numbers go: the screen, metrics.jsonl, trackers, a profile."""

import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import annotate_os_error, write_bytes
from ssl_vit.report.format import format_duration, format_metric
from ssl_vit.report.page import encode_png
from ssl_vit.train.metrics import HealthMonitor
from ssl_vit.train.run_folder import none_for_nan

if TYPE_CHECKING:
    from accelerate import Accelerator

SCREEN_COLUMNS = {  # of a row on the screen
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

    def __init__(
        self, accelerator: "Accelerator", folder: Path, start: int, steps: int, quiet: bool, health: HealthMonitor
    ):
        self.active = accelerator.is_main_process
        self._accelerator = accelerator
        self._path = folder / "metrics.jsonl"
        self._health = health
        self._bar = None
        self._prints_lines = False
        start_trackers(accelerator, folder, start)
        if self.active:
            self._prints_lines = not quiet and not sys.stderr.isatty()
            if not quiet and not self._prints_lines:
                self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def print_message(self, text: str) -> None:
        """A line between the others, where there is progress to see."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._prints_lines:
            print(text, file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def log_row(self, values: dict[str, Any], labels: Tensor | None, seconds_left: float) -> None:
        """One log step: `values` holds `step`, numbers, and by layer numbers; `labels` [classes] how often each was."""
        if not self.active:
            return
        step = values["step"]
        values = none_for_nan(values)
        with annotate_os_error(self._path), self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._accelerator.log(dict(_scalars(values)), step=step)
        if labels is not None:
            log_histogram(self._accelerator, "labels", labels, step)
        columns = "  ".join(
            f"{SCREEN_COLUMNS[name]} {format_metric(name, values[name])}"
            for name in SCREEN_COLUMNS
            if values.get(name) is not None
        )
        if self._bar is not None:
            self._bar.set_postfix_str(columns)
        elif self._prints_lines:
            print(f"step {step}  {columns}  left {format_duration(seconds_left)}", file=sys.stderr, flush=True)
        for warning in self._health.check_row(values):
            self.warn(warning, step)

    def warn(self, text: str, step: int) -> None:
        """Words that are to be read, also where progress is not wanted."""
        log_text(self._accelerator, "warnings", text, step)
        if self._bar is not None:
            self._bar.clear()
        print(f"warning: {text}", flush=True)

    def log_picture(self, name: str, image: Tensor, step: int, folder: Path) -> None:
        """A picture uint8 [3, h, w]: for the tracker, and the newest as a PNG in the run's folder."""
        if self.active:
            path = folder / f"{name}.png"
            write_bytes(path, encode_png(image))
            log_image(self._accelerator, name, image, path, step)

    def close(self) -> None:
        """Flush and end."""
        if self._bar is not None:
            self._bar.close()
        end_trackers(self._accelerator)


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row by the names of their charts, which are grouped by what is before the slash."""
    for name, value in row.items():
        if isinstance(value, dict):
            group = name.removesuffix("_by_layer")
            yield from ((f"{group}/{layer}", number) for layer, number in value.items() if number is not None)
        elif isinstance(value, int | float) and name != "step":
            yield (f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"), value


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop the rows after the step that a run goes on from, which will be written again, and torn ones."""
    path = folder / "metrics.jsonl"
    if path.exists():
        rows = [line for line in _read_lines(path) if _parse_step(line) in range(1, step + 1)]
        write_bytes(path, "".join(row + "\n" for row in rows).encode())


def read_row(folder: Path, step: int) -> dict[str, Any] | None:
    """The row of a step in a run's metrics; None where it was not written, or torn."""
    path = folder / "metrics.jsonl"
    return (
        next((json.loads(line) for line in _read_lines(path) if _parse_step(line) == step), None)
        if path.exists()
        else None
    )


def find_best_row(folder: Path, name: str | None) -> dict[str, Any] | None:
    """The row of a run's metrics in which a value is best, the first of equals; a loss is best where it is least."""
    path = folder / "metrics.jsonl"
    if name is None or not path.exists():
        return None
    rows = [json.loads(line) for line in _read_lines(path) if _parse_step(line)]
    rows = [row for row in rows if isinstance(row.get(name), int | float)]
    return max(rows, key=lambda row: -row[name] if "loss" in name else row[name], default=None)


def _read_lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _parse_step(line: str) -> int:
    """A row's step, or 0 for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


TrackerName = Literal["tensorboard", "wandb", "mlflow", "none"]
PROJECT = "ssl_vit"
BASELINES = "loss|uniform|unigram_entropy|neighbor_loss|variance"
CUSTOM_SCALARS = {  # of TensorBoard's tab Custom Scalars: what belongs into one chart
    "loss": {
        "training, beside what it costs to guess": ["Multiline", [f"train/({BASELINES})$"]],
        "validation, beside what it costs to guess": ["Multiline", [f"val/({BASELINES})$"]],
    },
    "accuracy": {"beside that of copying neighbors": ["Multiline", ["(train|val)/(neighbor_)?accuracy$"]]},
    "time": {"shares of the step": ["Multiline", ["train/(time_.*|data_wait)$"]]},
    "norms by layer": {
        "gradients": ["Multiline", ["gradient_norm/.*"]],
        "weights": ["Multiline", ["weight_norm/.*"]],
    },
}


def check_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is missing, which Accelerate would pass over in silence."""
    package = {"none": "torch"}.get(name, name)
    if importlib.util.find_spec(package) is None:
        raise ExitError(
            ExitCode.USAGE, f"tracker={name}: the package is missing: pip install 'ssl_vit[{name}]', or another tracker"
        )


def start_trackers(accelerator: "Accelerator", folder: Path, step: int) -> None:
    """Have the tracker go on after a step; of the run of a folder there is one, however often it is started."""
    name = str(next(iter(accelerator.log_with), "none"))
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if name == "tensorboard":
        accelerator.init_trackers("tensorboard", init_kwargs={name: {"purge_step": step + 1}})
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            tracker.writer.add_custom_scalars(CUSTOM_SCALARS)
    elif name == "wandb":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = {"silent": True, "console": "off", "disable_git": True, "x_disable_meta": True}
        options = {"name": folder.name, "dir": str(folder), "id": run_id, "resume": "allow", "settings": settings}
        _init_tracker(accelerator, name, options)
    elif name == "mlflow":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            import mlflow

            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which that sets, and the next training of a sweep would take
        run_id_path = folder / "mlflow_run"
        _init_tracker(
            accelerator,
            name,
            {"run_name": folder.name, "run_id": run_id_path.read_text() if run_id_path.exists() else None},
        )
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            write_bytes(run_id_path, tracker.tracker.info.run_id.encode())


def end_trackers(accelerator: "Accelerator") -> None:
    """Flush and end; the next training of this process begins with its own."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def _init_tracker(accelerator: "Accelerator", name: str, options: dict[str, Any]) -> None:
    stdin, sys.stdin = sys.stdin, io.StringIO()  # which nobody can be asked at: W&B would wait for a key
    try:
        accelerator.init_trackers(PROJECT, init_kwargs={name: options})
    except Exception as error:  # of their own kinds: no key, no server
        accelerator.trackers.clear()  # else it would be ended, which never began
        text = " ".join(str(error).split())[:200]
        hint = "log in, or WANDB_MODE=offline" if name == "wandb" else "see MLFLOW_TRACKING_URI"
        raise ExitError(ExitCode.USAGE, f"tracker={name} cannot begin ({text}): {hint}, or another tracker") from error
    finally:
        sys.stdin = stdin


def log_histogram(accelerator: "Accelerator", name: str, counts: Tensor, step: int) -> None:
    """How often each of K classes was a label, counts [K], for TensorBoard."""
    for tracker in _tensorboard_trackers(accelerator):
        values = counts.double().cpu().numpy()
        bins = np.arange(len(values), dtype=float)
        moments = {"sum": float(values @ bins), "sum_squares": float(values @ bins**2)}
        edges = (bins + 0.5).tolist()
        tracker.writer.add_histogram_raw(
            name, 0.0, float(len(values) - 1), float(values.sum()), **moments,
            bucket_limits=edges, bucket_counts=values.tolist(), global_step=step,
        )  # fmt: skip


def log_image(accelerator: "Accelerator", name: str, image: Tensor, path: Path, step: int) -> None:
    """A picture uint8 [3, h, w], which is also at `path`, for TensorBoard and Weights & Biases."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, image.cpu().numpy(), step)
        elif tracker.name == "wandb":  # copies it; of numbers it would make a file in a folder that forks remove
            tracker.log_images({name: [str(path)]}, step=step)


def log_text(accelerator: "Accelerator", name: str, text: str, step: int) -> None:
    """Words, for TensorBoard."""
    for tracker in _tensorboard_trackers(accelerator):
        tracker.writer.add_text(name, text, step)


def _tensorboard_trackers(accelerator: "Accelerator") -> list[Any]:
    return [tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"]


PROFILE_WARMUP, PROFILE_STEPS = 3, 5  # of this start: those before it warm up, and those that are traced
PROFILE_ROWS = 40


class Profile:
    """Traces steps FIRST + 1 to FIRST + STEPS of a start; told of each step's end, on the main process."""

    def __init__(self, folder: Path):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of which GPU it did not find, and such
        self._folder, self._steps = folder, 0
        self._trace: Any = None

    def advance(self) -> None:
        """One step is done."""
        self._steps += 1
        if self._steps == PROFILE_WARMUP:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._trace.start()
        elif self._steps == PROFILE_WARMUP + PROFILE_STEPS:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was: table.txt and trace.json.gz."""
        trace, self._trace, steps = self._trace, None, self._steps - PROFILE_WARMUP
        if trace is not None:
            trace.stop()
        if steps <= 0:
            print(f"profile: nothing was traced, which begins after {PROFILE_WARMUP} steps of a start", flush=True)
        if trace is None or steps <= 0:
            return
        self._folder.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self._folder / "trace.json.gz"))
        sort_key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=sort_key, row_limit=PROFILE_ROWS, max_name_column_width=60)
        write_bytes(self._folder / "table.txt", f"{steps} steps\n{table}".encode())
        print(f"profile: {steps} steps in {self._folder}: table.txt, trace.json.gz (ui.perfetto.dev)", flush=True)
