"""Ranks and workers that die, stop, raise, hang or starve: the right one is named, all end, nothing is left behind."""

import os
import re
import signal
import socket
import statistics
import time
from random import Random
from typing import Any

import pytest

from ssl_vit.exits import INTERNAL, MISMATCH, USAGE
from ssl_vit.train import checkpoint
from tests import runs
from tests.odd import odd_clock, short_of_memory, small_shared_memory
from tests.starts import free_port
from tests.train.scenarios import HOST, KILLED, LIMIT, Played, Scenario, Stage, each, ranks

TIMEOUT, DATA_TIMEOUT = ("timeout=3",), ("data.timeout=3",)
DEATHS = 30
LATE = 15.0  # seconds until the others have ended when a rank is gone, which the soak measures

BOTH = (INTERNAL, INTERNAL)
WORKER = r"worker 0 .*/train/00000.*sample"
ANOTHER = f"rank 1 on {HOST} was given another recipe than rank 0: optim.lr: 0.001 -> 0.5"
SHORT = "(?=.*--shm-size)(?=.*data.workers=0)"
BIG = ("data.image_size=128", "encoder.mlp=16384", "batch=64")  # an activation of 4 GiB


GONE = f"rank {{}} on {HOST}.*is gone"  # how the others name a rank that was killed


def killed(victim: int, fault: str, saved: int = 7, **more: Any) -> Scenario:
    """One of two ranks is killed, and the other one says so, whatever that one hangs in."""
    codes = (KILLED, INTERNAL) if victim == 0 else (INTERNAL, KILLED)
    return Scenario(codes, fault, GONE.format(victim), by=1 - victim, saved=saved, **more)


def raises(victim: int, place: str, saved: int = 7) -> Scenario:
    """One of two ranks raises, and its traceback is all that is said."""
    fault = f"raise:point={place}:rank={victim}"
    return Scenario(BOTH, fault, "RuntimeError: injected", by=victim, says=("Traceback",), saved=saved)


def hangs(victim: int, fault: str, place: str, codes: tuple[int, ...] = BOTH) -> Scenario:
    """One of two ranks hangs or is stopped: the other names it with its place, and all that can show their stacks."""

    def at_its_place(played: Played) -> None:
        assert KILLED in codes or "inject.py" in played.screens[victim]

    line, stack = f"rank {victim} on {HOST}{place}", "most recent call first"
    others = "" if KILLED in codes else stack
    more = {"saved": 7, "words": TIMEOUT, "also": at_its_place, "held": KILLED in codes}  # else either tells of it
    return Scenario(codes, fault, line, by=1 - victim, says=(stack,), others=others, **more)


def short_of(share: int, world: int = 1, fault: str = "oom:point=loss:step=9", **more: Any) -> Scenario:
    """No memory on the last rank, which proposes a smaller micro batch that divides its share."""

    def smaller(played: Played) -> None:
        micro = min(int(number) for number in re.findall(r"micro_batch=(\d+)", played.screens[-1]))
        assert micro in [part for part in range(1, share) if share % part == 0]

    says = ("(?i)out of memory", "batch", "activation_checkpointing=true", "images of", "peak")
    return Scenario((INTERNAL,) * world, fault, "micro_batch", by=world - 1, says=says, also=smaller, **more)


def little_to_share(*words: str) -> Scenario:
    """Too little for batches in /dev/shm, and the cures are named."""
    words = ("data.image_size=224", "encoder.patch=56", "data.timeout=5", *words)
    return Scenario((INTERNAL,), "", SHORT, says=("worker",), words=words, prepare=small_shared_memory)


