"""A soak: runs that all kinds of faults happen to, until they are done, compared bit for bit with one in peace.

    python -m tests.chaos minutes=10 seed=0 [only=LIFE]

Every life is one run of 1 or 2 ranks: the same command again and again, most times with a fault. What is promised and
does not hold is printed with the words that repeat it, and the soak ends with 1.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pydantic import Field

from ssl_vit import config
from ssl_vit.data.shards import MakeShards, convert
from ssl_vit.exits import CANNOT_CREATE, DISK, INTEGRITY, INTERNAL, PREEMPTED
from ssl_vit.train import checkpoint
from tests import runs
from tests.conftest import draw_squares
from tests.starts import Start

FAULTY = 6  # starts of a life that may meet a fault; the one after them is left in peace
SPAN = {1: 1.5, 2: 2.2}  # seconds in which a fault from outside comes
WAIT = 90.0  # seconds after which a start hangs
LATE = 25.0  # seconds from a signal to the end
STEPS = 60
WORDS = [f"steps={STEPS}", "timeout=8", "data.timeout=4"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PLACES = "batch loss weights update row eval.batch save.begin save.mid save.written save.published save.pruned"
ONCE = "claimed resume.chosen resume.loaded finish"
PROMISED: tuple[str, ...] = ("bits differing", "manual actions", "good samples lost", "orphan processes")
KILLED, DONE = -9, 0


class Soak(config.Config):
    """How long, and from which seed on."""

    minutes: float = Field(default=10.0, gt=0, description="of the soak")
    seed: int = Field(default=0, ge=0, description="of all faults")
    only: int | None = Field(default=None, ge=0, description="the life to repeat")


class Broken(Exception):
    """A promise that did not hold."""


@dataclass
class Life:
    """One run, from its first start to its end."""

    number: int
    world: int
    random: Random
    shards: Path
    folder: Path
    start: Start | None = None
    starts: int = 0
    resumed: int = 0  # the step that the last start went on from
    steps: int = 0  # done in all starts together, as far as rows and exit.json tell
    orphans: int = 0
    seconds: float = 0.0
    met: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def words(self) -> list[str]:
        return runs.words(self.shards, self.run, *WORDS)

    def rank(self) -> int:
        return self.random.randrange(self.world)

    def sleep(self) -> bool:
        """Wait for a random moment of the start; whether it is still running then."""
        assert self.start is not None
        end = time.monotonic() + self.random.uniform(0, SPAN[self.world])
        while self.start.running and time.monotonic() < end:
            time.sleep(0.002)
        return self.start.running

    def sound(self) -> list[Path]:
        return [folder for folder in checkpoint.steps(self.run / "checkpoints") if checkpoint.flaw(folder) is None]

    def reached(self) -> int:
        """The step that the run came to, from the rows and exit.json."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines[-1:] if line.endswith(b"}")]
        told = runs.told(self.run)["step"] if (self.run / "exit.json").exists() else 0
        return max([told, *(row["step"] for row in rows)])

    def go(self, fault: "Fault", before: str = "") -> list[int]:
        """One start with a fault, perhaps after a damage; its exit codes."""
        damaged = DAMAGES[before](self) if before else False
        self.resumed = int(self.sound()[-1].name[-8:]) if self.sound() else 0
        began = time.monotonic()
        variable = fault.variable(self)
        self.start = Start(self.words, self.folder / "logs", self.world, variable)
        self.starts += 1
        fault.during(self)
        codes = self.start.wait(WAIT)
        self.seconds += time.monotonic() - began
        self.steps += max(0, self.reached() - self.resumed)
        self.orphans += len(self.start.orphans)
        self.met.update([before] * damaged + [fault.name] * (set(codes) != {DONE} or fault.quiet))
        what = f"{f'{before}, ' if before else ''}{fault.name}{f' ({variable})' if variable else ''}"
        print(f"life {self.number}, {self.world} ranks, start {self.starts}: {what}: {codes}", flush=True)
        if not set(codes) <= {DONE, *fault.ends}:
            raise Broken(f"{what} ended with {codes}:\n{self.start.said()}")
        return codes


@dataclass
class Fault:
    """What happens to a start: to it from outside, or in it at a place; and how it may end."""

    name: str
    ends: set[int]
    during: Callable[[Life], None] = lambda life: None
    variable: Callable[[Life], str] = lambda life: ""
    worlds: tuple[int, ...] = (1, 2)
    quiet: bool = False  # it may have happened though the start ended well


def kill_all(life: Life) -> None:
    if life.sleep() and life.start:
        life.start.kill()


def kill_one(life: Life) -> None:
    if met(life) and life.sleep() and life.start:
        life.start.signal(signal.SIGKILL, life.rank())


def met(life: Life) -> bool:
    """Wait until the ranks have met and hold the folder; before that, only a launcher can see that one is gone."""
    start = life.start
    assert start is not None
    while start.running and not runs.holds(start, life.run):
        time.sleep(0.005)
    return start.running


