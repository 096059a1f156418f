"""What is in run folders: how the runs stand, their checkpoints, what the same command would do; nothing is changed."""

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ssl_vit.config import Config
from ssl_vit.errors import DATA, INTEGRITY, USAGE, Refusal
from ssl_vit.report.format import age, size
from ssl_vit.runs import table
from ssl_vit.runs.status import Standing, found, held, is_run, read, rows, standing
from ssl_vit.train import checkpoint

UNREADABLE = "cannot be read"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a method json, which it gave up

    class Runs(Config):
        """Which runs to look at, and how."""

        run: tuple[str, ...] = Field(default=("runs",), min_length=1, description="run folders, or folders of runs")
        compare: tuple[str, ...] = Field(default=(), description="runs, by path or below run=, whose curves to draw")
        output: str = Field(default="compare.png", description="the picture that compare= draws")
        checkpoints: bool | None = Field(
            default=None, description="the checkpoints of each run too (none: where it is one run that is looked at)"
        )
        verify: bool = Field(default=True, description="compare every file of every checkpoint with its digest")
        json: bool = Field(default=False, description="all of it as one JSON document")  # type: ignore[assignment]


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


def report(options: Runs, width: int | None = None, color: bool = False) -> Iterator[str]:
    """The lines on all runs, cut at `width` signs where there is one.

    Refusal: USAGE where there is none, INTEGRITY after all where one's checkpoints were looked at and none is good.
    """
    folders, root = _chosen(options)
    if "output" in options.model_fields_set and not options.compare:
        raise Refusal(USAGE, "output: is where compare= draws; give compare=RUN,RUN too")
    picture = table.check(options.output) if options.compare else None
    runs = {name: standing(folder) for name, folder in zip(table.names(folders, root), folders, strict=True)}
    notes = _draw(runs, picture) if picture else []
    if not options.json:
        yield from table.table(runs, width, color)
        yield from table.differences(runs, width)
        yield from ["", *notes] if notes else []
    more, lost = {}, []
    for run in _listed(options, list(runs.values())):
        folder = run.folder
        saved = list(checkpoints(folder, options.verify))
        more[folder] = {"checkpoints": [vars(one) for one in saved], "resume": _resume(folder, saved)}
        yield from () if options.json else _lines(run, saved)
        if saved and not any(one.good for one in saved):
            lost.append(str(folder))
    if options.json:
        yield table.document(runs, more)
    if lost:
        raise Refusal(INTEGRITY, f"no checkpoint verifies in {', '.join(lost)}")


def _chosen(options: Runs) -> tuple[list[Path], Path | None]:
    """The run folders that are asked for, and the folder of runs where all are from one."""
    parents = [Path(name) for name in options.run]
    if options.compare:
        return list(dict.fromkeys(_named(name, parents) for name in options.compare)), None
    runs: dict[str, Path] = {}
    for parent in parents:
        here = found(parent)
        if not here:
            raise Refusal(USAGE, f"run={parent}: neither a run nor a folder of runs (no recipe.yaml)")
        for folder in here:
            runs.setdefault(os.path.realpath(folder), folder)
    return list(runs.values()), None if len(parents) > 1 or is_run(parents[0]) else parents[0]


def _named(name: str, parents: list[Path]) -> Path:
    """A run by its path, or by its name below `run`."""
    for folder in (Path(name), *(parent / name for parent in parents)):
        if is_run(folder):
            return folder
    there = [one for parent in parents for one in table.names(found(parent), parent)]
    known = (
        f"there are {', '.join(there[:8])}{', ...' if len(there) > 8 else ''}" if there else "give the path of a run"
    )
    raise Refusal(USAGE, f"compare={name}: no run, by path or below run={','.join(map(str, parents))}; {known}")


def _draw(runs: dict[str, Standing], picture: Path) -> list[str]:
    """Draw the curves of runs; what is to be said of it."""
    made = {name: rows(run.folder) for name, run in runs.items()}
    notes = []
    for name in (name for name, own in made.items() if not own):
        parts = [part for part in found(runs[name].folder)[1:] if rows(part, every=False)]
        hint = f"; its parts have: {', '.join(map(str, parts[:3]))}{', ...' if len(parts) > 3 else ''}" if parts else ""
        notes.append(f"{name}: no row of metrics to draw{hint}")
    if len(notes) == len(runs):
        raise Refusal(DATA, f"compare: {'; '.join(notes)}")
    table.write(table.drawn({name: own for name, own in made.items() if own}), picture)
    return [*notes, f"curves: {picture}"]


def _listed(options: Runs, runs: list[Standing]) -> list[Standing]:
    """The runs of which the checkpoints are looked at: to read those of many takes hours."""
    folders = {run.folder for run in runs}
    alone = sum(not folders & set(folder.parents) for folder in folders) == 1 and not options.compare
    wanted = alone if options.checkpoints is None else options.checkpoints
    return [run for run in runs if wanted and (run.folder / "recipe.yaml").is_file()]


def _lines(run: Standing, saved: list[Saved]) -> Iterator[str]:
    yield ""
    yield f"{run.folder}  {_state(run)}"
    yield from (f"  {one.step:>9,}  {size(one.bytes):>9}  {age(one.age):>8} old  {one.state}" for one in saved)
    yield f"  {_resume(run.folder, saved)}"


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


def _state(run: Standing) -> str:
    """Who holds a run, or how its last start ended."""
    if who := held(run.folder):
        return f"in use by {who}"
    end = read(run.folder / "exit.json")
    if end:
        return f"{end.get('reason')} (exit code {end.get('code')}, step {end.get('step')}, {end.get('time')})"
    return "ended without a word (killed?)" if run.state == "killed" else f"{run.state} {run.why}".rstrip()


def _resume(folder: Path, saved: list[Saved]) -> str:
    recipe = read(folder / "recipe.yaml")
    steps = recipe.get("steps")
    good = next((one for one in saved if one.good), None)
    newest = next((one for one in saved if one.good or one.state.startswith(UNREADABLE)), None)
    if newest is not None and newest is not good:
        return f"the same command refuses: {newest.name} {newest.state}"
    passed = [one.name for one in saved if good and one.step > good.step and "aside" not in one.state]
    past = f", putting {', '.join(passed)} aside" if passed else ""
    if not saved and (recipe.get("seeds", "1") != "1" or recipe.get("tasks")):
        return "the same command goes on where its parts stand"
    if not saved and folder.parent.name == "sweep" and (folder / "results.json").is_file():
        return "the same command takes its result as it is"
    if good is None:
        text = "the same command refuses (76): bring one back, or fresh=true"
        return text if saved else "no checkpoint: the same command begins at step 0"
    if str(good.step) == steps:
        return f"the same command finds it done at step {good.step:,}{past}"
    of = f"{int(str(steps)):,}" if str(steps).isdecimal() else "?"
    return f"the same command goes on from step {good.step:,} of {of}{past}"
