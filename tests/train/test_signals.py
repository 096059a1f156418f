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

from ssl_vit.distributed import REPEAT_WINDOW
from ssl_vit.errors import ExitCode
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.conftest import draw_squares
from tests.machines import jumping_clock, limit_memory, small_shared_memory
from tests.processes import Start, call_tool
from tests.train.scenarios import HOST, KILLED, LIMIT, Outcome, Scenario, Stage, case, parametrize_scenarios, ranks

SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}
RESUME_HINT = "the same command goes on"

# at these places, one start after the other in one run: who gets what, where, and at which step
SIGNAL_POINTS = [("term", "batch", 1), ("int", "loss", 3), ("usr1", "weights", 5), ("term", "save.begin", 7)]
SIGNAL_POINTS += [("usr2", "update", 8), ("int", "eval.batch", 10), ("usr1", "save.mid", 14), ("usr2", "row", 15)]
SIGNAL_POINTS += [("term", "save.written", 21), ("int", "save.published", 28)]
LAG = {"row": 1}  # steps until it counts; flags of several ranks meet another one later, but around a save at once
ENDS = ["term:point=save.pruned", "usr1:point=eval.batch", "usr2:point=finish"]


def assert_preempted(stage: Stage, output: str, allowed_counts: tuple[int, ...] = (1,)) -> int:
    """What is true after each signal: all left with one word, and nothing is left behind; at which step it was."""
    exit_info = tiny_runs.read_exit(stage.run)
    assert exit_info["code"] == ExitCode.PREEMPTED
    assert RESUME_HINT in exit_info["reason"]
    assert output.count(RESUME_HINT) in allowed_counts, output
    assert "Traceback" not in output
    assert not list((stage.run / "checkpoints").glob(".*"))
    return exit_info["step"]


def test_a_signal_in_a_save(stage: Stage):
    """The one signal at a place of the default tier: that save completes and is the checkpoint; then 75."""
    stage.play(Scenario((ExitCode.PREEMPTED,), "term:point=save.mid:step=14", RESUME_HINT, saved=14, resumed=True))


@ranks(1, 2)
def test_a_signal_at_any_place(stage: Stage, world: int):
    """One checkpoint more, of the step that was under way or of the save; then everything as if nothing had been."""
    before: list[int] = []
    overrides = ("keep=99",)
    for number, (name, point, step) in enumerate(SIGNAL_POINTS):
        rank = "" if number % 3 == 0 else f":rank={number % world}"
        fault = f"{name}:point={point}:step={step}{rank}"
        stop_step = assert_preempted(
            stage, stage.play(Scenario((ExitCode.PREEMPTED,) * world, fault, RESUME_HINT, args=overrides)).output
        )
        lag = LAG.get(point, 0) + (world > 1 and not point.startswith("save."))
        assert step <= stop_step <= step + lag, fault
        new_steps = set(tiny_runs.checkpoint_steps(stage.run)) - set(before)
        assert new_steps == {s for s in range(max([0, *before]) + 1, stop_step) if s % 7 == 0} | {stop_step}, fault
        assert checkpoint.find_corruption(tiny_runs.last_checkpoint(stage.run)) is None
        before = tiny_runs.checkpoint_steps(stage.run)
    for fault in ENDS:  # all steps are done: it may as well finish
        outcome = stage.begin(
            Scenario((ExitCode.PREEMPTED,) * world, f"{fault}:step={tiny_runs.STEPS}", args=overrides)
        )
        assert set(outcome.codes) <= {0, ExitCode.PREEMPTED}, outcome.output
        assert tiny_runs.checkpoint_steps(stage.run)[-1] == tiny_runs.STEPS
    stage.finish(world, *overrides)
    stage.assert_same_bits(stage.tiny_run(world))
    assert tiny_runs.lost_samples(stage.run, stage.shards) == 0


@ranks(1, 2)
def test_a_signal_in_the_last_save_puts_none_in_its_place(stage: Stage, world: int):
    """The checkpoint of the last step is there already when the signal comes in the last evaluation."""
    point = f"eval.batch:step={tiny_runs.STEPS}"
    stage.play(Scenario((-9,) * world, f"kill:point={point}", power_cut=True))
    fault = f"term:point=eval.batch,kill:point=save.written:step={tiny_runs.STEPS}"
    stage.play(Scenario((ExitCode.PREEMPTED,) * world, fault, RESUME_HINT, saved=tiny_runs.STEPS, resumed=True))


