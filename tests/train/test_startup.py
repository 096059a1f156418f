"""Checks before the first step: what differs or is not there is named, with its rank, in one line on all processes."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ssl_vit
from ssl_vit import config, exits, recipe, session
from ssl_vit.exits import CANNOT_CREATE, DATA, MISMATCH, USAGE, Refusal
from ssl_vit.train import startup
from ssl_vit.train.startup import Facts, compare, meet, refuse_first
from tests.conftest import TINY
from tests.starts import Start, free_port

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """By rank how each start ended, all in the same three processes (startup_worker.py)."""
    folder = tmp_path_factory.mktemp("startup")
    for machine in "ab":
        shutil.copytree(shards, folder / machine / "shards")
    (folder / "b" / "shards" / "train" / "000001.tar").unlink()
    (folder / "b" / "shards" / "train" / "000002.tar").write_bytes(b"short")
    shutil.copytree(Path(ssl_vit.__file__).parent, folder / "ssl_vit", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ssl_vit" / "counter.py").write_text("# another version")
    words = [*TINY, f"data.train={shards}/train", f"data.val={shards}/val", "tracker=none"]
    words += ["batch=9", "steps=2", "optim.warmup_steps=1"]
    worker = "../tests/train/startup_worker"
    start = Start([str(folder), *words], folder / "logs", 3, tool=worker, GLOO_SOCKET_IFNAME="lo")
    assert start.wait(200) == [0, 0, 0], start.said()
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(3)]


OTHERS = " (processes: 2)"
ONE, FIRST = f"rank 1 on {HOST}", f"rank 0 on {HOST}"
SAME, SLOW = "install the same", "the slowest would set the pace; start on machines that are alike"
CODE, SHARE = "ssl_vit/counter.py differs (1 in all)", "name one on a file system that all machines share"
RECIPE = "seed: 0 -> 7; optim.lr: 0.001 -> 1.0: give all the same command"
TORCH = f"has torch 2.0.0, {FIRST} has {startup.version('torch')}"
ENDS = {
    "batch": (USAGE, "batch=8 cannot be shared by 3 processes; these can: 1, 2, 4, 8"),
    "code": (MISMATCH, f"{ONE} runs other code than {FIRST}: {CODE}: {SAME} version on all machines{OTHERS}"),
    "library": (MISMATCH, f"{ONE} {TORCH}: {SAME} on all machines{OTHERS}"),
    "gpu": (USAGE, f"{ONE} has NVIDIA L4 of 22 GiB, {FIRST} has no GPU: {SLOW}{OTHERS}"),
    "recipe": (MISMATCH, f"{ONE} was given another recipe than rank 0: {RECIPE}{OTHERS}"),
    "no data": (DATA, "/nowhere: no such folder"),
    "held": (CANNOT_CREATE, "; wait for it, or name another"),
    "folder": (CANNOT_CREATE, f"{ONE} does not see the run folder run of rank 0: {SHARE}{OTHERS}"),
    "shards": (DATA, f"{ONE}: shards/train: 2 of 4 shards are bad: 000001.tar (missing), 000002.tar (5 bytes, not "),
    "good": (0, ""),
}


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", ENDS)
def test_all_processes_end_alike(found, scenario: str):
    """With one code and line, which is marked as shared, so that only rank 0 prints it."""
    code, message = ENDS[scenario]
    for rank in (rank[scenario] for rank in found):
        assert rank["code"] == code, rank
        assert message in rank["message"]
        assert rank["message"] == message or scenario != "batch"
        assert rank["shared"]


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_only_the_first_of_many_says_what_all_share(rank: int, lines: int, shared: bool, monkeypatch, capfd):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(exits, "_answer_signals", lambda: None)

    def main(words: list[str]) -> int:
        raise Refusal(DATA, "shards: gone", shared)

    with pytest.raises(SystemExit) as caught:
        exits.run(main)
    assert caught.value.code == DATA
    assert capfd.readouterr().err.count("shards: gone") == (lines if shared else 1)


def facts(**changed: Any) -> dict[str, Any]:
    mine = {"host": "a", "recipe": "seed: 0\n", "code": {"model.py": "1", "config.py": "2"}, "gpu": "H100 of 79 GiB"}
    return mine | {"libraries": {"torch": "2.14.1", "deepspeed": "missing"}} | changed


def test_this_process_has_facts_that_travel():
    here = vars(Facts.here(recipe.Pretrain()))
    assert json.loads(json.dumps(here)) == here
    assert here["recipe"] == config.dump(recipe.Pretrain())
    assert {"model.py", "train/startup.py"} <= set(here["code"])
    assert here["libraries"]["torch"] == startup.version("torch")
    assert here["libraries"].keys() == set(startup.LIBRARIES)


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (facts(code={"model.py": "1", "config.py": "2", "b.py": "3"}), "ssl_vit/b.py differs (1 in all)"),
        (facts(code={"model.py": "9"}), "ssl_vit/config.py differs (2 in all)"),
        # another version, which may not have told what is compared next
        ({"code": {}, "since": 3}, "runs other code than rank 0 on a: ssl_vit/config.py differs (2 in all)"),
        (facts(libraries={"torch": "2.14.1", "deepspeed": "0.19.8"}), "has deepspeed 0.19.8, rank 0 on a has"),
        (facts(recipe="seed: 0\nworld: 3\n"), "world"),
    ],
)
def test_a_difference_is_named_with_its_rank(other: dict[str, Any], line: str):
    assert compare([facts(), facts(host="b"), facts(host="c")]) == [None, None, None]
    fine, wrong = compare([facts(), other | {"host": "b"}])
    assert fine is None
    assert wrong is not None
    assert (wrong.code, wrong.message.split(" on b ")[0]) == (MISMATCH, "rank 1")
    assert line in wrong.message


def test_the_first_of_many_findings_stands_for_all():
    refuse_first([None, None])
    with pytest.raises(Refusal) as caught:
        refuse_first([None, (DATA, "rank 1: bad"), Refusal(USAGE, "rank 2: worse")])
    assert (caught.value.code, caught.value.message, caught.value.shared) == (DATA, f"rank 1: bad{OTHERS}", True)
    with pytest.raises(Refusal, match=r"^rank 2: worse$"):
        refuse_first([None, None, Refusal(USAGE, "rank 2: worse")])


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port of this machine that nobody else gets, where nobody listens until `listen` is called."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        yield made


def met(rank: int, port: object, start: Callable[[], object] = lambda: meet(0), **more: str) -> str:
    """What a process of two, started without a launcher of torch's, is refused with, or nothing."""
    given = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    with patch.dict(os.environ, given):
        for name in {"TORCHELASTIC_USE_AGENT_STORE"} - set(more) | {name for name in given if not given[name]}:
            os.environ.pop(name, None)
        try:
            start()
        except Refusal as refusal:
            return refusal.message if refusal.code == USAGE else repr(refusal)
    return ""


