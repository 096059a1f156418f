"""tools/runs.py says of a run what the next start of it finds, and changes nothing."""

import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_vit.exits import INTEGRITY, Refusal
from ssl_vit.runs import Runs, report
from ssl_vit.train import checkpoint
from tests import runs
from tests.conftest import once
from tests.starts import Start, call

STEPS = (2, 4, 6, 8)
MORE = ("steps=20", "save_every=2", "keep=9", "data.workers=0")


@pytest.fixture(scope="session")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four checkpoints that was killed in its ninth step."""

    def make(folder: Path) -> None:
        start = Start(runs.words(shards, folder / "run", *MORE), folder / "logs", 1, "kill:point=update:step=9")
        assert start.wait() == [-signal.SIGKILL], start.said()

    return once(tmp_path_factory, "killed", make) / "run"


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "runs" / "one")


def told(folder: Path, verify: bool = True, checkpoints: bool | None = None) -> tuple[list[str], int]:
    """The lines on checkpoints, which follow the table, and the code."""
    lines, code = [], 0
    try:
        lines.extend(report(Runs(run=(str(folder),), verify=verify, checkpoints=checkpoints)))
    except Refusal as end:
        lines, code = [*lines, end.message], end.code
    return after_table(lines, folder), code


def after_table(lines: list[str], folder: Path) -> list[str]:
    """From the first line that opens with a path of a run; blank ones left out."""
    return list(itertools.dropwhile(lambda line: not line.startswith(str(folder)), filter(None, lines)))


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in files}


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run: Path, step: int) -> None:
    os.truncate(checkpoint_of(run, step) / "optimizer.safetensors", 100)


def test_the_command_lists_what_is_there_and_changes_nothing(run: Path):
    """As a command says it; newest first, with step, size, age and what is wrong."""
    damage(run, 6)
    before = everything(run)
    code, said = call("runs", [f"run={run.parent}"])
    assert code == 0, said
    assert said.split("\n")[0].split() == ["run", "state", "step", "loss", "best", "images/s", "recipe", "why"]
    lines = after_table(said.splitlines(), run)
    assert lines[0].startswith(f"{run}  ")
    assert "killed" in lines[0]
    assert [int(line.split()[0]) for line in lines[1:5]] == [8, 6, 4, 2]
    size = sum(path.stat().st_size for path in checkpoint_of(run, 8).iterdir())
    assert f"{size / 1e3:.1f} kB" in lines[1]
    assert re.search(r"\d+ s old  verified$", lines[1])
    assert lines[2].endswith("damaged: optimizer.safetensors differs from its digest")
    assert lines[5] == "  the same command goes on from step 8 of 20"
    assert everything(run) == before
    assert not list(run.rglob("*corrupt*"))


@pytest.mark.parametrize("count", range(5))
def test_what_it_says_is_what_a_start_finds(run: Path, tmp_path: Path, count: int):
    """Of every set of so many damaged checkpoints."""
    for i, bad in enumerate(itertools.combinations(STEPS, count)):
        copy = shutil.copytree(run, tmp_path / f"{i}")
        for step in bad:
            damage(copy, step)
        lines, code = told(copy)
        if len(bad) == len(STEPS):
            with pytest.raises(Refusal) as end:
                checkpoint.newest(copy / "checkpoints")
            assert code == end.value.code == INTEGRITY
            assert "the same command refuses (76)" in lines[-2]
            assert str(copy) in lines[-1]
        else:
            step = max({*STEPS} - {*bad})
            assert (code, checkpoint.newest(copy / "checkpoints")) == (0, checkpoint_of(copy, step))
            assert f"goes on from step {step} of 20" in lines[-1]
            aside = {path.name.split(".")[0] for path in (copy / "checkpoints").glob("*corrupt*")}
            assert set(re.findall(r"step-\d+", lines[-1])) == aside
        again, _ = told(copy)  # with what was put aside
        assert sum("put aside as damaged" in line for line in again) == len(list(copy.rglob("*corrupt*")))


def test_a_checkpoint_of_another_version_is_not_gone_past(run: Path):
    path = checkpoint_of(run, 8) / "MANIFEST.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(checkpoint._sealed(content | {"version": 99}))
    lines, _ = told(run)
    assert "version 99" in lines[1]
    with pytest.raises(Refusal):
        checkpoint.newest(run / "checkpoints")  # by a start, as is said
    assert "goes on" not in lines[5]
    assert "76" in lines[5]


def test_of_several_runs_checkpoints_are_read_where_that_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Those of many runs are terabytes; then 76 is said as of one."""
    two = shutil.copytree(run, run.parent / "two")
    for step in STEPS:
        damage(two, step)
    assert told(run.parent, checkpoints=True)[1] == told(two)[1] == INTEGRITY
    monkeypatch.setattr(checkpoint, "flaw", lambda _: pytest.fail("a checkpoint was read"))
    assert told(run.parent) == ([], 0)
    assert told(two, checkpoints=False) == ([], 0)
    with pytest.raises(pytest.fail.Exception):
        told(run)
    lines, code = told(two, verify=False)
    assert code == 0
    assert sum(line.endswith("not verified") for line in lines) == 4


ODD: dict[str, Callable[[Path], object]] = {  # more is odd in test_runs_table.py
    "exit.json is deep": lambda run: (run / "exit.json").write_text("[" * 100_000),
    "recipe.yaml is a loop": lambda run: (run / "recipe.yaml").write_text("steps: &a [*a]\n"),
    "steps are no number": lambda run: (run / "recipe.yaml").write_text("steps: many\n"),
    "a name that is none": lambda run: (run / "checkpoints" / "step-x.corrupt-y").mkdir(),
    "a file": lambda run: checkpoint_of(run, 10).touch(),
    "a pipe": lambda run: os.mkfifo(checkpoint_of(run, 10)),
    "a link to itself": lambda run: checkpoint_of(run, 10).symlink_to("step-00000010"),
    "a link out": lambda run: checkpoint_of(run, 10).symlink_to("/etc"),
    "no checkpoints folder": lambda run: shutil.rmtree(run / "checkpoints"),
    "a checkpoints file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_run_folders_are_listed_too(run: Path, kind: str):
    """And the others beside them."""
    good = shutil.copytree(run, run.parent / "two")
    ODD[kind](run)
    lines, code = told(run.parent, checkpoints=True)
    assert code == 0
    assert [sum(line.startswith(f"{one}  ") for line in lines) for one in (run, good)] == [1, 1]
    assert lines[-1] == "  the same command goes on from step 8 of 20"
