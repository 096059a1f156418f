"""A run's folder: used by two starts or other ranks, begun with another recipe, on disks full, slow, read-only or busy.

Each ends with its code and one line, or is borne and told of. Whatever it was, the last checkpoint is whole, and once
the cause is gone the same command goes on to the same bits.
"""

import errno
import importlib
import itertools
import json
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

from ssl_vit.errors import ExitCode
from ssl_vit.train import checkpoint
from ssl_vit.train import run_folder as run_module
from ssl_vit.train.optim import learning_rate
from tests import tiny_runs
from tests.machines import NOT_ALLOWED
from tests.processes import PRELOAD, call_tool
from tests.train.children import fork, mount, unshare_mounts, wait_for_exit
from tests.train.scenarios import HOST, KILLED, LIMIT, Outcome, Scenario, Stage, case, ranks

# two at once


@pytest.mark.parametrize(("holder", "world"), [(1, 1), case(1, 2), case(2, 1), case(2, 2)])
def test_a_folder_is_one_runs_at_a_time(stage: Stage, holder: int, world: int):
    """C14: the second is refused at once with who has it; killed with -9, the first leaves the folder free."""
    holder_start = stage.start(holder, "hang:point=batch:step=9")
    holder_start.wait_until(lambda: 7 in tiny_runs.checkpoint_steps(stage.run))
    files = [stage.run / name for name in ("recipe.yaml", "metrics.jsonl")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    line = f"in use by pid {holder_start.processes[0].pid} since .* on {HOST}"
    for overrides in ((), ("restart=true",)):
        stage.play(
            Scenario(
                (ExitCode.CANNOT_CREATE,) * world, "", line, patterns=("pretrain",), args=overrides, owns_folder=False
            )
        )
    assert not (stage.run / "exit.json").exists()  # it is the holder's to write
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    assert all(process.is_alive() for process in holder_start.processes)
    holder_start.kill()
    assert holder_start.wait() == [KILLED] * holder
    stage.finish(world)


@pytest.mark.process
def test_of_many_starts_at_once_one_trains(stage: Stage):
    starts = [stage.start() for _ in range(4)]
    codes = sorted(code for start in starts for code in start.wait(LIMIT))
    assert codes[0] == 0
    assert set(codes[1:]) <= {0, ExitCode.CANNOT_CREATE}  # a late one finds it done
    stage.assert_same_run(stage.tiny_run(1))


# recipes


def test_another_recipe_is_shown_key_by_key(stage: Stage):
    """B6: 78 before any weight is touched; safe keys may be allowed by name, others are no such keys (64).

    What a checkpoint holds never brings old rates back in silence, nor new ones: old -> new is said (D7).
    """
    stage.stop("loss:step=9")
    before = tiny_runs.checkpoint_bits(stage.run), (stage.run / "recipe.yaml").read_bytes()

    def refusal_output(*overrides: str, code: int = ExitCode.MISMATCH) -> str:
        outcome = stage.play(
            Scenario((code,), "", "pretrain.py: ", args=overrides, owns_folder=code == ExitCode.MISMATCH)
        )
        assert (tiny_runs.checkpoint_bits(stage.run), (stage.run / "recipe.yaml").read_bytes()) == before
        return outcome.output

    lr, steps = "optim.lr: 0.001 -> 0.5", "steps: 30 -> 40"
    line = refusal_output("encoder.width=32", "optim.lr=0.5", "optim.kind=sgd", "data.flip=false", "seed=7")
    assert all(part in line for part in ("encoder.width: 16 -> 32", lr, "optim.kind: adamw -> sgd", "seed: 0 -> 7"))
    line = refusal_output("optim.lr=0.5", "steps=40")
    assert all(part in line for part in (lr, steps))
    assert "allow_recipe_change=optim.lr" in line or "allow_recipe_change=steps" in line  # the way on
    line = refusal_output("optim.lr=0.5", "steps=40", "allow_recipe_change=steps")
    assert (lr in line, steps in line) == (True, False)
    for name in ("encoder.width", "seed", "data.train", "optim.kind", "nonsense", "optim"):
        assert name in refusal_output("encoder.width=32", f"allow_recipe_change=steps,{name}", code=ExitCode.USAGE)

    new_rates = ("optim.lr=0.002", "optim.betas=0.8,0.99")
    output = stage.finish(1, *new_rates, "allow_recipe_change=optim.lr,optim.betas")
    assert [output.count(line) for line in ("optim.lr: 0.001 -> 0.002", "optim.betas: ")] == [1, 1]
    rates = {row["step"]: row["lr"] for row in tiny_runs.metric_rows(stage.run)}
    for step, rate in ((6, 0.001), (9, 0.002), (30, 0.002)):
        assert rates[step] == learning_rate(step - 1, rate, tiny_runs.STEPS, 2)
    assert b"lr: 0.002" in (stage.run / "recipe.yaml").read_bytes()
    assert tiny_runs.differing_bits(tiny_runs.checkpoint_bits(stage.tiny_run(1)), tiny_runs.checkpoint_bits(stage.run))
    stage.finish(1, *new_rates)  # it is the run's recipe now
    assert "steps: 30 -> 32" in stage.finish(1, *new_rates, "steps=32", "allow_recipe_change=steps")
    assert tiny_runs.metric_rows(stage.run)[-1]["step"] == 32


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n"  # a billion of them
ALIASES += "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in itertools.pairwise("abcdefghij")
)
DAMAGED_RECIPES = [
    b"",
    bytes(range(256)),
    None,
    b"- a\n- b\n",
    b"hello",
    b"encoder: &a\n  width: *a\n",
    ALIASES.encode(),
]
DAMAGED_RECIPES += [b"!!python/object/apply:os.system ['touch canary']\n"]  # and None is a half


