"""Signals to any rank anywhere, and ranks and workers that die, stop, raise, hang or starve.

After a signal the run leaves in time with one durable checkpoint; of the sick the right one is named, and all end. The
same command then goes on to the bits of a run that nobody disturbed.
"""

import json
import os
import re
import signal
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ssl_vit.distributed import AGAIN
from ssl_vit.errors import INTERNAL, PREEMPTED
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.conftest import draw_squares
from tests.odd import odd_clock, short_of_memory, small_shared_memory
from tests.starts import Start, call
from tests.train.scenarios import HOST, KILLED, LIMIT, Played, Scenario, Stage, case, each, ranks

SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}
LEFT = "the same command goes on"

# at these places, one start after the other in one run: who gets what, where, and at which step
WALK = [("term", "batch", 1), ("int", "loss", 3), ("usr1", "weights", 5), ("term", "save.begin", 7)]
WALK += [("usr2", "update", 8), ("int", "eval.batch", 10), ("usr1", "save.mid", 14), ("usr2", "row", 15)]
WALK += [("term", "save.written", 21), ("int", "save.published", 28)]
LAG = {"row": 1}  # steps until it counts; flags of several ranks meet another one later, but around a save at once
ENDS = ["term:point=save.pruned", "usr1:point=eval.batch", "usr2:point=finish"]


def left(stage: Stage, said: str, times: tuple[int, ...] = (1,)) -> int:
    """What is true after each signal: all left with one word, and nothing is left behind; at which step it was."""
    end = tiny_runs.told(stage.run)
    assert end["code"] == PREEMPTED
    assert LEFT in end["reason"]
    assert said.count(LEFT) in times, said
    assert "Traceback" not in said
    assert not list((stage.run / "checkpoints").glob(".*"))
    return end["step"]


def test_a_signal_in_a_save(stage: Stage):
    """The one signal at a place of the default tier: that save completes and is the checkpoint; then 75."""
    stage.play(Scenario((PREEMPTED,), "term:point=save.mid:step=14", LEFT, saved=14, resumed=True))


@ranks(1, 2)
def test_a_signal_at_any_place(stage: Stage, world: int):
    """One checkpoint more, of the step that was under way or of the save; then everything as if nothing had been."""
    before: list[int] = []
    keep = ("keep=99",)
    for number, (name, place, step) in enumerate(WALK):
        rank = "" if number % 3 == 0 else f":rank={number % world}"
        fault = f"{name}:point={place}:step={step}{rank}"
        stopped = left(stage, stage.play(Scenario((PREEMPTED,) * world, fault, LEFT, words=keep)).said)
        lag = LAG.get(place, 0) + (world > 1 and not place.startswith("save."))
        assert step <= stopped <= step + lag, fault
        new = set(tiny_runs.saved(stage.run)) - set(before)
        assert new == {s for s in range(max([0, *before]) + 1, stopped) if s % 7 == 0} | {stopped}, fault
        assert checkpoint.flaw(tiny_runs.last(stage.run)) is None
        before = tiny_runs.saved(stage.run)
    for fault in ENDS:  # all steps are done: it may as well finish
        played = stage.begin(Scenario((PREEMPTED,) * world, f"{fault}:step={tiny_runs.STEPS}", words=keep))
        assert set(played.codes) <= {0, PREEMPTED}, played.said
        assert tiny_runs.saved(stage.run)[-1] == tiny_runs.STEPS
    stage.finish(world, *keep)
    stage.same_bits(stage.tiny_run(world))
    assert tiny_runs.lost_samples(stage.run, stage.shards) == 0


@ranks(1, 2)
def test_a_signal_in_the_last_save_puts_none_in_its_place(stage: Stage, world: int):
    """The checkpoint of the last step is there already when the signal comes in the last evaluation."""
    place = f"eval.batch:step={tiny_runs.STEPS}"
    stage.play(Scenario((-9,) * world, f"kill:point={place}", cut=True))
    fault = f"term:point=eval.batch,kill:point=save.written:step={tiny_runs.STEPS}"
    stage.play(Scenario((PREEMPTED,) * world, fault, LEFT, saved=tiny_runs.STEPS, resumed=True))


