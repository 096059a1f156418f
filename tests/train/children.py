"""Children of a test: forked from it with all it has imported, and put where they can do no harm."""

import ctypes
import gc
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssl_vit.errors import to_exit_error

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def fork(work: Callable[[], object], log: Path) -> int:
    """A child that does the work and ends with the code that a tool would end with, or by a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        pid = os.fork()
    if pid == 0:
        _run_child(work, log)
    return pid


def _run_child(work: Callable[[], object], log: Path) -> NoReturn:
    code = 1
    gc.freeze()  # else a collection would copy all memory that is shared with the parent
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        work()
        code = 0
    except BaseException as error:
        end = to_exit_error(error)
        code = end.code
        print(f"line: {end}\n", "".join(traceback.format_exception(error)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_exit(pid: int) -> int:
    """The exit code, negative where a signal did it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def unshare_mounts() -> None:
    """From here on, what this process mounts is seen by it and its children alone, and ends with them."""
    user, group, root = os.getuid(), os.getgid(), os.geteuid() == 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS if root else CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*args: object) -> None:
    """The command of that name."""
    subprocess.run(["mount", *map(str, args)], check=True, capture_output=True)
