"""Killed with -9 anywhere: at every call and every system call of a save, and whole trainings at any time.

After each kill the newest checkpoint is the old one, or the new one once it is published, never a third state; the same
command goes on, and what it ends with is the uninterrupted run's, bit for bit.
"""

import ctypes
import errno
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
from typing import Any, NoReturn

import pytest
import torch

from ssl_vit.exits import DISK, INTERNAL
from ssl_vit.train import checkpoint
from ssl_vit.train.checkpoint import MANIFEST
from tests.runs import rows
from tests.starts import Start
from tests.train.children import ended, fork
from tests.train.outcome import STEPS, outcome, words

SEED = 5
SHOWN, ALL = 24, 10**9  # system calls of a save that are killed in `make test`, and in `make test-long`
OLD, NEW, KEEP = 1, 2, 1  # there is checkpoint 1, all that is kept; saving 2 prunes it
PR_SET_PTRACER, ANY = 0x59616D61, -1
CHANGING = {"openat", "mkdir", "mkdirat", "write", "writev", "pwrite64", "copy_file_range", "sendfile", "fallocate"}
CHANGING |= {"ftruncate", "truncate", "fsync", "fdatasync", "sync_file_range", "close", "fchmod", "chmod", "mmap"}
CHANGING |= {"rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir", "utimensat"}
READING = {"read", "pread64", "newfstatat", "fstat", "stat", "lstat", "statx", "lseek", "getdents64", "statfs"}


def content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, the optimizer's state and all else of some training."""
    torch.manual_seed(step)
    model = {"weight": torch.randn(20, 30), "bias": torch.randn(20)}
    optimizer = {f"{name}/exp_avg": torch.randn_like(value) for name, value in model.items()}
    return model, optimizer, {"step": step, "window.loss": torch.tensor(0.1 * step), "bad_samples": [0, 0]}


CONTENT = [content(step) for step in range(6)]