@pytest.mark.process
@pytest.mark.ranks
def test_a_signal_while_a_start_is_under_way(stage: Stage):
    """Before the first step: nothing was made, nothing is lost, and all ranks say so, whichever it came to."""
    faults = [("usr1:point=claimed:rank=0", 0), ("term:point=claimed:rank=1", 0), ("int:point=resume.chosen:rank=1", 0)]
    faults += [("term:point=update:step=9", 9)]
    for fault, step in [*faults, ("usr2:point=resume.loaded:step=10:rank=0", 10), ("term:point=resume.loaded", 10)]:
        output = stage.play(Scenario((ExitCode.PREEMPTED, ExitCode.PREEMPTED), fault)).output
        assert assert_preempted(stage, output, (1, 2)) in (step, step + 1)
        assert tiny_runs.checkpoint_steps(stage.run) in ([], [7, 10])
    stage.finish(2)
    stage.assert_same_run(stage.tiny_run(2))


EXTERNAL_SIGNALS = [case(1, "int", 0), case(2, "term", None, default=True), case(2, "usr2", 1), case(2, "usr1", 0)]


@pytest.mark.parametrize(("world", "name", "rank"), EXTERNAL_SIGNALS)
def test_a_signal_from_outside(stage: Stage, world: int, name: str, rank: int | None):
    """To the process group as a terminal or Slurm sends it, or to one rank; workers and ranks end together."""
    start = stage.start(world, args=("steps=100000", "save_every=100000"))
    start.wait_until(lambda: (stage.run / "metrics.jsonl").exists() and len(tiny_runs.metric_rows(stage.run)) > 2)
    start.signal(SIGNALS[name], rank)
    assert start.wait(LIMIT) == [ExitCode.PREEMPTED] * world, start.output()
    assert start.orphans == []
    assert tiny_runs.checkpoint_steps(stage.run) == [assert_preempted(stage, start.output())]
    assert checkpoint.find_corruption(tiny_runs.last_checkpoint(stage.run)) is None


@pytest.mark.process
@pytest.mark.ranks
def test_a_second_signal_leaves_at_once(stage: Stage):
    """Within AGAIN it is taken for the first one, which Slurm sends twice; a later one ends even a stuck save."""
    starts = []
    for world, number in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        run_stage = stage.sibling(f"{world}")
        start = run_stage.start(world, "hang:point=save.mid:rank=0:step=14")
        start.wait_until((run_stage.run / "checkpoints" / ".step-00000014.tmp").exists)
        starts.append((world, run_stage, start, number))
    for pause in (1, REPEAT_WINDOW):
        for _, _, start, number in starts:
            start.signal(number)
        time.sleep(pause)
    for world, run_stage, start, number in starts:
        assert all(process.is_alive() for process in start.processes), start.said()
        deadline = time.monotonic() + LIMIT
        while start.processes[0].is_alive() and time.monotonic() < deadline:
            start.signal(number)  # on a busy machine the first one may have been seen late
            start.processes[0].join(REPEAT_WINDOW + 1)
        codes = start.wait(LIMIT)
        assert codes[0] == 128 + number, start.said()
        assert set(codes) <= {128 + number, ExitCode.INTERNAL}
        assert (start.orphans, tiny_runs.checkpoint_steps(run_stage.run)) == ([], [7])
        assert checkpoint.find_corruption(tiny_runs.last_checkpoint(run_stage.run)) is None
        run_stage.finish(world)
        run_stage.assert_same_run(stage.tiny_run(world))


@pytest.mark.parametrize("name", ["term", pytest.param("usr2", marks=pytest.mark.process)])
def test_a_conversion_goes_on_after_a_signal(tmp_path: Path, name: str):
    """To the bytes of one that nobody disturbed."""
    reference_dir, output_dir = tmp_path / "whole", tmp_path / "out"
    draw_squares(tmp_path / "in", count=20)
    args = [f"input={tmp_path}/in", "shard_samples=1", "workers=2", "quiet=true"]
    start = Start([*args, f"output={output_dir}"], tmp_path / "logs", tool="make_shards")
    start.wait_until(lambda: len(list(output_dir.glob("*.tar"))) > 5)
    start.signal(SIGNALS[name])
    assert start.wait() == [ExitCode.PREEMPTED], start.output()
    assert RESUME_HINT in start.output()
    assert start.orphans == []
    assert not (output_dir / "manifest.json").exists()
    for folder in (output_dir, reference_dir):
        result = call_tool("make_shards", [*args, f"output={folder}"])
        assert result.code == 0, result.output
    for path in reference_dir.iterdir():
        assert path.is_dir() or path.read_bytes() == (output_dir / path.name).read_bytes()


# the sick

TIMEOUT, DATA_TIMEOUT = ("timeout=3",), ("data.timeout=3",)
BOTH_INTERNAL = (ExitCode.INTERNAL, ExitCode.INTERNAL)
WORKER_PATTERN = r"worker 0 .*/train/00000.*sample"
SHM_PATTERN = "(?=.*--shm-size)(?=.*data.workers=0)"
BIG_BATCH = ("data.image_size=128", "encoder.mlp=16384", "batch=64")  # an activation of 4 GiB


