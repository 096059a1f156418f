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
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.errors import ExitCode
from ssl_vit.train import checkpoint
from tests import tiny_runs
from tests.conftest import draw_squares
from tests.processes import Start

MAX_FAULTY_STARTS = 6  # starts of a life that may meet a fault; the one after them is left in peace
FAULT_WINDOW = {1: 1.5, 2: 2.2}  # seconds in which a fault from outside comes
START_TIMEOUT, SIGNAL_TIMEOUT = 90.0, 25.0  # seconds after which a start hangs; from a signal to the end
STEPS = 60
SOAK_ARGS = [f"steps={STEPS}", "timeout=8", "data.timeout=4"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
FAULT_POINTS = "batch loss weights update row eval.batch save.begin save.mid save.written save.published save.pruned"
SINGLE_POINTS = "claimed resume.chosen resume.loaded finish"
KILLED, SUCCESS = -9, 0


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
        self.args = tiny_runs.run_args(self.shards, self.run, *SOAK_ARGS)
        self.resume_step = 0  # the step that the last start went on from
        self.starts = self.orphans = 0
        self.steps = 0  # done in all starts together, as far as rows and exit.json tell
        self.seconds = 0.0
        self.fault_counts = Counter[str]()

    def rank(self) -> int:
        return self.random.randrange(self.world)

    def step(self) -> int:
        """Soon after the step that the start goes on from."""
        return self.random.randrange(min(self.resume_step, STEPS - 1), STEPS)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it while the start runs; whether the start is still running then."""
        while self.start.running and not condition():
            time.sleep(0.002)
        return self.start.running

    def wait_for_lock(self) -> bool:
        """Until the ranks hold the folder; see `runs.holds`."""
        return self.wait_until(lambda: tiny_runs.holds_lock(self.start, self.run))

    def sleep(self, locked: bool = False) -> bool:
        """Until a random moment of the start, or of the time after they have met."""
        deadline = (
            time.monotonic() + self.random.uniform(0, FAULT_WINDOW[self.world])
            if not locked or self.wait_for_lock()
            else 0
        )
        return self.wait_until(lambda: time.monotonic() >= deadline)

    def valid_checkpoints(self) -> list[Path]:
        return [
            folder
            for folder in checkpoint.list_checkpoints(self.run / "checkpoints")
            if checkpoint.find_corruption(folder) is None
        ]

    def last_step(self) -> int:
        """The step that the run came to, from the rows and exit.json."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines[-1:] if line.endswith(b"}")]
        exit_step = tiny_runs.read_exit(self.run)["step"] if (self.run / "exit.json").exists() else 0
        return max([exit_step, *(row["step"] for row in rows)])

    def start_once(self, fault: "Fault", damage_name: str = "") -> list[int]:
        """One start with a fault, perhaps after a damage; its exit codes."""
        is_damaged = DAMAGES[damage_name](self) if damage_name else False
        self.resume_step = int(self.valid_checkpoints()[-1].name[-8:]) if self.valid_checkpoints() else 0
        start_time = time.monotonic()
        variable = fault.variable(self)
        self.start = Start(self.args, self.folder / "logs", self.world, variable)
        self.starts += 1
        fault.action(self)
        codes = self.start.wait(START_TIMEOUT)
        self.seconds += time.monotonic() - start_time
        self.steps += max(0, self.last_step() - self.resume_step)
        self.orphans += len(self.start.orphans)
        self.fault_counts.update([damage_name] * is_damaged + [fault.name] * (set(codes) != {SUCCESS} or fault.quiet))
        description = f"{f'{damage_name}, ' if damage_name else ''}{fault.name}{f' ({variable})' if variable else ''}"
        print(f"life {self.number}, {self.world} ranks, start {self.starts}: {description}: {codes}", flush=True)
        assert set(codes) <= {SUCCESS, *fault.exit_codes}, f"{description} ended with {codes}:\n{self.start.output()}"
        return codes


@dataclass
class Fault:
    """What happens to a start: to it from outside, or in it at a place; and how it may end."""

    name: str
    exit_codes: set[int]
    action: Callable[[Life], object] = lambda life: None
    variable: Callable[[Life], str] = lambda life: ""
    worlds: tuple[int, ...] = (1, 2)
    quiet: bool = False  # it may have happened though the start ended well


def signal_some(life: Life, everyone: bool) -> None:
    life.wait_until(life.start.handles_signals)
    if life.sleep():
        signal_time = time.monotonic()
        life.start.signal(life.random.choice(SIGNALS), None if everyone else life.rank())
        life.start.wait(START_TIMEOUT)
        delay = max(life.start.end_times.values()) - signal_time
        assert delay <= SIGNAL_TIMEOUT, f"{delay:.1f} s from a signal to the end: {life.start.output()}"