def save(parent: Path, step: int) -> None:
    checkpoint.save(parent, step, KEEP, *CONTENT[step])


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
    model, optimizer, state = checkpoint.load(folder)
    wanted = CONTENT[state["step"]]
    assert folder.name == f"step-{state['step']:08d}"
    assert {name: state[name] for name in wanted[2]} == wanted[2]
    for found, given in zip((model, optimizer), wanted, strict=False):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given)
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


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def killed_at(last: int, parent: Path) -> None:
    """Save, and die before the `last`-th call that touches the disk; of a tensor file's writing also in its middle.

    A kill takes nothing from what was written, flushed or not, so fsync is only counted.
    """
    import safetensors.torch

    count = 0
    serialize = safetensors.torch.serialize_file  # type: ignore[attr-defined]

    def reached(event: str, arguments: object = None) -> None:
        nonlocal count
        del arguments
        if event == "open" or event.startswith(("os.", "shutil.")):
            count += 1
            if count == last:
                die()

    def half(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        nonlocal count
        reached("os.serialize")
        serialize(tensors, path, *more, **named)
        count += 1
        if count == last:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    safetensors.torch.serialize_file = half  # type: ignore[assignment]
    os.fsync = lambda handle: reached("os.fsync")  # type: ignore[assignment]
    sys.addaudithook(reached)
    save(parent, NEW)


def test_a_save_killed_at_every_call(origin: Path, tmp_path: Path):
    """The fallback that needs nothing: Python's own events."""
    found: list[int] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        parent = tmp_path / f"{len(found)}"
        shutil.copytree(origin, parent)
        code = ended(fork(lambda parent=parent: killed_at(len(found) + 1, parent), tmp_path / "screen"))
        assert code in (0, -signal.SIGKILL), (tmp_path / "screen").read_text()
        found.append(aftermath(parent))
        shutil.rmtree(parent)
    assert found == sorted(found), "published, and then not"
    times = Counter(found)
    assert times[OLD] >= 20  # calls before the publication
    assert times[NEW] >= 8  # and while the oldest is pruned
    print(f"\n{len(found) - 1} calls of a save, each killed: {times[OLD]} old, {times[NEW]} new, 0 others")


# system calls: strace


def traced(work: Callable[[], object], folder: Path, *options: str) -> tuple[int, str, str]:
    """Do the work in a child under strace, which sees nothing of what came before; its code, trace and screen."""
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
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(origin, folder / "all")
    code, trace, screen = traced(lambda: save(folder / "all", NEW), folder)
    assert code == 0, screen
    seen: Counter[str] = Counter()
    found = []
    for name in re.findall(r"^\d+ +([a-z_0-9]+)\(", trace, re.MULTILINE):
        seen[name] += 1
        found.append((name, seen[name]))
    return found


def kill_at(chosen: list[tuple[str, int]], origin: Path, folder: Path) -> Counter[int]:
    """Kill a save at each of the calls, look at what is left each time, and count the steps found."""
    found: Counter[int] = Counter()
    reached: dict[str, int] = {}
    for name, number in chosen:
        parent = folder / f"{name}-{number}"
        shutil.copytree(origin, parent)
        inject = [f"--trace={name}", f"--inject={name}:signal=SIGKILL:when={number}"]
        code, _, screen = traced(lambda parent=parent: save(parent, NEW), folder, *inject)
        assert code == -signal.SIGKILL, (name, number, screen)
        step = aftermath(parent)
        assert step >= reached.get(name, OLD), f"{name} {number}: published, and then not"
        reached[name] = step
        found[step] += 1
        shutil.rmtree(parent)
    return found


def test_a_save_killed_at_some_system_calls(origin: Path, calls: list[tuple[str, int]], tmp_path: Path):
    """Those around each change of a name, and a few others."""
    chosen = {i for i, (name, _) in enumerate(calls) if name.startswith("rename")}
    rest = [i for i, (name, _) in enumerate(calls) if name in CHANGING and i not in chosen]
    chosen |= set(random.Random(SEED).sample(rest, SHOWN - len(chosen)))
    found = kill_at([calls[i] for i in sorted(chosen)], origin, tmp_path)
    assert found[OLD] > 0
    assert found[NEW] > 0


@pytest.mark.long
def test_a_save_killed_at_every_system_call(origin: Path, calls: list[tuple[str, int]], tmp_path: Path):
    chosen = [call for call in calls if call[0] in CHANGING | READING]
    found = kill_at(chosen, origin, tmp_path)
    print(f"\n{len(chosen)} system calls of a save, each killed: {found[OLD]} old, {found[NEW]} new, 0 others")


def test_everything_is_on_the_disk_before_it_counts(origin: Path, calls: list[tuple[str, int]], tmp_path: Path):
    """Each file and the draft's folder flushed before the rename, the folder of all after it, and pruned only then."""
    del calls
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


FLUSHES = ("fsync", "fdatasync")
RENAMES = ("rename", "renameat", "renameat2")
DELETIONS = ("unlink", "unlinkat", "rmdir")


@pytest.mark.parametrize(
    ("group", "error"),
    [(FLUSHES, "EIO"), (RENAMES, "EXDEV"), (RENAMES, "EACCES"), (DELETIONS, "EBUSY"), (("write",), "ENOSPC")],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_system_calls_that_fail(origin: Path, calls: list[tuple[str, int]], tmp_path: Path, group, error):
    """Each flush, rename and deletion in turn: 74 and the old checkpoint; after the publication a warning at most."""
    seen: list[tuple[int, int]] = []
    for name, number in [call for call in calls if call[0] in group]:
        parent = tmp_path / f"{name}-{number}"
        shutil.copytree(origin, parent)
        inject = [f"--trace={name}", f"--inject={name}:error={error}:when={number}"]
        code, trace, screen = traced(lambda parent=parent: save(parent, NEW), tmp_path, *inject)
        hit = next((line for line in trace.splitlines() if "INJECTED" in line), "")
        if not hit or (group == DELETIONS and ".tmp-" in hit):  # which has been renamed: there is nothing to delete
            continue
        assert code in (0, DISK), screen
        left = names(parent)
        step = aftermath(parent)
        if code == DISK:
            line = next(line for line in screen.splitlines() if line.startswith("line: "))
            assert str(parent) in line
            assert os.strerror(getattr(errno, error)) in line
            assert step == NEW or left == [f"step-{OLD:08d}"]
        else:
            assert step == NEW
            assert "could not be" in screen  # the warning
        seen.append((code, step))
    if group == DELETIONS:
        assert set(seen) == {(0, NEW)}
    else:
        assert (DISK, OLD) in seen


# whole trainings

PLACES = ["start", "claimed", "batch:step=1", "save.begin:step=2", "save.mid:step=2", "save.written:step=2"]
PLACES += ["save.published:step=2", "resume.chosen", "resume.loaded", "save.mid:step=4", "save.pruned:step=6"]  # B15
PLACES += ["loss:step=7", "weights:step=7", "update:step=7", "eval.batch:step=7", "row:step=9", "save.begin:step=20"]
PLACES += ["row:step=20", "eval.batch:step=20", "finish"]
WORLDS = [1, 2]
KILLS = {1: 4, 2: 2}  # at random times, in `make test`
MANY = {1: 80, 2: 50}  # and in `make test-long`


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def straight(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a training leaves that nothing stops: ranks, outcome, and seconds that it takes."""
    world, folder = request.param, tmp_path_factory.mktemp("straight")
    for run in (folder / "warm", folder / "run"):
        began = time.monotonic()
        start = Start(words(shards, run), folder, world)
        assert start.wait() == [0] * world, start.said()
    return world, outcome(run), time.monotonic() - began


def finished(given: list[str], folder: Path, world: int) -> dict[str, Any]:
    start = Start(given, folder, world)
    assert start.wait() == [0] * world, start.said()
    return outcome(folder / "run")


def killed_in(given: list[str], folder: Path, world: int, place: str) -> None:
    """A start that comes to a place, where its first rank is killed; the others go with it, as in a power cut."""
    start = Start(given, folder, world, f"kill:point={place}")
    start.until(lambda: any(process.exitcode is not None for process in start.processes))
    start.kill()
    assert -signal.SIGKILL in start.wait(10), f"{place} was not reached: {start.said()}"


def kill_by_the_clock(shards: Path, folder: Path, straight: Any, kills: int) -> tuple[int, int]:
    """Kill trainings at random times and start them again until so many were killed; how many were, over how many."""
    world, wanted, seconds = straight
    draw, count, runs = random.Random(SEED), 0, 0
    while count < kills:
        runs += 1
        given = words(shards, folder / f"{runs}" / "run")
        while True:
            start = Start(given, folder / f"{runs}", world)
            if count < kills:
                time.sleep(draw.uniform(0, seconds))
                start.kill()
            codes = start.wait()
            if codes == [0] * world:
                break
            assert codes.count(-signal.SIGKILL) > 0, f"seed {SEED}, kill {count}: {codes} {start.said()}"
            count += 1
        assert outcome(folder / f"{runs}" / "run") == wanted, f"seed {SEED}, training {runs}"
    return count, runs


def test_a_training_killed_at_every_place(shards: Path, straight: Any, tmp_path: Path):
    """One after the other in the same run; a place in a resume, and then one in the first save after it (B15)."""
    world, wanted, _ = straight
    given = words(shards, tmp_path / "run")
    for place in PLACES[:: 1 if world == 1 else 2]:
        killed_in(given, tmp_path, world, place)
    for name in (".results.json.tmp-host-1", ".exit.json.tmp-host-1", "checkpoints/.latest.tmp-host-1", ".shared-01"):
        (tmp_path / "run" / name).touch()  # a kill in any of these writes
    assert finished(given, tmp_path, world) == wanted


def test_a_training_killed_at_random_times(shards: Path, straight: Any, tmp_path: Path):
    kill_by_the_clock(shards, tmp_path, straight, KILLS[straight[0]])


@pytest.mark.long
def test_trainings_killed_at_many_times(shards: Path, straight: Any, tmp_path: Path):
    kills, runs = kill_by_the_clock(shards, tmp_path, straight, MANY[straight[0]])
    print(f"\n{kills} kills at random times, {straight[0]} ranks, {runs} trainings: 0 differing bits, 0 manual actions")


@pytest.mark.long
def test_trainings_killed_at_every_place_of_many_steps(shards: Path, straight: Any, tmp_path: Path):
    """The places of a save and of a resume, at every save of a training."""
    world, wanted, _ = straight
    given, count = words(shards, tmp_path / "run"), 0
    for step in range(2, STEPS + 1, 2):
        for place in ("save.begin", "save.mid", "save.written"):
            killed_in(given, tmp_path, world, f"{place}:step={step}")
            killed_in(given, tmp_path, world, ("resume.chosen", "resume.loaded")[count % 2])
            count += 2
        killed_in(given, tmp_path, world, f"{('save.published', 'save.pruned')[step // 2 % 2]}:step={step}")
        count += 1
    assert finished(given, tmp_path, world) == wanted
    print(f"\n{count} kills at places of saves and resumes, {world} ranks: 0 differing bits, 0 manual actions")


def test_a_kill_in_the_middle_of_an_accumulated_step(shards: Path, tmp_path: Path):
    """There are no checkpoints between micro batches (B14): the step is made again as a whole."""
    more = ["micro_batch=2", "save_every=1", "steps=6"]
    given = words(shards, tmp_path / "run", *more)
    for step in (2, 5):
        killed_in(given, tmp_path, 1, f"loss:step={step}")
        saved = checkpoint.steps(tmp_path / "run" / "checkpoints")
        assert [int(folder.name[5:]) for folder in saved] == list(range(max(1, step - 2), step))
    start = Start(given, tmp_path)
    assert start.wait() == [0], start.said()
    other = words(shards, tmp_path / "straight", *more)
    start = Start(other, tmp_path)
    assert start.wait() == [0], start.said()
    assert outcome(tmp_path / "run", 6) == outcome(tmp_path / "straight", 6)


@pytest.mark.parametrize(("rank", "place"), [(0, "save.mid"), (1, "save.begin")])
def test_one_rank_killed_while_saving(shards: Path, tmp_path: Path, rank: int, place: str):
    """A3: the other ends by itself within 15 s, nothing is published, and the same command goes on."""
    given = words(shards, tmp_path / "run")
    start = Start(given, tmp_path, 2, f"kill:point={place}:rank={rank}:step=4")
    start.until(lambda: start.processes[rank].exitcode is not None)
    began = time.monotonic()
    codes = start.wait(40)
    assert time.monotonic() - began < 15
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == INTERNAL, start.said()
    assert [folder.name for folder in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    start = Start(given, tmp_path, 2)
    assert start.wait() == [0, 0], start.said()
    assert rows(tmp_path / "run")[-1]["step"] == STEPS
