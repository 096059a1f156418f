"""The curves of several runs in one picture, against the step."""

import io
import math
from pathlib import Path
from typing import Any

from ssl_vit.board import plain, shortened
from ssl_vit.durable import write_bytes
from ssl_vit.evaluate.report import figure
from ssl_vit.exits import CANNOT_CREATE, DATA, USAGE, Refusal
from ssl_vit.scores import number

PANELS = ("loss", "val_loss", "top1", "val_top1", "accuracy", "val_accuracy", "knn_top1", "images_per_second")
BASELINES = {"uniform": "left", "variance": "left", "neighbour_loss": "center", "unigram_entropy": "right"}
"""Names in rows, and where along the panel they are written: some are near each other."""
LONGEST = 44  # signs of a name in the legend

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
    return shortened("".join(sign if " " <= sign <= "~" else "?" for sign in plain(name)), LONGEST).lstrip("_")


def write(picture: Any, path: Path) -> None:
    """Write a figure as PNG; Refusal(CANNOT_CREATE) where the folder takes none."""
    with io.BytesIO() as buffer:
        picture.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        try:
            write_bytes(path, buffer.getvalue(), flush=False)
        except OSError as error:
            raise Refusal(CANNOT_CREATE, f"output={path}: {error.strerror}; name another") from error
