"""The pictures of tools/analyze.py, as matplotlib figures; images are uint8 [h, w, 3]."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ssl_vit.report.page import ascii_of, figure

CLASSES = 20  # that a legend names, and that are told apart by colour


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
    wide = max(len(row) for row in rows)
    aspect = rows[0][0].shape[0] / rows[0][0].shape[1]
    made, axes = figure(side * wide, side * aspect * len(rows) + 0.3, nrows=len(rows), ncols=wide, squeeze=False)
    for number, row in enumerate(rows):
        for place, one in enumerate(axes[number]):
            one.axis("off")
            if place < len(row):
                one.imshow(row[place], **options)
            if number == 0 and place < len(titles):
                one.set_title(ascii_of(titles[place]), fontsize=7)
    made.subplots_adjust(wspace=0.05, hspace=0.05)
    return made


def distance_dots(found: Mapping[int, Sequence[float]], uniform: float) -> Any:
    """A dot for the mean attention distance of each head, pixels, by layer (paper Figure 7, right)."""
    made, axes = figure()
    for layer, heads in found.items():
        axes.scatter([layer] * len(heads), heads, s=14, c=[f"C{n % 10}" for n in range(len(heads))])
    axes.axhline(uniform, color="grey", linestyle="--", linewidth=1, label="equal attention to all")
    most = max(uniform, *map(max, found.values()))
    axes.set(xlabel="layer", ylabel="mean attention distance, pixels", ylim=(0, 1.1 * most or 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return made


def filter_tiles(components: np.ndarray, titles: Sequence[str], columns: int = 7) -> Any:
    """Components [K, C, h, w] as pictures, each by its own maximum: grey is zero."""
    most = np.abs(components).reshape(len(components), -1).max(1)[:, None, None, None]
    shown = (0.5 + 0.5 * components / np.maximum(most, 1e-30)).transpose(0, 2, 3, 1)
    shown = shown if shown.shape[3] == 3 else shown[..., :1].repeat(3, 3)
    made, axes = figure(1.1 * columns, 1.25 * -(-len(shown) // columns), nrows=-(-len(shown) // columns), ncols=columns)
    for place, one in enumerate(axes.flat):
        one.axis("off")
        if place < len(shown):
            one.imshow(shown[place])
            one.set_title(titles[place], fontsize=6)
    return made


def similarity_tiles(alike: np.ndarray, grid: tuple[int, int]) -> Any:
    """For each patch, in its place, a map of its position's similarity with all others [N, N]."""
    rows, columns = grid
    step_down, step_right = (max(1, -(-side // 14)) for side in grid)  # of large grids every second or third
    down, right = range(0, rows, step_down), range(0, columns, step_right)
    size = min(9.0, 0.6 * len(right))
    made, axes = figure(size, max(1.0, size * len(down) / len(right)), nrows=len(down), ncols=len(right), squeeze=False)
    shown = None
    for i, row in enumerate(down):
        for j, column in enumerate(right):
            axes[i, j].set(xticks=[], yticks=[])
            shown = axes[i, j].imshow(alike[row * columns + column].reshape(grid), vmin=-1, vmax=1, cmap="viridis")
    made.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    return made


def scatter(places: np.ndarray, labels: np.ndarray, names: Sequence[str], axes_names: tuple[str, str]) -> Any:
    """Images as dots [M, 2], coloured by class; -1 has none."""
    made, axes = figure(6.5, 5)
    known = [label for label in np.unique(labels) if label >= 0]
    rest = ~np.isin(labels, known[:CLASSES])
    axes.scatter(*places[rest].T, s=6, color="lightgrey", label="others" if known and rest.any() else None)
    for number, label in enumerate(known[:CLASSES]):
        color = f"C{number}" if len(known) <= 10 else _color(number)
        axes.scatter(*places[labels == label].T, s=6, color=color, label=ascii_of(str(names[int(label)])))
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1], xticks=[], yticks=[])
    if known:
        axes.legend(fontsize=6, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def _color(number: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](number % 20)
