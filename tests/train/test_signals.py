"""Signals: whichever comes to whichever rank wherever it is, the run leaves in time with one durable checkpoint.

The same command then goes on to the bits of a run that nobody disturbed.
"""

import json
import signal
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random

import pytest

from ssl_vit.data.shards import MakeShards, convert
from ssl_vit.exits import PREEMPTED
from ssl_vit.train import checkpoint
from ssl_vit.train.distributed import AGAIN
from tests import runs
from tests.conftest import draw_squares
from tests.starts import Start

LATE = 25.0  # seconds from a signal to the end of the last rank
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}
RANDOM_SIGNALS, RANDOM_STEPS, SPAN = 25, 2500, 1.2  # a world; steps of that run; seconds in which a signal comes

# at these places, one start after the other in one run: who gets what, where, and at which step
WALK = [
    ("term", "batch", 1),
    ("int", "loss", 3),
    ("usr1", "weights", 5),
    ("term", "save.begin", 7),
    ("usr2", "update", 8),
]
WALK += [("int", "eval.batch", 10), ("usr1", "save.mid", 14), ("usr2", "row", 15), ("term", "save.written", 21)]
WALK += [("int", "save.published", 28)]
LAG = {"row": 1}  # steps until it counts; flags of several ranks meet another one later, but around a save at once
ENDS = [("term", "save.pruned", 30), ("usr1", "eval.batch", 30), ("usr2", "finish", 30)]


