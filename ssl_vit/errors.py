"""How a process ends: one exit code and one closing line (sysexits values)."""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """Exit codes of the command lines."""

    USAGE = 64  # unknown key, bad value
    DATA = 65  # missing, damaged or foreign data
    INTERNAL = 70  # a defect of ours, or out of memory
    CANNOT_CREATE = 73  # the output cannot be made, or another process holds it
    DISK = 74  # disk full, I/O error
    PREEMPTED = 75  # stopped by a signal; a checkpoint is on disk, the same command goes on
    INTEGRITY = 76  # no checkpoint verifies
    MISMATCH = 78  # the recipe differs from the one the run was started with


SIGNAL_TIMEOUT = 5.0  # seconds that the main thread may take to see a signal


class ExitError(Exception):
    """An end that is foreseen: `message` says in one line what is wrong and how to mend it.

    Where it is `shared` all processes end so together, and only the first says it.
    """

    def __init__(self, code: int, message: str, shared: bool = False):
        super().__init__(code, message, shared)
        self.code = code
        self.message = message
        self.shared = shared

    def __str__(self) -> str:
        return self.message


class SilentExit(ExitError):
    """An end of which another process tells."""


def to_exit_error(error: BaseException) -> ExitError:
    """The exit code and closing line that an exception deserves."""
    if isinstance(error, ExitError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return ExitError(
            ExitCode.DISK, f"{error.strerror}: {error.filename or 'writing'}; free some space and start again"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ExitError(ExitCode.CANNOT_CREATE, f"{error.strerror}: {error.filename}")
    if isinstance(error, KeyboardInterrupt):
        return ExitError(ExitCode.PREEMPTED, "interrupted; the same command goes on where it stopped")
    if is_out_of_memory(error):
        return ExitError(
            ExitCode.INTERNAL, "out of memory: halve micro_batch (the batch stays what it is) and start again"
        )
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return ExitError(ExitCode.INTERNAL, f"{type(error).__name__}: {text}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory, or this process's, is used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    messages = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def _interrupt(signum: int, frame: object) -> None:
    del frame
    signal.signal(signum, signal.SIG_IGN)  # what ends is not interrupted again
    raise KeyboardInterrupt


def _install_signal_handlers() -> None:
    """Interrupt the main thread, and end where it stays in a call that none reaches, as meeting others is."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, _interrupt)
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(read_fd, True)
    signal.set_wakeup_fd(write_fd)

    def exit_if_unanswered() -> None:
        while received := os.read(read_fd, 1):
            if signal.getsignal(received[0]) is _interrupt:  # else it is a child's, or the training loop's to answer
                time.sleep(SIGNAL_TIMEOUT)
            if signal.getsignal(received[0]) is _interrupt:  # the main thread has not seen it
                exit_now(to_exit_error(KeyboardInterrupt()))

    threading.Thread(target=exit_if_unanswered, daemon=True).start()


def _print_error(error: ExitError) -> None:
    if isinstance(error, SilentExit):
        return
    sys.stderr.write(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}\n")  # in one piece: other processes write there too
    sys.stderr.flush()


def exit_now(error: ExitError) -> NoReturn:
    """End the process here and now, from any thread: what waits for a lost peer would keep it for minutes."""
    _print_error(error)
    sys.stdout.flush()
    os._exit(error.code)


def run_main(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main` with the command line and end the process with its exit code.

    A foreseen end prints its one line; anything else its traceback first, then the line. SIGTERM ends a tool as
    Ctrl-C does, so that its worker processes end with it; a training loop has its own answer to both.
    """
    _install_signal_handlers()
    try:
        code = main(sys.argv[1:])
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        exit_error = to_exit_error(error)
        if not exit_error.shared or os.environ.get("RANK", "0") == "0":
            if not isinstance(error, ExitError) and exit_error.code == ExitCode.INTERNAL:
                traceback.print_exception(error)
            _print_error(exit_error)
        code = exit_error.code
    sys.exit(code)