def signal_twice(life: Life) -> None:
    """During a save that hangs: the second signal ends what the first one cannot."""
    draft, start_time = life.run / "checkpoints" / ".step-00000014.tmp", time.time()
    life.wait_until(lambda: draft.exists() and draft.stat().st_mtime > start_time)  # not one that was left behind
    for _ in range(2):
        life.start.signal(signal.SIGTERM)
        time.sleep(5.5)


def stop_rank(life: Life) -> None:
    """A process alone goes on after it; of two, the other one sees it and ends it."""
    if life.sleep(True):
        rank = life.rank()
        life.start.signal(signal.SIGSTOP, rank)
        if life.world == 1:
            time.sleep(0.3)
            life.start.signal(signal.SIGCONT, rank)


def second_start(life: Life) -> None:
    if life.wait_for_lock():
        second = Start(life.args, life.folder / "logs", life.world)
        life.wait_until(lambda: not second.running)
        still_running = life.start.running
        codes = second.wait(START_TIMEOUT)
        is_refused = codes == [ExitCode.CANNOT_CREATE] * life.world
        assert is_refused or not still_running, f"a second start on the folder ended with {codes}:\n{second.output()}"


def inject_fault(actions: str, points: str = FAULT_POINTS) -> Callable[[Life], str]:
    """At one of the places; those of a step soon after the one that the start goes on from."""

    def variable(life: Life) -> str:
        action, point = (life.random.choice(names.split()) for names in (actions, points))
        steps = "" if points == SINGLE_POINTS else f":step={(step := life.step())}-{step + 6}:seconds=0.5"
        return f"{action}:point={point}:rank={life.rank()}{steps}"

    return variable


HANG_FAULT = "hang:point=save.mid:rank=0:step=14"
FLIP_FAULT = "flip:point=weights:rank=1:step="
FAULTS = [
    Fault("none", set()),
    Fault("kill -9 of all", {KILLED}, lambda life: life.sleep() and life.start.kill()),
    Fault(
        "kill -9 of a rank",
        {KILLED, ExitCode.INTERNAL},
        lambda life: life.sleep(True) and life.start.signal(9, life.rank()),
    ),
    Fault("signal to a rank", {ExitCode.PREEMPTED}, lambda life: signal_some(life, False)),
    Fault("signal to all", {ExitCode.PREEMPTED}, lambda life: signal_some(life, True)),
    Fault(
        "second signal",
        {ExitCode.PREEMPTED, 128 + signal.SIGTERM, ExitCode.INTERNAL},
        signal_twice,
        lambda life: HANG_FAULT,
    ),
    Fault("SIGSTOP of a rank", {KILLED, ExitCode.INTERNAL}, stop_rank, quiet=True),
    Fault("killed at a place", {KILLED, ExitCode.INTERNAL}, variable=inject_fault("kill")),
    Fault("error at a place", {ExitCode.INTERNAL, ExitCode.DISK}, variable=inject_fault("raise oom enospc eio")),
    Fault("slow at a place", set(), variable=inject_fault("sleep"), quiet=True),
    Fault("signal at a place", {ExitCode.PREEMPTED}, variable=inject_fault("term int usr1 usr2")),
    Fault("fault of a worker", {ExitCode.INTERNAL}, variable=inject_fault("kill abort raise stop hang", "sample")),
    Fault("killed at the start or end", {KILLED, ExitCode.INTERNAL}, variable=inject_fault("kill", SINGLE_POINTS)),
    Fault(
        "error at the start or end",
        {ExitCode.INTERNAL, ExitCode.DISK, ExitCode.CANNOT_CREATE},
        variable=inject_fault("raise enospc eacces", SINGLE_POINTS),
    ),
    Fault("flipped weight", {ExitCode.INTEGRITY}, variable=lambda life: f"{FLIP_FAULT}{life.step() + 1}", worlds=(2,)),
    Fault("second start", set(), second_start, quiet=True),
]


def damage_checkpoint(life: Life, truncate: bool) -> bool:
    """A bit flipped, or a file cut, in the newest checkpoint; where it is the only one, nothing could bear that."""
    folders = life.valid_checkpoints()
    if len(folders) > 1:
        path = life.random.choice(sorted(folders[-1].iterdir()))
        content = bytearray(path.read_bytes())
        offset = life.random.randrange(len(content))
        content[offset] ^= 1 << life.random.randrange(8)
        path.write_bytes(content[:offset] if truncate else content)
    return len(folders) > 1


def overwrite(path: Path, data: bytes, mode: str = "wb") -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.write(data)
    return True


