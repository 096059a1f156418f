"""Weak scaling: the step of 1, 2, ... processes that take the same number of images each, one launch for each number.

This file is also what torchrun starts in every process: `benchmark_scaling_processes.py RECIPE.yaml ANSWER.json`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import benchmark_engines as engines
import torch
from exponents import growth
from racing import Row

from ssl_vit import config, exits, recipe
from ssl_vit.exits import INTERNAL, Refusal
from ssl_vit.family import follow_launcher
from ssl_vit.train.environment import on_gpu

if TYPE_CHECKING:
    from benchmark_scaling import Options

ROOT = Path(__file__).parent.parent


def measure(made: "Options", axis: str) -> list[Row]:
    """The row of an axis whose formula is that a step takes as long however many processes there are."""
    counts = sorted(set(made.processes))
    there = torch.cuda.device_count() if on_gpu() else len(os.sched_getaffinity(0))
    left_out = {count: f"more than the {there} {'GPUs' if on_gpu() else 'cores'}" for count in counts if count > there}
    if on_gpu():
        counts = [count for count in counts if count <= there]
    threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // max(counts, default=1)))
    seconds = {count: launched(made, count, threads) for count in counts}
    case = f"{made.encoder.title} batch {made.batch} a process, {threads} threads each"
    row = growth(axis, case, seconds, lambda _: 1.0, lambda count: made.batch * count, left_out)
    row["efficiency"] = [round(row["milliseconds"][0] / ms, 3) for ms in row["milliseconds"]]
    return [row]


def launched(made: "Options", count: int, threads: int) -> list[float]:
    """Seconds a step in each round of a launch of so many processes."""
    whole = {name: getattr(made, name) for name in engines.Options.model_fields} | {"batch": made.batch * count}
    with TemporaryDirectory() as place:
        given, answer = Path(place) / "given.yaml", Path(place) / "answer.json"
        given.write_text(config.dump(engines.Options.model_validate(whole)))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        command = [sys.executable, *launcher, __file__, str(given), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise Refusal(INTERNAL, f"processes: a launch of {count} ended with {done.returncode}; see above")
        return json.loads(answer.read_text())


def main(arguments: list[str]) -> int:
    """A process of a launch: all measure, the first writes down what it found."""
    follow_launcher()
    made: engines.Options = config.parse(engines.Options, [f"recipe={arguments[0]}"], recipe.FOLDER)
    seconds = [engines.turn("ddp", made)[0] for _ in range(made.rounds)]
    if os.environ["RANK"] == "0":
        Path(arguments[1]).write_text(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    exits.run(main)
