"""The scaling benchmark: its fit on known costs, its formulas by hand, and every axis by a real command line."""

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_vit import config, recipe
from ssl_vit.data import manifest
from ssl_vit.data.samples import Samples
from ssl_vit.exits import DATA, USAGE, Refusal
from ssl_vit.train import loop
from tests.conftest import TINY

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

exponents: Any = import_module("exponents")
scaling: Any = import_module("benchmark_scaling")
data: Any = import_module("benchmark_scaling_data")
memory: Any = import_module("benchmark_scaling_memory")
processes: Any = import_module("benchmark_scaling_processes")
process = pytest.mark.process  # one axis is measured by default: the rest of what they share is
SMALL = [*TINY, "rounds=2", "round_steps=1", "tracker=none"]
WIDTH, DEPTH, PATCH, IMAGE, BATCH = 16, 2, 4, 16, 8  # of TINY


def measured(folder: Path, *words: str) -> list[dict[str, Any]]:
    assert import_module("benchmark").main(["scaling", *SMALL, f"output={folder}", *words]) == 0
    return json.loads((folder / "scaling.json").read_text())["rows"]


def options(*words: str) -> Any:
    return config.parse(scaling.Options, [*SMALL, *words], recipe.FOLDER)


@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=6, unique=True), st.floats(-3, 3), st.floats(1e-6, 1e3))
def test_the_exponent_of_a_power_is_found(values: list[int], power: float, factor: float):
    assert exponents.exponent(values, [factor * value**power for value in values]) == pytest.approx(power, abs=1e-6)


def test_a_line_has_numpys_slope_and_standard_error_and_a_row_a_fit_a_round():
    """Rounds in which the cost grows with power 2, 1 and 4; by the formula it is 3."""
    x, y = [0, 1, 2, 4, 7], [1.0, 2.5, 2.0, 5.5, 7.0]
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert exponents.line(x, y) == pytest.approx((coefficients[0], np.sqrt(covariance[0, 0])))
    assert exponents.line([1, 3], [2, 8]) == (3.0, None)
    assert exponents.exponent([5], [1.0]) is None
    seconds = {value: [value**2.0, value**1.0, value**4.0] for value in (2, 4, 8)} | {16: [1.0, 1.0, 1.0]}
    row = exponents.growth("size", "x", seconds, lambda v: 7.0 * v**3, lambda v: 10 * v, {16: "too large", 32: "gone"})
    assert (row["exponent"], row["exponent_spread"], row["formula"]) == (2, [1, 4], 3)
    assert (row["ratio"], row["ratio_spread"]) == (0.25, [round(4 / 64, 3), 4])  # from 2 to 8: 16 times, not 64
    assert row["values"] == [2, 4, 8, 16]
    bent = {2: [3.0], 4: [3.0], 8: [24.0]}
    ends = exponents.growth("size", "x", bent, lambda v: v + 8.0)
    assert (ends["last_two"], ends["last_two_formula"]) == (3, round(float(np.log2(16 / 12)), 3))
    assert row["milliseconds"] == [4e3, 16e3, 64e3, 1e3]  # medians
    assert row["images_per_second"] == [5, 2.5, 1.25, 160]
    assert row["left_out"] == {"16": "too large", "32": "gone"}
    row = exponents.growth("size", "x", {2: [1.0, 2.0]}, lambda v: v)
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


@pytest.mark.parametrize("axis", ["image", *(pytest.param(axis, marks=process) for axis in AXES if axis != "image")])
def test_a_formula_is_the_one_by_hand(axis: str, tmp_path: Path):
    (row,), values = measured(tmp_path, f"axes={axis}", words_of(axis)), AXES[axis]
    costs = [flops() * value if axis == "batch" else flops(**{axis: value}) * BATCH for value in values]
    assert row["values"] == list(values)
    assert row["formula"] == pytest.approx(np.polyfit(np.log(values), np.log(costs), 1)[0], abs=1e-3)
    assert row["exponent_spread"][0] <= row["exponent"] <= row["exponent_spread"][1]
    for number, cost in enumerate(costs):
        images = values[number] if axis == "batch" else BATCH
        seconds = row["milliseconds"][number] / 1e3
        assert row["images_per_second"][number] == pytest.approx(images / seconds, rel=1e-2)
        assert row["tflops"][number] == pytest.approx(cost / seconds / 1e12, rel=1e-2, abs=1e-4)


def test_the_formulas_powers_are_those_of_a_large_model():
    """Of a ViT of width 1024 and many blocks: as its linear layers, with a little of the attention's square."""
    shape = ("encoder.width=1024", "encoder.heads=16", "encoder.depth=24", "encoder.mlp=4096", "encoder.patch=16")
    large = scaling.resolved(options(*shape, "data.image_size=224"))
    expected = {"image": (2, 2.3), "patch": (-2.3, -2), "depth": (0.98, 1), "width": (1.7, 2)}
    values = {"image": (128, 256), "patch": (14, 28), "depth": (12, 24, 48), "width": (512, 1024)}
    for axis, (least, most) in expected.items():
        costs = []
        for value in values[axis]:
            with torch.device("meta"):
                costs.append(recipe.flops(recipe.build(scaling.resolved(scaling.changed(large, axis, value)), 1)))
        assert least < exponents.exponent(values[axis], costs) < most, axis


