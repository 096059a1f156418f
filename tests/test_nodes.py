"""Two machines: two launchers of accelerate on this one, which meet at a loopback address; one of them is lost."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_engines import BIN, ROOT, environment, rows, words

STEPS = 60


def machine(rank: int, words: list[str]) -> subprocess.Popen:
    """A machine's launcher, as the opening of accelerate_config.yaml says."""
    options = {"num_machines": 2, "num_processes": 2, "machine_rank": rank}
    options |= {"main_process_ip": "127.0.0.2", "main_process_port": 29640}
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    launch = [BIN / "accelerate", "launch", "--config_file", "accelerate_config.yaml", *given]
    return subprocess.Popen(
        [*map(str, launch), "tools/pretrain.py", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def child_of(launcher: subprocess.Popen) -> int:
    return int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()[0])


def steps_of(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def story(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Machine 1's process is killed in the middle of training; then both machines are started again."""
    run = tmp_path_factory.mktemp("nodes")
    given = words(shards, run, f"steps={STEPS}", "save_every=5", "eval_every=1000")
    told: dict[str, Any] = {"run": run, "given": given}
    machines = [machine(rank, given) for rank in range(2)]
    try:
        while steps_of(run) < 12:
            assert all(one.poll() is None for one in machines), [one.communicate() for one in machines]
            time.sleep(0.02)
        os.kill(child_of(machines[1]), signal.SIGKILL)
        killed = time.monotonic()
        told["said"] = [one.communicate(timeout=120)[0] for one in machines]
        told["seconds"] = time.monotonic() - killed
        told["codes"] = [one.returncode for one in machines]
        told["exit"] = json.loads((run / "exit.json").read_text())
        machines = [machine(rank, given) for rank in range(2)]
        told["again"] = [one.communicate(timeout=240)[0] for one in machines]
        told["codes again"] = [one.returncode for one in machines]
    finally:
        for one in machines:
            one.kill()
    return told


def test_the_other_machine_ends_in_time_and_names_the_lost(story: dict[str, Any]):
    assert 0 not in story["codes"]
    assert story["seconds"] < 30
    here = r"rank 0 .*at .*: rank 1 on \S+ \(pid \d+\) is gone"  # both machines are this one
    assert re.search(here, story["said"][0])
    assert story["exit"]["code"] == 70
    assert story["exit"]["step"] < STEPS


def test_the_same_commands_again_go_on_to_the_same_end(story: dict[str, Any], shards: Path, tmp_path: Path):
    from accelerate.state import AcceleratorState, GradientState

    from ssl_vit import config, recipe, session

    assert story["codes again"] == [0, 0], story["again"]
    alone = [*story["given"], f"run={tmp_path}"]
    session.run(config.parse(recipe.Pretrain, alone, recipe.FOLDER))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert [row["step"] for row in rows(story["run"])] == list(range(1, STEPS + 1))
    for mine, theirs in zip(rows(tmp_path), rows(story["run"]), strict=True):
        assert mine["samples_digest"] == theirs["samples_digest"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