def test_a_damaged_recipe_does_not_pass_for_the_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """78 and its path, never a start anew, never a traceback; brought back, the run goes on."""
    monkeypatch.chdir(stage.folder)
    stage.stop("loss:step=9")
    path = stage.run / "recipe.yaml"
    text = path.read_bytes()
    for content in DAMAGED_RECIPES:
        path.write_bytes(text[: len(text) // 2] if content is None else content)
        outcome = stage.play(Scenario((ExitCode.MISMATCH,), "", "recipe.yaml|->", saved=7))
        assert len(outcome.output) < 5000
    assert not list(stage.folder.rglob("canary"))
    path.write_bytes(text)
    stage.finish()
    stage.assert_same_run(stage.tiny_run(1))


def test_a_fresh_start_puts_the_old_aside(stage: Stage):
    """restart=true: nothing is deleted, all begins anew; a launcher's restart of it goes on."""
    stage.stop("loss:step=9", "restart=true")
    old_state = tiny_runs.checkpoint_bits(stage.run)
    stage.stop("loss:step=5", "restart=true", "seed=3", "encoder.width=32")  # nor is the recipe bound
    (backup,) = stage.run.glob("before-*")
    assert tiny_runs.checkpoint_bits(backup) == old_state
    assert [row["step"] for row in tiny_runs.metric_rows(backup)] == [3, 6]
    stage.stop("loss:step=9", "restart=true")
    assert len([*stage.run.glob("before-*")]) == 2
    result = call_tool("pretrain", stage.args("restart=true"), TORCHELASTIC_RESTART_COUNT="1")
    assert result.code == 0, result.output
    assert len([*stage.run.glob("before-*")]) == 2
    stage.assert_same_run(stage.tiny_run(1))


# ranks, workers


@pytest.mark.process
@pytest.mark.ranks
def test_another_number_of_processes_goes_on(stage: Stage):
    """B7: 2, 1, 3, 2 ranks, one after the other: the same global batches, losses equal to rounding."""
    overrides = ("batch=12", "log_every=1", "encoder.dropout=0", "save_every=2", "steps=20")
    stage.sibling("straight").finish(1, *overrides)
    for world, step in ((2, 5), (1, 9), (3, 15)):
        stage.play(Scenario((KILLED,) * world, f"kill:point=update:step={step}", power_cut=True, args=overrides))
        assert json.loads((tiny_runs.last_checkpoint(stage.run) / "MANIFEST.json").read_text())["world"] == world
    stage.finish(2, *overrides)
    for actual, expected in zip(
        tiny_runs.metric_rows(stage.run), tiny_runs.metric_rows(stage.sibling("straight").run), strict=True
    ):
        for name in ("step", "samples_seen", "samples_digest", "bad_samples", "lr"):
            assert actual[name] == expected[name]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    outcome = stage.begin(Scenario((ExitCode.USAGE,) * 5, args=overrides))
    assert outcome.codes == [ExitCode.USAGE] * 5, outcome.output


# disks

FREQUENT_SAVES = ("save_every=2", "keep=99")  # a checkpoint soon fills a disk
NO_WORKERS = ("data.workers=0",)  # loader workers have files of their own, in memory, which limits would also meet


def run_with_own_mounts(work: Callable[[], object], folder: Path) -> None:
    """Do all of it in a child that may mount what it likes."""
    for name in PRELOAD:
        importlib.import_module(name)  # here, once

    def unshare_and_work() -> None:
        try:
            unshare_mounts()
        except (OSError, subprocess.CalledProcessError):
            os._exit(NOT_ALLOWED)
        work()

    if (code := wait_for_exit(fork(unshare_and_work, folder / "scene"))) == NOT_ALLOWED:
        pytest.skip("mounts of one's own are not allowed here")
    assert code == 0, (folder / "scene").read_text()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond a size (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_no_drafts(outcome: Outcome) -> None:
    """No draft is left behind."""
    assert not list((outcome.run / "checkpoints").glob(".*"))


def test_a_disk_that_is_full(stage: Stage):
    """A4: 74 with what is needed and what is free, seen before and while it is written; freed, the run goes on."""
    stage.run.mkdir()
    ample_space = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[attr-defined]  # noqa: E731

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=2150k", "none", stage.run)
        last_steps = []
        for usage, expected in (
            (ample_space, "No space left on device"),
            (shutil.disk_usage, r"needs \d+ bytes, \d+ are free"),
        ):
            line = f"(?=.*{stage.run})(?=.*{expected})(?=.*(step-|whole))"
            with patch.object(shutil, "disk_usage", usage):
                scenario = Scenario(
                    (ExitCode.DISK,),
                    "",
                    line,
                    patterns=("pretrain",),
                    args=FREQUENT_SAVES,
                    owns_folder=False,
                    extra_check=assert_no_drafts,
                )
                output = stage.play(scenario).output
            last_steps.append(tiny_runs.checkpoint_steps(stage.run)[-1])
            assert checkpoint.find_corruption(tiny_runs.last_checkpoint(stage.run)) is None
            assert tiny_runs.last_checkpoint(stage.run).name in output or "whole" in output
        assert 4 <= last_steps[0] == last_steps[1] < 20
        for folder in checkpoint.list_checkpoints(stage.run / "checkpoints")[:-1]:
            shutil.rmtree(folder)
        stage.finish()
        stage.assert_same_run(stage.tiny_run(1))

    stage.tiny_run(1)  # made here, not in the child
    run_with_own_mounts(scene, stage.folder)


@pytest.mark.process
def test_a_disk_that_has_no_room_for_anything(stage: Stage):
    """Not even for the lock file, or for exit.json: still a code and a line."""
    stage.run.mkdir()

    def scene() -> None:
        mount("-t", "tmpfs", "-o", "size=64k", "none", stage.run)
        with pytest.raises(OSError, match="No space"):
            (stage.run / "filler").write_bytes(bytes(1 << 20))
        outcome = stage.begin(Scenario((ExitCode.DISK,)))
        assert outcome.codes[0] in (ExitCode.DISK, ExitCode.CANNOT_CREATE), outcome.output
        assert str(stage.run) in outcome.lines()[-1]
        assert "Traceback" not in outcome.output

    run_with_own_mounts(scene, stage.folder)


def test_files_that_may_not_grow(stage: Stage):
    """A5: a limit on file sizes (EFBIG), met by the second file of a checkpoint."""
    stage.stop("loss:step=9", *NO_WORKERS)
    with file_size_limit((tiny_runs.last_checkpoint(stage.run) / "model.safetensors").stat().st_size + 1000):
        stage.play(
            Scenario((ExitCode.DISK,), "", "File too large", args=NO_WORKERS, saved=7, extra_check=assert_no_drafts)
        )
    stage.finish()
    stage.assert_same_run(stage.tiny_run(1))


def test_metrics_that_may_not_grow(stage: Stage):
    """The same of metrics.jsonl: 74 with its path; the row that was cut is written anew."""
    overrides = ("save_every=8", "log_every=1", "visualize_every=99", "steps=18", *NO_WORKERS)
    stage.stop("loss:step=11", *overrides)
    path = stage.run / "metrics.jsonl"
    with file_size_limit(path.stat().st_size * 5 // 4):  # which row 12 goes over; the next checkpoint is due later
        stage.play(Scenario((ExitCode.DISK,), "", f"File too large.*{path}", args=overrides))
    stage.finish(1, *overrides)
    assert [row["step"] for row in tiny_runs.metric_rows(stage.run)] == list(range(1, 19))


def test_a_save_that_fails_may_be_borne(stage: Stage):
    """on_save_error=continue: said, left behind, tried again at the next; but the last one must be there."""
    overrides = ("on_save_error=continue",)
    faults = "enospc:point=save.mid:step=7,eio:point=save.written:step=14"
    output = stage.play(Scenario((0,), faults, args=overrides)).output
    for step, error in ((7, "No space left"), (14, "Input/output error")):
        (line,) = [line for line in output.splitlines() if "on_save_error" in line and f"{step:08d}" in line]
        assert error in line
    stage.assert_same_run(stage.tiny_run(1))
    other_stage = stage.sibling("other")
    short_overrides = (*overrides, "steps=7")
    other_stage.play(
        Scenario((ExitCode.DISK,), "enospc:point=save.mid:step=7", "No space left", args=short_overrides, saved=0)
    )
    assert not (other_stage.run / "encoder").exists()  # it would be that of an earlier step


@pytest.mark.parametrize(("world", "place"), [(1, "written"), case(2, "mid")])
def test_an_error_while_saving_ends_all_ranks_alike(stage: Stage, world: int, place: str):
    """74 on each, one line, nothing published, and the same command goes on."""
    fault, line = f"eio:point=save.{place}:step=14", "Input/output error.*(step-00000007|whole)"
    stage.play(Scenario((ExitCode.DISK,) * world, fault, line, saved=7, extra_check=assert_no_drafts, resumed=True))


def test_folders_that_cannot_be_written(stage: Stage):
    """A8: 73 before the first step, whether it is the run's folder or that of its checkpoints."""
    stage.stop("loss:step=9")
    before = tiny_runs.checkpoint_bits(stage.run), (stage.run / "metrics.jsonl").read_bytes()

    def scene() -> None:
        for folder in (stage.run / "checkpoints", stage.run):
            mount("--bind", folder, folder)
            mount("-o", "remount,ro,bind", folder)
            line = f"(?=.*Read-only file system)(?=.*{stage.run})"
            stage.play(Scenario((ExitCode.CANNOT_CREATE,), "", line, patterns=("pretrain",), owns_folder=False))

    run_with_own_mounts(scene, stage.folder)
    assert (tiny_runs.checkpoint_bits(stage.run), (stage.run / "metrics.jsonl").read_bytes()) == before


def test_folders_that_are_none(shards: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("/proc/nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for name in ("file", "file/run", "loop", "nowhere", "pipe", "run", "x" * 300):
        result = call_tool("pretrain", tiny_runs.run_args(shards, tmp_path / name))
        assert result.code == ExitCode.CANNOT_CREATE, (name, result.output)
        assert "Traceback" not in result.output
        assert name in result.last_line
    result = call_tool("pretrain", tiny_runs.run_args(shards, tmp_path / "many" / "folders" / "deep", "steps=1"))
    assert result.code == 0, result.output


@pytest.mark.process
def test_what_cannot_be_deleted_is_left_for_later(stage: Stage):
    """A9: a warning (EBUSY), the training goes on, and the next start deletes it."""
    stage.stop("loss:step=9")
    busy_checkpoint, reference = tiny_runs.last_checkpoint(stage.run), stage.tiny_run(1)

    def scene() -> None:
        mount("--bind", busy_checkpoint, busy_checkpoint)
        assert re.search(rf"{busy_checkpoint}.* could not be deleted.*busy", stage.finish())

    run_with_own_mounts(scene, stage.folder)
    assert checkpoint.find_corruption(busy_checkpoint) is None
    stage.assert_same_bits(reference)
    assert set(tiny_runs.file_names(stage.run)) - set(tiny_runs.file_names(reference)) == {
        f"checkpoints/{busy_checkpoint.name}"
    }
    stage.finish()
    stage.assert_same_run(reference)


@ranks(2)
def test_a_slow_disk_is_told_of_and_waited_for(stage: Stage, world: int):
    """A12: a warning with MB/s; two ranks wait for each other longer than it takes."""
    fault = "sleep:point=save.mid:step=14-20:seconds=2.2"
    output = stage.play(Scenario((0,) * world, fault, args=("timeout=30",))).output
    (warning,) = [line for line in output.splitlines() if "MB/s" in line]
    assert re.search(r"step-00000014.*\b[2-9]\.\d s, 0\.\d+ MB/s", warning)


def test_a_word_that_cannot_be_left_is_not_the_end_that_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """exit.json cannot be written: the code and the line are still those of what happened."""
    original_write = run_module.write_bytes

    def fail_on_exit_file(path: Path, data: bytes) -> None:
        if path.name == "exit.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original_write(path, data)

    monkeypatch.setattr(run_module, "write_bytes", fail_on_exit_file)
    patterns = ("exit.json could not be written: No space left",)
    stage.play(
        Scenario(
            (ExitCode.DISK,), "eio:point=save.mid:step=7", "Input/output error", patterns=patterns, owns_folder=False
        )
    )
    assert not (stage.run / "exit.json").exists()
