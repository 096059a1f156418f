"""What a run leaves behind, as bits that can be compared with those of a run that nothing happened to."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ssl_vit.data import manifest
from ssl_vit.data.dataset import Data
from ssl_vit.data.plan import Plan
from ssl_vit.rng import sample_seed
from ssl_vit.train import checkpoint
from ssl_vit.train.metrics import PHASES
from tests.conftest import TINY
from tests.processes import Start

SPEEDS = {"images_per_second", "tflops", "mfu", "mfu_data_sheet", "data_wait", "peak_memory_gib"}
SPEEDS |= {f"time_{name}" for name in PHASES}  # of the clock, not of the run
STEPS, BATCH = 30, 8
BASE_ARGS = [*TINY, f"steps={STEPS}", f"batch={BATCH}", "log_every=3", "eval_every=10", "tracker=none"]
BASE_ARGS += ["save_every=7", "keep=3", "optim.warmup_steps=2", "data.workers=1", "encoder.dropout=0.1"]
"""A run in which rows, evaluations and checkpoints fall on different steps."""


def run_args(shards: Path, run: Path, *extra: str) -> list[str]:
    """The command of a run on the tiny shards."""
    return [*BASE_ARGS, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", *extra]


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics, without what is of the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in SPEEDS} for line in lines]


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that are there, oldest first."""
    return [int(folder.name[-8:]) for folder in checkpoint.list_checkpoints(run / "checkpoints")]


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint."""
    return checkpoint.list_checkpoints(run / "checkpoints")[-1]


def holds_lock(start: Start, run: Path) -> bool:
    """Whether a start's ranks have met and hold the folder; before that, only a launcher can see that one is gone."""
    return (run / ".lock").exists() and f"pid {start.processes[0].pid} " in (run / ".lock").read_text()


def read_exit(run: Path) -> dict[str, Any]:
    """How the last start ended."""
    return json.loads((run / "exit.json").read_text())


def checkpoint_bits(run: Path) -> dict[str, bytes]:
    """All bits of the newest checkpoint, by name."""
    bits = {"train.json": (last_checkpoint(run) / "train.json").read_bytes()}
    for path in last_checkpoint(run).glob("*.safetensors"):
        for key, value in load_file(path).items():
            bits[f"{path.stem}/{key}"] = str(value.dtype).encode() + value.tobytes()
    return bits


def run_bits(run: Path) -> dict[str, bytes]:
    """All bits that a finished run leaves: its last checkpoint, rows, encoder, results, and how it ended."""
    bits = checkpoint_bits(run)
    bits |= {f"row {row['step']}": json.dumps(row, sort_keys=True).encode() for row in metric_rows(run)}
    bits |= {f"encoder/{path.name}": path.read_bytes() for path in (run / "encoder").iterdir()}
    if (run / "exit.json").exists():  # a part of a sweep has none of its own
        bits |= {"end": f"{read_exit(run)['code']}, {read_exit(run)['step']}".encode()}
        bits |= {"results.json": (run / "results.json").read_bytes()}
    return bits


def file_names(run: Path) -> list[str]:
    """What is in a run's folder, but for what a run has beyond that which nothing happened to: aside, or noted."""
    paths = [path.relative_to(run).as_posix() for folder in (run, run / "checkpoints") for path in folder.iterdir()]
    extra_files = re.compile(r"before-|.*\.corrupt-|numerics\.jsonl|bad_samples-|\.lock")
    return sorted(name for name in paths if not extra_files.match(name))


def differing_bits(actual: dict[str, bytes], expected: dict[str, bytes]) -> dict[str, int]:
    """The names under which bits differ, and how many."""
    return {
        name: count
        for name in actual | expected
        if (count := _count_bits(actual.get(name, b""), expected.get(name, b"")))
    }


def _count_bits(a: bytes, b: bytes) -> int:
    size = max(len(a), len(b))
    changed = np.frombuffer(a.ljust(size, b"\0"), np.uint8) ^ np.frombuffer(b.ljust(size, b"\0"), np.uint8)
    return int(np.unpackbits(changed).sum()) or 8 * abs(len(a) - len(b))


def lost_samples(run: Path, shards: Path, steps: int = STEPS) -> int:
    """How many samples of the plan no row accounts for: those of rows whose digest or count is not the plan's."""
    sizes = [shard.samples for shard in manifest.load(shards / "train").shards]
    plan = Plan(sizes, seed=0, batch=BATCH, lanes=Data().lanes, window=Data().shuffle_window)
    num_lost = last_step = 0
    for row in metric_rows(run):
        seeds = [
            sample_seed(0, epoch, sample)
            for step in range(last_step, row["step"])
            for epoch, sample in plan.batch(step)
        ]
        is_correct = (
            row["samples_digest"] == f"{sum(seeds) % 2**64:016x}" and row["samples_seen"] == row["step"] * BATCH
        )
        num_lost, last_step = num_lost + (not is_correct) * len(seeds), row["step"]
    return num_lost + BATCH * (steps - last_step)


def run_straight(shards: Path, world: int, folder: Path, *extra: str) -> Path:
    """A run of this many ranks that nothing happens to, folder/run."""
    start = Start(run_args(shards, folder / "run", *extra), folder / "logs", world)
    assert start.wait(600) == [0] * world, start.output()
    return folder / "run"
