"""Disks that are full, slow or read-only, folders in use, recipes that differ: each ends with its code and one line.

Whatever it was, the last checkpoint is whole, and once the cause is gone the same command goes on to the same bits.
"""

import errno
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_kill_points import finished, killed_in

from ssl_vit.exits import CANNOT_CREATE, DISK, MISMATCH, PREEMPTED, USAGE
from ssl_vit.train import checkpoint
from tests.runs import rows
from tests.starts import BASE, PRELOAD, Start, live
from tests.train.children import ended, fork, may_mount, mount, own_mounts
from tests.train.outcome import STEPS, outcome, state, words

SEED = 3
STOPPED = 4.0  # seconds in which a start that cannot be has said so, on a busy machine; faults.md: 2


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training leaves that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    return finished(words(shards, folder / "run"), folder, 1)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not may_mount(tmp_path_factory.mktemp("mount")):
        pytest.skip("mounts of one's own are not allowed here")


def begin(given: list[str], log: Path, prepare: Callable[[], object] = lambda: None, fault: str = "") -> int:
    """A training in a child of this very process, after some preparation; its process id."""
    from accelerate.state import AcceleratorState, GradientState

    for name in PRELOAD:
        importlib.import_module(name)  # here, once

    def work() -> None:
        warnings.resetwarnings()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        prepare()
        live("pretrain", given, {**BASE, "SSL_VIT_FAULT": fault}, str(log), None)

    return fork(work, log)


def whole(work: Callable[[], object], folder: Path) -> None:
    """Do all of it in a child with mounts of its own."""
    for name in PRELOAD:
        importlib.import_module(name)

    def alone() -> None:
        own_mounts()
        work()

    code = ended(fork(alone, folder / "scene"))
    assert code == 0, (folder / "scene").read_text()


def last_line(log: Path) -> str:
    said = log.read_text()
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


def hidden(run: Path) -> list[str]:
    """Leftovers."""
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def exit_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


# disks


