"""Counters: where the time went, model FLOPs utilisation, the age of the process, the attention kernel; profiles."""

import gzip
import itertools
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit import config, runtime
from ssl_vit.commands import pretrain as command
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.recipes import Pretrain
from ssl_vit.train import logger, loop, metrics, prepare
from ssl_vit.train.anomalies import RollBack, SkippedBatches
from ssl_vit.train.hardware import spec_flops
from ssl_vit.train.metrics import PHASES, Clock, PeakFlops, StepMetrics, measure_peak_flops
from ssl_vit.train.prepare import check_gradients, set_attention_kernel
from tests.conftest import TINY
from tests.processes import Start
from tests.train import engines
from tests.train.engines import rows
from tests.train.test_loop import run_training, train_until_stopped

FakeClock = SimpleNamespace


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock that is moved by hand."""
    clock = FakeClock(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic))
    return clock


def test_shares_by_hand(hand: FakeClock):
    """10 s: 1 of nothing, 2 of data, 3 forward, 4 of nothing."""
    clock = Clock()
    assert set(clock.fractions().values()) == {0.0}  # no time at all
    hand.now = 1
    with clock.phase("data"):
        hand.now = 3
    with clock.phase("forward"):
        hand.now = 6
    hand.now = 10
    expected = {"data": 0.2, "forward": 0.3, "backward": 0, "update": 0, "checkpoint": 0, "other": 0.5}
    assert clock.fractions() == pytest.approx(expected)
    assert tuple(clock.fractions()) == PHASES
    hand.now = 20
    with clock.phase("checkpoint"):
        hand.now = 40
    assert clock.fractions() == pytest.approx(
        {**{k: v / 4 for k, v in expected.items()}, "checkpoint": 0.5, "other": 0.375}
    )
    assert sum(clock.fractions().values()) == pytest.approx(1)


def test_a_phase_that_is_interrupted_or_has_another_in_it(hand: FakeClock):
    """It keeps its time, and what follows is not disturbed."""
    clock = Clock()
    with suppress(KeyError), clock.phase("data"):
        hand.now = 4
        raise KeyError
    hand.now = 8
    assert clock.fractions()["data"] == pytest.approx(0.5)
    with clock.phase("update"):
        hand.now = 12
        with clock.phase("checkpoint"):
            hand.now = 14
        hand.now = 16
    expected = {"data": 0.25, "update": 0.375, "checkpoint": 0.125, "other": 0.25}
    assert clock.fractions() == pytest.approx(dict.fromkeys(PHASES, 0) | expected)


def test_a_mark_of_a_gpu_is_an_event_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch):
    marks, synchronized = itertools.count(1), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing
            self.at = -1

        def record(self) -> None:
            self.at = next(marks)

        def synchronize(self) -> None:
            synchronized.append(self.at)

        def elapsed_time(self, other: "Event") -> float:
            assert synchronized
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(metrics, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock()
    for name in ("data", "forward", "backward"):
        with clock.phase(name):
            pass
    assert synchronized == []
    fractions = clock.fractions()
    assert synchronized == [8]  # the last mark
    assert (fractions["forward"], fractions["other"]) == pytest.approx((1 / 7, 4 / 7))


# --- a row of metrics


def report_row(window: StepMetrics, peak_flops: PeakFlops, flops: int, processes: int = 1) -> dict[str, Any]:
    names = ("_updates", "_skipped", "_weight", "_norm", "_digest")
    window.sums = {name: torch.tensor(float(name == "_updates")) for name in names}
    return window.report(Distributed(world=processes), lambda sums, weight: {}, flops, peak_flops)


@pytest.mark.parametrize("processes", [1, 4])
def test_utilisation_by_hand(processes: int, monkeypatch: pytest.MonkeyPatch):
    """A process trains 100 images of 3 GFLOP in 2 s: 150 GFLOP/s, a quarter of 600 and a tenth of 1,500."""
    monkeypatch.setattr(Distributed, "all_reduce", lambda _, sums: dict(sums))
    clock = FakeClock(at=10.0)
    monkeypatch.setattr(
        "ssl_vit.train.metrics.time", SimpleNamespace(monotonic=lambda: clock.at, perf_counter=time.perf_counter)
    )
    window = StepMetrics()
    window.num_images, window.data_wait, clock.at = 100, 0.5, 12.0
    row = report_row(window, PeakFlops(600e9, 1500e9), 3_000_000_000, processes)
    assert row["images_per_second"] == 50 * processes
    assert row["tflops"] == pytest.approx(0.15 * processes)
    assert (row["mfu"], row["mfu_data_sheet"]) == (0.25, 0.1)  # of a device
    assert row["data_wait"] == 0.25
    assert "mfu_data_sheet" not in report_row(window, PeakFlops(600e9, None), 1)


def test_the_split_of_a_row_adds_up(hand: FakeClock):
    window = StepMetrics()
    for name in ("data", "forward", "backward", "update", "checkpoint"):
        with window.clock.phase(name):
            hand.now += 2
    hand.now += 2
    row = report_row(window, PeakFlops(1e12, None), 1)
    time_fractions = {name: value for name, value in row.items() if name.startswith("time_")}
    assert time_fractions == pytest.approx({f"time_{name}": 1 / 6 for name in PHASES}, abs=5e-5)
    assert sum(time_fractions.values()) == pytest.approx(1, abs=5e-4)
    assert 0 < row["peak_memory_gib"] < 100


# --- what the machine could do


SHEETS = {  # TFLOP/s of names as torch.cuda.get_device_name gives them
    989: ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"],
    756: ["NVIDIA H100 PCIe"],
    835: ["NVIDIA H100 NVL"],
    2250: ["NVIDIA B200"],
    312: ["NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"],
    125: ["NVIDIA A10"],
    121: ["NVIDIA L4"],
    362: ["NVIDIA L40S"],
    71: ["NVIDIA GeForce RTX 3090"],
    165: ["NVIDIA GeForce RTX 4090"],
    None: ["Tesla V100-SXM2-16GB", "NVIDIA H20", ""],
}
SHEETS[None] += ["NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]


def test_the_data_sheet():
    for rate, names in SHEETS.items():
        for name in names:
            assert spec_flops(name, half=True) == (None if rate is None else rate * 1e12), name
            assert spec_flops(name, half=False) is None


def test_a_measured_product_is_of_this_machine():
    """And leaves random numbers alone."""
    torch.manual_seed(0)
    rng_state = torch.random.get_rng_state()
    peak = PeakFlops.for_device(torch.device("cpu"), half=False)
    assert peak.spec is None
    assert 1e8 < peak.measured < 1e15
    assert peak.utilization(peak.measured) == {"mfu": 1.0}
    assert measure_peak_flops(torch.device("cpu"), half=True) > 1e7
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), rng_state)


def test_the_age_of_a_process(monkeypatch: pytest.MonkeyPatch):
    """Imports and all: by the kernel's count, or else from when this was imported."""
    assert runtime.uptime() == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)
    text = f"7 (a b) c) S {'0 ' * 18}{5 * os.sysconf('SC_CLK_TCK')} 0"  # started 5 s after the machine
    monkeypatch.setattr(runtime, "Path", lambda _: SimpleNamespace(read_text=lambda: text))
    times = {"CLOCK_BOOTTIME": 7, "clock_gettime": {7: 12.5}.get, "monotonic": lambda: runtime.IMPORT_TIME + 3}
    monkeypatch.setattr(runtime, "time", SimpleNamespace(**times))
    assert runtime.uptime() == 7.5
    text = "7 (a b) c) S"
    assert runtime.uptime() == pytest.approx(3)


