"""Conversion by many processes and machines, dying as they please: the bytes are those of one that nothing befell."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.convert import make_shards
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.data import manifest
from ssl_vit.data.manifest import Manifest
from tests.data.pictures import build_shards, build_splits, contents, write_pictures
from tests.processes import TOOLS, Start, call_tool

pytestmark = [
    pytest.mark.usefixtures("in_process"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # forks beside threads, Python 3.12
]
PROCESS = pytest.mark.process
SPLIT = {"val_fraction": 0.4}
DRAFTS = {"sizes.json": 0, "manifest.json": 0} | {f"000001.{kind}": 1 for kind in ("tar", "npy", "sha256", "json")}
ENDS: list[Any] = [(signal.SIGTERM, "main"), (signal.SIGKILL, "main")]
ENDS += [pytest.param(signal.SIGINT, "main", marks=PROCESS), pytest.param(signal.SIGKILL, "all", marks=PROCESS)]
REPLACED = {"one like it": [(1, 3)], "one for all": [(0, 1)], "another launch": [(3, 4), (0, 4), (1, 4)]}
Work = Callable[[int], dict[str, Manifest]]
Wholes = Callable[..., dict[str, bytes]]
"""The files of an unbroken conversion by one process, by its options."""


def make_config(source: Path, output: Path, **options: Any) -> MakeShards:
    return MakeShards(input=str(source), output=str(output), **{"workers": 1, "quiet": True} | options)


def write_bad_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no image")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 small images of three classes, some equal, and two files that are none."""
    folder = write_pictures(tmp_path_factory.mktemp("in"), [f"{'abc'[i % 3]}/{i}.png" for i in range(12)], height=4)
    for i in (0, 5):
        shutil.copy(folder / "abc"[i % 3] / f"{i}.png", folder / "a" / f"again {i}.png")
    write_bad_images(folder, "a/bad.png", "b/bad.jpg")
    return folder


@pytest.fixture(scope="module")
def wholes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    @cache
    def convert(**options: Any) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("whole")
        build_splits(source, folder, **options)
        return contents(folder)

    return convert


@settings(max_examples=14)
@given(
    st.integers(1, 5).flatmap(lambda world: st.permutations(range(world))),
    st.sampled_from([2, 3, 5, 100]),
    st.sampled_from([{}, SPLIT]),
)
def test_any_number_of_processes_in_any_order_write_the_same_bytes(
    source: Path, wholes: Wholes, tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int, options: dict
):
    """Also more of them than shards; who ends last writes the manifest, and nobody before."""
    output, world = tmp_path_factory.mktemp("out"), len(order)
    expected = wholes(shard_samples=size, **options)
    parts = Counter(name.rpartition("/")[0] for name in expected if name.endswith(".tar"))
    busy = set(range(min(world, max(parts.values()))))  # by the shards of the largest split
    for position, rank in enumerate(order):
        manifests = convert_images(make_config(source, output, shard_samples=size, **options), rank, world)
        assert bool(manifests) == bool(list(output.rglob("manifest.json"))) == (busy <= set(order[: position + 1]))
        for dataset in manifests.values():
            assert manifest.load(dataset.folder) == dataset
            dataset.check_shards(full=True)
    assert contents(output) == expected


def test_each_process_writes_its_share_and_no_more(source: Path, tmp_path: Path):
    """Eight shards and three processes: every third is one's own."""
    earlier_tars = set()
    for rank in (1, 2):
        assert convert_images(make_config(source, tmp_path / "out", shard_samples=2), rank, 3) == {}
        tars = {int(path.stem) for path in (tmp_path / "out").glob("*.tar")}
        assert tars - earlier_tars == set(range(rank, 8, 3))
        earlier_tars = tars


class Death(BaseException):
    """The end of a process, which does nothing more: every further change of a name on the disk dies, too."""


def patch_renames(set_function: Callable[[Any, str, Any], None], reached: Callable[[str], bool]) -> None:
    """Every change of a name on the disk is a step, told to `reached`: whether the process is dead before it."""

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run_or_die(path: Any, *args: Any, **options: Any) -> Any:
            no_effect = operation.__name__ == "unlink" and not options.get("dir_fd") and not os.path.lexists(path)
            if not no_effect and reached(str(path)):
                raise Death
            return operation(path, *args, **options)

        return run_or_die

    for name in ("replace", "unlink", "rmdir", "mkdir"):
        set_function(os, name, wrap(getattr(os, name)))


@contextmanager
def other_process(host: str = "one", reached: Callable[[str], bool] = lambda path: False) -> Iterator[None]:
    """This process is another one, on that machine, and dies where `reached` says so."""
    dead = False

    def is_dead(path: str) -> bool:
        nonlocal dead
        dead = dead or reached(path)
        return dead

    with pytest.MonkeyPatch.context() as patch, suppress(Death):
        patch.setattr(socket, "gethostname", lambda: host)
        patch.setattr(os, "getpid", lambda: 99_999_999)
        patch_renames(patch.setattr, is_dead)
        yield


