"""Numbers that are no numbers, losses that spike, replicas that differ, data that is bad."""

import json
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_vit.data.dataset import MAX_CONSECUTIVE_FAULTS, Fault, Faults, printable, tolerated_faults
from ssl_vit.distributed import AsyncAllReduce, Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.model import Batch, Model

MAX_CONSECUTIVE_SKIPS = 3  # skipped updates, then the run goes back
MAX_ROLLBACKS = 2  # of a run, then it ends
LOSS_HISTORY, MIN_LOSSES, SPIKE_SIGMAS = (
    100,
    30,
    6.0,
)  # losses that a spike is measured by, how many it takes, how far it is
MIN_RELATIVE_SIGMA = (
    0.01  # of the median, a sigma at least: a loss that hardly moves yet does not jump when it begins to
)
MAD_TO_SIGMA = 1.4826  # of a normal distribution: its standard deviation by its median absolute deviation
MAX_LOGGED_ANOMALIES = 100  # lines that a start adds to numerics.jsonl

Spike = Literal["warn", "rollback"]
BatchSamples = Callable[[int], Any]
"""The (epoch, sample) pairs of a batch of the stream, by its number."""


@dataclass(frozen=True)
class SkippedBatches:
    """Batches that the run goes without, by their number in the stream, and how often it went back."""

    batches: tuple[int, ...] = ()
    rollbacks: int = 0

    def batch(self, step: int) -> int:
        """The number of the batch that comes after so many steps."""
        for batch in sorted(self.batches):
            step += batch <= step
        return step

    def merge(self, other: "SkippedBatches") -> "SkippedBatches":
        """The batches of both, and the larger count."""
        return SkippedBatches(tuple(sorted({*self.batches, *other.batches})), max(self.rollbacks, other.rollbacks))


NO_SKIPS = SkippedBatches()


class Diverged(ExitError):
    """Numbers that going back did not cure."""


class RollBack(Exception):
    """The run is to go back to its newest checkpoint, and on without some batches."""

    def __init__(self, skipped_batches: SkippedBatches):
        super().__init__(skipped_batches)
        self.skipped_batches = skipped_batches