# --- the kernel of attention


FLAGS = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in ("flash", "math", "cudnn")}
FLAGS["efficient"] = torch.backends.cuda.mem_efficient_sdp_enabled


@pytest.mark.parametrize("name", ["auto", *FLAGS])
def test_a_pin_sets_its_flag_and_no_other(name: Any, request: pytest.FixtureRequest):
    request.addfinalizer(lambda: set_attention_kernel("auto"))
    for previous in ("math", "cudnn", "auto"):
        set_attention_kernel(previous)
        set_attention_kernel(name)
        enabled_flags = {flag for flag, enabled in FLAGS.items() if enabled()}
        assert enabled_flags == ({"flash", "efficient", "math"} if name == "auto" else {name})


CPU, SIZE = torch.device("cpu"), (3, 17, 8)


@pytest.mark.parametrize("half", [False, True])
def test_gradients_of_this_machine_are_finite(half: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "IMAGES", 2)
    torch.manual_seed(0)
    rng_state = torch.random.get_rng_state()
    check_gradients("auto", SIZE, CPU, half)
    assert torch.equal(torch.random.get_rng_state(), rng_state)


class NanGradient(torch.autograd.Function):
    """Attention whose gradient for one of its three inputs is not a number in one place."""

    which = 0

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k + v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        input_grads = [grads[0].clone() for _ in range(3)]
        input_grads[NanGradient.which].flatten()[-1:] = float("nan")
        return tuple(input_grads)


