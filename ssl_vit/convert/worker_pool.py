"""Worker processes for work that may kill the process that does it, as a decoder on hostile bytes may."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ssl_vit.runtime import detach_worker_signals

Piece = TypeVar("Piece")


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one; when it is interrupted, work that has not begun is dropped."""
    pool = ProcessPoolExecutor(count, initializer=detach_worker_signals)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_resilient(
    pieces: list[Piece],
    count: int,
    work: Callable[..., Any],
    arguments: Callable[[Piece], tuple[Any, ...]],
    on_crash: Callable[[Piece], bool] = lambda piece: False,
) -> Iterator[tuple[Piece, Any]]:
    """Yield (piece, work(*arguments(piece))) in the order in which they are done.

    Where a worker dies, each piece that was in work is done again by a process of its own. If that dies too, `on_crash`
    says whether something was learnt for another try; where it was not, BrokenProcessPool is raised.
    """
    pending = list(pieces)
    while pending:
        with worker_processes(count) as pool:
            futures = {pool.submit(work, *arguments(piece)): piece for piece in pending}
            try:
                for future in as_completed(futures):
                    value = future.result()
                    pending.remove(futures[future])
                    yield futures[future], value
            except BrokenProcessPool:
                pass
        for piece in pending[:count]:  # they are begun in their order
            value = _run_in_own_process(piece, work, arguments, on_crash)
            pending.remove(piece)
            yield piece, value


def _run_in_own_process(
    piece: Piece,
    work: Callable[..., Any],
    arguments: Callable[[Piece], tuple[Any, ...]],
    on_crash: Callable[[Piece], bool],
) -> Any:
    while True:
        try:
            with worker_processes(1) as pool:
                return pool.submit(work, *arguments(piece)).result()
        except BrokenProcessPool:
            if not on_crash(piece):
                raise
