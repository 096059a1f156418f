"""A training step, forward to optimizer, on one batch on the device: python tools/benchmark.py step recipe=NAME

Ours beside its rivals (contestants.py), and beside the machine: the matrix products of the step alone, and one
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
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.model import Model
from ssl_vit.runtime import on_gpu, uses_bf16
from ssl_vit.train.hardware import data_sheet
from ssl_vit.train.metrics import measured
from tools.benchmarks.contestants import (
    HuggingFace,
    Step,
    autocast,
    matrix_products,
    ours,
    rivals,
    timm_model,
    without_levers,
)
from tools.benchmarks.racing import Rounds, Row, between, grid, images, race, wait


class Options(Rounds, recipes.Pretrain):
    """A recipe, and how to measure it."""

    preset: Literal["none", "cpu", "gpu"] = Field(default="none", description="what docs/performance.md has, all of it")
    rivals: bool = Field(default=True, description="beside timm's and Hugging Face's, where they are installed")
    compiled: bool | None = Field(default=None, description="rivals compiled as a whole too (none: on a GPU)")
    levers: bool = Field(default=False, description="our step without each of its levers")


def measure(options: Options) -> Iterator[Row]:
    """Rows for ours, the rivals, the matrix products, and with `levers` for ours without each of them."""
    made, tensors, source = recipes.resolve(options)
    if not isinstance(made.encoder, Vit) or made.encoder.stem != "patch":
        raise Refusal(USAGE, f"step: rivals are plain ViTs, and the encoder is {made.encoder.title}")
    made = made.model_copy(update={"batch": made.micro_batch or made.batch})
    device, half = torch.device("cuda" if on_gpu() else "cpu"), uses_bf16(made.precision)
    model = setup.build(made, 1000, tensors, source)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)  # it starts at zero, where any encoder has the same loss
    batch = images(made.batch, made.encoder, device)
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    output = Path(options.output)
    found = rivals(made, model, batch, compiled) if options.rivals else {}
    same = alike(made, model.to(device), batch) if options.rivals else {}
    without = without_levers(made, model, batch, output) if options.levers else {}
    parts = matrix_products(made, device, half)
    contestants: dict[str, Step] = {"ssl_vit": ours(made, model, batch, output)}
    contestants |= {who: build() for who, build in (found | without).items()} | parts
    seconds = race(contestants, options.rounds, options.round_steps, device)
    flops, peak = setup.flops(model) * made.batch, measured(device, half)
    sheet = data_sheet(torch.cuda.get_device_name(), half) if device.type == "cuda" else None
    case = f"{made.encoder.title} {made.encoder.image_hw[0]}x{made.encoder.image_hw[1]} batch {made.batch}"
    for who, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(seconds["ssl_vit"], times, strict=True))
        shares = {name: round(median(b / a for a, b in zip(times, seconds[name], strict=True)), 3) for name in parts}
        yield {
            "benchmark": "step",
            "case": f"{case} {'bf16' if half else 'fp32'} {device.type}",
            "who": who,
            "kind": "lever" if who in without else "products" if who in parts else "step",
            "images_per_second": round(made.batch / median(times), 2),
            "milliseconds": round(median(times) * 1e3, 3),
            "ratio": round(median(ratios), 3),
            "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            "tflops": round(flops / median(times) / 1e12, 4),
            "of_peak": round(flops / median(times) / peak, 3),
            "of_data_sheet": round(flops / median(times) / sheet, 3) if sheet else None,
            "of_products": shares,
            **same.get(who.split(",")[0], {}),
        }
    wait(device)


def alike(made: recipes.Recipe, model: Model, batch: dict[str, torch.Tensor]) -> dict[str, Row]:
    """Whether all compute the same: first losses, and of Hugging Face's encoder how far its tokens are off."""
    encoder, found = model.encoder, {}
    with torch.no_grad(), autocast(made, batch["image"].device)():
        found["ssl_vit"] = {"first_loss": float(model(batch).loss)}
        for who, build in (
            ("timm", lambda: timm_model(model)),
            ("Hugging Face", lambda: HuggingFace(encoder, made.batch)),
        ):
            try:
                theirs = build().to(batch["image"].device).eval()
            except ImportError:
                continue
            found[who] = {"first_loss": float(theirs(batch))}
            if isinstance(theirs, HuggingFace):
                whole = encoder(batch["image"])
                found[who]["tokens_off"] = float((theirs.tokens(batch["image"]) - whole).norm() / whole.norm())
    return found


def table(rows: list[Row]) -> str:
    """The rows for reading, one table a case."""
    return "\n\n".join(table_of(list(of)) for _, of in groupby(rows, lambda row: row["case"]))


def table_of(rows: list[Row]) -> str:
    """The rows of one case for reading."""
    products = list(rows[0]["of_products"])
    lines = []
    for row in rows:
        speed = [f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}", between(row["ratio_spread"])]
        shares = [f"{row['of_products'][name]:.2f}" for name in products]
        loss = f"{row['first_loss']:.4f}" if "first_loss" in row else ""
        lines.append([row["who"], *speed, f"{row['tflops']:.3f}", f"{row['of_peak']:.1%}", *shares, loss])
    return grid([rows[0]["case"], "images/s", "ratio", "spread", "TFLOP/s", "of peak", *products, "loss"], lines)
