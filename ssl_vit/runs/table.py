"""Runs beside each other: a table, their differing keys, their curves and results."""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.files import write_bytes
from ssl_vit.report.format import escape, format_percent
from ssl_vit.report.page import Page, make_figure
from ssl_vit.runs.status import RunStatus, finite_number
from ssl_vit.train.run_folder import none_for_nan

COLUMNS = ("run", "state", "step", "loss", "best", "images/s", "recipe", "why")
RIGHT_ALIGNED = {"step", "loss", "images/s"}  # numbers, aligned by their last digit
COLORS = {"running": 36, "finished": 32, "preempted": 33, "failed": 31, "killed": 31}
MAX_VALUE_LENGTH = 40  # signs of a value that is shown; JSON has all


def run_names(folders: Sequence[Path], root: Path | None = None) -> list[str]:
    """What runs are called: their paths below `root`, or else below the folder that all have in common."""
    parents = [folder.absolute().parent for folder in folders]
    common = root or (os.path.commonpath(parents) if parents else ".")
    return [os.path.relpath(folder.absolute(), common) for folder in folders]


def table_lines(runs: dict[str, RunStatus], width: int | None = None, color: bool = False) -> Iterator[str]:
    """A line for each run by name; cut at `width` signs where there is one, with what that hides of `why` below."""
    cells = [list(COLUMNS), *([name, *_cells(run)] for name, run in runs.items())]
    columns = COLUMNS if any(run.why for run in runs.values()) else COLUMNS[:-1]
    header, *lines = align_columns(cells, [name in RIGHT_ALIGNED for name in columns], width)
    yield header
    for line, run in zip(lines, runs.values(), strict=True):
        colored = f"  \033[{COLORS[run.state]}m{run.state}\033[0m"
        yield line.replace(f"  {run.state}", colored, 1) if color else line
    hidden = {name: run.why for line, (name, run) in zip(lines, runs.items(), strict=True) if line[-2:] == ".."}
    yield from (f"{printable_line(name)}: {printable_line(why)}" for name, why in hidden.items() if width and why)


def _cells(run: RunStatus) -> list[str]:
    step = "-" if run.step is None else f"{run.step:,}"
    total = f" of {run.steps:,}" if run.steps and run.step is not None else ""
    loss = "-" if run.loss is None else f"{run.loss:#.4g}".rstrip(".")
    speed = "-" if run.images_per_second is None else f"{run.images_per_second:,.0f}"
    best = str(run.scores[0]) if run.scores else "-"
    return [run.state, step + total, loss, best, speed, f"{run.kind if not run.keys else ''} {run.recipe}", run.why]


