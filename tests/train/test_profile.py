"""profile=true and the line of a start, in whole runs."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit import config, recipe, session
from ssl_vit.exits import Refusal
from ssl_vit.recipe import Pretrain
from ssl_vit.train import loop, profile
from ssl_vit.train.attention import pin
from ssl_vit.train.clock import PHASES
from ssl_vit.train.numbers import LeftOut, RollBack
from tests.conftest import TINY
from tests.starts import Start
from tests.train import engines
from tests.train.engines import rows
from tests.train.test_loop import start, stopped

LINE = re.compile(r"^first step \d+\.\d s after the start; fp32 on 1 threads, torch \S+; .* reaches \d+\.\d\d TFLOP/s$")
SPLIT = {f"time_{name}" for name in PHASES}
WORDS = ["log_every=3", "save_every=4", "optim.warmup_steps=1"]
process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events:UserWarning")
Capture = pytest.CaptureFixture[str]


def pretrain(shards: Path, run: Path, *more: str) -> int:
    return start(Pretrain, shards, run, [*WORDS, *more])


def count(run: Path, name: str) -> int:
    """How many times the trace has something of this name."""
    with gzip.open(run / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def starts(text: str) -> list[str]:
    return [line for line in text.splitlines() if "first step" in line]


def test_a_profile_of_five_steps_changes_no_number(shards: Path, tmp_path: Path, capsys: Capture):
    """The loss and the weights are the same bits as those of a run without, which says nothing of one."""
    more = ["steps=10", "save_every=6", "log_every=5", "encoder.dropout=0.1"]
    plain, run = tmp_path / "plain", tmp_path / "profiled"
    assert pretrain(shards, plain, *more) == 0
    assert not (plain / "profile").exists()
    said = capsys.readouterr()
    assert "profile" not in said.out
    assert "first step" not in said.out + said.err  # quiet=true
    for row in rows(plain):
        assert row.keys() >= SPLIT | {"mfu", "peak_memory_gib", "tflops"}
        assert sum(row[name] for name in SPLIT) == pytest.approx(1, abs=5e-4)
        assert 0 <= row["mfu"] < 1
    assert rows(plain)[1]["time_checkpoint"] > 0  # of step 6

    assert pretrain(shards, run, *more, "profile=true") == 0
    table = (run / "profile" / "table.txt").read_text()
    assert table.startswith("5 steps\n")
    for name in ("data", "forward", "backward", "update"):
        assert count(run, name) == profile.STEPS, name
        assert f" {name} " in table
    assert count(run, "checkpoint") == 1
    assert f"profile: 5 steps in {run}/profile" in capsys.readouterr().out
    assert {path.name for path in (run / "profile").iterdir()} == {"table.txt", "trace.json.gz"}
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(plain)]
    assert len({(one / "encoder" / "model.safetensors").read_bytes() for one in (plain, run)}) == 1


@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=process), pytest.param(2, marks=process), 3, 4, pytest.param(7, marks=process)]
)
def test_a_run_shorter_than_the_window_is_traced_to_its_end(shards: Path, tmp_path: Path, steps: int, capsys: Capture):
    """And where there are too few steps for that, it says so."""
    assert pretrain(shards, tmp_path, f"steps={steps}", "profile=true") == 0
    if steps > profile.FIRST:
        assert count(tmp_path, "forward") == steps - profile.FIRST
        assert (tmp_path / "profile" / "table.txt").read_text().startswith(f"{steps - profile.FIRST} steps\n")
    else:
        [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile:")]
        assert not said.startswith("profile: 0 steps")


def test_a_start_traces_its_own_steps_and_says_when_the_first_came(shards: Path, tmp_path: Path, capsys: Capture):
    """A resumed one too; one that is done takes no step and has no line."""
    given = (shards, tmp_path, "steps=12", "profile=true", "quiet=false")
    stopped(5, pretrain, *given)
    assert count(tmp_path, "forward") == 2
    (line,) = starts(capsys.readouterr().err)
    assert LINE.match(line), line
    for lines in (1, 0):
        assert pretrain(*given) == 0
        assert len(starts(capsys.readouterr().err)) == lines
    assert count(tmp_path, "forward") == 4  # of steps 6 to 12 all but the first three


def test_precision_bf16_residual_trains_and_goes_on(shards: Path, tmp_path: Path):
    """On a CPU, slowly: the loss stays near that of fp32, and a resumed run is the run that never stopped."""
    more = ["steps=6", "encoder.dropout=0.1", "precision=bf16_residual"]
    assert pretrain(shards, tmp_path / "fp32", *more[:-1]) == 0
    assert pretrain(shards, tmp_path / "a", *more) == 0
    stopped(3, pretrain, shards, tmp_path / "b", *more)
    assert pretrain(shards, tmp_path / "b", *more) == 0
    files = [(tmp_path / name / "encoder" / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("a", "fp32")]
    torch.testing.assert_close(*losses, atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_bf16_residual_where_there_is_none_is_refused(shards: Path, tmp_path: Path):
    pytest.importorskip("timm")
    given = engines.words(shards, tmp_path, "encoder.kind=timm", "encoder.name=vit_tiny_patch16_224")
    with pytest.raises(Refusal, match="bf16_residual"):
        session.run(config.parse(Pretrain, [*given, "data.image_size=32", "precision=bf16_residual"], recipe.FOLDER))


@pytest.mark.ranks
@process
def test_two_processes_write_one_profile_and_one_line(shards: Path, tmp_path: Path):
    words = [*TINY, *WORDS, f"data.train={shards}/train", "data.val=none", f"run={tmp_path}/run", "tracker=none"]
    start = Start([*words, "steps=6", "quiet=false", "profile=true"], tmp_path / "logs", 2)
    assert start.wait(300) == [0, 0], start.said()
    assert len(starts(start.said())) == 1
    assert start.said().count("profile: 3 steps") == 1
    assert count(tmp_path / "run", "forward") == 3
    for row in rows(tmp_path / "run"):
        assert sum(row[name] for name in SPLIT) == pytest.approx(1, abs=5e-4)


def test_going_back_is_no_new_start(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    advance = loop.advance

    def once(live: Any, batches: Any) -> None:
        advance(live, batches)
        if live.run.step == 6 and not live.numbers.left_out.rollbacks:
            raise RollBack(live.numbers.left_out.and_also(LeftOut((5,), 1)))

    monkeypatch.setattr(loop, "advance", once)
    assert pretrain(shards, tmp_path, "steps=12", "quiet=false") == 0
    assert len(starts(capsys.readouterr().err)) == 1


@pytest.mark.parametrize("kernel", ["flash", *(pytest.param(k, marks=process) for k in ("math", "efficient", "cudnn"))])
def test_a_kernel_of_a_gpu_does_not_stop_a_run_on_a_cpu(
    shards: Path, tmp_path: Path, kernel: str, request: pytest.FixtureRequest
):
    request.addfinalizer(lambda: pin("auto"))
    assert pretrain(shards, tmp_path, "steps=1", f"attention={kernel}") == 0