def test_every_step_is_that_of_its_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is built, and what it is given; the race is one of a clock that knows each cost."""
    seen: dict[tuple[int, ...], tuple[int, ...]] = {}

    def ours(made: Any, model: Any, batch: Any, output: Path) -> Callable[[], object]:
        assert tuple(batch["image"].shape[2:]) == model.encoder.config.image_hw
        depth, heads = len(model.encoder.blocks), model.encoder.blocks[0].attn.heads
        hidden = model.encoder.blocks[0].mlp.fc1.out_features
        grid, width = model.encoder.grid[0], model.encoder.width
        seen[(made.batch, grid, depth, width)] = (len(batch["image"]), model.encoder.stride, heads, hidden)
        return lambda: None

    monkeypatch.setattr(scaling.contestants, "ours", ours)
    monkeypatch.setattr(scaling, "race", lambda steps, *_: {who: [float(who) ** 1.5] * 2 for who in steps})
    rows = measured(tmp_path, f"axes={','.join(AXES)}", *map(words_of, AXES))
    assert [row["exponent"] for row in rows] == [1.5] * 5
    wanted = {"image": lambda v: (8, v // 4, 2, 16), "patch": lambda v: (8, 16 // v, 2, 16)}
    wanted |= {"depth": lambda v: (8, 4, v, 16), "width": lambda v: (8, 4, 2, v), "batch": lambda v: (v, 4, 2, 16)}
    assert set(seen) == {wanted[axis](value) for axis, values in AXES.items() for value in values}
    assert [seen[8, 4, 2, width][2:] for width in AXES["width"]] == [(2, 64), (4, 128), (8, 256)]
    assert all(images == batch for (batch, *_), (images, *_) in seen.items())
    assert {seen[8, 16 // patch, 2, 16][1] for patch in (2, 8)} == {2, 8}


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    def ours(made: Any, *_: Any) -> Callable[[], object]:
        if made.batch == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(scaling.contestants, "ours", ours)
    (row,) = measured(tmp_path, "axes=batch", "batches=8,16,32")
    assert (row["values"], row["formula"]) == ([8, 16], 1)
    assert row["left_out"] == {"32": "does not fit into the memory"}
    assert "batch 32: does not fit into the memory" in capsys.readouterr().out


BIT = ["axes=width", "encoder.kind=bit", "head.kind=classifier", "data.image_size=32"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["axes=image", "images=16,30"], "cannot be cut into patches of 4"),
        (["axes=depth", "depths=0"], "depths"),
        (["axes=jump"], "axes"),
        (BIT, "width is no number of encoder.kind=bit"),
        (["WORLD_SIZE=2"], "starts its processes itself"),  # of a launcher
    ],
)
def test_bad_values_are_refused_before_anything_is_measured(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "built", None)
    if words == ["WORLD_SIZE=2"]:
        monkeypatch.setenv("WORLD_SIZE", "2")
        words = []
    tiny = [word for word in SMALL if words != BIT or not word.startswith("encoder.")]
    with pytest.raises(Refusal, match=said) as end:
        import_module("benchmark").main(["scaling", *tiny, *words])
    assert end.value.code == USAGE


@pytest.mark.parametrize(("samples", "shards"), [(5, 1), (640, 3), (2000, 50)])
def test_a_set_of_any_size_is_made_and_can_be_read(samples: int, shards: int, tmp_path: Path):
    made = manifest.load(data.enlarged(data.pictures(tmp_path, (16, 24)), tmp_path / "set", samples, shards))
    made.check()
    assert (made.samples, len(made.shards)) == (samples // shards * shards, shards)
    stream = data.stream_of(options("data.image_size=16,24"), made, 0)
    every, faults = Samples(made, stream.config, 0, training=False).batch([(0, i) for i in range(made.samples)])
    assert not faults
    each = samples // shards
    different = {image.numpy().tobytes() for image in every["image"]}
    assert len(different) == min(each, data.PICTURES)
    assert made.index(0)["label"].tolist() == [0] * each


@process
@pytest.mark.parametrize(("axis", "key"), [("samples", "samples=1000,4000"), ("shards", "shards=1,20")])
def test_the_axes_of_data(axis: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "PLANS", 5)
    with patch.object(data, "enlarged", wraps=data.enlarged) as enlarged:
        start, plan, batch = measured(tmp_path, f"axes={axis}", key)
    sizes = [call.args[2:] for call in enlarged.call_args_list]
    assert sizes == ([(1000, 1), (4000, 4)] if axis == "samples" else [(2000, 1), (2000, 20)])
    values = [int(value) for value in key.partition("=")[2].split(",")]
    assert all(row["axis"] == axis and row["values"] == values for row in (start, plan, batch))
    assert (start["formula"], plan["formula"], batch["formula"]) == (None, 0, 0)
    assert all(row["exponent"] is not None for row in (start, plan, batch))
    assert (start["images_per_second"], len(batch["images_per_second"])) == (None, 2)


def test_a_set_that_cannot_be_read_is_no_measurement(tmp_path: Path):
    folder = data.enlarged(data.pictures(tmp_path, (16, 16)), tmp_path / "set", 100, 2)
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refusal, match="too short") as end:
        data.first(options(), folder)
    assert end.value.code == DATA


@process
def test_workers_are_fitted_up_to_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path):
    monkeypatch.setattr(data, "OPENING", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    loaded: list[int] = []
    real = data.loading

    def loading(made: Any, given: Any, count: int) -> float:
        loaded.append(count)
        assert given.folder == shards / "train"
        seconds = real(made, given, count)
        assert seconds > 0
        return 0.6 / (count or 0.5)

    monkeypatch.setattr(data, "loading", loading)
    (row,) = measured(tmp_path, "axes=workers", "workers=0,1,2,3", f"data.train={shards}/train")
    assert loaded == [0, 1, 2, 3] * 2
    assert row["left_out"] == {"3": "more than the 2 cores", "0": "in the training's own process"}
    assert (row["values"], row["cores"]) == ([0, 1, 2, 3], 2)
    assert (row["exponent"], row["formula"], row["ratio"]) == (-1, -1, 1)
    assert row["images_per_second"] == pytest.approx([BATCH / 1.2, BATCH / 0.6, BATCH / 0.3, BATCH / 0.2], rel=1e-2)


@process
@pytest.mark.ranks
def test_two_processes_by_a_real_launch(tmp_path: Path):
    (row,) = measured(tmp_path, "axes=processes", "processes=2")
    assert (row["values"], row["exponent"], row["efficiency"]) == ([2], None, [1])
    assert row["images_per_second"][0] == pytest.approx(2 * BATCH / row["milliseconds"][0] * 1e3, rel=1e-2)


def test_processes_are_launched_with_as_many_images_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command of a launch, by a launcher that answers at once; twice the time where there are two processes."""
    asked: dict[int, Any] = {}

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        count = int(command[command.index("--nproc_per_node") + 1])
        made = config.parse(processes.engines.Options, [f"recipe={command[-2]}"], recipe.FOLDER)
        recipe.resolve(made)
        asked[count] = made.batch, made.encoder.width, made.encoder.image_hw, made.rounds, env["OMP_NUM_THREADS"]
        Path(command[-1]).write_text(json.dumps([0.5 * count] * made.rounds))
        return processes.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(processes.subprocess, "run", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    (row,) = measured(tmp_path, "axes=processes", "processes=1,2,4")
    assert asked == {count: (BATCH * count, WIDTH, (IMAGE, IMAGE), 2, "1") for count in (1, 2, 4)}
    assert (row["exponent"], row["formula"], row["efficiency"]) == (1, 0, [1, 0.5, 0.25])
    assert row["left_out"] == {"4": "more than the 2 cores"}
    assert row["images_per_second"] == [BATCH / 0.5] * 3


def test_a_launch_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failed = processes.subprocess.CompletedProcess([], 1, stderr="what went wrong")
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Refusal, match="a launch of 1 ended with 1"):
        measured(tmp_path, "axes=processes", "processes=1")


