"""Checks before the first step: what differs or is not there is named, with its rank, in one line on all processes."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

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
    for rank in found:
        assert rank[scenario]["code"] == code, rank[scenario]
        assert message in rank[scenario]["message"]
        assert rank[scenario]["shared"]


@pytest.mark.ranks
def test_a_number_of_processes_that_does_not_divide_the_batch(found):
    for rank in found:
        assert rank["batch"]["code"] == USAGE
        assert rank["batch"]["message"] == "batch=8 cannot be shared by 3 processes; these can: 1, 2, 4, 8"


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


def test_processes_that_are_alike_have_no_difference():
    assert compare([facts(), facts(host="b"), facts(host="c")]) == [None, None, None]


@pytest.mark.parametrize(
    ("other", "code", "line"),
    [
        (facts(code={"model.py": "9", "config.py": "2"}), MISMATCH, "ssl_vit/model.py differs (1 in all)"),
        (facts(code={"model.py": "1", "config.py": "2", "b.py": "3"}), MISMATCH, "ssl_vit/b.py differs (1 in all)"),
        (facts(code={"model.py": "9"}), MISMATCH, "ssl_vit/config.py differs (2 in all)"),
        # another version, which may not have told what is compared next
        ({"code": {}, "since": 3}, MISMATCH, "runs other code than rank 0 on a: ssl_vit/config.py differs (2 in all)"),
        (
            facts(libraries={"torch": "2.14.1", "deepspeed": "0.19.8"}),
            MISMATCH,
            "has deepspeed 0.19.8, rank 0 on a has",
        ),
        (facts(recipe="seed: 1\n"), MISMATCH, "seed: 0 -> 1: give all the same command"),
        (facts(recipe="seed: 0\nworld: 3\n"), MISMATCH, "world"),
        (facts(gpu="A100 of 40 GiB"), USAGE, "has A100 of 40 GiB, rank 0 on a has H100 of 79 GiB: the slowest"),
    ],
)
def test_a_difference_is_named_with_its_rank(other: dict[str, Any], code: int, line: str):
    fine, wrong = compare([facts(), other | {"host": "b"}])
    assert fine is None
    assert wrong is not None
    assert (wrong.code, wrong.message.split(" on b ")[0]) == (code, "rank 1")
    assert line in wrong.message


def test_the_first_of_many_findings_stands_for_all():
    refuse_first([None, None])
    with pytest.raises(Refusal) as caught:
        refuse_first([None, (DATA, "rank 1: bad"), Refusal(USAGE, "rank 2: worse")])
    assert (caught.value.code, caught.value.message, caught.value.shared) == (DATA, f"rank 1: bad{OTHERS}", True)
    with pytest.raises(Refusal, match=r"^rank 2: worse$"):
        refuse_first([None, None, Refusal(USAGE, "rank 2: worse")])


@pytest.fixture
def silent():
    """A port of this machine that nobody else gets, where nobody listens until `listen` is called."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server


@pytest.fixture
def taken(silent: socket.socket):
    """A port of this machine that is listened on."""
    silent.listen()
    return silent.getsockname()[1]


@pytest.fixture
def started_as(monkeypatch: pytest.MonkeyPatch):
    """Sets the environment of a process of two, started without a launcher of torch's."""

    def start(rank: int, port: int | str, **more: str) -> None:
        given = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return start


def refused(patience: float = 0) -> str:
    with pytest.raises(Refusal) as caught:
        meet(patience)
    assert caught.value.code == USAGE
    return caught.value.message


def test_a_busy_port_ends_a_start_before_anything_is_made(started_as, taken: int, shards: Path, tmp_path: Path):
    started_as(0, taken)
    line = refused()
    assert line.startswith(f"rank 0: port {taken} of this machine cannot be had (Address already in use")
    assert line.endswith("): set another MASTER_PORT on all machines")
    words = [*TINY, f"data.train={shards}/train", f"run={tmp_path}/run"]
    with pytest.raises(Refusal, match=f"port {taken}"):
        session.run(config.parse(recipe.Pretrain, words, recipe.FOLDER))
    assert not (tmp_path / "run").exists()


def test_the_port_of_a_launcher_is_its_own(started_as, taken: int):
    """Both ranks find it there."""
    for rank in (0, 1):
        started_as(rank, taken, TORCHELASTIC_USE_AGENT_STORE="True")
        meet(0)


def test_a_free_port_is_left_free(started_as):
    port = free_port()
    started_as(0, port)
    meet(0)
    socket.create_server(("", port)).close()


def test_a_master_that_is_not_there_is_named(started_as, silent: socket.socket):
    port = silent.getsockname()[1]
    started_as(1, port)
    line = refused()
    assert line.startswith(f"rank 1 on {HOST}: no answer from the master at 127.0.0.1:{port} (")
    assert line.endswith("in 0 s: is rank 0 running there, the address right, the port open?")


def test_a_master_that_comes_later_is_waited_for(started_as, silent: socket.socket, monkeypatch: pytest.MonkeyPatch):
    started_as(1, silent.getsockname()[1])
    monkeypatch.setattr(startup.time, "sleep", lambda seconds: silent.listen())
    meet(60)


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_named(started_as, name: str, monkeypatch: pytest.MonkeyPatch):
    started_as(1, "auto")
    assert "MASTER_PORT=auto" in refused()  # which is no number
    monkeypatch.delenv(name)
    assert refused() == f"WORLD_SIZE=2 but {name} not set: use accelerate launch, or set them"


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    meet(0)
