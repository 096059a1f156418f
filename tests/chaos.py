"""A soak: runs that all kinds of faults happen to, until they are done, compared bit for bit with one in peace.

    python -m tests.chaos minutes=10 seed=0 [only=LIFE]

Every life is one run of 1 or 2 ranks: the same command again and again, most times with a fault. What is promised and
does not hold is printed with the words that repeat it, and the soak ends with 1.
"""

import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pydantic import Field

from ssl_vit import config
from ssl_vit.convert.make_shards import MakeShards, convert
from ssl_vit.errors import CANNOT_CREATE, DISK, INTEGRITY, INTERNAL, PREEMPTED
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.conftest import draw_squares
from tests.starts import Start

FAULTY = 6  # starts of a life that may meet a fault; the one after them is left in peace
SPAN = {1: 1.5, 2: 2.2}  # seconds in which a fault from outside comes
WAIT, LATE = 90.0, 25.0  # seconds after which a start hangs; from a signal to the end
STEPS = 60
WORDS = [f"steps={STEPS}", "timeout=8", "data.timeout=4"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PLACES = "batch loss weights update row eval.batch save.begin save.mid save.written save.published save.pruned"
ONCE = "claimed resume.chosen resume.loaded finish"
KILLED, DONE = -9, 0


class Soak(config.Config):
    """How long, and from which seed on."""

    minutes: float = Field(default=10.0, gt=0, description="of the soak")
    seed: int = Field(default=0, ge=0, description="of all faults")
    only: int | None = Field(default=None, ge=0, description="the life to repeat")


class Life:
    """One run, from its first start to its end; a promise that does not hold is an AssertionError."""

    start: Start

    def __init__(self, number: int, seed: int, root: Path):
        self.number, self.world = number, 1 + number % 2
        self.random = Random(f"{seed}-{number}")
        self.shards, self.folder = root / "shards", root / f"life-{number}"
        self.run = self.folder / "run"
        self.words = tiny_runs.words(self.shards, self.run, *WORDS)
        self.resumed = 0  # the step that the last start went on from
        self.starts = self.orphans = 0
        self.steps = 0  # done in all starts together, as far as rows and exit.json tell
        self.seconds = 0.0
        self.met = Counter[str]()

    def rank(self) -> int:
        return self.random.randrange(self.world)

    def step(self) -> int:
        """Soon after the step that the start goes on from."""
        return self.random.randrange(min(self.resumed, STEPS - 1), STEPS)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it while the start runs; whether the start is still running then."""
        while self.start.running and not condition():
            time.sleep(0.002)
        return self.start.running

    def meet(self) -> bool:
        """Until the ranks hold the folder; see `runs.holds`."""
        return self.until(lambda: tiny_runs.holds(self.start, self.run))

    def sleep(self, met: bool = False) -> bool:
        """Until a random moment of the start, or of the time after they have met."""
        end = time.monotonic() + self.random.uniform(0, SPAN[self.world]) if not met or self.meet() else 0
        return self.until(lambda: time.monotonic() >= end)

    def sound(self) -> list[Path]:
        return [folder for folder in checkpoint.steps(self.run / "checkpoints") if checkpoint.flaw(folder) is None]

    def reached(self) -> int:
        """The step that the run came to, from the rows and exit.json."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines[-1:] if line.endswith(b"}")]
        told = tiny_runs.told(self.run)["step"] if (self.run / "exit.json").exists() else 0
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
        assert set(codes) <= {DONE, *fault.ends}, f"{what} ended with {codes}:\n{self.start.said()}"
        return codes


@dataclass
class Fault:
    """What happens to a start: to it from outside, or in it at a place; and how it may end."""

    name: str
    ends: set[int]
    during: Callable[[Life], object] = lambda life: None
    variable: Callable[[Life], str] = lambda life: ""
    worlds: tuple[int, ...] = (1, 2)
    quiet: bool = False  # it may have happened though the start ended well


