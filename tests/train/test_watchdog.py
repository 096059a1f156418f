"""Bounded waiting: whoever waits in vain ends, with the names of those that are missing; nobody else is disturbed.

Processes that wait are those of watchdog_worker.py, which would be ended by an alarm, with another code, in the end.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode
from ssl_vit.train import watchdog
from ssl_vit.train.watchdog import Watchdog
from tests.train.engines import environment
from tests.train.watchdog_worker import SCENARIOS

pytestmark = pytest.mark.ranks
WORKER = Path(__file__).with_name("watchdog_worker.py")
ON_HOST = f"on {socket.gethostname()}"
RankResults = dict[str, list[dict[str, Any]]]


def run_scenarios(folder: Path, names: list[str]) -> RankResults:
    """What each scenario's ranks ended with."""
    command = [sys.executable, str(WORKER), str(folder), *names]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    results = {name: json.loads((folder / name / "found.json").read_text()) for name in names}
    for result in (rank for ranks in results.values() for rank in ranks):
        lines = result["stderr"].splitlines(keepends=True)  # torch says so where the machine's resolver is slow
        result["stderr"] = "".join(line for line in lines if "hostname of the client socket cannot be" not in line)
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> RankResults:
    """All scenarios, at once, but for the one of the default tier."""
    return run_scenarios(tmp_path_factory.mktemp("watchdog"), [name for name in SCENARIOS if name != "stopped"])


def assert_watchdog_ended(result: dict[str, Any], line: str) -> None:
    """It ended by its watchdog: with the code, this line as the last one, of both told before, and where it hung."""
    assert result["exit"] == result["code"] == ExitCode.INTERNAL, result
    assert f"{line}; the same command goes on from the last checkpoint" in result["message"]
    assert result["stderr"].endswith(f"{result['message']}\n")
    assert "most recent call first" in result["stderr"]
    assert "watchdog_worker.py" in result["stderr"]


def test_a_stopped_peer_is_named_and_ended(tmp_path: Path):
    first, second = run_scenarios(tmp_path, ["stopped"])["stopped"]
    assert_watchdog_ended(
        first, f"rank 0 has been at step 1 for 2 s (timeout=1.5): no sign of life from rank 1 {ON_HOST}"
    )
    assert second["exit"] == -9  # it would outlive its launcher


STUCK = "has been at step 1 for 3 s (timeout=3): no process is behind: the network between them is stuck"
STALLED = {  # (scenario, rank): what its watchdog says
    # as under Slurm, where rank 0 holds the store: nobody answers, and asking must not take for ever
    ("rank 0 stopped elsewhere", 1): "the machine of rank 0 (127.0.0.1) does not answer",
    ("killed unheard elsewhere", 0): f"at step 1 for 3 s (timeout=3): no sign of life from rank 1 {ON_HOST}",
    ("stuck", 0): f"rank 0 {STUCK}",
    ("stuck", 1): f"rank 1 {STUCK}",
}


@pytest.mark.process
@pytest.mark.parametrize(("scenario", "rank"), STALLED)
def test_who_waits_in_vain_says_for_whom(found: RankResults, scenario: str, rank: int):
    assert_watchdog_ended(found[scenario][rank], STALLED[scenario, rank])


KILLED = {
    "one of three killed": f"rank 1 {ON_HOST} (pid ",
    "killed unheard": f"rank 1 {ON_HOST} (pid ",  # the others wait for something that does not break
    "killed elsewhere": f"no sign of life from rank 1 {ON_HOST}",
}


@pytest.mark.process
@pytest.mark.parametrize("scenario", KILLED)
def test_a_killed_peer_is_named_at_once_by_one(found: RankResults, scenario: str):
    ranks = found[scenario][::2]
    assert [rank["exit"] for rank in ranks] == [ExitCode.INTERNAL] * 2, ranks
    assert all(KILLED[scenario] in rank["message"] for rank in ranks), ranks
    [stderr] = [rank["stderr"] for rank in ranks if rank["stderr"]]
    assert KILLED[scenario] in stderr
    assert stderr.count("\n") == 1


