"""Conversion by many processes and machines, dying as they please: the bytes are those of one that nothing befell."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import contents, make, one, write_pictures

from ssl_vit import exits
from ssl_vit.data import duplicates, manifest, shards
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.shards import MakeShards, convert

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forks beside threads, Python 3.12
ROOT = Path(shards.__file__).parents[2]
SPLIT = {"val_fraction": 0.4}


def told(source: Path, output: Path, **options: Any) -> MakeShards:
    return MakeShards(input=str(source), output=str(output), **{"workers": 1, "quiet": True} | options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 small images of three classes, some equal, and two that are none."""
    folder = write_pictures(tmp_path_factory.mktemp("in"), [f"{'abc'[i % 3]}/{i}.png" for i in range(12)], height=4)
    for i in (0, 5):
        shutil.copy(folder / "abc"[i % 3] / f"{i}.png", folder / "a" / f"again {i}.png")
    for name in ("a/bad.png", "b/bad.jpg"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def wholes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """The files that an unbroken conversion by one process writes, with these options."""
    known: dict[str, dict[str, bytes]] = {}

    def whole(**options: Any) -> dict[str, bytes]:
        name = repr(sorted(options.items()))
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            make(source, folder, **options)
            known[name] = contents(folder)
        return known[name]

    return whole


def parts_of(files: dict[str, bytes]) -> int:
    """The shards of the largest split."""
    folders = [name.rpartition("/")[0] for name in files if name.endswith(".tar")]
    return max(folders.count(folder) for folder in folders)


@settings(deadline=None, max_examples=14, derandomize=True, database=None)
@given(
    st.integers(1, 5).flatmap(lambda world: st.permutations(range(world))),
    st.sampled_from([2, 3, 5, 100]),
    st.sampled_from([{}, SPLIT]),
)
def test_any_number_of_processes_in_any_order_write_the_same_bytes(
    source: Path,
    wholes: Callable[..., dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    size: int,
    options: dict,
):
    """Also more of them than shards; who ends last writes the manifest, and nobody before."""
    output, world = tmp_path_factory.mktemp("out"), len(order)
    wanted = wholes(shard_samples=size, **options)
    busy = set(range(min(world, parts_of(wanted))))
    for place, rank in enumerate(order):
        made = convert(told(source, output, shard_samples=size, **options), rank, world)
        if busy <= set(order[: place + 1]):
            assert made
            assert {m.samples for m in made.values()} == {m.samples for m in map(loaded, made.values())}
        else:
            assert made == {}
            assert not list(output.rglob("manifest.json"))
    assert contents(output) == wanted


def loaded(made: Manifest) -> Manifest:
    again = manifest.load(made.folder)
    assert again == made
    again.check(full=True)
    return again


def test_each_process_writes_its_share_and_no_more(source: Path, tmp_path: Path):
    """Eight shards and three processes: every third is one's own."""
    written = set()
    for rank in (1, 2):
        assert convert(told(source, tmp_path / "out", shard_samples=2), rank, 3) == {}
        tars = {int(path.stem) for path in (tmp_path / "out").glob("*.tar")}
        assert tars - written == set(range(rank, 8, 3))
        written = tars


class PowerCut(Exception):
    """The end of a machine."""


def dies_at(number: int) -> Callable[..., Any]:
    """`write_shard` on a machine that dies in the middle of a shard; forked workers know it as it is."""

    def write(job: Any, shard: int, *rest: Any) -> Any:
        if shard == number:
            (job.target.folder / f".{shard:06d}.tar.tmp-{socket.gethostname()}-1").write_bytes(b"half")
            raise PowerCut
        return shards_write(job, shard, *rest)

    return write


shards_write = shards.write_shard


@contextmanager
def on(monkeypatch: pytest.MonkeyPatch, host: str, dying: int | None = None) -> Iterator[None]:
    """This process is one on that machine."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: host)
        if dying is not None:
            patch.setattr(shards, "write_shard", dies_at(dying))
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written by this process itself."""

    def do(pieces: list[Any], count: int, work: Callable[..., Any], arguments: Callable[..., Any], *rest: Any) -> Any:
        del count, rest
        for piece in pieces:
            yield piece, work(*arguments(piece))

    monkeypatch.setattr(shards, "do", do)
    monkeypatch.setattr(duplicates, "do", do)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "replaced_by", [[(1, 3)], [(0, 1)], [(3, 4), (0, 4), (1, 4)]], ids=["one like it", "one for all", "another launch"]
)
def test_a_machine_that_died_is_replaced_by_any_other(
    source: Path,
    tmp_path: Path,
    wholes: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    replaced_by: list[tuple[int, int]],
):
    """What it left half is made anew, and its drafts, though of another machine, are cleared away in the end."""
    options = told(source, tmp_path / "out", shard_samples=2, **SPLIT)
    with on(monkeypatch, "one", dying=1), pytest.raises(PowerCut):
        convert(options, 1, 3)
    with on(monkeypatch, "two"):
        assert convert(options, 0, 3) == {}
    with on(monkeypatch, "three"):
        assert convert(options, 2, 3) == {}
    assert not list((tmp_path / "out").rglob("manifest.json"))
    assert list((tmp_path / "out").rglob(".*.tmp-one-*"))
    with on(monkeypatch, "four"):
        *others, made = [convert(options, rank, world) for rank, world in replaced_by]
    assert not any(others)
    assert set(made) == {"train", "val"}
    assert contents(tmp_path / "out") == wholes(shard_samples=2, **SPLIT)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("lost", ["json", "sha256"])
def test_a_shard_of_which_a_note_is_missing_is_not_done(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]], lost: str
):
    """Its process died between the two, or the power was cut before they were on the disk."""
    options = told(source, tmp_path / "out", shard_samples=4)
    assert convert(options, 1, 2) == {}
    (tmp_path / "out" / shards.NOTES / f"000001.{lost}").unlink()
    assert convert(options, 0, 2) == {}
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert convert(options, 1, 2)[""].samples == 14
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


