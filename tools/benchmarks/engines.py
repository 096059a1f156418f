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
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch, Model
from ssl_vit.train import launch
from ssl_vit.train.loop import optimizer_step
from ssl_vit.train.prepare import prepare_model
from tools.benchmarks.baselines import bare_state
from tools.benchmarks.timing import Rounds, Row, format_spread, random_batch

WARM_UP = 3  # steps
BARE = "bare DDP"


class Options(Rounds, recipes.Pretrain):
    """A recipe, and how to measure it."""


def measure(options: Options) -> list[Row]:
    """Rows for every engine, the same on all processes."""
    if "LOCAL_RANK" not in os.environ:
        raise ExitError(
            ExitCode.USAGE, "engines: start it as torchrun --nproc_per_node GPUS tools/benchmark.py engines ..."
        )
    options, _, _ = recipes.resolve_recipe(options)  # type: ignore[assignment]
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("ddp", BARE, *runtime.ENGINES[1:])}
    for _ in range(options.rounds):
        for name, timings in turns.items():
            timings.append(run_turn(name, options))
    bare = [seconds for seconds, _, _ in turns[BARE]]
    rows: list[Row] = []
    for name, timings in turns.items():
        ratios = sorted(base / seconds for base, (seconds, _, _) in zip(bare, timings, strict=True))
        case = f"{options.encoder.title} batch {options.batch} on {runtime.world_size()} processes"
        row: Row = {"benchmark": "engines", "case": case, "who": name, "ratio": round(median(ratios), 3)}
        row |= {"images_per_second": round(options.batch / median(seconds for seconds, _, _ in timings), 2)}
        row |= {"ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)]}
        rows.append(
            {**row, "loss": round(timings[0][1], 5), "peak_gib": round(max(peak for *_, peak in timings), 2) or None}
        )
    return rows


def run_turn(name: Any, options: Options) -> tuple[float, float, float]:
    """Seconds a step, the loss of the last one (a mean over processes), and the peak of GPU memory in GiB."""
    runtime.select_engine("ddp" if name == BARE else name)
    accelerator = launch.start_accelerator(
        options.launch_settings(options.optim.clip, runtime.world_size()), "none", Path(options.output)
    )
    model = setup.build_model(options, 1000).to(accelerator.device)
    nn.init.normal_(model.head.linear.weight, std=0.02)  # it starts at zero, where any encoder has the same loss
    prepare_model(model, accelerator, options.precision, options.compile, options.activation_checkpointing)
    torch.manual_seed(accelerator.process_index)
    batch = random_batch(options.local_micro_batch(runtime.world_size()), options.encoder, accelerator.device)
    losses: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.detach()))
    step = ddp_step(model, batch, options) if name == BARE else ssl_vit_step(accelerator, options, model, batch)
    for _ in range(WARM_UP):
        step()
    gpu = accelerator.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(options.round_steps):
        step()
    if gpu:
        torch.cuda.synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - start) / options.round_steps
    loss = losses[-1].float().clone()
    dist.all_reduce(loss)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    reset_state()
    return seconds, float(loss) / runtime.world_size(), peak


def ssl_vit_step(accelerator: Any, options: Options, model: Model, batch: Batch) -> Callable[[], object]:
    """The loop's own step, by the engine that was chosen."""
    state, batches = bare_state(accelerator, options, model), repeat(batch)
    return lambda: optimizer_step(state, batches)


def ddp_step(model: Model, batch: Batch, options: Options) -> Callable[[], None]:
    """torch's own, with nothing around it."""
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = options.optim.build(model)
    accumulate = options.batch // runtime.world_size() // options.local_micro_batch(runtime.world_size())

    def step() -> None:
        for micro in range(accumulate):
            wrapped.require_backward_grad_sync = micro == accumulate - 1
            (wrapped(batch).loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.optim.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def reset_state() -> None:
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
        spread = format_spread(row["ratio_spread"])
        peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else ""
        speed = f"{row['images_per_second']:10.1f}{row['ratio']:8.2f}{spread:>14}"
        lines.append(f"{row['who']:<10}{speed}{row['loss']:10.5f}{peak:>10}")
    return "\n".join(lines)