@pytest.mark.process
def test_of_three_those_that_wait_name_nobody_else_and_who_fails_says_so_itself(found: RankResults):
    for rank in found["one of three stopped"][::2]:
        assert rank["exit"] == ExitCode.INTERNAL
        assert f"no sign of life from rank 1 {ON_HOST}" in rank["message"]
        assert "most recent call first" in rank["stderr"]
    ranks = found["failed"]
    assert [(rank["exit"], rank["stderr"]) for rank in ranks] == [
        (ExitCode.INTERNAL, ""),
        (1, ""),
        (ExitCode.INTERNAL, ""),
    ]
    assert all(f"rank 1 {ON_HOST} failed: a reason" in rank["message"] for rank in ranks[::2])


@pytest.mark.process
def test_a_full_disk_keeps_nobody_and_who_goes_on_is_not_disturbed(found: RankResults):
    """A verdict may not be written; and one may stand still for longer than the timeout, but go on before it."""
    for rank in found["told in vain"]:
        assert rank["exit"] == ExitCode.INTERNAL
        assert "has been at step 1 for" in rank["stderr"]
    assert [(rank["exit"], rank["stderr"]) for rank in found["steady"] + found["recovers"]] == [(0, "")] * 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PULSE", 0.01)


def make_watchdog(world: int, missing: str) -> Watchdog:
    """A watchdog that asks nobody."""
    dog: Any = Watchdog(Distributed(), 600, lambda end: None)
    dog.world, dog._describe_missing, dog._find_failure = world, lambda: missing, lambda: None
    dog.heartbeat("step 7")
    return dog


def make_report(pulse: int, beats: int, location: str, ending: bool = False) -> dict[str, Any]:
    return {"host": "b", "pulse": pulse, "beats": beats, "place": location, "ending": ending}


@pytest.mark.parametrize(
    ("mine", "other", "later", "said"),  # how far this rank has come, and what is known of the other, twice
    [
        (9, make_report(1, 9, "step 7"), make_report(1, 9, "step 7"), "no sign of life from rank 1 on b"),
        (9, make_report(1, 8, "step 6"), make_report(2, 8, "step 6"), "rank 1 on b is still at step 6"),
        (8, make_report(1, 9, "step 7"), make_report(2, 9, "step 7"), "the others wait for it"),
        (9, make_report(1, 9, "step 7"), make_report(2, 9, "step 7"), ""),
        (9, make_report(1, 9, "step 7"), make_report(1, 9, "step 7", ending=True), ""),
    ],
)
def test_who_is_missing_by_what_all_tell(mine: int, other: dict[str, Any], later: dict[str, Any], said: str):
    dog: Any = make_watchdog(2, "")
    del dog._describe_missing  # the real one
    answers = iter([[make_report(1, mine, "step 7"), other], [make_report(2, mine, "step 7"), later]])
    dog._prefix, dog._query_store = (
        "",
        SimpleNamespace(multi_get=lambda _: [json.dumps(report) for report in next(answers)]),
    )
    assert dog._describe_missing() == said


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:"
CLOSED = f"{GLOO}534] Connection closed by peer [127.0.0.1]:12345"
RESET = f"{GLOO}547] Read error [10.0.0.2]:12345: Connection reset by peer"
TIMED_OUT = f"{GLOO}151] Timed out waiting 660000ms for recv operation to complete"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error"


PEER = "no sign of life from rank 1 on b"


def test_an_error_of_a_lost_peer_is_explained_and_others_are_left_as_they_are():
    for text in (CLOSED, RESET, TIMED_OUT, NCCL):
        end = make_watchdog(2, PEER).diagnose(RuntimeError(text))
        assert end is not None
        assert end.code == ExitCode.INTERNAL
        description = f"rank 0 lost its peers at step 7: {PEER}"
        assert end.message == f"{description}; the same command goes on from the last checkpoint"
    for error in (ValueError(CLOSED), RuntimeError("shapes differ"), KeyboardInterrupt()):
        assert make_watchdog(2, PEER).diagnose(error) is None
    assert make_watchdog(1, PEER).diagnose(RuntimeError(CLOSED)) is None
    # NCCL asks for memory of its own, which a full GPU does not have: nobody is missing, it is not the network's fault
    text = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
    end = make_watchdog(2, "").diagnose(RuntimeError(text))
    assert end is None or "out of memory" in end.message