@pytest.mark.usefixtures("in_process")
def test_a_process_that_comes_late_finds_the_work_done(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]]
):
    options = told(source, tmp_path / "out", shard_samples=4)
    made = convert(options)
    for rank in range(2):
        assert convert(options, rank, 2) == made
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


def test_a_launcher_starts_processes_of_one_conversion(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]]
):
    """torchrun, the real one: both ranks end well, one of them with the sum."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [f"input={source}", f"output={tmp_path / 'out'}", "shard_samples=2", "val_fraction=0.4", "quiet=true"]
    ended = subprocess.run(
        [*command, "tools/make_shards.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "out") == wholes(shard_samples=2, **SPLIT)
    said = ended.stdout.splitlines()
    assert sum("its shards are done" in line for line in said) <= 1
    assert any(line.startswith(f"{tmp_path / 'out' / 'val'}: ") and "rejected" in line for line in said) or any(
        line.startswith(f"{tmp_path / 'out' / 'train'}: ") and "rejected" in line for line in said
    )


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command line in this process: its exit code."""
    path = ROOT / "tools" / "make_shards.py"
    scope: dict[str, Any] = {"__name__": "tool"}
    exec(compile(path.read_text(), path, "exec"), scope)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(SystemExit) as caught:
        exits.run(scope["main"])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_torchrun_and_srun_tell_a_process_its_number(
    source: Path,
    tmp_path: Path,
    wholes: Callable[..., dict[str, bytes]],
    names: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    for rank, says in (("1", "process 1 of 2: its shards are done"), ("0", "14 samples, 3 classes, 4 shards")):
        monkeypatch.setenv(names[0], rank)
        monkeypatch.setenv(names[1], "2")
        words = [f"input={source}", f"output={tmp_path / 'out'}", "shard_samples=4", "workers=1", "quiet=true"]
        assert run_tool(monkeypatch, *words) == 0
        assert says in capsys.readouterr().out
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


def begun(options: MakeShards, prepare: Callable[[], None] = lambda: None) -> int:
    """A process group of its own that converts; no interpreter is started for it. Returns its id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgid(0, 0)
            prepare()
            convert(options)
            code = 0
        finally:
            os._exit(code)
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(child, child)  # here too: whoever comes first
    return child


def ended(child: int) -> int:
    """Wait for a process: its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int) -> bool:
    """Kill a process and all it started, unless it has ended well before."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        assert status == 0
        return False
    os.killpg(child, signal.SIGKILL)
    code = ended(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_twenty_times_at_random_it_goes_on_to_the_same_bytes(tmp_path: Path):
    """The main process and its two workers at once; where it ends before it is killed, the next output is begun."""
    source = write_pictures(tmp_path / "in", [f"{i % 3}/{i}.png" for i in range(80)], height=3, width=3)
    for name in ("0/bad.png", "1/bad.jpg"):
        (source / name).write_bytes(b"no image")
    make(source, tmp_path / "whole", shard_samples=1)
    wanted = contents(tmp_path / "whole")
    draw, kills, outputs = random.Random(7), 0, 1
    while kills < 20:
        output = tmp_path / f"out{outputs}"
        child = begun(told(source, output, shard_samples=1, workers=2))
        goal = len([*output.glob("*.tar")]) + draw.randint(0, 12)  # a place, not a time: machines differ in speed
        while len([*output.glob("*.tar")]) < goal and not (output / "manifest.json").exists():
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.003))
        if killed(child):
            kills += 1
        else:
            assert contents(output) == wanted
            outputs += 1
    output = tmp_path / f"out{outputs}"
    make(source, output, shard_samples=1, workers=2)
    assert contents(output) == wanted
    assert outputs <= 12  # the kills came within the work, not behind it


def kills_itself_at(step: int, count: Any) -> Callable[[], None]:
    """Every change of a name on the disk is a step; at one of them, the whole process group dies before it is done."""

    def prepare() -> None:
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, deadly(getattr(os, name), step, count))

    return prepare


def deadly(operation: Callable[..., Any], step: int, count: Any) -> Callable[..., Any]:
    def wrapped(path: Any, *rest: Any, **options: Any) -> Any:
        vain = operation.__name__ == "unlink" and not options.get("dir_fd") and not os.path.lexists(path)
        if not vain:
            with count.get_lock():
                count.value += 1
                if count.value == step:
                    os.killpg(os.getpgrp(), signal.SIGKILL)
                    time.sleep(60)
        return operation(path, *rest, **options)

    return wrapped


KILLED: dict[str, dict[str, Any]] = {
    "plain": {"shard_samples": 8},
    "splits": {"shard_samples": 100, **SPLIT},
    "exclude": {"shard_samples": 100},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("case", KILLED)
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    """Before each renaming and each deletion, from the first folder to the last note, by one process."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of use only where the power is cut
    options = dict(KILLED[case])
    if case == "exclude":
        one(write_pictures(tmp_path / "test-in", ["c/5.png", "x.png"], height=4), tmp_path / "test")
        options["exclude"] = (str(tmp_path / "test"),)
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    assert ended(begun(told(source, tmp_path / "whole", **options), kills_itself_at(0, count))) == 0
    steps, wanted, differ = count.value, contents(tmp_path / "whole"), []
    assert steps > 12
    for step in range(1, steps + 1):
        output = tmp_path / "out"
        dying = kills_itself_at(step, context.Value("i", 0))  # a new one: who is killed holds its lock
        assert ended(begun(told(source, output, **options), dying)) == -signal.SIGKILL
        try:
            convert(told(source, output, **options))
        except exits.Refusal as refusal:
            differ.append((step, str(refusal)))
        found = contents(output)
        names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        differ += [(step, names)] if names else []
        shutil.rmtree(output)
    assert differ == []


