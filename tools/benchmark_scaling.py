"""What grows with what: the cost of a step and of its data along each axis, its exponent, and the formula's beside it.

`tools/benchmark.py scaling recipe=NAME batch=64 [axes=image,depth] [images=32,64,128]` measures one axis after another:

time              memory of a whole training: bytes that a step adds, loader processes included, by least squares
image patch depth width batch
                  seconds of the loop's step, all values of an axis taking turns; the formula is that of FLOPs
samples shards    seconds to a stream's first batch, of a batch's plan, of a batch: the last two should not grow at all
workers           images/s of the loader, beside as many times one worker's
processes         a step of 1, 2, ... processes, each with the same images, under torchrun

Exponents are fitted in each round by least squares on logarithms: their median, and the least and the most of them.
FLOPs are those of the whole model, as in metrics.jsonl, although the last block computes some tokens only.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import benchmark_scaling_data as data
import benchmark_scaling_memory as memory
import benchmark_scaling_processes as processes
import contestants
import torch
from benchmark_engines import forget
from exponents import growth
from pydantic import Field
from racing import Rounds, Row, grid, images, race

from ssl_vit import recipe
from ssl_vit.encoders.vit import Transformer
from ssl_vit.exits import USAGE, Refusal, out_of_memory
from ssl_vit.scaling import number
from ssl_vit.train.environment import on_gpu, world

Axis = Literal["time", "image", "patch", "depth", "width", "batch", "samples", "shards", "workers", "processes"]
STEPS = {"image": "images", "patch": "patches", "depth": "depths", "width": "widths", "batch": "batches"}
"""The axes of the step itself, and the key with the values of each."""
Count = Annotated[int, Field(ge=1)]
Counts = tuple[Count, ...]


class Options(Rounds, recipe.Pretrain):
    """A recipe, the axes, and the values along each; the defaults suit recipe=mpp_demo on a few CPU cores."""

    axes: tuple[Axis, ...] = Field(default=get_args(Axis), min_length=1, description="what to measure")
    images: Counts = Field(default=(32, 48, 64, 96), min_length=1, description="sides of the image, pixels")
    patches: Counts = Field(default=(4, 8, 16), min_length=1, description="sides of a patch, pixels")
    depths: Counts = Field(default=(2, 4, 8), min_length=1, description="blocks")
    widths: Counts = Field(
        default=(96, 192, 384), min_length=1, description="token widths; heads keep theirs, the MLP its share"
    )
    batches: Counts = Field(default=(16, 32, 64, 128), min_length=1, description="images a step")
    samples: Counts = Field(
        default=(10_000, 100_000, 1_000_000, 10_000_000), min_length=1, description="samples, 1,000 a shard"
    )
    shards: Counts = Field(
        default=(10, 100, 1000, 10_000), min_length=1, description="shards of as many samples in all"
    )
    workers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2, 4), min_length=1, description="loader processes; 0 is none beside the training's"
    )
    processes: Counts = Field(default=(1, 2), min_length=1, description="training processes")
    steps_over_time: int = Field(default=1000, ge=40, description="steps of the training whose memory is watched")
    flat_below: float = Field(default=1024, gt=0, description="bytes a step up to which memory is called flat")


def measure(made: Options) -> Iterator[Row]:
    """The rows of every axis that is asked for; Refusal before anything is measured where a value cannot be."""
    if world() > 1:
        raise Refusal(USAGE, "scaling: it starts its processes itself; leave the launcher out")
    made = resolved(made.model_copy(update={"init": "none", "micro_batch": None}))
    cases = {axis: along(made, axis) for axis in STEPS if axis in made.axes}
    others: dict[str, Callable[[Options, str], Iterable[Row]]] = {
        "time": memory.measure,
        "samples": data.sized,
        "shards": data.sized,
        "workers": data.workers,
        "processes": processes.measure,
    }
    for axis in get_args(Axis):  # memory first: what others freed would hide that it grows
        if axis in made.axes:
            yield from [stepped(made, axis, cases[axis])] if axis in cases else others[axis](made, axis)
            forget()


def resolved(made: Options) -> Options:
    """The recipe with its encoder complete; raises Refusal where it cannot be built."""
    return recipe.resolve(made)[0]  # type: ignore[return-value]


def along(made: Options, axis: str) -> dict[int, Options]:
    """The recipe at each value of an axis, the cheapest first: what is tried last meets the weights of all."""
    if axis not in ("image", "batch") and not isinstance(made.encoder, Transformer):
        raise Refusal(USAGE, f"axes: {axis} is no number of encoder.kind={made.encoder.kind}")
    values = sorted(set(getattr(made, STEPS[axis])), reverse=axis == "patch")
    return {value: resolved(changed(made, axis, value)) for value in values}


def changed(made: Options, axis: str, value: int) -> Options:
    """The recipe with one number changed; a wider encoder has more heads, of the same width, and as much wider MLPs."""
    if axis == "batch":
        return made.model_copy(update={"batch": value})
    if axis == "image":
        encoder = made.encoder.model_copy(update={"image": value})
        return made.model_copy(update={"data": made.data.model_copy(update={"image_size": value}), "encoder": encoder})
    update: dict[str, Any] = {axis: value}
    if axis == "width":
        width, _, heads, mlp = made.encoder.numbers  # type: ignore[union-attr]
        most = max(1, round(value * heads / width))
        heads = max(count for count in range(1, most + 1) if value % count == 0)
        update |= {"heads": heads, "mlp": round(value * mlp / width)}
    return made.model_copy(update={"encoder": made.encoder.model_copy(update=update)})


def stepped(made: Options, axis: str, cases: dict[int, Options]) -> Row:
    """The row of an axis of the step; values that do not fit into the memory are left out."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    steps, flops, left_out = {}, {}, {}
    with compiled_apart() if on_gpu() or made.compile else nullcontext():
        for value, case in cases.items():
            try:
                steps[value], flops[value] = built(case, device)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                left_out[value] = "does not fit into the memory"
            if value in left_out:  # here the failed step's tensors are no longer held by its traceback
                gc.collect()
                torch.cuda.empty_cache()
        seconds = race({str(value): step for value, step in steps.items()}, made.rounds, made.round_steps, device)
    found = {value: seconds[str(value)] for value in steps}
    name = "" if axis == "batch" else f" batch {made.batch}"
    row = growth(axis, made.encoder.title + name, found, flops.__getitem__, lambda v: cases[v].batch, left_out)
    row["tflops"] = [round(flops[v] / ms / 1e9, 4) for v, ms in zip(row["values"], row["milliseconds"], strict=True)]
    return row


