"""Loader workers that end in the midst of handing a batch over (issue 17); sick ones of a run: tests/train."""

import errno
import os
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ssl_vit.data import workers
from ssl_vit.exits import INTERNAL


def reset(batch: int) -> None:
    """What the main process meets where a worker's socket is gone; torch has not noticed the worker's end yet."""
    raise ConnectionResetError(errno.ECONNRESET, f"Connection reset by peer, batch {batch}")


class Batch:
    """A batch whose memory cannot be handed over: its worker ends a little later."""

    def __reduce__(self) -> Any:
        threading.Timer(0.2, os._exit, [1]).start()
        return reset, (0,)


class Source(Dataset):
    """Batches that are lost on the way, or an error of the data set."""

    def __init__(self, fails: bool):
        self.fails = fails

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        if self.fails:
            raise ConnectionResetError(errno.ECONNRESET, "the bucket's server hung up")
        return Batch()

    def where(self, sample: int) -> str:
        return f"sample {sample}"


def test_a_worker_that_ends_while_it_hands_over_is_named():
    batches = workers.loaded(Source(fails=False), 1, timeout=60, size=1, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="exited unexpectedly") as caught:
        next(batches)
    end = workers.explain(caught.value)
    assert end is not None
    assert end.code == INTERNAL
    assert str(end).startswith("loader worker 0 (pid ")
    assert "exited unexpectedly" in str(end)


def test_an_error_of_the_data_set_stays_what_it_is():
    batches = workers.loaded(Source(fails=True), 1, timeout=60, size=1, device=torch.device("cpu"))
    with pytest.raises(ConnectionResetError, match="the bucket's server hung up"):
        next(batches)
