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
from ssl_vit.data.loader import ProcessShard, TrainingStream
from ssl_vit.data.webdataset_stream import SequentialStream
from ssl_vit.distributed import Heartbeat, StopSignal, all_reduce_sum, no_heartbeat, run_on_all, run_on_main
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch, Evaluator, Model
from ssl_vit.rng import hash_key
from ssl_vit.runtime import on_gpu, uptime, uses_bf16
from ssl_vit.train import checkpoint, optim
from ssl_vit.train.anomalies import (
    NO_SKIPS,
    AnomalyGuard,
    BadDataGuard,
    RollBack,
    SkippedBatches,
    check_replicas,
    first_nondeterministic,
)
from ssl_vit.train.checkpoint import collect_on_main, resume
from ssl_vit.train.config import TrainConfig, process_shard, should_evaluate, should_log, should_visualize
from ssl_vit.train.ema import Ema
from ssl_vit.train.engine import Engine, prepare_engine
from ssl_vit.train.logger import Profile, Tracker, find_best_row, read_row
from ssl_vit.train.metrics import HealthMonitor, PeakFlops, StepMetrics
from ssl_vit.train.optim import Optim, set_lr
from ssl_vit.train.precision import compare_with_fp32
from ssl_vit.train.prepare import pin_attention, prepare_model, shards_parameters
from ssl_vit.train.run_folder import Run

if TYPE_CHECKING:
    from accelerate import Accelerator  # 2.7 s, which --help does not wait for


class Stop(Protocol):
    """Asked at the same places by every process, with the same answer on all."""

    def stop_requested(self, now: bool = False) -> bool: ...

    def close(self) -> None: ...


class Interrupted(Exception):
    """An evaluation is left, because the run is to stop."""


@dataclass
class TrainingTask:
    """What a loop needs beside its config, built by the recipe."""

    model: Model
    stream: TrainingStream | SequentialStream
    optim: Optim
    evaluators: Sequence[Evaluator] = ()
    visualized: Batch | None = None  # a few fixed images to draw now and then
    flops_per_image: int = 0  # of training, an image


@dataclass
class TrainState:
    """A training in its process: what the functions of the loop share."""

    run: Run
    accelerator: "Accelerator"
    config: TrainConfig
    task: TrainingTask
    heartbeat: Heartbeat
    stop: Stop
    engine: Engine
    tracker: Tracker
    bad_data: BadDataGuard
    anomalies: AnomalyGuard
    metrics: StepMetrics
    pending_log: bool  # the row of this step, with its evaluation where one is due, is still to be written
    saved_step: int  # the step of the newest checkpoint
    ema: Ema | None
    peak_flops: PeakFlops
    profile: Profile | None
    save_deferred: bool = False  # a checkpoint waits until it is clear whether the run goes back

    def best_step(self) -> int | None:
        """The step of the best evaluation so far, of those that are kept."""
        if self.config.best is None:
            return None
        row = run_on_main(self.accelerator, lambda: find_best_row(self.run.folder, self.config.best), self.heartbeat)
        return row["step"] if row else None

    @property
    def samples_seen(self) -> int:
        """Samples of the stream that are behind this step."""
        return self.anomalies.skipped_batches.batch(self.run.step) * self.config.batch


