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

from ssl_vit.errors import Refusal, verdict

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
AGAIN = 5.0  # seconds


Beat = Callable[[str], None]
"""Hears where the training is, before everything that takes long."""


def silent(place: str) -> None:
    """Hears nothing."""


def from_main(accelerator: "Accelerator", make: Callable[[], Value], beat: Beat = silent) -> Value:
    """What `make` returns on the main process, on every process; where it fails there, all raise the same Refusal."""
    if accelerator.num_processes == 1:
        return make()
    box: list[Any] = [None]
    cause = None
    if accelerator.is_main_process:
        try:
            box = [make()]
        except Exception as error:
            end = verdict(error)
            cause, box = error, [Refusal(end.code, end.message, shared=True)]
    beat("waiting for rank 0")  # which hears it when it is done, and is behind the others until then
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Refusal):
        raise box[0] from cause
    return box[0]


def everyone(accelerator: "Accelerator", value: Any) -> list[Any]:
    """Each process's value, by rank, on every process."""
    found = [value]
    if accelerator.num_processes > 1:
        found = [None] * accelerator.num_processes
        dist.all_gather_object(found, value)
    return found


def together(accelerator: "Accelerator", make: Callable[[], Value]) -> Value:
    """What `make` returns on this process; where it fails on any, all raise the first such Refusal."""
    if accelerator.num_processes == 1:
        return make()
    value, found, cause = None, None, None
    try:
        value = make()
    except Exception as error:
        end, cause = verdict(error), error
        found = end.code, f"rank {accelerator.process_index} on {socket.gethostname()}: {end}"
    refuse_first(everyone(accelerator, found), cause)
    return value  # type: ignore[return-value]


def refuse_first(found: list[Any], cause: BaseException | None = None) -> None:
    """Raise the first of many processes' findings, saying how many there are."""
    wrong = [one for one in found if one is not None]
    if wrong:
        code, text, *_ = wrong[0].args if isinstance(wrong[0], Refusal) else wrong[0]
        more = f" (processes: {len(wrong)})" if len(wrong) > 1 else ""
        raise Refusal(code, f"{text}{more}", shared=True) from cause


def total(accelerator: "Accelerator", sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all processes, as tensors on the CPU; the given ones stay as they are."""
    whole = {name: value.detach().clone() for name, value in sorted(sums.items())}
    if accelerator.num_processes > 1:
        for value in whole.values():
            dist.all_reduce(value)
    return {name: value.cpu() for name, value in whole.items()}


class Later:
    """Sums over all processes that are started in one step and read in the next, on the CPU: no step waits for them."""

    def __init__(self, accelerator: "Accelerator"):
        self._several = accelerator.num_processes > 1
        self._group: Any = dist.new_group(backend="gloo") if self._several else None
        self._pending: tuple[Any, Tensor] | None = None

    def sums(self, values: Tensor, wait: bool = False) -> list[list[float]]:
        """Give this step's values; returns the sums of the last step, and with `wait` this step's too, oldest first."""
        if not self._several:
            return [values.tolist()]
        found = self.close()
        total = values.clone()
        self._pending = dist.all_reduce(total, group=self._group, async_op=True), total
        return found + (self.close() if wait else [])

    def first(self, value: Value | None) -> Value | None:
        """The first process's value that is not None, on every process, which all have to ask at once."""
        found: list[Any] = [value]
        if self._several:
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, value, group=self._group)
        return next((one for one in found if one is not None), None)

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

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, accelerator: "Accelerator"):
        self.raised, self.when = 0, 0.0
        self._later = Later(accelerator)
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self.raised and time.monotonic() - self.when > AGAIN:
            os._exit(128 + number)
        if not self.raised:
            self.raised, self.when = number, time.monotonic()

    def agreed(self, now: bool = False) -> bool:
        """Called by every process at the same places: True on all of them at the same one.

        A signal counts at the next place, so that no step waits for the others' votes; with `now` it counts at once.
        """
        return any(bool(votes) for (votes,) in self._later.sums(torch.tensor([float(self.raised)]), wait=now))

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        self._later.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
