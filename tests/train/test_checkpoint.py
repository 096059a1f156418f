"""Checkpoints are there whole or not at all, a damaged one is never believed; averages and the best one."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ssl_vit import config
from ssl_vit.commands import evaluate
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.train import checkpoint
from ssl_vit.train.ema import Ema
from tests.evaluate_cases import read_results
from tests.tiny_runs import checkpoint_steps
from tests.train.engines import reset_accelerate, rows
from tests.train.test_loop import assert_refused, assert_same_run, finetune, pretrain, train_until_stopped


def parts(step: int) -> dict[str, dict[str, Any]]:
    """The parts of a checkpoint of some training."""
    torch.manual_seed(step)
    model = {"weight": torch.randn(2, 3)}
    optimizer = {"weight/exp_avg": torch.randn(2, 3), "weight/step": torch.tensor(step)}
    return {"model": model, "optimizer": optimizer, "metrics": {"loss": torch.tensor(0.1)}, "train": {"step": step}}


def save(parent: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(parent, step, parts(step), keep)


def names(parent: Path) -> list[str]:
    """What lies in the folder, without the hint."""
    return sorted(path.name for path in parent.iterdir() if path.name != "latest")


def test_the_last_few_are_kept_and_a_draft_is_none_of_them(tmp_path: Path):
    assert checkpoint.newest_valid(tmp_path / "none") is None
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000005.tmp")  # of a killed process
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_is_not_believed_and_where_none_verifies_the_run_does_not_start_over(tmp_path: Path):
    """All that can be wrong with a checkpoint is in test_hostile_checkpoints.py."""
    for step in (1, 2):
        file = save(tmp_path, step) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(ExitError, match=r"step-00000002\.corrupt-.*step-00000001\.corrupt-") as excinfo:
        checkpoint.newest_valid(tmp_path)
    assert excinfo.value.code == ExitCode.INTEGRITY
    with pytest.raises(ExitError, match="put aside before"):  # nor when it is started once more
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "a full disk"])
def test_a_save_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    """A full disk is seen before anything is written."""
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    full = shutil._ntuple_diskusage(10, 9, 1)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        if call == "a full disk":
            patch.setattr(shutil, "disk_usage", lambda path: full)
        else:
            patch.setattr(os, call, Mock(side_effect=OSError(5, "Input/output error")))
        pattern = r"needs .* bytes, 1 are free" if call == "a full disk" else "Input/output"
        with pytest.raises(ExitError, match=pattern) as excinfo:
            save(tmp_path, 2)
        assert excinfo.value.code == ExitCode.DISK
    assert names(tmp_path) == ["step-00000001"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    assert save(tmp_path, 2).is_dir()  # and the next one goes well


# --- Polyak averages and the best checkpoint: exact, resumable, and what is exported


def expected_average(values: list[float], factor: float) -> float:
    mean = values[0]
    for n, value in enumerate(values[1:], start=1):
        decay = min(factor, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * value
    return mean


def make_ema(parameter: nn.Parameter, factor: float) -> Ema:
    engine: Any = SimpleNamespace(parameters={"w": parameter}, reshard=lambda: None, collect_on_main=dict)
    return Ema(engine, factor)


@pytest.mark.parametrize("factor", [0.3, 0.9999])
def test_the_average_is_the_formulas(factor: float):
    parameter = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    ema, history = make_ema(parameter, factor), [parameter.tolist()]
    for n in range(1, 30):
        with torch.no_grad():
            parameter.add_(torch.tensor([0.5 * n, 1.0 / n]))
        ema.update(n)
        history.append(parameter.tolist())
    expected = [expected_average([row[i] for row in history], factor) for i in range(2)]
    with ema.swapped_in():
        assert parameter.tolist() == pytest.approx(expected, rel=1e-12)
    assert parameter.tolist() == history[-1]


def test_a_constant_is_its_own_average():
    """C4.6, to the bit."""
    parameter = nn.Parameter(torch.randn(50))
    ema = make_ema(parameter, 0.9999)
    for n in range(1, 200):
        ema.update(n)
    assert torch.equal(ema.state_dict()["w"], parameter)


def load_checkpoint(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def test_a_resumed_average_is_the_straight_one_and_is_what_is_judged_and_exported(shards: Path, tmp_path: Path):
    straight_run, stopped_run = tmp_path / "straight", tmp_path / "stopped"
    assert pretrain(shards, straight_run, "ema_decay=0.9") == 0
    train_until_stopped(6, pretrain, shards, stopped_run, "ema_decay=0.9")
    assert pretrain(shards, stopped_run, "ema_decay=0.9") == 0
    assert_same_run(straight_run, stopped_run)
    name = "encoder.blocks.0.mlp.fc1.weight"
    exported = load_file(straight_run / "encoder" / "model.safetensors")[name.removeprefix("encoder.")]
    assert torch.equal(exported, load_checkpoint(straight_run, 10, "ema")[name])
    assert not torch.equal(exported, load_checkpoint(straight_run, 10, "model")[name])
    assert pretrain(shards, tmp_path / "plain") == 0
    averaged_row, plain_row = rows(straight_run)[-1], rows(tmp_path / "plain")[-1]
    assert averaged_row["loss"] == plain_row["loss"]  # training does not see it
    assert averaged_row["val_loss"] != plain_row["val_loss"]


def test_the_best_checkpoint_stays_and_is_the_result(shards: Path, tmp_path: Path):
    overrides = ["best=val_loss", "eval_every=1", "save_every=100", "keep=1", "optim.lr=5", "optim.warmup_steps=0"]
    assert pretrain(shards, tmp_path, *overrides) == 0
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path) if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10, "a rate this high should spoil the last steps"
    assert checkpoint_steps(tmp_path) == [best, 10]
    result = read_results(tmp_path)
    assert result["best"] == {"metric": "val_loss", "step": best, "value": losses[best]}
    assert result["loss"] == losses[best]
    exported = load_file(tmp_path / "encoder" / "model.safetensors")
    weights = load_checkpoint(tmp_path, best, "model")
    assert all(torch.equal(value, weights[f"encoder.{name}"]) for name, value in exported.items())


def test_a_resumed_run_keeps_the_same_best(shards: Path, tmp_path: Path):
    overrides = ["best=val_accuracy", "eval_every=2", "optim.lr=0.05"]
    assert pretrain(shards, tmp_path / "straight", *overrides) == 0
    train_until_stopped(7, pretrain, shards, tmp_path / "stopped", *overrides)
    assert pretrain(shards, tmp_path / "stopped", *overrides) == 0
    assert "best" in read_results(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")  # results.json and all


def test_predictions_of_the_best_are_what_a_classifier_is_told_by(shards: Path, tmp_path: Path):
    finetune(shards, tmp_path, "best=val_top1", "eval_every=5", "optim.lr=3")
    result = read_results(tmp_path)
    predictions = [row.split(",") for row in (tmp_path / "predictions.csv").read_text().splitlines()[1:]]
    assert sum(row[2] == row[3] for row in predictions) / len(predictions) == pytest.approx(result["top1"])
    assert result["step"] == result["best"]["step"]


def test_online_probes_are_those_of_the_exported_encoder(shards: Path, tmp_path: Path):
    """What is measured while training equals what tools/evaluate.py says of the encoder afterwards."""
    online_args = [f"online.train={shards}/train", f"online.val={shards}/val", "online.shots=1,2"]
    assert pretrain(shards, tmp_path / "run", *online_args, "eval_every=5", "encoder.pool=mean") == 0
    probe_rows = [row for row in rows(tmp_path / "run") if "val_knn_top1" in row]
    assert [row["step"] for row in probe_rows] == [5, 10]
    reset_accelerate()
    args = [f"encoder={tmp_path / 'run'}", f"data.train={shards}/train", f"data.val={shards}/val", "data.workers=0"]
    args += [f"run={tmp_path / 'judged'}", "methods=knn,few_shot", "few_shot.shots=1,2", "random=false"]
    evaluate_config = config.parse(evaluate.Config, [*args, "features.readouts=mean", "quiet=true"])
    assert evaluate.run(evaluate_config) == 0
    top1_by_case = {row["case"]: row["top1"] for row in read_results(tmp_path / "judged")["rows"]}
    for name, case in {"knn_top1": "k=20", "few_shot_1": "shots=1", "few_shot_2": "shots=2"}.items():
        assert probe_rows[-1][f"val_{name}"] == pytest.approx(top1_by_case[case])


def test_what_is_not_measured_cannot_be_the_best_and_online_needs_both_splits(shards: Path, tmp_path: Path):
    assert_refused(ExitCode.USAGE, "val_loss", pretrain, shards, tmp_path / "run", "best=val_top1", "eval_every=2")
    assert_refused(ExitCode.USAGE, "give both", pretrain, shards, tmp_path / "other", f"online.train={shards}/train")
