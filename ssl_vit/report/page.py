"""Report pages: Markdown and HTML with figures and pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ssl_vit.files import write_bytes
from ssl_vit.report.format import escape

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}
td:not(:first-child){font-variant-numeric:tabular-nums}img{max-width:100%}code{background:#f4f4f4;padding:.1rem .3rem}
pre{background:#f4f4f4;padding:.6rem;overflow-x:auto}"""


def format_cell(value: Any) -> str:
    """A value for a cell."""
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value)))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(value)


@dataclass
class Page:
    """A report in the making."""

    title: str
    parts: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def text(self, text: str) -> None:
        """A paragraph, which may hold Markdown."""
        self.parts.append(text)

    def section(self, title: str) -> None:
        """A heading."""
        self.parts.append(f"## {escape(title)}")

    def code(self, text: str) -> None:
        """Text as it is typed."""
        self.parts.append("\n".join(f"    {line}" for line in text.splitlines()))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; None is a dash."""
        if rows:
            lines = [columns, ["---"] * len(columns), *([format_cell(cell) for cell in row] for row in rows)]
            self.parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def values(self, values: dict[str, Any]) -> None:
        """A table of names and values, without those that are None."""
        self.table(["", ""], [[name, value] for name, value in values.items() if value is not None])

    def picture(self, name: str, alt: str, figure: Any) -> None:
        """A matplotlib figure."""
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            self.image(name, alt, buffer.getvalue())

    def image(self, name: str, alt: str, png: bytes) -> None:
        """A picture as it is."""
        self.pictures[f"{name}.png"] = png
        self.parts.append(f"![{escape(alt)}](report/{name}.png)")

    def write(self, folder: Path) -> None:
        """Write report.md, report/*.png and report.html."""
        import markdown

        text = f"# {escape(self.title)}\n\n" + "\n\n".join(self.parts) + "\n"
        body = markdown.markdown(text, extensions=["tables"])
        (folder / "report").mkdir(parents=True, exist_ok=True)
        for name, data in self.pictures.items():
            write_bytes(folder / "report" / name, data, flush=False)
            inline = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            body = body.replace(f'src="report/{name}"', f'src="{inline}"')
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        write_bytes(folder / "report.md", text.encode(errors="backslashreplace"))
        write_bytes(
            folder / "report.html",
            f"<!doctype html><html><head>{head}</head><body>{body}</body></html>".encode(errors="backslashreplace"),
        )


def make_figure(width: float = 6.0, height: float = 3.2, **options: Any) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes; no window, no state."""
    import matplotlib

    matplotlib.rcParams["text.parse_math"] = False  # a dollar in a class name is a dollar
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def plot_curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, log: bool = False) -> Any:
    """Lines by name: (x, y) of each."""
    figure, axes = make_figure()
    for name, (x_values, values) in lines.items():
        axes.plot(x_values, values, marker="o" if len(x_values) < 12 else None, markersize=4, label=to_ascii(name))
    axes.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")
    if log:  # matplotlib would write powers of ten as formulas, which are switched off
        ticks = sorted({value for x_values, _ in lines.values() for value in x_values})
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    return figure


def plot_confusion(matrix: np.ndarray, names: Sequence[str]) -> Any:
    """A confusion matrix [K, K] as a picture, each row as shares of its class."""
    side = min(12.0, 2.5 + 0.28 * len(names))
    figure, axes = make_figure(side, side)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names)), [to_ascii(name) for name in names], rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), [to_ascii(name) for name in names], fontsize=7)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 15:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    return figure


def plot_gallery(images: Sequence[tuple[np.ndarray, str, bool]], columns: int = 8) -> Any:
    """Images uint8 [h, w, 3], each with a caption, red where it tells of a mistake."""
    rows = -(-len(images) // columns)
    figure, axes = make_figure(1.5 * columns, 1.9 * rows, nrows=rows, ncols=columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.axis("off")
        if index < len(images):
            pixels, caption, correct = images[index]
            axis.imshow(pixels)
            axis.set_title(to_ascii(caption), fontsize=7, color="black" if correct else "crimson")
    return figure


def to_ascii(text: str) -> str:
    """A name that every font can draw, at most 24 signs of each line."""
    lines = ("".join(c if " " <= c <= "~" else "?" for c in line) for line in text.split("\n"))
    return "\n".join(line if len(line) <= 24 else f"{line[:22]}.." for line in lines)


def encode_png(image: Tensor) -> bytes:
    """A picture uint8 [3, h, w] as a PNG."""
    with io.BytesIO() as buffer:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG")
        return buffer.getvalue()
