"""Where metrics go beside metrics.jsonl, by Accelerate's trackers: TensorBoard, Weights & Biases, MLflow.

Nothing leaves the machine unless it is asked to: TensorBoard and MLflow write into the run's folder, and what the
libraries would tell their makers is switched off; tracker=wandb sends, unless WANDB_MODE=offline is set.
"""

import hashlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ssl_vit.durable import write_bytes
from ssl_vit.exits import USAGE, Refusal

if TYPE_CHECKING:
    from accelerate import Accelerator

TrackerName = Literal["tensorboard", "wandb", "mlflow", "none"]
PROJECT = "ssl_vit"
BASELINES = "loss|uniform|unigram_entropy|neighbour_loss|variance"
LAYOUT = {  # of TensorBoard's tab Custom Scalars: what belongs into one chart
    "loss": {
        "training, beside what it costs to guess": ["Multiline", [f"train/({BASELINES})$"]],
        "validation, beside what it costs to guess": ["Multiline", [f"val/({BASELINES})$"]],
    },
    "accuracy": {"beside that of copying neighbours": ["Multiline", ["(train|val)/(neighbour_)?accuracy$"]]},
    "time": {"shares of the step": ["Multiline", ["train/(time_.*|data_wait)$"]]},
    "norms by layer": {
        "gradients": ["Multiline", ["gradient_norm/.*"]],
        "weights": ["Multiline", ["weight_norm/.*"]],
    },
}


def check(name: TrackerName) -> None:
    """Refuse a tracker whose package is missing, which Accelerate would pass over in silence."""
    package = {"none": "torch"}.get(name, name)
    if importlib.util.find_spec(package) is None:
        raise Refusal(
            USAGE, f"tracker={name}: the package is missing: pip install 'ssl_vit[{name}]', or another tracker"
        )


def start(accelerator: "Accelerator", folder: Path, step: int) -> None:
    """Have the tracker go on after a step; of the run of a folder there is one, however often it is started."""
    name = str(next(iter(accelerator.log_with), "none"))
    same = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if name == "tensorboard":
        accelerator.init_trackers("tensorboard", init_kwargs={name: {"purge_step": step + 1}})
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            tracker.writer.add_custom_scalars(LAYOUT)
    elif name == "wandb":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = {"silent": True, "console": "off", "disable_git": True, "x_disable_meta": True}
        options = {"name": folder.name, "dir": str(folder), "id": same, "resume": "allow", "settings": settings}
        _begin(accelerator, name, options)
    elif name == "mlflow":
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            import mlflow

            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which that sets, and the next training of a sweep would take
        known = folder / "mlflow_run"
        _begin(accelerator, name, {"run_name": folder.name, "run_id": known.read_text() if known.exists() else None})
        for tracker in accelerator.trackers if accelerator.is_main_process else ():
            write_bytes(known, tracker.tracker.info.run_id.encode())


def end(accelerator: "Accelerator") -> None:
    """Flush and end; the next training of this process begins with its own."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def _begin(accelerator: "Accelerator", name: str, options: dict[str, Any]) -> None:
    terminal, sys.stdin = sys.stdin, io.StringIO()  # which nobody can be asked at: W&B would wait for a key
    try:
        accelerator.init_trackers(PROJECT, init_kwargs={name: options})
    except Exception as error:  # of their own kinds: no key, no server
        accelerator.trackers.clear()  # else it would be ended, which never began
        text = " ".join(str(error).split())[:200]
        cure = "log in, or WANDB_MODE=offline" if name == "wandb" else "see MLFLOW_TRACKING_URI"
        raise Refusal(USAGE, f"tracker={name} cannot begin ({text}): {cure}, or another tracker") from error
    finally:
        sys.stdin = terminal


def histogram(accelerator: "Accelerator", name: str, counts: Tensor, step: int) -> None:
    """How often each of K classes was a label, counts [K], for TensorBoard."""
    for tracker in _boards(accelerator):
        number = counts.double().cpu().numpy()
        at = np.arange(len(number), dtype=float)
        moments = {"sum": float(number @ at), "sum_squares": float(number @ at**2)}
        edges = (at + 0.5).tolist()
        tracker.writer.add_histogram_raw(
            name, 0.0, float(len(number) - 1), float(number.sum()), **moments,
            bucket_limits=edges, bucket_counts=number.tolist(), global_step=step,
        )  # fmt: skip


def picture(accelerator: "Accelerator", name: str, image: Tensor, path: Path, step: int) -> None:
    """A picture uint8 [3, h, w], which is also at `path`, for TensorBoard and Weights & Biases."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, image.cpu().numpy(), step)
        elif tracker.name == "wandb":  # copies it; of numbers it would make a file in a folder that forks remove
            tracker.log_images({name: [str(path)]}, step=step)


def text(accelerator: "Accelerator", name: str, words: str, step: int) -> None:
    """Words, for TensorBoard."""
    for tracker in _boards(accelerator):
        tracker.writer.add_text(name, words, step)


def _boards(accelerator: "Accelerator") -> list[Any]:
    return [tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"]
