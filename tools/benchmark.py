"""Measure side by side: tools/benchmark.py step|engines|safety|models [recipe=NAME] [key=value ...], loader images=PATH

`step` is the training step of a recipe, forward to optimizer, on `micro_batch` (or `batch`) images on the device.
Beside ours runs a timm ViT of the same size with the same head in the simplest loop (eager, torch's default AdamW,
loss.item() each step), and a large matrix product as the measure of what the machine can do. One process, interleaved
rounds; medians, and ratios within a round with their spread. Both start from the same weights: their first losses show
that they compute the same.

`loader` is images/s of a core, from shards to batches, beside webdataset + Pillow + torchvision: benchmark_loader.py.

`safety` is the share of a run's time that checkpoints and checks take: benchmark_safety.py.

`models` is what every encoder costs, parameters, FLOPs and memory, beside the paper's numbers and timm's; with
recipe=NAME what that recipe costs: benchmark_models.py.

`engines`, under torchrun, is the step of every engine (DDP, ZeRO, FSDP2) beside bare DDP: benchmark_engines.py.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit import config, exits, recipe
from ssl_vit.durable import write_bytes
from ssl_vit.encoders.pixels import Pixels
from ssl_vit.encoders.vit import Vit, VitEncoder
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.model import Batch, Edit, Model
from ssl_vit.train.engine import prepare
from ssl_vit.train.environment import uses_bf16
from ssl_vit.train.launch import start
from ssl_vit.train.loop import Task, update
from ssl_vit.train.outfit import outfit
from ssl_vit.train.window import Window


class Benchmark(recipe.Pretrain):
    """A recipe, and how to measure it."""

    rounds: int = Field(default=5, ge=1, description="interleaved rounds")
    round_steps: int = Field(default=10, ge=1, description="steps of each contestant in a round")
    output: str = Field(default="runs/benchmark", description="folder for the JSON")


class TimmEncoder(nn.Module):
    """A timm ViT behind our encoder contract, composed of timm's own modules."""

    prefix = 1

    def __init__(self, encoder: VitEncoder):
        import timm

        super().__init__()
        vit: Vit = encoder.config
        width, depth, heads, mlp = vit.numbers
        self.width, self.channels, self.stride, self.pool = width, vit.channels, vit.patch, vit.pool
        self.vit: Any = timm.create_model(
            "vit_base_patch16_224",
            img_size=vit.image_hw,
            patch_size=vit.patch,
            in_chans=vit.channels,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp / width,
            num_classes=0,
        )
        self.vit.load_state_dict(encoder.state_dict())
        self.normalise = encoder.normalise

    def forward(self, image: Tensor, edit: Edit | None = None, select: Tensor | None = None) -> Tensor:
        patches = self.vit.patch_embed(self.normalise(image))
        patches = edit(patches) if edit else patches
        x: Tensor = self.vit.norm(self.vit.blocks(self.vit._pos_embed(patches)))
        return x if select is None else x.gather(1, select[:, :, None].expand(-1, -1, x.shape[2]))


def main(arguments: list[str]) -> int:
    if config.usage(arguments) or not arguments:
        import benchmark_loader as loader

        print(f"{__doc__}\n\nstep\n{config.describe(Benchmark)}\n\nloader\n{config.describe(loader.LoaderBenchmark)}")
        return 0
    if arguments[0] == "loader":
        return main_loader(arguments[1:])
    if arguments[0] == "engines":
        return main_engines(arguments[1:])
    if arguments[0] == "safety":
        return main_safety(arguments[1:])
    if arguments[0] == "models":
        return main_models(arguments[1:])
    if arguments[0] != "step":
        raise Refusal(USAGE, f"no benchmark '{arguments[0]}'; there are step, engines, loader, safety and models")
    options = config.parse(Benchmark, arguments[1:], recipe.FOLDER)
    resolved, tensors, source = recipe.resolve(options)
    if not isinstance(resolved.encoder, Vit) or resolved.encoder.stem != "patch":
        raise Refusal(USAGE, f"step: timm's rival is a plain ViT, and the encoder is {resolved.encoder.title}")
    measured = resolved.model_copy(update={"batch": resolved.micro_batch or resolved.batch})
    rows = benchmark_step(measured, recipe.build(measured, 1000, tensors, source), options)
    print(table(rows))
    store(rows, Path(options.output) / "step.json")
    return 0


def main_loader(arguments: list[str]) -> int:
    import benchmark_loader as loader

    options = config.parse(loader.LoaderBenchmark, arguments, recipe.FOLDER)
    rows = loader.benchmark_loader(options)
    print(loader.table(rows))
    store(rows, Path(options.output) / "loader.json")
    return 0


def main_models(arguments: list[str]) -> int:
    import benchmark_models as models

    if any(argument.startswith("recipe=") for argument in arguments):
        print(models.of_recipe(arguments))
        return 0
    options = config.parse(models.ModelsBenchmark, arguments, recipe.FOLDER)
    rows = list(models.benchmark_models(options))
    print(models.table(rows))
    store(rows, Path(options.output) / "models.json")
    return 0


def main_safety(arguments: list[str]) -> int:
    import benchmark_safety as safety

    options = config.parse(safety.SafetyBenchmark, arguments, recipe.FOLDER)
    rows = safety.benchmark_safety(options)
    if int(os.environ.get("RANK", "0")) == 0:
        print(safety.table(rows))
        store(rows, Path(options.output) / "safety.json")
    return 0


