"""Faults on demand, for tests and drills; without SSL_VIT_FAULT in the environment every `fault_point` does nothing.

    SSL_VIT_FAULT=ACTION:point=PLACE[:rank=R][:step=K or K-L][:seconds=S][,...]

`kill:point=save.mid:rank=1:step=20` has rank 1 killed in the middle of its checkpoint of step 20. docs/reliability.md
lists the places; at `sample`, in a loader worker, the step is the sample's number.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_vit.errors import ExitCode, ExitError

ENV_VARIABLE = "SSL_VIT_FAULT"
SIGNALS = {name: f"SIG{name.upper()}" for name in ("kill", "stop", "term", "int", "usr1", "usr2")}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "eacces": errno.EACCES}
FOREVER = 1e9  # seconds


def _flip_exponent_bit(parameters: dict[str, Tensor]) -> None:
    """Flip the highest bit of an exponent in the first parameter."""
    bits = next(iter(parameters.values())).data.view(-1).view(torch.int32)
    bits[0] ^= 1 << 30


VALUE_FAULTS: dict[str, Callable[[Any], Any]] = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss * float("inf"),
    "spike": lambda loss: loss * 1000,
    "flip": _flip_exponent_bit,
}
ACTIONS = {*SIGNALS, *ERRORS, *VALUE_FAULTS, "abort", "raise", "oom", "sleep", "hang"}


@dataclass(frozen=True)
class Fault:
    """What is to happen, and where."""

    action: str
    point: str
    rank: int | None = None
    first_step: int = 0
    last_step: int | None = None
    seconds: float = 5.0

    def __call__(self, value: Any) -> Any:
        """Let it happen; returns the value that the place goes on with."""
        if self.action in VALUE_FAULTS:
            return VALUE_FAULTS[self.action](value)
        if self.action in SIGNALS:
            os.kill(os.getpid(), getattr(signal, SIGNALS[self.action]))
        elif self.action in ERRORS:
            raise OSError(ERRORS[self.action], os.strerror(ERRORS[self.action]), "injected")
        elif self.action == "abort":
            os.abort()
        elif self.action == "raise":
            raise RuntimeError("injected")
        elif self.action == "oom":
            raise torch.OutOfMemoryError("injected")
        else:
            time.sleep(self.seconds if self.action == "sleep" else FOREVER)
        return value


def parse_faults(text: str) -> list[Fault]:
    """The faults that a variable's text asks for; ExitError(USAGE) names what is wrong with it."""
    faults = []
    for part in filter(None, text.split(",")):
        action, *pairs = part.split(":")
        try:
            options = dict(pair.split("=") for pair in pairs)
            first, _, last = options.pop("step", "").partition("-")
            rank, seconds = (options.pop(name, None) for name in ("rank", "seconds"))
            fault = Fault(action, options.pop("point"), rank if rank is None else int(rank))
            steps = (int(first), int(last or first)) if first else (0, None)
            if action not in ACTIONS or options:
                raise ValueError(action, options)
            faults.append(Fault(action, fault.point, fault.rank, *steps, float(seconds or fault.seconds)))
        except (ValueError, KeyError) as error:
            usage = f"ACTION:point=PLACE[:rank=R][:step=K], ACTION one of {' '.join(sorted(ACTIONS))}"
            raise ExitError(ExitCode.USAGE, f"{ENV_VARIABLE}: {part!r} is not {usage}") from error
    return faults


def _no_fault(point: str, step: int = 0, value: Any = None) -> Any:
    del point, step
    return value


fault_point = _no_fault
"""`fault_point(place, step, value)`: a place where a fault may happen; returns `value`, which some faults change."""


def enable_faults(text: str) -> None:
    """Have `fault_point` do what the text asks for, from now on and in this process; an empty one disarms it."""
    global fault_point
    faults = parse_faults(text)
    rank = int(os.environ.get("RANK", "0"))

    def inject(point: str, step: int = 0, value: Any = None) -> Any:
        for fault in faults:
            is_over = fault.last_step is not None and step > fault.last_step
            if fault.point == point and fault.rank in (None, rank) and step >= fault.first_step and not is_over:
                value = fault(value)
        return value

    fault_point = inject if faults else _no_fault
