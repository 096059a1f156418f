"""precision=bf16 on a CPU: compared with fp32 before the first step, through the wrapped model, on every rank."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_vit.encoders import layers
from ssl_vit.errors import ExitCode
from ssl_vit.runtime import Engine, select_engine
from tests import tiny_runs
from tests.processes import Start, call_tool

CORRUPTIONS = {
    "forward": lambda output: output + output.detach(),  # 100 % off, and its gradient is right
    "backward": lambda output: scale_gradient(output, 30.0),
    "backward NaN": lambda output: scale_gradient(output, math.nan),
    "forward NaN": lambda output: output + math.nan,
}
LINES = {
    "forward": "the encoder's tokens are",
    "forward NaN": "the encoder's tokens are nan%",
    "backward": "the gradients of the tokens are",
    "backward NaN": "the gradients of the tokens are nan%",
}


def scale_gradient(output: Tensor, scale: float) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * scale)
    return output


def inject(corrupt: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The convolution that bf16 takes, with its result or gradient made wrong; fp32's stays right."""
    original = layers.Fp32Convolutions.__torch_function__

    def convolve(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = original(self, func, types, args, kwargs)
        return corrupt(output) if func is torch.conv2d else output

    return convolve


def corrupt_forward() -> None:
    """Have this rank's process convolve wrongly."""
    layers.Fp32Convolutions.__torch_function__ = inject(CORRUPTIONS["forward"])


def corrupt_backward() -> None:
    """Have this rank's process differentiate convolutions wrongly."""
    layers.Fp32Convolutions.__torch_function__ = inject(CORRUPTIONS["backward"])


SHORT = ["steps=4", "log_every=1", "eval_every=4", "save_every=4", "data.workers=0", "optim.warmup_steps=1"]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_wrong_convolution_is_refused_before_the_first_step(
    kind: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers.Fp32Convolutions, "__torch_function__", inject(CORRUPTIONS[kind]))
    result = call_tool("pretrain", tiny_runs.run_args(shards, tmp_path / "run", *SHORT, "precision=bf16"))
    assert result.code == ExitCode.USAGE, result.output
    assert LINES[kind] in result.last_line
    assert result.last_line.endswith("off those of fp32 on this CPU (10% would do): set precision=fp32")
    assert tiny_runs.checkpoint_steps(tmp_path / "run") == []


def test_what_is_right_is_trained_and_fp32_keeps_its_bits(shards: Path, tmp_path: Path):
    """A comparison leaves no trace: neither in random numbers, nor in the batches, nor in a later fp32 run."""
    args = {name: tiny_runs.run_args(shards, tmp_path / name, *SHORT) for name in ("before", "bf16", "after")}
    assert call_tool("pretrain", args["before"]).code == 0
    bf16_result = call_tool("pretrain", [*args["bf16"], "precision=bf16"])
    assert bf16_result.code == 0, bf16_result.output
    assert call_tool("pretrain", args["after"]).code == 0
    assert (
        tiny_runs.differing_bits(tiny_runs.run_bits(tmp_path / "before"), tiny_runs.run_bits(tmp_path / "after")) == {}
    )
    fp32_rows, bf16_rows = (tiny_runs.metric_rows(tmp_path / name) for name in ("before", "bf16"))
    for bf16_row, fp32_row in zip(bf16_rows, fp32_rows, strict=True):
        assert bf16_row["samples_digest"] == fp32_row["samples_digest"]
        assert bf16_row["loss"] == pytest.approx(fp32_row["loss"], rel=1e-2)


@pytest.mark.process
@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_one_rank_that_is_wrong_ends_all(engine: Engine, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And where all are right each engine trains."""
    environment = {} if engine == "ddp" else launch_environment(engine, monkeypatch)
    clean_start = Start(
        tiny_runs.run_args(shards, tmp_path / "right", *SHORT, "precision=bf16"), tmp_path / "logs", 2, **environment
    )
    assert clean_start.wait(200) == [0, 0], clean_start.output()
    for name, corrupt in (("forward", corrupt_forward), ("backward", corrupt_backward)):
        args = tiny_runs.run_args(shards, tmp_path / name, *SHORT, "precision=bf16")
        start = Start(args, tmp_path / "logs", 2, prepare=corrupt, **environment)
        assert start.wait(200) == [ExitCode.USAGE, ExitCode.USAGE], start.output()
        assert LINES[name] in start.output()
        assert "set precision=fp32" in start.output()
        assert tiny_runs.checkpoint_steps(tmp_path / name) == []


def launch_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What accelerate's launcher would export for an engine."""
    import os

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        select_engine(engine)
        return {**os.environ, "DS_ACCELERATOR": "cpu"}
