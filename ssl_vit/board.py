"""Runs side by side, for people and for programs: one table, the keys in which they differ, or JSON."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_vit.standing import Standing
from ssl_vit.train.run import none_for_nan

COLUMNS = ("run", "state", "step", "loss", "best", "images/s", "recipe", "why")
RIGHT = {"step", "loss", "images/s"}  # numbers, aligned by their last digit
COLORS = {"running": 36, "finished": 32, "preempted": 33, "failed": 31, "killed": 31}
LONGEST = 40  # signs of a value that is shown; JSON has all


def names(folders: Sequence[Path], root: Path | None = None) -> list[str]:
    """What runs are called: their paths below `root`, or else below the folder that all have in common."""
    parents = [folder.absolute().parent for folder in folders]
    common = root or (os.path.commonpath(parents) if parents else ".")
    return [os.path.relpath(folder.absolute(), common) for folder in folders]


def table(runs: dict[str, Standing], width: int | None = None, color: bool = False) -> Iterator[str]:
    """A line for each run by name; cut at `width` signs where there is one, with what that hides of `why` below."""
    cells = [list(COLUMNS), *([name, *_cells(run)] for name, run in runs.items())]
    last = COLUMNS if any(run.why for run in runs.values()) else COLUMNS[:-1]
    head, *lines = aligned(cells, [name in RIGHT for name in last], width)
    yield head
    for line, run in zip(lines, runs.values(), strict=True):
        painted = f"  \033[{COLORS[run.state]}m{run.state}\033[0m"
        yield line.replace(f"  {run.state}", painted, 1) if color else line
    hidden = {name: run.why for line, (name, run) in zip(lines, runs.items(), strict=True) if line[-2:] == ".."}
    yield from (f"{plain(name)}: {plain(why)}" for name, why in hidden.items() if width and why)


def _cells(run: Standing) -> list[str]:
    step = "-" if run.step is None else f"{run.step:,}"
    of = f" of {run.steps:,}" if run.steps and run.step is not None else ""
    loss = "-" if run.loss is None else f"{run.loss:#.4g}".rstrip(".")
    speed = "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"
    best = str(run.scores[0]) if run.scores else "-"
    return [run.state, step + of, loss, best, speed, f"{run.kind if not run.keys else ''} {run.recipe}", run.why]


def aligned(cells: Sequence[Sequence[str]], right: Sequence[bool], width: int | None = None) -> Iterator[str]:
    """Lines of a table, as plain text; as many columns as `right` says something of."""
    shown = [[plain(cell) for cell in row[: len(right)]] for row in cells]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        parts = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        line = "  ".join(parts).rstrip()
        yield line if width is None or len(line) <= width else line[: max(0, width - 2)] + ".."


def plain(text: object) -> str:
    """Text on one line, without what steers a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(str(text).split())) or "-"


def differing(runs: Iterable[Standing]) -> dict[Path, dict[str, str | None]]:
    """Of each run with a recipe the keys, but for `run`, in which those of its kind differ; None is unset."""
    found: dict[Path, dict[str, str | None]] = {}
    with_keys = [run for run in runs if run.keys]
    for kind in dict.fromkeys(run.kind for run in with_keys):
        alike = [run for run in with_keys if run.kind == kind]
        every = dict.fromkeys(key for run in alike for key in run.keys if key != "run")
        unlike = [key for key in every if len({run.keys.get(key) for run in alike}) > 1]
        found |= {run.folder: {key: run.keys.get(key) for key in unlike} for run in alike}
    return found


def differences(runs: dict[str, Standing], width: int | None = None) -> Iterator[str]:
    """The differing keys of each kind as a table, with what there is more of downwards, runs or keys."""
    known = differing(runs.values())
    for kind in dict.fromkeys(run.kind for run in runs.values() if run.keys):
        alike = {name: known[run.folder] for name, run in runs.items() if run.keys and run.kind == kind}
        keys = list(next(iter(alike.values())))
        if len(alike) == 1:
            continue
        yield ""
        if not keys:
            yield f"{len(alike)} runs of {kind}: no key differs"
            continue
        yield f"{len(alike)} runs of {kind}, the keys that differ:"
        cells = [
            ["run", *keys],
            *([name, *(shortened(values[key] or "-") for key in keys)] for name, values in alike.items()),
        ]
        if len(keys) > len(alike):
            cells = [list(column) for column in zip(*cells, strict=True)]
        yield from aligned(cells, [False] * len(cells[0]), width)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text of at most so many signs: the end tells more than the middle."""
    return text if len(text) <= longest else f"{text[: longest // 2 - 2]}..{text[-(longest // 2) :]}"


def document(runs: dict[str, Standing], more: dict[Path, dict[str, Any]]) -> str:
    """A list of objects as JSON, one a run; `more` is put into those of its folders."""
    known, found = differing(runs.values()), []
    for name, run in runs.items():
        scores = [{key: value for key, value in vars(score).items() if value is not None} for score in run.scores]
        facts = {
            key: none_for_nan(value) for key, value in vars(run).items() if key not in ("folder", "keys", "scores")
        }
        where = {"run": name, "path": str(run.folder.absolute())}
        facts |= {"loss_is_nan": run.loss is not None and math.isnan(run.loss)}
        facts |= {"best": scores[0] if scores else None, "scores": scores, "differing": known.get(run.folder, {})}
        found.append(where | facts | more.get(run.folder, {}))
    return json.dumps(found, indent=1, allow_nan=False)
