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
from ssl_vit.errors import INTERNAL, Refusal
from ssl_vit.runtime import serve_parent

PREFETCH = 4  # batches that a worker is ahead
SHARED = Path("/dev/shm")  # where torch puts what workers hand over
_working: "weakref.WeakKeyDictionary[Any, tuple[Any, Any]]" = weakref.WeakKeyDictionary()
"""Of each iterator over workers: what they read from, and the sample that each is at."""
NO_ROOM = -2  # in the place of a sample: /dev/shm did not take the batch
_late: set[int | None] = set()
"""Workers that were ended because they took too long."""
_mine: tuple[Any, int] | None = None  # in a worker: where it says at which sample it is


def default_workers() -> int:
    """Loader processes for this process: the node's cores but one, shared by its training processes, at most 12."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(12, len(os.sched_getaffinity(0)) // local - 1))


def loaded(
    source: Any, workers: int | None, timeout: float, size: int, device: torch.device, **options: Any
) -> Iterator[Any]:
    """What worker processes make of a torch data set, in batches of `size` bytes.

    One that takes longer than `timeout` seconds is an error. Raises Refusal(INTERNAL) where not even two batches fit
    into the memory through which they come.
    """
    workers = default_workers() if workers is None else workers
    if workers and SHARED.exists() and (free := shutil.disk_usage(SHARED).free) < 2 * size:
        cure = f"raise it to {2 * PREFETCH * workers * size >> 20} MiB (docker: --shm-size), or data.workers=0"
        raise Refusal(INTERNAL, f"{SHARED} is too small: {free} bytes free, a batch takes {size}; {cure}")
    at = RawArray("q", [-1] * max(1, workers))
    loader = DataLoader(
        source,
        **(options or {"batch_size": None}),
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_begin_work, at) if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        timeout=timeout if workers else 0,
    )
    iterator = iter(loader)
    if not workers:
        return iterator
    _working[iterator] = source, at
    return _bounded(iterator, timeout)


def _bounded(iterator: Any, timeout: float) -> Iterator[Any]:
    """The same batches; torch's timeout does not cover their memory, which a worker that is stopped never hands over.

    Where the main thread waits for that, only the end of the worker brings it back.
    """
    asked: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, timeout)):
            if asked and time.monotonic() - asked[-1] > timeout + 1:
                _late.update(worker.pid for worker in iterator._workers)
                for worker in iterator._workers:
                    worker.kill()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        while True:
            asked.append(time.monotonic())
            try:
                batch = next(iterator, over)
            except Exception as error:
                if isinstance(error, ConnectionError | EOFError) and (gone := _ended(iterator)):
                    raise RuntimeError(f"DataLoader worker (pid(s) {gone}) exited unexpectedly") from error
                if not _of_workers(error):
                    iterator._shutdown_workers()  # torch's traceback refers to itself and would keep them long
                raise
            asked.clear()
            if batch is over:
                return
            yield batch
    finally:
        over.set()


def _ended(iterator: Any) -> str:
    """The workers that ended while they handed over a batch: their socket may break before torch sees their end."""
    ended = connection.wait([worker.sentinel for worker in iterator._workers], timeout=1.0)
    gone = [worker for worker in iterator._workers if worker.sentinel in ended]
    for worker in gone:
        worker.join()  # so that torch's SIGCHLD handler speaks here and now, if at all, not while this is explained
    return ", ".join(str(worker.pid) for worker in gone)


def _of_workers(error: BaseException) -> bool:
    """torch's error of a worker that died or hangs, not one of the data set that a worker passed on."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error)


def now_at(sample: int) -> None:
    """A worker comes to a sample."""
    if _mine is not None:
        _mine[0][_mine[1]] = sample
        fault_injection.point("sample", sample)


def explain(error: BaseException) -> Refusal | None:
    """Where an error comes of a worker that died or hangs: which, and at what; it is ended. None for other errors.

    torch raises it wherever the main thread is when the worker dies.
    """
    if not _of_workers(error):
        return None
    text = str(error)
    hangs = "timed out" in text
    named = set() if hangs else {int(number) for number in re.findall(r"\d+", text)}
    found = []
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more, wherever the end has come to
    for iterator, (source, at) in list(_working.items()):
        for number, worker in enumerate(iterator._workers):
            owes = hangs and iterator._task_info.get(iterator._rcvd_idx, [None])[0] == number
            if worker.pid in named or owes:
                found.append(f"loader worker {number} (pid {worker.pid}, {_place(source, at[number])})")
                worker.kill()
    who = ", ".join(found) or "a loader worker"
    if named & _late:
        hangs, text = True, "timed out"
    why = re.search(r"killed by signal: [\w ]+|timed out(?: after [\d.]+ seconds)?|exited unexpectedly.*", text)
    cure = "the same command goes on from the last checkpoint"
    no_room = any(NO_ROOM in at for _, at in _working.values())
    if no_room or "Bus error" in text or "shared memory" in text or "/torch_" in text:
        cure = f"{SHARED} is too small: raise it (docker: --shm-size), or data.workers=0; {cure}"
    elif hangs:
        cure = f"is its disk or network stuck? data.timeout waits longer; {cure}"
    else:
        cure = f"did memory run out? data.workers starts fewer; {cure}"
    return Refusal(INTERNAL, f"{who}: {why[0] if why else text.strip()}; {cure}")


def _place(source: Any, sample: int) -> str:
    """Where a sample lies, of sources that know."""
    if sample < 0 or not hasattr(source, "where"):
        return "before its first sample" if hasattr(source, "where") else "of a stream of tars"
    return f"at {source.where(sample)}"


@atexit.register
def _dismiss() -> None:
    """Tell the workers to go: they ignore the signal by which Python would end them, and it would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for iterator in list(_working):
        iterator._shutdown_workers()
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()  # one that hangs, or whose iterator was collected without telling it


def _as_is(batch: Any) -> Any:
    return batch


def _begin_work(at: Any, worker: int) -> None:
    """A worker that dies of a signal to the process group would cost the checkpoint."""
    global _mine
    _mine = at, worker
    serve_parent()
    Queue._on_queue_feeder_error = staticmethod(_not_handed_over)  # type: ignore[method-assign]


def _not_handed_over(error: Exception, batch: Any) -> None:
    """A batch for which /dev/shm has no room never comes: say so where the others look, and end."""
    del batch
    print(f"loader worker: {error}", file=sys.stderr, flush=True)
    if _mine is not None and ("shm" in str(error) or "/torch_" in str(error)):
        _mine[0][_mine[1]] = NO_ROOM
    os._exit(1)