def signal_some(life: Life, everyone: bool) -> None:
    life.until(life.start.hears)
    if life.sleep():
        sent = time.monotonic()
        life.start.signal(life.random.choice(SIGNALS), None if everyone else life.rank())
        life.start.wait(WAIT)
        lasted = max(life.start.ended.values()) - sent
        assert lasted <= LATE, f"{lasted:.1f} s from a signal to the end: {life.start.said()}"


def signal_twice(life: Life) -> None:
    """During a save that hangs: the second signal ends what the first one cannot."""
    draft, began = life.run / "checkpoints" / ".step-00000014.tmp", time.time()
    life.until(lambda: draft.exists() and draft.stat().st_mtime > began)  # not one that was left behind
    for _ in range(2):
        life.start.signal(signal.SIGTERM)
        time.sleep(5.5)


def stop(life: Life) -> None:
    """A process alone goes on after it; of two, the other one sees it and ends it."""
    if life.sleep(True):
        rank = life.rank()
        life.start.signal(signal.SIGSTOP, rank)
        if life.world == 1:
            time.sleep(0.3)
            life.start.signal(signal.SIGCONT, rank)


def second_start(life: Life) -> None:
    if life.meet():
        other = Start(life.words, life.folder / "logs", life.world)
        life.until(lambda: not other.running)
        held = life.start.running
        codes = other.wait(WAIT)
        refused = codes == [CANNOT_CREATE] * life.world
        assert refused or not held, f"a second start on the folder ended with {codes}:\n{other.said()}"


def injected(actions: str, places: str = PLACES) -> Callable[[Life], str]:
    """At one of the places; those of a step soon after the one that the start goes on from."""

    def variable(life: Life) -> str:
        action, place = (life.random.choice(names.split()) for names in (actions, places))
        steps = "" if places == ONCE else f":step={(step := life.step())}-{step + 6}:seconds=0.5"
        return f"{action}:point={place}:rank={life.rank()}{steps}"

    return variable


HANGS = "hang:point=save.mid:rank=0:step=14"
FLIP = "flip:point=weights:rank=1:step="
FAULTS = [
    Fault("none", set()),
    Fault("kill -9 of all", {KILLED}, lambda life: life.sleep() and life.start.kill()),
    Fault("kill -9 of a rank", {KILLED, INTERNAL}, lambda life: life.sleep(True) and life.start.signal(9, life.rank())),
    Fault("signal to a rank", {PREEMPTED}, lambda life: signal_some(life, False)),
    Fault("signal to all", {PREEMPTED}, lambda life: signal_some(life, True)),
    Fault("second signal", {PREEMPTED, 128 + signal.SIGTERM, INTERNAL}, signal_twice, lambda life: HANGS),
    Fault("SIGSTOP of a rank", {KILLED, INTERNAL}, stop, quiet=True),
    Fault("killed at a place", {KILLED, INTERNAL}, variable=injected("kill")),
    Fault("error at a place", {INTERNAL, DISK}, variable=injected("raise oom enospc eio")),
    Fault("slow at a place", set(), variable=injected("sleep"), quiet=True),
    Fault("signal at a place", {PREEMPTED}, variable=injected("term int usr1 usr2")),
    Fault("fault of a worker", {INTERNAL}, variable=injected("kill abort raise stop hang", "sample")),
    Fault("killed at the start or end", {KILLED, INTERNAL}, variable=injected("kill", ONCE)),
    Fault("error at the start or end", {INTERNAL, DISK, CANNOT_CREATE}, variable=injected("raise enospc eacces", ONCE)),
    Fault("flipped weight", {INTEGRITY}, variable=lambda life: f"{FLIP}{life.step() + 1}", worlds=(2,)),
    Fault("second start", set(), second_start, quiet=True),
]


def damage(life: Life, cut: bool) -> bool:
    """A bit flipped, or a file cut, in the newest checkpoint; where it is the only one, nothing could bear that."""
    folders = life.sound()
    if len(folders) > 1:
        path = life.random.choice(sorted(folders[-1].iterdir()))
        content = bytearray(path.read_bytes())
        place = life.random.randrange(len(content))
        content[place] ^= 1 << life.random.randrange(8)
        path.write_bytes(content[:place] if cut else content)
    return len(folders) > 1


