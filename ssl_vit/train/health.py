"""Is the run healthy? Warnings in words, from its rows of metrics; each is said once a start."""

import math
from collections.abc import Iterator
from typing import Any

COLLAPSED = 0.9  # share of the commonest label from which on its prediction teaches nothing
CHANCE = 0.98  # of the loss of a guess by frequency: nothing was learned
PATIENCE = 500  # steps after the warm-up in which a loss should have left it
WAITING = 0.3  # of the time, from which on the loader is the limit
ROWS = 3  # in a row that have to show it, where one may be an accident
WORSE = 0.2  # of the best loss, or of what a guess costs: how much more it may be


class Health:
    """Looks at one row after the other; `warmup` steps are not judged by their loss."""

    def __init__(self, warmup: int):
        self._settled = warmup + PATIENCE
        self._said: set[str] = set()
        self._signs: dict[str, int] = {}  # rows in a row that showed it
        self._best = math.inf
        self._bad = 0

    def look(self, row: dict[str, Any]) -> list[str]:
        """What is wrong by this row, and was not said before."""
        found = {}
        for name, rows, text in self._signs_of(row):
            self._signs[name] = self._signs.get(name, 0) + 1 if text else 0
            if text and self._signs[name] >= rows and name not in self._said:
                found[name] = f"step {row['step']}: {text}"
        self._said |= set(found)
        self._best = min(self._best, math.inf if row.get("loss") is None else row["loss"])
        self._bad = row.get("bad_samples", 0)
        return list(found.values())

    def _signs_of(self, row: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
        """Of each sign its name, how many rows in a row have to show it, and what to say; nothing where it is well."""
        step = row["step"]
        loss = math.inf if row.get("loss") is None else row["loss"]
        same = row.get("top_label", 0.0)
        text = f"{same:.0%} of the patches have the same label, so there is little to learn: look at dry_run.png "
        yield "collapsed", 1, f"{text}(dry_run=true), or take a finer target" if same > COLLAPSED else ""

        guess = row.get("unigram_entropy", row.get("variance", 0.0))  # of classified images none
        text = f"the loss, {loss:.3f}, is still that of guessing by frequency, {guess:.3f}: "
        text += "another optim.lr, more warm-up, or something is wrong with the data"
        yield "chance", 1, text if step >= self._settled and loss > CHANCE * guess > 0 and same <= COLLAPSED else ""

        waits = row.get("data_wait", 0.0)
        text = f"{waits:.0%} of the time is spent waiting for data: more data.workers, shards made with resize=, "
        yield "loader", ROWS, f"{text}or a faster disk" if waits > WAITING else ""

        worse = loss - self._best > WORSE * max(self._best, guess or 1.0)
        text = f"the loss was {self._best:.3f} and is {loss:.3f}: the learning rate may be too high; "
        yield "rate", ROWS, f"{text}a smaller optim.lr or optim.clip" if worse else ""

        bad = row.get("bad_samples", 0)
        text = f"bad samples keep coming, {bad:,} so far: they are listed in bad_samples-*.jsonl; "
        yield "bad samples", ROWS, f"{text}tools/verify_shards.py says which shards" if bad > self._bad else ""
