"""What docs/performance.md has of a machine, by one command: tools/benchmark.py step preset=cpu, or preset=gpu."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ssl_vit import config, recipes
from ssl_vit.encoders.vit import Vit
from ssl_vit.runtime import on_gpu, uses_bf16
from tools.benchmarks import attention, loop, memory, step
from tools.benchmarks.contestants import product_rates, table_of_products
from tools.benchmarks.racing import Row

CPU = ["data.image_size=32", "encoder.patch=4", "encoder.width=192", "encoder.depth=12", "encoder.heads=3"]
TINY = ["data.image_size=32", "encoder.patch=8", "encoder.width=32", "encoder.depth=2", "encoder.heads=2", "batch=4"]
STEPS = {
    "cpu": [["recipe=mpp_demo", *CPU, "encoder.mlp=768", "batch=64"], ["recipe=mpp_flowers"], ["recipe=mpp_demo"]],
    "gpu": [
        ["recipe=mpp_vit_b16", f"encoder.size={size}", f"encoder.patch={patch}", f"batch={batch}"]
        for size, patch, batch in (("B", 16, 256), ("L", 16, 128), ("S", 16, 512), ("H", 14, 64))
    ],
}
Options = TypeVar("Options", bound=config.Config)
LARGEST = 2048  # images of ViT-B/16 that are to fit


def measure(options: step.Options) -> Iterator[Row]:
    """The products, attention, the steps, of the first one every lever and the loop; on a GPU memory at the end.

    Keys of the command line go for all of them, but for those of models and of data other than data.train. Where there
    is no GPU, preset=gpu tries itself.
    """
    small = options.preset == "gpu" and not on_gpu()
    if small:
        print("preset=gpu without a GPU: the same at a small size, to see that it works", flush=True)
    words = [["recipe=mpp_demo", *TINY]] if small else STEPS[options.preset]
    steps = [with_keys(options, config.parse(step.Options, one, recipes.FOLDER)) for one in words]
    first, _, _ = recipes.resolve(steps[0])
    half, device = uses_bf16(first.precision), torch.device("cuda" if on_gpu() else "cpu")
    yield from product_rates(first, device, half, steps[0].rounds, steps[0].round_steps)
    yield from attention.measure(of(attention.Options, steps[0]).model_copy(update=heads(first)))
    for number, one in enumerate(steps):
        asked = {"levers": number == 0, "rivals": one.rivals and (number == 0 or not on_gpu())}
        asked |= {} if number == 0 else {"compiled": False}  # which takes minutes
        yield from step.measure(one.model_copy(update=asked))
    yield from loop.measure(of(loop.Options, steps[0]))
    if options.preset == "gpu":
        batches = {"batches": (2, 4), "most": 4} if small else {"batches": (256, LARGEST), "most": LARGEST}
        batches |= {"compiled_rivals": False}  # a minute for each batch of each
        yield from memory.measure(of(memory.Options, steps[0]).model_copy(update=batches))


def table(rows: list[Row]) -> str:
    """The rows for reading, each benchmark's as it has them."""
    tables: dict[str, Callable[[list[Row]], str]] = {"product": table_of_products}
    tables |= {"attention": attention.table, "step": step.table, "loop": loop.table, "memory": memory.table}
    names = dict.fromkeys(row["benchmark"] for row in rows)
    return "\n\n".join(tables[name]([row for row in rows if row["benchmark"] == name]) for name in names)


def with_keys(options: step.Options, one: step.Options) -> step.Options:
    """A step of a preset with the keys of the command line that leave its model and the size of its images alone."""
    groups = {"preset", "base", "data", "encoder", "head", "optim"}
    given: dict[str, Any] = {name: getattr(options, name) for name in options.model_fields_set - groups}
    return one.model_copy(update={**given, "data": one.data.model_copy(update={"train": options.data.train})})


def heads(made: recipes.Recipe) -> dict[str, Any]:
    """Which attention is measured for a recipe."""
    vit = made.encoder
    assert isinstance(vit, Vit)
    width, _, count, _ = vit.numbers
    sizes = {"heads": count, "head_width": width // count}
    return sizes if on_gpu() else {**sizes, "batch": made.batch, "tokens": (vit.prefix + vit.grid[0] * vit.grid[1],)}


def of(kind: type[Options], made: step.Options) -> Options:
    """The options of another benchmark, with what it has in common with a step's."""
    same = kind.model_fields.keys() & step.Options.model_fields.keys()
    return kind().model_copy(update={name: getattr(made, name) for name in same})
