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
from tests.odd import NOT_ALLOWED
from tests.starts import Start, call

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
    by: int = 0
    says: tuple[str, ...] = ()  # patterns of what else that rank says; without any, the line is all it says
    others: str = ""  # a pattern of what the others say; without one, they say nothing
    saved: int | None = None  # the newest checkpoint then, which must be whole; 0 where there may be none
    words: tuple[str, ...] = ()
    alone: Mapping[int, list[str]] = field(default_factory=dict)  # more words of single ranks
    prepare: Callable[[], None] | None = None
    held: bool = True  # it holds the folder, so that exit.json tells of its end
    cut: bool = False  # a power cut: as soon as a rank has ended, all are killed
    resumed: bool = False
    also: Callable[["Played"], None] | None = None  # looks at the rest
    tier: str = ""  # "default" for the one real process of its kind, "process" for what is slow in this one

    @property
    def real(self) -> bool:
        """Whether it takes processes of its own."""
        alone = len(self.codes) == 1 and self.prepare is None and self.tier != "default"
        return not alone or bool(DEADLY.search(self.fault))

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Its tier, and the place of what starts several ranks."""
        variant = (self.tier or ("process" if self.real else "default")) == "process"
        return [pytest.mark.process] * variant + [pytest.mark.ranks] * (len(self.codes) > 1)


def each(table: Mapping[str, Scenario]) -> pytest.MarkDecorator:
    """Have a test play every scenario of a table, each in its tier."""
    lines = [pytest.param(scenario, id=name, marks=scenario.marks) for name, scenario in table.items()]
    return pytest.mark.parametrize("scenario", lines)


def case(*values: Any, default: bool = False) -> Any:
    """The parameters of a test; with a number above 1 it starts several ranks. Of the process tier, or the default."""
    several = any(isinstance(value, int) and value > 1 for value in values)
    return pytest.param(*values, marks=[pytest.mark.process] * (not default) + [pytest.mark.ranks] * several)


def ranks(*worlds: int) -> pytest.MarkDecorator:
    """Have a test run on so many ranks, as processes; it is of the process tier."""
    return pytest.mark.parametrize("world", [case(world) for world in worlds])


@dataclass(frozen=True)
class Played:
    """A scenario that was played."""

    run: Path
    codes: list[int]
    screens: list[str]  # by rank

    @property
    def said(self) -> str:
        """What all ranks said."""
        return "".join(self.screens)

    def lines(self, rank: int = 0) -> list[str]:
        """What a rank said, without the noise."""
        return [line for line in self.screens[rank].splitlines() if line and not line.startswith(NOISE)]


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

    def at(self, name: str) -> "Stage":
        """Another run beside this one."""
        return replace(self, folder=self.folder / name)

    def words(self, *more: str) -> list[str]:
        """The command."""
        return tiny_runs.words(self.shards, self.run, *more)

    def start(self, world: int = 1, fault: str = "", words: tuple[str, ...] = (), **more: object) -> Start:
        """The command as processes, for what has to happen while they run."""
        return Start(self.words(*words), self.folder / "logs", world, fault, **more)  # type: ignore[arg-type]

    def begin(self, scenario: Scenario) -> Played:
        """Start and wait."""
        if not scenario.real:
            before = multiprocessing.active_children()
            end = call("pretrain", self.words(*scenario.words), SSL_VIT_FAULT=scenario.fault)
            gc.collect()  # the iterator of a training that failed, with which its loader workers end
            for worker in set(multiprocessing.active_children()) - set(before):
                worker.join(LIMIT)
                assert not Path(f"/proc/{worker.pid}").exists()
            return Played(self.run, [end.code], [end.said])
        given = {"alone": dict(scenario.alone), "prepare": scenario.prepare}
        start = self.start(len(scenario.codes), scenario.fault, scenario.words, **given)
        if scenario.cut:
            start.until(lambda: any(process.exitcode is not None for process in start.processes), LIMIT)
            start.kill()
        codes = start.wait(LIMIT)
        if NOT_ALLOWED in codes:
            pytest.skip("mounts of one's own are not allowed here")
        assert start.orphans == [], start.said()
        return Played(self.run, codes, [start.said(rank) for rank in range(len(codes))])

    def play(self, scenario: Scenario) -> Played:
        """Let it happen, and see that all came as it must."""
        played = self.begin(scenario)
        if scenario.cut:
            assert KILLED in played.codes, f"{scenario.fault} was not reached: {played.said}"
        else:
            assert played.codes == list(scenario.codes), played.said
        if scenario.line:
            _check_words(scenario, played)
        if scenario.saved is not None:
            assert tiny_runs.saved(self.run)[-1:] == ([scenario.saved] if scenario.saved else [])
            assert not scenario.saved or checkpoint.flaw(tiny_runs.last(self.run)) is None
        if scenario.also is not None:
            scenario.also(played)
        if scenario.resumed:
            self.finish(len(scenario.codes), *scenario.words)
            self.as_in_peace(self.tiny_run(len(scenario.codes)))
        return played

    def stop(self, place: str, *words: str) -> None:
        """End a start of one rank at a place, in this process; on the disk it is as after a kill there."""
        self.play(Scenario((70,), f"raise:point={place}", "RuntimeError: injected", says=("Traceback",), words=words))

    def finish(self, world: int = 1, *words: str) -> str:
        """Give the command once more, with nothing in its way; what it said."""
        return self.play(Scenario((0,) * world, words=words)).said

    def as_in_peace(self, peace: Path) -> None:
        """The finished run has the bits of another one, and nothing is left behind."""
        self.same_bits(peace)
        assert tiny_runs.names(self.run) == tiny_runs.names(peace)

    def same_bits(self, peace: Path) -> None:
        """The finished run has the bits of another one."""
        assert tiny_runs.differing(tiny_runs.results(peace), tiny_runs.results(self.run)) == {}


def _check_words(scenario: Scenario, played: Played) -> None:
    """One line by one rank, with all that was promised, and the same in exit.json; no traceback but an asked one."""
    lines = played.lines(scenario.by)
    assert re.search(scenario.line, lines[-1]), played.said
    assert all(re.search(pattern, played.screens[scenario.by]) for pattern in scenario.says), played.said
    assert scenario.says or len(lines) == 1, played.said
    for rank, screen in enumerate(played.screens):
        if rank != scenario.by:
            assert re.search(scenario.others, screen) if scenario.others else played.lines(rank) == [], played.said
    assert "Traceback" not in played.said or "Traceback" in scenario.says, played.said
    if scenario.held:
        told = tiny_runs.told(played.run)
        assert (told["code"], told["rank"]) == (scenario.codes[scenario.by], scenario.by)
        assert told["reason"] in lines[-1]
