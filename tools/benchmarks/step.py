"""A training step, forward to optimizer, on one batch on the device: python tools/benchmark.py step recipe=NAME

Ours beside its rivals (baselines.py), and beside the machine: the matrix products of the step alone, and one
large one. `ratio` is how many times as fast ours is, `of_products` the step's rate over that of its matrix products.
Equal first losses show that timm's computes the same; of Hugging Face's, whose loss is another, its tokens do.

levers=true measures our step without each of its levers, one by one. preset=cpu and preset=gpu measure what
docs/performance.md has of such a machine; preset=gpu where there is none tries itself at a small size.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import Field

from ssl_vit import recipes
from ssl_vit.commands import setup
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Model
from ssl_vit.runtime import on_gpu, uses_bf16
from ssl_vit.train.hardware import spec_flops
from ssl_vit.train.metrics import measure_peak_flops
from tools.benchmarks.baselines import (
    HuggingFace,
    Step,
    ablations,
    autocast,
    matrix_products,
    rivals,
    ssl_vit_step,
    timm_model,
)
from tools.benchmarks.timing import Rounds, Row, format_spread, format_table, race, random_batch, synchronize


class Options(Rounds, recipes.Pretrain):
    """A recipe, and how to measure it."""

    preset: Literal["none", "cpu", "gpu"] = Field(default="none", description="what docs/performance.md has, all of it")
    rivals: bool = Field(default=True, description="beside timm's and Hugging Face's, where they are installed")
    compiled: bool | None = Field(default=None, description="rivals compiled as a whole too (none: on a GPU)")
    levers: bool = Field(default=False, description="our step without each of its levers")


def measure(options: Options) -> Iterator[Row]:
    """Rows for ours, the rivals, the matrix products, and with `levers` for ours without each of them."""
    recipe, tensors, source = recipes.resolve_recipe(options)
    if not isinstance(recipe.encoder, Vit) or recipe.encoder.stem != "patch":
        raise ExitError(ExitCode.USAGE, f"step: rivals are plain ViTs, and the encoder is {recipe.encoder.title}")
    recipe = recipe.model_copy(update={"batch": recipe.micro_batch or recipe.batch})
    device, bf16 = torch.device("cuda" if on_gpu() else "cpu"), uses_bf16(recipe.precision)
    model = setup.build_model(recipe, 1000, tensors, source)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)  # it starts at zero, where any encoder has the same loss
    batch = random_batch(recipe.batch, recipe.encoder, device)
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    output = Path(options.output)
    rival_steps = rivals(recipe, model, batch, compiled) if options.rivals else {}
    outputs = compare_outputs(recipe, model.to(device), batch) if options.rivals else {}
    ablated = ablations(recipe, model, batch, output) if options.levers else {}
    parts = matrix_products(recipe, device, bf16)
    contestants: dict[str, Step] = {"ssl_vit": ssl_vit_step(recipe, model, batch, output)}
    contestants |= {contestant: build() for contestant, build in (rival_steps | ablated).items()} | parts
    seconds = race(contestants, options.rounds, options.round_steps, device)
    flops, peak = setup.flops_per_image(model) * recipe.batch, measure_peak_flops(device, bf16)
    peak_spec = spec_flops(torch.cuda.get_device_name(), bf16) if device.type == "cuda" else None
    case = f"{recipe.encoder.title} {recipe.encoder.image_hw[0]}x{recipe.encoder.image_hw[1]} batch {recipe.batch}"
    for contestant, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(seconds["ssl_vit"], times, strict=True))
        shares = {name: round(median(b / a for a, b in zip(times, seconds[name], strict=True)), 3) for name in parts}
        yield {
            "benchmark": "step",
            "case": f"{case} {'bf16' if bf16 else 'fp32'} {device.type}",
            "who": contestant,
            "kind": "lever" if contestant in ablated else "products" if contestant in parts else "step",
            "images_per_second": round(recipe.batch / median(times), 2),
            "milliseconds": round(median(times) * 1e3, 3),
            "ratio": round(median(ratios), 3),
            "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            "tflops": round(flops / median(times) / 1e12, 4),
            "of_peak": round(flops / median(times) / peak, 3),
            "of_data_sheet": round(flops / median(times) / peak_spec, 3) if peak_spec else None,
            "of_products": shares,
            **outputs.get(contestant.split(",")[0], {}),
        }
    synchronize(device)


def compare_outputs(recipe: recipes.Recipe, model: Model, batch: dict[str, torch.Tensor]) -> dict[str, Row]:
    """Whether all compute the same: first losses, and of Hugging Face's encoder how far its tokens are off."""
    encoder, outputs = model.encoder, {}
    with torch.no_grad(), autocast(recipe, batch["image"].device)():
        outputs["ssl_vit"] = {"first_loss": float(model(batch).loss)}
        for name, build in (
            ("timm", lambda: timm_model(model)),
            ("Hugging Face", lambda: HuggingFace(encoder, recipe.batch)),
        ):
            try:
                rival = build().to(batch["image"].device).eval()
            except ImportError:
                continue
            outputs[name] = {"first_loss": float(rival(batch))}
            if isinstance(rival, HuggingFace):
                tokens = encoder(batch["image"])
                outputs[name]["tokens_off"] = float((rival.tokens(batch["image"]) - tokens).norm() / tokens.norm())
    return outputs


def table(rows: list[Row]) -> str:
    """The rows for reading, one table a case."""
    return "\n\n".join(case_table(list(group)) for _, group in groupby(rows, lambda row: row["case"]))


def case_table(rows: list[Row]) -> str:
    """The rows of one case for reading."""
    products = list(rows[0]["of_products"])
    lines = []
    for row in rows:
        speed = [f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}", format_spread(row["ratio_spread"])]
        shares = [f"{row['of_products'][name]:.2f}" for name in products]
        loss = f"{row['first_loss']:.4f}" if "first_loss" in row else ""
        lines.append([row["who"], *speed, f"{row['tflops']:.3f}", f"{row['of_peak']:.1%}", *shares, loss])
    return format_table(
        [rows[0]["case"], "images/s", "ratio", "spread", "TFLOP/s", "of peak", *products, "loss"], lines
    )
