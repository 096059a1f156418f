"""Starts of trainings as processes of their own, in tenths of a second: forked from one that has imported everything.

What a person's command does, a start does too: its own process group, signals, exit code, words on the screen. Several
ranks meet as under Slurm, without a launcher.
"""

import atexit
import importlib
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
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from ssl_vit import commands, errors, fault_injection

GRACE = 2.0  # seconds for workers to end after their rank
BASE_ENV = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
PRELOAD = [
    "tests.processes",
    "tests.machines",
    "ssl_vit.commands.setup",
    "accelerate",
    "torch._dynamo",
    "torch.distributed.fsdp",
]
PRELOAD += ["PIL.PngImagePlugin", "matplotlib.figure", "matplotlib.backends.backend_agg", "markdown"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


TOOLS = Path(__file__).parent.parent / "tools"


def run_tool_process(
    tool: str, args: list[str], env: dict[str, str], log: str, prepare: Callable[[], None] | None
) -> None:
    """The whole life of a start; the preloaded process has read no environment yet."""
    os.setsid()
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log_fd, stream)
    os.environ |= env
    sys.argv = [f"{tool}.py", *args]
    signal.set_wakeup_fd(-1)
    multiprocessing.set_start_method("fork", force=True)  # as a command has it; here it would be the server's
    code: Any = 1
    try:
        if prepare is not None:
            prepare()  # before there are threads, which would forbid a namespace of its own
        threading.Thread(target=_end_with_parent, daemon=True).start()
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
        code = 0
    except SystemExit as system_exit:
        code = system_exit.code
    except BaseException as error:
        traceback.print_exception(error)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class ToolResult(NamedTuple):
    """How a command line ended that ran in this process."""

    code: int
    output: str  # standard output and standard error

    @property
    def last_line(self) -> str:
        """The closing line."""
        return self.output.rstrip().rpartition("\n")[2]


def _tool_main(tool: str) -> Callable[[list[str]], int]:
    """What a tool does with its arguments."""
    if tool in commands.COMMANDS:
        return partial(commands.call, importlib.import_module(f"ssl_vit.commands.{tool}"))
    return runpy.run_path(str(TOOLS / f"{tool}.py"), run_name=tool)["main"]


def call_tool(tool: str, args: Sequence[str], **env: str) -> ToolResult:
    """Run a tool's command line in this process: the same parsing, words, closing line and exit code as a process has.

    Faster than a start by far; what needs signals, faults that kill, or several ranks takes `Start`.
    """
    main = _tool_main(tool)
    output, code = io.StringIO(), 0
    no_handlers = patch.object(
        errors, "_install_signal_handlers", lambda: None
    )  # they are answered for a whole process
    with patch.dict(os.environ, env), patch.object(sys, "argv", [f"{tool}.py", *args]), no_handlers:
        with redirect_stdout(output), redirect_stderr(output):
            try:
                errors.run_main(main)
            except SystemExit as system_exit:
                code = int(system_exit.code or 0)
            finally:
                fault_injection.enable_faults("")  # what comes next in this process asked for no fault
        if "accelerate.state" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(True)
            GradientState._reset_state()
    return ToolResult(code, output.getvalue())


def _end_with_parent() -> None:
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


def living_pids(sessions: Collection[int | None]) -> list[int]:
    """The living processes of sessions; every rank leads one, which its workers belong to."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
            if state not in "ZX" and int(session) in sessions:
                pids.append(int(path.parent.name))
    return pids


class Start:
    """One start of a tool with the words, as `world` processes; their screen is in `logs`.

    `alone` holds more words for single ranks. `prepare`, a function of a module, is called first by every process.
    """

    def __init__(
        self,
        args: list[str],
        logs: Path,
        world: int = 1,
        fault: str = "",
        alone: dict[int, list[str]] | None = None,
        prepare: Callable[[], None] | None = None,
        tool: str = "pretrain",
        **env: str,
    ):
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port() if world > 1 else 0
        self.start_time = time.monotonic()
        self.logs = [logs / f"{time.monotonic_ns()}-rank{rank}.log" for rank in range(world)]
        self.processes = []
        self.end_times: dict[int, float] = {}  # when each rank ended, of time.monotonic()
        self.orphans: list[int] = []  # what was left of them when they had ended
        for rank, log in enumerate(self.logs):
            rank_env = {**BASE_ENV, "SSL_VIT_FAULT": fault}
            if world > 1:
                rank_env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                rank_env |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process_args = [*args, *(alone or {}).get(rank, [])]
            process = _context.Process(
                target=run_tool_process, args=(tool, process_args, rank_env | env, str(log), prepare)
            )
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether any rank has not ended yet."""
        return any(process.is_alive() for process in self.processes)

    def signal(self, signum: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, signum)

    def handles_signals(self) -> bool:
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
        return [worker for worker in living_pids({pid}) if worker != pid]

    def kill(self) -> None:
        """End all of them, with their loader workers, as a power cut would."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes by rank, -9 for a kill; one that is not through in time is killed and counts as 999."""
        deadline = time.monotonic() + seconds
        pending: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while pending and (remaining := deadline - time.monotonic()) > 0:
            for sentinel in connection.wait(pending, remaining):
                self.end_times[pending.pop(sentinel)] = time.monotonic()
        codes = [999 if rank in pending.values() else process.exitcode for rank, process in enumerate(self.processes)]
        sessions = {process.pid for process in self.processes}
        grace_end = time.monotonic() + GRACE
        while (orphans := living_pids(sessions)) and not pending and time.monotonic() < grace_end:
            time.sleep(0.02)
        self.orphans = orphans
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true while the start runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s: {self.output()}"
            assert self.running or condition(), self.output()
            time.sleep(0.01)

    def output(self, rank: int | None = None) -> str:
        """What a rank wrote to the screen, or all of them."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs if log.exists())
