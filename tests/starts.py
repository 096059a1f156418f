"""Starts of trainings as processes of their own, in tenths of a second: forked from one that has imported everything.

What a person's command does, a start does too: its own process group, signals, exit code, words on the screen. Several
ranks meet as under Slurm, without a launcher.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
PRELOAD = ["tests.starts", "ssl_vit.recipe", "accelerate", "torch._dynamo", "torch.distributed.fsdp"]
PRELOAD += ["PIL.PngImagePlugin"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _train(words: list[str], environment: dict[str, str], log: str) -> None:
    """The whole life of a start; the preloaded process has read no environment yet."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ |= environment
    sys.argv = ["pretrain.py", *words]
    signal.set_wakeup_fd(-1)
    multiprocessing.set_start_method("fork", force=True)  # as in any other process, for loader workers
    threading.Thread(target=_follow, daemon=True).start()

    from ssl_vit import config, exits, recipe

    def main(arguments: list[str]) -> int:
        return recipe.run(config.parse(recipe.Pretrain, arguments, recipe.FOLDER))

    code: Any = 1
    try:
        exits.run(main)
    except SystemExit as end:
        code = end.code
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _follow() -> None:
    """End with the tests, also where they are killed and have a start hanging."""
    tests = multiprocessing.parent_process()
    if tests is not None:
        tests.join()
        os.killpg(0, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Start:
    """One start of `tools/pretrain.py` with the words, as `world` processes; their screen is in `logs`."""

    def __init__(self, words: list[str], logs: Path, world: int = 1, fault: str = "", **environment: str):
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port() if world > 1 else 0
        self.logs = [logs / f"{time.monotonic_ns()}-rank{rank}.log" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            given = {**BASE, "SSL_VIT_FAULT": fault, **environment}
            if world > 1:
                given |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                given |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = _context.Process(target=_train, args=(words, given, str(log)))
            process.start()
            self.processes.append(process)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """End all of them, with their loader workers, as a power cut would."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes by rank, -9 for a kill; one that is not through in time is killed and counts as 999."""
        end = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            codes.append(999 if process.exitcode is None else process.exitcode)
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true while the start runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s: {self.said()}"
            assert any(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.01)

    def said(self, rank: int | None = None) -> str:
        """What a rank wrote to the screen, or all of them."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs if log.exists())
