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
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError, SilentExit, exit_now

PULSE = 1.0  # seconds between two signs of life
CONNECT_TIMEOUT = 60.0  # seconds to get a connection, which looks up names: 5 to 10 s where no name server answers
NO_SIGN_OF_LIFE = "no sign of life"
CONNECTION_ERRORS = ("connection closed by peer", "connection reset by peer", "gloo", "nccl")


@dataclass(frozen=True)
class PeerFailure:
    """Why all are to end, and with which code; where somebody hangs, all show what they are doing."""

    description: str
    code: int = ExitCode.INTERNAL
    hangs: bool = False


class Watchdog:
    """Watches over several processes; with one it does nothing. `on_end` is told the verdict before this one ends.

    A process that died is seen by those on its own machine, one that fails says so itself; all end at once then, and
    one of them tells. A process that hangs is known by its silence, or by where it still is, after `timeout` seconds.
    """

    def __init__(self, processes: Distributed, timeout: float, on_end: Callable[[ExitError], None]):
        self.rank, self.world = processes.rank, processes.world
        self.timeout, self.on_end = timeout, on_end
        self._num_beats, self._phase, self._phase_start = 0, "the start", time.monotonic()
        self._num_pulses, self._ending, self._done = 0, False, threading.Event()
        self._silent_ranks: list[int] = []
        self._end_lock = threading.Lock()  # of this process's threads, one ends it
        if self.world == 1:
            return
        self._prefix = processes.run_on_main(lambda: f"watchdog-{secrets.token_hex(4)}")  # a restart begins anew
        # those to ask by are made now as well: a new connection may wait seconds for a name server
        self._store, self._query_store, self._listen_store = _connection(), _connection(), _connection()
        self._publish_status()
        hostname = socket.gethostname()
        peers = processes.all_gather((hostname, os.getpid(), process_start_time(os.getpid())))
        self._neighbors = {
            rank: (pid, start_time)
            for rank, (host, pid, start_time) in enumerate(peers)
            if host == hostname and rank != self.rank
        }
        processes.heartbeat = self.heartbeat
        for target in (self._publish_loop, self._watch_loop):  # who asks for others must not fall silent itself
            threading.Thread(target=target, daemon=True).start()

    def heartbeat(self, phase: str) -> None:
        """The training has come to a place."""
        self._num_beats, self._phase, self._phase_start = self._num_beats + 1, phase, time.monotonic()

    def close(self) -> None:
        """The waiting is over."""
        if self.world > 1 and not self._done.is_set():
            self._publish_end()

    def fail(self, error: ExitError) -> None:
        """This process ends by itself: the others end too, and leave the word to it."""
        if self.world > 1 and not self._done.is_set():
            code = (
                error.code if error.code == ExitCode.PREEMPTED else ExitCode.INTERNAL
            )  # who was interrupted interrupts all
            self._announce(PeerFailure(f"rank {self.rank} on {socket.gethostname()} failed: {error}", code))
            self._publish_end()
            if self.rank == 0:
                time.sleep(2 * PULSE)  # without a launcher the store ends with this process, and the others must hear

    def diagnose(self, error: BaseException) -> ExitError | None:
        """Where an error comes of a peer that went away: who it was. None where no other process is missing."""
        text = str(error).lower()
        if (
            self.world == 1
            or not isinstance(error, RuntimeError)
            or not any(pattern in text for pattern in CONNECTION_ERRORS)
        ):
            return None
        self._end_lock.acquire()  # from here on this thread ends the process, or nobody has to
        end = time.monotonic() + 3 * PULSE
        while (failure := self._find_failure()) is None and time.monotonic() < end:
            time.sleep(PULSE / 4)
        failure = failure or PeerFailure(self._describe_missing())
        if not failure.description:
            self._end_lock.release()
            return None
        if failure.hangs:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        end = self._to_exit_error(f"rank {self.rank} lost its peers at {self._phase}", failure)
        self._publish_end()
        return end

    def _to_exit_error(self, location: str, failure: PeerFailure) -> ExitError:
        """What this process says of a loss: all of it where it is the first to, else nothing."""
        error = ExitError(
            failure.code, f"{location}: {failure.description}; the same command goes on from the last checkpoint"
        )
        return error if self._announce(failure) else SilentExit(error.code, error.message)

    def _announce(self, failure: PeerFailure) -> bool:
        """Tell all who was lost; False where another process was first."""
        message = json.dumps({"by": self.rank, "loss": vars(failure)})
        stored = with_timeout(3 * PULSE, lambda: self._query_store.compare_set(f"{self._prefix}/lost", "", message))
        return stored is None or stored.decode() == message

    def _find_failure(self) -> PeerFailure | None:
        """Who died or failed, as far as this process can see or was told."""
        if with_timeout(3 * PULSE, lambda: self._listen_store.check([f"{self._prefix}/lost"])):
            message = with_timeout(3 * PULSE, lambda: self._listen_store.get(f"{self._prefix}/lost"))
            return PeerFailure(**json.loads(message)["loss"]) if message else None
        for rank, (pid, start_time) in self._neighbors.items():
            if process_start_time(pid) != start_time and not self._has_ended(rank):
                return PeerFailure(f"rank {rank} on {socket.gethostname()} (pid {pid}) is gone")
        return None

    def _has_ended(self, rank: int) -> bool:
        status = with_timeout(3 * PULSE, lambda: self._listen_store.get(f"{self._prefix}/{rank}"))
        return status is not None and json.loads(status)["ending"]

    def _publish_loop(self) -> None:
        while not self._done.wait(PULSE):
            self._num_pulses += 1
            with suppress(Exception):  # where the store's process has gone, this one learns it by waiting
                self._publish_status()

    def _publish_status(self) -> None:
        status = {"host": socket.gethostname(), "pulse": self._num_pulses, "ending": self._ending}
        self._store.set(
            f"{self._prefix}/{self.rank}", json.dumps({**status, "beats": self._num_beats, "place": self._phase})
        )

    def _publish_end(self) -> None:
        """So that others, who are still asking, do not take this end for the cause of theirs."""
        self._done.set()
        self._ending = True
        with_timeout(5 * PULSE, self._publish_status)

    def _watch_loop(self) -> None:
        while not self._done.wait(PULSE):
            if failure := self._find_failure():
                time.sleep(PULSE)  # the main thread may hear of it too, and come to an end of its own
                if not self._done.is_set() and self._end_lock.acquire(blocking=False):
                    self._terminate(self._to_exit_error(f"rank {self.rank} at {self._phase}", failure), failure.hangs)
            elapsed = time.monotonic() - self._phase_start
            if elapsed > self.timeout:
                self._end_process(elapsed)

    def _describe_missing(self) -> str:
        """Who gives no sign of life, or else who is behind; empty where nobody is."""

        def read_statuses() -> list[dict[str, Any]]:
            messages = self._query_store.multi_get([f"{self._prefix}/{rank}" for rank in range(self.world)])
            return [json.loads(message) for message in messages]

        previous = with_timeout(3 * PULSE, read_statuses)
        if previous is not None:
            time.sleep(3 * PULSE)
        current = previous and with_timeout(3 * PULSE, read_statuses)
        if previous is None or current is None:
            self._silent_ranks = [0]
            if 0 in self._neighbors:
                return f"{NO_SIGN_OF_LIFE} from rank 0 on {socket.gethostname()}"
            return f"the machine of rank 0 ({os.environ['MASTER_ADDR']}) does not answer"
        names = [f"rank {rank} on {status['host']}" for rank, status in enumerate(current)]
        others = [rank for rank in range(self.world) if rank != self.rank and not current[rank]["ending"]]
        self._silent_ranks = [rank for rank in others if current[rank]["pulse"] == previous[rank]["pulse"]]
        if self._silent_ranks:
            return f"{NO_SIGN_OF_LIFE} from {', '.join(names[rank] for rank in self._silent_ranks)}"
        max_beats = max(status["beats"] for status in current)
        behind = [rank for rank in range(self.world) if current[rank]["beats"] < max_beats]
        if behind == [self.rank]:
            return "the others wait for it"
        return ", ".join(f"{names[rank]} is still at {current[rank]['place']}" for rank in behind)

    def _end_process(self, elapsed: float) -> None:
        """End this process, and those on this machine that do not answer."""
        missing = self._describe_missing() or "no process is behind: the network between them is stuck"
        resumed = self._done.is_set() or time.monotonic() - self._phase_start < self.timeout
        if resumed or not self._end_lock.acquire(blocking=False):
            return
        with_timeout(PULSE / 2, lambda: self._announce(PeerFailure(missing, hangs=True)))
        for rank in self._silent_ranks:
            pid, start_time = self._neighbors.get(rank, (0, None))
            if pid and process_start_time(pid) == start_time:
                os.kill(pid, signal.SIGKILL)  # a stopped one would outlive its launcher's patience
        text = f"rank {self.rank} has been at {self._phase} for {elapsed:.0f} s (timeout={self.timeout:g}): {missing}"
        self._terminate(
            ExitError(ExitCode.INTERNAL, f"{text}; the same command goes on from the last checkpoint"), dump_stacks=True
        )

    def _terminate(self, error: ExitError, dump_stacks: bool) -> None:
        """End this process, whatever its main thread hangs in."""
        if dump_stacks:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._publish_end()
        with suppress(Exception):  # a full disk must not keep it
            self.on_end(error)
        if self.rank == 0 and len(self._silent_ranks) < self.world - 1:
            time.sleep(2 * PULSE)  # as in fail: the others are asking
        exit_now(error)


def process_start_time(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks, or None where there is none that runs (Linux)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _connection() -> TCPStore:
    """To the store in which the processes met, beside the main thread's own, which may be waiting in it."""
    timeout = timedelta(seconds=CONNECT_TIMEOUT)
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)


def with_timeout(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns, or None if it fails or takes longer: the store of a stopped process never answers."""
    results: list[Any] = []

    def attempt() -> None:
        with suppress(Exception):
            results.append(function())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