def test_a_disk_that_is_full(shards: Path, straight: dict[str, Any], tmp_path: Path, mounts: None):
    """A4: 74 with what is needed and what is free, seen before and while it is written; freed, the run goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()

    def lie() -> None:
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[assignment,attr-defined]

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=2150k", "none", run)
        steps = []
        for prepare in (lie, lambda: None):
            log.unlink(missing_ok=True)
            code = ended(begin(words(shards, run, "keep=99"), log, prepare))
            line = last_line(log)
            assert code == DISK, line
            assert str(run) in line
            newest = checkpoint.newest(run / "checkpoints")
            assert newest is not None
            steps.append(newest.name)
            assert 4 <= int(newest.name[5:]) < STEPS
            assert hidden(run) == []
            wanted = r"No space left on device" if prepare is lie else r"needs \d+ bytes, \d+ are free"
            assert re.search(wanted, line), line
            assert newest.name in line or "whole" in line
        assert steps[0] == steps[1]
        for folder in checkpoint.steps(run / "checkpoints")[:-1]:
            shutil.rmtree(folder)
        code = ended(begin(words(shards, run), log))
        assert code == 0, log.read_text()
        assert outcome(run) == straight

    whole(scene, tmp_path)


def test_a_disk_that_has_no_room_for_anything(shards: Path, tmp_path: Path, mounts: None):
    """Not even for the lock file, or for exit.json: still a code and a line."""
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=64k", "none", run)
        with pytest.raises(OSError, match="No space"):
            (run / "filler").write_bytes(bytes(1 << 20))
        code = ended(begin(words(shards, run), log))
        assert code in (DISK, CANNOT_CREATE), log.read_text()
        assert str(run) in last_line(log)

    whole(scene, tmp_path)


def test_files_that_may_not_grow(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """A5: a limit on file sizes (EFBIG), met by the second file of a checkpoint."""
    given = words(shards, tmp_path / "run")
    killed_in(given, tmp_path, 1, "update:step=5")
    limit = (tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors").stat().st_size + 1000

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = ended(begin(given, tmp_path / "log", prepare))
    assert code == DISK, (tmp_path / "log").read_text()
    assert "File too large" in last_line(tmp_path / "log")
    assert exit_of(tmp_path / "run")["code"] == DISK
    assert hidden(tmp_path / "run") == []
    assert [folder.name for folder in checkpoint.steps(tmp_path / "run" / "checkpoints")][-1] == "step-00000004"
    assert finished(given, tmp_path, 1) == straight


def test_metrics_that_may_not_grow(shards: Path, tmp_path: Path):
    """The same of metrics.jsonl: 74 with its path; the row that was cut is written anew."""
    given = words(shards, tmp_path / "run", "save_every=8", "log_every=1", "panel_every=99")
    killed_in(given, tmp_path, 1, "update:step=10")
    path = tmp_path / "run" / "metrics.jsonl"
    limit = path.stat().st_size * 5 // 4  # which row 12 goes over; the next checkpoint is due later
    code = ended(begin(given, tmp_path / "log", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    assert code == DISK, (tmp_path / "log").read_text()
    assert "File too large" in last_line(tmp_path / "log")
    assert str(path) in last_line(tmp_path / "log")
    assert finished(given, tmp_path, 1)["exit"]["code"] == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_save_that_fails_may_be_borne(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """on_save_error=continue: said, left behind, tried again at the next; but the last one must be there."""
    given = words(shards, tmp_path / "run", "on_save_error=continue")
    start = Start(given, tmp_path, 1, "enospc:point=save.mid:step=4,eio:point=save.written:step=6")
    assert start.wait() == [0], start.said()
    for step in (4, 6):
        (line,) = [line for line in start.said().splitlines() if "on_save_error" in line and f"{step:08d}" in line]
        assert re.search(r"No space left|Input/output error", line)
    assert outcome(tmp_path / "run") == straight
    given = words(shards, tmp_path / "other", "on_save_error=continue")
    start = Start(given, tmp_path, 1, f"enospc:point=save.mid:step={STEPS}")
    assert start.wait() == [DISK], start.said()
    assert not (tmp_path / "other" / "encoder").exists()  # it would be that of an earlier step
    assert start.said().strip().splitlines()[-1].count("No space left") == 1


def test_an_error_while_saving_ends_all_ranks_alike(shards: Path, tmp_path: Path):
    """74 on each, one line, nothing published, and the same command goes on."""
    given = words(shards, tmp_path / "run", "save_every=5")
    for place in ("mid", "written"):
        start = Start(given, tmp_path, 2, f"eio:point=save.{place}:step=10")
        assert start.wait() == [DISK, DISK], start.said()
        assert start.said().count("Input/output error") == 1
        assert "step-00000005" in start.said() or "whole" in start.said()
        assert exit_of(tmp_path / "run")["code"] == DISK
        assert [folder.name for folder in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-00000005"]
        assert hidden(tmp_path / "run") == []
    start = Start(given, tmp_path, 2)
    assert start.wait() == [0, 0], start.said()


def test_folders_that_cannot_be_written(shards: Path, tmp_path: Path, mounts: None):
    """A8: 73 before the first step, whether it is the run's folder or that of its checkpoints."""
    run, log = tmp_path / "run", tmp_path / "log"
    killed_in(words(shards, run), tmp_path, 1, "update:step=5")
    before = state(run / "checkpoints" / "step-00000004")

    def scene() -> None:
        for folder in (run / "checkpoints", run):
            mount("--bind", folder, folder)
            mount("-o", "remount,ro,bind", folder)
            began = time.monotonic()
            code = ended(begin(words(shards, run), log))
            assert time.monotonic() - began < STOPPED
            assert code == CANNOT_CREATE, log.read_text()
            assert "Read-only file system" in last_line(log)
            assert str(run) in last_line(log)
        assert state(run / "checkpoints" / "step-00000004") == before

    whole(scene, tmp_path)
    assert [row["step"] for row in rows(run)] == [3]


