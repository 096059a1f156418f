"""What is in run folders: their checkpoints, and what the same command would do; nothing is changed."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from ssl_vit.config import Config, Plain
from ssl_vit.exits import INTEGRITY, USAGE, Refusal
from ssl_vit.train import checkpoint
from ssl_vit.train.run import holder

UNREADABLE = "cannot be read"


class Runs(Config):
    """Which runs to look at."""

    run: str = Field(default="runs", min_length=1, description="a run folder, or a folder of runs")
    verify: bool = Field(default=True, description="compare every file of every checkpoint with its digest")


@dataclass(frozen=True)
class Saved:
    """A checkpoint, or what was put aside as damaged."""

    name: str
    step: int
    bytes: int
    age: float  # seconds
    state: str

    @property
    def good(self) -> bool:
        """Whether a resume would take it."""
        return self.state in ("verified", "not verified")


def report(options: Runs) -> Iterator[str]:
    """The lines on each run; Refusal: USAGE where there is none, INTEGRITY after all where one cannot be resumed."""
    parent = Path(options.run)
    runs = [folder for folder in (parent, *sorted(parent.glob("*/"))) if (folder / "recipe.yaml").is_file()]
    if not runs:
        raise Refusal(USAGE, f"run={parent}: neither a run nor a folder of runs (no recipe.yaml)")
    lost = []
    for folder in runs:
        saved = list(checkpoints(folder, options.verify))
        yield f"{folder}  {_state(folder)}"
        yield from (f"  {one.step:>9,}  {_size(one.bytes):>9}  {_age(one.age):>8} old  {one.state}" for one in saved)
        yield f"  {_resume(folder, saved)}"
        if saved and not any(one.good for one in saved):
            lost.append(str(folder))
    if lost:
        raise Refusal(INTEGRITY, f"no checkpoint verifies in {', '.join(lost)}")


def checkpoints(folder: Path, verify: bool) -> Iterator[Saved]:
    """A run's checkpoints, newest first, then those put aside."""
    parent = folder / "checkpoints"
    for path in [*reversed(checkpoint.steps(parent)), *sorted(parent.glob("step-" + "[0-9]" * 8 + ".corrupt-*"))]:
        aside = path.name.partition(".")[2]
        files = [file.lstat() for file in path.iterdir()] if path.is_dir() else []
        age = time.time() - path.lstat().st_mtime
        size, state = sum(file.st_size for file in files), _verdict(path, aside, verify)
        yield Saved(path.name, checkpoint.step_of(path), size, age, state)


def _verdict(path: Path, aside: str, verify: bool) -> str:
    if aside:
        return f"put aside as damaged ({aside})"
    if not verify:
        return "not verified"
    try:
        why = checkpoint.flaw(path)
    except (Refusal, OSError) as error:
        return f"{UNREADABLE}{' (76)' if isinstance(error, Refusal) else ''}: {error}"
    return f"damaged: {why}" if why else "verified"


def _state(folder: Path) -> str:
    """Who holds a run, or how its last start ended."""
    if who := holder(folder):
        return f"in use by {who}"
    end = _read(folder / "exit.json")
    if not end:
        return "ended without a word (killed?)"
    return f"{end.get('reason')} (exit code {end.get('code')}, step {end.get('step')}, {end.get('time')})"


def _resume(folder: Path, saved: list[Saved]) -> str:
    steps = _read(folder / "recipe.yaml").get("steps")
    good = next((one for one in saved if one.good), None)
    newest = next((one for one in saved if one.good or one.state.startswith(UNREADABLE)), None)
    if newest is not None and newest is not good:
        return f"the same command refuses: {newest.name} {newest.state}"
    passed = [one.name for one in saved if good and one.step > good.step and "aside" not in one.state]
    past = f", putting {', '.join(passed)} aside" if passed else ""
    if good is None:
        text = "the same command refuses (76): bring one back, or fresh=true"
        return text if saved else "no checkpoint: the same command begins at step 0"
    if str(good.step) == steps:
        return f"the same command finds it done at step {good.step:,}{past}"
    of = f"{int(str(steps)):,}" if str(steps).isdecimal() else "?"
    return f"the same command goes on from step {good.step:,} of {of}{past}"


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's keys; none where it is not there, or no such thing."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _size(size: int) -> str:
    unit = next(unit for unit in (1e9, 1e6, 1e3) if size >= unit or unit == 1e3)
    return f"{size / unit:.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'})[unit]}"


def _age(seconds: float) -> str:
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"
