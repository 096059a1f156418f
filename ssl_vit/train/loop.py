"""The one loop: pretraining, supervised pretraining and fine-tuning differ by what they pass in."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_vit.config import Config
from ssl_vit.counter import key
from ssl_vit.data.sequential import SequentialStream
from ssl_vit.data.stream import Share, TrainingStream
from ssl_vit.evaluate.accuracy import Evaluator
from ssl_vit.exits import DATA, MISMATCH, PREEMPTED, USAGE, Refusal
from ssl_vit.model import Batch, Model
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import Tensors
from ssl_vit.train.distributed import Beat, StopSignal, from_main, silent, total
from ssl_vit.train.engine import Engine, prepare
from ssl_vit.train.environment import Precision, uses_bf16
from ssl_vit.train.optim import Optim, set_rate
from ssl_vit.train.plugins import Asked
from ssl_vit.train.run import Run
from ssl_vit.train.tracker import Tracker, TrackerName
from ssl_vit.train.watch import DataWatch
from ssl_vit.train.window import Window

if TYPE_CHECKING:
    from accelerate import Accelerator  # 2.7 s, which --help does not wait for


class Loop(Config):
    """How long, how large, how often."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch: int = Field(default=256, ge=1, description="global images an optimizer step")
    micro_batch: int | None = Field(
        default=None, ge=1, description="images a process takes at once (none: all its share)"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of weights, order, crops and masks")
    log_every: int = Field(default=50, ge=1, description="steps between rows of metrics")
    save_every: int = Field(default=1000, ge=1, description="steps between checkpoints")
    eval_every: int | None = Field(default=None, ge=1, description="steps between evaluations (none: at the end)")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")
    precision: Precision = Field(default="auto", description="auto is bf16 on a GPU, fp32 on CPU")
    compile: bool | None = Field(
        default=None, description="torch.compile the encoder's blocks (none: on a GPU, but not under ZeRO-3)"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only each block's input and compute the rest again: less memory, slower",
    )
    timeout: float = Field(
        default=600, gt=0, description="seconds that processes wait for one another before all end, naming the missing"
    )
    tracker: TrackerName = Field(default="tensorboard", description="where metrics go beside metrics.jsonl")
    quiet: bool = Field(default=False, description="no progress")

    def micro(self, world: int) -> int:
        """Images a process takes at once."""
        return self.micro_batch or self.batch // world

    def asked(self, clip: float | None, world: int) -> Asked:
        """What a launch file must not contradict."""
        micro = shared(self, 0, world).micro_batch
        values = self.precision, self.activation_checkpointing, self.timeout
        return Asked(self.batch, micro, self.batch // world // micro, clip, *values)


class Stop(Protocol):
    """Asked once a step by every process, with the same answer on all."""

    def agreed(self) -> bool: ...

    def close(self) -> None: ...


@dataclass
class Task:
    """What a loop needs beside its config, built by the recipe."""

    model: Model
    stream: TrainingStream | SequentialStream
    optim: Optim
    evaluators: Sequence[Evaluator] = ()
    panel: Batch | None = None  # a few fixed images to draw at every evaluation
    flops: int = 0  # of training, an image


def fit(
    run: Run, accelerator: "Accelerator", loop: Loop, task: Task, beat: Beat = silent, stop: Stop | None = None
) -> dict[str, Any]:
    """Train to `loop.steps`, going on from the newest checkpoint of the run; returns the last row of metrics.

    Raises Refusal: PREEMPTED after a signal, with a checkpoint on disk; DATA where the numbers cannot be cured.
    """
    share = shared(loop, accelerator.process_index, accelerator.num_processes)
    moments, window, bad = resume(run, accelerator, task)
    if run.step >= loop.steps:
        return last_row(run)
    outfit(task.model.to(accelerator.device), loop, accelerator)
    engine = prepare(accelerator, task.model, task.optim, moments)
    del moments
    engine.model.register_forward_pre_hook(lambda *_: beat(f"step {run.step + 1}"))  # of an evaluation too
    batches = task.stream.batches(run.step * loop.batch, share, accelerator.device)
    tracker = Tracker(accelerator, run.folder, run.step, loop.steps, loop.quiet)
    stop = stop or StopSignal(accelerator)
    data = task.stream
    watch = DataWatch(accelerator, data.faults, run.folder, data.epoch_samples, data.config.max_bad)
    watch.resume(run.step * loop.batch, *bad)
    row: dict[str, Any] = {}
    began, first = time.monotonic(), run.step
    try:
        while run.step < loop.steps:
            rate = task.optim.rate(run.step, loop.steps)
            set_rate(engine.optimizer.param_groups, rate)
            update(accelerator, loop, task, engine, batches, window, run.step)
            run.step += 1
            tracker.advance()
            judge = bool(run.step == loop.steps or (loop.eval_every and run.step % loop.eval_every == 0))
            told = judge or run.step % loop.log_every == 0
            stopping = stop.agreed()
            due = bool(stopping or run.step == loop.steps or run.step % loop.save_every == 0)
            watch.check(run.step * loop.batch, wait=told or due)
            if told:
                left = (time.monotonic() - began) / (run.step - first) * (loop.steps - run.step)
                row = {"step": run.step, "samples_seen": run.step * loop.batch, "lr": rate}
                row |= window.report(accelerator, task.model.head.report, task.flops)
                row["bad_samples"] = watch.total
                check_numbers(row)
                row |= evaluate(engine.model, task, tracker, run) if judge else {}
                tracker.row(row, left)
                window = Window()
            if due:
                beat(f"the checkpoint of step {run.step}")
                save(run, accelerator, loop, task, engine, window, watch, beat)
            if stopping and run.step < loop.steps:
                text = f"stopped at step {run.step} of {loop.steps}; the same command goes on"
                raise Refusal(PREEMPTED, text, shared=True)
    finally:
        stop.close()
        tracker.close()
    return row


def outfit(model: Model, loop: Loop, accelerator: "Accelerator") -> None:
    """What is put on a model before any engine wraps it: recomputation, compiled blocks, autocast."""
    device = accelerator.device.type
    model.encoder.activation_checkpointing = loop.activation_checkpointing
    can = device == "cuda" and not cuts_layers(accelerator) and has_compiler()
    if can if loop.compile is None else loop.compile:
        compile_blocks(model)
    if uses_bf16(loop.precision):
        model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)


def cuts_layers(accelerator: "Accelerator") -> bool:
    """Whether ZeRO-3 gathers parameters by hooks inside the blocks, which break compiled graphs (pytorch#115484)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def has_compiler() -> bool:
    """Whether there is a C compiler, which Triton asks for when a kernel first runs."""
    found = any(map(shutil.which, ("cc", "gcc", "clang")))
    if not found:
        print("no C compiler: training without torch.compile, which is slower", flush=True)
    return found


def compile_blocks(model: Model) -> None:
    """Compile the encoder's blocks in place, before they are wrapped."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at DDP's bucket edges
    for block in getattr(model.encoder, "blocks", ()):
        block.compile()


def shared(loop: Loop, rank: int, world: int) -> Share:
    """A process's part of a batch; raises Refusal(USAGE) where processes or micro batches do not divide it."""
    if loop.batch % world:
        allowed = ", ".join(str(n) for n in range(1, loop.batch + 1) if loop.batch % n == 0 and n <= 4 * world)
        raise Refusal(USAGE, f"batch={loop.batch} cannot be shared by {world} processes; these can: {allowed}")
    micro = loop.micro(world)
    if (loop.batch // world) % micro:
        text = (
            f"micro_batch={micro} does not divide the {loop.batch // world} images that each of {world} processes takes"
        )
        raise Refusal(USAGE, text)
    return Share(rank, world, micro)


def update(
    accelerator: "Accelerator",
    loop: Loop,
    task: Task,
    engine: Engine,
    batches: Iterator[Batch],
    window: Window,
    step: int,
) -> None:
    """One optimizer step over its micro batches."""
    for micro in range(accelerator.gradient_accumulation_steps):
        asked = time.monotonic()
        batch = next(batches)
        window.waited += time.monotonic() - asked
        window.images += len(batch["image"])
        torch.manual_seed(key(loop.seed, "dropout", step, micro, accelerator.process_index))
        with accelerator.accumulate(engine.model):
            output = engine.model(batch)
            accelerator.backward(output.loss)
            window.add({**output.sums, "_weight": output.weight, "_digest": batch["seed"].sum()})
            if accelerator.sync_gradients:
                norm = engine.step(task.optim.clip)
                fine = norm.isfinite()
                safe = torch.where(fine, norm, torch.zeros_like(norm))
                window.add({"_norm": safe, "_skipped": (~fine).float(), "_updates": torch.ones_like(norm)})


def check_numbers(row: dict[str, Any]) -> None:
    """Stop where every update of a window was skipped: waiting longer cures nothing."""
    if row["skipped_updates"] and row["skipped_updates"] == row["updates"]:
        steps = f"steps {row['step'] - row['updates'] + 1} to {row['step']}"
        text = f"gradients were not finite in all of {steps}; lower optim.lr, or look at the data"
        raise Refusal(DATA, text, shared=True)


def evaluate(model: nn.Module, task: Task, tracker: Tracker, run: Run) -> dict[str, float]:
    """Every evaluator's values under `val_`, and the panel's picture, by the wrapped model in eval mode."""
    values: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        for evaluator in task.evaluators:
            values |= {f"val_{name}": value for name, value in evaluator.run(model)}
        if task.panel is not None:
            picture = model(task.panel, panel=True)
            tracker.picture("reconstruction", picture, run.step, run.folder)
    model.train()
    return values


def save(
    run: Run,
    accelerator: "Accelerator",
    loop: Loop,
    task: Task,
    engine: Engine,
    window: Window,
    watch: DataWatch,
    beat: Beat,
) -> None:
    """Publish a checkpoint; the main process writes, all take part in gathering it and in its verdict."""
    state: dict[str, Any] = {f"window.{name}": value for name, value in total(accelerator, window.sums).items()}
    state |= {
        "step": run.step,
        "samples_seen": run.step * loop.batch,
        "seed": loop.seed,
        "data": task.stream.identity,
        "bad_samples": [watch.bad, watch.total],
    }
    model, optimizer = (on_main(accelerator, each()) for each in (engine.weights, engine.optimizer_state))
    from_main(accelerator, lambda: checkpoint.save(run.checkpoints, run.step, loop.keep, model, optimizer, state), beat)


def on_main(accelerator: "Accelerator", tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    """The tensors, on the main process's CPU; the others take part and keep none."""
    kept = accelerator.is_main_process
    return {name: value.cpu() for name, value in tensors if kept}


def resume(run: Run, accelerator: "Accelerator", task: Task) -> tuple[Tensors, Window, tuple[int, int]]:
    """Put the newest checkpoint's weights in place, and say at which step the run goes on.

    Returns the optimizer's state, what was summed since the last row, and the bad samples of epoch and run; where
    there is no checkpoint they are empty and the step is 0.
    """
    folder = from_main(accelerator, lambda: checkpoint.newest(run.checkpoints))
    if folder is None:
        run.step = 0
        return {}, Window(), (0, 0)
    model, optimizer, state = checkpoint.load(folder)
    if state["data"] != task.stream.identity:
        raise Refusal(MISMATCH, f"run={run.folder}: was started on other data than data.train holds now")
    task.model.load_state_dict(model)
    run.step = state["step"]
    sums = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
    device = accelerator.device
    mine = {name: value.to(device) for name, value in sums.items()} if accelerator.is_main_process else {}
    return optimizer, Window(mine), tuple(state["bad_samples"])


def last_row(run: Run) -> dict[str, Any]:
    """The last row of metrics that a finished run wrote."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])
