"""What dry_run found, as lines for people."""

from pathlib import Path
from typing import Any

from ssl_vit.scaling import USABLE, number

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


def span(hours: float) -> str:
    """A duration in the unit that fits it."""
    if hours < 1 / 3600:
        return f"{number(hours * 3.6e6)} ms"
    if hours < 1 / 30:
        return f"{number(hours * 3600)} s"
    return f"{number(hours * 60)} minutes" if hours < 2 else f"{number(hours)} hours"


def human(size: float) -> str:
    """Bytes in the unit that fits them, of 1000 each."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{number(size)} {unit}"
        size /= 1000
    return f"{number(size)} TB"
