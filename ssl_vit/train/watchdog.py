"""Bounded waiting: where processes wait too long for one another, each ends and names who is missing.

A thread of every process tells a small store that it lives and how far its training has come. No collective has part
in it, so it works whatever hangs: a peer that was killed or stopped, one that waits for its disk, or the network.
"""

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssl_vit.exits import INTERNAL, Refusal, leave
from ssl_vit.train.distributed import from_main

if TYPE_CHECKING:
    from accelerate import Accelerator

PULSE = 1.0  # seconds between two signs of life
CONNECT = 60.0  # seconds to get a connection, which looks up names: 5 to 10 s where no name server answers
BROKEN = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")


class Watchdog:
    """Watches over several processes; with one it does nothing. `ended` is told the verdict before this one ends."""

    def __init__(self, accelerator: "Accelerator", timeout: float, ended: Callable[[Refusal], None]):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.timeout, self.ended = timeout, ended
        self._beats, self._place, self._at = 0, "the start", time.monotonic()
        self._pulse, self._ending, self._done = 0, False, threading.Event()
        if self.world == 1:
            return
        self._prefix = from_main(accelerator, lambda: f"watchdog-{secrets.token_hex(4)}")  # a restart begins anew
        # one to ask by is made now as well: a new connection may wait seconds for a name server
        self._store, self._asking = _connection(), _connection()
        self._publish()
        accelerator.wait_for_everyone()
        for work in (self._tell, self._watch):  # who asks for others must not fall silent itself
            threading.Thread(target=work, daemon=True).start()

    def beat(self, place: str) -> None:
        """The training has come to a place."""
        self._beats, self._place, self._at = self._beats + 1, place, time.monotonic()

    def close(self) -> None:
        """The waiting is over."""
        self._done.set()

    def explain(self, error: BaseException) -> Refusal | None:
        """Where an error comes of a peer that went away: who it was. None where no other process is missing."""
        text = str(error).lower()
        if self.world == 1 or not isinstance(error, RuntimeError) or not any(word in text for word in BROKEN):
            return None
        lost = self._missing()
        if not lost:
            return None
        self._say_goodbye()
        return Refusal(INTERNAL, f"rank {self.rank} lost its peers at {self._place}: {lost}; the same command goes on")

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
        self.close()
        self._ending = True
        within(5 * PULSE, self._publish)

    def _watch(self) -> None:
        while not self._done.wait(PULSE):
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
            return f"the machine of rank 0 ({os.environ['MASTER_ADDR']}) does not answer"
        name = [f"rank {rank} on {told['host']}" for rank, told in enumerate(now)]
        others = [rank for rank in range(self.world) if rank != self.rank and not now[rank]["ending"]]
        silent = [rank for rank in others if now[rank]["pulse"] == before[rank]["pulse"]]
        if silent:
            return f"no sign of life from {', '.join(name[rank] for rank in silent)}"
        front = max(told["beats"] for told in now)
        behind = [rank for rank in range(self.world) if now[rank]["beats"] < front]
        return ", ".join(f"{name[rank]} is still at {now[rank]['place']}" for rank in behind)

    def _end(self, waited: float) -> None:
        """End this process, whatever its main thread hangs in."""
        lost = self._missing() or "no process is behind: the network between them is stuck"
        if self._done.is_set() or time.monotonic() - self._at < self.timeout:
            return  # it went on while this was asked
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        text = f"rank {self.rank} waited {waited:.0f} s at {self._place}: {lost}"
        end = Refusal(INTERNAL, f"{text}; the same command goes on from the last checkpoint (timeout={self.timeout:g})")
        self._say_goodbye()
        with suppress(Exception):  # a full disk must not keep it
            self.ended(end)
        leave(end)


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
