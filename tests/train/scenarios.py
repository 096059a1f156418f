"""What may befall a training, as lines of a table, and the one driver that plays each of them.

A scenario is a start of the run of tests/runs.py: its fault, and what has to be true then of exit codes, closing line
and checkpoints. Where it is `resumed`, the same command has to go on to the bits of a run that nothing happened to. A
start of one rank that no signal comes to runs in the process of the test; others are processes of their own.
"""

import gc
import multiprocessing
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.machines import NOT_ALLOWED
from tests.processes import Start, call_tool

KILLED = -9
HOST = socket.gethostname()
LIMIT = 120.0  # seconds after which a start hangs, on a busy machine
DEADLY = re.compile("(kill|stop|term|int|usr1|usr2|hang|abort):")  # a loader worker's death is answered but once, too
NOISE = ("SSL_VIT_FAULT=", "[rank", "[W", "[E", "Exception raised from", "frame #", "<omitting", "terminate called")
"""The drill's announcement, and how lines begin that torch's C++ parts write."""


@dataclass(frozen=True)
class Scenario:
    """One start, and what has to come of it."""

    codes: tuple[int, ...]  # of the ranks, of which there are so many
    fault: str = ""  # for SSL_VIT_FAULT
    line: str = ""  # a pattern of the closing line of rank `by`
    rank: int = 0
    patterns: tuple[str, ...] = ()  # patterns of what else that rank says; without any, the line is all it says
    other_pattern: str = ""  # a pattern of what the others say; without one, they say nothing
    saved: int | None = None  # the newest checkpoint then, which must be whole; 0 where there may be none
    args: tuple[str, ...] = ()
    rank_args: Mapping[int, list[str]] = field(default_factory=dict)  # more words of single ranks
    prepare: Callable[[], None] | None = None
    owns_folder: bool = True  # it holds the folder, so that exit.json tells of its end
    power_cut: bool = False  # a power cut: as soon as a rank has ended, all are killed
    resumed: bool = False
    extra_check: Callable[["Outcome"], None] | None = None  # looks at the rest
    tier: str = ""  # "default" for the one real process of its kind, "process" for what is slow in this one

    @property
    def needs_processes(self) -> bool:
        """Whether it takes processes of its own."""
        in_process = len(self.codes) == 1 and self.prepare is None and self.tier != "default"
        return not in_process or bool(DEADLY.search(self.fault))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Its tier, and the place of what starts several ranks."""
        is_process_tier = (self.tier or ("process" if self.needs_processes else "default")) == "process"
        return [pytest.mark.process] * is_process_tier + [pytest.mark.ranks] * (len(self.codes) > 1)


def parametrize_scenarios(table: Mapping[str, Scenario]) -> pytest.MarkDecorator:
    """Have a test play every scenario of a table, each in its tier."""
    params = [pytest.param(scenario, id=name, marks=scenario.marks) for name, scenario in table.items()]
    return pytest.mark.parametrize("scenario", params)


def case(*values: Any, default: bool = False) -> Any:
    """The parameters of a test; with a number above 1 it starts several ranks. Of the process tier, or the default."""
    has_ranks = any(isinstance(value, int) and value > 1 for value in values)
    return pytest.param(*values, marks=[pytest.mark.process] * (not default) + [pytest.mark.ranks] * has_ranks)


def ranks(*worlds: int) -> pytest.MarkDecorator:
    """Have a test run on so many ranks, as processes; it is of the process tier."""
    return pytest.mark.parametrize("world", [case(world) for world in worlds])


@dataclass(frozen=True)
class Outcome:
    """A scenario that was played."""

    run: Path
    codes: list[int]
    outputs: list[str]  # by rank

    @property
    def output(self) -> str:
        """What all ranks said."""
        return "".join(self.outputs)

    def lines(self, rank: int = 0) -> list[str]:
        """What a rank said, without the noise."""
        return [line for line in self.outputs[rank].splitlines() if line and not line.startswith(NOISE)]


@dataclass(frozen=True)
class Stage:
    """Where scenarios are played: the run is folder/run, and what was begun there goes on. A fixture of the tests."""

    shards: Path
    folder: Path
    tiny_run: Callable[[int], Path]  # finished, and nothing happened to it

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def sibling(self, name: str) -> "Stage":
        """Another run beside this one."""
        return replace(self, folder=self.folder / name)

    def args(self, *overrides: str) -> list[str]:
        """The command."""
        return tiny_runs.run_args(self.shards, self.run, *overrides)

    def start(self, world: int = 1, fault: str = "", args: tuple[str, ...] = (), **kwargs: object) -> Start:
        """The command as processes, for what has to happen while they run."""
        return Start(self.args(*args), self.folder / "logs", world, fault, **kwargs)  # type: ignore[arg-type]

    def begin(self, scenario: Scenario) -> Outcome:
        """Start and wait."""
        if not scenario.needs_processes:
            before = multiprocessing.active_children()
            result = call_tool("pretrain", self.args(*scenario.args), SSL_VIT_FAULT=scenario.fault)
            gc.collect()  # the iterator of a training that failed, with which its loader workers end
            for worker in set(multiprocessing.active_children()) - set(before):
                worker.join(LIMIT)
                assert not Path(f"/proc/{worker.pid}").exists()
            return Outcome(self.run, [result.code], [result.output])
        kwargs = {"alone": dict(scenario.rank_args), "prepare": scenario.prepare}
        start = self.start(len(scenario.codes), scenario.fault, scenario.args, **kwargs)
        if scenario.power_cut:
            start.wait_until(lambda: any(process.exitcode is not None for process in start.processes), LIMIT)
            start.kill()
        codes = start.wait(LIMIT)
        if NOT_ALLOWED in codes:
            pytest.skip("mounts of one's own are not allowed here")
        assert start.orphans == [], start.output()
        return Outcome(self.run, codes, [start.output(rank) for rank in range(len(codes))])

    def play(self, scenario: Scenario) -> Outcome:
        """Let it happen, and see that all came as it must."""
        outcome = self.begin(scenario)
        if scenario.power_cut:
            assert KILLED in outcome.codes, f"{scenario.fault} was not reached: {outcome.output}"
        else:
            assert outcome.codes == list(scenario.codes), outcome.output
        if scenario.line:
            _check_output(scenario, outcome)
        if scenario.saved is not None:
            assert tiny_runs.checkpoint_steps(self.run)[-1:] == ([scenario.saved] if scenario.saved else [])
            assert not scenario.saved or checkpoint.find_corruption(tiny_runs.last_checkpoint(self.run)) is None
        if scenario.extra_check is not None:
            scenario.extra_check(outcome)
        if scenario.resumed:
            self.finish(len(scenario.codes), *scenario.args)
            self.assert_same_run(self.tiny_run(len(scenario.codes)))
        return outcome

    def stop(self, point: str, *overrides: str) -> None:
        """End a start of one rank at a place, in this process; on the disk it is as after a kill there."""
        self.play(
            Scenario((70,), f"raise:point={point}", "RuntimeError: injected", patterns=("Traceback",), args=overrides)
        )

    def finish(self, world: int = 1, *overrides: str) -> str:
        """Give the command once more, with nothing in its way; what it said."""
        return self.play(Scenario((0,) * world, args=overrides)).output

    def assert_same_run(self, reference: Path) -> None:
        """The finished run has the bits of another one, and nothing is left behind."""
        self.assert_same_bits(reference)
        assert tiny_runs.file_names(self.run) == tiny_runs.file_names(reference)

    def assert_same_bits(self, reference: Path) -> None:
        """The finished run has the bits of another one."""
        assert tiny_runs.differing_bits(tiny_runs.run_bits(reference), tiny_runs.run_bits(self.run)) == {}


def _check_output(scenario: Scenario, outcome: Outcome) -> None:
    """One line by one rank, with all that was promised, and the same in exit.json; no traceback but an asked one."""
    lines = outcome.lines(scenario.rank)
    assert re.search(scenario.line, lines[-1]), outcome.output
    assert all(re.search(pattern, outcome.outputs[scenario.rank]) for pattern in scenario.patterns), outcome.output
    assert scenario.patterns or len(lines) == 1, outcome.output
    for rank, output in enumerate(outcome.outputs):
        if rank != scenario.rank:
            assert re.search(scenario.other_pattern, output) if scenario.other_pattern else outcome.lines(rank) == [], (
                outcome.output
            )
    assert "Traceback" not in outcome.output or "Traceback" in scenario.patterns, outcome.output
    if scenario.owns_folder:
        exit_info = tiny_runs.read_exit(outcome.run)
        assert (exit_info["code"], exit_info["rank"]) == (scenario.codes[scenario.rank], scenario.rank)
        assert exit_info["reason"] in lines[-1]
