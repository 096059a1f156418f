"""The benchmarks of speed, memory and scaling, by the real command line at tiny sizes; no speed is judged.

Contestants compute the same; exponents, ratios, verdicts and largest batches are those of costs that are known.
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_vit import config, recipes
from ssl_vit.commands import setup
from ssl_vit.data import manifest
from ssl_vit.data.dataset import SampleDataset
from ssl_vit.encoders.timm_encoder import Bit
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.model import Model
from ssl_vit.recipes import Pretrain
from ssl_vit.train import loop
from tests.conftest import TINY
from tools.benchmarks import __main__ as benchmark
from tools.benchmarks import attention, baselines, inference, memory, scaling, timing

Rows = list[dict[str, Any]]
Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
process = pytest.mark.process  # a variant of what runs by default

STEP_ARGS = [
    "recipe=mpp_demo",
    "data.image_size=16",
    "encoder.patch=4",
    "encoder.width=32",
    "encoder.depth=2",
    "batch=4",
]
STEP_ARGS += ["encoder.heads=2", "encoder.mlp=64"]
MEMORY_ARGS = ["recipe=mpp_vit_b16", "encoder.width=128", "encoder.depth=4", "encoder.patch=4", "data.image_size=16"]
SCALING_ARGS = [*TINY, "rounds=2", "round_steps=1", "tracker=none"]
WIDTH, DEPTH, PATCH, IMAGE, BATCH = 16, 2, 4, 16, 8  # of TINY


def run_benchmark(folder: Path, name: str, *keys: str) -> Rows:
    """The rows that a benchmark stored."""
    assert benchmark.main([name, f"output={folder}", *keys]) == 0
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)["rows"]  # NaN is no JSON


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("attention", ["ways=flush"], "ways=flush: there are flash, efficient"),
        ("attention", ["tokens=0"], "above 0"),
        ("memory", [*MEMORY_ARGS, "batches=0,8"], "above 0"),
        ("memory", [*MEMORY_ARGS, "who=nobody"], "who=nobody: there are ssl_vit; timm"),
        ("inference", ["encoders=B/17"], "encoders=B/17: there are Ti/16, S/16"),
        ("inference", ["sizes=0"], "above 0"),
        ("step", ["recipe=mpp_demo", "encoder.kind=axial"], "rivals are plain ViTs, and the encoder is Axial-ViT"),
        ("scaling", [*TINY, "axes=image", "images=16,30"], "cannot be cut into patches of 4"),
        ("scaling", [*TINY, "axes=depth", "depths=0"], "depths"),
        ("scaling", ["axes=width", "encoder.kind=bit", "head.kind=classifier"], "width is no number of encoder.kind"),
        ("scaling", ["WORLD_SIZE=2", *TINY], "starts its processes itself"),  # of a launcher
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    name: str, keys: list[str], said: str, tmp_path: Path, monkeypatch: Patch
):
    monkeypatch.setattr(scaling, "build_step", None)
    if keys[0] == "WORLD_SIZE=2":
        monkeypatch.setenv(*keys.pop(0).split("="))
    with pytest.raises(ExitError, match=said) as end:
        run_benchmark(tmp_path, name, *keys)
    assert end.value.code == ExitCode.USAGE


# turns, ratios and tables, by a clock that the test holds


def test_contestants_take_turns_each_begins_a_round_and_speed_is_a_median_of_ratios_within_rounds():
    durations, order = {"a": 1.0, "b": 2.0, "c": 4.0}, []
    contestants = {contestant: partial(order.append, contestant) for contestant in durations}
    seconds = timing.race(
        contestants, 3, steps=2, warm_up=1, clock=lambda: sum(durations[contestant] for contestant in order)
    )
    assert seconds == {contestant: [duration] * 3 for contestant, duration in durations.items()}
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}
    row = timing.speed_stats(seconds, "a", 10, "b")
    assert row == {"images_per_second": 5.0, "milliseconds": 2000.0, "ratio": 1.0, "ratio_spread": [0.5, 2.0]}
    assert timing.speed_stats(seconds, "b", 10, None)["ratio"] is None
    assert timing.format_spread(row["ratio_spread"]) == "0.50-2.00"
    lines = timing.format_table(["who", "speed"], [["ours", "10.5"], ["theirs alone", "9"]]).splitlines()
    assert lines == ["who             speed", "ours             10.5", "theirs alone        9"]


# the step and the loop


def build_step_inputs() -> tuple[recipes.Recipe, Model, dict[str, Tensor]]:
    recipe, tensors, source = recipes.resolve_recipe(config.parse(Pretrain, STEP_ARGS))
    model = setup.build_model(recipe, 1000, tensors, source)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)
    return recipe, model, timing.random_batch(recipe.batch, recipe.encoder, torch.device("cpu"))


def test_a_step_is_measured_beside_rivals_levers_and_bare_products(tmp_path: Path, capsys: Screen):
    rows = {
        row["who"]: row
        for row in run_benchmark(tmp_path, "step", *STEP_ARGS, "levers=true", "rounds=2", "round_steps=1")
    }
    assert rows.keys() >= {"ssl_vit", "timm", "timm, fused AdamW", "Hugging Face", "products", "one thread"}
    assert rows["ssl_vit"]["first_loss"] == pytest.approx(rows["timm"]["first_loss"], rel=1e-6)
    assert rows["ssl_vit"]["first_loss"] != pytest.approx(math.log(512), abs=1e-3)  # else a zero head
    assert rows["Hugging Face"]["tokens_off"] < 1e-5
    assert {row["kind"] for row in rows.values()} == {"step", "lever", "products"}
    for row in rows.values():
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        assert row["tflops"] > 0
    assert rows["ssl_vit"]["ratio"] == rows["products"]["of_products"]["products"] == 1
    output = capsys.readouterr().out
    assert "ViT-32x2x2x64/4 16x16 batch 4 fp32 cpu" in output
    assert all(name in output for name in rows)


def test_without_a_lever_a_step_is_the_same_step(tmp_path: Path):
    recipe, model, batch = build_step_inputs()
    step: Any = baselines.ssl_vit_step(recipe, model, batch, tmp_path)
    expected = [float(step()[0]) for _ in range(3)]
    assert expected[0] != expected[1] != expected[2]
    steps: dict[str, Any] = baselines.ablations(recipe, build_step_inputs()[1], batch, tmp_path)
    assert len(steps) >= 7
    for name, build in steps.items():
        step = build()
        results = [step() for _ in range(3)]
        losses = [result if isinstance(result, float) else float(result[0]) for result in results]
        assert losses == pytest.approx(expected, rel=1e-4), name


def test_rivals_take_the_same_steps():
    """timm's: the same losses as ours, step by step; both in the plain loop, where AdamW decays alike."""
    recipe, model, batch = build_step_inputs()
    rivals: dict[str, Any] = baselines.rivals(recipe, model, batch)
    assert rivals.keys() == {"timm", "timm, fused AdamW", "Hugging Face", "Hugging Face, fused AdamW"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr)
    autocast = baselines.autocast(recipe, torch.device("cpu"))
    own_step: Any = baselines.simple_step(baselines.Loss(model), repeat(batch), optimizer, autocast)
    timm_step, fused_step = rivals["timm"](), rivals["timm, fused AdamW"]()
    for _ in range(3):
        expected = float(own_step())
        assert timm_step() == pytest.approx(expected, rel=1e-5)
        assert float(fused_step()) == pytest.approx(expected, rel=1e-5)


