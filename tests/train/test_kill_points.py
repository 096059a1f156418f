"""Killed with -9 anywhere: at every call and every system call of a save, and whole trainings at every place.

After each kill the newest checkpoint is the old one, or the new one once it is published, never a third state; the same
command goes on, and what it ends with is the uninterrupted run's, bit for bit.
"""

import ctypes
import errno
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit.errors import ExitCode
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import MANIFEST
from tests import tiny_runs
from tests.train.children import fork, wait_for_exit
from tests.train.scenarios import KILLED, Scenario, Stage, ranks

SEED = 5
NUM_SAMPLED_CALLS = 24  # system calls of a save that are killed in `make test-all`; all of them in `make test-long`
OLD, NEW, KEEP = 1, 2, 1  # there is checkpoint 1, all that is kept; saving 2 prunes it
PR_SET_PTRACER, ANY = 0x59616D61, -1
FLUSHES, RENAMES = ("fsync", "fdatasync"), ("rename", "renameat", "renameat2")
DELETIONS = ("unlink", "unlinkat", "rmdir")
CHANGING = "open|mkdir|write|copy_file|sendfile|alloc|trunc|sync|close|chmod|mmap|rename|link|rmdir|utime"
READING = "read|stat|seek|getdents"


def make_state(step: int) -> dict[str, dict[str, Any]]:
    """The parts of the checkpoint of some training."""
    torch.manual_seed(step)
    model = {"weight": torch.randn(20, 30), "bias": torch.randn(20)}
    optimizer = {f"{name}/exp_avg": torch.randn_like(value) for name, value in model.items()}
    metrics = {"loss": torch.tensor(0.1 * step)}
    return {"model": model, "optimizer": optimizer, "metrics": metrics, "train": {"step": step, "losses": [0.5]}}


