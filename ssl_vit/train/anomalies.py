"""Numbers that are no numbers, losses that spike, replicas that differ, data that is bad."""

import json
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ssl_vit.data.dataset import IN_A_ROW, Fault, Faults, borne, printable
from ssl_vit.distributed import Later, everyone
from ssl_vit.errors import DATA, INTEGRITY, Refusal
from ssl_vit.model import Batch, Model

if TYPE_CHECKING:
    from accelerate import Accelerator

SKIPS_IN_A_ROW = 3  # skipped updates, then the run goes back
ROLLBACKS = 2  # of a run, then it ends
HISTORY, FEWEST, SIGMAS = 100, 30, 6.0  # losses that a spike is measured by, how many it takes, how far it is
LEAST = 0.01  # of the median, a sigma at least: a loss that hardly moves yet does not jump when it begins to
SPREAD = 1.4826  # of a normal distribution: its standard deviation by its median absolute deviation
SHOWN = 100  # lines that a start adds to numerics.jsonl

Spike = Literal["warn", "rollback"]
Keys = Callable[[int], Any]
"""The (epoch, sample) pairs of a batch of the stream, by its number."""


@dataclass(frozen=True)
class LeftOut:
    """Batches that the run goes without, by their number in the stream, and how often it went back."""

    batches: tuple[int, ...] = ()
    rollbacks: int = 0

    def batch(self, step: int) -> int:
        """The number of the batch that comes after so many steps."""
        for one in sorted(self.batches):
            step += one <= step
        return step

    def and_also(self, other: "LeftOut") -> "LeftOut":
        """The batches of both, and the larger count."""
        return LeftOut(tuple(sorted({*self.batches, *other.batches})), max(self.rollbacks, other.rollbacks))


NOTHING = LeftOut()


class Diverged(Refusal):
    """Numbers that going back did not cure."""


class RollBack(Exception):
    """The run is to go back to its newest checkpoint, and on without some batches."""

    def __init__(self, left_out: LeftOut):
        super().__init__(left_out)
        self.left_out = left_out


class NumberWatch:
    """Judges each step's loss and gradient norm, on all processes alike.

    They travel to the CPU and over the processes while the next steps run, so that no step waits for them; where
    a checkpoint is due it waits, so that none holds what is still to be judged.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        folder: Path,
        keys: Keys,
        spike: Spike,
        left_out: LeftOut,
        losses: Iterable[float] = (),
        skipped: Iterable[int] = (),
    ):
        self.path, self.keys, self.spike, self.left_out = folder / "numerics.jsonl", keys, spike, left_out
        self.losses, self.skipped = deque(losses, HISTORY), list(skipped)
        self._writes, self._world, self._lines = accelerator.is_main_process, accelerator.num_processes, 0
        self._copies: deque[tuple[Tensor, Any]] = deque()
        self._steps: deque[tuple[int, int]] = deque()  # and their batches, not judged yet
        self._later = Later(accelerator)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"losses": list(self.losses), "skipped": self.skipped, "left_out": list(self.left_out.batches)}

    def check(self, step: int, loss: Tensor, norm: Tensor, wait: bool) -> None:
        """Called once a step by every process; raises the same RollBack, or Refusal, on all of them."""
        self._steps.append((step, self.left_out.batch(step - 1)))
        mine = torch.stack([loss.double(), norm.double()]).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if loss.is_cuda else None
        if copied is not None:
            copied.record()
        self._copies.append((mine, copied))
        while len(self._copies) > (0 if wait else 1):
            values, copied = self._copies.popleft()
            if copied is not None:
                copied.synchronize()
            for loss_sum, norm_sum in self._later.sums(values, wait):
                self._judge(*self._steps.popleft(), loss_sum / self._world, norm_sum / self._world)

    def _judge(self, step: int, batch: int, loss: float, norm: float) -> None:
        finite = abs(norm) < float("inf")  # false for NaN too
        if not finite:
            self.skipped.append(batch)
            self._tell(step, batch, "gradients were not finite, the update was skipped", loss, norm)
            if len(self.skipped) >= SKIPS_IN_A_ROW:
                self._go_back(
                    f"gradients were not finite in {SKIPS_IN_A_ROW} steps in a row up to {step}", self.skipped
                )
            return
        self.skipped.clear()
        if len(self.losses) >= FEWEST and self._jumps(loss):
            what = f"the loss is more than {SIGMAS:g} sigma above the last {len(self.losses)}"
            self._tell(step, batch, what, loss, norm)
            if self.spike == "rollback":
                self._go_back(f"the loss jumped to {loss:.4g} at step {step}", [batch])
        else:
            self.losses.append(loss)

    def _jumps(self, loss: float) -> bool:
        middle = median(self.losses)
        sigma = SPREAD * median(abs(one - middle) for one in self.losses)
        return loss > middle + SIGMAS * max(sigma, LEAST * abs(middle))

    def _go_back(self, why: str, batches: list[int]) -> None:
        if self.left_out.rollbacks >= ROLLBACKS:
            cure = f"their samples are in {self.path}; lower optim.lr, or look at the data"
            raise Diverged(DATA, f"{why}, after {ROLLBACKS} rollbacks; {cure}", shared=True)
        if self._writes:
            print(f"{why}: back to the newest checkpoint, on without batches {batches} ({self.path})", flush=True)
        more = LeftOut(tuple(batches), self.left_out.rollbacks + 1)
        raise RollBack(self.left_out.and_also(more))

    def _tell(self, step: int, batch: int, what: str, loss: float, norm: float) -> None:
        """A line on the screen, and one in numerics.jsonl with the samples of the step's global batch."""
        self._lines += 1
        if not self._writes or self._lines > SHOWN:
            return
        print(f"step {step}: {what} (loss {loss:.4g}, gradient norm {norm:.4g})", flush=True)
        line = {"step": step, "batch": batch, "what": what, "loss": str(loss), "grad_norm": str(norm)}
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "samples": self.keys(batch)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_replicas(accelerator: "Accelerator", parameters: Mapping[str, Tensor], step: int) -> None:
    """Raise the same Refusal(INTEGRITY) on all processes where their weights, which are copies, differ in a bit.

    Compared are the sums of the weights' bits as integers: one flipped bit always changes its tensor's.
    """
    if accelerator.num_processes == 1:
        return
    mine = torch.stack([_bits(value).sum(dtype=torch.int64) for value in parameters.values()])
    sums: Any = accelerator.gather(mine[None])
    if bool((sums == sums[0]).all()):
        return
    columns = [Counter(column) for column in zip(*sums.tolist(), strict=True)]
    usual = torch.tensor([counts.most_common(1)[0][0] for counts in columns])  # where all are alone the first's
    wrong = sums.cpu() != usual
    ranks, tensors = (wrong.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    hosts = everyone(accelerator, socket.gethostname())
    who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    name = list(parameters)[tensors[0]]
    text = f"step {step}: the weights of {who} differ from the others' in {len(tensors)} tensors, first in {name}"
    if accelerator.num_processes == 2:
        text += " (of two either may be wrong)"
    cure = "a bit flipped in memory or on the way: test that machine; the same command goes on from the last checkpoint"
    raise Refusal(INTEGRITY, f"{text}; {cure}", shared=True)


def unrepeatable(model: Model, batch: Batch, seed: int) -> str | None:
    """The first of loss and gradients whose bits differ between two passes over one batch, or None."""

    def once() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        output = model(batch)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"the loss": output.loss.detach(), **{f"the gradient of {n}": g.clone() for n, g in gradients.items()}}

    one, two = once(), once()
    model.zero_grad()
    return next((name for name in one if not torch.equal(_bits(one[name]), _bits(two[name]))), None)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.int32)