@process
def test_memory_of_a_training_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture):
    row, step = measured(tmp_path, "axes=batch,time", "batches=8", "steps_over_time=80", "flat_below=20000")
    assert (row["axis"], step["axis"]) == ("time", "batch")  # before others, whose freed memory would hide growth
    assert row["values"] == list(range(40, 80, 2))
    assert row["flat"] is True
    assert len(row["bytes"]) == 20
    assert row["bytes_a_step"] == pytest.approx(np.polyfit(row["values"], row["bytes"], 1)[0], abs=0.1)
    assert "flat, which is up to 20,000" in capsys.readouterr().out


@process
@pytest.mark.parametrize("where", ["the loop", "a worker"])
def test_memory_that_grows_is_seen(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """50 kB a step that nobody gives back."""
    kept: list[bytes] = []
    place, name = (loop, "update") if where == "the loop" else (Samples, "batch")
    real = getattr(place, name)

    def leaks(*given: Any, **named: Any) -> Any:
        if where == "the loop" or torch.utils.data.get_worker_info() is not None:
            kept.append(os.urandom(50_000))
        return real(*given, **named)

    monkeypatch.setattr(place, name, leaks)
    (row,) = measured(tmp_path, "axes=time", "steps_over_time=80", "flat_below=20000")
    assert row["flat"] is False
    assert row["bytes_a_step"] == pytest.approx(50_000, rel=0.3)
