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
from ssl_vit.errors import PREEMPTED, Refusal
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.report.format import age
from ssl_vit.train.run_folder import holder

RECENT = 10  # rows whose median is the speed
EVALUATED = (b'"val_', b'"knn_top1"')  # what a row with an evaluation holds
JUDGED = re.compile(r"val_(loss|accuracy|top1|top5)|knn_top1|few_shot_\d+")
FIRST = ("knn_top1", "val_top1", "val_loss", "val_accuracy")  # the one that says most first


@dataclass(frozen=True)
class Score:
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


def rows(folder: Path, every: bool = True) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first, without torn ones; or those with an evaluation and the last few."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError:
        return []
    late = len(lines) - RECENT - 1  # one may be torn
    if not every:
        lines = [line for i, line in enumerate(lines) if i >= late or any(mark in line for mark in EVALUATED)]
    return [row for line in lines if (row := _row(line))]


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def number(row: dict[str, Any], name: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return value


def of_rows(made: list[dict[str, Any]]) -> list[Score]:
    """The best of each measure over the evaluations, the first of equals."""
    best: dict[str, Score] = {}
    for row in made:
        for name in filter(JUDGED.fullmatch, row):
            value, sign = number(row, name), -1 if "loss" in name else 1
            if value is not None and (name not in best or sign * value > sign * best[name].value):
                best[name] = Score(name, value, row["step"])
    return sorted(best.values(), key=lambda score: FIRST.index(score.metric) if score.metric in FIRST else len(FIRST))


def of_results(results: dict[str, Any]) -> list[Score]:
    """What a fine-tuning, a suite or an evaluation was judged with at its end."""
    scores, parts = [], results.get("rows")
    judged = [row for row in parts if isinstance(row, dict)] if isinstance(parts, list) else []
    for method in ("linear", "knn", "few_shot"):
        own = [row for row in judged if row.get("method") == method and row.get("who") == "pretrained"]
        made = [score for row in own if (score := _score(f"{method} top1", row, "top1"))]
        scores += sorted(made, key=lambda score: -score.value)[:1]
    for name in ("mapped", "mapped_only"):
        scores.append(_score(f"{name} top1", one, "top1") if isinstance(one := results.get(name), dict) else None)
    protocol = results.get("protocol")
    held_out = isinstance(protocol, dict) and number(protocol, "data.hold_out")  # of a sweep: not the test split
    name = "held-out top1" if held_out else "top1"
    scores += [_score("mean top1", results, "mean"), _score(name, results, "top1")]
    return [score for score in scores if score]


def _score(metric: str, measured: dict[str, Any], name: str) -> Score | None:
    value = number(measured, name)
    return None if value is None else Score(metric, value, sd=number(measured, f"{name}_sd"))


MARKS = ("recipe.yaml", "metrics.jsonl", "exit.json", "results.json")  # a folder with one of them is a run's
DEPTH = 5  # folders below the given one: of a group, a suite, its task, sweep/, lr-0.1
PASSED = {"checkpoints", "tensorboard", "encoder", "classifier", "report", "features", "profile"}  # in a run
MAX_BYTES = 8 << 20  # of a file that is read whole; results of 100,000 classes are of this size
SILENT = 300.0  # seconds without a sign of life, of a holder on another machine (train.run.BEAT is 5)


@dataclass(frozen=True)
class Standing:
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
    scores: list[Score]  # the one that says most first
    images_per_second: float | None  # median of the last rows


def standing(folder: Path) -> Standing:
    """Read what a run's folder holds; raises nothing, whatever that is."""
    tree, results, made = read(folder / "recipe.yaml"), read(folder / "results.json"), rows(folder, every=False)
    kind, recipe, keys = _recipe(tree, results)
    recipe = " ".join(filter(None, [_named(folder / "recipe.yaml"), recipe]))
    last = made[-1] if made else {}
    steps = int(keys["steps"]) if re.fullmatch(r"\d{1,18}", keys.get("steps", "")) else None
    end = read(folder / "exit.json").get("step")
    done = [step for step in (last.get("step"), end) if isinstance(step, int) and step > 0]
    state, why = _state(folder, results, max(done, default=None), steps)
    said, seen = of_results(results), of_rows(made)
    speeds = [value for row in made[-RECENT:] if (value := number(row, "images_per_second")) is not None]
    return Standing(
        folder,
        kind,
        recipe,
        keys,
        state,
        why,
        max(done, default=None),
        steps,
        number(last, "loss") if number(last, "loss") is not None or "loss" not in last else math.nan,
        said + seen if state == "finished" else seen + said,  # results may be an earlier end's
        statistics.median(speeds) if speeds else None,
    )


def found(parent: Path) -> list[Path]:
    """The run folders at a place and below it, each once, in the order in which people count."""
    runs: list[Path] = []
    level, seen = [parent], {os.path.realpath(parent)}
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            runs += [folder] * is_run(folder)
            for path in _folders(folder):
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    below.append(path)
        level = below
    return sorted(runs, key=_order)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or an evaluation's."""
    return any(map(_is_file, (folder / name for name in MARKS)))


def _folders(folder: Path) -> list[Path]:
    """The folders in one that may hold runs; of a run neither what training writes nor what `fresh` put aside."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
    own = is_run(folder)
    passed = {name for name in names if name[0] == "." or (own and (name in PASSED or name.startswith("before-")))}
    return [folder / name for name in names if name not in passed]


def _order(path: Path) -> list[list[Any]]:
    """Seed-2 before seed-10, lr-0.03 before lr-0.1."""
    parts = (re.split(r"(\d+(?:\.\d+)?)", part) for part in path.parts)
    return [[float(word) if i % 2 else word for i, word in enumerate(words)] for words in parts]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's keys; none where it is not there, or no such thing."""
    try:
        text = path.read_text() if _is_file(path) and path.stat().st_size <= MAX_BYTES else ""
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, config.Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _named(path: Path) -> str:
    """The recipe that the command named, by its file's first line; nothing where it says none."""
    if not _is_file(path):  # a pipe would never answer
        return ""
    try:
        with path.open("rb") as file:
            line = file.readline(300).decode(errors="replace")
    except OSError:
        return ""
    found = re.match(r"# recipe: (.+)", line)
    return Path(found[1].strip()).stem if found else ""


def _recipe(tree: dict[str, Any], results: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Kind, title and keys, with the defaults of those that an older version did not have, as text."""
    if not tree:
        return ("evaluation", f"of {Path(str(results['encoder'])).name}", {}) if "encoder" in results else ("", "", {})
    groups = {name: tree[name] if isinstance(tree.get(name), dict) else {} for name in ("head", "encoder")}
    kinds = [str(group.get("kind", "?")) for group in groups.values()]
    tuned = "sweep" in tree or kinds[0] == "transfer"
    title = " ".join(kinds)
    try:
        recipe = config.validate(Finetune if tuned else Pretrain, tree)
        tree, title = recipe.model_dump(mode="json"), f"{recipe.head.kind} {recipe.encoder.title}"
    except (Refusal, TypeError, RecursionError):  # of another version, or another's: as it is written
        pass
    keys = {".".join(map(str, path)): _text(value) for path, value in config.leaves(tree)}
    return "fine-tuning" if tuned else "pretraining", title, keys


def _text(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _state(folder: Path, results: dict[str, Any], step: int | None, steps: int | None) -> tuple[str, str]:
    """How a run stands, and why: by who holds it, by exit.json, by what it left, by the run that it is a part of."""
    if who := held(folder):
        silent = time.time() - (folder / ".lock").stat().st_mtime
        here = who.endswith(f" on {socket.gethostname()}") or " on " not in who
        return ("running", who) if here or silent < SILENT else ("killed", f"{who}, silent for {age(silent)}")
    end = read(folder / "exit.json")
    if isinstance(code := end.get("code"), int):
        why = re.sub(r"^run=\S+: ", "", str(end.get("reason")))  # the name stands beside it
        return {0: ("finished", ""), PREEMPTED: ("preempted", why)}.get(code, ("failed", f"{why} ({code})"))
    if results and (step is None or steps is None or step >= steps or "best" in results):
        return ("failed", str(results["diverged"])) if "diverged" in results else ("finished", "")
    # a part of a fine-tuning has no exit.json of its own
    whole = next((one for one in list(folder.absolute().parents)[:2] if "sweep" in read(one / "recipe.yaml")), None)
    state, why = _state(whole, read(whole / "results.json"), None, None) if whole else ("killed", "")
    return (state, why) if state in ("running", "preempted", "failed") else ("killed", "ended without a word")


def held(folder: Path) -> str | None:
    """Who holds a run, as far as its lock can be read."""
    try:
        return holder(folder) if _is_file(folder / ".lock") else None
    except (OSError, ValueError):
        return None