HANGING = "kill:point=save.begin:rank=1:step=14,hang:point=save.mid:step=14"
SICK = {
    "killed after an update": killed(1, "kill:point=update:rank=1:step=9", resumed=True, tier="default"),
    "killed as rank 0": killed(0, "kill:point=update:rank=0:step=9"),
    "killed at the start": killed(1, "kill:point=resume.chosen:rank=1", 0),
    "killed in a save": killed(0, "kill:point=save.mid:rank=0:step=14"),
    "killed while rank 0 hangs": killed(1, HANGING, resumed=True),
    "killed in the export": killed(0, "kill:point=finish:rank=0", 30),
    "raises": raises(1, "update:step=9"),
    "raises at the start": raises(0, "resume.chosen", 0),
    "hangs": hangs(1, "hang:point=batch:rank=1:step=9", " is still at step 8"),
    "hangs as rank 0": hangs(0, "hang:point=save.mid:rank=0:step=14", " is still at the checkpoint of step 14"),
    "stopped": hangs(1, "stop:point=update:rank=1:step=9", "", (INTERNAL, KILLED)),
    "stopped as rank 0": hangs(0, "stop:point=update:rank=0:step=9", "", (KILLED, INTERNAL)),
    "out of memory": short_of(8, saved=7, resumed=True),
    "out of memory on a rank": short_of(4, 2, "oom:point=loss:rank=1:step=9", saved=7),
    "really out of memory": short_of(64, fault="", saved=0, words=BIG, prepare=short_of_memory),
    "another recipe": Scenario((MISMATCH, MISMATCH), "", ANOTHER, alone={1: ["optim.lr=0.5"]}, held=False, saved=0),
    "worker killed": Scenario((INTERNAL,), "kill:point=sample:step=9", WORKER),
    "worker aborts": Scenario((INTERNAL,), "abort:point=sample:step=9", WORKER, resumed=True, tier="default"),
    "worker stopped": Scenario((INTERNAL,), "stop:point=sample:step=9", WORKER, words=DATA_TIMEOUT),
    "worker of rank 1 killed": Scenario(BOTH, "kill:point=sample:rank=1:step=9-99", WORKER, by=1),
    # a container's /dev/shm holds 64 MB; this one 1 MB: not for one batch of 16, nor for all of 3 at once
    "little memory to share": little_to_share("batch=16"),
    "that fills in the end": little_to_share("batch=3"),
}


@each(SICK)
def test_a_sick_rank_or_worker_is_named(scenario: Scenario, stage: Stage):
    """By one line of the right rank; the others end with it, and the last checkpoint before it is whole."""
    stage.play(scenario)


@pytest.mark.process
def test_a_worker_that_stops_after_its_work(stage: Stage):
    """Its batches are in the queue, but it would have to hand over their memory itself."""
    start = stage.start(1, "sleep:point=batch:step=5:seconds=1.5", DATA_TIMEOUT)
    start.until(lambda: (stage.run / "metrics.jsonl").exists() and bool(runs.rows(stage.run)))
    time.sleep(0.5)  # it has made all batches that it may make ahead; if not, the end is the same
    for worker in start.workers():
        os.kill(worker, signal.SIGSTOP)
    assert start.wait(LIMIT) == [INTERNAL], start.said()
    assert "worker 0" in start.said().splitlines()[-1]
    assert start.orphans == []


@pytest.mark.process
@pytest.mark.ranks
def test_a_port_in_use_is_named(stage: Stage):
    """By rank 0 with the number, at once; the other rank learns nothing there and ends by itself."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        start = stage.start(2, words=TIMEOUT, MASTER_PORT=str(port))
        start.until(lambda: "cannot be had" in start.said(0))
        assert f"rank 0: port {port} of this machine cannot be had" in start.said(0)
        start.kill()
        assert start.wait()[0] in (USAGE, KILLED)


@ranks(1, 2)
def test_a_clock_that_jumps_has_no_effect(stage: Stage, world: int):
    """An hour back, a year ahead, at every look; nor do times of files: the newest checkpoint is the last step's."""
    stage.play(Scenario((KILLED,) * world, "kill:point=update:step=20", prepare=odd_clock, cut=True))
    for age, folder in enumerate(checkpoint.steps(stage.run / "checkpoints")):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 - age, 1e9 - age))
    stage.play(Scenario((0,) * world, prepare=odd_clock))
    stage.as_in_peace(stage.tiny_run(world))


@pytest.mark.long
def test_deaths_at_random_times(stage: Stage):
    """30 times one of two ranks is killed: the other one names it in time, and in the end no bit differs."""
    random, more = Random(0), ("steps=3000", "save_every=50", "log_every=50", "eval_every=200")
    noticed = []
    for number in range(DEATHS):
        start = stage.start(2, words=more)
        start.until(lambda start=start: runs.holds(start, stage.run))
        wait, victim = random.uniform(0, 1.2), random.randrange(2)
        time.sleep(wait)
        start.signal(signal.SIGKILL, victim)
        codes = start.wait()
        said = f"death {number}, rank {victim} {wait:.3f} s after the start: {codes} {start.said()}"
        assert (codes[victim], codes[1 - victim]) == (KILLED, INTERNAL), said
        assert re.search(GONE.format(victim), start.said(1 - victim)), said
        assert start.orphans == [], said
        noticed.append(start.ended[1 - victim] - start.ended[victim])
        assert noticed[-1] < LATE, said
    stage.finish(2, *more)
    stage.as_in_peace(runs.straight(stage.shards, 2, stage.folder / "straight", *more))
    middle = statistics.median(noticed)
    print(f"\n{DEATHS} deaths: noticed after {middle:.2f} s in the median, {max(noticed):.2f} at most")