def signal_some(everyone: bool) -> Callable[[Life], None]:
    def during(life: Life) -> None:
        while life.start and not life.start.hears():
            time.sleep(0.002)
        if life.sleep() and life.start:
            sent = time.monotonic()
            life.start.signal(life.random.choice(SIGNALS), None if everyone else life.rank())
            life.start.wait(WAIT)
            if (lasted := max(life.start.ended.values()) - sent) > LATE:
                raise Broken(f"{lasted:.1f} s from a signal to the end: {life.start.said()}")

    return during


def signal_twice(life: Life) -> None:
    """During a save that hangs: the second signal ends what the first one cannot."""
    start = life.start
    assert start is not None
    draft, began = life.run / "checkpoints" / ".step-00000014.tmp", time.time()
    while start.running and not (draft.exists() and draft.stat().st_mtime > began):  # not one that was left behind
        time.sleep(0.01)
    for _ in range(2):
        start.signal(signal.SIGTERM)
        time.sleep(5.5)


def stop(life: Life) -> None:
    """A process alone goes on after it; of two, the other one sees it and ends it."""
    if met(life) and life.sleep() and life.start:
        rank = life.rank()
        life.start.signal(signal.SIGSTOP, rank)
        if life.world == 1:
            time.sleep(0.3)
            life.start.signal(signal.SIGCONT, rank)


def to_worker(number: int) -> Callable[[Life], None]:
    def during(life: Life) -> None:
        if life.sleep() and life.start and (workers := life.start.workers(life.rank())):
            try:
                os.kill(life.random.choice(workers), number)
            except ProcessLookupError:
                return

    return during


def injected(actions: str, places: str) -> Callable[[Life], str]:
    """At one of the places, soon after the step that the start goes on from."""

    def variable(life: Life) -> str:
        action, place = life.random.choice(actions.split()), life.random.choice(places.split())
        step = life.random.randrange(min(life.resumed, STEPS - 1), STEPS)
        return f"{action}:point={place}:rank={life.rank()}:step={step}-{step + 6}:seconds=0.5"

    return variable


def at_any(actions: str) -> Callable[[Life], str]:
    """At places that have no step, or that come once."""
    draw = lambda life, names: life.random.choice(names.split())  # noqa: E731
    return lambda life: f"{draw(life, actions)}:point={draw(life, ONCE)}:rank={life.rank()}"


def flip(life: Life) -> str:
    step = life.random.randrange(min(life.resumed, STEPS - 1), STEPS) + 1
    return f"flip:point=weights:rank=1:step={step}"


def damage(cut: bool) -> Callable[[Life], bool]:
    """A bit flipped, or a file cut, in the newest checkpoint; where it is the only one, nothing could bear that."""

    def before(life: Life) -> bool:
        folders = life.sound()
        if len(folders) > 1:
            path = life.random.choice(sorted(folders[-1].iterdir()))
            content = bytearray(path.read_bytes())
            place = life.random.randrange(len(content))
            content[place] ^= 1 << life.random.randrange(8)
            path.write_bytes(content[:place] if cut else content)
        return len(folders) > 1

    return before


