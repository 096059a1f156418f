"""One picture of a run before it: its learning rate, and its first images as they are augmented and corrupted."""

import io
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.heads.panel import cells
from ssl_vit.model import Batch, Model

if TYPE_CHECKING:
    from ssl_vit.recipe import Recipe

SAMPLES = 16
LEAST, MOST = 160, 224  # pixels of an image's longer side in the picture
GAP = 8  # pixels around an image, or it and its corrupted version
NARROW, WIDE = 1200, 1900  # pixels of the picture
CURVE, TITLE, MARGIN = 300, 34, 20  # pixels of its parts
DPI = 100
POINTS = 1000  # of the curve


def sketch(recipe: "Recipe", model: Model, batch: Batch) -> bytes:
    """The picture as a PNG; the images are those of the batch."""
    from ssl_vit.evaluate.report import figure

    shown, text = images(model, batch)
    height, width = shown.shape[1:]
    wide, high = max(NARROW, width + 2 * MARGIN), CURVE + TITLE + height + MARGIN
    made, axes = figure(wide / DPI, high / DPI)
    made.set_dpi(DPI)
    draw(axes, recipe)
    axes.set_position([90 / wide, 1 - (CURVE - 50) / high, 1 - 130 / wide, (CURVE - 85) / high])
    made.text(MARGIN / wide, (height + MARGIN + 10) / high, text, fontsize=11)
    made.figimage(shown.permute(1, 2, 0).numpy(), MARGIN, MARGIN)
    with io.BytesIO() as buffer:
        made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def draw(axes: Any, recipe: "Recipe") -> None:
    """The learning rate over all steps; of a sweep each."""
    steps, optim, sweep = recipe.steps, recipe.optim, getattr(recipe, "sweep", None)
    at = sorted({*range(0, steps, max(1, steps // POINTS)), steps - 1})
    for lr in getattr(sweep, "lr", ()) or (optim.lr,):
        one = optim.model_copy(update={"lr": lr})
        marker = "o" if len(at) < 20 else None
        axes.plot(at, [one.rate(step, steps) for step in at], marker=marker, label=f"{lr:g} at most")
    warm = f", {optim.warmup_steps:,} steps of warm-up" if optim.warmup_steps else ""
    axes.set_title(f"learning rate: {optim.schedule}{warm}", fontsize=11, loc="left")
    axes.set(xlabel="step", ylim=(0, None), xlim=(0, max(1, steps - 1)))
    axes.ticklabel_format(axis="x", style="plain")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def images(model: Model, batch: Batch) -> tuple[Tensor, str]:
    """The images in rows, uint8 [3, H, W], each beside its corrupted version where the head makes one; and a title."""
    image = batch["image"]
    count, height, width = len(image), *image.shape[2:]
    text = f"the first {count} images as they are augmented"
    columns = [image]
    if hasattr(model.head, "panel"):
        drawn: Any = model.head.panel(Blank(model.encoder), batch)
        columns = list(cells(drawn, height, width).unbind(1)[:2])
        text += ", each beside its corruption: grey is masked, red has another patch's content, white is kept"
    tiles = [F.pad(resized(column), (GAP // 2, 0, 0, 0), value=255) for column in columns]
    tile = F.pad(torch.cat(tiles, dim=3), (GAP // 2, 0, 0, GAP), value=255)  # [B, 3, h, w]
    across = max(1, min(8 // len(columns), WIDE // tile.shape[3]))
    tile = F.pad(tile, (0, 0, 0, 0, 0, 0, 0, -count % across), value=255)
    return tile.unflatten(0, (-1, across)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2), text


def resized(image: Tensor) -> Tensor:
    """Images uint8 [B, 3, h, w] enlarged by a whole factor, or shrunk, to a size that can be looked at."""
    longest = max(image.shape[2:])
    factor = max(1, round(LEAST / longest))
    if longest > MOST:
        size = [max(1, round(side * MOST / longest)) for side in image.shape[2:]]
        return F.interpolate(image.float(), size=size, mode="area").round().to(torch.uint8)
    return image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


class Blank:
    """In place of an encoder, whose tokens a corrupted image does not wait for."""

    def __init__(self, encoder: Any):
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, image: Tensor, edit: object = None, select: Tensor | None = None) -> Tensor:
        """Tokens of zeros [B, S, D], or of all."""
        del edit
        count = self.prefix + self.grid[0] * self.grid[1] if select is None else select.shape[1]
        return torch.zeros(len(image), count, self.width)
