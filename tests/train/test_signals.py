"""Signals: whichever comes to whichever rank wherever it is, the run leaves in time with one durable checkpoint.

The same command then goes on to the bits of a run that nobody disturbed.
"""

import json
import signal
import statistics
import time
from pathlib import Path
from random import Random

import pytest

from ssl_vit.exits import INTERNAL, PREEMPTED
from ssl_vit.train import checkpoint
from ssl_vit.train.distributed import AGAIN
from tests import runs
from tests.conftest import draw_squares
from tests.starts import Start, call
from tests.train.scenarios import LIMIT, Scenario, Stage, ranks

LATE = 25.0  # seconds from a signal to the end of the last rank, which the soak measures
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}
RANDOM_SIGNALS, RANDOM_STEPS, SPAN = 25, 2500, 1.2  # a world; steps of that run; seconds in which a signal comes
LEFT = "the same command goes on"

# at these places, one start after the other in one run: who gets what, where, and at which step
WALK = [
    ("term", "batch", 1),
    ("int", "loss", 3),
    ("usr1", "weights", 5),
    ("term", "save.begin", 7),
    ("usr2", "update", 8),
    ("int", "eval.batch", 10),
    ("usr1", "save.mid", 14),
    ("usr2", "row", 15),
    ("term", "save.written", 21),
    ("int", "save.published", 28),
]
LAG = {"row": 1}  # steps until it counts; flags of several ranks meet another one later, but around a save at once
ENDS = ["term:point=save.pruned", "usr1:point=eval.batch", "usr2:point=finish"]


def left(stage: Stage, said: str, times: tuple[int, ...] = (1,)) -> int:
    """What is true after each signal: all left with one word, and nothing is left behind; at which step it was."""
    end = runs.told(stage.run)
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
        new = set(runs.saved(stage.run)) - set(before)
        assert new == {s for s in range(max([0, *before]) + 1, stopped) if s % 7 == 0} | {stopped}, fault
        assert checkpoint.flaw(runs.last(stage.run)) is None
        before = runs.saved(stage.run)
    for fault in ENDS:  # all steps are done: it may as well finish
        played = stage.begin(Scenario((PREEMPTED,) * world, f"{fault}:step={runs.STEPS}", words=keep))
        assert set(played.codes) <= {0, PREEMPTED}, played.said
        assert runs.saved(stage.run)[-1] == runs.STEPS
    stage.finish(world, *keep)
    stage.same_bits(stage.tiny_run(world))
    assert runs.lost_samples(stage.run, stage.shards) == 0


@ranks(1, 2)
def test_a_signal_in_the_last_save_puts_none_in_its_place(stage: Stage, world: int):
    """The checkpoint of the last step is there already when the signal comes in the last evaluation."""
    place = f"eval.batch:step={runs.STEPS}"
    stage.play(Scenario((-9,) * world, f"kill:point={place}", cut=True))
    fault = f"term:point=eval.batch,kill:point=save.written:step={runs.STEPS}"
    stage.play(Scenario((PREEMPTED,) * world, fault, LEFT, saved=runs.STEPS, resumed=True))


@pytest.mark.process
@pytest.mark.ranks
def test_a_signal_while_a_start_is_under_way(stage: Stage):
    """Before the first step: nothing was made, nothing is lost, and all ranks say so, whichever it came to."""
    early = [("usr1:point=claimed:rank=0", 0), ("term:point=claimed:rank=1", 0), ("int:point=resume.chosen:rank=1", 0)]
    early += [("term:point=update:step=9", 9)]
    for fault, step in [*early, ("usr2:point=resume.loaded:step=10:rank=0", 10), ("term:point=resume.loaded", 10)]:
        said = stage.play(Scenario((PREEMPTED, PREEMPTED), fault)).said
        assert left(stage, said, (1, 2)) in (step, step + 1)
        assert runs.saved(stage.run) in ([], [7, 10])
    stage.finish(2)
    stage.as_in_peace(stage.tiny_run(2))


@pytest.mark.parametrize(
    ("world", "name", "rank"),
    [
        pytest.param(1, "int", 0, marks=pytest.mark.process),
        pytest.param(2, "term", None, marks=pytest.mark.ranks),
        pytest.param(2, "usr2", 1, marks=[pytest.mark.process, pytest.mark.ranks]),
        pytest.param(2, "usr1", 0, marks=[pytest.mark.process, pytest.mark.ranks]),
    ],
)
def test_a_signal_from_outside(stage: Stage, world: int, name: str, rank: int | None):
    """To the process group as a terminal or Slurm sends it, or to one rank; workers and ranks end together."""
    start = stage.start(world, words=("steps=100000", "save_every=100000"))
    start.until(lambda: (stage.run / "metrics.jsonl").exists() and len(runs.rows(stage.run)) > 2)
    start.signal(SIGNALS[name], rank)
    assert start.wait(LIMIT) == [PREEMPTED] * world, start.said()
    assert start.orphans == []
    assert runs.saved(stage.run) == [left(stage, start.said())]
    assert checkpoint.flaw(runs.last(stage.run)) is None


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
        assert (start.orphans, runs.saved(one.run)) == ([], [7])
        assert checkpoint.flaw(runs.last(one.run)) is None
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


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_signals_at_random_times(stage: Stage, world: int):
    """Of 50 SIGTERMs all are durable in time, from the first moment of a start on, to one rank or all."""
    random, more = Random(world), (f"steps={RANDOM_STEPS}", "save_every=1000", "log_every=50", "eval_every=100")
    run, lasted, kept = stage.run, [], 0
    for number in range(RANDOM_SIGNALS):
        start = stage.start(world, words=more)
        rank, wait = random.choice([None, *range(world)]), random.uniform(0, SPAN)
        start.until(start.hears)
        if rank is not None:  # before they have met, a rank cannot know why the other one is not there
            start.until(lambda start=start: runs.holds(start, run))
        time.sleep(wait)
        sent = time.monotonic()
        start.signal(signal.SIGTERM, rank)
        codes = start.wait()
        lasted.append(max(start.ended.values()) - sent)
        said = f"signal {number} to {rank}, {wait:.3f} s after it began: {codes} {start.said()}"
        assert (codes, start.orphans) == ([PREEMPTED] * world, []), said
        assert max(lasted) < LATE, said
        if runs.saved(run):
            assert checkpoint.flaw(runs.last(run)) is None
            kept = max(kept, json.loads((runs.last(run) / "state.json").read_text())["step"])
    stage.finish(world, *more)
    stage.as_in_peace(runs.straight(stage.shards, world, stage.folder / "straight", *more))
    figures = f"median {statistics.median(lasted):.2f} s, longest {max(lasted):.2f} s, at step {kept} after the last"
    print(f"\n{RANDOM_SIGNALS} SIGTERMs on {world} ranks: all durable; signal to end: {figures}")
