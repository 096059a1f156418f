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
from tests.train.children import mount, unshare_mounts

NOT_ALLOWED = 111  # the exit code where the system does not let it


def limit_memory() -> None:
    """Leave 2 GB beyond what the process has."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2 * 10**9, used_bytes + 2 * 10**9))


def small_shared_memory() -> None:
    """Give the process, and its workers, a /dev/shm of 1 MB of their own, as a container may."""
    try:
        unshare_mounts()
        mount("-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    except (OSError, subprocess.CalledProcessError):
        sys.exit(NOT_ALLOWED)


def jumping_clock() -> None:
    """Have the clock jump an hour back or a year ahead, or not, whenever somebody looks."""
    real_time, rng = time.time, random.Random(3)
    time.time = lambda: real_time() + rng.choice([-3600, 0, 365 * 86400])


def unsteady_loss() -> None:
    """Have every pass over a batch give another loss, by one part in a million."""
    forward, num_calls = Model.forward, [0]

    def noisy_forward(self: Model, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        num_calls[0] += 1
        return output._replace(loss=output.loss * (1 + num_calls[0] * 1e-6)) if hasattr(output, "loss") else output

    Model.forward = noisy_forward


def offline() -> None:
    """Have no network, and say so where one is asked for."""
    connect = socket.socket.connect

    def refuse(*args: Any, **_: Any) -> Any:
        print(f"asked for the network: {args}", flush=True)
        raise OSError(errno.ENETUNREACH, "there is no network")

    def connect_local(self: socket.socket, address: Any) -> None:
        is_local = self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "localhost"))
        return connect(self, address) if is_local else refuse(address)

    socket.socket.connect = connect_local
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse


def kill_before_results() -> None:
    """Have the process killed when a fine-tuning is trained and is to write what came of it."""
    from ssl_vit.commands import finetune

    finetune.write_finetune_results = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