def leave_drafts(life: Life) -> bool:
    for name in (".step-00000007.tmp", ".step-00000099.tmp", ".step-00000001.trash"):
        (life.run / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (life.run / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    return True


def spoil_latest(life: Life) -> bool:
    (life.run / "checkpoints").mkdir(parents=True, exist_ok=True)
    text = life.random.choice(["", "../../x", "step-99999999", "\0\xff", str(life.folder)])
    (life.run / "checkpoints" / "latest").write_text(text)
    return True


def spoil_rows(life: Life) -> bool:
    """What a row that was being written when the power went may look like."""
    there = (life.run / "metrics.jsonl").exists()
    if there:
        with (life.run / "metrics.jsonl").open("ab") as file:
            file.write(life.random.choice([b'{"step": 9, "lo', b"\0" * 40, b"\xff\xfe{", b"\n\n", b'"a"\n[1]\nnull\n']))
    return there


def second_start(life: Life) -> None:
    if met(life) and life.start and life.start.running:
        other = Start(life.words, life.folder / "logs", life.world)
        while other.running and life.start.running:
            time.sleep(0.01)
        held = life.start.running
        codes = other.wait(WAIT)
        if held and codes != [CANNOT_CREATE] * life.world:
            raise Broken(f"a second start on the folder ended with {codes}:\n{other.said()}")


FAULTS = [
    Fault("none", set()),
    Fault("kill -9 of all", {KILLED}, kill_all),
    Fault("kill -9 of a rank", {KILLED, INTERNAL}, kill_one),
    Fault("signal to a rank", {PREEMPTED}, signal_some(False)),
    Fault("signal to all", {PREEMPTED}, signal_some(True)),
    Fault(
        "second signal",
        {PREEMPTED, 128 + signal.SIGTERM, INTERNAL},
        signal_twice,
        lambda life: "hang:point=save.mid:rank=0:step=14",
    ),
    Fault("SIGSTOP of a rank", {KILLED, INTERNAL}, stop, quiet=True),
    Fault("kill -9 of a worker", {INTERNAL}, to_worker(signal.SIGKILL)),
    Fault("SIGSTOP of a worker", {INTERNAL}, to_worker(signal.SIGSTOP)),
    Fault("killed at a place", {KILLED, INTERNAL}, variable=injected("kill", PLACES)),
    Fault("error at a place", {INTERNAL, DISK}, variable=injected("raise oom enospc eio", PLACES)),
    Fault("slow at a place", set(), variable=injected("sleep", PLACES), quiet=True),
    Fault("signal at a place", {PREEMPTED}, variable=injected("term int usr1 usr2", PLACES)),
    Fault("fault of a worker", {INTERNAL}, variable=injected("kill abort raise stop hang", "sample")),
    Fault("killed at the start or end", {KILLED, INTERNAL}, variable=at_any("kill")),
    Fault("error at the start or end", {INTERNAL, DISK, CANNOT_CREATE}, variable=at_any("raise enospc eacces")),
    Fault("flipped weight", {INTEGRITY}, variable=flip, worlds=(2,)),
    Fault("second start", set(), second_start, quiet=True),
]


DAMAGES = {
    "bit flipped in a checkpoint": damage(cut=False),
    "file cut in a checkpoint": damage(cut=True),
    "leftover drafts": leave_drafts,
    "latest overwritten": spoil_latest,
    "torn row of metrics": spoil_rows,
}


def live(life: Life, reference: dict[str, bytes]) -> dict[str, int]:
    """Start until the run is done; what is left to find fault with."""
    able = [fault for fault in FAULTS if life.world in fault.worlds]
    for _ in range(FAULTY):
        before = life.random.choice(["", *DAMAGES])
        if set(life.go(life.random.choice(able), before)) == {DONE}:
            break
    manual = 0
    while set(codes := life.go(FAULTS[0])) != {DONE}:
        manual += 1
        if manual == 2:
            raise Broken(f"a start in peace ended with {codes}")
    found = runs.differing(reference, runs.results(life.run))
    if hidden := sorted(path.name for path in (life.run / "checkpoints").glob(".*")):
        raise Broken(f"left behind: {hidden}")
    lost = runs.lost_samples(life.run, life.shards, STEPS)
    return dict(zip(PROMISED, (sum(found.values()), manual, lost), strict=False))


def report(lives: list[Life], sums: dict[str, int], peace: dict[int, float], seed: int) -> None:
    """The table."""
    starts, steps = sum(life.starts for life in lives), sum(life.steps for life in lives)
    needed = STEPS * len(lives)
    seconds, least = sum(life.seconds for life in lives), sum(peace[life.world] for life in lives)
    rows: dict[str, object] = {"runs": len(lives), "starts": starts, **sums, "steps done": steps}
    rows["steps done twice"] = f"{max(0, steps - needed)} ({max(0, steps - needed) / needed:.0%} of {needed})"
    rows["seconds"] = f"{seconds:.0f}, in peace {least:.0f}: {(seconds - least) / max(1, starts):.2f} more a start"
    met = sum((life.met for life in lives), Counter[str]())
    rows |= {f"survived: {name}": count for name, count in sorted(met.items())}
    rows["seed"] = seed
    print("\n".join(f"{name:<40}{value}" for name, value in rows.items()))


def soak(asked: Soak, folder: Path) -> int:
    """Lives until the time is up; prints the table and returns the exit code."""
    draw_squares(folder / "squares")
    options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
    convert(MakeShards(input=str(folder / "squares"), output=str(folder / "shards"), **options))
    reference: dict[int, dict[str, bytes]] = {}
    peace: dict[int, float] = {}
    for world in (1, 2):
        began = time.monotonic()
        reference[world] = runs.results(runs.straight(folder / "shards", world, folder / f"straight-{world}", *WORDS))
        peace[world] = time.monotonic() - began
    sums = dict.fromkeys(PROMISED, 0)
    lives: list[Life] = []
    bad, end = "", time.monotonic() + 60 * asked.minutes
    while not bad and (time.monotonic() < end if asked.only is None else not lives):
        number = len(lives) + (asked.only or 0)
        seed = Random(f"{asked.seed}-{number}")
        life = Life(number, 1 + number % 2, seed, folder / "shards", folder / f"life-{number}")
        lives.append(life)
        try:
            found = live(life, reference[life.world]) | {"orphan processes": life.orphans}
            sums = {name: sums[name] + found[name] for name in PROMISED}
            bad = str(found) if any(found.values()) else ""
        except Broken as error:
            bad = str(error)
    report(lives, sums, peace, asked.seed)
    if bad:
        print(f"a promise does not hold: {bad}\nagain: python -m tests.chaos seed={asked.seed} only={lives[-1].number}")
    return 1 if bad else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(soak(config.parse(Soak, sys.argv[1:], Path()), Path(temporary)))