def test_a_busy_port_ends_a_start_before_anything_is_made(server: socket.socket, shards: Path, tmp_path: Path):
    """Unless a launcher has it, where both ranks find it; a free one is left free."""
    server.listen()
    taken = server.getsockname()[1]
    line = met(0, taken)
    assert line.startswith(f"rank 0: port {taken} of this machine cannot be had (Address already in use")
    assert line.endswith("): set another MASTER_PORT on all machines")
    words = [*TINY, f"data.train={shards}/train", f"run={tmp_path}/run"]
    assert f"port {taken}" in met(0, taken, lambda: session.run(config.parse(recipe.Pretrain, words, recipe.FOLDER)))
    assert not (tmp_path / "run").exists()
    for rank in (0, 1):
        assert met(rank, taken, TORCHELASTIC_USE_AGENT_STORE="True") == ""
    port = free_port()
    assert met(0, port) == ""
    socket.create_server(("", port)).close()


def test_a_master_that_is_not_there_is_named_and_one_that_comes_later_is_waited_for(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    port = server.getsockname()[1]
    line = met(1, port)
    assert line.startswith(f"rank 1 on {HOST}: no answer from the master at 127.0.0.1:{port} (")
    assert line.endswith("in 0 s: is rank 0 running there, the address right, the port open?")
    monkeypatch.setattr(startup.time, "sleep", lambda seconds: server.listen())
    assert met(1, port, lambda: meet(60)) == ""


def test_half_an_environment_is_named_and_one_process_meets_nobody():
    assert "MASTER_PORT=auto" in met(1, "auto")  # which is no number
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        line = f"WORLD_SIZE=2 but {name} not set: use accelerate launch, or set them"
        assert met(1, "auto", **{name: ""}) == line
    assert met(0, "", WORLD_SIZE="1") == ""
