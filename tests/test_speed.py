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
from ssl_vit.data.dataset import Samples
from ssl_vit.encoders.timm_encoder import Bit
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import DATA, USAGE, Refusal
from ssl_vit.estimate import cost
from ssl_vit.model import Model
from ssl_vit.recipes import Pretrain
from ssl_vit.train import loop
from tests.conftest import TINY
from tools.benchmarks import __main__ as benchmark
from tools.benchmarks import attention, contestants, inference, memory, racing, scaling

Rows = list[dict[str, Any]]
Patch = pytest.MonkeyPatch
Screen = pytest.CaptureFixture[str]
process = pytest.mark.process  # a variant of what runs by default

STEP = ["recipe=mpp_demo", "data.image_size=16", "encoder.patch=4", "encoder.width=32", "encoder.depth=2", "batch=4"]
STEP += ["encoder.heads=2", "encoder.mlp=64"]
MEMORY = ["recipe=mpp_vit_b16", "encoder.width=128", "encoder.depth=4", "encoder.patch=4", "data.image_size=16"]
SCALING = [*TINY, "rounds=2", "round_steps=1", "tracker=none"]
WIDTH, DEPTH, PATCH, IMAGE, BATCH = 16, 2, 4, 16, 8  # of TINY


def run(folder: Path, name: str, *keys: str) -> Rows:
    """The rows that a benchmark stored."""
    assert benchmark.main([name, f"output={folder}", *keys]) == 0
    return json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)["rows"]  # NaN is no JSON


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("attention", ["ways=flush"], "ways=flush: there are flash, efficient"),
        ("attention", ["tokens=0"], "above 0"),
        ("memory", [*MEMORY, "batches=0,8"], "above 0"),
        ("memory", [*MEMORY, "who=nobody"], "who=nobody: there are ssl_vit; timm"),
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
    monkeypatch.setattr(scaling, "built", None)
    if keys[0] == "WORLD_SIZE=2":
        monkeypatch.setenv(*keys.pop(0).split("="))
    with pytest.raises(Refusal, match=said) as end:
        run(tmp_path, name, *keys)
    assert end.value.code == USAGE


# turns, ratios and tables, by a clock that the test holds


def test_contestants_take_turns_each_begins_a_round_and_speed_is_a_median_of_ratios_within_rounds():
    takes, order = {"a": 1.0, "b": 2.0, "c": 4.0}, []
    turns = {who: partial(order.append, who) for who in takes}
    seconds = racing.race(turns, 3, steps=2, warm_up=1, clock=lambda: sum(takes[who] for who in order))
    assert seconds == {who: [each] * 3 for who, each in takes.items()}
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}
    row = racing.speed(seconds, "a", 10, "b")
    assert row == {"images_per_second": 5.0, "milliseconds": 2000.0, "ratio": 1.0, "ratio_spread": [0.5, 2.0]}
    assert racing.speed(seconds, "b", 10, None)["ratio"] is None
    assert racing.between(row["ratio_spread"]) == "0.50-2.00"
    lines = racing.grid(["who", "speed"], [["ours", "10.5"], ["theirs alone", "9"]]).splitlines()
    assert lines == ["who             speed", "ours             10.5", "theirs alone        9"]


# the step and the loop


def built() -> tuple[recipes.Recipe, Model, dict[str, Tensor]]:
    made, tensors, source = recipes.resolve(config.parse(Pretrain, STEP, recipes.FOLDER))
    model = setup.build(made, 1000, tensors, source)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)
    return made, model, racing.images(made.batch, made.encoder, torch.device("cpu"))


def test_a_step_is_measured_beside_rivals_levers_and_bare_products(tmp_path: Path, capsys: Screen):
    rows = {row["who"]: row for row in run(tmp_path, "step", *STEP, "levers=true", "rounds=2", "round_steps=1")}
    assert rows.keys() >= {"ssl_vit", "timm", "timm, fused AdamW", "Hugging Face", "products", "one thread"}
    assert rows["ssl_vit"]["first_loss"] == pytest.approx(rows["timm"]["first_loss"], rel=1e-6)
    assert rows["ssl_vit"]["first_loss"] != pytest.approx(math.log(512), abs=1e-3)  # else a zero head
    assert rows["Hugging Face"]["tokens_off"] < 1e-5
    assert {row["kind"] for row in rows.values()} == {"step", "lever", "products"}
    for row in rows.values():
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        assert row["tflops"] > 0
    assert rows["ssl_vit"]["ratio"] == rows["products"]["of_products"]["products"] == 1
    shown = capsys.readouterr().out
    assert "ViT-32x2x2x64/4 16x16 batch 4 fp32 cpu" in shown
    assert all(who in shown for who in rows)


