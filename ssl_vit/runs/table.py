"""Runs beside each other: a table, their differing keys, their curves and results."""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_vit.errors import CANNOT_CREATE, DATA, USAGE, Refusal
from ssl_vit.files import write_bytes
from ssl_vit.report.format import per_cent, plain
from ssl_vit.report.page import Page, figure
from ssl_vit.runs.status import Standing, number
from ssl_vit.train.run_folder import none_for_nan

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
    yield from (f"{printable_line(name)}: {printable_line(why)}" for name, why in hidden.items() if width and why)


def _cells(run: Standing) -> list[str]:
    step = "-" if run.step is None else f"{run.step:,}"
    of = f" of {run.steps:,}" if run.steps and run.step is not None else ""
    loss = "-" if run.loss is None else f"{run.loss:#.4g}".rstrip(".")
    speed = "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"
    best = str(run.scores[0]) if run.scores else "-"
    return [run.state, step + of, loss, best, speed, f"{run.kind if not run.keys else ''} {run.recipe}", run.why]


def aligned(cells: Sequence[Sequence[str]], right: Sequence[bool], width: int | None = None) -> Iterator[str]:
    """Lines of a table, as plain text; as many columns as `right` says something of."""
    shown = [[printable_line(cell) for cell in row[: len(right)]] for row in cells]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        parts = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        line = "  ".join(parts).rstrip()
        yield line if width is None or len(line) <= width else line[: max(0, width - 2)] + ".."


def printable_line(text: object) -> str:
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


def compared(runs: tuple[str, ...]) -> Page:
    """Runs side by side: a line for each thing that was measured, a column for each run."""
    columns: dict[str, dict[str, str]] = {}
    for name in runs:
        path = Path(name) / "results.json"
        try:
            columns[name] = lines_of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refusal(DATA, f"compare: {path} is not the results of a run ({type(error).__name__})") from error
    page = Page("Runs side by side")
    lines = list(dict.fromkeys(line for column in columns.values() for line in column))
    rows = [[line, *(one.get(line, "-") for one in columns.values())] for line in lines]
    page.table(["%", *map(plain, columns)], rows)
    return page


def lines_of(results: dict[str, Any]) -> dict[str, str]:
    """What a results.json says, as lines of a comparison."""
    found = {}
    for row in results.get("rows", ()):
        who = "" if row["who"] == "pretrained" else f", {row['who']}"
        case = row["case"] if row["method"] == "few_shot" else ""
        name = " ".join(filter(None, [row["method"], case, f"(layer {row['layer']}, {row['readout']}{who})"]))
        found[name] = per_cent(row["top1"], row.get("top1_sd"))
    for name in ("top1", "top5", "mean_per_class", "accuracy", "knn_top1", "mean"):
        if isinstance(results.get(name), float):
            found[name] = per_cent(results[name], results.get(f"{name}_sd"))
    found |= {f"mean of {group}": per_cent(value) for group, value in results.get("groups", {}).items()}
    found |= {task: per_cent(one["top1"], one.get("top1_sd")) for task, one in results.get("tasks", {}).items()}
    for name in ("label_sets", "mapped", "mapped_only"):
        found |= {f"{name} {n}": per_cent(results[name][n]) for n in ("top1", "top5") if name in results}
    return found


PANELS = ("loss", "val_loss", "top1", "val_top1", "accuracy", "val_accuracy", "knn_top1", "images_per_second")
BASELINES = {"uniform": "left", "variance": "left", "neighbour_loss": "center", "unigram_entropy": "right"}
"""Names in rows, and where along the panel they are written: some are near each other."""
LONGEST_LABEL = 44  # signs of a name in the legend

Rows = list[dict[str, Any]]


def check(output: str) -> Path:
    """Where the picture goes; Refusal(USAGE) where it cannot."""
    path = Path(output)
    if path.suffix != ".png" or path.is_dir():
        raise Refusal(USAGE, f"output={output}: give the name of a picture, like compare.png")
    if not path.parent.is_dir():
        raise Refusal(USAGE, f"output={output}: there is no folder {path.parent}")
    return path