GONE_PATTERN = f"rank {{}} on {HOST}.*is gone"  # how the others name a rank that was killed


def killed_rank(victim: int, fault: str, saved: int = 7, **kwargs: Any) -> Scenario:
    """One of two ranks is killed, and the other one says so, whatever that one hangs in."""
    codes = (KILLED, ExitCode.INTERNAL) if victim == 0 else (ExitCode.INTERNAL, KILLED)
    return Scenario(codes, fault, GONE_PATTERN.format(victim), rank=1 - victim, saved=saved, **kwargs)


def raising_rank(victim: int, point: str, saved: int = 7) -> Scenario:
    """One of two ranks raises, and its traceback is all that is said."""
    fault = f"raise:point={point}:rank={victim}"
    return Scenario(BOTH_INTERNAL, fault, "RuntimeError: injected", rank=victim, patterns=("Traceback",), saved=saved)


def hanging_rank(victim: int, fault: str, location: str, codes: tuple[int, ...] = BOTH_INTERNAL) -> Scenario:
    """One of two ranks hangs or is stopped: the other names it with its place, and all that can show their stacks."""

    def check_stack(outcome: Outcome) -> None:
        assert KILLED in codes or "fault_injection.py" in outcome.outputs[victim]

    line, stack = f"rank {victim} on {HOST}{location}", "most recent call first"
    other_pattern = "" if KILLED in codes else stack
    kwargs = {
        "saved": 7,
        "args": TIMEOUT,
        "extra_check": check_stack,
        "owns_folder": KILLED in codes,
    }  # else either tells of it
    return Scenario(codes, fault, line, rank=1 - victim, patterns=(stack,), other_pattern=other_pattern, **kwargs)


def out_of_memory(share: int, world: int = 1, fault: str = "oom:point=loss:step=9", **kwargs: Any) -> Scenario:
    """No memory on the last rank, which proposes a smaller micro batch that divides its share."""

    def check_proposal(outcome: Outcome) -> None:
        micro = min(int(number) for number in re.findall(r"micro_batch=(\d+)", outcome.outputs[-1]))
        assert micro in [part for part in range(1, share) if share % part == 0]

    patterns = ("(?i)out of memory", "batch", "activation_checkpointing=true", "images of", "peak")
    return Scenario(
        (ExitCode.INTERNAL,) * world,
        fault,
        "micro_batch",
        rank=world - 1,
        patterns=patterns,
        extra_check=check_proposal,
        **kwargs,
    )


def small_shm_scenario(*overrides: str) -> Scenario:
    """Too little for batches in /dev/shm, and the cures are named."""
    overrides = ("data.image_size=224", "encoder.patch=56", "data.timeout=5", *overrides)
    return Scenario(
        (ExitCode.INTERNAL,), "", SHM_PATTERN, patterns=("worker",), args=overrides, prepare=small_shared_memory
    )


RANK_0_HANGS = "kill:point=save.begin:rank=1:step=14,hang:point=save.mid:step=14"
FAILURES = {
    "killed after an update": killed_rank(1, "kill:point=update:rank=1:step=9", resumed=True, tier="default"),
    "killed as rank 0": killed_rank(0, "kill:point=update:rank=0:step=9"),
    "killed at the start": killed_rank(1, "kill:point=resume.chosen:rank=1", 0),
    "killed in a save": killed_rank(0, "kill:point=save.mid:rank=0:step=14"),
    "killed while rank 0 hangs": killed_rank(1, RANK_0_HANGS, resumed=True),
    "killed in the export": killed_rank(0, "kill:point=finish:rank=0", 30),
    "raises": raising_rank(1, "update:step=9"),
    "raises at the start": raising_rank(0, "resume.chosen", 0),
    "hangs": hanging_rank(1, "hang:point=batch:rank=1:step=9", " is still at step 8"),
    "hangs as rank 0": hanging_rank(0, "hang:point=save.mid:rank=0:step=14", " is still at the checkpoint of step 14"),
    "stopped": hanging_rank(1, "stop:point=update:rank=1:step=9", "", (ExitCode.INTERNAL, KILLED)),
    "stopped as rank 0": hanging_rank(0, "stop:point=update:rank=0:step=9", "", (KILLED, ExitCode.INTERNAL)),
    "out of memory": out_of_memory(8, saved=7, resumed=True),
    "out of memory on a rank": out_of_memory(4, 2, "oom:point=loss:rank=1:step=9", saved=7),
    "really out of memory": out_of_memory(64, fault="", saved=0, args=BIG_BATCH, prepare=limit_memory),
    "worker killed": Scenario((ExitCode.INTERNAL,), "kill:point=sample:step=9", WORKER_PATTERN),
    "worker aborts": Scenario(
        (ExitCode.INTERNAL,), "abort:point=sample:step=9", WORKER_PATTERN, resumed=True, tier="default"
    ),
    "worker stopped": Scenario((ExitCode.INTERNAL,), "stop:point=sample:step=9", WORKER_PATTERN, args=DATA_TIMEOUT),
    "worker of rank 1 killed": Scenario(BOTH_INTERNAL, "kill:point=sample:rank=1:step=9-99", WORKER_PATTERN, rank=1),
    # a container's /dev/shm holds 64 MB; this one 1 MB: not for one batch of 16, nor for all of 3 at once
    "little memory to share": small_shm_scenario("batch=16"),
    "that fills in the end": small_shm_scenario("batch=3"),
}


