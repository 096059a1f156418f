"""Signals: the first stops in order, the same one again soon changes nothing, a later one ends at once."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from ssl_vit.train import distributed
from ssl_vit.train.distributed import AGAIN, StopSignal


def test_one_signal_stops_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    """Slurm sends TERM twice within milliseconds where it preempts without grace."""
    alone: Any = SimpleNamespace(num_processes=1)
    now, ended = [100.0], []
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(alone)
    try:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        now[0] += AGAIN / 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.raised, ended) == (signal.SIGTERM, [])
        now[0] += AGAIN
        os.kill(os.getpid(), signal.SIGUSR2)
        assert ended == [128 + signal.SIGUSR2]
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == before