class AnomalyGuard:
    """Judges each step's loss and gradient norm, on all processes alike.

    They travel to the CPU and over the processes while the next steps run, so that no step waits for them; where
    a checkpoint is due it waits, so that none holds what is still to be judged.
    """

    def __init__(
        self,
        processes: Distributed,
        folder: Path,
        batch_samples: BatchSamples,
        spike: Spike,
        skipped_batches: SkippedBatches = NO_SKIPS,
    ):
        self.path, self.batch_samples, self.spike, self.skipped_batches = (
            folder / "numerics.jsonl",
            batch_samples,
            spike,
            skipped_batches,
        )
        self.losses: deque[float] = deque(maxlen=LOSS_HISTORY)
        self.nonfinite_batches: list[int] = []
        self._is_main, self._world, self._num_logged = processes.is_main, processes.world, 0
        self._pending_copies: deque[tuple[Tensor, Any]] = deque()
        self._pending_steps: deque[tuple[int, int]] = deque()  # and their batches, not judged yet
        self._all_reduce = AsyncAllReduce(processes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, the same on every process."""
        values = {"losses": list(self.losses), "nonfinite_batches": self.nonfinite_batches}
        return values | {"skipped": list(self.skipped_batches.batches), "rollbacks": self.skipped_batches.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; what this start skips already is skipped too."""
        self.losses.extend(state["losses"])
        self.nonfinite_batches = list(state["nonfinite_batches"])
        self.skipped_batches = SkippedBatches(tuple(state["skipped"]), state["rollbacks"]).merge(self.skipped_batches)

    def check(self, step: int, loss: Tensor, norm: Tensor, wait: bool) -> None:
        """Called once a step by every process; raises the same RollBack, or ExitError, on all of them."""
        self._pending_steps.append((step, self.skipped_batches.batch(step - 1)))
        loss_and_norm = torch.stack([loss.double(), norm.double()]).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if loss.is_cuda else None
        if event is not None:
            event.record()
        self._pending_copies.append((loss_and_norm, event))
        while len(self._pending_copies) > (0 if wait else 1):
            values, event = self._pending_copies.popleft()
            if event is not None:
                event.synchronize()
            for loss_sum, norm_sum in self._all_reduce.sums(values, wait):
                self._check_step(*self._pending_steps.popleft(), loss_sum / self._world, norm_sum / self._world)

    def _check_step(self, step: int, batch: int, loss: float, norm: float) -> None:
        finite = abs(norm) < float("inf")  # false for NaN too
        if not finite:
            self.nonfinite_batches.append(batch)
            self._log_anomaly(step, batch, "gradients were not finite, the update was skipped", loss, norm)
            if len(self.nonfinite_batches) >= MAX_CONSECUTIVE_SKIPS:
                self._roll_back(
                    f"gradients were not finite in {MAX_CONSECUTIVE_SKIPS} steps in a row up to {step}",
                    self.nonfinite_batches,
                )
            return
        self.nonfinite_batches.clear()
        if len(self.losses) >= MIN_LOSSES and self._is_spike(loss):
            message = f"the loss is more than {SPIKE_SIGMAS:g} sigma above the last {len(self.losses)}"
            self._log_anomaly(step, batch, message, loss, norm)
            if self.spike == "rollback":
                self._roll_back(f"the loss jumped to {loss:.4g} at step {step}", [batch])
        else:
            self.losses.append(loss)

    def _is_spike(self, loss: float) -> bool:
        center = median(self.losses)
        sigma = MAD_TO_SIGMA * median(abs(value - center) for value in self.losses)
        return loss > center + SPIKE_SIGMAS * max(sigma, MIN_RELATIVE_SIGMA * abs(center))

    def _roll_back(self, reason: str, batches: list[int]) -> None:
        if self.skipped_batches.rollbacks >= MAX_ROLLBACKS:
            hint = f"their samples are in {self.path}; lower optim.lr, or look at the data"
            raise Diverged(ExitCode.DATA, f"{reason}, after {MAX_ROLLBACKS} rollbacks; {hint}", shared=True)
        if self._is_main:
            print(f"{reason}: back to the newest checkpoint, on without batches {batches} ({self.path})", flush=True)
        new_skips = SkippedBatches(tuple(batches), self.skipped_batches.rollbacks + 1)
        raise RollBack(self.skipped_batches.merge(new_skips))

    def _log_anomaly(self, step: int, batch: int, message: str, loss: float, norm: float) -> None:
        """A line on the screen, and one in numerics.jsonl with the samples of the step's global batch."""
        self._num_logged += 1
        if not self._is_main or self._num_logged > MAX_LOGGED_ANOMALIES:
            return
        print(f"step {step}: {message} (loss {loss:.4g}, gradient norm {norm:.4g})", flush=True)
        record = {"step": step, "batch": batch, "what": message, "loss": str(loss), "grad_norm": str(norm)}
        with self.path.open("a") as file:
            file.write(json.dumps({**record, "samples": self.batch_samples(batch)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_replicas(processes: Distributed, parameters: Mapping[str, Tensor], step: int) -> None:
    """Raise the same ExitError(INTEGRITY) on all processes where their weights, which are copies, differ in a bit.

    Compared are the sums of the weights' bits as integers: one flipped bit always changes its tensor's.
    """
    if processes.world == 1:
        return
    local_sums = torch.stack([_bits(value).sum(dtype=torch.int64) for value in parameters.values()])
    gathered = [torch.empty_like(local_sums) for _ in range(processes.world)]
    dist.all_gather(gathered, local_sums)
    sums = torch.stack(gathered)
    if bool((sums == sums[0]).all()):
        return
    columns = [Counter(column) for column in zip(*sums.tolist(), strict=True)]
    majority = torch.tensor([counts.most_common(1)[0][0] for counts in columns])  # where all are alone the first's
    differs = sums.cpu() != majority
    ranks, tensors = (differs.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    hosts = processes.all_gather(socket.gethostname())
    locations = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    name = list(parameters)[tensors[0]]
    text = f"step {step}: the weights of {locations} differ from the others' in {len(tensors)} tensors, first in {name}"
    if processes.world == 2:
        text += " (of two either may be wrong)"
    hint = "a bit flipped in memory or on the way: test that machine; the same command goes on from the last checkpoint"
    raise ExitError(ExitCode.INTEGRITY, f"{text}; {hint}", shared=True)


def first_nondeterministic(model: Model, batch: Batch, seed: int) -> str | None:
    """The first of loss and gradients whose bits differ between two passes over one batch, or None."""

    def run_pass() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        output = model(batch)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"the loss": output.loss.detach(), **{f"the gradient of {n}": g.clone() for n, g in gradients.items()}}

    first, second = run_pass(), run_pass()
    model.zero_grad()
    return next((name for name in first if not torch.equal(_bits(first[name]), _bits(second[name]))), None)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.int32)


MAX_PRINTED_FAULTS = 10  # faults that a process prints; all are in the file
BAD_SAMPLES_GLOB = "bad_samples-*.jsonl"


class BadDataGuard:
    """Counts the bad samples over all processes: `num_bad` of the run, and `num_bad_in_epoch`, which is limited.

    The counts are summed by a reduction that is read one step later, so no step waits for it; where a checkpoint is due
    it waits, so that none is written after a step that was trained on anything but the plan's samples.
    """

    def __init__(
        self, processes: Distributed, faults: Faults, folder: Path, epoch_samples: int, max_bad_samples: int | None
    ):
        self.faults, self.epoch_samples, self.max_bad_samples = (
            faults,
            epoch_samples,
            tolerated_faults(epoch_samples, max_bad_samples),
        )
        self.path = folder / f"bad_samples-{processes.rank}.jsonl"
        self.num_bad, self.num_bad_in_epoch, self._epoch, self._num_printed = 0, 0, 0, 0
        self._all_reduce = AsyncAllReduce(processes)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps, the same on every process."""
        return {"epoch": self._epoch, "num_bad_in_epoch": self.num_bad_in_epoch, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self._epoch, self.num_bad = state["epoch"], state["num_bad"]
        self.num_bad_in_epoch = state["num_bad_in_epoch"]

    def check(self, samples_seen: int, wait: bool) -> None:
        """Called once a step by every process, after `samples_seen` samples; all raise the same ExitError."""
        faults = self.faults.drain()
        self._log_faults(faults)
        local_counts = [
            len(faults),
            self.faults.num_consecutive >= MAX_CONSECUTIVE_FAULTS,
            self.faults.fatal is not None,
        ]
        for num_bad, in_a_row, fatal in self._all_reduce.sums(torch.tensor(local_counts, dtype=torch.float64), wait):
            self.num_bad_in_epoch += int(num_bad)
            self.num_bad += int(num_bad)
            self._check_limits(bool(in_a_row), bool(fatal))
        epoch = samples_seen // self.epoch_samples
        if epoch != self._epoch:
            self._epoch, self.num_bad_in_epoch = epoch, 0

    def _check_limits(self, in_a_row: bool, fatal: bool) -> None:
        if fatal:
            error = self._all_reduce.first_not_none(self.faults.fatal)
            assert error is not None
            raise ExitError(error.code, error.message, shared=True)
        if not in_a_row and self.num_bad_in_epoch <= self.max_bad_samples:
            return
        excess = (
            f"{MAX_CONSECUTIVE_FAULTS} in a row"
            if in_a_row
            else f"{self.num_bad_in_epoch} in this epoch, {self.max_bad_samples} are borne"
        )
        hint = "tools/verify_shards.py says which shards; data.max_bad_samples bears more"
        text = f"too many samples are damaged: {excess}; they are in {self.path.parent}/{BAD_SAMPLES_GLOB}; {hint}"
        raise ExitError(ExitCode.DATA, text, shared=True)

    def _log_faults(self, faults: list[Fault]) -> None:
        if not faults:
            return
        with self.path.open("a") as file:
            for fault in faults:
                record: dict[str, Any] = {name: value for name, value in vars(fault).items() if name != "slot"}
                file.write(json.dumps(record) + "\n")
                self._num_printed += 1
                if self._num_printed <= MAX_PRINTED_FAULTS:
                    action = "left out" if fault.substitute is None else f"replaced by sample {fault.substitute}"
                    print(f"bad sample {fault.sample}, {action}: {printable(fault.reason)}", flush=True)
                if self._num_printed == MAX_PRINTED_FAULTS:
                    print(f"further bad samples are listed in {self.path} only", flush=True)
            file.flush()
            os.fsync(file.fileno())
