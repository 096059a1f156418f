"""How runs stand, their checkpoints and their curves: tools/runs.py run=FOLDER [compare=RUN,RUN] [checkpoints=true]

`run` is a run folder, or a folder of runs of any depth, or several. First comes a table of all runs, then the keys in
which their recipes differ. Where it is one run, or with checkpoints=true, every file of every checkpoint is compared
with its digest, and what the same command would do is said; exit code 76 where there are checkpoints and none
verifies. compare=A,B draws the curves of these runs in one picture. Nothing but that picture is written.
"""

import io
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ssl_vit import config
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.report.format import format_age, format_file_size
from ssl_vit.runs import table
from ssl_vit.runs.status import RunStatus, find_lock_holder, find_runs, is_run, read_mapping, read_rows, run_status
from ssl_vit.train import checkpoint

UNREADABLE = "cannot be read"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a method json, which it gave up

    class Config(config.Config):
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
class SavedCheckpoint:
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


def run(options: Config) -> int:
    """Print the report, in colors and cut to the width of a terminal; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder may have any name
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    try:
        for line in report_runs(options, width, color=is_terminal and not os.environ.get("NO_COLOR")):
            print(line, flush=True)
    except BrokenPipeError:  # of `| head`, which has seen enough; what is still waiting goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report_runs(options: Config, width: int | None = None, color: bool = False) -> Iterator[str]:
    """The lines on all runs, cut at `width` signs where there is one.

    ExitError: USAGE where there is none, INTEGRITY after all where one's checkpoints were looked at and none is good.
    """
    folders, root = _find_runs(options)
    if "output" in options.model_fields_set and not options.compare:
        raise ExitError(ExitCode.USAGE, "output: is where compare= draws; give compare=RUN,RUN too")
    picture = table.check_output(options.output) if options.compare else None
    runs = {name: run_status(folder) for name, folder in zip(table.run_names(folders, root), folders, strict=True)}
    notes = _draw_curves(runs, picture) if picture else []
    if not options.json:
        yield from table.table_lines(runs, width, color)
        yield from table.difference_lines(runs, width)
        yield from ["", *notes] if notes else []
    details, unverified = {}, []
    for run in _runs_with_checkpoints(options, list(runs.values())):
        folder = run.folder
        entries = list(list_checkpoints(folder, options.verify))
        details[folder] = {
            "checkpoints": [vars(entry) for entry in entries],
            "resume": _describe_resume(folder, entries),
        }
        yield from () if options.json else _checkpoint_lines(run, entries)
        if entries and not any(entry.good for entry in entries):
            unverified.append(str(folder))
    if options.json:
        yield table.to_json(runs, details)
    if unverified:
        raise ExitError(ExitCode.INTEGRITY, f"no checkpoint verifies in {', '.join(unverified)}")


def _find_runs(options: Config) -> tuple[list[Path], Path | None]:
    """The run folders that are asked for, and the folder of runs where all are from one."""
    parents = [Path(name) for name in options.run]
    if options.compare:
        return list(dict.fromkeys(_resolve_run(name, parents) for name in options.compare)), None
    runs: dict[str, Path] = {}
    for parent in parents:
        folders = find_runs(parent)
        if not folders:
            raise ExitError(ExitCode.USAGE, f"run={parent}: neither a run nor a folder of runs (no recipe.yaml)")
        for folder in folders:
            runs.setdefault(os.path.realpath(folder), folder)
    return list(runs.values()), None if len(parents) > 1 or is_run(parents[0]) else parents[0]


def _resolve_run(name: str, parents: list[Path]) -> Path:
    """A run by its path, or by its name below `run`."""
    for folder in (Path(name), *(parent / name for parent in parents)):
        if is_run(folder):
            return folder
    names = [run_name for parent in parents for run_name in table.run_names(find_runs(parent), parent)]
    hint = f"there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "give the path of a run"
    raise ExitError(
        ExitCode.USAGE, f"compare={name}: no run, by path or below run={','.join(map(str, parents))}; {hint}"
    )


def _draw_curves(runs: dict[str, RunStatus], picture: Path) -> list[str]:
    """Draw the curves of runs; what is to be said of it."""
    rows_by_run = {name: read_rows(run.folder) for name, run in runs.items()}
    notes = []
    for name in (name for name, run_rows in rows_by_run.items() if not run_rows):
        parts = [part for part in find_runs(runs[name].folder)[1:] if read_rows(part, all_rows=False)]
        hint = f"; its parts have: {', '.join(map(str, parts[:3]))}{', ...' if len(parts) > 3 else ''}" if parts else ""
        notes.append(f"{name}: no row of metrics to draw{hint}")
    if len(notes) == len(runs):
        raise ExitError(ExitCode.DATA, f"compare: {'; '.join(notes)}")
    table.write_figure(
        table.draw_curves({name: run_rows for name, run_rows in rows_by_run.items() if run_rows}), picture
    )
    return [*notes, f"curves: {picture}"]


def _runs_with_checkpoints(options: Config, runs: list[RunStatus]) -> list[RunStatus]:
    """The runs of which the checkpoints are looked at: to read those of many takes hours."""
    folders = {run.folder for run in runs}
    single_run = sum(not folders & set(folder.parents) for folder in folders) == 1 and not options.compare
    selected = single_run if options.checkpoints is None else options.checkpoints
    return [run for run in runs if selected and (run.folder / "recipe.yaml").is_file()]


def _checkpoint_lines(run: RunStatus, entries: list[SavedCheckpoint]) -> Iterator[str]:
    yield ""
    yield f"{run.folder}  {_run_state(run)}"
    yield from (
        f"  {entry.step:>9,}  {format_file_size(entry.bytes):>9}  {format_age(entry.age):>8} old  {entry.state}"
        for entry in entries
    )
    yield f"  {_describe_resume(run.folder, entries)}"


def list_checkpoints(folder: Path, verify: bool) -> Iterator[SavedCheckpoint]:
    """A run's checkpoints, newest first, then those put aside."""
    parent = folder / "checkpoints"
    for path in [
        *reversed(checkpoint.list_checkpoints(parent)),
        *sorted(parent.glob("step-" + "[0-9]" * 8 + ".corrupt-*")),
    ]:
        suffix = path.name.partition(".")[2]
        files = [file.lstat() for file in path.iterdir()] if path.is_dir() else []
        seconds = time.time() - path.lstat().st_mtime
        num_bytes, state = sum(file.st_size for file in files), _checkpoint_state(path, suffix, verify)
        yield SavedCheckpoint(path.name, checkpoint.step_of(path), num_bytes, seconds, state)


