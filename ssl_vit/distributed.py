"""The processes of a start: one answer, one sum, one stop for all."""

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_vit.errors import ExitError, to_exit_error

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
REPEAT_WINDOW = 5.0  # seconds


@dataclass
class Distributed:
    """This process among the others of a start.

    Methods are collectives: every process calls them, in the same order. What one process alone would have to answer
    for is answered for all, so that they go on together or raise the same ExitError.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_rank: int = 0  # among the processes of its machine
    heartbeat: Callable[[str], None] = lambda phase: None
    """Called with the current phase before a long operation; a watchdog puts its own here."""

    @classmethod
    def from_accelerator(cls, accelerator: "Accelerator") -> "Distributed":
        """Rank, world and device as Accelerate sees them."""
        ranks = accelerator.process_index, accelerator.num_processes, accelerator.device
        return cls(*ranks, accelerator.local_process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def run_on_main(self, fn: Callable[[], Value]) -> Value:
        """Call `fn` on rank 0 and return its value on every process; if it raises there, all raise its ExitError."""
        if self.world == 1:
            return fn()
        objects: list[Any] = [None]
        cause = None
        if self.is_main:
            try:
                objects = [fn()]
            except Exception as error:
                exit_error = to_exit_error(error)
                cause, objects = error, [ExitError(exit_error.code, exit_error.message, shared=True)]
        self.heartbeat("waiting for rank 0")  # rank 0 calls it when it is done: until then it is behind the others
        dist.broadcast_object_list(objects, src=0)
        if isinstance(objects[0], ExitError):
            raise objects[0] from cause
        return objects[0]

    def run_on_all(self, fn: Callable[[], Value]) -> Value:
        """Call `fn` on every process and return its own value; if it raises on any, all raise the first ExitError."""
        if self.world == 1:
            return fn()
        value, failure, cause = None, None, None
        try:
            value = fn()
        except Exception as error:
            exit_error, cause = to_exit_error(error), error
            failure = exit_error.code, f"rank {self.rank} on {socket.gethostname()}: {exit_error}"
        raise_first(self.all_gather(failure), cause)
        return value  # type: ignore[return-value]

    def all_gather(self, value: Any) -> list[Any]:
        """Each process's value, by rank."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def all_reduce(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes, as tensors on the CPU; `sums` stays as it is."""
        totals = {name: value.detach().clone() for name, value in sorted(sums.items())}
        if self.world > 1:
            for value in totals.values():
                dist.all_reduce(value)
        return {name: value.cpu() for name, value in totals.items()}


def raise_first(failures: list[Any], cause: BaseException | None = None) -> None:
    """Raise the first failure of many processes, with their number; a failure is (code, text), an ExitError or None."""
    errors = [failure for failure in failures if failure is not None]
    if errors:
        code, text, *_ = errors[0].args if isinstance(errors[0], ExitError) else errors[0]
        suffix = f" (processes: {len(errors)})" if len(errors) > 1 else ""
        raise ExitError(code, f"{text}{suffix}", shared=True) from cause


class AsyncAllReduce:
    """Sums over all processes that are started in one step and read in the next, on the CPU: no step waits for them."""

    def __init__(self, processes: Distributed):
        self._distributed = processes.world > 1
        self._group: Any = dist.new_group(backend="gloo") if self._distributed else None
        self._pending: tuple[Any, Tensor] | None = None

    def sums(self, values: Tensor, wait: bool = False) -> list[list[float]]:
        """Give this step's values; returns the sums of the last step, and with `wait` this step's too, oldest first."""
        if not self._distributed:
            return [values.tolist()]
        finished = self.close()
        total = values.clone()
        self._pending = dist.all_reduce(total, group=self._group, async_op=True), total
        return finished + (self.close() if wait else [])

    def first_not_none(self, value: Value | None) -> Value | None:
        """The first process's value that is not None, on every process, which all have to ask at once."""
        values: list[Any] = [value]
        if self._distributed:
            values = [None] * dist.get_world_size()
            dist.all_gather_object(values, value, group=self._group)
        return next((item for item in values if item is not None), None)

    def close(self) -> list[list[float]]:
        """Wait for the sums that are under way."""
        if self._pending is None:
            return []
        work, values = self._pending
        work.wait()
        self._pending = None
        return [values.tolist()]


class StopSignal:
    """Whether to stop: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any process stops all after the same step.

    The handler only sets a flag, and the flags are summed. A later signal ends the process at once; within
    REPEAT_WINDOW it is taken for the same one, which Slurm sends twice.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, processes: Distributed):
        self.signal_number, self.signal_time = 0, 0.0
        self._all_reduce = AsyncAllReduce(processes)
        self._previous_handlers = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}

    def _handle(self, signum: int, frame: object) -> None:
        del frame
        if self.signal_number and time.monotonic() - self.signal_time > REPEAT_WINDOW:
            os._exit(128 + signum)
        if not self.signal_number:
            self.signal_number, self.signal_time = signum, time.monotonic()

    def stop_requested(self, now: bool = False) -> bool:
        """Called by every process at the same places: True on all of them at the same one.

        A signal counts at the next place, so that no step waits for the others' votes; with `now` it counts at once.
        """
        return any(
            bool(votes) for (votes,) in self._all_reduce.sums(torch.tensor([float(self.signal_number)]), wait=now)
        )

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._all_reduce.close()
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
