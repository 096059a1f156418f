"""Disks that are full, slow, read-only or busy: each ends with its code and one line, or is borne and told of.

Whatever it was, the last checkpoint is whole, and once the cause is gone the same command goes on to the same bits.
"""

import errno
import importlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from ssl_vit.exits import CANNOT_CREATE, DISK
from ssl_vit.train import checkpoint
from ssl_vit.train import run as run_module
from tests import runs
from tests.odd import NOT_ALLOWED
from tests.starts import PRELOAD, call
from tests.train.children import ended, fork, mount, own_mounts
from tests.train.scenarios import Played, Scenario, Stage, each, ranks

FULL = ("save_every=2", "keep=99")  # a checkpoint soon fills a disk
ALONE = ("data.workers=0",)  # loader workers have files of their own, in memory, which limits would also meet


def with_own_mounts(work: Callable[[], object], folder: Path) -> None:
    """Do all of it in a child that may mount what it likes."""
    for name in PRELOAD:
        importlib.import_module(name)  # here, once

    def alone() -> None:
        try:
            own_mounts()
        except (OSError, subprocess.CalledProcessError):
            os._exit(NOT_ALLOWED)
        work()

    if (code := ended(fork(alone, folder / "scene"))) == NOT_ALLOWED:
        pytest.skip("mounts of one's own are not allowed here")
    assert code == 0, (folder / "scene").read_text()


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """Let no file grow beyond a size (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def nothing_hidden(played: Played) -> None:
    """No draft is left behind."""
    assert not list((played.run / "checkpoints").glob(".*"))


def test_a_disk_that_is_full(stage: Stage):
    """A4: 74 with what is needed and what is free, seen before and while it is written; freed, the run goes on."""
    stage.run.mkdir()
    room = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[attr-defined]  # noqa: E731

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=2150k", "none", stage.run)
        found = []
        for usage, wanted in ((room, "No space left on device"), (shutil.disk_usage, r"needs \d+ bytes, \d+ are free")):
            line = f"(?=.*{stage.run})(?=.*{wanted})(?=.*(step-|whole))"
            with patch.object(shutil, "disk_usage", usage):
                full = Scenario((DISK,), "", line, says=("pretrain",), words=FULL, held=False, also=nothing_hidden)
                said = stage.play(full).said
            found.append(runs.saved(stage.run)[-1])
            assert checkpoint.flaw(runs.last(stage.run)) is None
            assert runs.last(stage.run).name in said or "whole" in said
        assert 4 <= found[0] == found[1] < 20
        for folder in checkpoint.steps(stage.run / "checkpoints")[:-1]:
            shutil.rmtree(folder)
        stage.finish()
        stage.as_in_peace(stage.tiny_run(1))

    stage.tiny_run(1)  # made here, not in the child
    with_own_mounts(scene, stage.folder)


@pytest.mark.process
def test_a_disk_that_has_no_room_for_anything(stage: Stage):
    """Not even for the lock file, or for exit.json: still a code and a line."""
    stage.run.mkdir()

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=64k", "none", stage.run)
        with pytest.raises(OSError, match="No space"):
            (stage.run / "filler").write_bytes(bytes(1 << 20))
        played = stage.begin(Scenario((DISK,)))
        assert played.codes[0] in (DISK, CANNOT_CREATE), played.said
        assert str(stage.run) in played.lines()[-1]
        assert "Traceback" not in played.said

    with_own_mounts(scene, stage.folder)


def test_files_that_may_not_grow(stage: Stage):
    """A5: a limit on file sizes (EFBIG), met by the second file of a checkpoint."""
    stage.stop("loss:step=9", *ALONE)
    with files_of((runs.last(stage.run) / "model.safetensors").stat().st_size + 1000):
        stage.play(Scenario((DISK,), "", "File too large", words=ALONE, saved=7, also=nothing_hidden))
    stage.finish()
    stage.as_in_peace(stage.tiny_run(1))


def test_metrics_that_may_not_grow(stage: Stage):
    """The same of metrics.jsonl: 74 with its path; the row that was cut is written anew."""
    more = ("save_every=8", "log_every=1", "panel_every=99", "steps=18", *ALONE)
    stage.stop("loss:step=11", *more)
    path = stage.run / "metrics.jsonl"
    with files_of(path.stat().st_size * 5 // 4):  # which row 12 goes over; the next checkpoint is due later
        stage.play(Scenario((DISK,), "", f"File too large.*{path}", words=more))
    stage.finish(1, *more)
    assert [row["step"] for row in runs.rows(stage.run)] == list(range(1, 19))


def test_a_save_that_fails_may_be_borne(stage: Stage):
    """on_save_error=continue: said, left behind, tried again at the next; but the last one must be there."""
    borne = ("on_save_error=continue",)
    faults = "enospc:point=save.mid:step=7,eio:point=save.written:step=14"
    said = stage.play(Scenario((0,), faults, words=borne)).said
    for step, error in ((7, "No space left"), (14, "Input/output error")):
        (line,) = [line for line in said.splitlines() if "on_save_error" in line and f"{step:08d}" in line]
        assert error in line
    stage.as_in_peace(stage.tiny_run(1))
    other = stage.at("other")
    short = (*borne, "steps=7")
    other.play(Scenario((DISK,), "enospc:point=save.mid:step=7", "No space left", words=short, saved=0))
    assert not (other.run / "encoder").exists()  # it would be that of an earlier step


@each(
    {
        f"{place}, {world} ranks": Scenario(
            (DISK,) * world,
            f"eio:point=save.{place}:step=14",
            "Input/output error.*(step-00000007|whole)",
            saved=7,
            also=nothing_hidden,
            resumed=place == "mid",
        )
        for place, world in (("written", 1), ("mid", 2))
    }
)
def test_an_error_while_saving_ends_all_ranks_alike(scenario: Scenario, stage: Stage):
    """74 on each, one line, nothing published, and the same command goes on."""
    stage.play(scenario)


def test_folders_that_cannot_be_written(stage: Stage):
    """A8: 73 before the first step, whether it is the run's folder or that of its checkpoints."""
    stage.stop("loss:step=9")
    before = runs.state(stage.run), (stage.run / "metrics.jsonl").read_bytes()

    def scene() -> None:
        for folder in (stage.run / "checkpoints", stage.run):
            mount("--bind", folder, folder)
            mount("-o", "remount,ro,bind", folder)
            line = f"(?=.*Read-only file system)(?=.*{stage.run})"
            stage.play(Scenario((CANNOT_CREATE,), "", line, says=("pretrain",), held=False))

    with_own_mounts(scene, stage.folder)
    assert (runs.state(stage.run), (stage.run / "metrics.jsonl").read_bytes()) == before