def _checkpoint_state(path: Path, suffix: str, verify: bool) -> str:
    if suffix:
        return f"put aside as damaged ({suffix})"
    if not verify:
        return "not verified"
    try:
        corruption = checkpoint.find_corruption(path)
    except (ExitError, OSError) as error:
        return f"{UNREADABLE}{' (76)' if isinstance(error, ExitError) else ''}: {error}"
    return f"damaged: {corruption}" if corruption else "verified"


def _run_state(run: RunStatus) -> str:
    """Who holds a run, or how its last start ended."""
    if holder := find_lock_holder(run.folder):
        return f"in use by {holder}"
    exit_info = read_mapping(run.folder / "exit.json")
    if exit_info:
        code, step, time = (exit_info.get(name) for name in ("code", "step", "time"))
        return f"{exit_info.get('reason')} (exit code {code}, step {step}, {time})"
    return "ended without a word (killed?)" if run.state == "killed" else f"{run.state} {run.why}".rstrip()


def _describe_resume(folder: Path, entries: list[SavedCheckpoint]) -> str:
    recipe = read_mapping(folder / "recipe.yaml")
    steps = recipe.get("steps")
    good = next((entry for entry in entries if entry.good), None)
    newest = next((entry for entry in entries if entry.good or entry.state.startswith(UNREADABLE)), None)
    if newest is not None and newest is not good:
        return f"the same command refuses: {newest.name} {newest.state}"
    newer = [entry.name for entry in entries if good and entry.step > good.step and "aside" not in entry.state]
    note = f", putting {', '.join(newer)} aside" if newer else ""
    if not entries and (recipe.get("seeds", "1") != "1" or recipe.get("tasks")):
        return "the same command goes on where its parts stand"
    if not entries and folder.parent.name == "sweep" and (folder / "results.json").is_file():
        return "the same command takes its result as it is"
    if good is None:
        text = "the same command refuses (76): bring one back, or restart=true"
        return text if entries else "no checkpoint: the same command begins at step 0"
    if str(good.step) == steps:
        return f"the same command finds it done at step {good.step:,}{note}"
    total = f"{int(str(steps)):,}" if str(steps).isdecimal() else "?"
    return f"the same command goes on from step {good.step:,} of {total}{note}"
