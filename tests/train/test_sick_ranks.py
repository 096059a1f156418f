"""Ranks and workers that die, stop, raise, hang or starve: the right one is named, all end in time, nothing is left."""

import os
import re
import signal
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ssl_vit.exits import CANNOT_CREATE, INTERNAL, MISMATCH, USAGE
from ssl_vit.train import checkpoint
from tests import runs
from tests.odd import NOT_ALLOWED, odd_clock, short_of_memory, small_shared_memory
from tests.starts import Start, free_port

HOST = socket.gethostname()
GONE = 15.0  # seconds until the others have ended when a rank is gone
SLACK = 5.0  # seconds beyond `timeout` until all have ended when a rank hangs
TIMEOUT = 3
DEATHS = 30
KILLED = -signal.SIGKILL

BIG = ["data.image_size=128", "encoder.mlp=16384", "batch=64"]  # an activation of 4 GiB
STARTS: dict[str, dict[str, Any]] = {
    "killed after an update": {"world": 2, "fault": "kill:point=update:rank=1:step=9"},
    "killed as rank 0": {"world": 2, "fault": "kill:point=update:rank=0:step=9"},
    "killed in an evaluation": {"world": 2, "fault": "kill:point=eval.batch:rank=1:step=10"},
    "killed at the start": {"world": 2, "fault": "kill:point=resume.chosen:rank=1"},
    "killed while rank 0 hangs": {
        "world": 2,
        "fault": "kill:point=save.begin:rank=1:step=14,hang:point=save.mid:step=14",
    },
    "killed in the export": {"world": 2, "fault": "kill:point=finish:rank=0"},
    "raises": {"world": 2, "fault": "raise:point=update:rank=1:step=9"},
    "raises as rank 0": {"world": 2, "fault": "raise:point=loss:rank=0:step=9"},
    "raises at the start": {"world": 2, "fault": "raise:point=resume.chosen:rank=1"},
    "hangs": {"world": 2, "fault": "hang:point=batch:rank=1:step=9", "words": [f"timeout={TIMEOUT}"]},
    "hangs as rank 0": {"world": 2, "fault": "hang:point=save.mid:rank=0:step=14", "words": [f"timeout={TIMEOUT}"]},
    "out of memory": {"world": 1, "fault": "oom:point=loss:step=9"},
    "out of memory on a rank": {"world": 2, "fault": "oom:point=loss:rank=1:step=9"},
    "really out of memory": {"world": 1, "words": BIG, "prepare": short_of_memory},
    "another recipe": {"world": 2, "alone": {1: ["optim.lr=0.5"]}},
    "worker killed": {"world": 1, "fault": "kill:point=sample:step=9"},
    "worker aborts": {"world": 1, "fault": "abort:point=sample:step=9"},
    "worker stopped": {"world": 1, "fault": "stop:point=sample:step=9", "words": [f"data.timeout={TIMEOUT}"]},
    "worker hangs": {"world": 1, "fault": "hang:point=sample:step=9", "words": [f"data.timeout={TIMEOUT}"]},
    "worker of rank 1 killed": {"world": 2, "fault": "kill:point=sample:rank=1:step=9-99"},
}


class Ended:
    """A start that has ended."""

    def __init__(self, shards: Path, folder: Path, world: int, words: tuple[str, ...] = (), **options: Any):
        self.run = folder / "run"
        self.start = Start(runs.words(shards, self.run, *words), folder / "logs", world, **options)
        self.codes = self.start.wait(90)

    def lines(self, rank: int) -> list[str]:
        """What a rank said, but for the drill's announcement and what torch's C++ parts have to say."""
        noise = (
            "SSL_VIT_FAULT=",
            "[rank",
            "[W",
            "[E",
            "Exception raised from",
            "frame #",
            "<omitting",
            "terminate called",
        )
        return [line for line in self.start.said(rank).splitlines() if line and not line.startswith(noise)]

    def intact(self, step: int) -> None:
        """The last checkpoint before the fault is there and whole, and nothing that runs is left."""
        assert self.start.orphans == []
        assert runs.saved(self.run)[-1:] == ([step] if step else [])
        assert not step or checkpoint.flaw(runs.last(self.run)) is None