def fit(
    run: Run,
    accelerator: "Accelerator",
    config: TrainConfig,
    task: TrainingTask,
    heartbeat: Heartbeat = no_heartbeat,
    stop: Stop | None = None,
    skipped_batches: SkippedBatches = NO_SKIPS,
) -> dict[str, Any]:
    """Train to `config.steps`, going on from the newest checkpoint of the run; returns the last row of metrics.

    Raises RollBack if it is to be called again with a new model and what that says to leave out. ExitError: PREEMPTED
    after a signal, with a checkpoint on disk; DATA where the numbers cannot be cured; INTEGRITY where processes differ.
    """
    shard = process_shard(config, accelerator.process_index, accelerator.num_processes)
    moments, state = resume(run, accelerator, config.keep, task.model, task.stream.identity, config.best)
    if run.step >= config.steps and not state.pending_log:
        return read_row(run.folder, run.step) or {}
    is_rollback = skipped_batches.rollbacks > 0  # a roll-back's start, in a process that has told of itself
    skipped_batches = state.left_out.merge(skipped_batches)
    if config.ema_decay is not None and shards_parameters(accelerator):
        raise ExitError(
            ExitCode.USAGE, "average: not under ZeRO-3, which cuts each weight; take zero2 or fsdp2", shared=True
        )
    model = task.model.to(accelerator.device)
    half = uses_bf16(config.precision)
    pin_attention(config.attention, model, accelerator.device, half, shard.micro_batch)
    peak_flops = PeakFlops.for_device(accelerator.device, half)
    prepare_model(model, accelerator, config.precision, config.compile, config.activation_checkpointing)
    if config.on_save_error == "stop":
        copies = 1 + optim.num_moments(task.optim) + (config.ema_decay is not None)
        size = 4 * sum(p.numel() for p in task.model.parameters()) * copies
        run_on_main(accelerator, lambda: checkpoint.check_space(run.checkpoints, size))
    batches = batches_from(task, config, skipped_batches, run.step, shard, accelerator.device)
    if config.verify_step:
        batches = check_determinism(accelerator, task.model, batches, config.seed)
    engine = prepare_engine(accelerator, task.model, task.optim, moments)
    if half and accelerator.device.type == "cpu":
        batches = compare_with_fp32(accelerator, engine, task.model, batches)
    ema = Ema(engine, config.ema_decay, state.average) if config.ema_decay is not None else None
    del moments
    engine.model.register_forward_pre_hook(lambda *_: heartbeat(f"step {run.step + 1}"))  # of an evaluation too
    health = HealthMonitor(task.optim.warmup_steps)
    tracker = Tracker(accelerator, run.folder, run.step, config.steps, config.quiet, health)
    stream = task.stream
    bad_data = BadDataGuard(accelerator, stream.faults, run.folder, stream.epoch_samples, stream.config.max_bad_samples)
    anomalies = AnomalyGuard(
        accelerator, run.folder, stream.names, config.on_loss_spike, skipped_batches, state.losses, state.skipped
    )
    stop = stop or StopSignal(accelerator)
    fields = run, accelerator, config, task, heartbeat, stop, engine, tracker, bad_data, anomalies, state.window
    profile = (
        Profile(run.folder / "profile") if config.profile and accelerator.is_main_process and not is_rollback else None
    )
    train_state = TrainState(
        *fields, pending_log=state.pending_log, saved_step=run.step, ema=ema, peak_flops=peak_flops, profile=profile
    )
    bad_data.resume(train_state.samples_seen, *state.bad_samples)
    if run.step and not is_rollback:
        tracker.print_message(f"goes on from step {run.step:,} of {config.steps:,}")
    row: dict[str, Any] = {}
    start_time, start_step = time.monotonic(), run.step
    try:
        while run.step < config.steps or train_state.pending_log:
            if not train_state.pending_log:
                train_step(train_state, batches)
                if run.step == start_step + 1 and not is_rollback:
                    tracker.print_message(first_step_summary(peak_flops, config))
            if train_state.pending_log:
                num_steps = max(1, run.step - start_step)
                row = log_step(train_state, (time.monotonic() - start_time) / num_steps * (config.steps - run.step))
                keep_best(train_state, row)
    finally:
        stop.close()
        tracker.close()
        if profile is not None:
            profile.close()
    return row


def first_step_summary(peak_flops: PeakFlops, config: TrainConfig) -> str:
    """What to say when the first step of a start is done."""
    kind = "bf16" if uses_bf16(config.precision) else "fp32"
    device = f"{torch.get_num_threads()} threads"
    if on_gpu():
        torch.cuda.synchronize()
        device = f"{torch.cuda.get_device_name()}, attention {config.attention}, cuDNN {torch.backends.cudnn.version()}"
    text = f"{kind} on {device}, torch {torch.__version__}"
    text += f"; a matrix product reaches {peak_flops.measured / 1e12:.2f} TFLOP/s"
    return f"first step {uptime():.1f} s after the start; {text}"


def batches_from(
    task: TrainingTask,
    config: TrainConfig,
    skipped_batches: SkippedBatches,
    step: int,
    shard: ProcessShard,
    device: torch.device,
) -> Iterator[Batch]:
    """This process's micro batches of the steps after `step`."""
    first_batch, num_micro_batches = skipped_batches.batch(step), config.batch // shard.world // shard.micro_batch
    for index, batch in enumerate(task.stream.batches(first_batch * config.batch, shard, device)):
        if first_batch + index // num_micro_batches not in skipped_batches.batches:
            yield batch


