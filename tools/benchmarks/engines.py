"""The engines' benchmark: images/s of DDP, FSDP2 and ZeRO-1/2/3 beside torch's bare DistributedDataParallel.

`torchrun --nproc_per_node GPUS tools/benchmark.py engines recipe=NAME` runs it. The engines take turns in the same
processes, each built anew for its turn; all start from the same weights and take the same batch, and their losses after
the same number of steps show that they compute the same.
"""

import gc
import os
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ssl_vit import recipes, runtime
from ssl_vit.commands import setup
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.model import Batch, Model
from ssl_vit.train import engine, launch
from ssl_vit.train.loop import Task, update
from ssl_vit.train.metrics import Window
from ssl_vit.train.prepare import outfit
from tools.benchmarks.racing import Rounds, Row, between, images

WARM_UP = 3  # steps
BARE = "bare DDP"


class Options(Rounds, recipes.Pretrain):
    """A recipe, and how to measure it."""


def measure(made: Options) -> list[Row]:
    """Rows for every engine, the same on all processes."""
    if "LOCAL_RANK" not in os.environ:
        raise Refusal(USAGE, "engines: start it as torchrun --nproc_per_node GPUS tools/benchmark.py engines ...")
    made, _, _ = recipes.resolve(made)  # type: ignore[assignment]
    turns: dict[str, list[tuple[float, float, float]]] = {who: [] for who in ("ddp", BARE, *runtime.ENGINES[1:])}
    for _ in range(made.rounds):
        for who, found in turns.items():
            found.append(turn(who, made))
    bare = [seconds for seconds, _, _ in turns[BARE]]
    rows: list[Row] = []
    for who, found in turns.items():
        ratios = sorted(base / seconds for base, (seconds, _, _) in zip(bare, found, strict=True))
        case = f"{made.encoder.title} batch {made.batch} on {runtime.world()} processes"
        row: Row = {"benchmark": "engines", "case": case, "who": who, "ratio": round(median(ratios), 3)}
        row |= {"images_per_second": round(made.batch / median(seconds for seconds, _, _ in found), 2)}
        row |= {"ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)]}
        rows.append(
            {**row, "loss": round(found[0][1], 5), "peak_gib": round(max(peak for *_, peak in found), 2) or None}
        )
    return rows


def turn(who: Any, made: Options) -> tuple[float, float, float]:
    """Seconds a step, the loss of the last one (a mean over processes), and the peak of GPU memory in GiB."""
    runtime.choose("ddp" if who == BARE else who)
    accelerator = launch.start(made.asked(made.optim.clip, runtime.world()), "none", Path(made.output))
    model = setup.build(made, 1000).to(accelerator.device)
    nn.init.normal_(model.head.linear.weight, std=0.02)  # it starts at zero, where any encoder has the same loss
    outfit(model, accelerator, made.precision, made.compile, made.activation_checkpointing)
    torch.manual_seed(accelerator.process_index)
    batch = images(made.micro(runtime.world()), made.encoder, accelerator.device)
    losses: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.detach()))
    step = bare(model, batch, made) if who == BARE else ours(accelerator, made, model, batch)
    for _ in range(WARM_UP):
        step()
    gpu = accelerator.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(made.round_steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - began) / made.round_steps
    loss = losses[-1].float().clone()
    dist.all_reduce(loss)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    forget()
    return seconds, float(loss) / runtime.world(), peak


def ours(accelerator: Any, made: Options, model: Model, batch: Batch) -> Callable[[], object]:
    """The loop's own step, by the engine that was chosen."""
    built = engine.prepare(accelerator, model, made.optim, {})
    task = Task(model, stream=None, optim=made.optim)  # type: ignore[arg-type]  # a step asks no stream
    window, batches = Window(), repeat(batch)
    return lambda: update(accelerator, made, task, built, batches, window, 0)


def bare(model: Model, batch: Batch, made: Options) -> Callable[[], None]:
    """torch's own, with nothing around it."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = made.optim.build(model)
    accumulate = made.batch // runtime.world() // made.micro(runtime.world())

    def step() -> None:
        for micro in range(accumulate):
            wrapped.require_backward_grad_sync = micro == accumulate - 1
            (wrapped(batch).loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), made.optim.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def forget() -> None:
    """Let the next turn begin as a fresh process does, but for the process group."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [rows[0]["case"], f"{'':<10}{'images/s':>10}{'ratio':>8}{'spread':>14}{'loss':>10}{'peak GiB':>10}"]
    for row in rows:
        spread = between(row["ratio_spread"])
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else ""
        speed = f"{row['images_per_second']:10.1f}{row['ratio']:8.2f}{spread:>14}"
        lines.append(f"{row['who']:<10}{speed}{row['loss']:10.5f}{peak:>10}")
    return "\n".join(lines)