@pytest.fixture(scope="module")
def ended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each start of STARTS ended; three at a time, since most only wait."""
    folder = tmp_path_factory.mktemp("sick")
    with ThreadPoolExecutor(3) as pool:
        pending = {
            name: pool.submit(Ended, shards, folder / name.replace(" ", "_"), **options)
            for name, options in STARTS.items()
        }
        return {name: future.result() for name, future in pending.items()}


@pytest.mark.parametrize(
    ("name", "victim", "step"),
    [
        ("killed after an update", 1, 7),
        ("killed as rank 0", 0, 7),
        ("killed in an evaluation", 1, 7),
        ("killed at the start", 1, 0),
        ("killed while rank 0 hangs", 1, 7),
        ("killed in the export", 0, 30),
    ],
)
def test_a_killed_rank_is_named_in_time(ended: dict[str, Ended], name: str, victim: int, step: int):
    """By one line of the other, whatever that one hangs in."""
    end, other = ended[name], 1 - victim
    assert end.codes[victim] == KILLED
    assert end.codes[other] == INTERNAL, end.start.said()
    assert end.start.ended[other] - end.start.ended[victim] < GONE
    assert f"rank {victim} on {HOST}" in end.lines(other)[-1]
    assert "is gone" in end.lines(other)[-1]
    assert len(end.lines(other)) == 1, end.start.said()
    told = runs.told(end.run)
    assert told["code"] == INTERNAL
    assert f"rank {victim} on {HOST}" in told["reason"]
    end.intact(step)


@pytest.mark.parametrize(
    ("name", "victim", "step"), [("raises", 1, 7), ("raises as rank 0", 0, 7), ("raises at the start", 1, 0)]
)
def test_the_traceback_of_a_rank_that_raises_is_all_that_is_said(
    ended: dict[str, Ended], name: str, victim: int, step: int
):
    end, other = ended[name], 1 - victim
    assert end.codes == [INTERNAL, INTERNAL], end.start.said()
    assert max(end.start.ended.values()) - min(end.start.ended.values()) < GONE
    assert end.lines(other) == []
    assert "Traceback (most recent call last):" in end.lines(victim)[0]
    assert "injected" in end.lines(victim)[-1]
    assert (runs.told(end.run)["code"], runs.told(end.run)["rank"]) == (INTERNAL, victim)
    end.intact(step)


@pytest.mark.parametrize(
    ("name", "victim", "place"),
    [
        ("hangs", 1, "step 8"),
        ("hangs as rank 0", 0, "the checkpoint of step 14"),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_place(ended: dict[str, Ended], name: str, victim: int, place: str):
    """All show their stacks, that of the hanging one too, and end."""
    end, other = ended[name], 1 - victim
    assert end.codes == [INTERNAL, INTERNAL], end.start.said()
    assert f"rank {victim} on {HOST} is still at {place}" in end.lines(other)[-1]
    for rank in range(2):
        assert "most recent call first" in end.start.said(rank)
    assert "inject.py" in end.start.said(victim)
    assert abs(end.start.ended[0] - end.start.ended[1]) < SLACK
    end.intact(7)


def test_a_stopped_rank_is_named_and_ended(shards: Path, tmp_path: Path):
    """Within timeout + 5 s, and it does not stay behind: the other rank kills it where it is on its own machine."""
    starts = {}
    for victim in range(2):
        run = tmp_path / f"{victim}"
        words = runs.words(shards, run, "steps=100000", "save_every=100000", f"timeout={TIMEOUT}")
        start = Start(words, tmp_path / "logs", 2)
        start.until(lambda run=run: (run / "metrics.jsonl").exists() and len(runs.rows(run)) > 2)
        start.signal(signal.SIGSTOP, victim)
        starts[victim] = start, run, time.monotonic()
    for victim, (start, run, stopped) in starts.items():
        other = 1 - victim
        codes = start.wait()
        assert codes[other] == INTERNAL, start.said()
        assert codes[victim] == KILLED
        assert start.ended[other] - stopped < TIMEOUT + SLACK
        assert "most recent call first" in start.said(other)
        assert f"rank {victim} on {HOST}" in start.said(other).splitlines()[-1]
        assert runs.told(run)["code"] == INTERNAL
        assert f"rank {victim} on {HOST}" in runs.told(run)["reason"]
        assert start.orphans == []


@pytest.mark.parametrize(
    ("name", "rank"), [("out of memory", 0), ("out of memory on a rank", 1), ("really out of memory", 0)]
)
def test_out_of_memory_says_what_to_change(ended: dict[str, Ended], name: str, rank: int):
    """With values: a smaller micro batch that divides the share of a rank."""
    end, said = ended[name], ended[name].start.said(rank)
    share = (64 if "really" in name else 8) // len(end.codes)
    micro = min([int(number) for number in re.findall(r"micro_batch=(\d+)", said)] or [share])
    assert set(end.codes) == {INTERNAL}, end.start.said()
    assert micro < share
    assert share % micro == 0
    for text in ("out of memory", "batch", "activation_checkpointing=true", "images of", "peak"):
        assert text in said.lower(), said
    end.intact(0 if "really" in name else 7)
    if len(end.codes) == 2:
        assert end.lines(1 - rank) == []


@pytest.mark.parametrize(
    ("name", "rank"), [(name, int("rank 1" in name)) for name in STARTS if name.startswith("worker")]
)
def test_a_sick_worker_is_named_with_its_sample(ended: dict[str, Ended], name: str, rank: int):
    end = ended[name]
    assert set(end.codes) == {INTERNAL}, end.start.said()
    line = end.lines(rank)[-1]
    assert "worker 0" in line
    assert "/train/00000" in line
    assert "sample" in line
    assert end.start.said().count("worker 0") == 1, end.start.said()
    if len(end.codes) == 2:
        assert end.lines(1 - rank) == []
    assert (runs.told(end.run)["code"], runs.told(end.run)["rank"]) == (INTERNAL, rank)
    assert end.start.orphans == []


def test_a_worker_that_stops_after_its_work(shards: Path, tmp_path: Path):
    """Its batches are in the queue, but it would have to hand over their memory itself."""
    run = tmp_path / "run"
    fault = "sleep:point=batch:step=5:seconds=1.5"
    start = Start(runs.words(shards, run, f"data.timeout={TIMEOUT}"), tmp_path / "logs", 1, fault)
    start.until(lambda: (run / "metrics.jsonl").exists() and bool(runs.rows(run)))
    time.sleep(0.5)  # it has made all batches that it may make ahead
    for worker in start.workers():
        os.kill(worker, signal.SIGSTOP)
    assert start.wait(30) == [INTERNAL], start.said()
    assert "worker 0" in start.said().splitlines()[-1]
    assert start.orphans == []


def test_what_a_fault_leaves_is_resumed(ended: dict[str, Ended], shards: Path, tiny_run: Callable[[int], Path]):
    """The same command again gives the bits of a run that nothing happened to."""
    for name in ("killed while rank 0 hangs", "worker aborts"):
        run, world = ended[name].run, len(ended[name].codes)
        again = Start(runs.words(shards, run), run.parent / "logs", world)
        assert again.wait() == [0] * world, again.said()
        assert runs.differing(runs.results(tiny_run(world)), runs.results(run)) == {}, name


def test_another_recipe_on_a_rank_is_refused(ended: dict[str, Ended]):
    """Once, by rank 0, with the rank and the key."""
    end = ended["another recipe"]
    assert end.codes == [MISMATCH, MISMATCH], end.start.said()
    assert f"rank 1 on {HOST} was given another recipe than rank 0: optim.lr: 0.001 -> 0.5" in end.lines(0)[-1]
    assert len(end.lines(0) + end.lines(1)) == 1
    assert not (end.run / "checkpoints").exists()


def test_ranks_with_uneven_shards_take_equal_steps(shards: Path, tiny_run: Callable[[int], Path]):
    """25 samples in shards of 7 on two ranks: the batches are those of one rank, and nobody waits for ever."""
    digests = [[row["samples_digest"] for row in runs.rows(tiny_run(world))] for world in (1, 2)]
    assert digests[0] == digests[1]
    assert [runs.lost_samples(tiny_run(world), shards) for world in (1, 2)] == [0, 0]


def test_a_port_in_use_is_named(shards: Path, tmp_path: Path):
    """By rank 0 with the number, at once; the other rank learns nothing there and ends by itself."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        words = runs.words(shards, tmp_path / "run", f"timeout={TIMEOUT}")
        start = Start(words, tmp_path / "logs", 2, MASTER_PORT=str(port))
        start.until(lambda: "cannot be had" in start.said(0), 30)
        assert f"rank 0: port {port} of this machine cannot be had" in start.said(0)
        start.kill()
        assert start.wait()[0] in (USAGE, KILLED)


