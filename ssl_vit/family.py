"""Processes that end with their parent, where the system can see to that (Linux)."""

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends; elsewhere than on Linux nothing happens."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), number)


def launcher_words() -> list[str]:
    """The command line of the process that started this one; empty where the system does not show it."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def follow_launcher() -> None:
    """Where a launcher started this process, take its end as SIGTERM: accelerate's and torchrun's leave orphans.

    Without a launcher the parent is a shell, which may well end before the training does.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)


def serve_parent() -> None:
    """For a worker: signals to the process group are the parent's to answer, and without it there is no work."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
