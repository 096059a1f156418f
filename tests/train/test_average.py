"""Polyak averages and the best checkpoint: exact, resumable, and what is exported."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ssl_vit import config, evaluation, recipe
from ssl_vit.exits import USAGE
from ssl_vit.train.average import Average
from tests.train.engines import fresh, rows
from tests.train.test_loop import assert_same_run, finetune, pretrain, refused, stopped


def averaged(values: list[float], factor: float) -> float:
    mean = values[0]
    for n, value in enumerate(values[1:], start=1):
        kept = min(factor, (1 + n) / (10 + n))
        mean = kept * mean + (1 - kept) * value
    return mean


@pytest.mark.parametrize("factor", [0.3, 0.9999])
def test_the_average_is_the_formulas(factor: float):
    parameter = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    engine: Any = SimpleNamespace(parameters={"w": parameter}, forget_gathered=lambda: None)
    average = Average(engine, factor, {})
    seen = [parameter.tolist()]
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
    average = Average(SimpleNamespace(parameters={"w": parameter}, forget_gathered=lambda: None), 0.9999, {})  # type: ignore[arg-type]
    for n in range(1, 200):
        average.update(n)
    assert torch.equal(dict(average.tensors())["average.w"], parameter)


def test_a_resumed_average_is_the_straight_one_and_is_what_is_judged_and_exported(shards: Path, tmp_path: Path):
    assert pretrain(shards, tmp_path / "straight", "average=0.9") == 0
    stopped(6, pretrain, shards, tmp_path / "stopped", "average=0.9")
    assert pretrain(shards, tmp_path / "stopped", "average=0.9") == 0
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    state, raw = (
        load_file(tmp_path / "straight" / "checkpoints" / "step-00000010" / f"{name}.safetensors")
        for name in ("state", "model")
    )
    exported = load_file(tmp_path / "straight" / "encoder" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(exported[name], state[f"average.encoder.{name}"])
    assert not torch.equal(exported[name], raw[f"encoder.{name}"])
    assert pretrain(shards, tmp_path / "plain") == 0
    judged, plain = rows(tmp_path / "straight")[-1], rows(tmp_path / "plain")[-1]
    assert judged["loss"] == plain["loss"]  # training does not see it
    assert judged["val_loss"] != plain["val_loss"]


def test_the_best_checkpoint_stays_and_is_the_result(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = ["best=val_loss", "eval_every=1", "save_every=100", "keep=1", "optim.lr=5", "optim.warmup_steps=0"]
    assert pretrain(shards, run, *words) == 0
    losses = {row["step"]: row["val_loss"] for row in rows(run) if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10, "a rate this high should spoil the last steps"
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == [f"step-{best:08d}", "step-00000010"]
    results = json.loads((run / "results.json").read_text())
    assert results["best"] == {"metric": "val_loss", "step": best, "value": losses[best]}
    assert results["loss"] == losses[best]
    exported = load_file(run / "encoder" / "model.safetensors")
    saved = load_file(run / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
    assert all(torch.equal(value, saved[f"encoder.{name}"]) for name, value in exported.items())


def test_a_resumed_run_keeps_the_same_best(shards: Path, tmp_path: Path):
    words = ["best=val_accuracy", "eval_every=2", "optim.lr=0.05"]
    assert pretrain(shards, tmp_path / "straight", *words) == 0
    stopped(7, pretrain, shards, tmp_path / "stopped", *words)
    assert pretrain(shards, tmp_path / "stopped", *words) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("straight", "stopped"))
    assert one["best"] == other["best"]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_value_that_is_not_measured_cannot_be_the_best(shards: Path, tmp_path: Path):
    refused(USAGE, "val_loss", pretrain, shards, tmp_path / "run", "best=val_top1", "eval_every=2")


def test_predictions_of_the_best_are_what_a_classifier_is_told_by(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    finetune(shards, run, "best=val_top1", "eval_every=5", "optim.lr=3")
    results = json.loads((run / "results.json").read_text())
    counted = [row.split(",") for row in (run / "predictions.csv").read_text().splitlines()[1:]]
    right = sum(row[2] == row[3] for row in counted)
    assert right / len(counted) == pytest.approx(results["top1"])
    assert results["step"] == results["best"]["step"]


def test_online_probes_are_those_of_the_exported_encoder(shards: Path, tmp_path: Path):
    """What is measured while training equals what tools/evaluate.py says of the encoder afterwards."""
    data = [f"online.train={shards}/train", f"online.val={shards}/val", "online.shots=1,2"]
    assert pretrain(shards, tmp_path / "run", *data, "eval_every=5", "encoder.pool=mean") == 0
    told = [row for row in rows(tmp_path / "run") if "val_knn_top1" in row]
    assert [row["step"] for row in told] == [5, 10]
    fresh()
    given = [f"encoder={tmp_path / 'run'}", f"data.train={shards}/train", f"data.val={shards}/val", "data.workers=0"]
    given += [f"run={tmp_path / 'judged'}", "methods=knn,few_shot", "few_shot.shots=1,2", "random=false"]
    made = config.parse(evaluation.Evaluate, [*given, "features.readouts=mean", "quiet=true"], recipe.FOLDER)
    assert evaluation.run(made) == 0
    by = {row["case"]: row["top1"] for row in json.loads((tmp_path / "judged" / "results.json").read_text())["rows"]}
    assert told[-1]["val_knn_top1"] == pytest.approx(by["k=20"])
    assert told[-1]["val_few_shot_1"] == pytest.approx(by["shots=1"])
    assert told[-1]["val_few_shot_2"] == pytest.approx(by["shots=2"])


def test_online_needs_both_splits(shards: Path, tmp_path: Path):
    refused(USAGE, "give both", pretrain, shards, tmp_path / "run", f"online.train={shards}/train")
