"""The one loop: pretraining, supervised pretraining and fine-tuning differ by what they pass in."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssl_vit import fault_injection
from ssl_vit.data.loader import ProcessShard, TrainingStream
from ssl_vit.data.webdataset_stream import SequentialStream
from ssl_vit.distributed import Distributed, StopSignal
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
from ssl_vit.train.checkpoint import resume
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


@dataclass(kw_only=True)
class TrainState:
    """One training in its process: what the functions of the loop share."""

    run: Run
    config: TrainConfig
    task: TrainingTask
    accelerator: "Accelerator"
    processes: Distributed
    engine: Engine
    ema: Ema | None
    metrics: StepMetrics
    anomalies: AnomalyGuard
    bad_data: BadDataGuard
    tracker: Tracker
    profile: Profile | None
    stop: Stop
    peak_flops: PeakFlops
    pending_log: bool  # the step's row of metrics, with its evaluation if one is due, is still to be written
    saved_step: int  # of the newest checkpoint
    save_deferred: bool = False  # a checkpoint waits until it is clear whether the run rolls back
    start_step: int = field(init=False)
    start_time: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.start_step = self.step

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.run.step

    @property
    def batch_index(self) -> int:
        """The next batch, by its number in the stream."""
        return self.anomalies.skipped_batches.batch(self.step)

    @property
    def samples_seen(self) -> int:
        """Samples of the stream up to this step."""
        return self.batch_index * self.config.batch

    @property
    def seconds_left(self) -> float:
        """Seconds to the end of the run, at the pace of this start."""
        steps = max(1, self.step - self.start_step)
        return (time.monotonic() - self.start_time) / steps * (self.config.steps - self.step)

    def best_step(self) -> int | None:
        """The step of the best evaluation so far, if the best checkpoint is kept."""
        if self.config.best is None:
            return None
        row = self.processes.run_on_main(lambda: find_best_row(self.run.folder, self.config.best))
        return row["step"] if row else None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The parts of a checkpoint; all processes call it, and rank 0 gets the tensors."""
        train = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "seed": self.config.seed,
            "data": self.task.stream.identity,
            "pending_log": self.pending_log,
            "anomalies": self.anomalies.state_dict(),
            "bad_data": self.bad_data.state_dict(),
        }
        ema = {"ema": self.ema.state_dict()} if self.ema is not None else {}
        metrics = self.metrics.state_dict(self.processes)
        return {**self.engine.state_dict(), **ema, "metrics": metrics, "train": train}

    def close(self) -> None:
        """Restore the signal handlers, end the trackers, write the profile."""
        self.stop.close()
        self.tracker.close()
        if self.profile is not None:
            self.profile.close()


def fit(
    run: Run,
    accelerator: "Accelerator",
    processes: Distributed,
    config: TrainConfig,
    task: TrainingTask,
    stop: Stop | None = None,
    skipped_batches: SkippedBatches = NO_SKIPS,
) -> dict[str, Any]:
    """Train to `config.steps` from the newest checkpoint of the run; returns the last row of metrics.

    Raises RollBack to be called again with a new model and the batches to skip; ExitError: PREEMPTED after a signal,
    with a checkpoint on disk; DATA if training diverges; INTEGRITY if processes differ.
    """
    saved = resume(run, processes, config.keep, task.stream.identity, config.best)
    if run.step >= config.steps and not saved["train"]["pending_log"]:
        return read_row(run.folder, run.step) or {}
    is_rollback = skipped_batches.rollbacks > 0  # the same process has printed its summary before
    state, batches = start(run, accelerator, processes, config, task, stop, skipped_batches, saved)
    del saved
    if run.step and not is_rollback:
        state.tracker.print_message(f"goes on from step {run.step:,} of {config.steps:,}")
    row: dict[str, Any] = {}
    try:
        while state.step < config.steps or state.pending_log:
            if not state.pending_log:
                train_step(state, batches)
                if state.step == state.start_step + 1 and not is_rollback:
                    state.tracker.print_message(first_step_summary(state.peak_flops, config))
            if state.pending_log:
                row = log_step(state)
                keep_best(state, row)
    finally:
        state.close()
    return row


