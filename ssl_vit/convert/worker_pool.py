"""Worker processes for work that may kill the process that does it, as a decoder on hostile bytes may."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ssl_vit.runtime import serve_parent

Piece = TypeVar("Piece")


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one; when it is interrupted, work that has not begun is dropped."""
    pool = ProcessPoolExecutor(count, initializer=serve_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def do(
    pieces: list[Piece],
    count: int,
    work: Callable[..., Any],
    arguments: Callable[[Piece], tuple[Any, ...]],
    learn: Callable[[Piece], bool] = lambda piece: False,
) -> Iterator[tuple[Piece, Any]]:
    """Yield (piece, work(*arguments(piece))) in the order in which they are done.

    Where a worker dies, each piece that was in work is done again by a process of its own. Where that dies too, `learn`
    says whether something was learnt for another try; where it was not, BrokenProcessPool is raised.
    """
    left = list(pieces)
    while left:
        with workers(count) as pool:
            futures = {pool.submit(work, *arguments(piece)): piece for piece in left}
            try:
                for future in as_completed(futures):
                    value = future.result()
                    left.remove(futures[future])
                    yield futures[future], value
            except BrokenProcessPool:
                pass
        for piece in left[:count]:  # they are begun in their order
            value = _alone(piece, work, arguments, learn)
            left.remove(piece)
            yield piece, value


def _alone(
    piece: Piece,
    work: Callable[..., Any],
    arguments: Callable[[Piece], tuple[Any, ...]],
    learn: Callable[[Piece], bool],
) -> Any:
    while True:
        try:
            with workers(1) as pool:
                return pool.submit(work, *arguments(piece)).result()
        except BrokenProcessPool:
            if not learn(piece):
                raise
