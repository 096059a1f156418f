"""What a training left behind, to be compared bit for bit with what another one left."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.conftest import TINY
from tests.runs import rows

STEPS = 20


def words(shards: Path, run: Path, *more: str) -> list[str]:
    """A training of some tenths of a second with many rows, evaluations and checkpoints."""
    given = [*TINY, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "tracker=none"]
    given += [f"steps={STEPS}", "save_every=2", "log_every=3", "eval_every=7", "encoder.dropout=0.1"]
    return [*given, "optim.warmup_steps=2", *more]


def state(folder: Path) -> dict[str, str]:
    """A digest of every tensor and value of a checkpoint, by name."""
    found = {}
    for name in ("model", "optimizer", "state"):
        for key, value in load_file(folder / f"{name}.safetensors").items():
            content = f"{value.dtype} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
            found[f"{name} {key}"] = hashlib.sha256(content).hexdigest()
    values = json.loads((folder / "state.json").read_text())
    return found | {f"state {key}": json.dumps(value) for key, value in values.items()}


def left(run: Path) -> list[str]:
    """The names in a run's folder and in its checkpoints', but for the lock."""
    found = [*run.iterdir(), *(run / "checkpoints").iterdir()]
    return sorted(path.relative_to(run).as_posix() for path in found if path.name not in (".lock", "latest"))


def outcome(run: Path, steps: int = STEPS) -> dict[str, Any]:
    """All that must be the same, however often a run was stopped."""
    return {
        "exit": {k: v for k, v in json.loads((run / "exit.json").read_text()).items() if k in ("code", "step")},
        "rows": rows(run),
        "state": state(run / "checkpoints" / f"step-{steps:08d}"),
        "encoder": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "encoder").iterdir()},
        "results": json.loads((run / "results.json").read_text()),
        "left": left(run),
    }