DRAFTS = [f"checkpoints/.step-{name}/model.safetensors" for name in ("00000007.tmp", "00000099.tmp", "00000001.trash")]
BAD_HINTS = (b"", b"../../x", b"step-99999999", b"\0\xc3\xbf", b"/tmp")
TORN_ROWS = (b'{"step": 9, "lo', b"\0" * 40, b"\xff\xfe{", b"\n\n", b'"a"\n[1]\nnull\n')  # when the power went in a row
DAMAGES: dict[str, Callable[[Life], bool]] = {
    "bit flipped in a checkpoint": lambda life: damage_checkpoint(life, truncate=False),
    "file cut in a checkpoint": lambda life: damage_checkpoint(life, truncate=True),
    "leftover drafts": lambda life: all(overwrite(life.run / name, b"half") for name in DRAFTS),
    "latest overwritten": lambda life: overwrite(life.run / "checkpoints" / "latest", life.random.choice(BAD_HINTS)),
    "torn row of metrics": lambda life: (
        (life.run / "metrics.jsonl").exists()
        and overwrite(life.run / "metrics.jsonl", life.random.choice(TORN_ROWS), "ab")
    ),
}


def run_life(life: Life, reference: dict[str, bytes]) -> dict[str, int]:
    """Start until the run is done; what is left to find fault with."""
    candidates = [fault for fault in FAULTS if life.world in fault.worlds]
    for _ in range(MAX_FAULTY_STARTS):
        damage_name = life.random.choice(["", *DAMAGES])
        if set(life.start_once(life.random.choice(candidates), damage_name)) == {SUCCESS}:
            break
    manual_restarts = 0
    while set(codes := life.start_once(FAULTS[0])) != {SUCCESS}:
        manual_restarts += 1
        assert manual_restarts < 2, f"a start in peace ended with {codes}"
    differences = tiny_runs.differing_bits(reference, tiny_runs.run_bits(life.run))
    leftovers = sorted(path.name for path in (life.run / "checkpoints").glob(".*"))
    assert not leftovers, f"left behind: {leftovers}"
    num_lost = tiny_runs.lost_samples(life.run, life.shards, STEPS)
    return {
        "bits differing": sum(differences.values()),
        "manual actions": manual_restarts,
        "good samples lost": num_lost,
    }


def run_soak(soak_config: Soak, folder: Path) -> int:
    """Lives until the time is up; prints the table and returns the exit code."""
    draw_squares(folder / "squares")
    options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
    convert_images(MakeShards(input=str(folder / "squares"), output=str(folder / "shards"), **options))
    reference, baseline_seconds = {}, {}
    for world in (1, 2):
        start_time = time.monotonic()
        reference[world] = tiny_runs.run_bits(
            tiny_runs.run_straight(folder / "shards", world, folder / f"straight-{world}", *SOAK_ARGS)
        )
        baseline_seconds[world] = time.monotonic() - start_time
    sums, lives = Counter[str](), list[Life]()
    failure, deadline = "", time.monotonic() + 60 * soak_config.minutes
    while not failure and (time.monotonic() < deadline if soak_config.only is None else not lives):
        life = Life(len(lives) + (soak_config.only or 0), soak_config.seed, folder)
        lives.append(life)
        try:
            counts = run_life(life, reference[life.world]) | {"orphan processes": life.orphans}
            sums.update(counts)
            failure = str(counts) if any(counts.values()) else ""
        except AssertionError as error:
            failure = str(error)
    starts, steps, seconds = (sum(getattr(life, name) for life in lives) for name in ("starts", "steps", "seconds"))
    needed_steps, min_seconds = STEPS * len(lives), sum(baseline_seconds[life.world] for life in lives)
    repeated_steps, fault_counts = (
        max(0, steps - needed_steps),
        sum((life.fault_counts for life in lives), Counter[str]()),
    )
    rows: dict[str, object] = {"runs": len(lives), "starts": starts, **sums, "steps done": steps}
    rows["steps done twice"] = f"{repeated_steps} ({repeated_steps / needed_steps:.0%} of {needed_steps})"
    rows["seconds"] = (
        f"{seconds:.0f}, in peace {min_seconds:.0f}: {(seconds - min_seconds) / max(1, starts):.2f} more a start"
    )
    rows |= {f"survived: {name}": count for name, count in sorted(fault_counts.items())} | {"seed": soak_config.seed}
    print("\n".join(f"{name:<40}{value}" for name, value in rows.items()))
    if failure:
        print(
            f"a promise does not hold: {failure}\n"
            f"again: python -m tests.chaos seed={soak_config.seed} only={lives[-1].number}"
        )
    return 1 if failure else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_soak(config.parse(Soak, sys.argv[1:]), Path(temporary)))