def save(parent: Path, step: int) -> None:
    checkpoint.save(parent, step, make_state(step), KEEP)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, as many as are kept."""
    parent = tmp_path_factory.mktemp("origin")
    save(parent, OLD)
    return parent


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name != "latest")


def assert_saved(folder: Path) -> int:
    """A checkpoint holds what was given to it, to the bit; returns its step."""
    assert checkpoint.find_corruption(folder) is None
    state = checkpoint.load(folder)
    expected = make_state(step := state["train"]["step"])
    assert folder.name == f"step-{step:08d}"
    assert state.keys() == expected.keys()
    assert state.pop("train") == expected.pop("train")
    for name, tensors in state.items():
        assert tensors.keys() == expected[name].keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected[name].items())
    return step


def assert_recovers(parent: Path) -> int:
    """What a start would find: one of two states, from which the next save goes well and leaves nothing behind."""
    newest = checkpoint.newest_valid(parent)
    assert newest is not None
    step = assert_saved(newest)
    assert step in (OLD, NEW)
    assert not list(parent.glob("*corrupt*"))  # a kill damages nothing that was published
    checkpoint.clean_up(parent, KEEP)
    save(parent, step + 1)
    assert names(parent) == [f"step-{step + 1:08d}"]
    assert assert_saved(parent / f"step-{step + 1:08d}") == step + 1
    return step


def save_and_die(call_number: int, parent: Path) -> None:
    """Save, and die before the `last`-th call that touches the disk; a kill takes nothing from what was not flushed."""
    count = itertools.count(1)

    def audit_hook(event: str, _: object = None) -> None:
        if (event == "open" or event.startswith(("os.", "shutil."))) and next(count) == call_number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: audit_hook("os.fsync")  # type: ignore[assignment]
    sys.addaudithook(audit_hook)
    save(parent, NEW)


@pytest.mark.parametrize("stride", [30, pytest.param(1, marks=pytest.mark.process)])
def test_a_save_killed_at_every_call(origin: Path, tmp_path: Path, stride: int):
    """Or at some: the fallback that needs nothing, Python's own events."""
    steps, code = list[int](), KILLED
    while code == KILLED:
        parent = shutil.copytree(origin, tmp_path / f"{len(steps)}")
        call = 1 + stride * len(steps)
        code = wait_for_exit(fork(lambda parent=parent, call=call: save_and_die(call, parent), tmp_path / "screen"))
        assert code in (0, KILLED), (tmp_path / "screen").read_text()
        steps.append(assert_recovers(parent))
        shutil.rmtree(parent)
    assert steps == sorted(steps), "published, and then not"
    counts = Counter(steps)
    assert counts[OLD] >= max(1, 20 // stride)  # calls before the publication
    assert counts[NEW] >= max(1, 8 // stride)  # and while the oldest is pruned
    print(f"\n{len(steps) - 1} calls of a save, each killed: {counts[OLD]} old, {counts[NEW]} new, 0 others")


# system calls: strace


def run_traced(work: Callable[[], object], folder: Path, *options: str) -> tuple[int, str, str]:
    """Do the work in a child under strace, which sees nothing of what came before; its code, trace and screen."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log, trace = folder / "screen", folder / "trace"

    def stop_then_work() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    pid = fork(stop_then_work, log)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", *options, "-o", trace, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    message = tracer.stderr.readline()
    if "attached" not in message:
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
        tracer.communicate()
        pytest.skip(f"strace may not trace here: {message}")
    os.kill(pid, signal.SIGCONT)
    code = wait_for_exit(pid)
    tracer.communicate(timeout=60)
    return code, trace.read_text(), log.read_text()


@pytest.fixture(scope="module")
def calls(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """The system calls of a save, in order: name, and how many of the name came before, from 1."""
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(origin, folder / "all")
    code, trace, output = run_traced(lambda: save(folder / "all", NEW), folder)
    assert code == 0, output
    call_names = re.findall(r"^\d+ +([a-z_0-9]+)\(", trace, re.MULTILINE)
    return [(name, 1 + call_names[:i].count(name)) for i, name in enumerate(call_names)]


@pytest.mark.parametrize(
    "every", [pytest.param(False, marks=pytest.mark.process), pytest.param(True, marks=pytest.mark.long)]
)
def test_a_save_killed_at_system_calls(origin: Path, calls: list[tuple[str, int]], tmp_path: Path, every: bool):
    """At all of them, or those around each change of a name, and a few others."""
    selected = [call for call in calls if re.search(f"{CHANGING}|{READING}", call[0])]
    if not every:
        sampled = {call for call in selected if call[0] in RENAMES}
        candidates = [call for call in selected if re.search(CHANGING, call[0]) and call not in sampled]
        sampled |= {*random.Random(SEED).sample(candidates, NUM_SAMPLED_CALLS - len(sampled))}
        selected = [call for call in selected if call in sampled]
    counts, last_steps = Counter[int](), dict[str, int]()
    for name, number in selected:
        parent = shutil.copytree(origin, tmp_path / f"{name}-{number}")
        inject = [f"--trace={name}", f"--inject={name}:signal=SIGKILL:when={number}"]
        code, _, output = run_traced(lambda parent=parent: save(parent, NEW), tmp_path, *inject)
        assert code == KILLED, (name, number, output)
        step = assert_recovers(parent)
        assert step >= last_steps.get(name, OLD), f"{name} {number}: published, and then not"
        last_steps[name] = step
        counts[step] += 1
        shutil.rmtree(parent)
    assert counts[OLD] > 0
    assert counts[NEW] > 0
    print(f"\n{len(selected)} system calls of a save, each killed: {counts[OLD]} old, {counts[NEW]} new, 0 others")


def test_everything_is_on_the_disk_before_it_counts(origin: Path, tmp_path: Path):
    """Each file and the draft's folder flushed before the rename, the folder of all after it, and pruned only then."""
    parent = shutil.copytree(origin, tmp_path / "checkpoints")
    code, trace, output = run_traced(lambda: save(parent, NEW), tmp_path, "--decode-fds=path")
    assert code == 0, output
    lines = trace.splitlines()
    target, draft = parent / f"step-{NEW:08d}", parent / f".step-{NEW:08d}.tmp"
    (publish_line,) = [i for i, line in enumerate(lines) if re.search(rf'rename\w*\(.*"{draft}".*"{target}"', line)]
    flushes = [(i, path) for i, line in enumerate(lines) for path in re.findall(r"f(?:data)?sync\(\d+<(.*?)>\)", line)]
    before = {Path(path).name for i, path in flushes if i < publish_line and Path(path).parent == draft}
    assert {path.name for path in target.iterdir()} - {MANIFEST} <= before
    assert any(MANIFEST in name for name in before)
    assert str(draft) in [path for i, path in flushes if i < publish_line]
    prune_line = min(i for i, line in enumerate(lines) if f'"{parent}/step-{OLD:08d}"' in line and "rename" in line)
    assert str(parent) in [path for i, path in flushes if publish_line < i < prune_line]


@pytest.mark.process
@pytest.mark.parametrize(
    ("group", "error"),
    [(FLUSHES, "EIO"), (RENAMES, "EXDEV"), (RENAMES, "EACCES"), (DELETIONS, "EBUSY"), (("write",), "ENOSPC")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_system_calls_that_fail(origin: Path, calls: list[tuple[str, int]], tmp_path: Path, group, error):
    """Each flush, rename and deletion in turn: 74 and the old checkpoint; after the publication a warning at most."""
    outcomes: list[tuple[int, int]] = []
    for name, number in [call for call in calls if call[0] in group]:
        parent = shutil.copytree(origin, tmp_path / f"{name}-{number}")
        inject = [f"--trace={name}", f"--inject={name}:error={error}:when={number}"]
        code, trace, output = run_traced(lambda parent=parent: save(parent, NEW), tmp_path, *inject)
        injected = re.search("^.*INJECTED", trace, re.MULTILINE)
        if not injected or (
            group == DELETIONS and ".tmp-" in injected[0]
        ):  # which has been renamed: there is nothing to delete
            continue
        assert code in (0, ExitCode.DISK), output
        remaining = names(parent)
        step = assert_recovers(parent)
        if code == ExitCode.DISK:
            reason = re.escape(os.strerror(getattr(errno, error)))
            assert re.search(f"^line: (?=.*{parent})(?=.*{reason})", output, re.MULTILINE), output
            assert step == NEW or remaining == [f"step-{OLD:08d}"]
        else:
            assert step == NEW
            assert "could not be" in output  # the warning
        outcomes.append((code, step))
    assert set(outcomes) == {(0, NEW)} if group == DELETIONS else (ExitCode.DISK, OLD) in outcomes


# whole trainings

POINTS = ["start", "claimed", "batch:step=1", "save.begin:step=7", "save.mid:step=7", "save.written:step=7"]
POINTS += ["save.published:step=7", "resume.chosen", "resume.loaded", "save.mid:step=14", "eval.batch:step=20"]  # B15
POINTS += ["row:step=21", "save.pruned:step=28", "loss:step=29", "weights:step=29", "update:step=29"]
POINTS += ["save.begin:step=30", "row:step=30", "eval.batch:step=30", "finish"]
SAVE_OVERRIDES = ("steps=20", "save_every=2")
NUM_KILLS = {1: 80, 2: 50}  # at random times, in `make test-long`
MAX_DELAY = {1: 2.5, 2: 4.0}  # seconds from the start on in which they come


def kill_at_points(stage: Stage, world: int, points: list[str], *overrides: str) -> None:
    """One start a place, where its first rank is killed, and the others with it, as in a power cut; then the end."""
    for point in points:
        stage.play(Scenario((KILLED,) * world, f"kill:point={point}", power_cut=True, args=overrides))
    for name in (".results.json.tmp-host-1", ".exit.json.tmp-host-1", "checkpoints/.latest.tmp-host-1", ".shared-01"):
        (stage.run / name).touch()  # a kill in any of these writes
    stage.finish(world, *overrides)


def test_a_training_killed_in_a_save(stage: Stage):
    """The one kill of the default tier."""
    stage.play(Scenario((KILLED,), "kill:point=save.mid:step=14", saved=7, resumed=True))


@ranks(1, 2)
def test_a_training_killed_at_every_place(stage: Stage, world: int):
    """One after the other in the same run; a place in a resume, and then one in the first save after it (B15)."""
    kill_at_points(stage, world, POINTS[:: 1 if world == 1 else 2])
    stage.assert_same_run(stage.tiny_run(world))


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_trainings_killed_at_many_times(stage: Stage, world: int):
    """Also where no place has a name: kill -9 of all at random moments, again and again, until so many were killed."""
    rng, count, trainings = random.Random(SEED), 0, 0
    while count < NUM_KILLS[world]:
        trainings += 1
        run_stage, codes = stage.sibling(f"{trainings}"), [KILLED]
        while codes != [0] * world:
            start = run_stage.start(world)
            if count < NUM_KILLS[world]:
                time.sleep(rng.uniform(0, MAX_DELAY[world]))
                start.kill()
            codes = start.wait()
            assert codes == [0] * world or KILLED in codes, f"seed {SEED}, kill {count}: {codes} {start.output()}"
            count += codes != [0] * world
        run_stage.assert_same_run(stage.tiny_run(world))
    print(f"\n{count} kills at random times, {world} ranks, {trainings} trainings: 0 differing bits, 0 manual actions")


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_trainings_killed_at_every_place_of_many_steps(stage: Stage, world: int):
    """The places of a save and of a resume, at every save of a training."""
    points = []
    for step in range(2, 21, 2):
        for number, point in enumerate(("save.begin", "save.mid", "save.written")):
            points += [f"{point}:step={step}", ("resume.chosen", "resume.loaded")[(step // 2 + number) % 2]]
        points += [f"{('save.published', 'save.pruned')[step // 2 % 2]}:step={step}"]
    kill_at_points(stage, world, points, *SAVE_OVERRIDES)
    stage.assert_same_run(tiny_runs.run_straight(stage.shards, world, stage.folder / "straight", *SAVE_OVERRIDES))
    print(f"\n{len(points)} kills at places of saves and resumes, {world} ranks: 0 differing bits, 0 manual actions")


def test_an_accumulated_step_that_is_cut_in_the_middle(stage: Stage):
    """There are no checkpoints between micro batches (B14): the step is made again as a whole."""
    overrides = ["micro_batch=2", "save_every=1", "steps=6", "eval_every=6"]
    for step in (2, 5):
        stage.stop(f"loss:step={step}", *overrides)
        assert tiny_runs.checkpoint_steps(stage.run) == list(range(max(1, step - 3), step))
    for run_stage in (stage, stage.sibling("straight")):
        run_stage.finish(1, *overrides)
    stage.assert_same_run(stage.sibling("straight").run)
