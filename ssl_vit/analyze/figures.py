"""The pictures of tools/analyze.py, as matplotlib figures; images are uint8 [h, w, 3]."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ssl_vit.report.page import make_figure, to_ascii

CLASSES = 20  # that a legend names, and that are told apart by color


def shaded(image: np.ndarray, values: np.ndarray, stride: int) -> np.ndarray:
    """An image, bright where `values` [rows, columns] are large, as the paper draws rollouts (D.8; its issue 27).

    Divided by their maximum, resized by Lanczos, blurred with a patch's side as radius; then, which is ours, stretched
    to full brightness again, which the blur took.
    """
    small = Image.fromarray((255 * values / max(float(values.max()), 1e-30)).round().astype(np.uint8))
    size = image.shape[1], image.shape[0]
    blurred = small.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(stride))
    light = np.asarray(blurred, np.float32)
    return (image * (light / max(float(light.max()), 1.0))[:, :, None]).astype(np.uint8)


def tiles(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], side: float = 1.4, **options: Any) -> Any:
    """Pictures in rows, one title a column; `options` are imshow's."""
    num_columns = max(len(row) for row in rows)
    aspect = rows[0][0].shape[0] / rows[0][0].shape[1]
    fig, axes = make_figure(
        side * num_columns, side * aspect * len(rows) + 0.3, nrows=len(rows), ncols=num_columns, squeeze=False
    )
    for row_index, row in enumerate(rows):
        for column, ax in enumerate(axes[row_index]):
            ax.axis("off")
            if column < len(row):
                ax.imshow(row[column], **options)
            if row_index == 0 and column < len(titles):
                ax.set_title(to_ascii(titles[column]), fontsize=7)
    fig.subplots_adjust(wspace=0.05, hspace=0.05)
    return fig


def distance_dots(distances: Mapping[int, Sequence[float]], uniform: float) -> Any:
    """A dot for the mean attention distance of each head, pixels, by layer (paper Figure 7, right)."""
    fig, axes = make_figure()
    for layer, heads in distances.items():
        axes.scatter([layer] * len(heads), heads, s=14, c=[f"C{n % 10}" for n in range(len(heads))])
    axes.axhline(uniform, color="gray", linestyle="--", linewidth=1, label="equal attention to all")
    maximum = max(uniform, *map(max, distances.values()))
    axes.set(xlabel="layer", ylabel="mean attention distance, pixels", ylim=(0, 1.1 * maximum or 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return fig


def filter_tiles(components: np.ndarray, titles: Sequence[str], columns: int = 7) -> Any:
    """Components [K, C, h, w] as pictures, each by its own maximum: gray is zero."""
    scale = np.abs(components).reshape(len(components), -1).max(1)[:, None, None, None]
    pictures = (0.5 + 0.5 * components / np.maximum(scale, 1e-30)).transpose(0, 2, 3, 1)
    pictures = pictures if pictures.shape[3] == 3 else pictures[..., :1].repeat(3, 3)
    fig, axes = make_figure(
        1.1 * columns, 1.25 * -(-len(pictures) // columns), nrows=-(-len(pictures) // columns), ncols=columns
    )
    for index, ax in enumerate(axes.flat):
        ax.axis("off")
        if index < len(pictures):
            ax.imshow(pictures[index])
            ax.set_title(titles[index], fontsize=6)
    return fig


def similarity_tiles(similarity: np.ndarray, grid: tuple[int, int]) -> Any:
    """For each patch, in its place, a map of its position's similarity with all others [N, N]."""
    rows, columns = grid
    step_down, step_right = (max(1, -(-side // 14)) for side in grid)  # of large grids every second or third
    down, right = range(0, rows, step_down), range(0, columns, step_right)
    size = min(9.0, 0.6 * len(right))
    fig, axes = make_figure(
        size, max(1.0, size * len(down) / len(right)), nrows=len(down), ncols=len(right), squeeze=False
    )
    image = None
    for i, row in enumerate(down):
        for j, column in enumerate(right):
            axes[i, j].set(xticks=[], yticks=[])
            image = axes[i, j].imshow(similarity[row * columns + column].reshape(grid), vmin=-1, vmax=1, cmap="viridis")
    fig.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)
    return fig


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str], axes_names: tuple[str, str]) -> Any:
    """Images as dots [M, 2], colored by class; -1 has none."""
    fig, axes = make_figure(6.5, 5)
    classes = [label for label in np.unique(labels) if label >= 0]
    others = ~np.isin(labels, classes[:CLASSES])
    axes.scatter(*points[others].T, s=6, color="lightgray", label="others" if classes and others.any() else None)
    for index, label in enumerate(classes[:CLASSES]):
        color = f"C{index}" if len(classes) <= 10 else _color(index)
        axes.scatter(*points[labels == label].T, s=6, color=color, label=to_ascii(str(names[int(label)])))
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1], xticks=[], yticks=[])
    if classes:
        axes.legend(fontsize=6, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def _color(index: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](index % 20)