@pytest.mark.parametrize("by", REPLACED)
def test_a_machine_that_died_is_replaced_by_any_other(source: Path, tmp_path: Path, wholes: Wholes, by: str):
    """What it left half is made anew, and its drafts, though of another machine, are cleared away in the end."""
    output = tmp_path / "out"
    options = make_config(source, output, shard_samples=2, **SPLIT)
    with other_process("one", lambda path: "/.000001.tar." in path):
        convert_images(options, 1, 3)
        pytest.fail("it lives on")
    for host, rank in (("two", 0), ("three", 2)):
        with other_process(host):
            assert convert_images(options, rank, 3) == {}
    assert not list(output.rglob("manifest.json"))
    assert list(output.rglob(".*.tmp-one-*"))
    with other_process("four"):
        *others, manifests = [convert_images(options, rank, world) for rank, world in REPLACED[by]]
        assert not any(others)
        assert set(manifests) == {"train", "val"}
    assert contents(output) == wholes(shard_samples=2, **SPLIT)


@pytest.fixture
def work(source: Path, tmp_path: Path, wholes: Wholes) -> Iterator[Work]:
    """A conversion into four shards, tmp_path/out, by two processes of these ranks; in the end it has its bytes."""
    options = make_config(source, tmp_path / "out", shard_samples=4)
    yield lambda rank: convert_images(options, rank, 2)
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


@pytest.mark.parametrize("lost", ["json", "sha256"])
def test_a_shard_of_which_a_note_is_missing_is_not_done(work: Work, tmp_path: Path, lost: str):
    """Its process died between the two, or the power was cut before they were there; a late one finds all done."""
    assert work(1) == {}
    (tmp_path / "out" / make_shards.SHARD_STATE_DIR / f"000001.{lost}").unlink()
    assert work(0) == {}
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifests = work(1)
    assert manifests[""].samples == 14
    assert [work(0), work(1)] == [manifests, manifests]


def test_two_that_end_together_count_the_same_duplicates(work: Work, monkeypatch: pytest.MonkeyPatch):
    """Both see all notes there; the one publishes and clears the notes before the other has looked for duplicates."""
    assert work(0) == {}
    find_duplicates, calls = make_shards._find_duplicates, []

    def slow(*arguments: Any) -> Any:
        calls.append(True)
        if len(calls) == 1:
            assert work(0)[""].job["duplicates"] == 2
        return find_duplicates(*arguments)

    monkeypatch.setattr(make_shards, "_find_duplicates", slow)
    assert work(1)[""].job["duplicates"] == 2


@pytest.mark.parametrize(("draft", "other"), DRAFTS.items())
def test_two_that_do_the_same_work_do_not_trip_each_other(work: Work, draft: str, other: int):
    """Two that publish together; and one, taken for dead, in mid-shard when its replacement ends the whole job."""
    assert work(0) == {}
    results: list[dict[str, Manifest]] = []

    def meanwhile(path: str) -> bool:
        if not results and f"/.{draft}.tmp-" in path:
            results.append({})
            with other_process("two"):
                results[0] = work(other)
        return False

    with other_process("one", meanwhile):
        results.append(work(1))
    assert [result[""].samples for result in results] == [14, 14]


