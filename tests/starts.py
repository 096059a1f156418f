"""Starts of trainings as processes of their own, in tenths of a second: forked from one that has imported everything.

What a person's command does, a start does too: its own process group, signals, exit code, words on the screen. Several
ranks meet as under Slurm, without a launcher.
"""

import atexit
import io
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from ssl_vit import errors, fault_injection

GRACE = 2.0  # seconds for workers to end after their rank
BASE = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
PRELOAD = [
    "tests.starts",
    "tests.odd",
    "ssl_vit.commands.setup",
    "accelerate",
    "torch._dynamo",
    "torch.distributed.fsdp",
]
PRELOAD += ["PIL.PngImagePlugin", "matplotlib.figure", "matplotlib.backends.backend_agg", "markdown"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


TOOLS = Path(__file__).parent.parent / "tools"


def live(
    tool: str, words: list[str], environment: dict[str, str], log: str, prepare: Callable[[], None] | None
) -> None:
    """The whole life of a start; the preloaded process has read no environment yet."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ |= environment
    sys.argv = [f"{tool}.py", *words]
    signal.set_wakeup_fd(-1)
    multiprocessing.set_start_method("fork", force=True)  # as a command has it; here it would be the server's
    code: Any = 1
    try:
        if prepare is not None:
            prepare()  # before there are threads, which would forbid a namespace of its own
        threading.Thread(target=_follow, daemon=True).start()
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Ended(NamedTuple):
    """How a command line ended that ran in this process."""

    code: int
    said: str  # standard output and standard error

    @property
    def line(self) -> str:
        """The closing line."""
        return self.said.rstrip().rpartition("\n")[2]


def call(tool: str, words: Sequence[str], **environment: str) -> Ended:
    """Run a tool's command line in this process: the same parsing, words, closing line and exit code as a process has.

    Faster than a start by far; what needs signals, faults that kill, or several ranks takes `Start`.
    """
    module = runpy.run_path(str(TOOLS / f"{tool}.py"), run_name=tool)
    screen, code = io.StringIO(), 0
    own_signals = patch.object(errors, "_answer_signals", lambda: None)  # they are answered for a whole process
    with patch.dict(os.environ, environment), patch.object(sys, "argv", [f"{tool}.py", *words]), own_signals:
        with redirect_stdout(screen), redirect_stderr(screen):
            try:
                errors.run(module["main"])
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                fault_injection.arm("")  # what comes next in this process asked for no fault
        if "accelerate.state" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(True)
            GradientState._reset_state()
    return Ended(code, screen.getvalue())


def _follow() -> None:
    """End with the tests, also where they are killed and have a start hanging."""
    tests = multiprocessing.parent_process()
    if tests is not None:
        tests.join()
        os.killpg(0, signal.SIGKILL)


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(range(20_000 + 2_000 * WORKER, 22_000 + 2_000 * WORKER))  # the system gives others away


def free_port() -> int:
    """A port that nobody has now, of this test worker's own range."""
    while True:
        port = next(_ports)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def members(sessions: Collection[int | None]) -> list[int]:
    """The living processes of sessions; every rank leads one, which its workers belong to."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
            if state not in "ZX" and int(session) in sessions:
                found.append(int(path.parent.name))
    return found


class Start:
    """One start of a tool with the words, as `world` processes; their screen is in `logs`.

    `alone` holds more words for single ranks. `prepare`, a function of a module, is called first by every process.
    """

    def __init__(
        self,
        words: list[str],
        logs: Path,
        world: int = 1,
        fault: str = "",
        alone: dict[int, list[str]] | None = None,
        prepare: Callable[[], None] | None = None,
        tool: str = "pretrain",
        **environment: str,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port() if world > 1 else 0
        self.began = time.monotonic()
        self.logs = [logs / f"{time.monotonic_ns()}-rank{rank}.log" for rank in range(world)]
        self.processes = []
        self.ended: dict[int, float] = {}  # when each rank ended, of time.monotonic()
        self.orphans: list[int] = []  # what was left of them when they had ended
        for rank, log in enumerate(self.logs):
            given = {**BASE, "SSL_VIT_FAULT": fault}
            if world > 1:
                given |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                given |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            said = [*words, *(alone or {}).get(rank, [])]
            process = _context.Process(target=live, args=(tool, said, given | environment, str(log), prepare))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether any rank has not ended yet."""
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def hears(self) -> bool:
        """Whether all ranks answer signals already; before that, while Python itself starts, one simply ends them."""
        for process in self.processes:
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                caught = int(status.partition("SigCgt:")[2].split()[0], 16) if "SigCgt:" in status else 0
                if not caught >> (signal.SIGTERM - 1) & 1 and process.is_alive():
                    return False
        return True

    def workers(self, rank: int = 0) -> list[int]:
        """The loader workers of a rank."""
        pid = self.processes[rank].pid
        return [other for other in members({pid}) if other != pid]

    def kill(self) -> None:
        """End all of them, with their loader workers, as a power cut would."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes by rank, -9 for a kill; one that is not through in time is killed and counts as 999."""
        end = time.monotonic() + seconds
        left: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while left and (rest := end - time.monotonic()) > 0:
            for sentinel in connection.wait(left, rest):
                self.ended[left.pop(sentinel)] = time.monotonic()
        codes = [999 if rank in left.values() else process.exitcode for rank, process in enumerate(self.processes)]
        sessions = {process.pid for process in self.processes}
        grace = time.monotonic() + GRACE
        while (found := members(sessions)) and not left and time.monotonic() < grace:
            time.sleep(0.02)
        self.orphans = found
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true while the start runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s: {self.said()}"
            assert self.running or condition(), self.said()
            time.sleep(0.01)

    def said(self, rank: int | None = None) -> str:
        """What a rank wrote to the screen, or all of them."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs if log.exists())
