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
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssl_vit.errors import Refusal, leave
from ssl_vit.train import watchdog
from ssl_vit.train.watchdog import Watchdog

HOST = "127.0.0.1"
MOST = 15  # seconds, then a process that the watchdog did not end is ended, with another code


def hang(dog: Watchdog) -> None:
    """As a thread that waits for a card or for a disk."""
    del dog
    threading.Event().wait()


def meet(dog: Watchdog) -> None:
    """As the training: a collective, and whoever hears that it broke tells who was lost."""
    try:
        dist.barrier()
    except RuntimeError as error:
        end = dog.explain(error)
        assert end is not None
        dog.ended(end)
        leave(end)


def lost(dog: Watchdog, victim: bool, number: int, wait: Callable[[Watchdog], None]) -> None:
    """A rank gets a signal; the others may hear of it by their collective, which breaks, or wait for what does not."""
    dog.beat("step 1")
    if victim:
        os.kill(os.getpid(), number)
    wait(dog)


stopped = partial(lost, number=signal.SIGSTOP, wait=meet)
killed = partial(lost, number=signal.SIGKILL, wait=meet)
killed_unheard = partial(lost, number=signal.SIGKILL, wait=hang)
stuck = partial(lost, number=0, wait=hang)  # a signal that is none


def failed(dog: Watchdog, victim: bool) -> None:
    """A rank ends by itself, the others wait for something that does not break."""
    dog.beat("step 1")
    if victim:
        dog.fail(Refusal(1, "a reason"))
        os._exit(1)
    hang(dog)


def told_in_vain(dog: Watchdog, victim: bool) -> None:
    """The disk is full when the verdict is to be written."""

    def ended(end: Refusal) -> None:
        raise OSError(28, f"No space left on device: {end}")

    dog.ended = ended
    stuck(dog, victim)


def steady(dog: Watchdog, victim: bool) -> None:
    """Longer than the timeout in all, no wait of it longer than a fraction."""
    del victim
    began = time.monotonic()
    go_on = torch.ones(1)
    while go_on:
        dog.beat("a step")
        go_on[0] = time.monotonic() - began < 1.5 * dog.timeout
        dist.broadcast(go_on, src=0)


def recovers(dog: Watchdog, victim: bool) -> None:
    """A rank stands still for longer than the timeout, but goes on once the other asks who is missing."""
    dog.beat("step 1")
    missing, went_on = dog._missing, threading.Event()

    def asked() -> str:
        found = missing()
        dog._store.set("asked", "")
        went_on.wait()
        return found

    if victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        dog.beat("step 2")
    else:
        dog._missing = asked
    dist.barrier()
    dog.beat("step 3")
    went_on.set()
    dist.barrier()


@dataclass(frozen=True)
class Scenario:
    """What each rank does, and is the victim or not; times in seconds."""

    do: Callable[[Watchdog, bool], None]
    ranks: int = 2
    victim: int = 1
    timeout: float = 3
    pulse: float = 0.3
    rank_0_holds_the_store: bool = False
    elsewhere: bool = False  # the others are on other machines, as far as they know


SCENARIOS = {  # beside those of whole trainings in test_signals.py
    "stopped": Scenario(stopped, timeout=1.5, pulse=watchdog.PULSE),
    "one of three stopped": Scenario(stopped, ranks=3),
    "rank 0 stopped elsewhere": Scenario(stopped, victim=0, rank_0_holds_the_store=True, elsewhere=True),
    "one of three killed": Scenario(killed, ranks=3, timeout=60),
    "killed unheard": Scenario(killed_unheard, ranks=3, timeout=60),
    "killed elsewhere": Scenario(killed, ranks=3, timeout=60, elsewhere=True),
    "killed unheard elsewhere": Scenario(killed_unheard, elsewhere=True),
    "failed": Scenario(failed, ranks=3, timeout=60),
    "stuck": Scenario(stuck),
    "told in vain": Scenario(told_in_vain),
    "steady": Scenario(steady),
    "recovers": Scenario(recovers),
}


def live(number: int, scenario: Scenario, listener: socket.socket, folder: Path) -> None:
    """One rank's life, in a process group as accelerate makes it."""
    signal.alarm(MOST)
    port, holds = listener.getsockname()[1], scenario.rank_0_holds_the_store and number == 0
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
    if holds:
        store = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    else:
        listener.close()
        store = TCPStore(HOST, port)
    waiting = timedelta(seconds=2 * MOST)
    dist.init_process_group("gloo", store=store, rank=number, world_size=scenario.ranks, timeout=waiting)
    stub: Any = SimpleNamespace(process_index=number, num_processes=scenario.ranks, is_main_process=number == 0)
    stub.wait_for_everyone = dist.barrier
    watchdog.PULSE = scenario.pulse

    def ended(end: Refusal) -> None:
        (folder / f"told-{number}.json").write_text(json.dumps({"code": end.code, "message": end.message}))

    dog = Watchdog(stub, scenario.timeout, ended)
    if scenario.elsewhere:
        dog._neighbours.clear()
    scenario.do(dog, number == scenario.victim)
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


def drive(scenario: Scenario, folder: Path) -> None:
    """Start a scenario's ranks, and write down how each of them ended."""
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    ranks = {
        fork(partial(live, number, scenario, listener, folder), folder / f"stderr-{number}"): number
        for number in range(scenario.ranks)
    }
    keeper = None
    if scenario.rank_0_holds_the_store:
        listener.close()
    else:
        keeper = TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    victim = next(child for child, number in ranks.items() if number == scenario.victim)
    if scenario.do is recovers and keeper is not None:
        keeper.wait(["asked"], timedelta(seconds=MOST))
        os.kill(victim, signal.SIGCONT)
    found: dict[int, dict[str, Any]] = {}
    while len(found) < len(ranks):
        if scenario.do is stopped and len(found) == len(ranks) - 1 and scenario.victim not in found:
            os.kill(victim, signal.SIGKILL)  # on another machine, it may be, or as here on one that is asked no more
        child, status = os.wait()
        number = ranks[child]
        told = folder / f"told-{number}.json"
        found[number] = json.loads(told.read_text()) if told.exists() else {}
        found[number] |= {"exit": os.waitstatus_to_exitcode(status)}
        found[number] |= {"stderr": (folder / f"stderr-{number}").read_text()}
    (folder / "found.json").write_text(json.dumps([found[number] for number in range(scenario.ranks)]))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    drivers = []
    for name in names:
        (folder / name).mkdir()
        drivers.append(fork(partial(drive, SCENARIOS[name], folder / name), folder / name / "stderr"))
    for driver in drivers:
        os.waitpid(driver, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