@pytest.mark.process
@pytest.mark.ranks
def test_a_signal_while_a_start_is_under_way(stage: Stage):
    """Before the first step: nothing was made, nothing is lost, and all ranks say so, whichever it came to."""
    early = [("usr1:point=claimed:rank=0", 0), ("term:point=claimed:rank=1", 0), ("int:point=resume.chosen:rank=1", 0)]
    early += [("term:point=update:step=9", 9)]
    for fault, step in [*early, ("usr2:point=resume.loaded:step=10:rank=0", 10), ("term:point=resume.loaded", 10)]:
        said = stage.play(Scenario((PREEMPTED, PREEMPTED), fault)).said
        assert left(stage, said, (1, 2)) in (step, step + 1)
        assert tiny_runs.saved(stage.run) in ([], [7, 10])
    stage.finish(2)
    stage.as_in_peace(stage.tiny_run(2))


OUTSIDE = [case(1, "int", 0), case(2, "term", None, default=True), case(2, "usr2", 1), case(2, "usr1", 0)]


@pytest.mark.parametrize(("world", "name", "rank"), OUTSIDE)
def test_a_signal_from_outside(stage: Stage, world: int, name: str, rank: int | None):
    """To the process group as a terminal or Slurm sends it, or to one rank; workers and ranks end together."""
    start = stage.start(world, words=("steps=100000", "save_every=100000"))
    start.until(lambda: (stage.run / "metrics.jsonl").exists() and len(tiny_runs.rows(stage.run)) > 2)
    start.signal(SIGNALS[name], rank)
    assert start.wait(LIMIT) == [PREEMPTED] * world, start.said()
    assert start.orphans == []
    assert tiny_runs.saved(stage.run) == [left(stage, start.said())]
    assert checkpoint.flaw(tiny_runs.last(stage.run)) is None


@pytest.mark.process
@pytest.mark.ranks
def test_a_second_signal_leaves_at_once(stage: Stage):
    """Within AGAIN it is taken for the first one, which Slurm sends twice; a later one ends even a stuck save."""
    starts = []
    for world, number in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        one = stage.at(f"{world}")
        start = one.start(world, "hang:point=save.mid:rank=0:step=14")
        start.until((one.run / "checkpoints" / ".step-00000014.tmp").exists)
        starts.append((world, one, start, number))
    for pause in (1, AGAIN):
        for _, _, start, number in starts:
            start.signal(number)
        time.sleep(pause)
    for world, one, start, number in starts:
        assert all(process.is_alive() for process in start.processes), start.said()
        end = time.monotonic() + LIMIT
        while start.processes[0].is_alive() and time.monotonic() < end:
            start.signal(number)  # on a busy machine the first one may have been seen late
            start.processes[0].join(AGAIN + 1)
        codes = start.wait(LIMIT)
        assert codes[0] == 128 + number, start.said()
        assert set(codes) <= {128 + number, INTERNAL}
        assert (start.orphans, tiny_runs.saved(one.run)) == ([], [7])
        assert checkpoint.flaw(tiny_runs.last(one.run)) is None
        one.finish(world)
        one.as_in_peace(stage.tiny_run(world))


