"""An estimate as text and as a picture."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.estimate.cluster import USABLE
from ssl_vit.heads.visualize import split_grid
from ssl_vit.model import Batch, Model
from ssl_vit.report.format import format_bytes, format_hours, format_number

if TYPE_CHECKING:
    from ssl_vit.recipes import Recipe

Numbers = dict[str, Any]


def format_estimate(estimates: Numbers, folder: Path) -> list[str]:
    """A name and what is said of it, aligned; what belongs to a line stands under it."""
    parameters, flops, step = estimates["parameters"], estimates["flops"], estimates["step"]
    micro = f"{step['micro_batch']:,} images"
    micro_batches = f"{step['micro_batches']:,} micro batches of {micro}" if step["micro_batches"] > 1 else micro
    processes = f"{step['processes']:,} process{'es' * (step['processes'] > 1)}"
    return [
        "",
        format_row("model", estimates["model"]),
        format_row("parameters", f"encoder {parameters['encoder']:,}, head {parameters['head']:,}"),
        format_row("FLOPs an image", f"{flops['image']:,} (forward and backward), {flops['run']:.3g} in all"),
        format_row("data", _format_data(estimates["data"])),
        format_row("evaluation", _format_data(estimates["evaluation"]) if estimates["evaluation"] else "none"),
        format_row("length", _format_length(estimates["length"])),
        format_row("a step", f"{processes}, {'each ' * (step['processes'] > 1)}{micro_batches}"),
        *_format_memory(estimates),
        *_format_time(estimates),
        *_format_disk(estimates["disk"]),
        format_row("picture", f"{folder / 'dry_run.png'}: the learning rate, and the first images"),
        format_row("numbers", f"{folder / 'dry_run.json'}"),
    ]


def estimate_warnings(estimates: Numbers) -> list[str]:
    """What does not fit."""
    here, disk, messages = estimates["here"], estimates["disk"], []
    required, room = here["bytes"]["sum"], here["memory"]
    if required > USABLE * room:
        smaller = here["micro_batch"]
        hint = (
            f"micro_batch={smaller} fits" if smaller else "a smaller encoder or image, or more processes that share it"
        )
        messages.append(
            f"memory: a step takes {format_bytes(required)}, {here['device']} has {format_bytes(room)}: {hint}"
        )
    if disk["sum"] > disk["free"]:
        text = f"disk: {format_bytes(disk['sum'])} are needed, {format_bytes(disk['free'])} are free in {disk['place']}"
        messages.append(f"{text}: name another run, or a smaller keep")
    return [format_row("warning", text) for text in messages]


def format_row(name: str, text: str) -> str:
    """One line."""
    return f"{name:<16}{text}"


def _format_data(data: Numbers) -> str:
    if "samples" not in data:
        return data["name"]
    counts = f"{data['samples']:,} samples, {data['classes']:,} classes"
    return f"{data['name']}: {counts}, {data['shards']:,} shards, {format_bytes(data['bytes'])}"


def _format_length(length: Numbers) -> str:
    text = f"{length['steps']:,} steps of {length['batch']:,} images: {length['samples']:,} samples"
    if "epochs" in length:
        text += f", {length['epochs']:,.1f} epochs of {length['epoch_samples']:,}"
    return text + (f"; {length['trainings']} such trainings" if length["trainings"] > 1 else "")


def _format_memory(estimates: Numbers) -> list[str]:
    here, parts = estimates["here"], estimates["here"]["bytes"]
    rows = [
        format_row(
            "memory", f"{here['device']}, {here['precision']}, {estimates['step']['micro_batch']:,} images at once"
        )
    ]
    rows += [format_row(f"  {name}", f"{format_bytes(size):>9}") for name, size in parts.items() if name != "sum"]
    peak = f"; {format_bytes(here['peak'])} at the peak when tried" if here.get("peak") else ""
    return [*rows, format_row("  sum", f"{format_bytes(parts['sum']):>9} of {format_bytes(here['memory'])}{peak}")]


def _format_time(estimates: Numbers) -> list[str]:
    here, gpus, count = estimates["here"], estimates["gpus"], estimates["step"]["processes"]
    many = "one GPU that never waits" if count == 1 else f"{count:,} GPUs that never wait"
    head = f"on {many}, bf16, at {gpus['mfu']:g} of the data sheet (hardware.mfu, assumed)"
    rows = [format_row("time", f"{head}; a step takes {format_bytes(gpus['bytes']['sum'])}")]
    for index, (name, gpu) in enumerate(gpus["hours"].items()):
        source = " (hardware.tflops)" if index == 0 and gpus["tflops_given"] else ""
        speed = "launching kernels (assumed)" if gpu["launches"] else f"{format_number(gpu['tflops'])} TFLOP/s{source}"
        rows.append(
            format_row(
                f"  {name}", f"{format_hours(gpu['hours']):>13} at {speed}; {gpu['memory_gb']:g} GB: {gpu['memory']}"
            )
        )
    if "hours" not in here:
        return [*rows, format_row("  this machine", here["tried"])]
    rate = f"{format_number(here['images_per_second'])} images/s, {format_hours(here['seconds_a_step'] / 3600)} a step"
    micro_batch = estimates["step"]["micro_batch"]
    tried_with = (
        f"{here['images_tried']:,}{f' of {micro_batch:,}' if here['images_tried'] < micro_batch else ''} images"
    )
    many = "this machine" if count == 1 else f"{count:,} of this one"
    rows.append(
        format_row(
            f"  {many}", f"{format_hours(here['hours']):>13} at {rate}; tried with {tried_with}; without evaluation"
        )
    )
    if not here["data"]:
        return rows
    loader, waits = here["loader"], here["seconds_a_step"] > 1.1 * here["computed"]
    text = f"{loader['workers']} at {format_number(loader['images_per_second'])} images/s each (data.workers)"
    return [*rows, format_row("  its loaders", f"{text}{'; the step waits for them' if waits else ''}")]


def _format_disk(disk: Numbers) -> list[str]:
    text = f"{disk['kept']:,} checkpoints of {format_bytes(disk['checkpoint'])}"
    text += ", one more in the making" if disk["in_the_making"] else ""
    text += f", {disk['exports']:,} export{'s' * (disk['exports'] > 1)} of {format_bytes(disk['encoder'])}"
    return [format_row("disk", f"{format_bytes(disk['sum'])}: {text}; {format_bytes(disk['free'])} are free")]


NUM_IMAGES = 16
MIN_SIDE, MAX_SIDE = 160, 224  # pixels of an image's longer side in the picture
GAP = 8  # pixels around an image, or it and its corrupted version
MIN_WIDTH, MAX_WIDTH = 1200, 1900  # pixels of the picture
CURVE, TITLE, MARGIN = 300, 34, 20  # pixels of its parts
DPI = 100
POINTS = 1000  # of the curve


def draw_preview(recipe: "Recipe", model: Model, batch: Batch) -> bytes:
    """The picture as a PNG; the images are those of the batch."""
    from ssl_vit.report.page import make_figure

    grid, text = draw_images(model, batch)
    height, width = grid.shape[1:]
    wide, high = max(MIN_WIDTH, width + 2 * MARGIN), CURVE + TITLE + height + MARGIN
    fig, axes = make_figure(wide / DPI, high / DPI)
    fig.set_dpi(DPI)
    plot_learning_rate(axes, recipe)
    axes.set_position([90 / wide, 1 - (CURVE - 50) / high, 1 - 130 / wide, (CURVE - 85) / high])
    fig.text(MARGIN / wide, (height + MARGIN + 10) / high, text, fontsize=11)
    fig.figimage(grid.permute(1, 2, 0).numpy(), MARGIN, MARGIN)
    with io.BytesIO() as buffer:
        fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def plot_learning_rate(axes: Any, recipe: "Recipe") -> None:
    """The learning rate over all steps; of a sweep each."""
    steps, optim, sweep = recipe.steps, recipe.optim, getattr(recipe, "sweep", None)
    points = sorted({*range(0, steps, max(1, steps // POINTS)), steps - 1})
    for lr in getattr(sweep, "lr", ()) or (optim.lr,):
        schedule = optim.model_copy(update={"lr": lr})
        marker = "o" if len(points) < 20 else None
        axes.plot(points, [schedule.lr_at(step, steps) for step in points], marker=marker, label=f"{lr:g} at most")
    warm = f", {optim.warmup_steps:,} steps of warm-up" if optim.warmup_steps else ""
    axes.set_title(f"learning rate: {optim.schedule}{warm}", fontsize=11, loc="left")
    axes.set(xlabel="step", ylim=(0, None), xlim=(0, max(1, steps - 1)))
    axes.ticklabel_format(axis="x", style="plain")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def draw_images(model: Model, batch: Batch) -> tuple[Tensor, str]:
    """The images in rows, uint8 [3, H, W], each beside its corrupted version where the head makes one; and a title."""
    image = batch["image"]
    count, height, width = len(image), *image.shape[2:]
    text = f"the first {count} images as they are augmented"
    columns = [image]
    if model.head.visualize is not None:
        panels: Any = model.head.visualize(DummyEncoder(model.encoder), batch)
        columns = list(split_grid(panels, height, width).unbind(1)[:2])
        text += ", each beside its corruption: gray is masked, red has another patch's content, white is kept"
    tiles = [F.pad(resize_for_display(column), (GAP // 2, 0, 0, 0), value=255) for column in columns]
    tile = F.pad(torch.cat(tiles, dim=3), (GAP // 2, 0, 0, GAP), value=255)  # [B, 3, h, w]
    per_row = max(1, min(8 // len(columns), MAX_WIDTH // tile.shape[3]))
    tile = F.pad(tile, (0, 0, 0, 0, 0, 0, 0, -count % per_row), value=255)
    return tile.unflatten(0, (-1, per_row)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2), text


def resize_for_display(image: Tensor) -> Tensor:
    """Images uint8 [B, 3, h, w] enlarged by a whole factor, or shrunk, to a size that can be looked at."""
    longest = max(image.shape[2:])
    factor = max(1, round(MIN_SIDE / longest))
    if longest > MAX_SIDE:
        size = [max(1, round(side * MAX_SIDE / longest)) for side in image.shape[2:]]
        return F.interpolate(image.float(), size=size, mode="area").round().to(torch.uint8)
    return image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


class DummyEncoder:
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
