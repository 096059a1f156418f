"""Odd machines: functions that a start calls before anything else."""

import ctypes
import errno
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ssl_vit.model import Model

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # of unshare(2)
NOT_ALLOWED = 111  # the exit code where the system does not let it


def short_of_memory() -> None:
    """Leave 2 GB beyond what the process has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * 10**9, held + 2 * 10**9))


def small_shared_memory() -> None:
    """Give the process, and its workers, a /dev/shm of 1 MB of their own, as a container may."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if system.unshare(NEW_USER | NEW_MOUNTS) != 0:
        sys.exit(NOT_ALLOWED)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(line)
    if system.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=1m") != 0:
        sys.exit(NOT_ALLOWED)


def odd_clock() -> None:
    """Have the clock jump by JUMP seconds, half a second from now."""
    real, begun, jump = time.time, time.monotonic(), float(os.environ["JUMP"])
    time.time = lambda: real() + (jump if time.monotonic() > begun + 0.5 else 0)


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

    def refuse(*asked: Any, **options: Any) -> Any:
        del options
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
    from ssl_vit import tuning

    tuning.write_tuned = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