NO_KERNEL = Mock(side_effect=RuntimeError("No available kernel. Aborting execution.\nand more"))


@pytest.mark.parametrize(
    ("kernel", "which", "said"),
    [*((NanGradient.apply, n, "17 tokens of 3 heads of 8") for n in range(3)), (NO_KERNEL, 0, " Aborting execution.)")],
)
def test_a_kernel_that_cannot_or_is_not_finite_is_refused(kernel: Any, which: int, said: str, monkeypatch: Any):
    monkeypatch.setattr(prepare, "IMAGES", 2)
    monkeypatch.setattr(NanGradient, "which", which)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with pytest.raises(ExitError) as excinfo:
        check_gradients("cudnn", SIZE, CPU, True)
    assert excinfo.value.code == ExitCode.USAGE
    for text in ("attention=cudnn", said):
        assert text in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


def test_a_kernel_without_memory_says_so(monkeypatch: pytest.MonkeyPatch):
    out_of_memory = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        check_gradients("flash", SIZE, CPU, False)


def test_tensors_are_laid_out_as_in_a_block(monkeypatch: pytest.MonkeyPatch):
    """[B, heads, T, width], with heads inside of tokens in memory: a kernel may fail at one layout only."""
    attention = Mock(side_effect=lambda q, k, v: q + k + v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    check_gradients("auto", SIZE, CPU, True)
    attention.assert_called()
    for argument in (tensor for call in attention.call_args_list for tensor in call.args):
        assert (argument.shape, argument.dtype) == ((128, *SIZE), torch.bfloat16)
        assert argument.transpose(1, 2).is_contiguous()


# --- profile=true and the line of a start, in whole runs

START_LINE = re.compile(
    r"^first step \d+\.\d s after the start; fp32 on 1 threads, torch \S+; .* reaches \d+\.\d\d TFLOP/s$"
)
TIME_KEYS = {f"time_{name}" for name in PHASES}
ARGS = ["log_every=3", "save_every=4", "optim.warmup_steps=1"]
process = pytest.mark.process
pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events:UserWarning")
Capture = pytest.CaptureFixture[str]


def pretrain(shards: Path, run: Path, *overrides: str) -> int:
    return run_training(Pretrain, shards, run, [*ARGS, *overrides])


def count_events(run: Path, name: str) -> int:
    """How many times the trace has something of this name."""
    with gzip.open(run / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


def start_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "first step" in line]


def test_a_profile_of_five_steps_changes_no_number(shards: Path, tmp_path: Path, capsys: Capture):
    """The loss and the weights are the same bits as those of a run without, which says nothing of one."""
    overrides = ["steps=10", "save_every=6", "log_every=5", "encoder.dropout=0.1"]
    plain_run, profiled_run = tmp_path / "plain", tmp_path / "profiled"
    assert pretrain(shards, plain_run, *overrides) == 0
    assert not (plain_run / "profile").exists()
    output = capsys.readouterr()
    assert "profile" not in output.out
    assert "first step" not in output.out + output.err  # quiet=true
    for row in rows(plain_run):
        assert row.keys() >= TIME_KEYS | {"mfu", "peak_memory_gib", "tflops"}
        assert sum(row[name] for name in TIME_KEYS) == pytest.approx(1, abs=5e-4)
        assert 0 <= row["mfu"] < 1
    assert rows(plain_run)[1]["time_checkpoint"] > 0  # of step 6

    assert pretrain(shards, profiled_run, *overrides, "profile=true") == 0
    table = (profiled_run / "profile" / "table.txt").read_text()
    assert table.startswith("5 steps\n")
    for name in ("data", "forward", "backward", "update"):
        assert count_events(profiled_run, name) == logger.PROFILE_STEPS, name
        assert f" {name} " in table
    assert count_events(profiled_run, "checkpoint") == 1
    assert f"profile: 5 steps in {profiled_run}/profile" in capsys.readouterr().out
    assert {path.name for path in (profiled_run / "profile").iterdir()} == {"table.txt", "trace.json.gz"}
    assert [row["loss"] for row in rows(profiled_run)] == [row["loss"] for row in rows(plain_run)]
    assert len({(run_dir / "encoder" / "model.safetensors").read_bytes() for run_dir in (plain_run, profiled_run)}) == 1


@pytest.mark.parametrize(
    "steps", [pytest.param(1, marks=process), pytest.param(2, marks=process), 3, 4, pytest.param(7, marks=process)]
)
def test_a_run_shorter_than_the_window_is_traced_to_its_end(shards: Path, tmp_path: Path, steps: int, capsys: Capture):
    """And where there are too few steps for that, it says so."""
    assert pretrain(shards, tmp_path, f"steps={steps}", "profile=true") == 0
    if steps > logger.PROFILE_WARMUP:
        assert count_events(tmp_path, "forward") == steps - logger.PROFILE_WARMUP
        assert (tmp_path / "profile" / "table.txt").read_text().startswith(f"{steps - logger.PROFILE_WARMUP} steps\n")
    else:
        [message] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile:")]
        assert not message.startswith("profile: 0 steps")


def test_a_start_traces_its_own_steps_and_says_when_the_first_came(shards: Path, tmp_path: Path, capsys: Capture):
    """A resumed one too; one that is done takes no step and has no line."""
    args = (shards, tmp_path, "steps=12", "profile=true", "quiet=false")
    train_until_stopped(5, pretrain, *args)
    assert count_events(tmp_path, "forward") == 2
    (line,) = start_lines(capsys.readouterr().err)
    assert START_LINE.match(line), line
    for num_lines in (1, 0):
        assert pretrain(*args) == 0
        assert len(start_lines(capsys.readouterr().err)) == num_lines
    assert count_events(tmp_path, "forward") == 4  # of steps 6 to 12 all but the first three


def test_precision_bf16_residual_trains_and_goes_on(shards: Path, tmp_path: Path):
    """On a CPU, slowly: the loss stays near that of fp32, and a resumed run is the run that never stopped."""
    overrides = ["steps=6", "encoder.dropout=0.1", "precision=bf16_residual"]
    assert pretrain(shards, tmp_path / "fp32", *overrides[:-1]) == 0
    assert pretrain(shards, tmp_path / "a", *overrides) == 0
    train_until_stopped(3, pretrain, shards, tmp_path / "b", *overrides)
    assert pretrain(shards, tmp_path / "b", *overrides) == 0
    weights = [(tmp_path / name / "encoder" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("a", "fp32")]
    torch.testing.assert_close(*losses, atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_bf16_residual_where_there_is_none_is_refused(shards: Path, tmp_path: Path):
    pytest.importorskip("timm")
    args = engines.train_args(shards, tmp_path, "encoder.kind=timm", "encoder.name=vit_tiny_patch16_224")
    with pytest.raises(ExitError, match="bf16_residual"):
        command.run(config.parse(Pretrain, [*args, "data.image_size=32", "precision=bf16_residual"]))


@pytest.mark.ranks
@process
def test_two_processes_write_one_profile_and_one_line(shards: Path, tmp_path: Path):
    args = [*TINY, *ARGS, f"data.train={shards}/train", "data.val=none", f"run={tmp_path}/run", "tracker=none"]
    start = Start([*args, "steps=6", "quiet=false", "profile=true"], tmp_path / "logs", 2)
    assert start.wait(300) == [0, 0], start.output()
    assert len(start_lines(start.output())) == 1
    assert start.output().count("profile: 3 steps") == 1
    assert count_events(tmp_path / "run", "forward") == 3
    for row in rows(tmp_path / "run"):
        assert sum(row[name] for name in TIME_KEYS) == pytest.approx(1, abs=5e-4)


def test_going_back_is_no_new_start(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    train_step = loop.train_step

    def train_and_roll_back(training: Any, batches: Any) -> None:
        train_step(training, batches)
        if training.run.step == 6 and not training.anomalies.skipped_batches.rollbacks:
            raise RollBack(training.anomalies.skipped_batches.merge(SkippedBatches((5,), 1)))

    monkeypatch.setattr(loop, "train_step", train_and_roll_back)
    assert pretrain(shards, tmp_path, "steps=12", "quiet=false") == 0
    assert len(start_lines(capsys.readouterr().err)) == 1


@pytest.mark.parametrize("kernel", ["flash", *(pytest.param(k, marks=process) for k in ("math", "efficient", "cudnn"))])
def test_a_kernel_of_a_gpu_does_not_stop_a_run_on_a_cpu(shards: Path, tmp_path: Path, kernel: str, request: Any):
    request.addfinalizer(lambda: set_attention_kernel("auto"))
    assert pretrain(shards, tmp_path, "steps=1", f"attention={kernel}") == 0
