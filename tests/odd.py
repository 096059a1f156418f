"""Odd machines: functions that a start calls before anything else."""

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ssl_vit.model import Model
from tests.train.children import mount, own_mounts

NOT_ALLOWED = 111  # the exit code where the system does not let it


def short_of_memory() -> None:
    """Leave 2 GB beyond what the process has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 10**9, held + 2 * 10**9))


def small_shared_memory() -> None:
    """Give the process, and its workers, a /dev/shm of 1 MB of their own, as a container may."""
    try:
        own_mounts()
        mount("-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    except (OSError, subprocess.CalledProcessError):
        sys.exit(NOT_ALLOWED)


def odd_clock() -> None:
    """Have the clock jump an hour back or a year ahead, or not, whenever somebody looks."""
    real, draw = time.time, random.Random(3)
    time.time = lambda: real() + draw.choice([-3600, 0, 365 * 86400])


def unsteady() -> None:
    """Have every pass over a batch give another loss, by one part in a million."""
    forward, calls = Model.forward, [0]

    def other(self: Model, *given: Any, **options: Any) -> Any:
        output = forward(self, *given, **options)
        calls[0] += 1
        return output._replace(loss=output.loss * (1 + calls[0] * 1e-6)) if hasattr(output, "loss") else output

    Model.forward = other


def offline() -> None:
    """Have no network, and say so where one is asked for."""
    connect = socket.socket.connect

    def refuse(*asked: Any, **_: Any) -> Any:
        print(f"asked for the network: {asked}", flush=True)
        raise OSError(errno.ENETUNREACH, "there is no network")

    def only_here(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "localhost"))
        return connect(self, address) if local else refuse(address)

    socket.socket.connect = only_here
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse


def killed_before_it_tells() -> None:
    """Have the process killed when a fine-tuning is trained and is to write what came of it."""
    from ssl_vit.commands import finetune

    finetune.write_tuned = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
