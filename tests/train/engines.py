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
from ssl_vit.commands import train as command
from ssl_vit.encoders.weights import load_encoder
from tests.conftest import TINY, once

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
TOGETHER = ["zero2", "fsdp2"]  # what the default tier launches
CUT = {"zero3": {"stage3_param_persistence_threshold": 0}}  # else ZeRO-3 keeps a model this small whole
STEPS = 10
HALF, WHOLE = (f"checkpoints/step-{step:08d}" for step in (STEPS // 2, STEPS))
WORDS = [f"steps={STEPS}", "log_every=1", f"save_every={STEPS // 2}", f"eval_every={STEPS // 2}"]
WORDS += ["optim.lr=3e-3", "optim.warmup_steps=2", "tracker=none", "panel_every=99"]
ACCUMULATED = ["micro_batch=1", "activation_checkpointing=true"]


def words(shards: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={shards}/train", f"data.val={shards}/val", f"run={run}"]
    own = "encoder.kind=timm" in more
    return [*(word for word in TINY if not (own and word.startswith("encoder."))), *WORDS, *data, *more]


def environment(**more: str) -> dict[str, str]:
    """For a launcher: none of this process's own launch."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **more}


def process(*command: Any, **more: str) -> subprocess.CompletedProcess[str]:
    given = [str(word) for word in command]
    return subprocess.run(given, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=400)


def launched(*command: Any, **more: str) -> None:
    done = process(*command, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def train(given: list[str]) -> None:
    """Train in this process."""
    assert command.run(config.parse(recipes.Pretrain, given, recipes.FOLDER)) == 0
    fresh()


def fresh() -> None:
    """Accelerate keeps its state in the process: what is trained next is a start of its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def job(engine: str, given: list[str], poisoned: bool = False, **zero: Any) -> dict[str, Any]:
    """A training for engine_worker.py."""
    return {"engine": engine, "words": given, "poisoned": poisoned, "zero": {**CUT.get(engine, {}), **zero}}


def work(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Let two processes do the jobs, one after another in one launch (engine_worker.py)."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = Path(__file__).with_name("engine_worker.py")
    launched(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, worker, folder / "jobs.json")


Z = {"zero_optimization": {"stage": 2}}
PRECISIONS = ("fp16", "bf16", "torch_autocast")
OTHERS = {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 32}  # than the recipe's
OTHERS |= {"gradient_accumulation_steps": 7, "gradient_clipping": 2.5}
CONFIGS: dict[str, dict[str, Any]] = {  # of DeepSpeed, which test_launch.py says the answers to
    "plain": Z,
    "file and section": Z,  # while what a launch file's own section says is there as well
    "no clip": Z,
    "auto": {**Z, "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}},
    "same": {**Z, "train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5},
    "misspelt": {**Z, "gradient_cliping": 1.0},
    "misspelt in zero": {"zero_optimization": {"stage": 2, "overlap_com": True}},
    "optimizer": {**Z, "optimizer": {"type": "Adam"}},
    "batch of 1": {**Z, "train_batch_size": 1},
    "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
    "no zero": {"gradient_clipping": 0.5},
    "not a section": {**Z, "bf16": True},
}
CONFIGS |= {name: {**Z, name: {"enabled": True}} for name in PRECISIONS}
CONFIGS |= {name: {**Z, name: value} for name, value in OTHERS.items()}


def together(shards: Path, factory: pytest.TempPathFactory) -> Path:
    """The one launch of the default tier: runs zero2/ and fsdp2/, and configs.json, what became of each of CONFIGS."""

    def make(folder: Path) -> None:
        jobs = [job(engine, words(shards, folder / engine, *ACCUMULATED)) for engine in TOGETHER]
        work(folder, [{"configs": CONFIGS, "to": str(folder / "configs.json")}, *jobs])

    return once(factory, "engines", make)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, other: Path, first: int = 1) -> None:
    """The same batches, and losses, norms, optimizer and exported encoder equal to rounding."""
    mine, theirs = rows(one), rows(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(mine[first - 1 :], theirs[first - 1 :], strict=True):
        assert a["samples_digest"] == b["samples_digest"]
        assert a["skipped_updates"] == b["skipped_updates"]
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-5)
        assert b["neighbour_loss"] == pytest.approx(a["neighbour_loss"], rel=1e-6)
        for kind in ("gradient_norm_by_layer", "weight_norm_by_layer"):
            assert b.get(kind, a[kind]) == pytest.approx(a[kind], rel=2e-3, abs=1e-7)  # of gradients not under ZeRO
        assert "weight_norm_by_layer" in b
    assert theirs[-1]["val_loss"] == pytest.approx(mine[-1]["val_loss"], rel=2e-6)
    assert theirs[-1]["val_samples"] == mine[-1]["val_samples"]
    for name, atol in {"model": 2e-4, "optimizer": 1e-6}.items():
        left, right = (load_file(run / WHOLE / f"{name}.safetensors") for run in (one, other))
        assert_near(right, left, atol)
    assert load_encoder(other).config == load_encoder(one).config
    left, right = (load_file(run / "encoder" / "model.safetensors") for run in (one, other))
    assert all(torch.allclose(left[key], right[key], atol=2e-4) for key in left)


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=atol)  # which names the keys