def test_two_starts_on_one_folder(shards: Path, tmp_path: Path):
    """The second is refused at once and touches nothing; a kill -9 of the first frees the folder."""
    run = tmp_path / "run"
    first = Start(runs.words(shards, run, "steps=100000"), tmp_path / "logs", 2)
    first.until(lambda: bool(runs.saved(run)))
    for world in (1, 2):
        second = Start(runs.words(shards, run, "steps=100000"), tmp_path / "logs", world)
        assert second.wait() == [CANNOT_CREATE] * world, second.said()
        assert second.ended[0] - second.began < 2
        for text in (f"in use by pid {first.processes[0].pid} ", f" on {HOST}", " since "):
            assert text in second.said(0)
        assert not (run / "exit.json").exists()
    assert first.running
    first.kill()
    assert first.wait() == [KILLED] * 2
    third = Start(runs.words(shards, run, "steps=100000"), tmp_path / "logs", 2)
    step = runs.saved(run)[-1]
    third.until(lambda: runs.saved(run)[-1] > step)
    third.kill()
    third.wait()


def test_a_clock_that_jumps_has_no_effect(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path):
    """An hour back, then a year ahead; nor do times of files: the newest checkpoint is that of the highest step."""
    run = tmp_path / "run"
    stopped = Start(
        runs.words(shards, run), tmp_path / "logs", 2, "kill:point=update:step=20", prepare=odd_clock, JUMP="-3600"
    )
    assert KILLED in stopped.wait()
    for age, folder in enumerate(checkpoint.steps(run / "checkpoints")):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 - age, 1e9 - age))
    again = Start(runs.words(shards, run), tmp_path / "logs", 2, prepare=odd_clock, JUMP="31536000")
    assert again.wait() == [0, 0], again.said()
    assert runs.differing(runs.results(tiny_run(2)), runs.results(run)) == {}


