"""precision=bf16 on a CPU: compared with fp32 before the first step, through the wrapped model, on every rank."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_vit.encoders import layers
from ssl_vit.errors import USAGE
from ssl_vit.runtime import Engine, choose
from tests import tiny_runs
from tests.starts import Start, call

WRONG = {
    "forward": lambda made: made + made.detach(),  # 100 % off, and its gradient is right
    "backward": lambda made: scaled_gradient(made, 30.0),
    "backward NaN": lambda made: scaled_gradient(made, math.nan),
    "forward NaN": lambda made: made + math.nan,
}
LINES = {
    "forward": "the encoder's tokens are",
    "forward NaN": "the encoder's tokens are nan%",
    "backward": "the gradients of the tokens are",
    "backward NaN": "the gradients of the tokens are nan%",
}


def scaled_gradient(made: Tensor, scale: float) -> Tensor:
    if made.requires_grad:
        made.register_hook(lambda gradient: gradient * scale)
    return made


def inject(wrong: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The convolution that bf16 takes, with its result or gradient made wrong; fp32's stays right."""
    right = layers.Fp32Convolutions.__torch_function__

    def convolve(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = right(self, func, types, args, kwargs)
        return wrong(made) if func is torch.conv2d else made

    return convolve


def forward_wrong() -> None:
    """Have this rank's process convolve wrongly."""
    layers.Fp32Convolutions.__torch_function__ = inject(WRONG["forward"])


def backward_wrong() -> None:
    """Have this rank's process differentiate convolutions wrongly."""
    layers.Fp32Convolutions.__torch_function__ = inject(WRONG["backward"])


SHORT = ["steps=4", "log_every=1", "eval_every=4", "save_every=4", "data.workers=0", "optim.warmup_steps=1"]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_convolution_is_refused_before_the_first_step(
    kind: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers.Fp32Convolutions, "__torch_function__", inject(WRONG[kind]))
    ended = call("pretrain", tiny_runs.words(shards, tmp_path / "run", *SHORT, "precision=bf16"))
    assert ended.code == USAGE, ended.said
    assert LINES[kind] in ended.line
    assert ended.line.endswith("off those of fp32 on this CPU (10% would do): set precision=fp32")
    assert tiny_runs.saved(tmp_path / "run") == []


def test_what_is_right_is_trained_and_fp32_keeps_its_bits(shards: Path, tmp_path: Path):
    """A comparison leaves no trace: neither in random numbers, nor in the batches, nor in a later fp32 run."""
    words = {name: tiny_runs.words(shards, tmp_path / name, *SHORT) for name in ("before", "bf16", "after")}
    assert call("pretrain", words["before"]).code == 0
    low = call("pretrain", [*words["bf16"], "precision=bf16"])
    assert low.code == 0, low.said
    assert call("pretrain", words["after"]).code == 0
    assert tiny_runs.differing(tiny_runs.results(tmp_path / "before"), tiny_runs.results(tmp_path / "after")) == {}
    before, low_rows = (tiny_runs.rows(tmp_path / name) for name in ("before", "bf16"))
    for mine, theirs in zip(low_rows, before, strict=True):
        assert mine["samples_digest"] == theirs["samples_digest"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.process
@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_one_rank_that_is_wrong_ends_all(engine: Engine, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And where all are right each engine trains."""
    environment = {} if engine == "ddp" else launch_environment(engine, monkeypatch)
    right = Start(
        tiny_runs.words(shards, tmp_path / "right", *SHORT, "precision=bf16"), tmp_path / "logs", 2, **environment
    )
    assert right.wait(200) == [0, 0], right.said()
    for name, wrong in (("forward", forward_wrong), ("backward", backward_wrong)):
        words = tiny_runs.words(shards, tmp_path / name, *SHORT, "precision=bf16")
        start = Start(words, tmp_path / "logs", 2, prepare=wrong, **environment)
        assert start.wait(200) == [USAGE, USAGE], start.said()
        assert LINES[name] in start.said()
        assert "set precision=fp32" in start.said()
        assert tiny_runs.saved(tmp_path / name) == []


def launch_environment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What accelerate's launcher would export for an engine."""
    import os

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        choose(engine)
        return {**os.environ, "DS_ACCELERATOR": "cpu"}
