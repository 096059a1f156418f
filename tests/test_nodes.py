"""Two machines: two launchers of accelerate on this one, which meet at a loopback address; one of them is lost."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import free_port
from tests.train.engines import BIN, ROOT, environment, rows, train, train_args

STEPS = 20
pytestmark = [pytest.mark.process, pytest.mark.ranks]


def run_machines(args: list[str], fault: str = "") -> tuple[list[int], list[str]]:
    """Two machines' launchers, as the opening of accelerate_config.yaml says: their exit codes, and what they said."""
    launch = f"{BIN}/accelerate launch --config_file accelerate_config.yaml --num_machines 2 --num_processes 2".split()
    launch += f"--main_process_ip 127.0.0.2 --main_process_port {free_port()}".split()
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[*launch, "--machine_rank", rank, "tools/pretrain.py", *args] for rank in "01"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment(SSL_VIT_FAULT=fault), **pipes) for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        return [process.returncode for process in processes], outputs
    finally:
        for process in processes:
            process.kill()


def test_a_lost_machine_is_named_and_the_same_commands_go_on_to_the_same_end(shards: Path, tmp_path: Path):
    """Machine 1's process is killed in the middle of training; then both machines are started again."""
    run = tmp_path / "run"
    args = train_args(shards, run, f"steps={STEPS}", "save_every=5", "eval_every=1000")
    codes, outputs = run_machines(args, "kill:point=update:rank=1:step=12")
    assert 0 not in codes
    assert re.search(r"rank 0 .*at .*: rank 1 on \S+ \(pid \d+\) is gone", outputs[0]), (
        outputs
    )  # both machines are this one
    exit_info = json.loads((run / "exit.json").read_text())
    assert (exit_info["code"], exit_info["step"] < STEPS) == (70, True)
    codes, outputs = run_machines(args)
    assert codes == [0, 0], outputs
    train([*args, f"run={tmp_path / 'alone'}"])
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    for single_row, row in zip(rows(tmp_path / "alone"), rows(run), strict=True):
        assert single_row["samples_digest"] == row["samples_digest"]
        assert row["loss"] == pytest.approx(single_row["loss"], rel=1e-4)