@contextmanager
def compiled_apart() -> Iterator[None]:
    """Each value is compiled for itself: else from the second size on for any size, and after eight not at all."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):  # type: ignore[attr-defined]
        yield


def built(made: Options, device: torch.device) -> tuple[Callable[[], object], int]:
    """A case's step, which was tried once, and its FLOPs by formula."""
    model = recipe.build(made, 1000).to(device)
    step = contestants.ours(made, model, images(made.batch, made.encoder, device), Path(made.output))
    step()
    return step, made.batch * recipe.flops(model)


def table(rows: list[Row]) -> str:
    """The rows for reading: one a line, then what was left out, then memory."""
    heads = ["", "values", "ms", "exponent", "of the rounds", "formula", "growth / formula", "last two", "formula"]
    lines, notes = [], []
    for row in rows:
        if row["axis"] == "time":
            notes.append(memory.told(row))
            continue
        values = " ".join(f"{value:,}" for value in row["values"])
        times = " ".join(map(number, row["milliseconds"]))
        keys = ("exponent", "formula", "ratio", "last_two", "last_two_formula")
        fit = [f"{row[key]:.2f}" if row[key] is not None else "" for key in keys]
        spread = " to ".join(f"{value:.2f}" for value in row["exponent_spread"] or ())
        lines.append([f"{row['axis']}: {row['case']}", values, times, fit[0], spread, *fit[1:]])
        notes += [f"{row['axis']} {value}: {why}" for value, why in row["left_out"].items()]
    return "\n".join([*([grid(heads, lines)] if lines else []), *notes])
