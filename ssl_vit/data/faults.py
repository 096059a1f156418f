"""Samples that could not be had: what each process saw of them, and how many are borne."""

from dataclasses import dataclass

from ssl_vit.exits import Refusal

FEWEST, SHARE = 10, 1e-4  # borne in an epoch: this many, or this share of its samples
IN_A_ROW = 100


def printable(text: str) -> str:
    """Text that may come from a hostile file, fit for a terminal and a log: no control characters, no surrogates."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class BadSample(Exception):
    """A sample whose bytes are damaged or gone; the text says where and why."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be had, where it lies and why; `substitute` is the sample that took its place."""

    slot: int  # in its batch
    epoch: int
    sample: int
    substitute: int | None
    reason: str


class Faults:
    """The faults that one process met, in the order of its samples."""

    def __init__(self) -> None:
        self.fresh: list[Fault] = []  # since they were last taken
        self.in_a_row = 0
        self.fatal: Refusal | None = None  # a failure that no substitute cures

    def met(self, samples: int, faults: list[Fault]) -> None:
        """Note a batch of so many samples, and the faults among them."""
        self.fresh += faults
        bad = {fault.slot for fault in faults}
        for slot in range(samples):
            self.in_a_row = self.in_a_row + 1 if slot in bad else 0

    def take(self) -> list[Fault]:
        """The faults since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh


def borne(epoch_samples: int, most: int | None) -> int:
    """How many faults of an epoch are borne, over all processes."""
    return max(FEWEST, int(SHARE * epoch_samples)) if most is None else most