def test_the_products_are_the_steps():
    """Their FLOPs are the formula's, but for the gradient of the pixels, which only the products compute."""
    recipe, model, _ = build_step_inputs()
    num_flops = sum(
        6 * rows * inputs * outputs * count for rows, inputs, outputs, count in baselines.linear_shapes(recipe)
    )
    heads, tokens, width = baselines.attention_shape(recipe)
    num_flops += recipe.encoder.dims[1] * 12 * heads * tokens**2 * width  # type: ignore[union-attr]
    pixels = 2 * recipe.batch * 16 * 48 * 32
    assert num_flops - pixels == recipe.batch * setup.flops_per_image(model)
    products = baselines.matrix_products(recipe, torch.device("cpu"), bf16=False)
    with patch.object(torch, "mm", wraps=torch.mm) as mm:
        products["products"]()
    assert mm.call_count == 3 * sum(count for *_, count in baselines.linear_shapes(recipe))


def test_the_loop_is_measured_beside_the_bare_step_and_from_shards(shards: Path, tmp_path: Path):
    args = [*STEP_ARGS, f"data.train={shards}/train", "data.workers=0", "rounds=2", "round_steps=2"]
    rows = run_benchmark(tmp_path, "loop", *args)
    expected = [
        ("bare step", "bare step"),
        ("fit() on tensors", "bare step"),
        ("fit() from shards", "fit() on tensors"),
    ]
    assert [(row["who"], row["against"]) for row in rows] == expected
    assert rows[0]["ratio"] == 1
    assert all(row["images_per_second"] > 0 for row in rows)