@pytest.mark.parametrize("name", ["term", pytest.param("usr2", marks=pytest.mark.process)])
def test_a_conversion_goes_on_after_a_signal(tmp_path: Path, name: str):
    """To the bytes of one that nobody disturbed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    draw_squares(tmp_path / "in", count=20)
    words = [f"input={tmp_path}/in", "shard_samples=1", "workers=2", "quiet=true"]
    start = Start([*words, f"output={out}"], tmp_path / "logs", tool="make_shards")
    start.until(lambda: len(list(out.glob("*.tar"))) > 5)
    start.signal(SIGNALS[name])
    assert start.wait() == [PREEMPTED], start.said()
    assert LEFT in start.said()
    assert start.orphans == []
    assert not (out / "manifest.json").exists()
    for folder in (out, whole):
        again = call("make_shards", [*words, f"output={folder}"])
        assert again.code == 0, again.said
    for path in whole.iterdir():
        assert path.is_dir() or path.read_bytes() == (out / path.name).read_bytes()


# the sick

TIMEOUT, DATA_TIMEOUT = ("timeout=3",), ("data.timeout=3",)
BOTH = (INTERNAL, INTERNAL)
WORKER = r"worker 0 .*/train/00000.*sample"
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
        assert KILLED in codes or "fault_injection.py" in played.screens[victim]

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
    start.until(lambda: (stage.run / "metrics.jsonl").exists() and bool(tiny_runs.rows(stage.run)))
    time.sleep(0.5)  # it has made all batches that it may make ahead; if not, the end is the same
    for worker in start.workers():
        os.kill(worker, signal.SIGSTOP)
    assert start.wait(LIMIT) == [INTERNAL], start.said()
    assert "worker 0" in start.said().splitlines()[-1]
    assert start.orphans == []


@ranks(1, 2)
def test_a_clock_that_jumps_has_no_effect(stage: Stage, world: int):
    """An hour back, a year ahead, at every look; of times of files see test_hostile_checkpoints.py."""
    stage.play(Scenario((KILLED,) * world, "kill:point=update:step=20", prepare=odd_clock, cut=True))
    stage.play(Scenario((0,) * world, prepare=odd_clock))
    stage.as_in_peace(stage.tiny_run(world))


# at random times

SPAN, COUNT = 1.2, {signal.SIGTERM: 25, signal.SIGKILL: 30}  # seconds in which a signal comes; how many
LATE = {signal.SIGTERM: 25.0, signal.SIGKILL: 15.0}  # seconds from there to the end of the other ranks
SAVES = {signal.SIGTERM: 1000, signal.SIGKILL: 50}  # steps between checkpoints: a kill leaves none of its own


@pytest.mark.long
@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)])
def test_signals_at_random_times(stage: Stage, world: int, number: signal.Signals):
    """SIGTERM to one rank or all, from the first moment of a start on, is durable in time; who is killed is named."""
    more = ("steps=3000", f"save_every={SAVES[number]}", "log_every=50", "eval_every=100")
    random, run, lasted, kept = Random(world), stage.run, [], 0
    for place in range(COUNT[number]):
        start = stage.start(world, words=more)
        kill = number == signal.SIGKILL
        rank, wait = random.choice([None, *range(world)][kill:]), random.uniform(0, SPAN)
        start.until(start.hears)
        if rank is not None:  # before they have met, a rank cannot know why the other one is not there
            start.until(lambda start=start: tiny_runs.holds(start, run))
        time.sleep(wait)
        sent = time.monotonic()
        start.signal(number, rank)
        codes = start.wait()
        lasted.append(max(start.ended.values()) - sent)
        said = f"{number.name} {place} to {rank}, {wait:.3f} s after it began: {codes} {start.said()}"
        assert codes == ([KILLED if one == rank else INTERNAL for one in (0, 1)] if kill else [PREEMPTED] * world), said
        assert not kill or re.search(GONE.format(rank), start.said(1 - (rank or 0))), said
        assert (start.orphans, lasted[-1] < LATE[number]) == ([], True), said
        if tiny_runs.saved(run):
            assert checkpoint.flaw(tiny_runs.last(run)) is None
            kept = max(kept, json.loads((tiny_runs.last(run) / "state.json").read_text())["step"])
    stage.finish(world, *more)
    stage.as_in_peace(tiny_runs.straight(stage.shards, world, stage.folder / "straight", *more))
    figures = f"median {statistics.median(lasted):.2f} s, longest {max(lasted):.2f} s, at step {kept} after the last"
    print(f"\n{COUNT[number]} {number.name} on {world} ranks: signal to end: {figures}")
