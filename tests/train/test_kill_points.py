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

from ssl_vit.errors import DISK
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import MANIFEST
from tests import tiny_runs
from tests.train.children import ended, fork
from tests.train.scenarios import KILLED, Scenario, Stage, ranks

SEED = 5
SHOWN = 24  # system calls of a save that are killed in `make test-all`; all of them in `make test-long`
OLD, NEW, KEEP = 1, 2, 1  # there is checkpoint 1, all that is kept; saving 2 prunes it
PR_SET_PTRACER, ANY = 0x59616D61, -1
FLUSHES, RENAMES = ("fsync", "fdatasync"), ("rename", "renameat", "renameat2")
DELETIONS = ("unlink", "unlinkat", "rmdir")
CHANGING = "open|mkdir|write|copy_file|sendfile|alloc|trunc|sync|close|chmod|mmap|rename|link|rmdir|utime"
READING = "read|stat|seek|getdents"


def content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, the optimizer's state and all else of some training."""
    torch.manual_seed(step)
    model = {"weight": torch.randn(20, 30), "bias": torch.randn(20)}
    optimizer = {f"{name}/exp_avg": torch.randn_like(value) for name, value in model.items()}
    return model, optimizer, {"step": step, "window.loss": torch.tensor(0.1 * step), "bad_samples": [0, 0]}