def test_folders_that_are_none(shards: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("/proc/nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for name in ("file", "file/run", "loop", "nowhere", "pipe", "run", "x" * 300):
        end = call("pretrain", runs.words(shards, tmp_path / name))
        assert end.code == CANNOT_CREATE, (name, end.said)
        assert "Traceback" not in end.said
        assert name in end.line
    end = call("pretrain", runs.words(shards, tmp_path / "many" / "folders" / "deep", "steps=1"))
    assert end.code == 0, end.said


@pytest.mark.process
def test_what_cannot_be_deleted_is_left_for_later(stage: Stage):
    """A9: a warning (EBUSY), the training goes on, and the next start deletes it."""
    stage.stop("loss:step=9")
    busy, peace = runs.last(stage.run), stage.tiny_run(1)

    def scene() -> None:
        mount("--bind", busy, busy)
        assert re.search(rf"{busy}.* could not be deleted.*busy", stage.finish())

    with_own_mounts(scene, stage.folder)
    assert checkpoint.flaw(busy) is None
    stage.same_bits(peace)
    assert set(runs.names(stage.run)) - set(runs.names(peace)) == {f"checkpoints/{busy.name}"}
    stage.finish()
    stage.as_in_peace(peace)


@ranks(2)
def test_a_slow_disk_is_told_of_and_waited_for(stage: Stage, world: int):
    """A12: a warning with MB/s; two ranks wait for each other longer than it takes."""
    fault = "sleep:point=save.mid:step=14-20:seconds=2.2"
    said = stage.play(Scenario((0,) * world, fault, words=("timeout=30",))).said
    (slow,) = [line for line in said.splitlines() if "MB/s" in line]
    assert re.search(r"step-00000014.*\b[2-9]\.\d s, 0\.\d+ MB/s", slow)


def test_a_word_that_cannot_be_left_is_not_the_end_that_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """exit.json cannot be written: the code and the line are still those of what happened."""
    write = run_module.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == "exit.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(run_module, "write_bytes", full)
    says = ("exit.json could not be written: No space left",)
    stage.play(Scenario((DISK,), "eio:point=save.mid:step=7", "Input/output error", says=says, held=False))
    assert not (stage.run / "exit.json").exists()
