"""The benchmarks of attention, memory and inference, by the real command line at tiny sizes; no speed is judged."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_vit import cost
from ssl_vit.encoders import Bit, Vit
from ssl_vit.exits import Refusal

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
attention, memory, inference = (import_module(f"benchmark_{name}") for name in ("attention", "memory", "inference"))

Rows = list[dict[str, Any]]
SMALL = ["recipe=mpp_vit_b16", "encoder.width=128", "encoder.depth=4", "encoder.patch=4", "data.image_size=16"]


def run(folder: Path, name: str, *keys: str) -> Rows:
    """The rows that a benchmark stored."""
    assert import_module("benchmark").main([name, f"output={folder}", *keys]) == 0
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)["rows"]  # NaN is no JSON


def attend(folder: Path, tokens: str, ways: str) -> Rows:
    sizes = ["batch=18", "heads=2", "head_width=8", "rounds=1", "round_steps=1"]
    return run(folder, "attention", *sizes, f"tokens={tokens}", f"ways={ways}")


def test_every_way_to_attend_is_judged_and_one_that_cannot_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ways = ("flash", "efficient", "math", "written out")
    rows = attend(tmp_path, "5,17", ",".join(ways))
    table = capsys.readouterr().out
    assert [(row["tokens"], row["who"]) for row in rows] == [(tokens, way) for tokens in (5, 17) for way in ways]
    for row in rows:
        if row["who"] == "efficient":  # a CPU has none
            assert "scaled_dot_product_attention" in row["refused"]
            assert row["images_per_second"] is None
            assert row["refused"] in table
            continue
        assert row["finite"]
        assert 0 < row["output_error"] < 1e-6
        assert 0 < row["gradient_error"] < 1e-5
        flops = 12 * 18 * 2 * row["tokens"] ** 2 * 8
        assert row["tflops"] * row["milliseconds"] * 1e9 == pytest.approx(flops, rel=1e-3)
    for some in (rows[:4], rows[4:]):
        best = min((row for row in some if "refused" not in row), key=lambda row: row["milliseconds"])
        assert [row for row in some if row["fastest"]] == [best]
    assert table.count("fastest") == 2


@pytest.mark.parametrize("after", [0, 5])  # from the first, or after a check, three steps of warm-up and one of a round
def test_gradients_that_are_not_finite_never_win(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Poisoned: right forward; its gradient to q is NaN from a number of calls on, as cuDNN's was."""
    real, calls = attention.race, itertools.count()

    def poisoned_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if next(calls) >= after:
            q.register_hook(lambda gradient: gradient * torch.nan)
        return attention.written(q, k, v)

    def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3)).softmax(3) @ v

    monkeypatch.setattr(attention, "pinned", {"flash": poisoned_ones, "math": no_scale}.__getitem__)
    monkeypatch.setattr(attention, "race", lambda *given: real(*given) | {"flash": [1e-6]})  # however fast they are
    poisoned, wrong = attend(tmp_path, "17", "flash,math")
    assert not poisoned["finite"]
    assert (poisoned["gradient_error"] is None) == (after == 0)
    assert poisoned["output_error"] < 1e-6
    assert min(wrong["output_error"], wrong["gradient_error"]) > 0.1
    assert (poisoned["fastest"], wrong["fastest"]) == (False, True)
    assert "NOT FINITE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("attention", "ways=flush", "ways=flush: there are flash, efficient"),
        ("attention", "tokens=0", "above 0"),
        ("memory", "batches=0,8", "above 0"),
        ("memory", "who=nobody", "who=nobody: there are ssl_vit; timm"),
        ("inference", "encoders=B/17", "encoders=B/17: there are Ti/16, S/16"),
        ("inference", "sizes=0", "above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name: str, key: str, said: str, tmp_path: Path):
    with pytest.raises(Refusal, match=said):
        run(tmp_path, name, *(SMALL if name == "memory" else []), key)


@pytest.mark.parametrize("granularity", [1, 5, 16, 64])
@pytest.mark.parametrize("most", [16, 100, 256])
def test_the_largest_that_fits_is_found(granularity: int, most: int):
    for there in range(0, 270, 7):
        asked: list[int] = []
        low, high = memory.largest(
            lambda size, there=there, asked=asked: asked.append(size) or size <= there,
            memory.doubled(4, most),
            granularity,
        )
        assert len(asked) == len(set(asked)) < 20
        assert low <= there
        if high is None:
            assert low == most <= there
            continue
        assert there < high in asked
        assert low in (0, *asked)
        assert not [size for size in range(low + 1, high) if size % granularity == 0]  # nothing is left to try


def test_doubling_ends_at_the_most_and_the_slope_is_of_batches_far_from_each_other():
    assert list(memory.doubled(8, 64)) == [8, 16, 32, 64]
    assert list(memory.doubled(8, 50)) == [8, 16, 32, 50]
    assert list(memory.doubled(50, 50)) == [50]
    assert list(memory.doubled(128, 100)) == [100]  # after 64
    assert list(memory.doubled(128, 64)) == []
    peaks = {8: 18 * 10**6, 16: 26 * 10**6, 20: 10**9, 24: 34 * 10**6, 32: 58 * 10**6, 48: None}
    assert memory.slope(peaks) == 2.0  # from 16 to 32
    assert memory.slope({8: 1, 12: 2, 16: None}) is None


@pytest.mark.process
def test_memory_is_measured_in_processes_that_a_limit_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["batches=128,1024", "granularity=512", "limit=0.5", "who=ssl_vit"]
    ours, formula = run(tmp_path, "memory", *SMALL, *sizes)
    assert (ours["who"], formula["who"]) == ("ssl_vit", "formula")
    assert (ours["largest_batch"], ours["fails_at"], ours["ratio"]) == (512, 1024, 1.0)
    assert ours["peak_gib"].keys() == {"128", "512", "1024"}
    assert ours["peak_gib"]["1024"] is None
    expected = cost.activation_bytes(Vit(width=128, depth=4, patch=4, image=16), False, False) / 1e6
    assert formula["mb_an_image"] == pytest.approx(expected, abs=1e-3)
    assert 0.9 * expected < ours["mb_an_image"] < 2 * expected  # the head's and the allocator's come on top
    assert formula["peak_gib"]["128"] < ours["peak_gib"]["128"] < formula["peak_gib"]["128"] + 0.1
    assert ours["peak_gib"]["512"] < 0.5
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ssl_vit"))
    assert line.split()[3:6] == ["no", "512", "1024"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of 80 GiB in which 700 images fit, a GiB is taken besides, and nothing is computed."""
    seen: dict[str, Any] = {"fractions": set(), "released": 0, "batch": 0}

    def train(made: Any, who: str, batch: int, forget_peak: Any) -> None:
        if batch > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        forget_peak()
        seen["batch"] = batch

    monkeypatch.setattr(memory.environment, "on_gpu", lambda: True)
    monkeypatch.setattr(memory, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "has_compiler", lambda: True)
    monkeypatch.setattr(memory, "train", train)
    monkeypatch.setattr(memory, "release", lambda: seen.__setitem__("released", seen["released"] + 1))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", seen["fractions"].add)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 + seen["batch"] * 10**7)
    return seen


def test_on_a_gpu_running_out_of_memory_is_an_answer(tmp_path: Path, gpu: dict[str, Any]):
    rows = run(tmp_path, "memory", *SMALL, "who=ssl_vit,timm")
    ours, timm = rows[:2]
    assert [row["who"] for row in rows] == ["ssl_vit", "timm", "timm, fused AdamW", "timm, compiled", "formula"]
    for row in (ours, timm):
        assert list(row["peak_gib"]) == ["128", "256", "512", "640", "704", "768", "1024"]
        assert (row["largest_batch"], row["fails_at"], row["mb_an_image"]) == (640, 704, 10.0)
    assert "bf16, 80.00 GiB" in ours["case"]
    assert gpu["fractions"] == {1.0}
    assert gpu["released"] == 4 * 7  # every time


def test_other_errors_than_of_memory_are_not_taken_for_it(
    tmp_path: Path, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(memory, "train", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, "memory", *SMALL)
    for said in ("std::bad_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"):
        assert memory.lacks_memory(RuntimeError(said))


@pytest.mark.process
def test_encoders_run_at_every_size_beside_timms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(inference, "race", lambda steps, *_, **__: {who: [2.0] for who in steps if len(steps[who]())})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    keys = ["encoders=Ti/16,R50x1", "sizes=16,40", "most=2", "rounds=1", "round_steps=1"]
    rows = run(tmp_path, "inference", *keys)
    cases = {"ViT-Ti/16 at 16 x 16": 16, "ViT-Ti/16 at 32 x 32": 40, "R50x1 at 16 x 16": 16, "R50x1 at 40 x 40": 40}
    assert [(row["case"], row["size"], row["who"]) for row in rows] == [
        (case, size, who) for case, size in cases.items() for who in ("ssl_vit", "timm")[: 1 + case.startswith("ViT")]
    ]
    configs = [Vit(size="Ti", image=16)] * 2 + [Vit(size="Ti", image=32)] * 2 + [Bit(image=16), Bit(image=40)]
    for row, config in zip(rows, configs, strict=True):
        expected = 2 * cost.encoder_macs(config) * row["images_per_second"] / 1e12
        assert row["tflops"] == pytest.approx(expected, rel=1e-3)
        assert (row["tried"], row["batch"]) == ({"1": 0.5, "2": 1.0}, 2)  # images in two seconds
        assert (row["images_per_second"], row["images_per_second_a_core"]) == (1.0, 0.25)
        assert (row["largest_batch"], row["fails_at"]) == (2, None)
        assert (row["ratio"] is None) == config.title.startswith("R50")
        if row["who"] == "timm":
            assert row["difference"] < 1e-5  # its weights are ours
    assert capsys.readouterr().out.count(">=2") == 6


class Passes:
    """An encoder whose images/s grow up to a batch of 8, and that fails above a batch."""

    device = torch.device("cpu")

    def __init__(self, fits: int, error: Exception):
        self.fits, self.error = fits, error

    def images(self, batch: int) -> Tensor:
        return torch.empty(batch)

    def __call__(self, image: Tensor) -> float:
        if len(image) > self.fits:
            raise self.error
        return max(1.0, len(image) / 8)  # seconds


OOM = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("fits", "most", "last"), [(1000, 1000, 32), (1000, 16, 16), (5, 1000, 4), (0, 1000, 0)])
def test_batches_double_while_that_pays(fits: int, most: int, last: int, monkeypatch: pytest.MonkeyPatch):
    """Where all fit, two are tried beyond the best."""
    monkeypatch.setattr(inference, "race", lambda steps, *_, **__: {who: [step()] for who, step in steps.items()})
    rates = inference.sweep(Passes(fits, OOM), most, steps=1)
    assert rates == {batch: min(batch, 8) for batch in (1, 2, 4, 8, 16, 32) if batch <= last}
    with pytest.raises(RuntimeError, match="broken"):
        inference.sweep(Passes(0, RuntimeError("broken")), most, steps=1)


@pytest.mark.parametrize(
    ("fits", "error", "found"),
    [
        (40, OOM, (32, 48, "memory")),
        (50, OOM, (48, 64, "memory")),
        (50, RuntimeError("integer out of range\nat line 1"), (48, 64, "integer out of range")),
        (0, OOM, (0, 1, "memory")),
        (500, OOM, (100, None, None)),
    ],
)
def test_the_largest_batch_says_why_the_next_fails(
    fits: int, error: Exception, found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inference, "Forward", lambda *_: Passes(fits, error))
    monkeypatch.setattr(inference, "release", lambda: None)
    options = inference.Options(granularity=16)
    row = inference.capacity(Vit(), options, 100)
    assert (row["largest_batch"], row["fails_at"], row["fails_because"]) == found


def test_an_encoder_for_which_memory_is_too_small_is_a_row_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def none(self: Any, image: Tensor) -> Iterator[Tensor]:
        raise OOM

    monkeypatch.setattr(inference, "has_timm", lambda: False)
    monkeypatch.setattr(inference.Forward, "__call__", none)
    (row,) = run(tmp_path, "inference", "encoders=ViT-Ti/16", "sizes=16", "rounds=1")
    assert (row["images_per_second"], row["batch"], row["tried"], row["largest_batch"]) == (None, None, {}, 0)
    assert "no memory" in capsys.readouterr().out
    with pytest.raises(Refusal, match="encoders=R50x1: is timm's"):
        run(tmp_path, "inference", "encoders=R50x1")


@pytest.mark.gpu
@pytest.mark.skipif(
    "ACCELERATE_USE_CPU" in os.environ or not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"
)
@pytest.mark.filterwarnings("default")  # inductor's and cuDNN's own warnings are not ours
def test_on_a_gpu_all_three_measure(tmp_path: Path):
    rows = {row["who"]: row for row in attend(tmp_path, "197", "flash,efficient,cudnn,math,written out")}
    for way in ("flash", "math", "written out"):
        assert rows[way]["finite"]
        assert max(rows[way]["output_error"], rows[way]["gradient_error"]) < 0.05
    keys = [*SMALL, "batches=512,2048", "most=2048", "who=ssl_vit", "compile=false"]
    ours, formula = run(tmp_path, "memory", *keys)
    assert ours["largest_batch"] == 2048
    assert 0.8 * formula["mb_an_image"] < ours["mb_an_image"] < 1.5 * formula["mb_an_image"]
    keys = ["encoders=Ti/16,R50x1", "sizes=64", "most=64", "rounds=1"]
    assert all(row["largest_batch"] == 64 for row in run(tmp_path, "inference", *keys))