def drawn(runs: dict[str, Rows]) -> Any:
    """A figure with a panel for what at least two runs measured (or the only one), and a line for each run in it.

    Raises Refusal(DATA) where there is no such thing.
    """
    from matplotlib.lines import Line2D

    least = min(2, len(runs))
    panels = [name for name in PANELS if sum(any(name in row for row in rows) for rows in runs.values()) >= least]
    if not panels:
        raise Refusal(DATA, f"compare: the rows of these runs share none of {', '.join(PANELS)}")
    columns = min(2, len(panels))
    down, names = -(-len(panels) // columns), -(-len(runs) // columns)
    made, axes = figure(6.0 * columns, 3.2 * down + 0.22 * names, nrows=down, ncols=columns, squeeze=False)
    made.set_layout_engine("constrained")
    colors = dict(zip(runs, _colors(len(runs)), strict=True))
    end = max(1, *(row["step"] for rows in runs.values() for row in rows))
    for one, name in zip(axes.flat, panels, strict=False):
        _panel(one, name, runs, colors)
        one.set_xlim(0, 1.02 * end)
    for one in axes.flat[len(panels) :]:
        one.remove()
    lines = [Line2D([], [], color=color) for color in colors.values()]
    made.legend(lines, [_legend(name) for name in runs], loc="outside lower center", fontsize=8, ncols=columns)
    return made


def _panel(axes: Any, name: str, runs: dict[str, Rows], colors: dict[str, Any]) -> None:
    for run, rows in runs.items():
        seen = [row for row in rows if name in row]
        values = [math.nan if (value := number(row, name)) is None else value for row in seen]
        mark = "o" if len(seen) < 12 else None  # a single one is no line
        if seen:
            axes.plot(
                [row["step"] for row in seen], values, color=colors[run], marker=mark, markersize=3, linewidth=1.2
            )
    if name.endswith("loss"):
        _baselines(axes, name.removesuffix("loss"), runs)
    axes.set(xlabel="step", title=name.replace("_", " "))
    axes.grid(alpha=0.3)


def _baselines(axes: Any, prefix: str, runs: dict[str, Rows]) -> None:
    """What a blind guess costs, as each run's last row says; once where runs agree to 5 %."""
    for name, side in BASELINES.items():
        said = [[v for row in rows if (v := number(row, prefix + name)) is not None][-1:] for rows in runs.values()]
        low = -math.inf
        for value in sorted(value for one in said for value in one):
            if value > 1.05 * low:
                low = value
                axes.axhline(value, color="grey", linestyle="--", linewidth=0.8, zorder=0)
                text, place = f"{name.replace('_', ' ')} {value:.3g}", axes.get_yaxis_transform()
                x = {"left": 0.01, "center": 0.5, "right": 0.99}[side]
                axes.text(x, value, text, transform=place, ha=side, va="bottom", fontsize=7, color="grey")


def _colors(count: int) -> list[Any]:
    """One for each run: matplotlib's ten or twenty, or as many of a rainbow."""
    import matplotlib

    if count <= 20:
        return [matplotlib.colormaps["tab10" if count <= 10 else "tab20"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _legend(name: str) -> str:
    """A name that every font can draw, and matplotlib does not hide."""
    return shortened(
        "".join(sign if " " <= sign <= "~" else "?" for sign in printable_line(name)), LONGEST_LABEL
    ).lstrip("_")


def write(picture: Any, path: Path) -> None:
    """Write a figure as PNG; Refusal(CANNOT_CREATE) where the folder takes none."""
    with io.BytesIO() as buffer:
        picture.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        try:
            write_bytes(path, buffer.getvalue(), flush=False)
        except OSError as error:
            raise Refusal(CANNOT_CREATE, f"output={path}: {error.strerror}; name another") from error
