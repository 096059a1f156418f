"""Measure side by side: tools/benchmark.py NAME [recipe=NAME] [key=value ...]; NAME --help lists its keys.

Each is one process in which the contestants take turns; medians, ratios within a round and their spread; a table and
JSON. Rivals take part where they are installed (pip install 'ssl_vit[benchmark]').

step        a training step: ours, our levers one by one, timm's and Hugging Face's, the matrix products alone;
            preset=cpu or preset=gpu measures all that docs/performance.md has of such a machine
loop        fit() beside the bare step, and from shards beside tensors in memory
loader      images/s of a core from shards to batches, beside webdataset + Pillow + torchvision
attention   the ways to compute attention: time, finite gradients, error
memory      peak memory by batch, and the largest batch that fits, beside the rivals'
scaling     cost against image size, patch, depth, width, batch, samples, shards, workers, processes: fitted exponents;
            memory over time
inference   images/s over input sizes at the best batch, and the largest batch that fits (paper, Figure 12)
engines     under torchrun: the step of DDP, ZeRO and FSDP2 beside bare DDP
safety      the share of a run's time that checkpoints and checks take
models      what every encoder costs, beside the paper's numbers and timm's; with recipe=NAME what that recipe costs
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ssl_vit import config, errors
from ssl_vit.errors import ExitCode, ExitError
from tools.benchmarks.timing import write_rows

NAMES = ("step", "loop", "loader", "attention", "memory", "scaling", "inference", "engines", "safety", "models")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 0
    name, *keys = arguments
    if name not in NAMES:
        raise ExitError(ExitCode.USAGE, f"no benchmark '{name}'; there are {', '.join(NAMES)}")
    benchmark: Any = importlib.import_module(f"tools.benchmarks.{name}")
    if config.wants_help(keys):
        print(f"{benchmark.__doc__}\n{config.format_help(benchmark.Options)}")
        return 0
    if name == "models" and any(word.startswith("recipe=") for word in keys):
        print(benchmark.describe_recipe_cost(keys))
        return 0
    options = config.parse(benchmark.Options, keys)
    if name == "step" and options.preset != "none":
        benchmark = importlib.import_module("tools.benchmarks.machine_report")
    rows, path = [], Path(options.output) / f"{name}.json"
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    for row in benchmark.measure(options):
        rows.append(row)
        if is_rank_zero:
            write_rows(rows, path)  # so far: a benchmark of many minutes may be ended
    if is_rank_zero:
        print(f"{benchmark.table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run_main(main))
