"""Faults on demand, for tests and drills; without SSL_VIT_FAULT in the environment every `point` does nothing.

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

from ssl_vit.errors import USAGE, Refusal

VARIABLE = "SSL_VIT_FAULT"
SIGNALS = {name: f"SIG{name.upper()}" for name in ("kill", "stop", "term", "int", "usr1", "usr2")}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "eacces": errno.EACCES}
FOREVER = 1e9  # seconds


def _flip(parameters: dict[str, Tensor]) -> None:
    """Flip the highest bit of an exponent in the first parameter."""
    first = next(iter(parameters.values())).data.view(-1).view(torch.int32)
    first[0] ^= 1 << 30


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss * float("inf"),
    "spike": lambda loss: loss * 1000,
    "flip": _flip,
}
ACTIONS = {*SIGNALS, *ERRORS, *CHANGES, "abort", "raise", "oom", "sleep", "hang"}


@dataclass(frozen=True)
class Fault:
    """What is to happen, and where."""

    action: str
    point: str
    rank: int | None = None
    first: int = 0
    last: int | None = None
    seconds: float = 5.0

    def __call__(self, value: Any) -> Any:
        """Let it happen; returns the value that the place goes on with."""
        if self.action in CHANGES:
            return CHANGES[self.action](value)
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


def parse(text: str) -> list[Fault]:
    """The faults that a variable's text asks for; Refusal(USAGE) names what is wrong with it."""
    found = []
    for part in filter(None, text.split(",")):
        action, *pairs = part.split(":")
        try:
            given = dict(pair.split("=") for pair in pairs)
            first, _, last = given.pop("step", "").partition("-")
            rank, seconds = (given.pop(name, None) for name in ("rank", "seconds"))
            fault = Fault(action, given.pop("point"), rank if rank is None else int(rank))
            steps = (int(first), int(last or first)) if first else (0, None)
            if action not in ACTIONS or given:
                raise ValueError(action, given)
            found.append(Fault(action, fault.point, fault.rank, *steps, float(seconds or fault.seconds)))
        except (ValueError, KeyError) as error:
            cure = f"ACTION:point=PLACE[:rank=R][:step=K], ACTION one of {' '.join(sorted(ACTIONS))}"
            raise Refusal(USAGE, f"{VARIABLE}: {part!r} is not {cure}") from error
    return found


def _nothing(place: str, step: int = 0, value: Any = None) -> Any:
    del place, step
    return value


point = _nothing
"""`point(place, step, value)`: a place where faults may be asked for; returns `value`, which some of them change."""


def arm(text: str) -> None:
    """Have `point` do what the text asks for, from now on and in this process; an empty one disarms it."""
    global point
    faults = parse(text)
    rank = int(os.environ.get("RANK", "0"))

    def armed(place: str, step: int = 0, value: Any = None) -> Any:
        for fault in faults:
            after = fault.last is not None and step > fault.last
            if fault.point == place and fault.rank in (None, rank) and step >= fault.first and not after:
                value = fault(value)
        return value

    point = armed if faults else _nothing