@parametrize_scenarios(FAILURES)
def test_a_sick_rank_or_worker_is_named(scenario: Scenario, stage: Stage):
    """By one line of the right rank; the others end with it, and the last checkpoint before it is whole."""
    stage.play(scenario)


@pytest.mark.process
def test_a_worker_that_stops_after_its_work(stage: Stage):
    """Its batches are in the queue, but it would have to hand over their memory itself."""
    start = stage.start(1, "sleep:point=batch:step=5:seconds=1.5", DATA_TIMEOUT)
    start.wait_until(lambda: (stage.run / "metrics.jsonl").exists() and bool(tiny_runs.metric_rows(stage.run)))
    time.sleep(0.5)  # it has made all batches that it may make ahead; if not, the end is the same
    for worker in start.workers():
        os.kill(worker, signal.SIGSTOP)
    assert start.wait(LIMIT) == [ExitCode.INTERNAL], start.output()
    assert "worker 0" in start.output().splitlines()[-1]
    assert start.orphans == []


@ranks(1, 2)
def test_a_clock_that_jumps_has_no_effect(stage: Stage, world: int):
    """An hour back, a year ahead, at every look; of times of files see test_hostile_checkpoints.py."""
    stage.play(Scenario((KILLED,) * world, "kill:point=update:step=20", prepare=jumping_clock, power_cut=True))
    stage.play(Scenario((0,) * world, prepare=jumping_clock))
    stage.assert_same_run(stage.tiny_run(world))


# at random times

MAX_DELAY, COUNT = 1.2, {signal.SIGTERM: 25, signal.SIGKILL: 30}  # seconds in which a signal comes; how many
MAX_EXIT_TIME = {signal.SIGTERM: 25.0, signal.SIGKILL: 15.0}  # seconds from there to the end of the other ranks
SAVE_INTERVALS = {signal.SIGTERM: 1000, signal.SIGKILL: 50}  # steps between checkpoints: a kill leaves none of its own


@pytest.mark.long
@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)])
def test_signals_at_random_times(stage: Stage, world: int, number: signal.Signals):
    """SIGTERM to one rank or all, from the first moment of a start on, is durable in time; who is killed is named."""
    overrides = ("steps=3000", f"save_every={SAVE_INTERVALS[number]}", "log_every=50", "eval_every=100")
    rng, run, durations, last_step = Random(world), stage.run, [], 0
    for i in range(COUNT[number]):
        start = stage.start(world, args=overrides)
        kill = number == signal.SIGKILL
        rank, wait = rng.choice([None, *range(world)][kill:]), rng.uniform(0, MAX_DELAY)
        start.wait_until(start.handles_signals)
        if rank is not None:  # before they have met, a rank cannot know why the other one is not there
            start.wait_until(lambda start=start: tiny_runs.holds_lock(start, run))
        time.sleep(wait)
        sent = time.monotonic()
        start.signal(number, rank)
        codes = start.wait()
        durations.append(max(start.end_times.values()) - sent)
        message = f"{number.name} {i} to {rank}, {wait:.3f} s after it began: {codes} {start.output()}"
        assert codes == (
            [KILLED if index == rank else ExitCode.INTERNAL for index in (0, 1)]
            if kill
            else [ExitCode.PREEMPTED] * world
        ), message
        assert not kill or re.search(GONE_PATTERN.format(rank), start.output(1 - (rank or 0))), message
        assert (start.orphans, durations[-1] < MAX_EXIT_TIME[number]) == ([], True), message
        if tiny_runs.checkpoint_steps(run):
            assert checkpoint.find_corruption(tiny_runs.last_checkpoint(run)) is None
            last_step = max(last_step, json.loads((tiny_runs.last_checkpoint(run) / "train.json").read_text())["step"])
    stage.finish(world, *overrides)
    stage.assert_same_run(tiny_runs.run_straight(stage.shards, world, stage.folder / "straight", *overrides))
    times = f"median {statistics.median(durations):.2f} s, longest {max(durations):.2f} s"
    summary = f"{times}, at step {last_step} after the last"
    print(f"\n{COUNT[number]} {number.name} on {world} ranks: signal to end: {summary}")
