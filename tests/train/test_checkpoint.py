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

from ssl_vit import config, recipes
from ssl_vit.commands import evaluate
from ssl_vit.errors import DISK, INTEGRITY, USAGE, Refusal
from ssl_vit.train import checkpoint
from ssl_vit.train.ema import Average
from tests.frozen import results
from tests.tiny_runs import saved
from tests.train.engines import fresh, rows
from tests.train.test_loop import assert_same_run, finetune, pretrain, refused, stopped


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights and the optimizer's state of some model."""
    torch.manual_seed(step)
    return {"weight": torch.randn(2, 3)}, {"weight/exp_avg": torch.randn(2, 3), "weight/step": torch.tensor(step)}


def save(parent: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(parent, step, keep, *tensors(step), {"step": step, "window.loss": torch.tensor(0.1)})


def names(parent: Path) -> list[str]:
    """What lies in the folder, without the hint."""
    return sorted(path.name for path in parent.iterdir() if path.name != "latest")


def test_the_last_few_are_kept_and_a_draft_is_none_of_them(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000005.tmp")  # of a killed process
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_damaged_one_is_not_believed_and_where_none_verifies_the_run_does_not_start_over(tmp_path: Path):
    """All that can be wrong with a checkpoint is in test_hostile_checkpoints.py."""
    for step in (1, 2):
        file = save(tmp_path, step) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(Refusal, match=r"step-00000002\.corrupt-.*step-00000001\.corrupt-") as end:
        checkpoint.newest(tmp_path)
    assert end.value.code == INTEGRITY
    with pytest.raises(Refusal, match="put aside before"):  # nor when it is started once more
        checkpoint.newest(tmp_path)


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
        said = r"needs .* bytes, 1 are free" if call == "a full disk" else "Input/output"
        with pytest.raises(Refusal, match=said) as end:
            save(tmp_path, 2)
        assert end.value.code == DISK
    assert names(tmp_path) == ["step-00000001"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    assert save(tmp_path, 2).is_dir()  # and the next one goes well


# --- Polyak averages and the best checkpoint: exact, resumable, and what is exported


def averaged(values: list[float], factor: float) -> float:
    mean = values[0]
    for n, value in enumerate(values[1:], start=1):
        kept = min(factor, (1 + n) / (10 + n))
        mean = kept * mean + (1 - kept) * value
    return mean


def average_of(parameter: nn.Parameter, factor: float) -> Average:
    engine: Any = SimpleNamespace(parameters={"w": parameter}, forget_gathered=lambda: None)
    return Average(engine, factor, {})


@pytest.mark.parametrize("factor", [0.3, 0.9999])
def test_the_average_is_the_formulas(factor: float):
    parameter = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    average, seen = average_of(parameter, factor), [parameter.tolist()]
    for n in range(1, 30):
        with torch.no_grad():
            parameter.add_(torch.tensor([0.5 * n, 1.0 / n]))
        average.update(n)
        seen.append(parameter.tolist())
    want = [averaged([row[i] for row in seen], factor) for i in range(2)]
    with average.in_place():
        assert parameter.tolist() == pytest.approx(want, rel=1e-12)
    assert parameter.tolist() == seen[-1]


def test_a_constant_is_its_own_average():
    """C4.6, to the bit."""
    parameter = nn.Parameter(torch.randn(50))
    average = average_of(parameter, 0.9999)
    for n in range(1, 200):
        average.update(n)
    assert torch.equal(dict(average.tensors())["average.w"], parameter)


def checkpointed(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


def test_a_resumed_average_is_the_straight_one_and_is_what_is_judged_and_exported(shards: Path, tmp_path: Path):
    straight, other = tmp_path / "straight", tmp_path / "stopped"
    assert pretrain(shards, straight, "average=0.9") == 0
    stopped(6, pretrain, shards, other, "average=0.9")
    assert pretrain(shards, other, "average=0.9") == 0
    assert_same_run(straight, other)
    name = "encoder.blocks.0.mlp.fc1.weight"
    exported = load_file(straight / "encoder" / "model.safetensors")[name.removeprefix("encoder.")]
    assert torch.equal(exported, checkpointed(straight, 10, "state")[f"average.{name}"])
    assert not torch.equal(exported, checkpointed(straight, 10, "model")[name])
    assert pretrain(shards, tmp_path / "plain") == 0
    judged, plain = rows(straight)[-1], rows(tmp_path / "plain")[-1]
    assert judged["loss"] == plain["loss"]  # training does not see it
    assert judged["val_loss"] != plain["val_loss"]


def test_the_best_checkpoint_stays_and_is_the_result(shards: Path, tmp_path: Path):
    words = ["best=val_loss", "eval_every=1", "save_every=100", "keep=1", "optim.lr=5", "optim.warmup_steps=0"]
    assert pretrain(shards, tmp_path, *words) == 0
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path) if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10, "a rate this high should spoil the last steps"
    assert saved(tmp_path) == [best, 10]
    found = results(tmp_path)
    assert found["best"] == {"metric": "val_loss", "step": best, "value": losses[best]}
    assert found["loss"] == losses[best]
    exported = load_file(tmp_path / "encoder" / "model.safetensors")
    kept = checkpointed(tmp_path, best, "model")
    assert all(torch.equal(value, kept[f"encoder.{name}"]) for name, value in exported.items())


def test_a_resumed_run_keeps_the_same_best(shards: Path, tmp_path: Path):
    words = ["best=val_accuracy", "eval_every=2", "optim.lr=0.05"]
    assert pretrain(shards, tmp_path / "straight", *words) == 0
    stopped(7, pretrain, shards, tmp_path / "stopped", *words)
    assert pretrain(shards, tmp_path / "stopped", *words) == 0
    assert "best" in results(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")  # results.json and all


def test_predictions_of_the_best_are_what_a_classifier_is_told_by(shards: Path, tmp_path: Path):
    finetune(shards, tmp_path, "best=val_top1", "eval_every=5", "optim.lr=3")
    found = results(tmp_path)
    counted = [row.split(",") for row in (tmp_path / "predictions.csv").read_text().splitlines()[1:]]
    assert sum(row[2] == row[3] for row in counted) / len(counted) == pytest.approx(found["top1"])
    assert found["step"] == found["best"]["step"]


def test_online_probes_are_those_of_the_exported_encoder(shards: Path, tmp_path: Path):
    """What is measured while training equals what tools/evaluate.py says of the encoder afterwards."""
    data = [f"online.train={shards}/train", f"online.val={shards}/val", "online.shots=1,2"]
    assert pretrain(shards, tmp_path / "run", *data, "eval_every=5", "encoder.pool=mean") == 0
    told = [row for row in rows(tmp_path / "run") if "val_knn_top1" in row]
    assert [row["step"] for row in told] == [5, 10]
    fresh()
    given = [f"encoder={tmp_path / 'run'}", f"data.train={shards}/train", f"data.val={shards}/val", "data.workers=0"]
    given += [f"run={tmp_path / 'judged'}", "methods=knn,few_shot", "few_shot.shots=1,2", "random=false"]
    made = config.parse(evaluate.Evaluate, [*given, "features.readouts=mean", "quiet=true"], recipes.FOLDER)
    assert evaluate.run(made) == 0
    by = {row["case"]: row["top1"] for row in results(tmp_path / "judged")["rows"]}
    for name, case in {"knn_top1": "k=20", "few_shot_1": "shots=1", "few_shot_2": "shots=2"}.items():
        assert told[-1][f"val_{name}"] == pytest.approx(by[case])


def test_what_is_not_measured_cannot_be_the_best_and_online_needs_both_splits(shards: Path, tmp_path: Path):
    refused(USAGE, "val_loss", pretrain, shards, tmp_path / "run", "best=val_top1", "eval_every=2")
    refused(USAGE, "give both", pretrain, shards, tmp_path / "other", f"online.train={shards}/train")