@pytest.mark.parametrize("batch", [16, 3])
def test_a_small_shared_memory_is_explained(shards: Path, tmp_path: Path, batch: int):
    """A container's /dev/shm holds 64 MB; this one 1 MB: not for one batch of 16, nor for all of 3 at once."""
    words = runs.words(
        shards, tmp_path / "run", "data.image_size=224", "encoder.patch=56", "data.timeout=5", f"batch={batch}"
    )
    start = Start(words, tmp_path / "logs", prepare=small_shared_memory)
    codes = start.wait()
    if codes == [NOT_ALLOWED]:
        pytest.skip("unshare(2) is not allowed here")
    assert codes == [INTERNAL], start.said()
    line = start.said().splitlines()[-1]
    assert "--shm-size" in line
    assert "data.workers=0" in line
    assert start.orphans == []


@pytest.mark.long
def test_deaths_at_random_times(shards: Path, tmp_path: Path):
    """30 times one of two ranks is killed: the other one names it in time, and in the end no bit differs."""
    random, more = Random(0), ("steps=3000", "save_every=50", "log_every=50", "eval_every=200")
    run, noticed = tmp_path / "run", []
    for number in range(DEATHS):
        start = Start(runs.words(shards, run, *more), tmp_path / "logs", 2)
        holder = f"pid {start.processes[0].pid} "
        start.until(lambda holder=holder: (run / ".lock").exists() and holder in (run / ".lock").read_text())
        wait, victim = random.uniform(0, 1.2), random.randrange(2)
        time.sleep(wait)
        start.signal(signal.SIGKILL, victim)
        codes = start.wait()
        said = f"death {number}, rank {victim} {wait:.3f} s after the start: {codes} {start.said()}"
        assert codes[victim] == KILLED, said
        assert codes[1 - victim] == INTERNAL, said
        assert f"rank {victim} on {HOST}" in start.said(1 - victim), said
        assert "is gone" in start.said(1 - victim), said
        assert start.orphans == [], said
        noticed.append(start.ended[1 - victim] - start.ended[victim])
        assert noticed[-1] < GONE, said
    assert Start(runs.words(shards, run, *more), tmp_path / "logs", 2).wait(600) == [0, 0]
    assert runs.differing(runs.results(runs.straight(shards, 2, tmp_path / "straight", *more)), runs.results(run)) == {}
    print(
        f"\n{DEATHS} deaths: noticed after {statistics.median(noticed):.2f} s in the median, {max(noticed):.2f} at most"
    )