def check_determinism(accelerator: "Accelerator", model: Model, batches: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """The same batches, after two passes over the first gave the same bits on every process."""
    batch = next(batches)

    def check_passes() -> None:
        if mismatch := first_nondeterministic(model, batch, seed):
            cause = "a kernel that is not deterministic, or faulty hardware"
            raise ExitError(
                ExitCode.INTEGRITY, f"verify_step: {mismatch} differs between two passes over one batch: {cause}"
            )

    run_on_all(accelerator, check_passes)
    if accelerator.is_main_process:
        print("verify_step: two passes over one batch gave the same bits", flush=True)
    return chain([batch], batches)


def train_step(state: TrainState, batches: Iterator[Batch]) -> None:
    """One step, and what is due after it; raises ExitError(PREEMPTED) where the run is to stop, with a checkpoint."""
    run, config, task, engine = state.run, state.config, state.task, state.engine
    set_lr(engine.optimizer.param_groups, task.optim.lr_at(run.step, config.steps))
    batch_index = state.anomalies.skipped_batches.batch(run.step)
    args = state.accelerator, config, task, engine, batches, state.metrics, run.step, state.heartbeat, batch_index
    loss, norm = optimizer_step(*args, log_metrics=should_log(config, run.step + 1))
    run.step += 1
    if state.ema is not None:
        state.ema.update(run.step)
    state.tracker.advance()
    if state.profile is not None:
        state.profile.advance()
    fault_injection.fault_point("update", run.step)
    final = run.step == config.steps
    state.pending_log = should_log(config, run.step)
    stopping = state.stop.stop_requested()
    save_due = stopping or final or run.step % config.save_every == 0 or state.save_deferred
    state.bad_data.check(state.samples_seen, wait=state.pending_log or save_due)
    try:
        state.anomalies.check(run.step, loss, norm, wait=state.pending_log or save_due)
    except (RollBack, ExitError):
        if engine.replicated:  # numbers that are bad on one process alone may not be the data's
            check_replicas(state.accelerator, engine.parameters, run.step)
        raise
    if engine.replicated and (save_due or run.step % config.replica_check_every == 0):
        check_replicas(state.accelerator, engine.parameters, run.step)
    state.save_deferred = save_due and bool(state.anomalies.nonfinite_batches) and not (stopping or final)
    if save_due and not state.save_deferred:
        save(state, required=stopping or final)
        stopping = state.stop.stop_requested(now=True)  # a signal that came while it saved asks for no second one
    if task.visualized is not None and should_visualize(config, run.step):
        visualize(state, task.visualized)  # after it saved: a run that is to stop may not have the time
    if stopping:
        raise preemption_error(state)


def keep_best(state: TrainState, row: dict[str, Any]) -> None:
    """After an evaluation: have a checkpoint of this step where it is the best so far."""
    metric = state.config.best
    if metric is None or not should_evaluate(state.config, state.run.step):
        return
    if metric not in row:
        available = ", ".join(key for key in row if key.startswith("val_"))
        raise ExitError(
            ExitCode.USAGE, f"best={metric}: it was not measured; there are {available or 'no data.val, so none'}"
        )
    if state.best_step() == state.run.step != state.saved_step:
        save(state, required=False)


def preemption_error(state: TrainState) -> ExitError:
    """The end after a signal; the checkpoint of this step is written."""
    text = f"stopped at step {state.run.step} of {state.config.steps}; the same command goes on"
    return ExitError(ExitCode.PREEMPTED, text, shared=True)


def log_step(state: TrainState, seconds_left: float) -> dict[str, Any]:
    """The row of metrics of this step, with its evaluation where one is due; `seconds_left` are seconds to the end."""
    run, config, task = state.run, state.config, state.task
    row: dict[str, Any] = {
        "step": run.step,
        "samples_seen": state.samples_seen,
        "lr": task.optim.lr_at(run.step - 1, config.steps),
    }
    row |= state.metrics.report(state.accelerator, task.model.head.report, task.flops_per_image, state.peak_flops)
    row["bad_samples"] = state.bad_data.num_bad
    try:
        row |= evaluate(state) if should_evaluate(config, run.step) else {}
    except Interrupted:
        if state.saved_step != run.step:
            save(state, required=True)
        raise preemption_error(state) from None
    fault_injection.fault_point("row", run.step)
    run_on_main(
        state.accelerator, lambda: state.tracker.log_row(row, state.metrics.label_counts, seconds_left), state.heartbeat
    )
    state.metrics, state.pending_log = StepMetrics(), False
    return row


def optimizer_step(
    accelerator: "Accelerator",
    config: TrainConfig,
    task: TrainingTask,
    engine: Engine,
    batches: Iterator[Batch],
    metrics: StepMetrics,
    step: int,
    heartbeat: Heartbeat = no_heartbeat,
    batch_index: int = 0,
    log_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the micro batches of the stream's batch `batch_index`; `log_metrics`: a row follows it.

    Returns this process's mean loss, and the global gradient norm.
    """
    losses, norm, phase = [], torch.zeros(()), metrics.clock.phase
    task.model.head.log_metrics = log_metrics
    fault_injection.fault_point("batch", step + 1)
    for micro in range(accelerator.gradient_accumulation_steps):
        heartbeat(f"the data of step {step + 1}")
        fetch_start = time.monotonic()
        with phase("data"):
            batch = next(batches)
        metrics.data_wait += time.monotonic() - fetch_start
        metrics.num_images += len(batch["image"])
        torch.manual_seed(hash_key(config.seed, "dropout", step, micro, accelerator.process_index))
        with accelerator.accumulate(engine.model):
            with phase("forward"):
                output = engine.model(batch)
            loss = fault_injection.fault_point("loss", batch_index + 1, output.loss)
            with phase("backward"):
                accelerator.backward(loss)
            losses.append(loss.detach())
            metrics.add({**output.sums, "_weight": output.weight, "_digest": batch["seed"].sum()})
            if accelerator.sync_gradients:
                fault_injection.fault_point("weights", step + 1, engine.parameters)
                with phase("update"):
                    if log_metrics:
                        metrics.add({f"_gradient/{layer}": value for layer, value in engine.gradient_squares().items()})
                    norm = engine.step(task.optim.clip)
                if log_metrics:
                    metrics.add({f"_weight/{layer}": value for layer, value in engine.weight_squares().items()})
                is_finite = norm.isfinite()
                finite_norm = torch.where(is_finite, norm, torch.zeros_like(norm))
                metrics.add({"_norm": finite_norm, "_skipped": (~is_finite).float(), "_updates": torch.ones_like(norm)})
    return torch.stack(losses).mean(), norm


@contextmanager
def eval_mode(state: TrainState) -> Iterator[None]:
    """The wrapped model in eval mode, with the averaged weights where there are some."""
    model, ema_weights = state.engine.model, state.ema.swapped_in() if state.ema is not None else nullcontext()
    model.eval()
    with torch.no_grad(), ema_weights:
        yield
    model.train()


def evaluate(state: TrainState) -> dict[str, float]:
    """Every evaluator's values under `val_`.

    Raises Interrupted, on all processes after the same batch, where the run is to stop.
    """

    def on_batch() -> None:
        fault_injection.fault_point("eval.batch", state.run.step)
        if state.stop.stop_requested():
            raise Interrupted

    values: dict[str, float] = {}
    with eval_mode(state):
        for evaluator in state.task.evaluators:
            values |= {f"val_{name}": value for name, value in evaluator.run(state.engine.model, on_batch)}
    return values


def visualize(state: TrainState, images: Batch) -> None:
    """The picture of the fixed images; all processes take part."""
    with eval_mode(state):
        picture = state.engine.model(images, visualize=True)
    log_picture = partial(state.tracker.log_picture, "reconstruction", picture, state.run.step, state.run.folder)
    run_on_main(state.accelerator, log_picture, state.heartbeat)


def save(train_state: TrainState, required: bool) -> None:
    """Publish a checkpoint; the main process writes, all take part in gathering it and in its verdict.

    Where the disk does not take it the run ends, or under on_save_error=continue goes on, unless it is `required`.
    """
    with train_state.metrics.clock.phase("checkpoint"):
        _save(train_state, required)


def _save(train_state: TrainState, required: bool) -> None:
    run, accelerator, step = train_state.run, train_state.accelerator, train_state.run.step
    train_state.heartbeat(f"the checkpoint of step {step}")
    fault_injection.fault_point("save.begin", step)
    state: dict[str, Any] = {
        f"window.{name}": value for name, value in all_reduce_sum(accelerator, train_state.metrics.sums).items()
    }
    state |= {
        "step": step,
        "samples_seen": train_state.samples_seen,
        "seed": train_state.config.seed,
        "data": train_state.task.stream.identity,
        "bad_samples": [train_state.bad_data.num_bad_in_epoch, train_state.bad_data.num_bad],
        "owed": train_state.pending_log,
        "rollbacks": train_state.anomalies.skipped_batches.rollbacks,
        **train_state.anomalies.state,
    }
    model, optimizer = (
        collect_on_main(accelerator, gather())
        for gather in (train_state.engine.weights, train_state.engine.optimizer_state)
    )
    if train_state.ema is not None:
        state |= collect_on_main(accelerator, train_state.ema.tensors())
    args = train_state.config.keep, model, optimizer, state, accelerator.num_processes, train_state.best_step()
    try:
        run_on_main(accelerator, lambda: checkpoint.save(run.checkpoints, step, *args), train_state.heartbeat)
        train_state.saved_step = step
    except ExitError as error:
        if required or error.code != ExitCode.DISK or train_state.config.on_save_error == "stop":
            raise
        if accelerator.is_main_process:
            print(f"on_save_error=continue: {error}", flush=True)