def at_the_same_time(monkeypatch: pytest.MonkeyPatch, draft: str, other: Callable[[], Any]) -> list[Any]:
    """When this process has a draft of that name in hand, the other does its work; returns what that gave."""
    plain, answers = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if not answers and f"/.{draft}.tmp-" in str(source):
            answers.append(None)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)  # it is another process
                answers[0] = other()
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return answers


@pytest.mark.usefixtures("in_process")
def test_two_that_end_together_count_the_same_duplicates(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
):
    """Both see all notes there; the one publishes and clears the notes before the other has looked for duplicates."""
    options = told(source, tmp_path / "out", shard_samples=4)
    assert convert(options, 0, 2) == {}
    plain, calls = shards._duplicates, []

    def slow(*arguments: Any) -> Any:
        calls.append(True)
        if len(calls) == 1:
            assert convert(options, 0, 2)[""].job["duplicates"] == 2
        return plain(*arguments)

    monkeypatch.setattr(shards, "_duplicates", slow)
    assert convert(options, 1, 2)[""].job["duplicates"] == 2
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("draft", ["sizes.json", "manifest.json"])
def test_two_that_publish_together_do_not_trip_each_other(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, draft: str
):
    options = told(source, tmp_path / "out", shard_samples=4)
    assert convert(options, 0, 2) == {}
    answers = at_the_same_time(monkeypatch, draft, lambda: convert(options, 0, 2))
    assert convert(options, 1, 2)[""].samples == 14
    assert answers[0][""].samples == 14
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "draft",
    [
        "000001.tar",
        "000001.npy",
        *(note for note in ("000001.sha256", "000001.json")),
    ],
)
def test_a_slow_machine_that_was_replaced_ends_well(
    source: Path, tmp_path: Path, wholes: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, draft: str
):
    """Taken for dead, it is in the middle of a shard when its replacement ends the whole conversion."""
    options = told(source, tmp_path / "out", shard_samples=4)
    assert convert(options, 0, 2) == {}
    answers = at_the_same_time(monkeypatch, draft, lambda: convert(options, 1, 2))
    assert convert(options, 1, 2)[""].samples == 14
    assert answers[0][""].samples == 14
    assert contents(tmp_path / "out") == wholes(shard_samples=4)