def spoil(path: Path, data: bytes, mode: str = "wb") -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.write(data)
    return True


DRAFTS = [f"checkpoints/.step-{name}/model.safetensors" for name in ("00000007.tmp", "00000099.tmp", "00000001.trash")]
HINTS = (b"", b"../../x", b"step-99999999", b"\0\xc3\xbf", b"/tmp")
TORN = (b'{"step": 9, "lo', b"\0" * 40, b"\xff\xfe{", b"\n\n", b'"a"\n[1]\nnull\n')  # when the power went in a row
DAMAGES: dict[str, Callable[[Life], bool]] = {
    "bit flipped in a checkpoint": lambda life: damage(life, cut=False),
    "file cut in a checkpoint": lambda life: damage(life, cut=True),
    "leftover drafts": lambda life: all(spoil(life.run / name, b"half") for name in DRAFTS),
    "latest overwritten": lambda life: spoil(life.run / "checkpoints" / "latest", life.random.choice(HINTS)),
    "torn row of metrics": lambda life: (
        (life.run / "metrics.jsonl").exists() and spoil(life.run / "metrics.jsonl", life.random.choice(TORN), "ab")
    ),
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
        assert manual < 2, f"a start in peace ended with {codes}"
    found = tiny_runs.differing(reference, tiny_runs.results(life.run))
    hidden = sorted(path.name for path in (life.run / "checkpoints").glob(".*"))
    assert not hidden, f"left behind: {hidden}"
    lost = tiny_runs.lost_samples(life.run, life.shards, STEPS)
    return {"bits differing": sum(found.values()), "manual actions": manual, "good samples lost": lost}


def soak(asked: Soak, folder: Path) -> int:
    """Lives until the time is up; prints the table and returns the exit code."""
    draw_squares(folder / "squares")
    options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
    convert(MakeShards(input=str(folder / "squares"), output=str(folder / "shards"), **options))
    reference, peace = {}, {}
    for world in (1, 2):
        began = time.monotonic()
        reference[world] = tiny_runs.results(
            tiny_runs.straight(folder / "shards", world, folder / f"straight-{world}", *WORDS)
        )
        peace[world] = time.monotonic() - began
    sums, lives = Counter[str](), list[Life]()
    bad, end = "", time.monotonic() + 60 * asked.minutes
    while not bad and (time.monotonic() < end if asked.only is None else not lives):
        life = Life(len(lives) + (asked.only or 0), asked.seed, folder)
        lives.append(life)
        try:
            found = live(life, reference[life.world]) | {"orphan processes": life.orphans}
            sums.update(found)
            bad = str(found) if any(found.values()) else ""
        except AssertionError as error:
            bad = str(error)
    starts, steps, seconds = (sum(getattr(life, name) for life in lives) for name in ("starts", "steps", "seconds"))
    needed, least = STEPS * len(lives), sum(peace[life.world] for life in lives)
    twice, met = max(0, steps - needed), sum((life.met for life in lives), Counter[str]())
    rows: dict[str, object] = {"runs": len(lives), "starts": starts, **sums, "steps done": steps}
    rows["steps done twice"] = f"{twice} ({twice / needed:.0%} of {needed})"
    rows["seconds"] = f"{seconds:.0f}, in peace {least:.0f}: {(seconds - least) / max(1, starts):.2f} more a start"
    rows |= {f"survived: {name}": count for name, count in sorted(met.items())} | {"seed": asked.seed}
    print("\n".join(f"{name:<40}{value}" for name, value in rows.items()))
    if bad:
        print(f"a promise does not hold: {bad}\nagain: python -m tests.chaos seed={asked.seed} only={lives[-1].number}")
    return 1 if bad else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(soak(config.parse(Soak, sys.argv[1:], Path()), Path(temporary)))