@pytest.mark.long
def test_the_gpu_preset_tries_itself_without_one(tmp_path: Path, capsys: Screen):
    rows = run_benchmark(tmp_path, "step", "preset=gpu", "rounds=1", "round_steps=1")
    assert {row["benchmark"] for row in rows} == {"product", "attention", "step", "loop", "memory"}
    assert "preset=gpu without a GPU: the same at a small size" in capsys.readouterr().out


# attention


def run_attention(folder: Path, tokens: str, kernels: str) -> Rows:
    sizes = ["batch=18", "heads=2", "head_width=8", "rounds=1", "round_steps=1"]
    return run_benchmark(folder, "attention", *sizes, f"tokens={tokens}", f"ways={kernels}")


def test_every_way_to_attend_is_judged_and_one_that_cannot_says_so(tmp_path: Path, capsys: Screen):
    kernels = ("flash", "efficient", "math", "written out")
    rows = run_attention(tmp_path, "5,17", ",".join(kernels))
    table = capsys.readouterr().out
    assert [(row["tokens"], row["who"]) for row in rows] == [
        (tokens, kernel) for tokens in (5, 17) for kernel in kernels
    ]
    for group in (rows[:4], rows[4:]):
        refused = group.pop(1)  # a CPU has no such kernel
        assert "scaled_dot_product_attention" in refused["refused"]
        assert refused["refused"] in table
        assert refused["images_per_second"] is None
        for row in group:
            assert row["finite"]
            assert 0 < row["output_error"] < 1e-6
            assert 0 < row["gradient_error"] < 1e-5
            flops = 12 * 18 * 2 * row["tokens"] ** 2 * 8
            assert row["tflops"] * row["milliseconds"] * 1e9 == pytest.approx(flops, rel=1e-3)
        assert [row for row in group if row["fastest"]] == [min(group, key=lambda row: row["milliseconds"])]
    assert table.count("fastest") == 2


