"""A look at a few steps: which operations the time goes to, as a table and as a trace."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ssl_vit.durable import write_bytes

FIRST, STEPS = 3, 5  # of this start: those before it warm up, and those that are traced
ROWS = 40


class Profile:
    """Traces steps FIRST + 1 to FIRST + STEPS of a start; told of each step's end, on the main process."""

    def __init__(self, folder: Path):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of which GPU it did not find, and such
        self._folder, self._steps = folder, 0
        self._trace: Any = None

    def advance(self) -> None:
        """One step is done."""
        self._steps += 1
        if self._steps == FIRST:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._trace = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._trace.start()
        elif self._steps == FIRST + STEPS:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was: table.txt and trace.json.gz."""
        trace, self._trace, steps = self._trace, None, self._steps - FIRST
        if trace is not None:
            trace.stop()
        if steps <= 0:
            print(f"profile: nothing was traced, which begins after {FIRST} steps of a start", flush=True)
        if trace is None or steps <= 0:
            return
        self._folder.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        write_bytes(self._folder / "table.txt", f"{steps} steps\n{table}".encode())
        print(f"profile: {steps} steps in {self._folder}: table.txt, trace.json.gz (ui.perfetto.dev)", flush=True)