@pytest.mark.process
@pytest.mark.ranks
def test_a_launcher_starts_processes_of_one_conversion(source: Path, tmp_path: Path, wholes: Wholes):
    """torchrun, the real one: both ranks end well, one of them with the sum."""
    output = tmp_path / "out"
    args = [f"input={source}", f"output={output}", "shard_samples=2", "val_fraction=0.4", "quiet=true"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*launcher, str(TOOLS / "make_shards.py"), *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(output) == wholes(shard_samples=2, **SPLIT)
    lines = result.stdout.splitlines()
    assert sum("its shards are done" in line for line in lines) <= 1
    assert any(line.startswith((f"{output}/train: ", f"{output}/val: ")) and "rejected" in line for line in lines)


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_a_launcher_tells_a_process_its_number(source: Path, tmp_path: Path, wholes: Wholes, names: tuple[str, str]):
    args = [f"input={source}", f"output={tmp_path / 'out'}", "shard_samples=4", "workers=1", "quiet=true"]
    for rank, says in (("1", "process 1 of 2: its shards are done"), ("0", "14 samples, 3 classes, 4 shards")):
        result = call_tool("make_shards", args, **{names[0]: rank, names[1]: "2"})
        assert result.code == 0
        assert says in result.output
    assert contents(tmp_path / "out") == wholes(shard_samples=4)


def start_conversion(source: Path, output: Path, logs: Path, workers: int = 2) -> Start:
    """The tool as a process of its own, a shard an image."""
    args = [f"input={source}", f"output={output}", "shard_samples=1", f"workers={workers}", "quiet=true"]
    return Start(args, logs, tool="make_shards")


@pytest.mark.parametrize(("number", "whom"), ENDS)
def test_ended_in_mid_work_it_leaves_no_worker_and_goes_on(tmp_path: Path, number: signal.Signals, whom: str):
    source = write_pictures(tmp_path / "in", [f"c/{i:03d}.png" for i in range(150)], height=4, width=4)
    output = tmp_path / "out"
    start = start_conversion(source, output, tmp_path / "logs")
    start.wait_until(lambda: len(list(output.glob("*.tar"))) >= 10)
    start.kill() if whom == "all" else start.signal(number)
    assert start.wait(20) == [-9 if number == signal.SIGKILL else 75]
    assert start.orphans == []
    assert len(list(output.glob("*.tar"))) < 150
    assert not (output / "manifest.json").exists()
    build_splits(source, output, shard_samples=1)
    build_splits(source, tmp_path / "whole", shard_samples=1)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.process
def test_two_conversions_at_once_share_the_work(tmp_path: Path):
    source = write_pictures(tmp_path / "in", [f"{i:03d}.png" for i in range(40)])
    starts = [start_conversion(source, tmp_path / "out", tmp_path / "logs", workers=1) for _ in range(2)]
    assert [start.wait() for start in starts] == [[0], [0]], [start.output() for start in starts]
    assert manifest.load(tmp_path / "out").samples == 40


def convert_in_child(options: MakeShards, prepare: Callable[[], None]) -> int:
    """The exit code of a process group of its own that converts, negative where a signal ended it.

    No interpreter is started for it.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setpgid(0, 0)
            prepare()
            convert_images(options)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_group_at(step: int) -> Callable[[], None]:
    """All processes of a group are killed at a step, which they count together."""
    count = multiprocessing.get_context("fork").Value("i", 0)

    def reached(path: str) -> bool:
        del path
        with count.get_lock():
            count.value += 1
            if count.value == step:
                os.killpg(os.getpgrp(), signal.SIGKILL)
                signal.pause()
        return False

    return lambda: patch_renames(setattr, reached)


@pytest.mark.parametrize("kills", [pytest.param(20, marks=PROCESS), pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_places_it_goes_on_to_the_same_bytes(tmp_path: Path, kills: int):
    """The main process and its two workers at once; where it ends before it is killed, the next output is begun."""
    source = write_pictures(tmp_path / "in", [f"{i % 3}/{i}.png" for i in range(80)], height=3, width=3)
    write_bad_images(source, "0/bad.png", "1/bad.jpg")
    build_splits(source, tmp_path / "whole", shard_samples=1)
    expected, rng, outputs, num_killed = contents(tmp_path / "whole"), random.Random(7), 1, 0
    while num_killed < kills:
        output = tmp_path / f"out{outputs}"
        code = convert_in_child(
            make_config(source, output, shard_samples=1, workers=2), kill_group_at(rng.randint(1, 120))
        )
        assert code in (0, -signal.SIGKILL)
        assert code or contents(output) == expected
        num_killed, outputs = num_killed + (code != 0), outputs + (code == 0)
    output = tmp_path / f"out{outputs}"
    build_splits(source, output, shard_samples=1, workers=2)
    assert contents(output) == expected
    assert outputs <= 12 * kills / 20  # the kills came within the work, not behind it
    print(f"\n{kills} kills over {outputs} conversions: 0 differing bytes")


def die_in_process(options: MakeShards, step: int) -> int:
    """Have a conversion in this process, as another one, die at a step; returns how many there were."""
    steps: list[str] = []
    with other_process(reached=lambda path: steps.append(path) or len(steps) == step):
        convert_images(options)
    return len(steps)


def die_in_child(options: MakeShards, step: int) -> int:
    """The same of a real process."""
    assert convert_in_child(options, kill_group_at(step)) == -signal.SIGKILL
    return step


@pytest.mark.parametrize("die", [die_in_process, pytest.param(die_in_child, marks=PROCESS)])
@pytest.mark.parametrize("case", [{"shard_samples": 8}, SPLIT, {"exclude": True}], ids=["plain", "splits", "exclude"])
def test_killed_at_every_step_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, case: dict, die: Callable[[MakeShards, int], int], monkeypatch: pytest.MonkeyPatch
):
    """Before each renaming and each deletion, from the first folder to the last note, by one process."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # of use only where the power is cut
    options = {"shard_samples": 100} | case
    if "exclude" in case:
        build_shards(write_pictures(tmp_path / "test-in", ["c/5.png", "x.png"], height=4), tmp_path / "test")
        options["exclude"] = (str(tmp_path / "test"),)
    steps = die_in_process(make_config(source, tmp_path / "whole", **options), 0)
    expected, output = contents(tmp_path / "whole"), tmp_path / "out"
    assert steps > 12
    for step in range(1, steps + 1):
        assert die(make_config(source, output, **options), step) == step
        convert_images(make_config(source, output, **options))
        assert contents(output) == expected, step
        shutil.rmtree(output)
