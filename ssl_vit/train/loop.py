"""The one loop: pretraining, supervised pretraining and fine-tuning differ by what they pass in."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssl_vit import fault_injection
from ssl_vit.data.loader import Share, TrainingStream
from ssl_vit.data.webdataset_stream import SequentialStream
from ssl_vit.distributed import Beat, StopSignal, from_main, silent, together, total
from ssl_vit.errors import DISK, INTEGRITY, PREEMPTED, USAGE, Refusal
from ssl_vit.model import Batch, Evaluator, Model
from ssl_vit.rng import key
from ssl_vit.runtime import age, on_gpu, uses_bf16
from ssl_vit.train import checkpoint, optim
from ssl_vit.train.anomalies import NOTHING, DataWatch, LeftOut, NumberWatch, RollBack, check_replicas, unrepeatable
from ssl_vit.train.checkpoint import on_main, resume
from ssl_vit.train.config import Loop, drawn, judged, shared, told
from ssl_vit.train.ema import Average
from ssl_vit.train.engine import Engine, prepare
from ssl_vit.train.logger import Profile, Tracker, best_row, row_of
from ssl_vit.train.metrics import Health, Peak, Window
from ssl_vit.train.optim import Optim, set_rate
from ssl_vit.train.precision import compare_with_fp32
from ssl_vit.train.prepare import cuts_layers, outfit, pin_attention
from ssl_vit.train.run_folder import Run

if TYPE_CHECKING:
    from accelerate import Accelerator  # 2.7 s, which --help does not wait for


class Stop(Protocol):
    """Asked at the same places by every process, with the same answer on all."""

    def agreed(self, now: bool = False) -> bool: ...

    def close(self) -> None: ...


class Interrupted(Exception):
    """An evaluation is left, because the run is to stop."""


@dataclass
class Task:
    """What a loop needs beside its config, built by the recipe."""

    model: Model
    stream: TrainingStream | SequentialStream
    optim: Optim
    evaluators: Sequence[Evaluator] = ()
    panel: Batch | None = None  # a few fixed images to draw now and then
    flops: int = 0  # of training, an image


@dataclass
class Live:
    """A training in its process: what the functions of the loop share."""

    run: Run
    accelerator: "Accelerator"
    loop: Loop
    task: Task
    beat: Beat
    stop: Stop
    engine: Engine
    tracker: Tracker
    watch: DataWatch
    numbers: NumberWatch
    window: Window
    owed: bool  # the row of this step, with its evaluation where one is due, is still to be written
    saved: int  # the step of the newest checkpoint
    average: Average | None
    peak: Peak
    profile: Profile | None
    postponed: bool = False  # a checkpoint waits until it is clear whether the run goes back

    def best(self) -> int | None:
        """The step of the best evaluation so far, of those that are kept."""
        if self.loop.best is None:
            return None
        row = from_main(self.accelerator, lambda: best_row(self.run.folder, self.loop.best), self.beat)
        return row["step"] if row else None

    @property
    def seen(self) -> int:
        """Samples of the stream that are behind this step."""
        return self.numbers.left_out.batch(self.run.step) * self.loop.batch


def fit(
    run: Run,
    accelerator: "Accelerator",
    loop: Loop,
    task: Task,
    beat: Beat = silent,
    stop: Stop | None = None,
    left_out: LeftOut = NOTHING,
) -> dict[str, Any]:
    """Train to `loop.steps`, going on from the newest checkpoint of the run; returns the last row of metrics.

    Raises RollBack where it is to be called again with a new model and what that says to leave out. Refusals: PREEMPTED
    after a signal, with a checkpoint on disk; DATA where the numbers cannot be cured; INTEGRITY where processes differ.
    """
    share = shared(loop, accelerator.process_index, accelerator.num_processes)
    moments, state = resume(run, accelerator, loop.keep, task.model, task.stream.identity, loop.best)
    if run.step >= loop.steps and not state.owed:
        return row_of(run.folder, run.step) or {}
    again = left_out.rollbacks > 0  # a roll-back's start, in a process that has told of itself
    left_out = state.left_out.and_also(left_out)
    if loop.average is not None and cuts_layers(accelerator):
        raise Refusal(USAGE, "average: not under ZeRO-3, which cuts each weight; take zero2 or fsdp2", shared=True)
    model = task.model.to(accelerator.device)
    half = uses_bf16(loop.precision)
    pin_attention(loop.attention, model, accelerator.device, half, share.micro_batch)
    peak = Peak.of(accelerator.device, half)
    outfit(model, accelerator, loop.precision, loop.compile, loop.activation_checkpointing)
    if loop.on_save_error == "stop":
        copies = 1 + optim.moments(task.optim) + (loop.average is not None)
        size = 4 * sum(p.numel() for p in task.model.parameters()) * copies
        from_main(accelerator, lambda: checkpoint.check_space(run.checkpoints, size))
    batches = remaining(task, loop, left_out, run.step, share, accelerator.device)
    if loop.verify_step:
        batches = verified(accelerator, task.model, batches, loop.seed)
    engine = prepare(accelerator, task.model, task.optim, moments)
    if half and accelerator.device.type == "cpu":
        batches = compare_with_fp32(accelerator, engine, task.model, batches)
    average = Average(engine, loop.average, state.average) if loop.average is not None else None
    del moments
    engine.model.register_forward_pre_hook(lambda *_: beat(f"step {run.step + 1}"))  # of an evaluation too
    health = Health(task.optim.warmup_steps)
    tracker = Tracker(accelerator, run.folder, run.step, loop.steps, loop.quiet, health)
    data = task.stream
    watch = DataWatch(accelerator, data.faults, run.folder, data.epoch_samples, data.config.max_bad)
    numbers = NumberWatch(accelerator, run.folder, data.names, loop.spike, left_out, state.losses, state.skipped)
    stop = stop or StopSignal(accelerator)
    parts = run, accelerator, loop, task, beat, stop, engine, tracker, watch, numbers, state.window
    profile = Profile(run.folder / "profile") if loop.profile and accelerator.is_main_process and not again else None
    live = Live(*parts, owed=state.owed, saved=run.step, average=average, peak=peak, profile=profile)
    watch.resume(live.seen, *state.bad_samples)
    if run.step and not again:
        tracker.say(f"goes on from step {run.step:,} of {loop.steps:,}")
    row: dict[str, Any] = {}
    began, first = time.monotonic(), run.step
    try:
        while run.step < loop.steps or live.owed:
            if not live.owed:
                advance(live, batches)
                if run.step == first + 1 and not again:
                    tracker.say(started(peak, loop))
            if live.owed:
                done = max(1, run.step - first)
                row = tell(live, (time.monotonic() - began) / done * (loop.steps - run.step))
                keep_best(live, row)
    finally:
        stop.close()
        tracker.close()
        if profile is not None:
            profile.close()
    return row


def started(peak: Peak, loop: Loop) -> str:
    """What to say when the first step of a start is done."""
    kind = "bf16" if uses_bf16(loop.precision) else "fp32"
    where = f"{torch.get_num_threads()} threads"
    if on_gpu():
        torch.cuda.synchronize()
        where = f"{torch.cuda.get_device_name()}, attention {loop.attention}, cuDNN {torch.backends.cudnn.version()}"
    text = f"{kind} on {where}, torch {torch.__version__}; a matrix product reaches {peak.measured / 1e12:.2f} TFLOP/s"
    return f"first step {age():.1f} s after the start; {text}"


def remaining(
    task: Task, loop: Loop, left_out: LeftOut, step: int, share: Share, device: torch.device
) -> Iterator[Batch]:
    """This process's micro batches of the steps after `step`."""
    first, micros = left_out.batch(step), loop.batch // share.world // share.micro_batch
    for number, batch in enumerate(task.stream.batches(first * loop.batch, share, device)):
        if first + number // micros not in left_out.batches:
            yield batch


