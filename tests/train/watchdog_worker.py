"""Processes that wait for one another: `watchdog_worker.py FOLDER NAME...` writes FOLDER/NAME/found.json.

All scenarios run at once. Their processes are forked from this one, which has torch already. A scenario's driver holds
the store, as torchrun's agent does, or leaves it to rank 0, as under Slurm; it writes down how each rank ended.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitError, exit_now
from ssl_vit.train import watchdog
from ssl_vit.train.watchdog import Watchdog

HOST = "127.0.0.1"
TIME_LIMIT = 15  # seconds, then a process that the watchdog did not end is ended, with another code


def hang(dog: Watchdog) -> None:
    """As a thread that waits for a card or for a disk."""
    del dog
    threading.Event().wait()


def run_collective(dog: Watchdog) -> None:
    """As the training: a collective, and whoever hears that it broke tells who was lost."""
    try:
        dist.barrier()
    except RuntimeError as error:
        end = dog.diagnose(error)
        assert end is not None
        dog.on_end(end)
        exit_now(end)


def lose_rank(dog: Watchdog, victim: bool, number: int, wait: Callable[[Watchdog], None]) -> None:
    """A rank gets a signal; the others may hear of it by their collective, which breaks, or wait for what does not."""
    dog.heartbeat("step 1")
    if victim:
        os.kill(os.getpid(), number)
    wait(dog)


stopped = partial(lose_rank, number=signal.SIGSTOP, wait=run_collective)
killed = partial(lose_rank, number=signal.SIGKILL, wait=run_collective)
killed_unheard = partial(lose_rank, number=signal.SIGKILL, wait=hang)
stuck = partial(lose_rank, number=0, wait=hang)  # a signal that is none


def failed(dog: Watchdog, victim: bool) -> None:
    """A rank ends by itself, the others wait for something that does not break."""
    dog.heartbeat("step 1")
    if victim:
        dog.fail(ExitError(1, "a reason"))
        os._exit(1)
    hang(dog)


def verdict_unwritable(dog: Watchdog, victim: bool) -> None:
    """The disk is full when the verdict is to be written."""

    def raise_disk_full(end: ExitError) -> None:
        raise OSError(28, f"No space left on device: {end}")

    dog.on_end = raise_disk_full
    stuck(dog, victim)


def steady(dog: Watchdog, victim: bool) -> None:
    """Longer than the timeout in all, no wait of it longer than a fraction."""
    del victim
    start_time = time.monotonic()
    keep_going = torch.ones(1)
    while keep_going:
        dog.heartbeat("a step")
        keep_going[0] = time.monotonic() - start_time < 1.5 * dog.timeout
        dist.broadcast(keep_going, src=0)


def recovers(dog: Watchdog, victim: bool) -> None:
    """A rank stands still for longer than the timeout, but goes on once the other asks who is missing."""
    dog.heartbeat("step 1")
    original, resumed = dog._describe_missing, threading.Event()

    def describe_missing() -> str:
        description = original()
        dog._store.set("asked", "")
        resumed.wait()
        return description

    if victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        dog.heartbeat("step 2")
    else:
        dog._describe_missing = describe_missing
    dist.barrier()
    dog.heartbeat("step 3")
    resumed.set()
    dist.barrier()


@dataclass(frozen=True)
class Scenario:
    """What each rank does, and is the victim or not; times in seconds."""

    behavior: Callable[[Watchdog, bool], None]
    ranks: int = 2
    victim: int = 1
    timeout: float = 3
    pulse: float = 0.3
    rank_0_holds_the_store: bool = False
    on_other_machines: bool = False  # the others are on other machines, as far as they know


SCENARIOS = {  # beside those of whole trainings in test_signals.py
    "stopped": Scenario(stopped, timeout=1.5, pulse=watchdog.PULSE),
    "one of three stopped": Scenario(stopped, ranks=3),
    "rank 0 stopped elsewhere": Scenario(stopped, victim=0, rank_0_holds_the_store=True, on_other_machines=True),
    "one of three killed": Scenario(killed, ranks=3, timeout=60),
    "killed unheard": Scenario(killed_unheard, ranks=3, timeout=60),
    "killed elsewhere": Scenario(killed, ranks=3, timeout=60, on_other_machines=True),
    "killed unheard elsewhere": Scenario(killed_unheard, on_other_machines=True),
    "failed": Scenario(failed, ranks=3, timeout=60),
    "stuck": Scenario(stuck),
    "told in vain": Scenario(verdict_unwritable),
    "steady": Scenario(steady),
    "recovers": Scenario(recovers),
}


def run_rank(rank: int, scenario: Scenario, listener: socket.socket, folder: Path) -> None:
    """One rank's life, in a process group as accelerate makes it."""
    signal.alarm(TIME_LIMIT)
    port, holds_store = listener.getsockname()[1], scenario.rank_0_holds_the_store and rank == 0
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
    if holds_store:
        store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    else:
        listener.close()
        store = TCPStore(HOST, port)
    group_timeout = timedelta(seconds=2 * TIME_LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=scenario.ranks, timeout=group_timeout)
    watchdog.PULSE = scenario.pulse

    def write_verdict(end: ExitError) -> None:
        (folder / f"told-{rank}.json").write_text(json.dumps({"code": end.code, "message": end.message}))

    dog = Watchdog(Distributed(rank, scenario.ranks), scenario.timeout, write_verdict)
    if scenario.on_other_machines:
        dog._neighbors.clear()
    scenario.behavior(dog, rank == scenario.victim)
    dog.close()
    dist.barrier()


def fork(work: Callable[[], None], stderr: Path) -> int:
    """A child that does the work; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    try:
        work()
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)


def run_scenario(scenario: Scenario, folder: Path) -> None:
    """Start a scenario's ranks, and write down how each of them ended."""
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    ranks = {
        fork(partial(run_rank, rank, scenario, listener, folder), folder / f"stderr-{rank}"): rank
        for rank in range(scenario.ranks)
    }
    store = None
    if scenario.rank_0_holds_the_store:
        listener.close()
    else:
        store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    victim = next(child for child, rank in ranks.items() if rank == scenario.victim)
    if scenario.behavior is recovers and store is not None:
        store.wait(["asked"], timedelta(seconds=TIME_LIMIT))
        os.kill(victim, signal.SIGCONT)
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(ranks):
        if scenario.behavior is stopped and len(results) == len(ranks) - 1 and scenario.victim not in results:
            os.kill(victim, signal.SIGKILL)  # on another machine, it may be, or as here on one that is asked no more
        child, status = os.wait()
        rank = ranks[child]
        verdict = folder / f"told-{rank}.json"
        results[rank] = json.loads(verdict.read_text()) if verdict.exists() else {}
        results[rank] |= {"exit": os.waitstatus_to_exitcode(status)}
        results[rank] |= {"stderr": (folder / f"stderr-{rank}").read_text()}
    (folder / "found.json").write_text(json.dumps([results[rank] for rank in range(scenario.ranks)]))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    drivers = []
    for name in names:
        (folder / name).mkdir()
        drivers.append(fork(partial(run_scenario, SCENARIOS[name], folder / name), folder / name / "stderr"))
    for driver in drivers:
        os.waitpid(driver, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
