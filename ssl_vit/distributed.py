"""Agreement among processes: one answer, one sum, one stop for all."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_vit.errors import ExitError, to_exit_error

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
REPEAT_WINDOW = 5.0  # seconds


Heartbeat = Callable[[str], None]
"""Hears where the training is, before everything that takes long."""


def no_heartbeat(phase: str) -> None:
    """Hears nothing."""


def run_on_main(accelerator: "Accelerator", fn: Callable[[], Value], heartbeat: Heartbeat = no_heartbeat) -> Value:
    """What `make` returns on the main process, on every process; where it fails there, all raise the same ExitError."""
    if accelerator.num_processes == 1:
        return fn()
    objects: list[Any] = [None]
    cause = None
    if accelerator.is_main_process:
        try:
            objects = [fn()]
        except Exception as error:
            exit_error = to_exit_error(error)
            cause, objects = error, [ExitError(exit_error.code, exit_error.message, shared=True)]
    heartbeat("waiting for rank 0")  # which hears it when it is done, and is behind the others until then
    dist.broadcast_object_list(objects, src=0)
    if isinstance(objects[0], ExitError):
        raise objects[0] from cause
    return objects[0]


def all_gather(accelerator: "Accelerator", value: Any) -> list[Any]:
    """Each process's value, by rank, on every process."""
    values = [value]
    if accelerator.num_processes > 1:
        values = [None] * accelerator.num_processes
        dist.all_gather_object(values, value)
    return values


def run_on_all(accelerator: "Accelerator", fn: Callable[[], Value]) -> Value:
    """What `make` returns on this process; where it fails on any, all raise the first such ExitError."""
    if accelerator.num_processes == 1:
        return fn()
    value, failure, cause = None, None, None
    try:
        value = fn()
    except Exception as error:
        exit_error, cause = to_exit_error(error), error
        failure = exit_error.code, f"rank {accelerator.process_index} on {socket.gethostname()}: {exit_error}"
    raise_first(all_gather(accelerator, failure), cause)
    return value  # type: ignore[return-value]


def raise_first(failures: list[Any], cause: BaseException | None = None) -> None:
    """Raise the first of many processes' findings, saying how many there are."""
    errors = [failure for failure in failures if failure is not None]
    if errors:
        code, text, *_ = errors[0].args if isinstance(errors[0], ExitError) else errors[0]
        suffix = f" (processes: {len(errors)})" if len(errors) > 1 else ""
        raise ExitError(code, f"{text}{suffix}", shared=True) from cause


def all_reduce_sum(accelerator: "Accelerator", sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes, as tensors on the CPU; the given ones stay as they are."""
    totals = {name: value.detach().clone() for name, value in sorted(sums.items())}
    if accelerator.num_processes > 1:
        for value in totals.values():
            dist.all_reduce(value)
    return {name: value.cpu() for name, value in totals.items()}


class AsyncAllReduce:
    """Sums over all processes that are started in one step and read in the next, on the CPU: no step waits for them."""

    def __init__(self, accelerator: "Accelerator"):
        self._distributed = accelerator.num_processes > 1
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
    AGAIN it is taken for the same one, which Slurm sends twice.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, accelerator: "Accelerator"):
        self.signal_number, self.signal_time = 0, 0.0
        self._all_reduce = AsyncAllReduce(accelerator)
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
