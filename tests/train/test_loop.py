"""A run that is stopped and resumed is the run that never stopped, bit for bit; and what else a run promises."""

import importlib
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ssl_vit import config, distributed
from ssl_vit.encoders.weights import load_encoder
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.train import loop
from tests.conftest import TINY, draw_squares
from tests.tiny_runs import checkpoint_steps, differing_bits, read_exit, run_bits
from tests.train.engines import reset_accelerate, rows

DROPOUT = "encoder.dropout=0.1"


class StopAfter:
    """Stands in for the signals: asks to stop once `steps` steps were taken."""

    def __init__(self, steps: int):
        self.steps_left = steps

    def stop_requested(self, now: bool = False) -> bool:
        self.steps_left -= not now
        return self.steps_left == 0

    def close(self) -> None:
        pass


def train_until_stopped(step: int, train: Callable[..., int], *args: Any) -> None:
    """Train until a signal comes after so many steps."""
    with patch.object(loop, "StopSignal", lambda _: StopAfter(step)), pytest.raises(ExitError) as excinfo:
        train(*args)
    assert excinfo.value.code == ExitCode.PREEMPTED


def assert_refused(code: int, match: str, function: Callable[..., object], *args: Any) -> None:
    """A start ends with this code, and with one line that matches."""
    with pytest.raises(ExitError, match=match) as excinfo:
        function(*args)
    assert excinfo.value.code == code
    assert "\n" not in excinfo.value.message


def run_training(recipe: type[Pretrain] | type[Finetune], shards: Path, run: Path, overrides: Sequence[str]) -> int:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}", "tracker=none"]
    module = importlib.import_module(f"ssl_vit.commands.{recipe.__name__.lower()}")
    return module.run(config.parse(recipe, [*TINY, *data, *overrides]))


def pretrain(shards: Path, run: Path, *overrides: str) -> int:
    return run_training(
        Pretrain, shards, run, ["steps=10", "log_every=3", "save_every=4", "optim.warmup_steps=2", *overrides]
    )


def finetune(shards: Path, run: Path, *overrides: str) -> int:
    return run_training(
        Finetune, shards, run, ["steps=40", "optim.lr=0.1", "data.flip=false", "data.crop_area=0.5,1", *overrides]
    )


