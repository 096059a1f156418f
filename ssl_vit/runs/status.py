"""Where a run stands, by its files alone: its state, and its best metrics."""

import json
import math
import os
import re
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssl_vit import config
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.report.format import format_age
from ssl_vit.train.run_folder import lock_holder

SPEED_ROWS = 10  # rows whose median is the speed
EVALUATION_MARKERS = (b'"val_', b'"knn_top1"')  # what a row with an evaluation holds
RANKED_METRICS = re.compile(r"val_(loss|accuracy|top1|top5)|knn_top1|few_shot_\d+")
METRIC_ORDER = ("knn_top1", "val_top1", "val_loss", "val_accuracy")  # the one that says most first


@dataclass(frozen=True)
class BestMetric:
    """The best value of something that was measured, and at which step or with which deviation over seeds."""

    metric: str
    value: float
    step: int | None = None
    sd: float | None = None

    def __str__(self) -> str:
        if "loss" in self.metric:
            text = f"{self.metric} {self.value:#.4g}".rstrip(".")
        else:
            text = f"{self.metric} {self.value:.2%}" + ("" if self.sd is None else f" ± {100 * self.sd:.2f}")
        return text + ("" if self.step is None else f" @{self.step:,}")


def read_rows(folder: Path, all_rows: bool = True) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first, without torn ones; or those with an evaluation and the last few."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError:
        return []
    first_recent = len(lines) - SPEED_ROWS - 1  # one may be torn
    if not all_rows:
        lines = [
            line
            for i, line in enumerate(lines)
            if i >= first_recent or any(marker in line for marker in EVALUATION_MARKERS)
        ]
    return [row for line in lines if (row := _row(line))]


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def finite_number(row: dict[str, Any], name: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return value


def best_of_rows(rows: list[dict[str, Any]]) -> list[BestMetric]:
    """The best of each measure over the evaluations, the first of equals."""
    best: dict[str, BestMetric] = {}
    for row in rows:
        for name in filter(RANKED_METRICS.fullmatch, row):
            value, sign = finite_number(row, name), -1 if "loss" in name else 1
            if value is not None and (name not in best or sign * value > sign * best[name].value):
                best[name] = BestMetric(name, value, row["step"])
    return sorted(
        best.values(),
        key=lambda score: METRIC_ORDER.index(score.metric) if score.metric in METRIC_ORDER else len(METRIC_ORDER),
    )


def best_of_results(results: dict[str, Any]) -> list[BestMetric]:
    """What a fine-tuning, a suite or an evaluation was judged with at its end."""
    scores, rows = [], results.get("rows")
    valid_rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    for method in ("linear", "knn", "few_shot"):
        method_rows = [row for row in valid_rows if row.get("method") == method and row.get("who") == "pretrained"]
        candidates = [score for row in method_rows if (score := _best_metric(f"{method} top1", row, "top1"))]
        scores += sorted(candidates, key=lambda score: -score.value)[:1]
    for name in ("mapped", "mapped_only"):
        scores.append(
            _best_metric(f"{name} top1", variant, "top1") if isinstance(variant := results.get(name), dict) else None
        )
    protocol = results.get("protocol")
    held_out = isinstance(protocol, dict) and finite_number(protocol, "data.holdout")  # of a sweep: not the test split
    name = "held-out top1" if held_out else "top1"
    scores += [_best_metric("mean top1", results, "mean"), _best_metric(name, results, "top1")]
    return [score for score in scores if score]


def _best_metric(metric: str, results: dict[str, Any], name: str) -> BestMetric | None:
    value = finite_number(results, name)
    return None if value is None else BestMetric(metric, value, sd=finite_number(results, f"{name}_sd"))


RUN_FILES = ("recipe.yaml", "metrics.jsonl", "exit.json", "results.json")  # a folder with one of them is a run's
MAX_DEPTH = 5  # folders below the given one: of a group, a suite, its task, sweep/, lr-0.1
SKIPPED_DIRS = {"checkpoints", "tensorboard", "encoder", "classifier", "report", "features", "profile"}  # in a run
MAX_BYTES = 8 << 20  # of a file that is read whole; results of 100,000 classes are of this size
STALE_SECONDS = (
    300.0  # seconds without a sign of life, of a holder on another machine (train.run_folder.HEARTBEAT_SECONDS is 5)
)


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run; None or empty is unknown."""

    folder: Path
    kind: str  # pretraining, fine-tuning, evaluation
    recipe: str  # its name where the command had one; head and encoder
    keys: dict[str, str]  # of the resolved recipe
    state: str  # running, finished, preempted, failed, killed
    why: str
    step: int | None
    steps: int | None
    loss: float | None  # of the last row; NaN where that was not finite
    scores: list[BestMetric]  # the one that says most first
    images_per_second: float | None  # median of the last rows


def run_status(folder: Path) -> RunStatus:
    """Read what a run's folder holds; raises nothing, whatever that is."""
    tree, results, metric_rows = (
        read_mapping(folder / "recipe.yaml"),
        read_mapping(folder / "results.json"),
        read_rows(folder, all_rows=False),
    )
    kind, recipe, keys = _describe_recipe(tree, results)
    recipe = " ".join(filter(None, [_recipe_name(folder / "recipe.yaml"), recipe]))
    last_row = metric_rows[-1] if metric_rows else {}
    steps = int(keys["steps"]) if re.fullmatch(r"\d{1,18}", keys.get("steps", "")) else None
    end_step = read_mapping(folder / "exit.json").get("step")
    known_steps = [step for step in (last_row.get("step"), end_step) if isinstance(step, int) and step > 0]
    state, reason = _state(folder, results, max(known_steps, default=None), steps)
    result_scores, row_scores = best_of_results(results), best_of_rows(metric_rows)
    speeds = [
        value for row in metric_rows[-SPEED_ROWS:] if (value := finite_number(row, "images_per_second")) is not None
    ]
    return RunStatus(
        folder,
        kind,
        recipe,
        keys,
        state,
        reason,
        max(known_steps, default=None),
        steps,
        finite_number(last_row, "loss")
        if finite_number(last_row, "loss") is not None or "loss" not in last_row
        else math.nan,
        result_scores + row_scores
        if state == "finished"
        else row_scores + result_scores,  # results may be an earlier end's
        statistics.median(speeds) if speeds else None,
    )


def find_runs(parent: Path) -> list[Path]:
    """The run folders at a place and below it, each once, in the order in which people count."""
    runs: list[Path] = []
    level, visited = [parent], {os.path.realpath(parent)}
    for _ in range(MAX_DEPTH + 1):
        next_level: list[Path] = []
        for folder in level:
            runs += [folder] * is_run(folder)
            for path in _subfolders(folder):
                if (real := os.path.realpath(path)) not in visited:
                    visited.add(real)
                    next_level.append(path)
        level = next_level
    return sorted(runs, key=_natural_key)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or an evaluation's."""
    return any(map(_is_file, (folder / name for name in RUN_FILES)))


def _subfolders(folder: Path) -> list[Path]:
    """The folders in one that may hold runs; of a run neither what training writes nor what `restart` put aside."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
    inside_run = is_run(folder)
    skipped = {
        name
        for name in names
        if name[0] == "." or (inside_run and (name in SKIPPED_DIRS or name.startswith("before-")))
    }
    return [folder / name for name in names if name not in skipped]


def _natural_key(path: Path) -> list[list[Any]]:
    """Seed-2 before seed-10, lr-0.03 before lr-0.1."""
    parts = (re.split(r"(\d+(?:\.\d+)?)", part) for part in path.parts)
    return [[float(word) if i % 2 else word for i, word in enumerate(words)] for words in parts]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's keys; none where it is not there, or no such thing."""
    try:
        text = path.read_text() if _is_file(path) and path.stat().st_size <= MAX_BYTES else ""
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, config.TextLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _recipe_name(path: Path) -> str:
    """The recipe that the command named, by its file's first line; nothing where it says none."""
    if not _is_file(path):  # a pipe would never answer
        return ""
    try:
        with path.open("rb") as file:
            line = file.readline(300).decode(errors="replace")
    except OSError:
        return ""
    match = re.match(r"# recipe: (.+)", line)
    return Path(match[1].strip()).stem if match else ""


def _describe_recipe(tree: dict[str, Any], results: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Kind, title and keys, with the defaults of those that an older version did not have, as text."""
    if not tree:
        return ("evaluation", f"of {Path(str(results['encoder'])).name}", {}) if "encoder" in results else ("", "", {})
    groups = {name: tree[name] if isinstance(tree.get(name), dict) else {} for name in ("head", "encoder")}
    kinds = [str(group.get("kind", "?")) for group in groups.values()]
    is_finetuning = "sweep" in tree or kinds[0] == "transfer"
    title = " ".join(kinds)
    try:
        recipe = config.validate(Finetune if is_finetuning else Pretrain, tree)
        tree, title = recipe.model_dump(mode="json"), f"{recipe.head.kind} {recipe.encoder.title}"
    except (ExitError, TypeError, RecursionError):  # of another version, or another's: as it is written
        pass
    keys = {".".join(map(str, path)): _to_text(value) for path, value in config.flatten(tree)}
    return "fine-tuning" if is_finetuning else "pretraining", title, keys


def _to_text(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, list):
        return ",".join(map(_to_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _state(folder: Path, results: dict[str, Any], step: int | None, steps: int | None) -> tuple[str, str]:
    """How a run stands, and why: by who holds it, by exit.json, by what it left, by the run that it is a part of."""
    if owner := find_lock_holder(folder):
        silent_seconds = time.time() - (folder / ".lock").stat().st_mtime
        is_local = owner.endswith(f" on {socket.gethostname()}") or " on " not in owner
        return (
            ("running", owner)
            if is_local or silent_seconds < STALE_SECONDS
            else ("killed", f"{owner}, silent for {format_age(silent_seconds)}")
        )
    exit_record = read_mapping(folder / "exit.json")
    if isinstance(code := exit_record.get("code"), int):
        reason = re.sub(r"^run=\S+: ", "", str(exit_record.get("reason")))  # the name stands beside it
        return {0: ("finished", ""), ExitCode.PREEMPTED: ("preempted", reason)}.get(
            code, ("failed", f"{reason} ({code})")
        )
    if results and (step is None or steps is None or step >= steps or "best" in results):
        return ("failed", str(results["diverged"])) if "diverged" in results else ("finished", "")
    # a part of a fine-tuning has no exit.json of its own
    parent_run = next(
        (parent for parent in list(folder.absolute().parents)[:2] if "sweep" in read_mapping(parent / "recipe.yaml")),
        None,
    )
    state, reason = (
        _state(parent_run, read_mapping(parent_run / "results.json"), None, None) if parent_run else ("killed", "")
    )
    return (state, reason) if state in ("running", "preempted", "failed") else ("killed", "ended without a word")


def find_lock_holder(folder: Path) -> str | None:
    """Who holds a run, as far as its lock can be read."""
    try:
        return lock_holder(folder) if _is_file(folder / ".lock") else None
    except (OSError, ValueError):
        return None
