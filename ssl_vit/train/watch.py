"""Bad data while training: listed by each process, counted over all, and where it is too much all stop together."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssl_vit.data.faults import IN_A_ROW, Fault, Faults, borne, printable
from ssl_vit.exits import DATA, Refusal
from ssl_vit.train.distributed import Later

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = 10  # faults that a process prints; all are in the file
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
                if self._shown <= SHOWN:
                    done = "left out" if fault.substitute is None else f"replaced by sample {fault.substitute}"
                    print(f"bad sample {fault.sample}, {done}: {printable(fault.reason)}", flush=True)
                if self._shown == SHOWN:
                    print(f"further bad samples are listed in {self.path} only", flush=True)
            file.flush()
            os.fsync(file.fileno())