def start(
    run: Run,
    accelerator: "Accelerator",
    processes: Distributed,
    config: TrainConfig,
    task: TrainingTask,
    stop: Stop | None,
    skipped_batches: SkippedBatches,
    saved: dict[str, Any],
) -> tuple[TrainState, Iterator[Batch]]:
    """Everything up to the first step: the model prepared and wrapped, what a checkpoint saved put back, batches."""
    is_rollback, device, stream = skipped_batches.rollbacks > 0, processes.device, task.stream
    half = uses_bf16(config.precision)
    if config.ema_decay is not None and shards_parameters(accelerator):
        raise ExitError(
            ExitCode.USAGE, "average: not under ZeRO-3, which cuts each weight; take zero2 or fsdp2", shared=True
        )
    anomalies = AnomalyGuard(processes, run.folder, stream.names, config.on_loss_spike, skipped_batches)
    bad_data = BadDataGuard(processes, stream.faults, run.folder, stream.epoch_samples, stream.config.max_bad_samples)
    metrics = StepMetrics()
    if saved:
        task.model.load_state_dict(saved["model"])
        anomalies.load_state_dict(saved["train"]["anomalies"])
        bad_data.load_state_dict(saved["train"]["bad_data"])
        metrics.load_state_dict(saved["metrics"], processes)

    model, shard = task.model.to(device), process_shard(config, processes.rank, processes.world)
    pin_attention(config.attention, model, device, half, shard.micro_batch)
    peak_flops = PeakFlops.for_device(device, half)
    prepare_model(model, accelerator, config.precision, config.compile, config.activation_checkpointing)
    if config.on_save_error == "stop":
        copies = 1 + optim.num_moments(task.optim) + (config.ema_decay is not None)
        size = 4 * sum(p.numel() for p in model.parameters()) * copies
        processes.run_on_main(lambda: checkpoint.check_space(run.checkpoints, size))
    batches = batches_from(task, config, anomalies.skipped_batches, run.step, shard, device)
    if config.verify_step:
        batches = check_determinism(processes, model, batches, config.seed)
    engine = prepare_engine(accelerator, model, task.optim)
    if saved:
        engine.load_state_dict(saved)
    if half and device.type == "cpu":
        batches = compare_with_fp32(processes, engine, model, batches)
    ema = Ema(engine, config.ema_decay) if config.ema_decay is not None else None
    if ema is not None and saved:
        ema.load_state_dict(saved["ema"])
    engine.model.register_forward_pre_hook(lambda *_: processes.heartbeat(f"step {run.step + 1}"))  # evaluation too
    health = HealthMonitor(task.optim.warmup_steps)
    state = TrainState(
        run=run,
        config=config,
        task=task,
        accelerator=accelerator,
        processes=processes,
        engine=engine,
        ema=ema,
        metrics=metrics,
        anomalies=anomalies,
        bad_data=bad_data,
        tracker=Tracker(accelerator, run.folder, run.step, config.steps, config.quiet, health),
        profile=Profile(run.folder / "profile") if config.profile and processes.is_main and not is_rollback else None,
        stop=stop or StopSignal(processes),
        peak_flops=peak_flops,
        pending_log=bool(saved) and saved["train"]["pending_log"],
        saved_step=run.step,
    )
    return state, batches


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


