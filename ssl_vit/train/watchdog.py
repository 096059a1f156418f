"""Bounded waiting: where processes wait too long for one another, each ends and names who is missing.

A thread of every process tells a small store that it lives and how far its training has come. No collective has part
in it, so it works whatever hangs: a peer that was killed or stopped, one that waits for its disk, or the network.
"""

import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssl_vit.distributed import everyone, from_main
from ssl_vit.errors import INTERNAL, PREEMPTED, Refusal, Silent, leave

if TYPE_CHECKING:
    from accelerate import Accelerator

PULSE = 1.0  # seconds between two signs of life
CONNECT = 60.0  # seconds to get a connection, which looks up names: 5 to 10 s where no name server answers
SILENT = "no sign of life"
BROKEN = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")


@dataclass(frozen=True)
class Loss:
    """Why all are to end, and with which code; where somebody hangs, all show what they are doing."""

    who: str
    code: int = INTERNAL
    hangs: bool = False


class Watchdog:
    """Watches over several processes; with one it does nothing. `ended` is told the verdict before this one ends.

    A process that died is seen by those on its own machine, one that fails says so itself; all end at once then, and
    one of them tells. A process that hangs is known by its silence, or by where it still is, after `timeout` seconds.
    """

    def __init__(self, accelerator: "Accelerator", timeout: float, ended: Callable[[Refusal], None]):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.timeout, self.ended = timeout, ended
        self._beats, self._place, self._at = 0, "the start", time.monotonic()
        self._pulse, self._ending, self._done = 0, False, threading.Event()
        self._silent: list[int] = []
        self._only = threading.Lock()  # of this process's threads, one ends it
        if self.world == 1:
            return
        self._prefix = from_main(accelerator, lambda: f"watchdog-{secrets.token_hex(4)}")  # a restart begins anew
        # those to ask by are made now as well: a new connection may wait seconds for a name server
        self._store, self._asking, self._listening = _connection(), _connection(), _connection()
        self._publish()
        here = socket.gethostname()
        alive = everyone(accelerator, (here, os.getpid(), born(os.getpid())))
        self._neighbours = {
            rank: (pid, birth) for rank, (host, pid, birth) in enumerate(alive) if host == here and rank != self.rank
        }
        for work in (self._tell, self._watch):  # who asks for others must not fall silent itself
            threading.Thread(target=work, daemon=True).start()

    def beat(self, place: str) -> None:
        """The training has come to a place."""
        self._beats, self._place, self._at = self._beats + 1, place, time.monotonic()

    def close(self) -> None:
        """The waiting is over."""
        if self.world > 1 and not self._done.is_set():
            self._say_goodbye()

    def fail(self, end: Refusal) -> None:
        """This process ends by itself: the others end too, and leave the word to it."""
        if self.world > 1 and not self._done.is_set():
            code = end.code if end.code == PREEMPTED else INTERNAL  # who was interrupted interrupts all
            self._announce(Loss(f"rank {self.rank} on {socket.gethostname()} failed: {end}", code))
            self._say_goodbye()
            if self.rank == 0:
                time.sleep(2 * PULSE)  # without a launcher the store ends with this process, and the others must hear

    def explain(self, error: BaseException) -> Refusal | None:
        """Where an error comes of a peer that went away: who it was. None where no other process is missing."""
        text = str(error).lower()
        if self.world == 1 or not isinstance(error, RuntimeError) or not any(word in text for word in BROKEN):
            return None
        self._only.acquire()  # from here on this thread ends the process, or nobody has to
        end = time.monotonic() + 3 * PULSE
        while (loss := self._lost()) is None and time.monotonic() < end:
            time.sleep(PULSE / 4)
        loss = loss or Loss(self._missing())
        if not loss.who:
            self._only.release()
            return None
        if loss.hangs:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        end = self._verdict(f"rank {self.rank} lost its peers at {self._place}", loss)
        self._say_goodbye()
        return end

    def _verdict(self, where: str, loss: Loss) -> Refusal:
        """What this process says of a loss: all of it where it is the first to, else nothing."""
        end = Refusal(loss.code, f"{where}: {loss.who}; the same command goes on from the last checkpoint")
        return end if self._announce(loss) else Silent(end.code, end.message)

    def _announce(self, loss: Loss) -> bool:
        """Tell all who was lost; False where another process was first."""
        mine = json.dumps({"by": self.rank, "loss": vars(loss)})
        first = within(3 * PULSE, lambda: self._asking.compare_set(f"{self._prefix}/lost", "", mine))
        return first is None or first.decode() == mine

    def _lost(self) -> Loss | None:
        """Who died or failed, as far as this process can see or was told."""
        if within(3 * PULSE, lambda: self._listening.check([f"{self._prefix}/lost"])):
            word = within(3 * PULSE, lambda: self._listening.get(f"{self._prefix}/lost"))
            return Loss(**json.loads(word)["loss"]) if word else None
        for rank, (pid, birth) in self._neighbours.items():
            if born(pid) != birth and not self._said_goodbye(rank):
                return Loss(f"rank {rank} on {socket.gethostname()} (pid {pid}) is gone")
        return None

    def _said_goodbye(self, rank: int) -> bool:
        told = within(3 * PULSE, lambda: self._listening.get(f"{self._prefix}/{rank}"))
        return told is not None and json.loads(told)["ending"]

    def _tell(self) -> None:
        while not self._done.wait(PULSE):
            self._pulse += 1
            with suppress(Exception):  # where the store's process has gone, this one learns it by waiting
                self._publish()

    def _publish(self) -> None:
        told = {"host": socket.gethostname(), "pulse": self._pulse, "ending": self._ending}
        self._store.set(f"{self._prefix}/{self.rank}", json.dumps({**told, "beats": self._beats, "place": self._place}))

    def _say_goodbye(self) -> None:
        """So that others, who are still asking, do not take this end for the cause of theirs."""
        self._done.set()
        self._ending = True
        within(5 * PULSE, self._publish)

    def _watch(self) -> None:
        while not self._done.wait(PULSE):
            if loss := self._lost():
                time.sleep(PULSE)  # the main thread may hear of it too, and come to an end of its own
                if not self._done.is_set() and self._only.acquire(blocking=False):
                    self._leave(self._verdict(f"rank {self.rank} at {self._place}", loss), loss.hangs)
            waited = time.monotonic() - self._at
            if waited > self.timeout:
                self._end(waited)

    def _missing(self) -> str:
        """Who gives no sign of life, or else who is behind; empty where nobody is."""

        def read() -> list[dict[str, Any]]:
            told = self._asking.multi_get([f"{self._prefix}/{rank}" for rank in range(self.world)])
            return [json.loads(one) for one in told]

        before = within(3 * PULSE, read)
        if before is not None:
            time.sleep(3 * PULSE)
        now = before and within(3 * PULSE, read)
        if before is None or now is None:
            self._silent = [0]
            if 0 in self._neighbours:
                return f"{SILENT} from rank 0 on {socket.gethostname()}"
            return f"the machine of rank 0 ({os.environ['MASTER_ADDR']}) does not answer"
        name = [f"rank {rank} on {told['host']}" for rank, told in enumerate(now)]
        others = [rank for rank in range(self.world) if rank != self.rank and not now[rank]["ending"]]
        self._silent = [rank for rank in others if now[rank]["pulse"] == before[rank]["pulse"]]
        if self._silent:
            return f"{SILENT} from {', '.join(name[rank] for rank in self._silent)}"
        front = max(told["beats"] for told in now)
        behind = [rank for rank in range(self.world) if now[rank]["beats"] < front]
        if behind == [self.rank]:
            return "the others wait for it"
        return ", ".join(f"{name[rank]} is still at {now[rank]['place']}" for rank in behind)

    def _end(self, waited: float) -> None:
        """End this process, and those on this machine that do not answer."""
        lost = self._missing() or "no process is behind: the network between them is stuck"
        went_on = self._done.is_set() or time.monotonic() - self._at < self.timeout
        if went_on or not self._only.acquire(blocking=False):
            return
        within(PULSE / 2, lambda: self._announce(Loss(lost, hangs=True)))
        for rank in self._silent:
            pid, birth = self._neighbours.get(rank, (0, None))
            if pid and born(pid) == birth:
                os.kill(pid, signal.SIGKILL)  # a stopped one would outlive its launcher's patience
        text = f"rank {self.rank} has been at {self._place} for {waited:.0f} s (timeout={self.timeout:g}): {lost}"
        self._leave(Refusal(INTERNAL, f"{text}; the same command goes on from the last checkpoint"), stacks=True)

    def _leave(self, end: Refusal, stacks: bool) -> None:
        """End this process, whatever its main thread hangs in."""
        if stacks:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._say_goodbye()
        with suppress(Exception):  # a full disk must not keep it
            self.ended(end)
        if self.rank == 0 and len(self._silent) < self.world - 1:
            time.sleep(2 * PULSE)  # as in fail: the others are asking
        leave(end)


def born(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks, or None where there is none that runs (Linux)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def _connection() -> TCPStore:
    """To the store in which the processes met, beside the main thread's own, which may be waiting in it."""
    patience = timedelta(seconds=CONNECT)
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=patience)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns, or None where it fails or takes longer: a store whose process is stopped never answers."""
    found: list[Any] = []

    def attempt() -> None:
        with suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