def test_without_a_lever_a_step_is_the_same_step(tmp_path: Path):
    made, model, batch = built()
    step: Any = contestants.ours(made, model, batch, tmp_path)
    wanted = [float(step()[0]) for _ in range(3)]
    assert wanted[0] != wanted[1] != wanted[2]
    steps: dict[str, Any] = contestants.without_levers(made, built()[1], batch, tmp_path)
    assert len(steps) >= 7
    for who, build in steps.items():
        step = build()
        answers = [step() for _ in range(3)]
        found = [answer if isinstance(answer, float) else float(answer[0]) for answer in answers]
        assert found == pytest.approx(wanted, rel=1e-4), who


def test_rivals_take_the_same_steps():
    """timm's: the same losses as ours, step by step; both in the plain loop, where AdamW decays alike."""
    made, model, batch = built()
    theirs: dict[str, Any] = contestants.rivals(made, model, batch)
    assert theirs.keys() == {"timm", "timm, fused AdamW", "Hugging Face", "Hugging Face, fused AdamW"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.optim.lr)
    autocast = contestants.autocast(made, torch.device("cpu"))
    ours: Any = contestants.simple(contestants.Loss(model), repeat(batch), optimizer, autocast)
    slow, fast = theirs["timm"](), theirs["timm, fused AdamW"]()
    for _ in range(3):
        wanted = float(ours())
        assert slow() == pytest.approx(wanted, rel=1e-5)
        assert float(fast()) == pytest.approx(wanted, rel=1e-5)


def test_the_products_are_the_steps():
    """Their FLOPs are the formula's, but for the gradient of the pixels, which only the products compute."""
    made, model, _ = built()
    counted = sum(6 * rows * given * out * count for rows, given, out, count in contestants.linear_shapes(made))
    heads, tokens, width = contestants.attention_shape(made)
    counted += made.encoder.numbers[1] * 12 * heads * tokens**2 * width  # type: ignore[union-attr]
    pixels = 2 * made.batch * 16 * 48 * 32
    assert counted - pixels == made.batch * setup.flops(model)
    ways = contestants.matrix_products(made, torch.device("cpu"), half=False)
    with patch.object(torch, "mm", wraps=torch.mm) as mm:
        ways["products"]()
    assert mm.call_count == 3 * sum(count for *_, count in contestants.linear_shapes(made))


def test_the_loop_is_measured_beside_the_bare_step_and_from_shards(shards: Path, tmp_path: Path):
    words = [*STEP, f"data.train={shards}/train", "data.workers=0", "rounds=2", "round_steps=2"]
    rows = run(tmp_path, "loop", *words)
    whos = [("bare step", "bare step"), ("fit() on tensors", "bare step"), ("fit() from shards", "fit() on tensors")]
    assert [(row["who"], row["against"]) for row in rows] == whos
    assert rows[0]["ratio"] == 1
    assert all(row["images_per_second"] > 0 for row in rows)


@pytest.mark.long
def test_the_gpu_preset_tries_itself_without_one(tmp_path: Path, capsys: Screen):
    rows = run(tmp_path, "step", "preset=gpu", "rounds=1", "round_steps=1")
    assert {row["benchmark"] for row in rows} == {"product", "attention", "step", "loop", "memory"}
    assert "preset=gpu without a GPU: the same at a small size" in capsys.readouterr().out


# attention


def attend(folder: Path, tokens: str, ways: str) -> Rows:
    sizes = ["batch=18", "heads=2", "head_width=8", "rounds=1", "round_steps=1"]
    return run(folder, "attention", *sizes, f"tokens={tokens}", f"ways={ways}")