def align_columns(cells: Sequence[Sequence[str]], right: Sequence[bool], width: int | None = None) -> Iterator[str]:
    """Lines of a table, as plain text; as many columns as `right` says something of."""
    rows = [[printable_line(cell) for cell in row[: len(right)]] for row in cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        parts = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        line = "  ".join(parts).rstrip()
        yield line if width is None or len(line) <= width else line[: max(0, width - 2)] + ".."


def printable_line(text: object) -> str:
    """Text on one line, without what steers a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in " ".join(str(text).split())) or "-"


def differing_keys(runs: Iterable[RunStatus]) -> dict[Path, dict[str, str | None]]:
    """Of each run with a recipe the keys, but for `run`, in which those of its kind differ; None is unset."""
    keys_by_folder: dict[Path, dict[str, str | None]] = {}
    with_keys = [run for run in runs if run.keys]
    for kind in dict.fromkeys(run.kind for run in with_keys):
        group = [run for run in with_keys if run.kind == kind]
        keys = dict.fromkeys(key for run in group for key in run.keys if key != "run")
        varying = [key for key in keys if len({run.keys.get(key) for run in group}) > 1]
        keys_by_folder |= {run.folder: {key: run.keys.get(key) for key in varying} for run in group}
    return keys_by_folder


def difference_lines(runs: dict[str, RunStatus], width: int | None = None) -> Iterator[str]:
    """The differing keys of each kind as a table, with what there is more of downwards, runs or keys."""
    keys_by_folder = differing_keys(runs.values())
    for kind in dict.fromkeys(run.kind for run in runs.values() if run.keys):
        group = {name: keys_by_folder[run.folder] for name, run in runs.items() if run.keys and run.kind == kind}
        keys = list(next(iter(group.values())))
        if len(group) == 1:
            continue
        yield ""
        if not keys:
            yield f"{len(group)} runs of {kind}: no key differs"
            continue
        yield f"{len(group)} runs of {kind}, the keys that differ:"
        cells = [
            ["run", *keys],
            *([name, *(shorten(values[key] or "-") for key in keys)] for name, values in group.items()),
        ]
        if len(keys) > len(group):
            cells = [list(column) for column in zip(*cells, strict=True)]
        yield from align_columns(cells, [False] * len(cells[0]), width)


def shorten(text: str, max_length: int = MAX_VALUE_LENGTH) -> str:
    """Text of at most so many signs: the end tells more than the middle."""
    return text if len(text) <= max_length else f"{text[: max_length // 2 - 2]}..{text[-(max_length // 2) :]}"


def to_json(runs: dict[str, RunStatus], extra: dict[Path, dict[str, Any]]) -> str:
    """A list of objects as JSON, one a run; `extra` is put into those of its folders."""
    keys_by_folder, documents = differing_keys(runs.values()), []
    for name, run in runs.items():
        scores = [{key: value for key, value in vars(score).items() if value is not None} for score in run.scores]
        fields = {
            key: none_for_nan(value) for key, value in vars(run).items() if key not in ("folder", "keys", "scores")
        }
        location = {"run": name, "path": str(run.folder.absolute())}
        fields |= {"loss_is_nan": run.loss is not None and math.isnan(run.loss)}
        fields |= {
            "best": scores[0] if scores else None,
            "scores": scores,
            "differing": keys_by_folder.get(run.folder, {}),
        }
        documents.append(location | fields | extra.get(run.folder, {}))
    return json.dumps(documents, indent=1, allow_nan=False)


def compare_results(runs: tuple[str, ...]) -> Page:
    """Runs side by side: a line for each thing that was measured, a column for each run."""
    columns: dict[str, dict[str, str]] = {}
    for name in runs:
        path = Path(name) / "results.json"
        try:
            columns[name] = result_lines(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExitError(
                ExitCode.DATA, f"compare: {path} is not the results of a run ({type(error).__name__})"
            ) from error
    page = Page("Runs side by side")
    lines = list(dict.fromkeys(line for column in columns.values() for line in column))
    rows = [[line, *(column.get(line, "-") for column in columns.values())] for line in lines]
    page.table(["%", *map(escape, columns)], rows)
    return page


def result_lines(results: dict[str, Any]) -> dict[str, str]:
    """What a results.json says, as lines of a comparison."""
    lines = {}
    for row in results.get("rows", ()):
        suffix = "" if row["who"] == "pretrained" else f", {row['who']}"
        case = row["case"] if row["method"] == "few_shot" else ""
        name = " ".join(filter(None, [row["method"], case, f"(layer {row['layer']}, {row['readout']}{suffix})"]))
        lines[name] = format_percent(row["top1"], row.get("top1_sd"))
    for name in ("top1", "top5", "mean_per_class", "accuracy", "knn_top1", "mean"):
        if isinstance(results.get(name), float):
            lines[name] = format_percent(results[name], results.get(f"{name}_sd"))
    lines |= {f"mean of {group}": format_percent(value) for group, value in results.get("groups", {}).items()}
    lines |= {
        task: format_percent(result["top1"], result.get("top1_sd")) for task, result in results.get("tasks", {}).items()
    }
    for name in ("label_sets", "mapped", "mapped_only"):
        lines |= {f"{name} {n}": format_percent(results[name][n]) for n in ("top1", "top5") if name in results}
    return lines


PANELS = ("loss", "val_loss", "top1", "val_top1", "accuracy", "val_accuracy", "knn_top1", "images_per_second")
BASELINES = {"uniform": "left", "variance": "left", "neighbor_loss": "center", "unigram_entropy": "right"}
"""Names in rows, and where along the panel they are written: some are near each other."""
MAX_LABEL_LENGTH = 44  # signs of a name in the legend

Rows = list[dict[str, Any]]


def check_output(output: str) -> Path:
    """Where the picture goes; ExitError(USAGE) where it cannot."""
    path = Path(output)
    if path.suffix != ".png" or path.is_dir():
        raise ExitError(ExitCode.USAGE, f"output={output}: give the name of a picture, like compare.png")
    if not path.parent.is_dir():
        raise ExitError(ExitCode.USAGE, f"output={output}: there is no folder {path.parent}")
    return path


def draw_curves(runs: dict[str, Rows]) -> Any:
    """A figure with a panel for what at least two runs measured (or the only one), and a line for each run in it.

    Raises ExitError(DATA) where there is no such thing.
    """
    from matplotlib.lines import Line2D

    min_runs = min(2, len(runs))
    panels = [name for name in PANELS if sum(any(name in row for row in rows) for rows in runs.values()) >= min_runs]
    if not panels:
        raise ExitError(ExitCode.DATA, f"compare: the rows of these runs share none of {', '.join(PANELS)}")
    columns = min(2, len(panels))
    num_rows, legend_rows = -(-len(panels) // columns), -(-len(runs) // columns)
    fig, axes = make_figure(
        6.0 * columns, 3.2 * num_rows + 0.22 * legend_rows, nrows=num_rows, ncols=columns, squeeze=False
    )
    fig.set_layout_engine("constrained")
    colors = dict(zip(runs, _colors(len(runs)), strict=True))
    end = max(1, *(row["step"] for rows in runs.values() for row in rows))
    for ax, name in zip(axes.flat, panels, strict=False):
        _draw_panel(ax, name, runs, colors)
        ax.set_xlim(0, 1.02 * end)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    lines = [Line2D([], [], color=color) for color in colors.values()]
    fig.legend(lines, [_legend_label(name) for name in runs], loc="outside lower center", fontsize=8, ncols=columns)
    return fig


def _draw_panel(axes: Any, name: str, runs: dict[str, Rows], colors: dict[str, Any]) -> None:
    for run, rows in runs.items():
        measured = [row for row in rows if name in row]
        values = [math.nan if (value := finite_number(row, name)) is None else value for row in measured]
        marker = "o" if len(measured) < 12 else None  # a single one is no line
        if measured:
            axes.plot(
                [row["step"] for row in measured], values, color=colors[run], marker=marker, markersize=3, linewidth=1.2
            )
    if name.endswith("loss"):
        _draw_baselines(axes, name.removesuffix("loss"), runs)
    axes.set(xlabel="step", title=name.replace("_", " "))
    axes.grid(alpha=0.3)


def _draw_baselines(axes: Any, prefix: str, runs: dict[str, Rows]) -> None:
    """What a blind guess costs, as each run's last row says; once where runs agree to 5 %."""
    for name, side in BASELINES.items():
        last_values = [
            [v for row in rows if (v := finite_number(row, prefix + name)) is not None][-1:] for rows in runs.values()
        ]
        previous = -math.inf
        for value in sorted(value for values in last_values for value in values):
            if value > 1.05 * previous:
                previous = value
                axes.axhline(value, color="gray", linestyle="--", linewidth=0.8, zorder=0)
                text, transform = f"{name.replace('_', ' ')} {value:.3g}", axes.get_yaxis_transform()
                x = {"left": 0.01, "center": 0.5, "right": 0.99}[side]
                axes.text(x, value, text, transform=transform, ha=side, va="bottom", fontsize=7, color="gray")


def _colors(count: int) -> list[Any]:
    """One for each run: matplotlib's ten or twenty, or as many of a rainbow."""
    import matplotlib

    if count <= 20:
        return [matplotlib.colormaps["tab10" if count <= 10 else "tab20"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _legend_label(name: str) -> str:
    """A name that every font can draw, and matplotlib does not hide."""
    return shorten(
        "".join(sign if " " <= sign <= "~" else "?" for sign in printable_line(name)), MAX_LABEL_LENGTH
    ).lstrip("_")


def write_figure(picture: Any, path: Path) -> None:
    """Write a figure as PNG; ExitError(CANNOT_CREATE) where the folder takes none."""
    with io.BytesIO() as buffer:
        picture.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        try:
            write_bytes(path, buffer.getvalue(), flush=False)
        except OSError as error:
            raise ExitError(ExitCode.CANNOT_CREATE, f"output={path}: {error.strerror}; name another") from error
