"""A training of some tenths of a second with many rows, evaluations and checkpoints."""

from pathlib import Path

from tests.conftest import TINY


def words(shards: Path, run: Path, *more: str) -> list[str]:
    """Its command."""
    given = [*TINY, f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "tracker=none"]
    given += ["steps=20", "save_every=2", "log_every=3", "eval_every=7", "encoder.dropout=0.1"]
    return [*given, "optim.warmup_steps=2", *more]
