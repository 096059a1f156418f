"""Whole runs, and what their trackers hold: TensorBoard by its own reader, Weights & Biases offline, MLflow's files."""

import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.errors import ExitCode
from ssl_vit.heads.masked_prediction import MaskedPredictionHead
from ssl_vit.recipes import Finetune, Pretrain
from ssl_vit.report.format import format_duration
from ssl_vit.train import logger, loop
from ssl_vit.train.config import TrainConfig, should_visualize
from ssl_vit.train.logger import _scalars
from ssl_vit.train.metrics import StepMetrics, layer_name
from tests.tiny_runs import checkpoint_bits, read_exit
from tests.train.engines import reset_accelerate, rows
from tests.train.test_loop import assert_refused, run_training, train_until_stopped

PER_STEP_METRICS = ("gradient_norm_by_layer", "weight_norm_by_layer", "neighbor_loss", "neighbor_accuracy")


def pretrain(shards: Path, run: Path, *overrides: str) -> int:
    return run_training(Pretrain, shards, run, ["optim.warmup_steps=1", "tracker=tensorboard", *overrides])


def load_tensorboard(run: Path) -> Any:
    """All that TensorBoard holds of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    size_guidance = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(run / "tensorboard"), size_guidance=size_guidance).Reload()


@pytest.fixture(scope="module")
def board(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run and its TensorBoard."""
    run = tmp_path_factory.mktemp("board") / "run"
    pretrain(shards, run, "steps=12", "log_every=3", "visualize_every=4", "save_every=5", "eval_every=6")
    reset_accelerate()
    return run, load_tensorboard(run)


def test_tensorboard_holds_every_number_of_every_row(board: tuple[Path, Any]):
    run, reader = board
    expected = {}
    for row in rows(run):
        for name, value in row.items():
            if isinstance(value, dict):
                expected |= {
                    (f"{name.removesuffix('_by_layer')}/{layer}", row["step"]): v for layer, v in value.items()
                }
            elif isinstance(value, int | float) and name != "step":
                group, name = ("val", name[4:]) if name.startswith("val_") else ("train", name)
                expected[f"{group}/{name}", row["step"]] = value
    actual = {(tag, event.step): event.value for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)}
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-5), key
    expected_tags = {"train/loss", "train/uniform", "train/unigram_entropy", "train/neighbor_loss", "train/data_wait"}
    assert expected_tags | {"val/neighbor_loss", "gradient_norm/encoder.blocks.00"} <= {tag for tag, _ in actual}


def test_tensorboard_has_pictures_histograms_and_charts_of_what_belongs_together(board: tuple[Path, Any]):
    run, reader = board
    assert [event.step for event in reader.Images("reconstruction")] == [4, 8, 12]
    newest = reader.Images("reconstruction")[-1]
    assert (newest.height, newest.width) == (8 * 98, 5 * 98)
    assert newest.encoded_image_string[:8] == (run / "reconstruction.png").read_bytes()[:8]
    histograms = reader.Histograms("labels")
    assert [event.step for event in histograms] == [3, 6, 9, 12]
    for event, row in zip(histograms, rows(run), strict=True):
        histogram = event.histogram_value
        assert histogram.bucket_limit == pytest.approx([label + 0.5 for label in range(512)])
        assert histogram.sum_squares == pytest.approx(sum(n * label**2 for label, n in enumerate(histogram.bucket)))
        shares = [count / event.histogram_value.num for count in event.histogram_value.bucket]
        entropy = -sum(p * math.log(p) for p in shares if p)
        assert entropy == pytest.approx(row["unigram_entropy"], rel=1e-5)
        assert max(shares) == pytest.approx(row["top_label"], rel=1e-6)
    charts = {title: chart for group in logger.CUSTOM_SCALARS.values() for title, chart in group.items()}
    tags = reader.Tags()["scalars"]
    for title, (_, patterns) in charts.items():
        assert sum(bool(re.match(pattern, tag)) for pattern in patterns for tag in tags) >= 2, title
    assert "custom_scalars__config__" in reader.Tags()["tensors"]


def test_norms_by_layer_are_those_of_the_weights(board: tuple[Path, Any]):
    run, _ = board
    saved = load_file(run / "checkpoints" / "step-00000012" / "model.safetensors")
    sums_of_squares: dict[str, float] = {}
    for name, value in saved.items():
        layer = next((f"{a}.blocks.{int(b.split('.')[0]):02d}" for a, _, b in [name.partition(".blocks.")] if b), None)
        layer = layer or ".".join(name.split(".")[:2])
        sums_of_squares[layer] = sums_of_squares.get(layer, 0.0) + float(value.double().square().sum())
    norms = {layer: math.sqrt(value) for layer, value in sums_of_squares.items()}
    last_row = rows(run)[-1]
    assert last_row["weight_norm_by_layer"] == pytest.approx(norms, rel=1e-3)
    assert last_row["gradient_norm_by_layer"].keys() == norms.keys()