SHOWN_BAD = 10  # faults that a process prints; all are in the file
FILES = "bad_samples-*.jsonl"


class DataWatch:
    """Counts the bad samples over all processes: `total` of the run, `bad` of the epoch, which is what is limited.

    The counts are summed by a reduction that is read one step later, so no step waits for it; where a checkpoint is due
    it waits, so that none is written after a step that was trained on anything but the plan's samples.
    """

    def __init__(self, accelerator: "Accelerator", faults: Faults, folder: Path, epoch_samples: int, most: int | None):
        self.faults, self.epoch_samples, self.most = faults, epoch_samples, borne(epoch_samples, most)
        self.path = folder / f"bad_samples-{accelerator.process_index}.jsonl"
        self.total, self.bad, self._epoch, self._shown = 0, 0, 0, 0
        self._later = Later(accelerator)

    def resume(self, seen: int, bad: int, total: int = 0) -> None:
        """Go on from a stream position: `bad` samples were met in its epoch, `total` before it."""
        self._epoch, self.total, self.bad = seen // self.epoch_samples, total, bad

    def check(self, seen: int, wait: bool) -> None:
        """Called once a step by every process, after `seen` samples; raises the same Refusal on all of them."""
        fresh = self.faults.take()
        self._list(fresh)
        mine = [len(fresh), self.faults.in_a_row >= IN_A_ROW, self.faults.fatal is not None]
        for bad, in_a_row, fatal in self._later.sums(torch.tensor(mine, dtype=torch.float64), wait):
            self.bad += int(bad)
            self.total += int(bad)
            self._judge(bool(in_a_row), bool(fatal))
        epoch = seen // self.epoch_samples
        if epoch != self._epoch:
            self._epoch, self.bad = epoch, 0

    def _judge(self, in_a_row: bool, fatal: bool) -> None:
        if fatal:
            told = self._later.first(self.faults.fatal)
            assert told is not None
            raise Refusal(told.code, told.message, shared=True)
        if not in_a_row and self.bad <= self.most:
            return
        many = f"{IN_A_ROW} in a row" if in_a_row else f"{self.bad} in this epoch, {self.most} are borne"
        cure = "tools/verify_shards.py says which shards; data.max_bad bears more"
        text = f"too many samples are damaged: {many}; they are in {self.path.parent}/{FILES}; {cure}"
        raise Refusal(DATA, text, shared=True)

    def _list(self, faults: list[Fault]) -> None:
        if not faults:
            return
        with self.path.open("a") as file:
            for fault in faults:
                told: dict[str, Any] = {name: value for name, value in vars(fault).items() if name != "slot"}
                file.write(json.dumps(told) + "\n")
                self._shown += 1
                if self._shown <= SHOWN_BAD:
                    done = "left out" if fault.substitute is None else f"replaced by sample {fault.substitute}"
                    print(f"bad sample {fault.sample}, {done}: {printable(fault.reason)}", flush=True)
                if self._shown == SHOWN_BAD:
                    print(f"further bad samples are listed in {self.path} only", flush=True)
            file.flush()
            os.fsync(file.fileno())