def verified(accelerator: "Accelerator", model: Model, batches: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """The same batches, after two passes over the first gave the same bits on every process."""
    batch = next(batches)

    def check() -> None:
        if differs := unrepeatable(model, batch, seed):
            cause = "a kernel that is not deterministic, or faulty hardware"
            raise Refusal(INTEGRITY, f"verify_step: {differs} differs between two passes over one batch: {cause}")

    together(accelerator, check)
    if accelerator.is_main_process:
        print("verify_step: two passes over one batch gave the same bits", flush=True)
    return chain([batch], batches)


def advance(live: Live, batches: Iterator[Batch]) -> None:
    """One step, and what is due after it; raises Refusal(PREEMPTED) where the run is to stop, with a checkpoint."""
    run, loop, task, engine = live.run, live.loop, live.task, live.engine
    set_rate(engine.optimizer.param_groups, task.optim.rate(run.step, loop.steps))
    number = live.numbers.left_out.batch(run.step)
    parts = live.accelerator, loop, task, engine, batches, live.window, run.step, live.beat, number
    loss, norm = update(*parts, told=told(loop, run.step + 1))
    run.step += 1
    if live.average is not None:
        live.average.update(run.step)
    live.tracker.advance()
    if live.profile is not None:
        live.profile.advance()
    fault_injection.point("update", run.step)
    final = run.step == loop.steps
    live.owed = told(loop, run.step)
    stopping = live.stop.agreed()
    due = stopping or final or run.step % loop.save_every == 0 or live.postponed
    live.watch.check(live.seen, wait=live.owed or due)
    try:
        live.numbers.check(run.step, loss, norm, wait=live.owed or due)
    except (RollBack, Refusal):
        if engine.replicated:  # numbers that are bad on one process alone may not be the data's
            check_replicas(live.accelerator, engine.parameters, run.step)
        raise
    if engine.replicated and (due or run.step % loop.check_every == 0):
        check_replicas(live.accelerator, engine.parameters, run.step)
    live.postponed = due and bool(live.numbers.skipped) and not (stopping or final)
    if due and not live.postponed:
        save(live, must=stopping or final)
        stopping = live.stop.agreed(now=True)  # a signal that came while it saved asks for no second one
    if task.panel is not None and drawn(loop, run.step):
        draw(live, task.panel)  # after it saved: a run that is to stop may not have the time
    if stopping:
        raise preempted(live)


def keep_best(live: Live, row: dict[str, Any]) -> None:
    """After an evaluation: have a checkpoint of this step where it is the best so far."""
    name = live.loop.best
    if name is None or not judged(live.loop, live.run.step):
        return
    if name not in row:
        known = ", ".join(key for key in row if key.startswith("val_"))
        raise Refusal(USAGE, f"best={name}: it was not measured; there are {known or 'no data.val, so none'}")
    if live.best() == live.run.step != live.saved:
        save(live, must=False)


def preempted(live: Live) -> Refusal:
    """The end after a signal; the checkpoint of this step is written."""
    text = f"stopped at step {live.run.step} of {live.loop.steps}; the same command goes on"
    return Refusal(PREEMPTED, text, shared=True)


def tell(live: Live, left: float) -> dict[str, Any]:
    """The row of metrics of this step, with its evaluation where one is due; `left` are seconds to the end."""
    run, loop, task = live.run, live.loop, live.task
    row: dict[str, Any] = {"step": run.step, "samples_seen": live.seen, "lr": task.optim.rate(run.step - 1, loop.steps)}
    row |= live.window.report(live.accelerator, task.model.head.report, task.flops, live.peak)
    row["bad_samples"] = live.watch.total
    try:
        row |= evaluate(live) if judged(loop, run.step) else {}
    except Interrupted:
        if live.saved != run.step:
            save(live, must=True)
        raise preempted(live) from None
    fault_injection.point("row", run.step)
    from_main(live.accelerator, lambda: live.tracker.row(row, live.window.labels, left), live.beat)
    live.window, live.owed = Window(), False
    return row


def update(
    accelerator: "Accelerator",
    loop: Loop,
    task: Task,
    engine: Engine,
    batches: Iterator[Batch],
    window: Window,
    step: int,
    beat: Beat = silent,
    number: int = 0,
    told: bool = False,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over its micro batches, of the stream's batch of this number; a row follows it where `told`.

    Returns this process's mean loss, and the global gradient norm.
    """
    losses, norm, phase = [], torch.zeros(()), window.clock.phase
    task.model.head.told = told
    fault_injection.point("batch", step + 1)
    for micro in range(accelerator.gradient_accumulation_steps):
        beat(f"the data of step {step + 1}")
        asked = time.monotonic()
        with phase("data"):
            batch = next(batches)
        window.waited += time.monotonic() - asked
        window.images += len(batch["image"])
        torch.manual_seed(key(loop.seed, "dropout", step, micro, accelerator.process_index))
        with accelerator.accumulate(engine.model):
            with phase("forward"):
                output = engine.model(batch)
            loss = fault_injection.point("loss", number + 1, output.loss)
            with phase("backward"):
                accelerator.backward(loss)
            losses.append(loss.detach())
            window.add({**output.sums, "_weight": output.weight, "_digest": batch["seed"].sum()})
            if accelerator.sync_gradients:
                fault_injection.point("weights", step + 1, engine.parameters)
                with phase("update"):
                    if told:
                        window.add({f"_gradient/{layer}": value for layer, value in engine.gradient_squares().items()})
                    norm = engine.step(task.optim.clip)
                if told:
                    window.add({f"_weight/{layer}": value for layer, value in engine.weight_squares().items()})
                fine = norm.isfinite()
                safe = torch.where(fine, norm, torch.zeros_like(norm))
                window.add({"_norm": safe, "_skipped": (~fine).float(), "_updates": torch.ones_like(norm)})
    return torch.stack(losses).mean(), norm


@contextmanager
def judging(live: Live) -> Iterator[None]:
    """The wrapped model in eval mode, with the averaged weights where there are some."""
    model, averaged = live.engine.model, live.average.in_place() if live.average is not None else nullcontext()
    model.eval()
    with torch.no_grad(), averaged:
        yield
    model.train()


def evaluate(live: Live) -> dict[str, float]:
    """Every evaluator's values under `val_`.

    Raises Interrupted, on all processes after the same batch, where the run is to stop.
    """

    def between() -> None:
        fault_injection.point("eval.batch", live.run.step)
        if live.stop.agreed():
            raise Interrupted

    values: dict[str, float] = {}
    with judging(live):
        for evaluator in live.task.evaluators:
            values |= {f"val_{name}": value for name, value in evaluator.run(live.engine.model, between)}
    return values


def draw(live: Live, panel: Batch) -> None:
    """The picture of the fixed images; all processes take part."""
    with judging(live):
        picture = live.engine.model(panel, panel=True)
    show = partial(live.tracker.picture, "reconstruction", picture, live.run.step, live.run.folder)
    from_main(live.accelerator, show, live.beat)


def save(live: Live, must: bool) -> None:
    """Publish a checkpoint; the main process writes, all take part in gathering it and in its verdict.

    Where the disk does not take it the run ends, or under on_save_error=continue goes on, unless it `must` be there.
    """
    with live.window.clock.phase("checkpoint"):
        _save(live, must)


def _save(live: Live, must: bool) -> None:
    run, accelerator, step = live.run, live.accelerator, live.run.step
    live.beat(f"the checkpoint of step {step}")
    fault_injection.point("save.begin", step)
    state: dict[str, Any] = {f"window.{name}": value for name, value in total(accelerator, live.window.sums).items()}
    state |= {
        "step": step,
        "samples_seen": live.seen,
        "seed": live.loop.seed,
        "data": live.task.stream.identity,
        "bad_samples": [live.watch.bad, live.watch.total],
        "owed": live.owed,
        "rollbacks": live.numbers.left_out.rollbacks,
        **live.numbers.state,
    }
    model, optimizer = (on_main(accelerator, each()) for each in (live.engine.weights, live.engine.optimizer_state))
    if live.average is not None:
        state |= on_main(accelerator, live.average.tensors())
    content = live.loop.keep, model, optimizer, state, accelerator.num_processes, live.best()
    try:
        from_main(accelerator, lambda: checkpoint.save(run.checkpoints, step, *content), live.beat)
        live.saved = step
    except Refusal as end:
        if must or end.code != DISK or live.loop.on_save_error == "stop":
            raise
        if accelerator.is_main_process:
            print(f"on_save_error=continue: {end}", flush=True)