@pytest.mark.parametrize("after", [0, 5])  # from the first, or after a check, three steps of warm-up and one of a round
def test_gradients_that_are_not_finite_never_win(after: int, tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    """Poisoned: right forward; its gradient to q is NaN from a number of calls on, as cuDNN's was."""
    real_race, calls = attention.race, itertools.count()

    def poisoned_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if next(calls) >= after:
            q.register_hook(lambda gradient: gradient * torch.nan)
        return attention.written_out(q, k, v)

    functions = {
        "flash": poisoned_attention,
        "math": lambda q, k, v: (q @ k.transpose(2, 3)).softmax(3) @ v,
    }  # without a scale
    monkeypatch.setattr(attention, "attention_function", functions.__getitem__)
    monkeypatch.setattr(attention, "race", lambda *args: real_race(*args) | {"flash": [1e-6]})  # however fast they are
    poisoned, wrong = run_attention(tmp_path, "17", "flash,math")
    assert not poisoned["finite"]
    assert (poisoned["gradient_error"] is None) == (after == 0)
    assert poisoned["output_error"] < 1e-6
    assert min(wrong["output_error"], wrong["gradient_error"]) > 0.1
    assert (poisoned["fastest"], wrong["fastest"]) == (False, True)
    assert "NOT FINITE" in capsys.readouterr().out


# memory


@pytest.mark.parametrize("granularity", [1, 5, 16, 64])
@pytest.mark.parametrize("most", [16, 100, 256])
def test_the_largest_that_fits_is_found(granularity: int, most: int):
    for limit in range(0, 270, 7):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        low, high = memory.find_largest(fits, memory.doubling_sizes(4, most), granularity)
        assert len(tried) == len(set(tried)) < 20
        if high is None:
            assert low == most <= limit
        else:
            assert low <= limit < high
            assert {low, high} <= {0, *tried}
            assert not [size for size in range(low + 1, high) if size % granularity == 0]  # nothing is left to try


def test_doubling_ends_at_the_most_and_the_slope_is_of_batches_far_from_each_other():
    expected = {(8, 64): [8, 16, 32, 64], (8, 50): [8, 16, 32, 50], (50, 50): [50], (128, 100): [100], (128, 64): []}
    assert {ends: list(memory.doubling_sizes(*ends)) for ends in expected} == expected  # 100 is tried after 64
    peaks = {8: 18 * 10**6, 16: 26 * 10**6, 20: 10**9, 24: 34 * 10**6, 32: 58 * 10**6, 48: None}
    assert memory.slope(peaks) == 2.0  # from 16 to 32
    assert memory.slope({8: 1, 12: 2, 16: None}) is None


@process
def test_memory_is_measured_in_processes_that_a_limit_holds(tmp_path: Path, capsys: Screen):
    sizes = ["batches=128,1024", "granularity=512", "limit=0.5", "who=ssl_vit"]
    own_row, formula = run_benchmark(tmp_path, "memory", *MEMORY_ARGS, *sizes)
    assert (own_row["who"], formula["who"]) == ("ssl_vit", "formula")
    assert (own_row["largest_batch"], own_row["fails_at"], own_row["ratio"]) == (512, 1024, 1.0)
    assert own_row["peak_gib"].keys() == {"128", "512", "1024"}
    assert own_row["peak_gib"]["1024"] is None
    expected = cost.activation_bytes(Vit(width=128, depth=4, patch=4, image=16), False, False) / 1e6
    assert formula["mb_an_image"] == pytest.approx(expected, abs=1e-3)
    assert 0.9 * expected < own_row["mb_an_image"] < 2 * expected  # the head's and the allocator's come on top
    assert formula["peak_gib"]["128"] < own_row["peak_gib"]["128"] < formula["peak_gib"]["128"] + 0.1
    assert own_row["peak_gib"]["512"] < 0.5
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ssl_vit"))
    assert line.split()[3:6] == ["no", "512", "1024"]


def test_on_a_gpu_running_out_of_memory_is_an_answer_and_no_other_error(tmp_path: Path, monkeypatch: Patch):
    """A GPU of 80 GiB in which 700 images fit, a GiB is taken besides, and nothing is computed."""
    fractions, released, trained = Mock(), Mock(), [0]

    def train(recipe: Any, who: str, batch: int, forget_peak: Any) -> None:
        if batch > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        forget_peak()
        trained.append(batch)

    memory_fakes: dict[str, Any] = {"default_device": lambda: torch.device("cpu"), "has_compiler": lambda: True}
    memory_fakes |= {"train": train, "release": released}
    cuda_fakes: dict[str, Any] = {"set_per_process_memory_fraction": fractions, "max_memory_reserved": lambda: 0}
    cuda_fakes |= {"mem_get_info": lambda: (79 * 2**30, 80 * 2**30), "reset_peak_memory_stats": lambda: None}
    cuda_fakes |= {"max_memory_allocated": lambda: 2**30 + trained[-1] * 10**7}
    monkeypatch.setattr(memory.runtime, "on_gpu", lambda: True)
    for module, fakes in ((memory, memory_fakes), (torch.cuda, cuda_fakes)):
        for name, fake in fakes.items():
            monkeypatch.setattr(module, name, fake)
    rows = run_benchmark(tmp_path, "memory", *MEMORY_ARGS, "who=ssl_vit,timm")
    assert [row["who"] for row in rows] == ["ssl_vit", "timm", "timm, fused AdamW", "timm, compiled", "formula"]
    for row in rows[:2]:
        assert list(row["peak_gib"]) == ["128", "256", "512", "640", "704", "768", "1024"]
        assert (row["largest_batch"], row["fails_at"], row["mb_an_image"]) == (640, 704, 10.0)
    assert "bf16, 80.00 GiB" in rows[0]["case"]
    assert {call.args for call in fractions.call_args_list} == {(1.0,)}
    assert released.call_count == 4 * 7  # every time
    monkeypatch.setattr(memory, "train", Mock(side_effect=RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        run_benchmark(tmp_path, "memory", *MEMORY_ARGS)
    for message in ("std::bad_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"):
        assert memory.lacks_memory(RuntimeError(message))


# inference


@process
def test_encoders_run_at_every_size_beside_timms(tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    monkeypatch.setattr(
        inference, "race", lambda steps, *_, **__: {name: [2.0] for name in steps if len(steps[name]())}
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    keys = ["encoders=Ti/16,R50x1", "sizes=16,40", "most=2", "rounds=1", "round_steps=1"]
    rows = run_benchmark(tmp_path, "inference", *keys)
    cases = {"ViT-Ti/16 at 16 x 16": 16, "ViT-Ti/16 at 32 x 32": 40, "R50x1 at 16 x 16": 16, "R50x1 at 40 x 40": 40}
    assert [(row["case"], row["size"], row["who"]) for row in rows] == [
        (case, size, name) for case, size in cases.items() for name in ("ssl_vit", "timm")[: 1 + case.startswith("ViT")]
    ]
    configs = [Vit(size="Ti", image=16)] * 2 + [Vit(size="Ti", image=32)] * 2 + [Bit(image=16), Bit(image=40)]
    for row, encoder_config in zip(rows, configs, strict=True):
        expected = 2 * cost.encoder_macs(encoder_config) * row["images_per_second"] / 1e12
        assert row["tflops"] == pytest.approx(expected, rel=1e-3)
        assert (row["tried"], row["batch"]) == ({"1": 0.5, "2": 1.0}, 2)  # images in two seconds
        assert (row["images_per_second"], row["images_per_second_a_core"]) == (1.0, 0.25)
        assert (row["largest_batch"], row["fails_at"]) == (2, None)
        assert (row["ratio"] is None) == encoder_config.title.startswith("R50")
        if row["who"] == "timm":
            assert row["difference"] < 1e-5  # its weights are ours
    assert capsys.readouterr().out.count(">=2") == 6


class FakeEncoder:
    """An encoder whose images/s grow up to a batch of 8, and that fails above a batch."""

    device = torch.device("cpu")

    def __init__(self, max_batch: int, error: Exception):
        self.max_batch, self.error = max_batch, error

    def images(self, batch: int) -> Tensor:
        return torch.empty(batch)

    def __call__(self, image: Tensor) -> float:
        if len(image) > self.max_batch:
            raise self.error
        return max(1.0, len(image) / 8)  # seconds


OOM = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("fits", "most", "last"), [(1000, 1000, 32), (1000, 16, 16), (5, 1000, 4), (0, 1000, 0)])
def test_batches_double_while_that_pays(fits: int, most: int, last: int, monkeypatch: Patch):
    """Where all fit, two are tried beyond the best."""
    monkeypatch.setattr(inference, "race", lambda steps, *_, **__: {name: [step()] for name, step in steps.items()})
    rates = inference.sweep_batches(cast(Any, FakeEncoder)(fits, OOM), most, steps=1)
    assert rates == {batch: min(batch, 8) for batch in (1, 2, 4, 8, 16, 32) if batch <= last}
    with pytest.raises(RuntimeError, match="broken"):
        inference.sweep_batches(cast(Any, FakeEncoder)(0, RuntimeError("broken")), most, steps=1)


def test_the_largest_batch_says_why_the_next_fails(monkeypatch: Patch):
    monkeypatch.setattr(inference, "release", lambda: None)
    for fits, error, expected in (
        (40, OOM, (32, 48, "memory")),
        (50, RuntimeError("integer out of range\nat line 1"), (48, 64, "integer out of range")),
        (0, OOM, (0, 1, "memory")),
        (500, OOM, (100, None, None)),
    ):
        monkeypatch.setattr(inference, "Forward", lambda *_, encoder_args=(fits, error): FakeEncoder(*encoder_args))
        row = inference.capacity(Vit(), inference.Options(granularity=16), 100)
        assert (row["largest_batch"], row["fails_at"], row["fails_because"]) == expected


def test_an_encoder_for_which_memory_is_too_small_is_a_row_too(tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    monkeypatch.setattr(inference, "has_timm", lambda: False)
    monkeypatch.setattr(inference.Forward, "__call__", Mock(side_effect=OOM))
    (row,) = run_benchmark(tmp_path, "inference", "encoders=ViT-Ti/16", "sizes=16", "rounds=1")
    assert (row["images_per_second"], row["batch"], row["tried"], row["largest_batch"]) == (None, None, {}, 0)
    assert "no memory" in capsys.readouterr().out
    with pytest.raises(ExitError, match="encoders=R50x1: is timm's"):
        run_benchmark(tmp_path, "inference", "encoders=R50x1")


@pytest.mark.gpu
@pytest.mark.skipif(
    "ACCELERATE_USE_CPU" in os.environ or not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"
)
@pytest.mark.filterwarnings("default")  # inductor's and cuDNN's own warnings are not ours
def test_on_a_gpu_all_three_measure(tmp_path: Path):
    rows = {row["who"]: row for row in run_attention(tmp_path, "197", "flash,efficient,cudnn,math,written out")}
    for kernel in ("flash", "math", "written out"):
        assert rows[kernel]["finite"]
        assert max(rows[kernel]["output_error"], rows[kernel]["gradient_error"]) < 0.05
    keys = [*MEMORY_ARGS, "batches=512,2048", "most=2048", "who=ssl_vit", "compile=false"]
    own_row, formula = run_benchmark(tmp_path, "memory", *keys)
    assert own_row["largest_batch"] == 2048
    assert 0.8 * formula["mb_an_image"] < own_row["mb_an_image"] < 1.5 * formula["mb_an_image"]
    keys = ["encoders=Ti/16,R50x1", "sizes=64", "most=64", "rounds=1"]
    assert all(row["largest_batch"] == 64 for row in run_benchmark(tmp_path, "inference", *keys))


# scaling


def run_scaling(folder: Path, *args: str) -> Rows:
    return run_benchmark(folder, "scaling", *SCALING_ARGS, *args)


def scaling_options(*args: str) -> Any:
    return config.parse(scaling.Options, [*SCALING_ARGS, *args])


def test_a_line_has_numpys_slope_and_standard_error_and_a_row_a_fit_a_round():
    """Rounds in which the cost grows with power 2, 1 and 4; by the formula it is 3."""
    x, y = [0, 1, 2, 4, 7], [1.0, 2.5, 2.0, 5.5, 7.0]
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert scaling.fit_line(x, y) == pytest.approx((coefficients[0], np.sqrt(covariance[0, 0])))
    assert scaling.fit_line([1, 3], [2, 8]) == (3.0, None)
    assert scaling.exponent([5], [1.0]) is None
    seconds = {value: [value**2.0, value**1.0, value**4.0] for value in (2, 4, 8)} | {16: [1.0, 1.0, 1.0]}
    row = scaling.growth_row(
        "size", "x", seconds, lambda v: 7.0 * v**3, lambda v: 10 * v, {16: "too large", 32: "gone"}
    )
    assert (row["exponent"], row["exponent_spread"], row["formula"]) == (2, [1, 4], 3)
    assert (row["ratio"], row["ratio_spread"]) == (0.25, [round(4 / 64, 3), 4])  # from 2 to 8: 16 times, not 64
    assert row["values"] == [2, 4, 8, 16]
    assert row["milliseconds"] == [4e3, 16e3, 64e3, 1e3]  # medians
    assert row["images_per_second"] == [5, 2.5, 1.25, 160]
    assert row["left_out"] == {"16": "too large", "32": "gone"}
    ends = scaling.growth_row("size", "x", {2: [3.0], 4: [3.0], 8: [24.0]}, lambda v: v + 8.0)
    assert (ends["last_two"], ends["last_two_formula"]) == (3, round(float(np.log2(16 / 12)), 3))
    row = scaling.growth_row("size", "x", {2: [1.0, 2.0]}, lambda v: v)
    assert (row["exponent"], row["formula"], row["ratio"], row["milliseconds"]) == (None, None, None, [1500])


def flops(image: int = IMAGE, patch: int = PATCH, depth: int = DEPTH, width: int = WIDTH) -> int:
    """Of an image by hand, 2 a product forward and 4 back, but for the gradient of pixels.

    Embedding; blocks with an MLP of 4 D on T = 1 + N tokens; the head on half of N.
    """
    patches = (image // patch) ** 2
    tokens = patches + 1
    block_flops = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    return 4 * patches * 3 * patch**2 * width + 6 * depth * block_flops + 6 * (patches // 2) * width * 512


AXES = {"image": (16, 32, 48), "patch": (8, 4, 2), "depth": (1, 2, 5), "width": (16, 32, 64), "batch": (1, 4, 8)}


def axis_argument(axis: str) -> str:
    return f"{scaling.STEPS[axis]}={','.join(map(str, AXES[axis]))}"


def check_formula(row: dict[str, Any], axis: str) -> None:
    """The formula and the speeds of an axis are those by hand."""
    values = AXES[axis]
    costs = [flops() * value if axis == "batch" else flops(**{axis: value}) * BATCH for value in values]
    assert (row["axis"], row["values"]) == (axis, list(values))
    assert row["formula"] == pytest.approx(np.polyfit(np.log(values), np.log(costs), 1)[0], abs=1e-3)
    assert row["exponent_spread"][0] <= row["exponent"] <= row["exponent_spread"][1]
    for number, step_flops in enumerate(costs):
        images = values[number] if axis == "batch" else BATCH
        seconds = row["milliseconds"][number] / 1e3
        assert row["images_per_second"][number] == pytest.approx(images / seconds, rel=1e-2)
        assert row["tflops"][number] == pytest.approx(step_flops / seconds / 1e12, rel=1e-2, abs=1e-4)


def test_every_step_is_that_of_its_value(monkeypatch: Patch, tmp_path: Path):
    """Of real steps of one axis; of all what is built and given, in a race of a clock that knows each cost."""
    (row,) = run_scaling(tmp_path, "axes=image", axis_argument("image"))
    check_formula(row, "image")
    built: dict[tuple[int, ...], tuple[int, ...]] = {}

    def record_step(recipe: Any, model: Any, batch: Any, output: Path) -> Callable[[], object]:
        assert tuple(batch["image"].shape[2:]) == model.encoder.config.image_hw
        depth, heads = len(model.encoder.blocks), model.encoder.blocks[0].attn.heads
        hidden = model.encoder.blocks[0].mlp.fc1.out_features
        grid, width = model.encoder.grid[0], model.encoder.width
        built[(recipe.batch, grid, depth, width)] = (len(batch["image"]), model.encoder.stride, heads, hidden)
        return lambda: None

    monkeypatch.setattr(scaling.baselines, "ssl_vit_step", record_step)
    monkeypatch.setattr(scaling, "race", lambda steps, *_: {name: [1e-4 * float(name) ** 1.5] * 2 for name in steps})
    rows = run_scaling(tmp_path, f"axes={','.join(AXES)}", *map(axis_argument, AXES))
    assert [row["exponent"] for row in rows] == [1.5] * 5
    for row, axis in zip(rows, AXES, strict=True):
        check_formula(row, axis)
    expected = {"image": lambda v: (8, v // 4, 2, 16), "patch": lambda v: (8, 16 // v, 2, 16)}
    expected |= {"depth": lambda v: (8, 4, v, 16), "width": lambda v: (8, 4, 2, v), "batch": lambda v: (v, 4, 2, 16)}
    assert set(built) == {expected[axis](value) for axis, values in AXES.items() for value in values}
    assert [built[8, 4, 2, width][2:] for width in AXES["width"]] == [(2, 64), (4, 128), (8, 256)]
    assert all(images == batch for (batch, *_), (images, *_) in built.items())
    assert {built[8, 16 // patch, 2, 16][1] for patch in (2, 8)} == {2, 8}


def test_what_does_not_fit_is_left_out(monkeypatch: Patch, tmp_path: Path, capsys: Screen):
    def limited_step(recipe: Any, *_: Any) -> Callable[[], object]:
        if recipe.batch == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(scaling.baselines, "ssl_vit_step", limited_step)
    (row,) = run_scaling(tmp_path, "axes=batch", "batches=8,16,32")
    assert (row["values"], row["formula"]) == ([8, 16], 1)
    assert row["left_out"] == {"32": "does not fit into the memory"}
    assert "batch 32: does not fit into the memory" in capsys.readouterr().out


@pytest.mark.parametrize(("samples", "shards"), [(5, 1), (640, 3), (2000, 50)])
def test_a_set_of_any_size_is_made_and_can_be_read(samples: int, shards: int, tmp_path: Path):
    repeated = manifest.load(
        scaling.repeat_shard(scaling.make_picture_shard(tmp_path, (16, 24)), tmp_path / "set", samples, shards)
    )
    repeated.check_shards()
    assert (repeated.samples, len(repeated.shards)) == (samples // shards * shards, shards)
    stream = scaling.make_stream(scaling_options("data.image_size=16,24"), repeated, 0)
    batch, faults = SampleDataset(repeated, stream.config, 0, training=False).batch(
        [(0, i) for i in range(repeated.samples)]
    )
    assert not faults
    shard_samples = samples // shards
    assert len({image.numpy().tobytes() for image in batch["image"]}) == min(
        shard_samples, scaling.PICTURES
    )  # all that differ
    assert repeated.index(0)["label"].tolist() == [0] * shard_samples
    truncated = tmp_path / "set" / "0.tar"
    truncated.write_bytes(truncated.read_bytes()[:512])
    with pytest.raises(ExitError, match="too short") as end:  # what cannot be read is no measurement
        scaling.read_first_batch(scaling_options("data.image_size=16,24"), tmp_path / "set")
    assert end.value.code == ExitCode.DATA


@process
@pytest.mark.parametrize(("axis", "key"), [("samples", "samples=1000,4000"), ("shards", "shards=1,20")])
def test_the_axes_of_data(axis: str, key: str, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(scaling, "PLANS_PER_READ", 5)
    with patch.object(scaling, "repeat_shard", wraps=scaling.repeat_shard) as repeat_shard:
        start, _plan, batch = rows = run_scaling(tmp_path, f"axes={axis}", key)
    sizes = [call.args[2:] for call in repeat_shard.call_args_list]
    assert sizes == ([(1000, 1), (4000, 4)] if axis == "samples" else [(2000, 1), (2000, 20)])
    values = [int(value) for value in key.partition("=")[2].split(",")]
    assert all(row["axis"] == axis and row["values"] == values for row in rows)
    assert [row["formula"] for row in rows] == [None, 0, 0]
    assert all(row["exponent"] is not None for row in rows)
    assert (start["images_per_second"], len(batch["images_per_second"])) == (None, 2)


@process
def test_workers_are_fitted_up_to_the_cores(tmp_path: Path, monkeypatch: Patch, shards: Path):
    monkeypatch.setattr(scaling, "WARM_UP_SAMPLES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    worker_counts: list[int] = []
    real_time_loader = scaling.time_loader

    def record_loading(recipe: Any, source: Any, count: int) -> float:
        worker_counts.append(count)
        assert source.folder == shards / "train"
        assert real_time_loader(recipe, source, count) > 0
        return 0.6 / (count or 0.5)

    monkeypatch.setattr(scaling, "time_loader", record_loading)
    (row,) = run_scaling(tmp_path, "axes=workers", "workers=0,1,2,3", f"data.train={shards}/train")
    assert worker_counts == [0, 1, 2, 3] * 2
    assert row["left_out"] == {"3": "more than the 2 cores", "0": "in the training's own process"}
    assert (row["values"], row["cores"]) == ([0, 1, 2, 3], 2)
    assert (row["exponent"], row["formula"], row["ratio"]) == (-1, -1, 1)
    assert row["images_per_second"] == pytest.approx([BATCH / 1.2, BATCH / 0.6, BATCH / 0.3, BATCH / 0.2], rel=1e-2)


@process
@pytest.mark.ranks
def test_two_processes_by_a_real_launch(tmp_path: Path):
    (row,) = run_scaling(tmp_path, "axes=processes", "processes=2")
    assert (row["values"], row["exponent"], row["efficiency"]) == ([2], None, [1])
    assert row["images_per_second"][0] == pytest.approx(2 * BATCH / row["milliseconds"][0] * 1e3, rel=1e-2)


def test_processes_are_launched_with_as_many_images_each(monkeypatch: Patch, tmp_path: Path):
    """The command of a launch, by a launcher that answers at once, two processes in twice the time; or that fails."""
    launches: dict[int, Any] = {}

    def launch(command: list[str], env: dict[str, str], **_: Any) -> Any:
        count = int(command[command.index("--nproc_per_node") + 1])
        options: Any = config.parse(scaling.engines.Options, [f"recipe={command[-2]}"])
        recipes.resolve_recipe(options)
        launches[count] = (
            options.batch,
            options.encoder.width,
            options.encoder.image_hw,
            options.rounds,
            env["OMP_NUM_THREADS"],
        )
        Path(command[-1]).write_text(json.dumps([0.5 * count] * options.rounds))
        return scaling.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(scaling.subprocess, "run", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    (row,) = run_scaling(tmp_path, "axes=processes", "processes=1,2,4")
    assert launches == {count: (BATCH * count, WIDTH, (IMAGE, IMAGE), 2, "1") for count in (1, 2, 4)}
    assert (row["exponent"], row["formula"], row["efficiency"]) == (1, 0, [1, 0.5, 0.25])
    assert row["left_out"] == {"4": "more than the 2 cores"}
    assert row["images_per_second"] == [BATCH / 0.5] * 3
    failed = scaling.subprocess.CompletedProcess([], 1, stderr="what went wrong")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ExitError, match="a launch of 1 ended with 1"):
        run_scaling(tmp_path, "axes=processes", "processes=1")


@process
@pytest.mark.parametrize("where", [None, "the loop", "a worker"])
def test_memory_of_a_training_is_watched(where: str | None, tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    """Flat, or 50 kB a step that nobody gives back; before other axes, whose freed memory would hide growth."""
    leaked: list[bytes] = []
    owner, name = (loop, "optimizer_step") if where == "the loop" else (SampleDataset, "batch")
    original = getattr(owner, name)

    def leaking(*args: Any, **kwargs: Any) -> Any:
        if where == "the loop" or torch.utils.data.get_worker_info() is not None:
            leaked.append(os.urandom(50_000))
        return original(*args, **kwargs)

    if where:
        monkeypatch.setattr(owner, name, leaking)
    row, step = run_scaling(tmp_path, "axes=batch,time", "batches=8", "steps_over_time=80", "flat_below=20000")
    assert (row["axis"], step["axis"]) == ("time", "batch")
    assert (row["flat"], row["values"], len(row["bytes"])) == (where is None, list(range(40, 80, 2)), 20)
    assert row["bytes_a_step"] == pytest.approx(np.polyfit(row["values"], row["bytes"], 1)[0], abs=0.1)
    assert row["bytes_a_step"] == pytest.approx(50_000, rel=0.3) or not where
    assert (": flat, which is up to 20,000" in capsys.readouterr().out) == (where is None)