def test_layers_of_other_encoders_by_name():
    layers = {
        "encoder.model.patch_embed.proj.weight": "encoder.model.patch_embed",
        "encoder.model.blocks.11.mlp.fc1.weight": "encoder.model.blocks.11",
        "encoder.model.stages.2.blocks.1.downsample.0.weight": "encoder.model.stages.02.blocks.01",
        "encoder.model.layer1.0.conv1.weight": "encoder.model.layer1.00",
        "head.layers.0.weight": "head.layers.00",
    }
    assert {name: layer_name(name) for name in layers} == layers


def test_how_often_is_drawn():
    for steps, interval, num_drawn in ((40, None, 20), (50, None, 17), (40, 7, 6), (4, None, 2), (3, 99, 1)):
        train_config = TrainConfig(steps=steps, visualize_every=interval, log_every=2)
        assert sum(should_visualize(train_config, step) for step in range(1, steps + 1)) == num_drawn
        assert should_visualize(train_config, steps)


def test_weights_and_biases_offline(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    assert pretrain(shards, tmp_path, "steps=4", "log_every=2", "tracker=wandb") == 0
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    pictures = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/images/reconstruction_*.png"))
    assert pictures[-1].read_bytes() == (tmp_path / "reconstruction.png").read_bytes()
    [log_file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert log_file.stem == f"run-{hashlib.sha256(str(tmp_path.resolve()).encode()).hexdigest()[:16]}"  # of every start
    content = log_file.read_bytes()
    for name in (b"train/loss", b"val/loss", b"gradient_norm/encoder.blocks.00", b"reconstruction"):
        assert name in content, name


def test_mlflow_writes_into_the_run_and_goes_on_in_the_same_run(shards: Path, tmp_path: Path, monkeypatch):
    """And each training of a process, as those of a sweep are, has its own."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    overrides = ["steps=6", "log_every=2", "save_every=2", "tracker=mlflow"]
    train_until_stopped(3, pretrain, shards, tmp_path / "one", *overrides)
    for name in ("one", "two"):
        assert pretrain(shards, tmp_path / name, *overrides) == 0
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        [metric_file] = (tmp_path / name / "mlruns").glob("*/*/metrics/train/loss")
        lines = [line.split() for line in metric_file.read_text().splitlines()]
        expected = {row["step"]: row["loss"] for row in rows(tmp_path / name)}
        assert {int(line[2]): float(line[1]) for line in lines} == pytest.approx(expected)
    assert sorted(expected) == [2, 4, 6] == [int(line[2]) for line in lines]  # of the one that never stopped


def test_weights_and_biases_without_a_key_is_refused_and_asks_nobody(shards: Path, tmp_path: Path, monkeypatch: Any):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the environment of an earlier test
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": tmp_path / "home", "NETRC": tmp_path / "none", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, str(value))
    terminal: Any = io.StringIO()  # at which nobody answers
    terminal.isatty, terminal.readline = lambda: True, Mock(side_effect=EOFError)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{name}", terminal)
    line = r"tracker=wandb cannot begin .*WANDB_MODE=offline"
    try:
        assert_refused(ExitCode.USAGE, line, pretrain, shards, tmp_path / "run", "steps=2", "tracker=wandb")
        assert sys.stdin is terminal
        terminal.readline.assert_not_called()
    finally:
        wandb.teardown()
    assert read_exit(tmp_path / "run")["code"] == ExitCode.USAGE


def test_a_tracker_that_is_not_installed(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original_find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else original_find_spec(name))
    hint = r"pip install 'ssl_vit\[wandb\]'"
    assert_refused(ExitCode.USAGE, hint, pretrain, shards, tmp_path / "run", "steps=2", "tracker=wandb")


def test_durations_as_one_says_them():
    assert [format_duration(s) for s in (3.2, 119, 120, 3600, 7200, 90_000)] == [
        "3 s", "119 s", "2 min", "60 min", "2 h 00 min", "25 h 00 min",
    ]  # fmt: skip


def test_the_baseline_that_copies_is_tried_where_a_row_follows(shards: Path, tmp_path: Path, monkeypatch):
    """It costs what a row costs, not what a step costs."""
    training_flags, original = [], MaskedPredictionHead.neighbor_colors

    def count_calls(self: Any, image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        training_flags.append(self.training)
        return original(self, image, index)

    monkeypatch.setattr(MaskedPredictionHead, "neighbor_colors", count_calls)
    pretrain(shards, tmp_path, "steps=10", "log_every=5", "eval_every=10", "tracker=none", "batch=4", "micro_batch=2")
    assert sum(training_flags) == 2 * 2  # rows times micro batches
    assert len(training_flags) > 4  # and every batch of an evaluation
    assert [row["neighbor_loss"] > 0 for row in rows(tmp_path)] == [True, True]


def test_tensorboard_of_a_killed_run_has_each_step_once(shards: Path, tmp_path: Path, monkeypatch: Any, capsys):
    """Rows and pictures that were written after the last checkpoint give way to those of the new start."""
    overrides = ["steps=8", "log_every=1", "visualize_every=2", "save_every=3"]
    original = loop.optimizer_step

    def fail_at_step_5(state: Any, batches: Any) -> Any:
        if state.step == 5:
            raise RuntimeError("killed")
        return original(state, batches)

    monkeypatch.setattr(
        "ssl_vit.train.metrics.HealthMonitor.check_row", lambda _, row: ["alas"] * (row["step"] in (2, 5))
    )
    with patch.object(loop, "optimizer_step", fail_at_step_5), pytest.raises(RuntimeError, match="killed"):
        pretrain(shards, tmp_path, *overrides)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    pretrain(shards, tmp_path, *overrides)
    steps = list(range(1, 9))
    assert [row["step"] for row in rows(tmp_path)] == steps
    for row in rows(tmp_path):  # and norms by layer make up the norm of all gradients
        assert math.hypot(*row["gradient_norm_by_layer"].values()) == pytest.approx(row["grad_norm"], rel=1e-3)
    reader = load_tensorboard(tmp_path)
    for events in (*map(reader.Scalars, ("train/loss", "gradient_norm/head.linear")), reader.Histograms("labels")):
        assert [event.step for event in events] == steps
    assert [event.step for event in reader.Images("reconstruction")] == [2, 4, 6, 8]
    assert {event.step for event in reader.Tensors("warnings/text_summary")} == {2, 5}  # TensorBoard keeps text twice
    assert capsys.readouterr().out.splitlines().count("warning: alas") == 3


def test_a_picture_that_is_due_where_a_run_stops_is_drawn_after_it_saved(shards: Path, tmp_path: Path):
    calls = Mock()
    with (
        patch.object(loop, "save", wraps=loop.save) as save,
        patch.object(loop, "visualize", wraps=loop.visualize) as visualize,
    ):
        calls.attach_mock(save, "save")
        calls.attach_mock(visualize, "draw")
        train_until_stopped(2, pretrain, shards, tmp_path, "steps=4", "visualize_every=2", "tracker=none")
    assert read_exit(tmp_path)["step"] == 2
    assert [name for name, *_ in calls.mock_calls] == ["save", "draw"]
    assert (tmp_path / "reconstruction.png").exists()


def test_pictures_and_rows_leave_the_training_as_it_is(shards: Path, tmp_path: Path):
    """And norms and the baseline that copies are those of a row's own step, however many steps it sums."""
    states, last_metrics = [], []
    for interval in (1, 4):
        run = tmp_path / str(interval)
        overrides = [
            "encoder.dropout=0.2",
            "encoder.drop_path=0.2",
            f"visualize_every={interval}",
            f"log_every={interval}",
        ]
        pretrain(shards, run, "steps=4", "tracker=none", *overrides)
        states.append(
            {name: bits for name, bits in checkpoint_bits(run).items() if name.startswith(("model/", "optimizer/"))}
        )
        last_metrics.append({name: rows(run)[-1][name] for name in PER_STEP_METRICS})
    assert states[0] == states[1]
    assert last_metrics[0] == last_metrics[1]


def test_each_of_several_trainings_has_its_own_tensorboard(shards: Path, tmp_path: Path):
    overrides = ["init=none", "seeds=2", "steps=2", "log_every=1", "optim.warmup_steps=1", "tracker=tensorboard"]
    run_training(Finetune, shards, tmp_path, overrides)
    for seed in (0, 1):
        run = tmp_path / f"seed-{seed}"
        assert len(list((run / "tensorboard").iterdir())) == 1  # none of the other's
        losses = [event.value for event in load_tensorboard(run).Scalars("train/loss")]
        assert losses == pytest.approx([row["loss"] for row in rows(run)])


def test_trackers_are_ended_once():
    tracker = Mock()
    accelerator: Any = SimpleNamespace(trackers=[tracker])
    for _ in range(2):
        logger.end_trackers(accelerator)
    tracker.finish.assert_called_once_with()


def test_norms_of_gradients_that_are_not_numbers(shards: Path, tmp_path: Path):
    """Their row is JSON, and the trackers take what is left of it."""
    original = StepMetrics.add

    def add_nan(self: StepMetrics, sums: dict[str, torch.Tensor]) -> None:
        original(self, {name: v * math.nan if name == "_gradient/head.linear" else v for name, v in sums.items()})

    with patch.object(StepMetrics, "add", add_nan):
        assert pretrain(shards, tmp_path, "steps=1", "log_every=1") == 0
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert None not in dict(_scalars(row)).values()
    norms = row["gradient_norm_by_layer"]
    assert norms.pop("head.linear") is None
    assert len(norms) > 3
    assert all(value >= 0 for value in norms.values())