def check_determinism(processes: Distributed, model: Model, batches: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """The same batches, after two passes over the first gave the same bits on every process."""
    batch = next(batches)

    def check_passes() -> None:
        if mismatch := first_nondeterministic(model, batch, seed):
            cause = "a kernel that is not deterministic, or faulty hardware"
            raise ExitError(
                ExitCode.INTEGRITY, f"verify_step: {mismatch} differs between two passes over one batch: {cause}"
            )

    processes.run_on_all(check_passes)
    if processes.is_main:
        print("verify_step: two passes over one batch gave the same bits", flush=True)
    return chain([batch], batches)


def train_step(state: TrainState, batches: Iterator[Batch]) -> None:
    """One step and what is due after it; raises ExitError(PREEMPTED) with a checkpoint if the run is to stop."""
    run, config = state.run, state.config
    loss, grad_norm = optimizer_step(state, batches)
    run.step += 1
    if state.ema is not None:
        state.ema.update(run.step)
    state.tracker.advance()
    if state.profile is not None:
        state.profile.advance()
    fault_injection.fault_point("update", run.step)
    is_last = run.step == config.steps
    state.pending_log = should_log(config, run.step)
    stopping = state.stop.stop_requested()
    save_due = stopping or is_last or run.step % config.save_every == 0 or state.save_deferred
    check_step(state, loss, grad_norm, save_due)
    state.save_deferred = save_due and bool(state.anomalies.nonfinite_batches) and not (stopping or is_last)
    if save_due and not state.save_deferred:
        save(state, required=stopping or is_last)
        stopping = state.stop.stop_requested(now=True)  # a signal that came while it saved asks for no second one
    if state.task.visualized is not None and should_visualize(config, run.step):
        visualize(state, state.task.visualized)  # after it saved: a run that is to stop may not have the time
    if stopping:
        raise preemption_error(state)


def check_step(state: TrainState, loss: Tensor, grad_norm: Tensor, save_due: bool) -> None:
    """Raise RollBack or ExitError on all processes for bad data, a diverging loss, or replicas that differ."""
    wait, replicated = state.pending_log or save_due, state.engine.replicated
    state.bad_data.check(state.samples_seen, wait)
    try:
        state.anomalies.check(state.step, loss, grad_norm, wait)
    except (RollBack, ExitError):
        if replicated:  # numbers that are bad on one process alone may not be the data's
            check_replicas(state.processes, state.engine.parameters, state.step)
        raise
    if replicated and (save_due or state.step % state.config.replica_check_every == 0):
        check_replicas(state.processes, state.engine.parameters, state.step)


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


def log_step(state: TrainState) -> dict[str, Any]:
    """Write and return the step's row of metrics, with its evaluation if one is due."""
    run, config, task = state.run, state.config, state.task
    row: dict[str, Any] = {
        "step": run.step,
        "samples_seen": state.samples_seen,
        "lr": task.optim.lr_at(run.step - 1, config.steps),
    }
    row |= state.metrics.report(state.processes, task.model.head.report, task.flops_per_image, state.peak_flops)
    row["bad_samples"] = state.bad_data.num_bad
    try:
        row |= evaluate(state) if should_evaluate(config, run.step) else {}
    except Interrupted:
        if state.saved_step != run.step:
            save(state, required=True)
        raise preemption_error(state) from None
    fault_injection.fault_point("row", run.step)
    label_counts, seconds_left = state.metrics.label_counts, state.seconds_left
    state.processes.run_on_main(lambda: state.tracker.log_row(row, label_counts, seconds_left))
    state.metrics, state.pending_log = StepMetrics(), False
    return row


def optimizer_step(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step: learning rate, accumulated gradients, clipping, update.

    Returns this process's mean loss and the global gradient norm, both on the device.
    """
    accelerator, engine, metrics, optim = state.accelerator, state.engine, state.metrics, state.task.optim
    step, phase, log_metrics = state.step, metrics.clock.phase, should_log(state.config, state.step + 1)
    losses, norm = [], torch.zeros(())
    set_lr(engine.optimizer.param_groups, optim.lr_at(step, state.config.steps))
    fault_injection.fault_point("batch", step + 1)
    for micro in range(accelerator.gradient_accumulation_steps):
        state.processes.heartbeat(f"the data of step {step + 1}")
        fetch_start = time.monotonic()
        with phase("data"):
            batch = next(batches)
        metrics.data_wait += time.monotonic() - fetch_start
        metrics.num_images += len(batch["image"])
        torch.manual_seed(hash_key(state.config.seed, "dropout", step, micro, state.processes.rank))
        with accelerator.accumulate(engine.model):
            with phase("forward"):
                output = engine.model(batch, log_metrics=log_metrics)
            loss = fault_injection.fault_point("loss", state.batch_index + 1, output.loss)
            with phase("backward"):
                accelerator.backward(loss)
        losses.append(loss.detach())
        metrics.add({**output.sums, "_weight": output.weight, "_digest": batch["seed"].sum()})
    fault_injection.fault_point("weights", step + 1, engine.parameters)
    with phase("update"):
        if log_metrics:
            metrics.add({f"_gradient/{layer}": value for layer, value in engine.gradient_squares().items()})
        norm = engine.step(optim.clip)
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
    log_picture = partial(state.tracker.log_picture, "reconstruction", picture, state.step, state.run.folder)
    state.processes.run_on_main(log_picture)


def save(state: TrainState, required: bool) -> None:
    """Publish a checkpoint; all processes take part in gathering it, and rank 0 writes.

    If the disk does not take it the run ends, or under on_save_error=continue goes on, unless it is `required`.
    """
    step, processes, config = state.step, state.processes, state.config
    processes.heartbeat(f"the checkpoint of step {step}")
    fault_injection.fault_point("save.begin", step)
    with state.metrics.clock.phase("checkpoint"):
        parts, best = state.state_dict(), state.best_step()
        write = partial(checkpoint.save, state.run.checkpoints, step, parts, config.keep, processes.world, best)
        try:
            processes.run_on_main(write)
            state.saved_step = step
        except ExitError as error:
            if required or error.code != ExitCode.DISK or config.on_save_error == "stop":
                raise
            if processes.is_main:
                print(f"on_save_error=continue: {error}", flush=True)
