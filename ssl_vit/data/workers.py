"""Loader processes: they end with their process, answer no signal of its group, and it is known what they were reading.

Workers keep no state, so one that dies costs no sample: the run ends, and the same command goes on.
"""

import atexit
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from multiprocessing import connection
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ssl_vit import fault_injection
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.runtime import detach_worker_signals

PREFETCH = 4  # batches that a worker is ahead
SHM_DIR = Path("/dev/shm")  # where torch puts what workers hand over
_active_iterators: "weakref.WeakKeyDictionary[Any, tuple[Any, Any]]" = weakref.WeakKeyDictionary()
"""Of each iterator over workers: what they read from, and the sample that each is at."""
SHM_FULL = -2  # in the place of a sample: /dev/shm did not take the batch
_timed_out_pids: set[int | None] = set()
"""Workers that were ended because they took too long."""
_worker_state: tuple[Any, int] | None = None  # in a worker: where it says at which sample it is


def default_workers() -> int:
    """Loader processes for this process: the node's cores but one, shared by its training processes, at most 12."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(12, len(os.sched_getaffinity(0)) // local - 1))


def worker_batches(
    source: Any, workers: int | None, timeout: float, size: int, device: torch.device, **options: Any
) -> Iterator[Any]:
    """What worker processes make of a torch data set, in batches of `size` bytes.

    One that takes longer than `timeout` seconds is an error. Raises ExitError(INTERNAL) where not even two batches fit
    into the memory through which they come.
    """
    workers = default_workers() if workers is None else workers
    if workers and SHM_DIR.exists() and (free := shutil.disk_usage(SHM_DIR).free) < 2 * size:
        hint = f"raise it to {2 * PREFETCH * workers * size >> 20} MiB (docker: --shm-size), or data.workers=0"
        raise ExitError(ExitCode.INTERNAL, f"{SHM_DIR} is too small: {free} bytes free, a batch takes {size}; {hint}")
    current_samples = RawArray("q", [-1] * max(1, workers))
    loader = DataLoader(
        source,
        **(options or {"batch_size": None}),
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_init_worker, current_samples) if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        timeout=timeout if workers else 0,
    )
    iterator = iter(loader)
    if not workers:
        return iterator
    _active_iterators[iterator] = source, current_samples
    return _with_timeout(iterator, timeout)


def _with_timeout(iterator: Any, timeout: float) -> Iterator[Any]:
    """The same batches; torch's timeout does not cover their memory, which a worker that is stopped never hands over.

    Where the main thread waits for that, only the end of the worker brings it back.
    """
    request_times: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(1.0, timeout)):
            if request_times and time.monotonic() - request_times[-1] > timeout + 1:
                _timed_out_pids.update(worker.pid for worker in iterator._workers)
                for worker in iterator._workers:
                    worker.kill()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        while True:
            request_times.append(time.monotonic())
            try:
                batch = next(iterator, done)
            except Exception as error:
                if isinstance(error, ConnectionError | EOFError) and (exited_pids := _exited_workers(iterator)):
                    raise RuntimeError(f"DataLoader worker (pid(s) {exited_pids}) exited unexpectedly") from error
                if not _is_worker_error(error):
                    iterator._shutdown_workers()  # torch's traceback refers to itself and would keep them long
                raise
            request_times.clear()
            if batch is done:
                return
            yield batch
    finally:
        done.set()


def _exited_workers(iterator: Any) -> str:
    """The workers that ended while they handed over a batch: their socket may break before torch sees their end."""
    sentinels = connection.wait([worker.sentinel for worker in iterator._workers], timeout=1.0)
    exited = [worker for worker in iterator._workers if worker.sentinel in sentinels]
    for worker in exited:
        worker.join()  # so that torch's SIGCHLD handler speaks here and now, if at all, not while this is explained
    return ", ".join(str(worker.pid) for worker in exited)


def _is_worker_error(error: BaseException) -> bool:
    """torch's error of a worker that died or hangs, not one of the data set that a worker passed on."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error)


def report_current_sample(sample: int) -> None:
    """A worker comes to a sample."""
    if _worker_state is not None:
        _worker_state[0][_worker_state[1]] = sample
        fault_injection.fault_point("sample", sample)


def diagnose_worker_failure(error: BaseException) -> ExitError | None:
    """Where an error comes of a worker that died or hangs: which, and at what; it is ended. None for other errors.

    torch raises it wherever the main thread is when the worker dies.
    """
    if not _is_worker_error(error):
        return None
    text = str(error)
    is_timeout = "timed out" in text
    pids = set() if is_timeout else {int(number) for number in re.findall(r"\d+", text)}
    descriptions = []
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more, wherever the end has come to
    for iterator, (source, current_samples) in list(_active_iterators.items()):
        for number, worker in enumerate(iterator._workers):
            is_pending = is_timeout and iterator._task_info.get(iterator._rcvd_idx, [None])[0] == number
            if worker.pid in pids or is_pending:
                descriptions.append(
                    f"loader worker {number} (pid {worker.pid}, {_describe_position(source, current_samples[number])})"
                )
                worker.kill()
    failed_workers = ", ".join(descriptions) or "a loader worker"
    if pids & _timed_out_pids:
        is_timeout, text = True, "timed out"
    reason = re.search(r"killed by signal: [\w ]+|timed out(?: after [\d.]+ seconds)?|exited unexpectedly.*", text)
    hint = "the same command goes on from the last checkpoint"
    shm_full = any(SHM_FULL in current_samples for _, current_samples in _active_iterators.values())
    if shm_full or "Bus error" in text or "shared memory" in text or "/torch_" in text:
        hint = f"{SHM_DIR} is too small: raise it (docker: --shm-size), or data.workers=0; {hint}"
    elif is_timeout:
        hint = f"is its disk or network stuck? data.timeout waits longer; {hint}"
    else:
        hint = f"did memory run out? data.workers starts fewer; {hint}"
    return ExitError(ExitCode.INTERNAL, f"{failed_workers}: {reason[0] if reason else text.strip()}; {hint}")


def _describe_position(source: Any, sample: int) -> str:
    """Where a sample lies, of sources that know."""
    if sample < 0 or not hasattr(source, "describe_sample"):
        return "before its first sample" if hasattr(source, "describe_sample") else "of a stream of tars"
    return f"at {source.describe_sample(sample)}"


@atexit.register
def _kill_workers() -> None:
    """Tell the workers to go: they ignore the signal by which Python would end them, and it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for iterator in list(_active_iterators):
        iterator._shutdown_workers()
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()  # one that hangs, or whose iterator was collected without telling it


def _identity(batch: Any) -> Any:
    return batch


def _init_worker(current_samples: Any, worker: int) -> None:
    """A worker that dies of a signal to the process group would cost the checkpoint."""
    global _worker_state
    _worker_state = current_samples, worker
    detach_worker_signals()
    Queue._on_queue_feeder_error = staticmethod(_on_feeder_error)  # type: ignore[method-assign]


def _on_feeder_error(error: Exception, batch: Any) -> None:
    """A batch for which /dev/shm has no room never comes: say so where the others look, and end."""
    del batch
    print(f"loader worker: {error}", file=sys.stderr, flush=True)
    if _worker_state is not None and ("shm" in str(error) or "/torch_" in str(error)):
        _worker_state[0][_worker_state[1]] = SHM_FULL
    os._exit(1)