def main_engines(arguments: list[str]) -> int:
    import benchmark_engines as engines

    options = config.parse(engines.EngineBenchmark, arguments, recipe.FOLDER)
    rows = engines.benchmark_engines(options, images)
    if os.environ["RANK"] == "0":
        print(engines.table(rows))
        store(rows, Path(options.output) / "engines.json")
    return 0


def store(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows with where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n").encode())
    print(f"\n{path}")


def benchmark_step(made: recipe.Recipe, model: Model, options: Benchmark) -> list[dict[str, Any]]:
    """Rows for ours, timm's and the matrix product, on batches of `made.batch`."""
    accelerator = start(
        made.model_copy(update={"micro_batch": None}).asked(None, world=1), "none", Path(options.output)
    )
    device, vit = accelerator.device, made.encoder
    half = uses_bf16(made.precision)
    for parameter in model.head.parameters():  # a head that starts at zero gives any encoder the same loss
        nn.init.normal_(parameter, std=0.02)
    theirs = Model(TimmEncoder(model.encoder), made.head.build(model.encoder, 1000)).to(device)
    theirs.head.load_state_dict(model.head.state_dict())
    batch = images(made.batch, vit, device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
    with torch.no_grad(), autocast():
        losses = {"ssl_vit": float(model.to(device)(batch).loss), "timm": float(theirs(batch).loss)}
    contestants = {
        "ssl_vit": ours(accelerator, made, model, batch),
        "timm": simplest(theirs, batch, made.optim.lr, autocast),
        "matrix product": product(device, half),
    }
    seconds = race(contestants, options.rounds, options.round_steps, device)
    flops = dict.fromkeys(losses, recipe.flops(model) * made.batch) | {"matrix product": 2 * side(device) ** 3}
    peak = flops["matrix product"] / median(seconds["matrix product"])
    case = f"{vit.title} image {vit.image_hw[0]}x{vit.image_hw[1]}"
    rows = []
    for who, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(times, seconds["timm"], strict=True))
        rows.append(
            {
                "benchmark": "step",
                "case": f"{case} batch {made.batch} {'bf16' if half else 'fp32'} {device.type}",
                "who": who,
                "images_per_second": round(made.batch / median(times), 2) if who in losses else None,
                "ratio": round(median(ratios), 3) if who in losses else None,
                "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)] if who in losses else None,
                "tflops": round(flops[who] / median(times) / 1e12, 4),
                "share_of_peak": round(flops[who] / median(times) / peak, 3),
                "first_loss": losses.get(who),
            }
        )
    return rows


def images(count: int, vit: Pixels, device: torch.device) -> Batch:
    """A batch of random images on the device."""
    shape = (count, vit.channels, *vit.image_hw)
    return {
        "image": torch.randint(0, 256, shape, dtype=torch.uint8, device=device),
        "label": torch.randint(0, 1000, (count,), device=device),
        "seed": torch.arange(count, device=device),
        "valid": torch.ones(count, dtype=torch.bool, device=device),
    }


def ours(accelerator: Any, made: recipe.Recipe, model: Model, batch: Batch) -> Callable[[], object]:
    """The loop's own step."""
    outfit(model, accelerator, made.precision, made.compile, made.activation_checkpointing)
    engine = prepare(accelerator, model, made.optim, {})
    task = Task(model, stream=None, optim=made.optim)  # type: ignore[arg-type]  # a step asks no stream
    batches: Iterator[Batch] = repeat(batch)
    return lambda: update(accelerator, made, task, engine, batches, Window(), 0)


def simplest(model: Model, batch: Batch, lr: float, autocast: Callable[[], Any]) -> Callable[[], None]:
    """What one writes first: eager, torch's default AdamW, the loss read every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = model(batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def side(device: torch.device) -> int:
    """Side of the square matrices that stand for the machine's peak."""
    return 8192 if device.type == "cuda" else 2048


def product(device: torch.device, half: bool) -> Callable[[], None]:
    """One large matrix product in the step's precision."""
    a = torch.randn(side(device), side(device), device=device, dtype=torch.bfloat16 if half else torch.float32)
    out = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, a, out=out)

    return step


def race(
    contestants: dict[str, Callable[[], None]], rounds: int, steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step of each contestant in each round; they take turns, after three steps of warm-up each."""
    times: dict[str, list[float]] = {who: [] for who in contestants}
    for step in contestants.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for who, step in contestants.items():
            wait(device)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            wait(device)
            times[who].append((time.perf_counter() - began) / steps)
    return times


def wait(device: torch.device) -> None:
    """Let the device finish before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "date": time.strftime("%F"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading."""
    lines = [
        f"{rows[0]['case']}",
        f"{'':<16}{'images/s':>10}{'ratio':>8}{'spread':>16}{'TFLOP/s':>10}{'of peak':>9}{'loss':>9}",
    ]
    for row in rows:
        if row["first_loss"] is None:
            lines.append(f"{row['who']:<44}{'':>6}{row['tflops']:10.3f}{row['share_of_peak']:9.1%}")
            continue
        spread = "-".join(f"{value:.2f}" for value in row["ratio_spread"])
        speed = f"{row['images_per_second']:10.1f}{row['ratio']:8.2f}{spread:>16}"
        lines.append(f"{row['who']:<16}{speed}{row['tflops']:10.3f}{row['share_of_peak']:9.1%}{row['first_loss']:9.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exits.run(main))
