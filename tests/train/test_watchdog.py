"""Bounded waiting: whoever waits in vain ends, with the names of those that are missing; nobody else is disturbed.

All processes of all scenarios share one start (watchdog_worker.py).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssl_vit.exits import INTERNAL
from ssl_vit.train import watchdog
from ssl_vit.train.watchdog import Watchdog

HERE = Path(__file__).parent
ON = f"on {socket.gethostname()}"
END = 5  # seconds from the timeout to the end of a process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each scenario's ranks ended with."""
    folder = tmp_path_factory.mktemp("watchdog")
    worker = [sys.executable, str(HERE / "watchdog_worker.py"), str(folder)]
    path = {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(worker, env=os.environ | path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    ends = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/found.json")}
    for rank in (rank for ranks in ends.values() for rank in ranks):
        lines = rank["stderr"].splitlines(keepends=True)  # torch says so where the machine's resolver is slow
        rank["stderr"] = "".join(line for line in lines if "hostname of the client socket cannot be" not in line)
    return ends


def bad_end(rank: dict[str, Any], line: str) -> None:
    """It ended at once after its timeout, with the code, this line as the last one, and told of both before."""
    assert rank["exit"] == INTERNAL, rank
    assert rank["code"] == INTERNAL
    assert line in rank["message"]
    assert rank["stderr"].endswith(f"{rank['message']}\n")
    assert rank["late"] < END


def waited(rank: dict[str, Any], line: str) -> None:
    """It ended by its watchdog, which shows where it hung."""
    bad_end(rank, f"{line}; the same command goes on from the last checkpoint")
    assert "most recent call first" in rank["stderr"]
    assert "watchdog_worker.py" in rank["stderr"]


def one_tells(ranks: list[dict[str, Any]], line: str) -> None:
    """All ended at once, and one of them said why."""
    assert [rank["exit"] for rank in ranks] == [INTERNAL] * len(ranks), ranks
    assert all(line in rank["message"] for rank in ranks), ranks
    told = [rank["stderr"] for rank in ranks if rank["stderr"]]
    assert len(told) == 1
    assert line in told[0]
    assert told[0].count("\n") == 1


def test_a_stopped_peer_is_named_and_ended(found):
    line = f"rank 0 has been at step 1 for 2 s (timeout=1.5): no sign of life from rank 1 {ON}"
    waited(found["stopped"][0], line)
    assert found["stopped"][1]["exit"] == -9  # it would outlive its launcher


def test_those_that_wait_for_it_together_name_nobody_else(found):
    for number in (0, 2):
        rank = found["one of three stopped"][number]
        assert rank["exit"] == INTERNAL
        assert f"no sign of life from rank 1 {ON}" in rank["message"]
        assert "most recent call first" in rank["stderr"]


def test_a_master_that_is_stopped_with_the_store_is_named(found):
    """As under Slurm, where rank 0 holds the store: nobody answers, and asking must not take for ever."""
    waited(found["rank 0 stopped"][1], f"no sign of life from rank 0 {ON}")
    waited(found["rank 0 stopped elsewhere"][1], "the machine of rank 0 (127.0.0.1) does not answer")


def test_a_killed_peer_is_named_at_once_by_one(found):
    ranks = found["one of three killed"]
    one_tells([ranks[0], ranks[2]], f"rank 1 {ON} (pid ")


def test_a_killed_peer_is_named_where_nothing_broke(found):
    ranks = found["killed unheard"]
    one_tells([ranks[0], ranks[2]], f"rank 1 {ON} (pid ")


def test_a_killed_peer_on_another_machine_is_named(found):
    ranks = found["killed elsewhere"]
    one_tells([ranks[0], ranks[2]], f"no sign of life from rank 1 {ON}")
    waited(found["killed unheard elsewhere"][0], f"at step 1 for 3 s (timeout=3): no sign of life from rank 1 {ON}")


def test_a_killed_master_is_named(found):
    bad_end(found["rank 0 killed"][1], f"rank 1 lost its peers at step 1: rank 0 {ON} (pid ")


def test_who_fails_has_the_word(found):
    ranks = found["failed"]
    assert [(rank["exit"], rank["stderr"]) for rank in ranks] == [(INTERNAL, ""), (1, ""), (INTERNAL, "")]
    assert all(f"rank 1 {ON} failed: a reason" in ranks[number]["message"] for number in (0, 2))


def test_a_slow_peer_is_named_with_the_place_where_it_is(found):
    late = f"rank 1 {ON} is still at the checkpoint of step 3"
    waited(found["slow"][0], f"rank 0 has been at step 4 for 3 s (timeout=3): {late}")
    own = "rank 1 has been at the checkpoint of step 3 for 3 s (timeout=3): the others wait for it"
    waited(found["slow"][1], own)


def test_where_all_wait_it_is_the_network(found):
    for number, rank in enumerate(found["stuck"]):
        line = f"rank {number} has been at step 1 for 3 s (timeout=3)"
        waited(rank, f"{line}: no process is behind: the network between them is stuck")


def test_a_full_disk_does_not_keep_a_process(found):
    """Its verdict cannot be written; it ends all the same."""
    for rank in found["told in vain"]:
        assert rank["exit"] == INTERNAL
        assert "has been at step 1 for" in rank["stderr"]


@pytest.mark.parametrize("scenario", ["steady", "recovers"])
def test_who_goes_on_is_not_disturbed(found, scenario: str):
    """Also where it stood still for longer than the timeout, but went on before the verdict."""
    assert [(rank["exit"], rank["stderr"]) for rank in found[scenario]] == [(0, ""), (0, "")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PULSE", 0.01)


def alone(world: int, missing: str) -> Watchdog:
    """A watchdog that asks nobody."""
    stub: Any = SimpleNamespace(process_index=0, num_processes=1)
    dog: Any = Watchdog(stub, 600, lambda end: None)
    dog.world, dog._missing, dog._lost = world, lambda: missing, lambda: None
    dog.beat("step 7")
    return dog


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:"
CLOSED = f"{GLOO}534] Connection closed by peer [127.0.0.1]:12345"
RESET = f"{GLOO}547] Read error [10.0.0.2]:12345: Connection reset by peer"
TIMED_OUT = f"{GLOO}151] Timed out waiting 660000ms for recv operation to complete"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error"


@pytest.mark.parametrize("text", [CLOSED, RESET, TIMED_OUT, NCCL])
def test_an_error_of_a_lost_peer_is_explained(text: str):
    end = alone(2, "no sign of life from rank 1 on b").explain(RuntimeError(text))
    assert end is not None
    assert end.code == INTERNAL
    said = "rank 0 lost its peers at step 7: no sign of life from rank 1 on b"
    assert end.message == f"{said}; the same command goes on from the last checkpoint"


@pytest.mark.parametrize(
    ("world", "error"),
    [(1, RuntimeError(CLOSED)), (2, ValueError(CLOSED)), (2, RuntimeError("shapes differ")), (2, KeyboardInterrupt())],
)
def test_other_errors_are_left_as_they_are(world: int, error: BaseException):
    assert alone(world, "no sign of life from rank 1 on b").explain(error) is None


def test_an_error_that_nobody_is_missing_for_is_still_told():
    """NCCL asks for memory of its own, which a full GPU does not have: that is not the network's fault."""
    text = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
    end = alone(2, "").explain(RuntimeError(text))
    assert end is None or "out of memory" in end.message
