"""What docs/performance.md has of a machine, by one command: tools/benchmark.py step preset=cpu, or preset=gpu."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ssl_vit import config, recipes
from ssl_vit.encoders.vit import Vit
from ssl_vit.runtime import on_gpu, uses_bf16
from tools.benchmarks import attention, loop, memory, step
from tools.benchmarks.baselines import product_rates, product_table
from tools.benchmarks.timing import Row

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
    is_trial = options.preset == "gpu" and not on_gpu()
    if is_trial:
        print("preset=gpu without a GPU: the same at a small size, to see that it works", flush=True)
    argument_lists = [["recipe=mpp_demo", *TINY]] if is_trial else STEPS[options.preset]
    steps = [with_keys(options, config.parse(step.Options, arguments)) for arguments in argument_lists]
    first, _, _ = recipes.resolve_recipe(steps[0])
    bf16, device = uses_bf16(first.precision), torch.device("cuda" if on_gpu() else "cpu")
    yield from product_rates(first, device, bf16, steps[0].rounds, steps[0].round_steps)
    yield from attention.measure(
        shared_options(attention.Options, steps[0]).model_copy(update=attention_options(first))
    )
    for number, case in enumerate(steps):
        updates = {"levers": number == 0, "rivals": case.rivals and (number == 0 or not on_gpu())}
        updates |= {} if number == 0 else {"compiled": False}  # which takes minutes
        yield from step.measure(case.model_copy(update=updates))
    yield from loop.measure(shared_options(loop.Options, steps[0]))
    if options.preset == "gpu":
        batches = {"batches": (2, 4), "most": 4} if is_trial else {"batches": (256, LARGEST), "most": LARGEST}
        batches |= {"compiled_rivals": False}  # a minute for each batch of each
        yield from memory.measure(shared_options(memory.Options, steps[0]).model_copy(update=batches))


def table(rows: list[Row]) -> str:
    """The rows for reading, each benchmark's as it has them."""
    tables: dict[str, Callable[[list[Row]], str]] = {"product": product_table}
    tables |= {"attention": attention.table, "step": step.table, "loop": loop.table, "memory": memory.table}
    names = dict.fromkeys(row["benchmark"] for row in rows)
    return "\n\n".join(tables[name]([row for row in rows if row["benchmark"] == name]) for name in names)


def with_keys(options: step.Options, preset: step.Options) -> step.Options:
    """A step of a preset with the keys of the command line that leave its model and the size of its images alone."""
    groups = {"preset", "base", "data", "encoder", "head", "optim"}
    overrides: dict[str, Any] = {name: getattr(options, name) for name in options.model_fields_set - groups}
    return preset.model_copy(update={**overrides, "data": preset.data.model_copy(update={"train": options.data.train})})


def attention_options(recipe: recipes.Recipe) -> dict[str, Any]:
    """Which attention is measured for a recipe."""
    vit = recipe.encoder
    assert isinstance(vit, Vit)
    width, _, count, _ = vit.dims
    sizes = {"heads": count, "head_width": width // count}
    return sizes if on_gpu() else {**sizes, "batch": recipe.batch, "tokens": (vit.prefix + vit.grid[0] * vit.grid[1],)}


def shared_options(kind: type[Options], step_options: step.Options) -> Options:
    """The options of another benchmark, with what it has in common with a step's."""
    common = kind.model_fields.keys() & step.Options.model_fields.keys()
    return kind().model_copy(update={name: getattr(step_options, name) for name in common})
