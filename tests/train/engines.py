"""Trainings under accelerate's engines, launched or in this process, and how one of them is compared with another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit import config, recipes
from ssl_vit.commands import pretrain as command
from ssl_vit.encoders.weights import load_encoder
from tests.conftest import TINY, build_once

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
DEFAULT_ENGINES = ["zero2", "fsdp2"]  # what the default tier launches
ZERO_OVERRIDES = {"zero3": {"stage3_param_persistence_threshold": 0}}  # else ZeRO-3 keeps a model this small whole
STEPS = 10
HALF_CHECKPOINT, LAST_CHECKPOINT = (f"checkpoints/step-{step:08d}" for step in (STEPS // 2, STEPS))
ARGS = [f"steps={STEPS}", "log_every=1", f"save_every={STEPS // 2}", f"eval_every={STEPS // 2}"]
ARGS += ["optim.lr=3e-3", "optim.warmup_steps=2", "tracker=none", "visualize_every=99"]
ACCUMULATED = ["micro_batch=1", "activation_checkpointing=true"]


def train_args(shards: Path, run: Path, *overrides: str) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]
    own_encoder = "encoder.kind=timm" in overrides
    return [*(arg for arg in TINY if not (own_encoder and arg.startswith("encoder."))), *ARGS, *data, *overrides]


def environment(**extra: str) -> dict[str, str]:
    """For a launcher: none of this process's own launch."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **extra}


def run_process(*command: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    args = [str(arg) for arg in command]
    return subprocess.run(args, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=400)


def run_checked(*command: Any, **variables: str) -> None:
    result = run_process(*command, **variables)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def train(args: list[str]) -> None:
    """Train in this process."""
    assert command.run(config.parse(recipes.Pretrain, args)) == 0
    reset_accelerate()


def reset_accelerate() -> None:
    """Accelerate keeps its state in the process: what is trained next is a start of its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def job(engine: str, args: list[str], poisoned: bool = False, **zero: Any) -> dict[str, Any]:
    """A training for engine_worker.py."""
    return {"engine": engine, "words": args, "poisoned": poisoned, "zero": {**ZERO_OVERRIDES.get(engine, {}), **zero}}


def run_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Let two processes do the jobs, one after another in one launch (engine_worker.py)."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("engine_worker.py")
    run_checked(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, worker, folder / "jobs.json")


ZERO_2 = {"zero_optimization": {"stage": 2}}
PRECISIONS = ("fp16", "bf16", "torch_autocast")
CONFLICTING = {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 32}  # than the recipe's
CONFLICTING |= {"gradient_accumulation_steps": 7, "gradient_clipping": 2.5}
CONFIGS: dict[str, dict[str, Any]] = {  # of DeepSpeed, which test_launch.py says the answers to
    "plain": ZERO_2,
    "file and section": ZERO_2,  # while what a launch file's own section says is there as well
    "no clip": ZERO_2,
    "auto": {**ZERO_2, "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
    "same": {**ZERO_2, "train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5},
    "misspelt": {**ZERO_2, "gradient_cliping": 1.0},
    "misspelt in zero": {"zero_optimization": {"stage": 2, "overlap_com": True}},
    "optimizer": {**ZERO_2, "optimizer": {"type": "Adam"}},
    "batch of 1": {**ZERO_2, "train_batch_size": 1},
    "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
    "no zero": {"gradient_clipping": 0.5},
    "not a section": {**ZERO_2, "bf16": True},
}
CONFIGS |= {name: {**ZERO_2, name: {"enabled": True}} for name in PRECISIONS}
CONFIGS |= {name: {**ZERO_2, name: value} for name, value in CONFLICTING.items()}


def run_shared_jobs(shards: Path, factory: pytest.TempPathFactory) -> Path:
    """The one launch of the default tier: runs zero2/ and fsdp2/, and configs.json, what became of each of CONFIGS."""

    def train_jobs(folder: Path) -> None:
        jobs = [job(engine, train_args(shards, folder / engine, *ACCUMULATED)) for engine in DEFAULT_ENGINES]
        run_jobs(folder, [{"configs": CONFIGS, "to": str(folder / "configs.json")}, *jobs])

    return build_once(factory, "engines", train_jobs)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(expected_run: Path, actual_run: Path, first_step: int = 1) -> None:
    """The same batches, and losses, norms, optimizer and exported encoder equal to rounding."""
    expected_rows, actual_rows = rows(expected_run), rows(actual_run)
    assert [row["step"] for row in expected_rows] == [row["step"] for row in actual_rows] == list(range(1, STEPS + 1))
    for expected, actual in zip(expected_rows[first_step - 1 :], actual_rows[first_step - 1 :], strict=True):
        assert expected["samples_digest"] == actual["samples_digest"]
        assert expected["skipped_updates"] == actual["skipped_updates"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)
        assert actual["neighbor_loss"] == pytest.approx(expected["neighbor_loss"], rel=1e-6)
        for kind in ("gradient_norm_by_layer", "weight_norm_by_layer"):
            assert actual.get(kind, expected[kind]) == pytest.approx(
                expected[kind], rel=2e-3, abs=1e-7
            )  # of gradients not under ZeRO
        assert "weight_norm_by_layer" in actual
    assert actual_rows[-1]["val_loss"] == pytest.approx(expected_rows[-1]["val_loss"], rel=2e-6)
    assert actual_rows[-1]["val_samples"] == expected_rows[-1]["val_samples"]
    for name, atol in {"model": 2e-4, "optimizer": 1e-6}.items():
        expected_weights, actual_weights = (
            load_file(run / LAST_CHECKPOINT / f"{name}.safetensors") for run in (expected_run, actual_run)
        )
        assert_near(actual_weights, expected_weights, atol)
    assert load_encoder(actual_run).config == load_encoder(expected_run).config
    expected_weights, actual_weights = (
        load_file(run / "encoder" / "model.safetensors") for run in (expected_run, actual_run)
    )
    assert all(torch.allclose(expected_weights[key], actual_weights[key], atol=2e-4) for key in expected_weights)


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=atol)  # which names the keys