def test_every_way_to_attend_is_judged_and_one_that_cannot_says_so(tmp_path: Path, capsys: Screen):
    ways = ("flash", "efficient", "math", "written out")
    rows = attend(tmp_path, "5,17", ",".join(ways))
    table = capsys.readouterr().out
    assert [(row["tokens"], row["who"]) for row in rows] == [(tokens, way) for tokens in (5, 17) for way in ways]
    for some in (rows[:4], rows[4:]):
        refused = some.pop(1)  # a CPU has no such kernel
        assert "scaled_dot_product_attention" in refused["refused"]
        assert refused["refused"] in table
        assert refused["images_per_second"] is None
        for row in some:
            assert row["finite"]
            assert 0 < row["output_error"] < 1e-6
            assert 0 < row["gradient_error"] < 1e-5
            flops = 12 * 18 * 2 * row["tokens"] ** 2 * 8
            assert row["tflops"] * row["milliseconds"] * 1e9 == pytest.approx(flops, rel=1e-3)
        assert [row for row in some if row["fastest"]] == [min(some, key=lambda row: row["milliseconds"])]
    assert table.count("fastest") == 2


@pytest.mark.parametrize("after", [0, 5])  # from the first, or after a check, three steps of warm-up and one of a round
def test_gradients_that_are_not_finite_never_win(after: int, tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    """Poisoned: right forward; its gradient to q is NaN from a number of calls on, as cuDNN's was."""
    real, calls = attention.race, itertools.count()

    def poisoned_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if next(calls) >= after:
            q.register_hook(lambda gradient: gradient * torch.nan)
        return attention.written(q, k, v)

    ways = {"flash": poisoned_ones, "math": lambda q, k, v: (q @ k.transpose(2, 3)).softmax(3) @ v}  # without a scale
    monkeypatch.setattr(attention, "pinned", ways.__getitem__)
    monkeypatch.setattr(attention, "race", lambda *given: real(*given) | {"flash": [1e-6]})  # however fast they are
    poisoned, wrong = attend(tmp_path, "17", "flash,math")
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
    for there in range(0, 270, 7):
        asked: list[int] = []

        def fits(size: int, there: int = there, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= there

        low, high = memory.largest(fits, memory.doubled(4, most), granularity)
        assert len(asked) == len(set(asked)) < 20
        if high is None:
            assert low == most <= there
        else:
            assert low <= there < high
            assert {low, high} <= {0, *asked}
            assert not [size for size in range(low + 1, high) if size % granularity == 0]  # nothing is left to try


def test_doubling_ends_at_the_most_and_the_slope_is_of_batches_far_from_each_other():
    doubled = {(8, 64): [8, 16, 32, 64], (8, 50): [8, 16, 32, 50], (50, 50): [50], (128, 100): [100], (128, 64): []}
    assert {ends: list(memory.doubled(*ends)) for ends in doubled} == doubled  # 100 is tried after 64
    peaks = {8: 18 * 10**6, 16: 26 * 10**6, 20: 10**9, 24: 34 * 10**6, 32: 58 * 10**6, 48: None}
    assert memory.slope(peaks) == 2.0  # from 16 to 32
    assert memory.slope({8: 1, 12: 2, 16: None}) is None


@process
def test_memory_is_measured_in_processes_that_a_limit_holds(tmp_path: Path, capsys: Screen):
    sizes = ["batches=128,1024", "granularity=512", "limit=0.5", "who=ssl_vit"]
    ours, formula = run(tmp_path, "memory", *MEMORY, *sizes)
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


def test_on_a_gpu_running_out_of_memory_is_an_answer_and_no_other_error(tmp_path: Path, monkeypatch: Patch):
    """A GPU of 80 GiB in which 700 images fit, a GiB is taken besides, and nothing is computed."""
    fractions, released, trained = Mock(), Mock(), [0]

    def train(made: Any, who: str, batch: int, forget_peak: Any) -> None:
        if batch > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        forget_peak()
        trained.append(batch)

    ours: dict[str, Any] = {"device": lambda: torch.device("cpu"), "has_compiler": lambda: True}
    ours |= {"train": train, "release": released}
    cuda: dict[str, Any] = {"set_per_process_memory_fraction": fractions, "max_memory_reserved": lambda: 0}
    cuda |= {"mem_get_info": lambda: (79 * 2**30, 80 * 2**30), "reset_peak_memory_stats": lambda: None}
    cuda |= {"max_memory_allocated": lambda: 2**30 + trained[-1] * 10**7}
    monkeypatch.setattr(memory.runtime, "on_gpu", lambda: True)
    for place, fakes in ((memory, ours), (torch.cuda, cuda)):
        for name, fake in fakes.items():
            monkeypatch.setattr(place, name, fake)
    rows = run(tmp_path, "memory", *MEMORY, "who=ssl_vit,timm")
    assert [row["who"] for row in rows] == ["ssl_vit", "timm", "timm, fused AdamW", "timm, compiled", "formula"]
    for row in rows[:2]:
        assert list(row["peak_gib"]) == ["128", "256", "512", "640", "704", "768", "1024"]
        assert (row["largest_batch"], row["fails_at"], row["mb_an_image"]) == (640, 704, 10.0)
    assert "bf16, 80.00 GiB" in rows[0]["case"]
    assert {call.args for call in fractions.call_args_list} == {(1.0,)}
    assert released.call_count == 4 * 7  # every time
    monkeypatch.setattr(memory, "train", Mock(side_effect=RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, "memory", *MEMORY)
    for said in ("std::bad_alloc", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"):
        assert memory.lacks_memory(RuntimeError(said))


# inference


@process
def test_encoders_run_at_every_size_beside_timms(tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    monkeypatch.setattr(inference, "race", lambda steps, *_, **__: {who: [2.0] for who in steps if len(steps[who]())})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    keys = ["encoders=Ti/16,R50x1", "sizes=16,40", "most=2", "rounds=1", "round_steps=1"]
    rows = run(tmp_path, "inference", *keys)
    cases = {"ViT-Ti/16 at 16 x 16": 16, "ViT-Ti/16 at 32 x 32": 40, "R50x1 at 16 x 16": 16, "R50x1 at 40 x 40": 40}
    assert [(row["case"], row["size"], row["who"]) for row in rows] == [
        (case, size, who) for case, size in cases.items() for who in ("ssl_vit", "timm")[: 1 + case.startswith("ViT")]
    ]
    configs = [Vit(size="Ti", image=16)] * 2 + [Vit(size="Ti", image=32)] * 2 + [Bit(image=16), Bit(image=40)]
    for row, made in zip(rows, configs, strict=True):
        expected = 2 * cost.encoder_macs(made) * row["images_per_second"] / 1e12
        assert row["tflops"] == pytest.approx(expected, rel=1e-3)
        assert (row["tried"], row["batch"]) == ({"1": 0.5, "2": 1.0}, 2)  # images in two seconds
        assert (row["images_per_second"], row["images_per_second_a_core"]) == (1.0, 0.25)
        assert (row["largest_batch"], row["fails_at"]) == (2, None)
        assert (row["ratio"] is None) == made.title.startswith("R50")
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
def test_batches_double_while_that_pays(fits: int, most: int, last: int, monkeypatch: Patch):
    """Where all fit, two are tried beyond the best."""
    monkeypatch.setattr(inference, "race", lambda steps, *_, **__: {who: [step()] for who, step in steps.items()})
    rates = inference.sweep(cast(Any, Passes)(fits, OOM), most, steps=1)
    assert rates == {batch: min(batch, 8) for batch in (1, 2, 4, 8, 16, 32) if batch <= last}
    with pytest.raises(RuntimeError, match="broken"):
        inference.sweep(cast(Any, Passes)(0, RuntimeError("broken")), most, steps=1)


def test_the_largest_batch_says_why_the_next_fails(monkeypatch: Patch):
    monkeypatch.setattr(inference, "release", lambda: None)
    for fits, error, found in (
        (40, OOM, (32, 48, "memory")),
        (50, RuntimeError("integer out of range\nat line 1"), (48, 64, "integer out of range")),
        (0, OOM, (0, 1, "memory")),
        (500, OOM, (100, None, None)),
    ):
        monkeypatch.setattr(inference, "Forward", lambda *_, given=(fits, error): Passes(*given))
        row = inference.capacity(Vit(), inference.Options(granularity=16), 100)
        assert (row["largest_batch"], row["fails_at"], row["fails_because"]) == found


def test_an_encoder_for_which_memory_is_too_small_is_a_row_too(tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    monkeypatch.setattr(inference, "has_timm", lambda: False)
    monkeypatch.setattr(inference.Forward, "__call__", Mock(side_effect=OOM))
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
    keys = [*MEMORY, "batches=512,2048", "most=2048", "who=ssl_vit", "compile=false"]
    ours, formula = run(tmp_path, "memory", *keys)
    assert ours["largest_batch"] == 2048
    assert 0.8 * formula["mb_an_image"] < ours["mb_an_image"] < 1.5 * formula["mb_an_image"]
    keys = ["encoders=Ti/16,R50x1", "sizes=64", "most=64", "rounds=1"]
    assert all(row["largest_batch"] == 64 for row in run(tmp_path, "inference", *keys))


# scaling


def scaled(folder: Path, *words: str) -> Rows:
    return run(folder, "scaling", *SCALING, *words)


def options(*words: str) -> Any:
    return config.parse(scaling.Options, [*SCALING, *words], recipes.FOLDER)


def test_a_line_has_numpys_slope_and_standard_error_and_a_row_a_fit_a_round():
    """Rounds in which the cost grows with power 2, 1 and 4; by the formula it is 3."""
    x, y = [0, 1, 2, 4, 7], [1.0, 2.5, 2.0, 5.5, 7.0]
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert scaling.fit_line(x, y) == pytest.approx((coefficients[0], np.sqrt(covariance[0, 0])))
    assert scaling.fit_line([1, 3], [2, 8]) == (3.0, None)
    assert scaling.exponent([5], [1.0]) is None
    seconds = {value: [value**2.0, value**1.0, value**4.0] for value in (2, 4, 8)} | {16: [1.0, 1.0, 1.0]}
    row = scaling.growth("size", "x", seconds, lambda v: 7.0 * v**3, lambda v: 10 * v, {16: "too large", 32: "gone"})
    assert (row["exponent"], row["exponent_spread"], row["formula"]) == (2, [1, 4], 3)
    assert (row["ratio"], row["ratio_spread"]) == (0.25, [round(4 / 64, 3), 4])  # from 2 to 8: 16 times, not 64
    assert row["values"] == [2, 4, 8, 16]
    assert row["milliseconds"] == [4e3, 16e3, 64e3, 1e3]  # medians
    assert row["images_per_second"] == [5, 2.5, 1.25, 160]
    assert row["left_out"] == {"16": "too large", "32": "gone"}
    ends = scaling.growth("size", "x", {2: [3.0], 4: [3.0], 8: [24.0]}, lambda v: v + 8.0)
    assert (ends["last_two"], ends["last_two_formula"]) == (3, round(float(np.log2(16 / 12)), 3))
    row = scaling.growth("size", "x", {2: [1.0, 2.0]}, lambda v: v)
    assert (row["exponent"], row["formula"], row["ratio"], row["milliseconds"]) == (None, None, None, [1500])


def flops(image: int = IMAGE, patch: int = PATCH, depth: int = DEPTH, width: int = WIDTH) -> int:
    """Of an image by hand, 2 a product forward and 4 back, but for the gradient of pixels.

    Embedding; blocks with an MLP of 4 D on T = 1 + N tokens; the head on half of N.
    """
    patches = (image // patch) ** 2
    tokens = patches + 1
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    return 4 * patches * 3 * patch**2 * width + 6 * depth * block + 6 * (patches // 2) * width * 512


AXES = {"image": (16, 32, 48), "patch": (8, 4, 2), "depth": (1, 2, 5), "width": (16, 32, 64), "batch": (1, 4, 8)}


def words_of(axis: str) -> str:
    return f"{scaling.STEPS[axis]}={','.join(map(str, AXES[axis]))}"


def check_formula(row: dict[str, Any], axis: str) -> None:
    """The formula and the speeds of an axis are those by hand."""
    values = AXES[axis]
    costs = [flops() * value if axis == "batch" else flops(**{axis: value}) * BATCH for value in values]
    assert (row["axis"], row["values"]) == (axis, list(values))
    assert row["formula"] == pytest.approx(np.polyfit(np.log(values), np.log(costs), 1)[0], abs=1e-3)
    assert row["exponent_spread"][0] <= row["exponent"] <= row["exponent_spread"][1]
    for number, wanted in enumerate(costs):
        images = values[number] if axis == "batch" else BATCH
        seconds = row["milliseconds"][number] / 1e3
        assert row["images_per_second"][number] == pytest.approx(images / seconds, rel=1e-2)
        assert row["tflops"][number] == pytest.approx(wanted / seconds / 1e12, rel=1e-2, abs=1e-4)


def test_every_step_is_that_of_its_value(monkeypatch: Patch, tmp_path: Path):
    """Of real steps of one axis; of all what is built and given, in a race of a clock that knows each cost."""
    (row,) = scaled(tmp_path, "axes=image", words_of("image"))
    check_formula(row, "image")
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}

    def ours(made: Any, model: Any, batch: Any, output: Path) -> Callable[[], object]:
        assert tuple(batch["image"].shape[2:]) == model.encoder.config.image_hw
        depth, heads = len(model.encoder.blocks), model.encoder.blocks[0].attn.heads
        hidden = model.encoder.blocks[0].mlp.fc1.out_features
        grid, width = model.encoder.grid[0], model.encoder.width
        seen[(made.batch, grid, depth, width)] = (len(batch["image"]), model.encoder.stride, heads, hidden)
        return lambda: None

    monkeypatch.setattr(scaling.contestants, "ours", ours)
    monkeypatch.setattr(scaling, "race", lambda steps, *_: {who: [1e-4 * float(who) ** 1.5] * 2 for who in steps})
    rows = scaled(tmp_path, f"axes={','.join(AXES)}", *map(words_of, AXES))
    assert [row["exponent"] for row in rows] == [1.5] * 5
    for row, axis in zip(rows, AXES, strict=True):
        check_formula(row, axis)
    wanted = {"image": lambda v: (8, v // 4, 2, 16), "patch": lambda v: (8, 16 // v, 2, 16)}
    wanted |= {"depth": lambda v: (8, 4, v, 16), "width": lambda v: (8, 4, 2, v), "batch": lambda v: (v, 4, 2, 16)}
    assert set(seen) == {wanted[axis](value) for axis, values in AXES.items() for value in values}
    assert [seen[8, 4, 2, width][2:] for width in AXES["width"]] == [(2, 64), (4, 128), (8, 256)]
    assert all(images == batch for (batch, *_), (images, *_) in seen.items())
    assert {seen[8, 16 // patch, 2, 16][1] for patch in (2, 8)} == {2, 8}


def test_what_does_not_fit_is_left_out(monkeypatch: Patch, tmp_path: Path, capsys: Screen):
    def ours(made: Any, *_: Any) -> Callable[[], object]:
        if made.batch == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(scaling.contestants, "ours", ours)
    (row,) = scaled(tmp_path, "axes=batch", "batches=8,16,32")
    assert (row["values"], row["formula"]) == ([8, 16], 1)
    assert row["left_out"] == {"32": "does not fit into the memory"}
    assert "batch 32: does not fit into the memory" in capsys.readouterr().out


@pytest.mark.parametrize(("samples", "shards"), [(5, 1), (640, 3), (2000, 50)])
def test_a_set_of_any_size_is_made_and_can_be_read(samples: int, shards: int, tmp_path: Path):
    made = manifest.load(scaling.enlarged(scaling.pictures(tmp_path, (16, 24)), tmp_path / "set", samples, shards))
    made.check()
    assert (made.samples, len(made.shards)) == (samples // shards * shards, shards)
    stream = scaling.stream_of(options("data.image_size=16,24"), made, 0)
    every, faults = Samples(made, stream.config, 0, training=False).batch([(0, i) for i in range(made.samples)])
    assert not faults
    each = samples // shards
    assert len({image.numpy().tobytes() for image in every["image"]}) == min(each, scaling.PICTURES)  # all that differ
    assert made.index(0)["label"].tolist() == [0] * each
    cut = tmp_path / "set" / "0.tar"
    cut.write_bytes(cut.read_bytes()[:512])
    with pytest.raises(Refusal, match="too short") as end:  # what cannot be read is no measurement
        scaling.first(options("data.image_size=16,24"), tmp_path / "set")
    assert end.value.code == DATA


@process
@pytest.mark.parametrize(("axis", "key"), [("samples", "samples=1000,4000"), ("shards", "shards=1,20")])
def test_the_axes_of_data(axis: str, key: str, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setattr(scaling, "PLANS", 5)
    with patch.object(scaling, "enlarged", wraps=scaling.enlarged) as enlarged:
        start, _plan, batch = rows = scaled(tmp_path, f"axes={axis}", key)
    sizes = [call.args[2:] for call in enlarged.call_args_list]
    assert sizes == ([(1000, 1), (4000, 4)] if axis == "samples" else [(2000, 1), (2000, 20)])
    values = [int(value) for value in key.partition("=")[2].split(",")]
    assert all(row["axis"] == axis and row["values"] == values for row in rows)
    assert [row["formula"] for row in rows] == [None, 0, 0]
    assert all(row["exponent"] is not None for row in rows)
    assert (start["images_per_second"], len(batch["images_per_second"])) == (None, 2)


@process
def test_workers_are_fitted_up_to_the_cores(tmp_path: Path, monkeypatch: Patch, shards: Path):
    monkeypatch.setattr(scaling, "OPENING", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    loaded: list[int] = []
    real = scaling.loading

    def loading(made: Any, given: Any, count: int) -> float:
        loaded.append(count)
        assert given.folder == shards / "train"
        assert real(made, given, count) > 0
        return 0.6 / (count or 0.5)

    monkeypatch.setattr(scaling, "loading", loading)
    (row,) = scaled(tmp_path, "axes=workers", "workers=0,1,2,3", f"data.train={shards}/train")
    assert loaded == [0, 1, 2, 3] * 2
    assert row["left_out"] == {"3": "more than the 2 cores", "0": "in the training's own process"}
    assert (row["values"], row["cores"]) == ([0, 1, 2, 3], 2)
    assert (row["exponent"], row["formula"], row["ratio"]) == (-1, -1, 1)
    assert row["images_per_second"] == pytest.approx([BATCH / 1.2, BATCH / 0.6, BATCH / 0.3, BATCH / 0.2], rel=1e-2)


@process
@pytest.mark.ranks
def test_two_processes_by_a_real_launch(tmp_path: Path):
    (row,) = scaled(tmp_path, "axes=processes", "processes=2")
    assert (row["values"], row["exponent"], row["efficiency"]) == ([2], None, [1])
    assert row["images_per_second"][0] == pytest.approx(2 * BATCH / row["milliseconds"][0] * 1e3, rel=1e-2)


def test_processes_are_launched_with_as_many_images_each(monkeypatch: Patch, tmp_path: Path):
    """The command of a launch, by a launcher that answers at once, two processes in twice the time; or that fails."""
    asked: dict[int, Any] = {}

    def launch(command: list[str], env: dict[str, str], **_: Any) -> Any:
        count = int(command[command.index("--nproc_per_node") + 1])
        made: Any = config.parse(scaling.engines.Options, [f"recipe={command[-2]}"], recipes.FOLDER)
        recipes.resolve(made)
        asked[count] = made.batch, made.encoder.width, made.encoder.image_hw, made.rounds, env["OMP_NUM_THREADS"]
        Path(command[-1]).write_text(json.dumps([0.5 * count] * made.rounds))
        return scaling.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(scaling.subprocess, "run", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    (row,) = scaled(tmp_path, "axes=processes", "processes=1,2,4")
    assert asked == {count: (BATCH * count, WIDTH, (IMAGE, IMAGE), 2, "1") for count in (1, 2, 4)}
    assert (row["exponent"], row["formula"], row["efficiency"]) == (1, 0, [1, 0.5, 0.25])
    assert row["left_out"] == {"4": "more than the 2 cores"}
    assert row["images_per_second"] == [BATCH / 0.5] * 3
    failed = scaling.subprocess.CompletedProcess([], 1, stderr="what went wrong")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Refusal, match="a launch of 1 ended with 1"):
        scaled(tmp_path, "axes=processes", "processes=1")


@process
@pytest.mark.parametrize("where", [None, "the loop", "a worker"])
def test_memory_of_a_training_is_watched(where: str | None, tmp_path: Path, monkeypatch: Patch, capsys: Screen):
    """Flat, or 50 kB a step that nobody gives back; before other axes, whose freed memory would hide growth."""
    kept: list[bytes] = []
    place, name = (loop, "update") if where == "the loop" else (Samples, "batch")
    real = getattr(place, name)

    def leaks(*given: Any, **named: Any) -> Any:
        if where == "the loop" or torch.utils.data.get_worker_info() is not None:
            kept.append(os.urandom(50_000))
        return real(*given, **named)

    if where:
        monkeypatch.setattr(place, name, leaks)
    row, step = scaled(tmp_path, "axes=batch,time", "batches=8", "steps_over_time=80", "flat_below=20000")
    assert (row["axis"], step["axis"]) == ("time", "batch")
    assert (row["flat"], row["values"], len(row["bytes"])) == (where is None, list(range(40, 80, 2)), 20)
    assert row["bytes_a_step"] == pytest.approx(np.polyfit(row["values"], row["bytes"], 1)[0], abs=0.1)
    assert row["bytes_a_step"] == pytest.approx(50_000, rel=0.3) or not where
    assert (": flat, which is up to 20,000" in capsys.readouterr().out) == (where is None)