def assert_same_run(expected_run: Path, actual_run: Path) -> None:
    """Checkpoint, metrics (but for speeds) and export are the same bits."""
    assert differing_bits(run_bits(expected_run), run_bits(actual_run)) == {}


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps, with dropout, that was never stopped."""
    run = tmp_path_factory.mktemp("straight")
    assert pretrain(shards, run, DROPOUT) == 0
    reset_accelerate()
    return run


@pytest.mark.parametrize("stop", [1, 5, 8, *(pytest.param(n, marks=pytest.mark.process) for n in (2, 3, 4, 6, 7, 9))])
def test_stop_at_any_step_and_resume(shards: Path, straight: Path, tmp_path: Path, stop: int):
    """With a row of metrics that was cut in the middle, as by a kill; those themselves are in test_kill_points.py."""
    train_until_stopped(stop, pretrain, shards, tmp_path, DROPOUT)
    assert read_exit(tmp_path)["code"] == ExitCode.PREEMPTED
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert pretrain(shards, tmp_path, DROPOUT, "data.workers=1" if stop == 5 else "data.workers=0") == 0
    assert_same_run(straight, tmp_path)
    assert read_exit(tmp_path) | {"time": ""} == {"code": 0, "step": 10, "reason": "done", "rank": 0, "time": ""}


def test_what_a_run_leaves_behind(straight: Path):
    """Rows, of whose samples tests/runs.py keeps count for other tests, a picture, checkpoints and results."""
    assert [row["step"] for row in rows(straight)] == [3, 6, 9, 10]
    first_row = rows(straight)[0]
    assert {"step", "loss", "lr", "images_per_second", "accuracy", "unigram_entropy", "grad_norm"} <= first_row.keys()
    assert first_row["samples_seen"] == 24
    assert "val_loss" in rows(straight)[-1]
    assert (straight / "reconstruction.png").stat().st_size > 0
    assert checkpoint_steps(straight) == [8, 10]
    result = json.loads((straight / "results.json").read_text())
    assert result["samples"] > 0
    assert result["protocol"]["steps"] == 10


def test_the_finished_command_again_changes_nothing(shards: Path, straight: Path):
    """Also with other keys that may change."""
    before = rows(straight), run_bits(straight)
    for overrides in ((), ("log_every=1", "keep=2")):
        assert pretrain(shards, straight, DROPOUT, *overrides) == 0
        assert (rows(straight), run_bits(straight)) == before


def test_a_start_that_failed_binds_nothing_and_one_that_trained_binds_the_data(shards: Path, tmp_path: Path):
    assert_refused(ExitCode.DATA, "no such folder", pretrain, shards, tmp_path, "data.train=/nowhere", "steps=3")
    assert read_exit(tmp_path)["code"] == ExitCode.DATA
    assert pretrain(shards, tmp_path, "steps=2") == 0
    assert_refused(ExitCode.MISMATCH, "other data", pretrain, shards, tmp_path, "steps=2", f"data.train={shards}/val")


def test_finetuning_learns_colors_and_counts_each_sample_once(shards: Path, straight: Path, tmp_path: Path):
    finetune(shards, tmp_path, f"init={straight}", "encoder.pool=mean")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["samples"] == json.loads((shards / "val" / "manifest.json").read_text())["samples"]
    assert result["top1"] > 0.9
    assert result["top5"] == 1.0
    assert load_encoder(tmp_path).pool == "mean"


def test_finetuning_starts_from_the_encoder_at_a_higher_resolution(shards: Path, straight: Path, tmp_path: Path):
    finetune(shards, tmp_path, f"init={straight}", "data.image_size=24", "optim.lr=0", "steps=1", "encoder.dropout=0")
    before, after = load_encoder(straight), load_encoder(tmp_path)
    assert after.grid == (6, 6)
    assert torch.equal(before.blocks[1].mlp.fc1.weight, after.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "data.image_size=18",
            ExitCode.USAGE,
            "data.image_size=18: an image of 18 x 18 cannot be cut into patches of 4",
        ),
        ("data.train=none", ExitCode.USAGE, "data.train: it must be given"),
        ("init=/nowhere", ExitCode.DATA, "/nowhere: no such run"),
        ("run=/proc/x", ExitCode.CANNOT_CREATE, "run=/proc/x"),
        ("head.ratio=0.01", ExitCode.USAGE, "head.ratio=0.01 of 16 patches corrupts none"),
        ("encoder.channels=1", ExitCode.USAGE, "encoder.channels=1: images are read as RGB"),
        ("run=", ExitCode.USAGE, "run: ''"),
        ("init=RUN encoder.depth=3", ExitCode.USAGE, "give encoder.depth=2, or none"),
    ],
)
def test_bad_input_is_one_line(shards: Path, straight: Path, tmp_path: Path, words: str, code: int, message: str):
    overrides = words.replace("RUN", str(straight)).split()
    assert_refused(code, re.escape(message), pretrain, shards, tmp_path, *overrides)


def test_folders_of_images_are_converted_first_and_splits_are_taken_apart(squares: Path, shards: Path, tmp_path: Path):
    """data.train takes train, data.val takes val, of shards or images; tars without a manifest are neither."""
    pretrain(tmp_path, tmp_path / "runs" / "r", f"data.train={squares}", "data.val=none", "steps=1")
    assert len(list((tmp_path / "runs" / "shards").glob("*/manifest.json"))) == 1
    images = tmp_path / "images"
    for split in ("train", "test"):
        draw_squares(images / split, count=3)
    for name, folder in {"shards": shards, "images": images}.items():
        pretrain(shards, tmp_path / "runs" / name, f"data.train={folder}", f"data.val={folder}", "steps=1")
    assert rows(tmp_path / "runs" / "images")[-1]["val_samples"] == 9
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "000000.tar").write_bytes(b"\0" * 1024)
    overrides = [f"data.train={tmp_path}/tars", "data.val=none"]
    assert_refused(ExitCode.DATA, r"has tars but no manifest\.json", pretrain, tmp_path, tmp_path / "r", *overrides)


def test_one_signal_stops_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    """Slurm sends TERM twice within milliseconds where it preempts without grace."""
    clock, exit_codes = [100.0], []
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed.os, "_exit", exit_codes.append)
    before = signal.getsignal(signal.SIGTERM)
    stop = distributed.StopSignal(distributed.Distributed())
    try:
        assert not stop.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.stop_requested()
        clock[0] += distributed.REPEAT_WINDOW / 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.signal_number, exit_codes) == (signal.SIGTERM, [])
        clock[0] += distributed.REPEAT_WINDOW
        os.kill(os.getpid(), signal.SIGUSR2)
        assert exit_codes == [128 + signal.SIGUSR2]
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == before
