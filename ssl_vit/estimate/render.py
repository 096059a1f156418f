"""An estimate as text and as a picture."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit.estimate.cluster import USABLE
from ssl_vit.heads.visualize import cells
from ssl_vit.model import Batch, Model
from ssl_vit.report.format import human, number, span

if TYPE_CHECKING:
    from ssl_vit.recipes import Recipe

Numbers = dict[str, Any]


def lines(found: Numbers, folder: Path) -> list[str]:
    """A name and what is said of it, aligned; what belongs to a line stands under it."""
    parameters, flops, step = found["parameters"], found["flops"], found["step"]
    micro = f"{step['micro_batch']:,} images"
    pieces = f"{step['micro_batches']:,} micro batches of {micro}" if step["micro_batches"] > 1 else micro
    processes = f"{step['processes']:,} process{'es' * (step['processes'] > 1)}"
    return [
        "",
        row("model", found["model"]),
        row("parameters", f"encoder {parameters['encoder']:,}, head {parameters['head']:,}"),
        row("FLOPs an image", f"{flops['image']:,} (forward and backward), {flops['run']:.3g} in all"),
        row("data", _set(found["data"])),
        row("evaluation", _set(found["evaluation"]) if found["evaluation"] else "none"),
        row("length", _length(found["length"])),
        row("a step", f"{processes}, {'each ' * (step['processes'] > 1)}{pieces}"),
        *_memory(found),
        *_time(found),
        *_disk(found["disk"]),
        row("picture", f"{folder / 'dry_run.png'}: the learning rate, and the first images"),
        row("numbers", f"{folder / 'dry_run.json'}"),
    ]


def warnings(found: Numbers) -> list[str]:
    """What does not fit."""
    here, disk, said = found["here"], found["disk"], []
    need, room = here["bytes"]["sum"], here["memory"]
    if need > USABLE * room:
        fewer = here["micro_batch"]
        cure = f"micro_batch={fewer} fits" if fewer else "a smaller encoder or image, or more processes that share it"
        said.append(f"memory: a step takes {human(need)}, {here['device']} has {human(room)}: {cure}")
    if disk["sum"] > disk["free"]:
        text = f"disk: {human(disk['sum'])} are needed, {human(disk['free'])} are free in {disk['place']}"
        said.append(f"{text}: name another run, or a smaller keep")
    return [row("warning", text) for text in said]


def row(name: str, text: str) -> str:
    """One line."""
    return f"{name:<16}{text}"


def _set(made: Numbers) -> str:
    if "samples" not in made:
        return made["name"]
    counts = f"{made['samples']:,} samples, {made['classes']:,} classes"
    return f"{made['name']}: {counts}, {made['shards']:,} shards, {human(made['bytes'])}"


def _length(length: Numbers) -> str:
    text = f"{length['steps']:,} steps of {length['batch']:,} images: {length['samples']:,} samples"
    if "epochs" in length:
        text += f", {length['epochs']:,.1f} epochs of {length['epoch_samples']:,}"
    return text + (f"; {length['trainings']} such trainings" if length["trainings"] > 1 else "")


def _memory(found: Numbers) -> list[str]:
    here, parts = found["here"], found["here"]["bytes"]
    made = [row("memory", f"{here['device']}, {here['precision']}, {found['step']['micro_batch']:,} images at once")]
    made += [row(f"  {name}", f"{human(size):>9}") for name, size in parts.items() if name != "sum"]
    peak = f"; {human(here['peak'])} at the peak when tried" if here.get("peak") else ""
    return [*made, row("  sum", f"{human(parts['sum']):>9} of {human(here['memory'])}{peak}")]


def _time(found: Numbers) -> list[str]:
    here, gpus, count = found["here"], found["gpus"], found["step"]["processes"]
    many = "one GPU that never waits" if count == 1 else f"{count:,} GPUs that never wait"
    head = f"on {many}, bf16, at {gpus['mfu']:g} of the data sheet (device.mfu, assumed)"
    made = [row("time", f"{head}; a step takes {human(gpus['bytes']['sum'])}")]
    for place, (name, of) in enumerate(gpus["hours"].items()):
        given = " (device.tflops)" if place == 0 and gpus["tflops_given"] else ""
        at = "launching kernels (assumed)" if of["launches"] else f"{number(of['tflops'])} TFLOP/s{given}"
        made.append(row(f"  {name}", f"{span(of['hours']):>13} at {at}; {of['memory_gb']:g} GB: {of['memory']}"))
    if "hours" not in here:
        return [*made, row("  this machine", here["tried"])]
    rate = f"{number(here['images_per_second'])} images/s, {span(here['seconds_a_step'] / 3600)} a step"
    whole = found["step"]["micro_batch"]
    tried = f"{here['images_tried']:,}{f' of {whole:,}' if here['images_tried'] < whole else ''} images"
    many = "this machine" if count == 1 else f"{count:,} of this one"
    made.append(row(f"  {many}", f"{span(here['hours']):>13} at {rate}; tried with {tried}; without evaluation"))
    if not here["data"]:
        return made
    loader, waits = here["loader"], here["seconds_a_step"] > 1.1 * here["computed"]
    text = f"{loader['workers']} at {number(loader['images_per_second'])} images/s each (data.workers)"
    return [*made, row("  its loaders", f"{text}{'; the step waits for them' if waits else ''}")]


def _disk(disk: Numbers) -> list[str]:
    made = f"{disk['kept']:,} checkpoints of {human(disk['checkpoint'])}"
    made += ", one more in the making" if disk["in_the_making"] else ""
    made += f", {disk['exports']:,} export{'s' * (disk['exports'] > 1)} of {human(disk['encoder'])}"
    return [row("disk", f"{human(disk['sum'])}: {made}; {human(disk['free'])} are free")]


SAMPLES = 16
LEAST, MOST = 160, 224  # pixels of an image's longer side in the picture
GAP = 8  # pixels around an image, or it and its corrupted version
NARROW, WIDE = 1200, 1900  # pixels of the picture
CURVE, TITLE, MARGIN = 300, 34, 20  # pixels of its parts
DPI = 100
POINTS = 1000  # of the curve


def sketch(recipe: "Recipe", model: Model, batch: Batch) -> bytes:
    """The picture as a PNG; the images are those of the batch."""
    from ssl_vit.report.page import figure

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