def told(start: Start, run: Path, codes: list[int], lines: Collection[int] = (1,)) -> int:
    """The step at which all ranks left, having said so and left nobody behind."""
    assert codes == [PREEMPTED] * len(codes), (codes, start.said())
    end = runs.told(run)
    assert end["code"] == PREEMPTED
    assert "the same command goes on" in end["reason"]
    assert start.said().count("the same command goes on") in lines, start.said()
    assert "Traceback" not in start.said()
    assert start.orphans == []
    assert not list((run / "checkpoints").glob(".*"))
    return end["step"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_at_any_place(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path, world: int):
    """One checkpoint more, of the step that was under way or of the save; then everything as if nothing had been."""
    run, before = tmp_path / "run", []
    for number, (name, place, step) in enumerate(WALK):
        rank = "" if number % 3 == 0 else f":rank={number % world}"
        fault = f"{name}:point={place}:step={step}{rank}"
        sent = time.monotonic()
        start = Start(runs.words(shards, run, "keep=99"), tmp_path / "logs", world, fault)
        stopped = told(start, run, start.wait())
        assert max(start.ended.values()) - sent < LATE
        lag = LAG.get(place, 0) + (world > 1 and not place.startswith("save."))
        assert step <= stopped <= step + lag, fault
        new = set(runs.saved(run)) - set(before)
        assert new == {s for s in range(max([0, *before]) + 1, stopped) if s % 7 == 0} | {stopped}, fault
        assert checkpoint.flaw(runs.last(run)) is None
        before = runs.saved(run)
    for name, place, step in ENDS:  # all steps are done: it may as well finish
        start = Start(runs.words(shards, run, "keep=99"), tmp_path / "logs", world, f"{name}:point={place}:step={step}")
        codes = start.wait()
        assert set(codes) <= {0, PREEMPTED}, start.said()
        assert start.orphans == []
        assert runs.saved(run)[-1] == runs.STEPS
    start = Start(runs.words(shards, run, "keep=99"), tmp_path / "logs", world)
    assert start.wait() == [0] * world, start.said()
    assert runs.differing(runs.results(tiny_run(world)), runs.results(run)) == {}
    assert runs.lost_samples(run, shards) == 0


def test_a_signal_while_a_start_is_under_way(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path):
    """Before the first step: nothing was made, nothing is lost, and all ranks say so, whichever it came to."""
    run = tmp_path / "run"
    early = [
        ("claimed", 0, 0, "usr1"),
        ("claimed", 1, 0, "term"),
        ("resume.chosen", 1, 0, "int"),
        ("update", None, 9, "term"),
    ]
    for place, rank, step, name in [*early, ("resume.loaded", 0, 10, "usr2"), ("resume.loaded", None, 10, "term")]:
        fault = f"{name}:point={place}:step={step}{'' if rank is None else f':rank={rank}'}"
        sent = time.monotonic()
        start = Start(runs.words(shards, run), tmp_path / "logs", 2, fault)
        codes = start.wait(90)
        assert max(start.ended.values()) - sent < LATE, start.said()
        assert told(start, run, codes, (1, 2)) in (step, step + 1)
        assert runs.saved(run) in ([], [7, 10])
    again = Start(runs.words(shards, run), tmp_path / "logs", 2)
    assert again.wait() == [0, 0], again.said()
    assert runs.differing(runs.results(tiny_run(2)), runs.results(run)) == {}


@pytest.mark.parametrize(("world", "name", "rank"), [(1, "int", 0), (2, "term", None), (2, "usr2", 1), (2, "usr1", 0)])
def test_a_signal_from_outside(shards: Path, tmp_path: Path, world: int, name: str, rank: int | None):
    """To the process group as a terminal or Slurm sends it, or to one rank; workers and ranks end together."""
    run = tmp_path / "run"
    start = Start(runs.words(shards, run, "steps=100000", "save_every=100000"), tmp_path / "logs", world)
    start.until(lambda: (run / "metrics.jsonl").exists() and len(runs.rows(run)) > 2)
    sent = time.monotonic()
    start.signal(SIGNALS[name], rank)
    stopped = told(start, run, start.wait())
    assert max(start.ended.values()) - sent < LATE
    assert runs.saved(run) == [stopped]
    assert checkpoint.flaw(runs.last(run)) is None


def test_a_second_signal_leaves_at_once(shards: Path, tiny_run: Callable[[int], Path], tmp_path: Path):
    """Within AGAIN it is taken for the first one, which Slurm sends twice; a later one ends even a stuck save."""
    starts = {}
    for world, number in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        run = tmp_path / f"{world}"
        fault = "hang:point=save.mid:rank=0:step=14"
        start = Start(runs.words(shards, run), tmp_path / "logs", world, fault)
        start.until(lambda run=run: (run / "checkpoints" / ".step-00000014.tmp").exists())
        starts[world] = start, run, number
    for start, _, number in starts.values():
        start.signal(number)
    first = time.monotonic()
    for wait, again in ((1.0, True), (AGAIN + 0.5, False)):
        time.sleep(first + wait - time.monotonic())
        for start, _, number in starts.values():
            assert all(process.is_alive() for process in start.processes), start.said()
            start.signal(number) if again else None
    for world, (start, run, number) in starts.items():
        sent = time.monotonic()
        start.signal(number)
        codes = start.wait()
        assert codes[0] == 128 + number, start.said()
        assert set(codes) <= {128 + number, 70}
        assert start.ended[0] - sent < 2
        assert max(start.ended.values()) - sent < 15
        assert start.orphans == []
        assert runs.saved(run) == [7]
        assert checkpoint.flaw(runs.last(run)) is None
        again = Start(runs.words(shards, run), tmp_path / "logs", world)
        assert again.wait() == [0] * world, again.said()
        assert runs.differing(runs.results(tiny_run(world)), runs.results(run)) == {}


@pytest.mark.parametrize("name", ["term", "usr2"])
def test_a_conversion_goes_on_after_a_signal(tmp_path: Path, name: str):
    """To the bytes of one that nobody disturbed."""
    source = tmp_path / "in"
    draw_squares(source, count=20)
    options = {"shard_samples": 1, "workers": 2, "quiet": True}
    convert(MakeShards(input=str(source), output=str(tmp_path / "whole"), **options))
    words = [f"input={source}", f"output={tmp_path / 'out'}", "shard_samples=1", "workers=2", "quiet=true"]
    start = Start(words, tmp_path / "logs", tool="make_shards")
    start.until(lambda: len(list((tmp_path / "out").glob("*.tar"))) > 5)
    start.signal(SIGNALS[name])
    assert start.wait() == [PREEMPTED], start.said()
    assert "the same command goes on" in start.said()
    assert start.orphans == []
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = Start(words, tmp_path / "logs", tool="make_shards")
    assert again.wait() == [0], again.said()
    names = [path.name for path in sorted((tmp_path / "whole").iterdir()) if path.is_file()]
    assert [(tmp_path / "out" / file).read_bytes() for file in names] == [
        (tmp_path / "whole" / file).read_bytes() for file in names
    ]


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_signals_at_random_times(shards: Path, tmp_path: Path, world: int):
    """Of 50 SIGTERMs all are durable in time, from the first moment of a start on, to one rank or all."""
    random, more = Random(world), (f"steps={RANDOM_STEPS}", "save_every=1000", "log_every=50", "eval_every=100")
    run, lasted, kept = tmp_path / "run", [], 0
    for number in range(RANDOM_SIGNALS):
        start = Start(runs.words(shards, run, *more), tmp_path / "logs", world)
        rank, holder = random.choice([None, *range(world)]), f"pid {start.processes[0].pid} "
        start.until(start.hears)
        if rank is not None:  # before they have met, a rank cannot know why the other one is not there
            start.until(lambda holder=holder: (run / ".lock").exists() and holder in (run / ".lock").read_text())
        wait = random.uniform(0, SPAN)
        time.sleep(wait)
        sent = time.monotonic()
        start.signal(signal.SIGTERM, rank)
        codes = start.wait()
        lasted.append(max(start.ended.values()) - sent)
        assert codes == [PREEMPTED] * world, (
            f"signal {number} to {rank}, {wait:.3f} s after it began: {codes} {start.said()}"
        )
        assert start.orphans == []
        assert max(lasted) < LATE
        if runs.saved(run):
            assert checkpoint.flaw(runs.last(run)) is None
            kept = max(kept, json.loads((runs.last(run) / "state.json").read_text())["step"])
    assert Start(runs.words(shards, run, *more), tmp_path / "logs", world).wait(600) == [0] * world
    peace = runs.straight(shards, world, tmp_path / "straight", *more)
    assert runs.differing(runs.results(peace), runs.results(run)) == {}
    figures = f"median {statistics.median(lasted):.2f} s, longest {max(lasted):.2f} s, at step {kept} after the last"
    print(f"\n{RANDOM_SIGNALS} SIGTERMs on {world} ranks: all durable; signal to end: {figures}")
