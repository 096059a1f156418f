"""What was measured of a run, by its metrics.jsonl and its results.json."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