def save(parent: Path, step: int) -> None:
    checkpoint.save(parent, step, KEEP, *content(step))


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
    assert checkpoint.flaw(folder) is None
    *tensors, state = checkpoint.load(folder)
    *given, values = content(state["step"])
    assert folder.name == f"step-{state['step']:08d}"
    assert {name: state[name] for name in values} == values
    for mine, theirs in zip(tensors, given, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    return state["step"]


def aftermath(parent: Path) -> int:
    """What a start would find: one of two states, from which the next save goes well and leaves nothing behind."""
    found = checkpoint.newest(parent)
    assert found is not None
    step = assert_saved(found)
    assert step in (OLD, NEW)
    assert not list(parent.glob("*corrupt*"))  # a kill damages nothing that was published
    checkpoint.tidy(parent, KEEP)
    save(parent, step + 1)
    assert names(parent) == [f"step-{step + 1:08d}"]
    assert assert_saved(parent / f"step-{step + 1:08d}") == step + 1
    return step


def killed_at(last: int, parent: Path) -> None:
    """Save, and die before the `last`-th call that touches the disk; a kill takes nothing from what was not flushed."""
    count = itertools.count(1)

    def reached(event: str, _: object = None) -> None:
        if (event == "open" or event.startswith(("os.", "shutil."))) and next(count) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: reached("os.fsync")  # type: ignore[assignment]
    sys.addaudithook(reached)
    save(parent, NEW)


@pytest.mark.parametrize("stride", [30, pytest.param(1, marks=pytest.mark.process)])
def test_a_save_killed_at_every_call(origin: Path, tmp_path: Path, stride: int):
    """Or at some: the fallback that needs nothing, Python's own events."""
    found, code = list[int](), KILLED
    while code == KILLED:
        parent = shutil.copytree(origin, tmp_path / f"{len(found)}")
        call = 1 + stride * len(found)
        code = ended(fork(lambda parent=parent, call=call: killed_at(call, parent), tmp_path / "screen"))
        assert code in (0, KILLED), (tmp_path / "screen").read_text()
        found.append(aftermath(parent))
        shutil.rmtree(parent)
    assert found == sorted(found), "published, and then not"
    times = Counter(found)
    assert times[OLD] >= max(1, 20 // stride)  # calls before the publication
    assert times[NEW] >= max(1, 8 // stride)  # and while the oldest is pruned
    print(f"\n{len(found) - 1} calls of a save, each killed: {times[OLD]} old, {times[NEW]} new, 0 others")


# system calls: strace


def traced(work: Callable[[], object], folder: Path, *options: str) -> tuple[int, str, str]:
    """Do the work in a child under strace, which sees nothing of what came before; its code, trace and screen."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    screen, trace = folder / "screen", folder / "trace"

    def stopped() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    pid = fork(stopped, screen)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", *options, "-o", trace, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        tracer.communicate()
        pytest.skip(f"strace may not trace here: {said}")
    os.kill(pid, signal.SIGCONT)
    code = ended(pid)
    tracer.communicate(timeout=60)
    return code, trace.read_text(), screen.read_text()


@pytest.fixture(scope="module")
def calls(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """The system calls of a save, in order: name, and how many of the name came before, from 1."""
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(origin, folder / "all")
    code, trace, screen = traced(lambda: save(folder / "all", NEW), folder)
    assert code == 0, screen
    found = re.findall(r"^\d+ +([a-z_0-9]+)\(", trace, re.MULTILINE)
    return [(name, 1 + found[:place].count(name)) for place, name in enumerate(found)]


@pytest.mark.parametrize(
    "every", [pytest.param(False, marks=pytest.mark.process), pytest.param(True, marks=pytest.mark.long)]
)
def test_a_save_killed_at_system_calls(origin: Path, calls: list[tuple[str, int]], tmp_path: Path, every: bool):
    """At all of them, or those around each change of a name, and a few others."""
    chosen = [call for call in calls if re.search(f"{CHANGING}|{READING}", call[0])]
    if not every:
        some = {call for call in chosen if call[0] in RENAMES}
        rest = [call for call in chosen if re.search(CHANGING, call[0]) and call not in some]
        some |= {*random.Random(SEED).sample(rest, SHOWN - len(some))}
        chosen = [call for call in chosen if call in some]
    found, reached = Counter[int](), dict[str, int]()
    for name, number in chosen:
        parent = shutil.copytree(origin, tmp_path / f"{name}-{number}")
        inject = [f"--trace={name}", f"--inject={name}:signal=SIGKILL:when={number}"]
        code, _, screen = traced(lambda parent=parent: save(parent, NEW), tmp_path, *inject)
        assert code == KILLED, (name, number, screen)
        step = aftermath(parent)
        assert step >= reached.get(name, OLD), f"{name} {number}: published, and then not"
        reached[name] = step
        found[step] += 1
        shutil.rmtree(parent)
    assert found[OLD] > 0
    assert found[NEW] > 0
    print(f"\n{len(chosen)} system calls of a save, each killed: {found[OLD]} old, {found[NEW]} new, 0 others")


def test_everything_is_on_the_disk_before_it_counts(origin: Path, tmp_path: Path):
    """Each file and the draft's folder flushed before the rename, the folder of all after it, and pruned only then."""
    parent = shutil.copytree(origin, tmp_path / "checkpoints")
    code, trace, screen = traced(lambda: save(parent, NEW), tmp_path, "--decode-fds=path")
    assert code == 0, screen
    lines = trace.splitlines()
    target, draft = parent / f"step-{NEW:08d}", parent / f".step-{NEW:08d}.tmp"
    (published,) = [i for i, line in enumerate(lines) if re.search(rf'rename\w*\(.*"{draft}".*"{target}"', line)]
    flushed = [(i, one) for i, line in enumerate(lines) for one in re.findall(r"f(?:data)?sync\(\d+<(.*?)>\)", line)]
    before = {Path(one).name for i, one in flushed if i < published and Path(one).parent == draft}
    assert {path.name for path in target.iterdir()} - {MANIFEST} <= before
    assert any(MANIFEST in name for name in before)
    assert str(draft) in [one for i, one in flushed if i < published]
    pruned = min(i for i, line in enumerate(lines) if f'"{parent}/step-{OLD:08d}"' in line and "rename" in line)
    assert str(parent) in [one for i, one in flushed if published < i < pruned]


@pytest.mark.process
@pytest.mark.parametrize(
    ("group", "error"),
    [(FLUSHES, "EIO"), (RENAMES, "EXDEV"), (RENAMES, "EACCES"), (DELETIONS, "EBUSY"), (("write",), "ENOSPC")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_system_calls_that_fail(origin: Path, calls: list[tuple[str, int]], tmp_path: Path, group, error):
    """Each flush, rename and deletion in turn: 74 and the old checkpoint; after the publication a warning at most."""
    seen: list[tuple[int, int]] = []
    for name, number in [call for call in calls if call[0] in group]:
        parent = shutil.copytree(origin, tmp_path / f"{name}-{number}")
        inject = [f"--trace={name}", f"--inject={name}:error={error}:when={number}"]
        code, trace, screen = traced(lambda parent=parent: save(parent, NEW), tmp_path, *inject)
        hit = re.search("^.*INJECTED", trace, re.MULTILINE)
        if not hit or (group == DELETIONS and ".tmp-" in hit[0]):  # which has been renamed: there is nothing to delete
            continue
        assert code in (0, DISK), screen
        left = names(parent)
        step = aftermath(parent)
        if code == DISK:
            why = re.escape(os.strerror(getattr(errno, error)))
            assert re.search(f"^line: (?=.*{parent})(?=.*{why})", screen, re.MULTILINE), screen
            assert step == NEW or left == [f"step-{OLD:08d}"]
        else:
            assert step == NEW
            assert "could not be" in screen  # the warning
        seen.append((code, step))
    assert set(seen) == {(0, NEW)} if group == DELETIONS else (DISK, OLD) in seen


# whole trainings

PLACES = ["start", "claimed", "batch:step=1", "save.begin:step=7", "save.mid:step=7", "save.written:step=7"]
PLACES += ["save.published:step=7", "resume.chosen", "resume.loaded", "save.mid:step=14", "eval.batch:step=20"]  # B15
PLACES += ["row:step=21", "save.pruned:step=28", "loss:step=29", "weights:step=29", "update:step=29"]
PLACES += ["save.begin:step=30", "row:step=30", "eval.batch:step=30", "finish"]
SAVES = ("steps=20", "save_every=2")
KILLS = {1: 80, 2: 50}  # at random times, in `make test-long`
SPAN = {1: 2.5, 2: 4.0}  # seconds from the start on in which they come


def killed_at_places(stage: Stage, world: int, places: list[str], *words: str) -> None:
    """One start a place, where its first rank is killed, and the others with it, as in a power cut; then the end."""
    for place in places:
        stage.play(Scenario((KILLED,) * world, f"kill:point={place}", cut=True, words=words))
    for name in (".results.json.tmp-host-1", ".exit.json.tmp-host-1", "checkpoints/.latest.tmp-host-1", ".shared-01"):
        (stage.run / name).touch()  # a kill in any of these writes
    stage.finish(world, *words)


def test_a_training_killed_in_a_save(stage: Stage):
    """The one kill of the default tier."""
    stage.play(Scenario((KILLED,), "kill:point=save.mid:step=14", saved=7, resumed=True))


@ranks(1, 2)
def test_a_training_killed_at_every_place(stage: Stage, world: int):
    """One after the other in the same run; a place in a resume, and then one in the first save after it (B15)."""
    killed_at_places(stage, world, PLACES[:: 1 if world == 1 else 2])
    stage.as_in_peace(stage.tiny_run(world))


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_trainings_killed_at_many_times(stage: Stage, world: int):
    """Also where no place has a name: kill -9 of all at random moments, again and again, until so many were killed."""
    draw, count, trainings = random.Random(SEED), 0, 0
    while count < KILLS[world]:
        trainings += 1
        one, codes = stage.at(f"{trainings}"), [KILLED]
        while codes != [0] * world:
            start = one.start(world)
            if count < KILLS[world]:
                time.sleep(draw.uniform(0, SPAN[world]))
                start.kill()
            codes = start.wait()
            assert codes == [0] * world or KILLED in codes, f"seed {SEED}, kill {count}: {codes} {start.said()}"
            count += codes != [0] * world
        one.as_in_peace(stage.tiny_run(world))
    print(f"\n{count} kills at random times, {world} ranks, {trainings} trainings: 0 differing bits, 0 manual actions")


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_trainings_killed_at_every_place_of_many_steps(stage: Stage, world: int):
    """The places of a save and of a resume, at every save of a training."""
    places = []
    for step in range(2, 21, 2):
        for number, place in enumerate(("save.begin", "save.mid", "save.written")):
            places += [f"{place}:step={step}", ("resume.chosen", "resume.loaded")[(step // 2 + number) % 2]]
        places += [f"{('save.published', 'save.pruned')[step // 2 % 2]}:step={step}"]
    killed_at_places(stage, world, places, *SAVES)
    stage.as_in_peace(tiny_runs.straight(stage.shards, world, stage.folder / "straight", *SAVES))
    print(f"\n{len(places)} kills at places of saves and resumes, {world} ranks: 0 differing bits, 0 manual actions")


def test_an_accumulated_step_that_is_cut_in_the_middle(stage: Stage):
    """There are no checkpoints between micro batches (B14): the step is made again as a whole."""
    more = ["micro_batch=2", "save_every=1", "steps=6", "eval_every=6"]
    for step in (2, 5):
        stage.stop(f"loss:step={step}", *more)
        assert tiny_runs.saved(stage.run) == list(range(max(1, step - 3), step))
    for one in (stage, stage.at("straight")):
        one.finish(1, *more)
    stage.as_in_peace(stage.at("straight").run)