def test_folders_that_are_none(shards: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("/proc/nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for name in ("file", "file/run", "loop", "nowhere", "pipe", "run", "x" * 300):
        start = Start(words(shards, tmp_path / name), tmp_path / "logs")
        assert start.wait(20) == [CANNOT_CREATE], (name, start.said())
        assert "Traceback" not in start.said()
        assert name in start.said().strip().splitlines()[-1]
    start = Start(words(shards, tmp_path / "many" / "folders" / "deep", "steps=1"), tmp_path / "logs")
    assert start.wait() == [0], start.said()


def test_what_cannot_be_deleted_is_left_for_later(shards: Path, straight: dict[str, Any], tmp_path: Path, mounts: None):
    """A9: a warning (EBUSY), the training goes on, and the next start deletes it."""
    run, log = tmp_path / "run", tmp_path / "log"
    killed_in(words(shards, run), tmp_path, 1, "update:step=5")
    busy = run / "checkpoints" / "step-00000004"

    def scene() -> None:
        mount("--bind", busy, busy)
        code = ended(begin(words(shards, run), log))
        assert code == 0, log.read_text()
        assert re.search(rf"{busy}.* could not be deleted.*busy", log.read_text())

    whole(scene, tmp_path)
    assert busy.exists()
    assert checkpoint.flaw(busy) is None
    left = outcome(run)
    left["left"].remove("checkpoints/step-00000004")
    assert left == straight
    assert finished(words(shards, run), tmp_path, 1) == straight


def test_a_slow_disk_is_told_of_and_waited_for(shards: Path, tmp_path: Path):
    """A12: a warning with MB/s; two ranks wait for each other longer than it takes."""
    given = words(shards, tmp_path / "run", "save_every=10", "timeout=30")
    start = Start(given, tmp_path, 2, "sleep:point=save.mid:step=10-19:seconds=2.2")
    assert start.wait() == [0, 0], start.said()
    slow = [line for line in start.said().splitlines() if "MB/s" in line]
    assert len(slow) == 1
    assert "step-00000010" in slow[0]
    assert re.search(r"\b2\.\d s, 0\.\d+ MB/s", slow[0])


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_in_a_save_makes_no_second_one(shards: Path, tmp_path: Path, world: int):
    """A13: that save completes and is the checkpoint, whichever file it was at; then 75."""
    straight = finished(words(shards, tmp_path / "straight" / "run"), tmp_path / "straight", world)
    given = words(shards, tmp_path / "run")
    for step, place in ((4, "mid"), (8, "written"), (12, "published")):
        start = Start(given, tmp_path, world, f"term:point=save.{place}:step={step}:rank=0")
        assert start.wait(25) == [PREEMPTED] * world, start.said()
        end = exit_of(tmp_path / "run")
        assert (end["code"], end["step"]) == (PREEMPTED, step)
        saved = [folder.name for folder in checkpoint.steps(tmp_path / "run" / "checkpoints")]
        assert saved[-1] == f"step-{step:08d}"
        assert "Traceback" not in start.said()
    killed_in(given, tmp_path, world, f"eval.batch:step={STEPS}")
    start = Start(given, tmp_path, world, f"term:point=eval.batch,kill:point=save.written:step={STEPS}")
    assert start.wait(25) == [PREEMPTED] * world, start.said()  # its checkpoint is there: none is put in its place
    assert finished(given, tmp_path, world) == straight


def test_a_word_that_cannot_be_left_is_not_the_end_that_is_told(shards: Path, tmp_path: Path):
    """exit.json cannot be written: the code and the line are still those of what happened."""
    from ssl_vit.train import run

    write = run.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == "exit.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    log = tmp_path / "log"
    given = words(shards, tmp_path / "run")
    code = ended(begin(given, log, lambda: setattr(run, "write_bytes", full), "term:point=update:step=5"))
    assert code == PREEMPTED, log.read_text()
    assert "the same command goes on" in last_line(log)
    assert not (tmp_path / "run" / "exit.json").exists()


# two at once


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_is_one_runs_at_a_time(shards: Path, tmp_path: Path, world: int):
    """C14: the second is refused at once with who has it; killed with -9, the first leaves the folder free."""
    given = words(shards, tmp_path / "run")
    first = Start(given, tmp_path, 1, "hang:point=batch:step=6")
    first.until(lambda: (tmp_path / "run" / "checkpoints" / "step-00000004").exists())
    before = (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns, (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for more in ([], ["fresh=true"]):
        began = time.monotonic()
        second = Start([*given, *more], tmp_path, world)
        assert second.wait(20) == [CANNOT_CREATE] * world, second.said()
        assert time.monotonic() - began < STOPPED
        line = second.said().strip().splitlines()[-1]
        assert f"pid {first.processes[0].pid}" in line
        assert socket.gethostname() in line
        assert "since" in line
        assert "Traceback" not in second.said()
    assert not (tmp_path / "run" / "exit.json").exists()  # it is the holder's to write
    after = (tmp_path / "run" / "recipe.yaml").stat().st_mtime_ns, (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert after == before
    assert first.processes[0].is_alive()
    first.kill()
    first.wait(5)
    began = time.monotonic()
    assert finished([*given, "steps=20"], tmp_path, world)["exit"] == {"code": 0, "step": STEPS}
    assert time.monotonic() - began < 20


def test_of_many_starts_at_once_one_trains(shards: Path, straight: dict[str, Any], tmp_path: Path):
    given = words(shards, tmp_path / "run")
    starts = [Start(given, tmp_path / f"{i}") for i in range(4)]
    codes = sorted(code for start in starts for code in start.wait())
    assert codes[0] == 0
    assert set(codes[1:]) <= {0, CANNOT_CREATE}  # a late one finds it done
    assert outcome(tmp_path / "run") == straight


# recipes


def test_another_recipe_is_shown_key_by_key(shards: Path, tmp_path: Path):
    """B6: 78 before any weight is touched; safe keys may be allowed by name, others are no such keys (64)."""
    given = words(shards, tmp_path / "run")
    killed_in(given, tmp_path, 1, "update:step=5")
    before = state(tmp_path / "run" / "checkpoints" / "step-00000004")
    recipe = (tmp_path / "run" / "recipe.yaml").read_bytes()

    def refused(*more: str, code: int = MISMATCH, world: int = 1) -> str:
        start = Start([*given, *more], tmp_path, world)
        assert start.wait(30) == [code] * world, start.said()
        assert "Traceback" not in start.said()
        assert (tmp_path / "run" / "recipe.yaml").read_bytes() == recipe
        assert state(tmp_path / "run" / "checkpoints" / "step-00000004") == before
        return start.said().strip().splitlines()[-1]

    line = refused("encoder.width=32", "optim.lr=0.5", "optim.kind=sgd", "data.flip=false", "seed=7", world=2)
    for part in ("encoder.width: 16 -> 32", "optim.lr: 0.001 -> 0.5", "optim.kind: adamw -> sgd", "seed: 0 -> 7"):
        assert part in line
    line = refused("optim.lr=0.5", "steps=30")
    assert "optim.lr: 0.001 -> 0.5" in line
    assert "steps: 20 -> 30" in line
    assert "allow_change=" in line  # the way on
    line = refused("optim.lr=0.5", "steps=30", "allow_change=steps")
    assert "optim.lr: 0.001 -> 0.5" in line
    assert "steps: 20 -> 30" not in line
    for name in ("encoder.width", "seed", "batch", "data.train", "optim.kind", "head.ratio", "nonsense", "optim"):
        assert name in refused("encoder.width=32", f"allow_change=steps,{name}", code=USAGE)
    more = ["optim.lr=0.5", "steps=24", "allow_change=optim.lr,steps"]
    start = Start([*given, *more], tmp_path)
    assert start.wait() == [0], start.said()
    assert "optim.lr: 0.001 -> 0.5" in start.said()  # D7: what changes is said
    assert rows(tmp_path / "run")[0]["lr"] == 0.001
    assert max(row["lr"] for row in rows(tmp_path / "run") if row["step"] > 4) > 0.01
    recipe = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert b"lr: 0.5" in recipe
    start = Start([*given, *more[:2]], tmp_path)  # it is the run's recipe now
    assert start.wait() == [0], start.said()


DAMAGED = {
    "empty": b"",
    "binary": bytes(range(256)),
    "cut": None,
    "a list": b"- a\n- b\n",
    "text": b"hello",
    "a tag": b"!!python/object/apply:os.system ['touch canary']\n",
    "a loop": b"encoder: &a\n  width: *a\n",
    "aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
}


def test_a_damaged_recipe_does_not_pass_for_the_runs(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """78 and its path, never a start anew, never a traceback; brought back, the run goes on."""
    given = words(shards, tmp_path / "run")
    killed_in(given, tmp_path, 1, "update:step=5")
    path = tmp_path / "run" / "recipe.yaml"
    text = path.read_bytes()
    for name, content in DAMAGED.items():
        path.write_bytes(text[: len(text) // 2] if content is None else content)
        start = Start(given, tmp_path)
        assert start.wait(20) == [MISMATCH], (name, start.said()[-3000:])
        assert "Traceback" not in start.said(), name
        assert "recipe.yaml" in start.said().splitlines()[-1] or "->" in start.said().splitlines()[-1], name
        assert len(start.said()) < 5000, name
    assert not list(tmp_path.rglob("canary"))
    path.write_bytes(text)
    assert finished(given, tmp_path, 1) == straight


def test_a_fresh_start_puts_the_old_aside(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """fresh=true: nothing is deleted, all begins anew; a launcher's restart of it goes on."""
    given = words(shards, tmp_path / "run", "fresh=true")
    killed_in(given, tmp_path, 1, "update:step=9")
    old = state(tmp_path / "run" / "checkpoints" / "step-00000008")
    killed_in([*given, "seed=3", "encoder.width=32"], tmp_path, 1, "update:step=5")  # nor is the recipe bound
    (aside,) = (tmp_path / "run").glob("before-*")
    assert state(aside / "checkpoints" / "step-00000008") == old
    assert [row["step"] for row in rows(aside.parent / aside.name)] == [3, 6, 7]
    start = Start(given, tmp_path, 1, "kill:point=update:step=11")
    assert start.wait() == [-signal.SIGKILL], start.said()
    assert len(list((tmp_path / "run").glob("before-*"))) == 2
    start = Start(given, tmp_path, 1, TORCHELASTIC_RESTART_COUNT="1")
    assert start.wait() == [0], start.said()
    assert len(list((tmp_path / "run").glob("before-*"))) == 2
    mine = outcome(tmp_path / "run")
    mine["left"] = [name for name in mine["left"] if not name.startswith("before-")]
    assert mine == straight


# clocks, ranks, workers


def test_clocks_that_jump(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """C16: an hour back, a year ahead, at every look at the clock, over two starts: no effect."""
    given = words(shards, tmp_path / "run")

    def jump() -> None:
        real, draw = time.time, random.Random(SEED)
        time.time = lambda: real() + draw.choice([-3600, 0, 365 * 86400])  # type: ignore[assignment]

    code = ended(begin(given, tmp_path / "log", jump, "kill:point=save.mid:step=10"))
    assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    for path in [*(tmp_path / "run").rglob("*")]:
        os.utime(path, (2e9, 2e9))
    code = ended(begin(given, tmp_path / "log", jump))
    assert code == 0, (tmp_path / "log").read_text()
    assert outcome(tmp_path / "run") == straight


def test_another_number_of_processes_goes_on(shards: Path, tmp_path: Path):
    """B7: 2, 1, 3, 2 ranks, one after the other: the same global batches, losses equal to rounding."""
    more = ["batch=12", "log_every=1", "encoder.dropout=0"]
    straight = finished(words(shards, tmp_path / "straight" / "run", *more), tmp_path / "straight", 1)
    given = words(shards, tmp_path / "run", *more)
    for world, step in ((2, 5), (1, 9), (3, 15)):
        killed_in(given, tmp_path, world, f"update:step={step}")
        if step == 5:
            assert_same_weights(shards, tmp_path, more)
        folder = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert folder is not None
        assert json.loads((folder / "MANIFEST.json").read_text())["world"] == world
    mine = finished(given, tmp_path, 2)
    for found, wanted in zip(mine["rows"], straight["rows"], strict=True):
        for name in ("step", "samples_seen", "samples_digest", "bad_samples", "lr"):
            assert found[name] == wanted[name]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    start = Start(given, tmp_path, 5)
    assert start.wait(30) == [USAGE] * 5, start.said()


def assert_same_weights(shards: Path, folder: Path, more: list[str]) -> None:
    """Loaded by another number of processes, the weights are the same bits: at a rate of 0 they stay so."""
    for world in (1, 3):
        run = shutil.copytree(folder / "run", folder / f"on {world}")
        still = words(shards, run, *more, "optim.lr=0", "allow_change=optim.lr", "keep=9")
        killed_in(still, folder, world, "update:step=9")
        before, after = (state(run / "checkpoints" / f"step-{step:08d}") for step in (4, 8))
        assert {k: v for k, v in before.items() if k.startswith("model ")} == {
            k: v for k, v in after.items() if k.startswith("model ")
        }


def test_another_number_of_workers_changes_nothing(shards: Path, straight: dict[str, Any], tmp_path: Path):
    """B8: 1, 2, 0 loader workers; killed with them, there are no orphans."""
    given = words(shards, tmp_path / "run")
    for workers, step in ((1, 7), (2, 13)):
        start = Start([*given, f"data.workers={workers}"], tmp_path, 1, f"kill:point=update:step={step}")
        start.until(lambda start=start: start.processes[0].exitcode is not None)
        (pid,) = (process.pid for process in start.processes)
        end = time.monotonic() + 5
        while alive := group(pid):
            assert time.monotonic() < end, alive
            time.sleep(0.05)
        assert start.wait(5) == [-signal.SIGKILL], start.said()
    assert finished(given, tmp_path, 1) == straight


def group(pid: int | None) -> list[str]:
    """The processes of a group that are there, with their states."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if line.split()[0] == str(pid)]
    return [line for line in lines if not line.split()[2].startswith("Z")]
