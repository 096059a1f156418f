"""What dry_run foretells, beside what a real step on the CPU holds, what a real run leaves, and figures by hand."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_vit import config, runtime
from ssl_vit.data.loader import ProcessShard
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cluster, cost, run_estimate, trial
from ssl_vit.estimate.cluster import LARGE, SMALL, Job, core_rate, plan_run
from ssl_vit.estimate.render import draw_images, draw_preview
from ssl_vit.estimate.trial import LOOP_OVERHEAD, StepTimer, time_steps
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.heads.visualize import image_grid, split_grid
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.recipes import Finetune, Pretrain, Recipe, resolve_recipe
from ssl_vit.report.format import format_bytes, format_hours
from ssl_vit.runtime import uses_bf16
from ssl_vit.train.hardware import GPUS, Hardware
from tests.conftest import TINY
from tests.train.test_loop import assert_refused, run_training

process = pytest.mark.process
NUM_IMAGES, NUM_CLASSES = 6, 5
H100 = Hardware()
MODEL_ARGS = ["encoder.size=Ti", "encoder.width=64", "encoder.depth=3", "encoder.heads=2", "encoder.patch=8"]
MODEL_ARGS += ["data.image_size=32,64"]


def resolve_args(schema: type[Recipe], *args: str) -> Recipe:
    return resolve_recipe(config.parse(schema, list(args)))[0]


def build_model(recipe: Recipe, classes: int = 1) -> Model:
    encoder = recipe.encoder.build()
    return Model(encoder, recipe.head.build(encoder, classes))


def estimate_memory(
    recipe: Recipe, classes: int = 1, images: int = NUM_IMAGES, device: str = "cpu", bf16: bool = False
) -> Any:
    return run_estimate.memory_by_part(recipe, build_model(recipe, classes), classes, images, device, bf16)


def make_batch(recipe: Recipe, count: int = NUM_IMAGES) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 3, *recipe.data.image_hw), dtype=torch.uint8, generator=rng),
        "label": torch.arange(count) % NUM_CLASSES,
        "seed": torch.arange(count),
        "valid": torch.ones(count, dtype=torch.bool),
    }


def measure_step_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes that one real step on the CPU holds, by part."""
    model = build_model(recipe, NUM_CLASSES)
    model.encoder.activation_checkpointing = recipe.activation_checkpointing
    optimizer, storages = recipe.optim.build(model), {}
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(recipe.precision))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model(make_batch(recipe)).loss
    activations = sum(storage.nbytes() for address, storage in storages.items() if address not in model_storages)
    loss.backward()
    optimizer.step()
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
        "optimizer": sum(value.nbytes for state in optimizer.state.values() for value in state.values()),
        "activations": activations,
    }


MEMORY_CASES: dict[str, tuple[type[Recipe], list[str]]] = {
    "mean color": (Pretrain, MODEL_ARGS),
    "sgd, no momentum": (Pretrain, [*MODEL_ARGS, "optim.kind=sgd", "optim.momentum=0"]),
    "bf16": (Pretrain, [*MODEL_ARGS, "precision=bf16"]),
    "computed again": (Pretrain, [*MODEL_ARGS, "activation_checkpointing=true"]),
    "dropout": (Pretrain, [*MODEL_ARGS, "encoder.dropout=0.1", "encoder.drop_path=0.2"]),
    "relative": (Pretrain, [*MODEL_ARGS, "encoder.positions=relative"]),
    "pixels": (Pretrain, [*MODEL_ARGS, "head.kind=patch_pixels"]),
    "cells": (Pretrain, [*MODEL_ARGS, "head.kind=patch_colors", "head.mask_unit=2"]),
    "large enough for oneDNN": (Pretrain, [*MODEL_ARGS, "encoder.width=192"]),
    "transfer": (Finetune, MODEL_ARGS),
    "mixup": (Finetune, [*MODEL_ARGS, "head.mixup=0.8", "head.cutmix=1", "optim.kind=adamw"]),
    "hybrid": (Pretrain, [*MODEL_ARGS, "encoder.stem=r50", "encoder.patch=32", "data.image_size=64"]),
    "BiT": (Pretrain, ["encoder.kind=bit", "head.kind=classifier", "data.image_size=64"]),
    "batch norms": (Pretrain, ["encoder.kind=timm", "encoder.name=test_resnet", "head.kind=classifier"]),
}
SLOW_CASES = ("hybrid", "BiT")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=process if name in SLOW_CASES else ()) for name in MEMORY_CASES]
)
def test_memory_is_that_of_a_real_step_to_the_byte(name: str):
    schema, args = MEMORY_CASES[name]
    recipe = resolve_args(schema, *args)
    parts = estimate_memory(recipe, NUM_CLASSES, bf16=uses_bf16(recipe.precision))
    recomputed = parts.pop("computed again", 0)
    assert parts.pop("sum") == sum(parts.values()) + recomputed
    assert parts == measure_step_bytes(recipe)
    assert (recomputed > 0) == (name == "computed again")


def test_a_block_computed_again_is_what_a_block_keeps():
    overrides = ("activation_checkpointing=false", "activation_checkpointing=true", "encoder.depth=2")
    baseline, checkpointed, shallower = (
        estimate_memory(resolve_args(Pretrain, *MODEL_ARGS, override)) for override in overrides
    )
    block_bytes = baseline["activations"] - shallower["activations"]
    assert checkpointed["computed again"] == pytest.approx(block_bytes, rel=0.1)  # the last one computes fewer tokens


def test_on_a_gpu_weights_are_copied_to_bf16_and_activations_are_halves():
    recipe = resolve_args(Pretrain, *MODEL_ARGS)
    cases = ((8, True), (16, True), (8, False))
    bf16_8, bf16_16, fp32_8 = (
        estimate_memory(recipe, 1, images, "cuda", bf16)["activations"] for images, bf16 in cases
    )
    parameters = build_model(recipe).named_parameters()
    kernels = sum(2 * p.numel() for name, p in parameters if p.ndim > 1 and "embed" not in name)
    assert 2 * bf16_8 - bf16_16 == pytest.approx(kernels, rel=0.1)
    assert 1.2 < fp32_8 / bf16_8 < 2


def train_run(run: Path, data: Path, *args: str) -> None:
    assert run_training(Pretrain, data, run, [*MODEL_ARGS, *args]) == 0


def dry_run(run: Path, data: Path, *args: str) -> dict[str, Any]:
    train_run(run, data, *args, "dry_run=true")
    return json.loads((run / "dry_run.json").read_text())


def test_a_run_leaves_what_was_foretold_on_disk(shards: Path, tmp_path: Path):
    args = ["steps=5", "save_every=2", "ema_decay=0.99", "best=val_loss", "eval_every=2", "keep=1"]
    disk = dry_run(tmp_path, shards, *args)["disk"]
    train_run(tmp_path, shards, *args)

    def folder_size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    for checkpoint in tmp_path.glob("checkpoints/step-*"):
        assert disk["checkpoint"] == pytest.approx(folder_size(checkpoint), rel=0.01)
    assert disk["encoder"] == pytest.approx(folder_size(tmp_path / "encoder"), rel=0.01)
    assert (disk["kept"], disk["in_the_making"]) == (2, 1)  # the last and the best
    assert disk["sum"] == 3 * disk["checkpoint"] + disk["encoder"]
    assert folder_size(tmp_path / "checkpoints") <= 2 * disk["checkpoint"] * 1.01


def test_no_more_checkpoints_are_counted_than_are_written():
    for overrides, num_kept, num_drafts in (
        ("save_every=1000", 1, 0),
        ("save_every=5 keep=2", 2, 0),
        ("save_every=3 keep=2", 2, 1),
        ("save_every=3 keep=2 best=val_loss", 3, 1),
        ("save_every=1000 keep=2 best=val_loss eval_every=9", 3, 0),
    ):
        recipe = resolve_args(Pretrain, *TINY, "steps=10", *overrides.split())
        disk = run_estimate.disk_usage(recipe, build_model(recipe))
        assert (disk["kept"], disk["in_the_making"], disk["exports"]) == (num_kept, num_drafts, 1), overrides


def test_hours_by_hand():
    """1e12 FLOPs an image: 1000 steps of 100 are 1e17, of which an A100 does 0.4 x 312e12 in a second."""
    args = [*TINY, "steps=1000", "batch=100"]
    recipe, process_shard = resolve_args(Pretrain, *args), ProcessShard(micro_batch=100)
    hours = run_estimate.training_hours(Hardware(), 10**12, recipe, process_shard)
    assert next(iter(hours)) == "H100"
    assert set(hours) == set(run_estimate.REFERENCE_GPUS)

    def a100(recipe: Recipe = recipe, process_shard: ProcessShard = process_shard, device: Hardware = H100) -> float:
        return run_estimate.training_hours(device, 10**12, recipe, process_shard)["A100"]["hours"]

    expected = 1e17 / (0.4 * 312e12) / 3600
    assert a100() == pytest.approx(expected)
    assert a100(process_shard=ProcessShard(0, 10, 10)) == pytest.approx(expected / 10)
    known_hours = run_estimate.training_hours(Hardware(gpu="a-100", tflops=100), 10**12, recipe, process_shard)
    assert next(iter(known_hours)) == "A100"
    assert known_hours["A100"]["hours"] == pytest.approx(1e17 / 100e12 / 3600)
    assert known_hours["H100"]["hours"] == hours["H100"]["hours"], "what was measured of one is not the other's"
    assert a100(device=Hardware(mfu=0.2)) == pytest.approx(2 * expected)
    assert a100(resolve_args(Pretrain, *args, "activation_checkpointing=true")) == pytest.approx(4 / 3 * expected)
    assert a100(resolve_args(Finetune, *args, "sweep.lr=0.1,0.2,0.3", "seeds=2")) == pytest.approx(5 * expected)
    # small steps wait for their launches: two blocks at 0.8 ms, four times a step
    large, small = (
        run_estimate.training_hours(Hardware(), 10**n, recipe, ProcessShard(micro_batch=25))["H100"] for n in (12, 6)
    )
    assert small["hours"] == pytest.approx(1000 * 4 * 2 * 0.8e-3 / 3600)
    assert small["launches"]
    assert not large["launches"]


def test_loaders_work_beside_the_step(monkeypatch: pytest.MonkeyPatch):
    """On two cores: one thread and a loader have one each; of two loaders one shares the training's."""
    monkeypatch.setattr(trial.os, "sched_getaffinity", lambda _: {0, 1})
    cases = ((2, 1, 0, 3), (4, 1, 1, 4), (1, 4, 1, 4), (1, 4, 2, 2.5), (1.9, 0.3, 1, 1.9), (8, 4, 4, 8))
    for compute, data, workers, seconds in cases:
        assert trial.step_time(compute, data, workers) == seconds


def test_a_gpu_is_known_whatever_its_capitals_and_another_is_refused_with_those_there_are():
    for name, gpu in GPUS.items():
        for spelling in (name, name.lower(), name.replace(" ", ""), name.replace(" ", "_")):
            assert Hardware(gpu=spelling).gpu == name
        assert (Hardware(gpu=name).gpu_memory_gb, Hardware(gpu=name, memory_gb=40).gpu_memory_gb) == (
            gpu.memory_gb,
            40,
        )
    assert_refused(
        ExitCode.USAGE,
        r"hardware.gpu: 'H900' is not in the table.*H100 PCIe, .*RTX 3090",
        resolve_args,
        Pretrain,
        "hardware.gpu=H900",
    )


def test_what_fits_is_said_with_the_largest_that_does():
    parts = {"weights": 100, "activations": 800, "sum": 900}  # 100 an image
    assert [run_estimate.max_micro_batch(parts, 8, 24, memory) for memory in (2500, 2499, 500, 199)] == [24, 12, 4, 0]
    assert run_estimate.fit_verdict(parts, 8, 24, 1001e-9) == "fits"  # of which a tenth is left free
    assert run_estimate.fit_verdict(parts, 8, 24, 999e-9) == "fits with micro_batch=6"
    assert run_estimate.fit_verdict(parts, 8, 24, 100e-9) == "too small"


class FakeTimer(StepTimer):
    """Takes 3 ms and 2 ms an image, and 5 ms for an update."""

    def __init__(self, micro_batch: int):
        self.device, self.image_counts, self.micro = torch.device("cpu"), [], micro_batch

    def run_once(self, images: int) -> tuple[float, float]:
        self.image_counts.append(images)
        return 0.003 + 0.002 * images, 0.005


def test_a_step_is_a_straight_line_in_its_images():
    for micro_batch, max_images, num_images in ((1, 50, 1), (64, 1000, 64), (100, 50, 50), (100_000, 5000, 128)):
        timer = FakeTimer(micro_batch)
        timing = timer.measure(max_images)
        assert timing.images == num_images
        assert max(timer.image_counts) <= max(2, max_images)
        assert timing.step(3) == pytest.approx(3 * (0.003 + 0.002 * micro_batch) + 0.005 + LOOP_OVERHEAD)


def test_a_trial_steps_as_a_training_does():
    recipe = resolve_args(Pretrain, *MODEL_ARGS, "optim.clip=0.5", "optim.lr=0.1")
    torch.manual_seed(0)
    model = build_model(recipe)
    initial = {name: value.clone() for name, value in model.named_parameters()}
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    with patch.object(trial.nn.utils, "clip_grad_norm_", side_effect=clip_grad_norm) as clip_mock:
        timing = time_steps(recipe, model, 8, 1, 1e5)
    assert not isinstance(timing, str)
    assert (timing.images, timing.peak) == (8, None)
    assert min(timing.update, timing.passes) > 0
    assert {call.args[1] for call in clip_mock.call_args_list} == {0.5}
    assert any(not torch.equal(initial[name], value) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_too_large_to_try_is_not_tried(monkeypatch: pytest.MonkeyPatch):
    recipe = resolve_args(Pretrain, *MODEL_ARGS)
    monkeypatch.setattr(trial, "free_memory", lambda: 1000)
    assert "more than half of the free memory" in str(time_steps(recipe, None, 8, 501, 1))  # type: ignore[arg-type]
    monkeypatch.setattr(trial, "StepTimer", Mock(side_effect=MemoryError))
    message = time_steps(recipe, build_model(recipe), 8, 500, 1)
    assert message == "out of memory here with 8 images at once"


@pytest.mark.parametrize(("height", "width"), [(32, 32), pytest.param(224, 224, marks=process), (64, 128), (448, 112)])
def test_each_image_stands_beside_its_corruption(height: int, width: int):
    args = ["encoder.size=Ti", "encoder.width=8", "encoder.depth=1", "encoder.heads=1", "encoder.patch=16"]
    recipe = resolve_args(Pretrain, *args, f"data.image_size={height},{width}")
    model, batch = build_model(recipe), make_batch(recipe, 16)
    columns = split_grid(model.head.visualize(model.encoder, batch), height, width)
    assert torch.equal(columns[:, 0], batch["image"])
    assert torch.equal(split_grid(image_grid(list(columns.unbind(1))), height, width), columns)
    preview, text = draw_images(model, batch)
    assert "gray is masked" in text
    if max(height, width) <= 224:
        scale = max(1, round(160 / max(height, width)))
        pair = torch.nn.functional.interpolate(columns[0, :2].float(), scale_factor=scale)
        h, w = pair.shape[2:]
        assert torch.equal(preview[:, :h, 8 : 8 + w].float(), pair[0])
        assert torch.equal(preview[:, :h, 12 + w : 12 + 2 * w].float(), pair[1])
    page = np.asarray(Image.open(io.BytesIO(draw_preview(recipe, model, batch))).convert("RGB"))
    assert max(page.shape) < 3500
    rows, preview_width = preview.shape[1:]
    bottom = page[page.shape[0] - 20 - rows : page.shape[0] - 20, 20 : 20 + preview_width]
    assert np.array_equal(bottom, preview.permute(1, 2, 0).numpy()), "pixels are drawn as they are"


def test_a_dry_run_tells_all_and_trains_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["steps=30", "batch=16", "micro_batch=4", "keep=1", "save_every=10", "world=2", "hardware.gpu=l4"]
    estimate = dry_run(tmp_path / "run", shards, *args)
    output = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"dry_run.png", "dry_run.json"}
    epoch_samples = estimate["length"]["epoch_samples"]
    expected = {
        "steps": 30,
        "batch": 16,
        "samples": 480,
        "epochs": 480 / epoch_samples,
        "epoch_samples": epoch_samples,
        "trainings": 1,
    }
    assert estimate["length"] == expected
    assert estimate["step"] == {"processes": 2, "micro_batches": 2, "micro_batch": 4}
    assert estimate["data"]["shards"] == len(list((shards / "train").glob("*.tar")))
    assert estimate["flops"]["run"] == 480 * estimate["flops"]["image"]
    local, parts = estimate["here"], estimate["here"]["bytes"]
    assert parts["sum"] == sum(size for name, size in parts.items() if name != "sum")
    assert local["data"] == pytest.approx(8 / local["loader"]["images_per_second"])
    assert local["seconds_a_step"] == local["computed"] + local["data"], "there are no loader processes"
    assert local["hours"] == pytest.approx(30 * local["seconds_a_step"] / 3600)
    assert local["images_per_second"] == pytest.approx(16 / local["seconds_a_step"])
    assert f"\n  sum           {format_bytes(parts['sum']):>9} of " in output
    for name in ("weights", "gradients", "optimizer", "activations", "L4", "H200", "2 of this one", "picture", "disk"):
        assert f"\n{name:<16}" in output or f"\n  {name:<14}" in output, name
    for text in ("parameters      encoder ", "FLOPs an image", "30 steps of 16 images", "head:\n  kind: mean_color"):
        assert text in output
    assert "\nGPUs        2 on 1 node" in output
    assert max(len(line) for line in output.split("\nmodel ")[1].splitlines() if str(tmp_path) not in line) <= 120
    assert "warning" not in output.split("\nGPUs")[0]


def test_a_full_disk_and_too_little_memory_are_warned_of(shards: Path, tmp_path: Path, capsys, monkeypatch: Any):
    monkeypatch.setattr(run_estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("ssl_vit.runtime.peak_and_total_memory", lambda: (0, 6_000_000))
    dry_run(tmp_path, shards, "batch=16")
    memory_warning, disk_warning = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "micro_batch=4 fits" in memory_warning
    assert "1 kB are free" in disk_warning


def test_bytes_and_hours_are_written_for_people():
    sizes = [format_bytes(size) for size in (0, 999, 1000, 85_600_000, 999_600_000, 3.21e12)]
    assert sizes == ["0 B", "999 B", "1 kB", "85.6 MB", "1 GB", "3.21 TB"]
    spans = [format_hours(hours) for hours in (1e-5 / 3.6, 1 / 3600, 0.5, 3.76, 26_321)]
    assert spans == ["10 ms", "1 s", "30 minutes", "3.76 hours", "26,321 hours"]


# --- the plan of a run: each figure by hand, each warning where its limit is, each cure a cure

ROOT = Path(__file__).parents[2]
AMPLE_HARDWARE = Hardware(storage_gbs=1e6, cores=10**6, network_gbps=1e9, memory_gb=1e6)


def make_job(world: int, encoder: Vit | None = None, **changes: object) -> Job:
    """The paper's run on full-size shards, with changes."""
    encoder = encoder or Vit()
    with torch.device("meta"):
        built = encoder.build()
        head = MeanColor().build(built, 1)
    parameters = count_parameters(built) + count_parameters(head)
    job = Job(
        encoder, head.forward_macs, parameters, 2, 4096, None, 100_000, world, False, True, LARGE[0], 1_281_167, None
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def make_hardware(**changes: float) -> Hardware:
    """One that is short of nothing but these."""
    return AMPLE_HARDWARE.model_copy(update=changes)


def warning_topics(job: Job, hardware: Hardware) -> list[str]:
    """What is warned of."""
    return [warning.split(":")[0] for warning in plan_run(job, hardware)[1]]


def test_time_is_flops_by_the_rate():
    """B/16 takes 17.563 GMAC forward (paper's formula), and the head 98 x 768 x 512; pixels need no gradient.

    An H100 promises 989 TFLOP/s, of which 0.4 are assumed.
    """
    flops = (6 * (17.563e9 + 98 * 768 * 512) - 2 * 196 * 768 * 768) * 512
    lines, warnings = plan_run(make_job(8), AMPLE_HARDWARE)
    assert make_job(8).seconds(H100) == pytest.approx(flops / (0.4 * 989e12), rel=1e-4)
    assert lines[1] == "step        136 ms of computation at 396 TFLOP/s a GPU (assumed): 30,033 images/s"
    assert lines[2] == "run         100,000 steps, 320 epochs: 3.79 hours, 30.3 GPU-hours"
    assert warnings == []
    checkpointed = replace(make_job(8), activation_checkpointing=True)
    assert checkpointed.seconds(H100) == pytest.approx(4 / 3 * make_job(8).seconds(H100))
    measured = Hardware(tflops=0.2 * 989)
    assert make_job(8).seconds(measured) == 2 * make_job(8).seconds(H100)
    assert "(assumed)" not in plan_run(make_job(8), measured)[0][1]


def test_a_plan_is_short():
    for world in (1, 8, 64, 512, 4096):
        lines, warnings = plan_run(make_job(world, lanes=16), H100)
        assert len(lines) + len(warnings) <= 20
        assert max(map(len, lines)) <= 120
        assert all(warning.count(":") >= 2 for warning in warnings), "what: by what factor: what to change"


def test_rates_of_a_core_are_the_benchmarks():
    rows = json.loads((ROOT / "docs" / "benchmark_loader_cpu.json").read_text())["rows"]
    for case, (sample_bytes, rate) in {"full size": LARGE, "short side 256": SMALL}.items():
        (row,) = (
            record
            for record in rows
            if (record["benchmark"], record["case"], record["who"]) == ("loader", case, "ssl_vit")
        )
        assert rate == pytest.approx(row["images_per_second"], abs=0.5)
        assert core_rate(sample_bytes) == pytest.approx(rate)
    assert SMALL[1] < core_rate(0) < 10_000
    middle_rate = core_rate((SMALL[0] + LARGE[0]) / 2)
    assert 1 / middle_rate == pytest.approx((1 / SMALL[1] + 1 / LARGE[1]) / 2)


def test_loader_and_storage_by_hand():
    job = make_job(8)
    images = 512 / job.seconds(H100)
    cores, gigabytes = images / LARGE[1], 8 * images * LARGE[0] / 1e9
    for factor, expected in ((1.01, []), (0.99, ["loader", "storage"])):
        assert warning_topics(job, make_hardware(cores=cores * factor, storage_gbs=gigabytes * factor)) == expected
    slow_storage = make_hardware(storage_gbs=gigabytes / 3)
    lines, warnings = plan_run(job, slow_storage)
    assert warnings == ["storage: 3 times too slow: shards made with resize=256, or a copy on each node's own disk"]
    assert lines[2].endswith("11.4 hours with the worst of the limits below")
    small_job = replace(job, sample_bytes=SMALL[0])
    assert warning_topics(small_job, slow_storage) == []
    assert "resize" not in plan_run(small_job, H100.model_copy(update={"cores": 1}))[1][0]


def test_network_by_hand():
    """All-reduce of 4 bytes a parameter over a ring, behind 2/3 of the computation; a node's cards share it."""
    job = make_job(512, batch=65536)
    sent_bytes = 2 * 511 / 512 * 4 * job.parameters
    gigabytes_needed = 8 * sent_bytes / (2 / 3 * job.seconds(H100)) / 8 / 1e9
    for factor, expected in ((1.01, []), (0.99, ["network"])):
        assert warning_topics(job, make_hardware(network_gbps=gigabytes_needed * factor)) == expected
    fast_line, slow_line = (
        plan_run(job, make_hardware(network_gbps=gigabytes_needed * factor))[0][2] for factor in (1, 0.5)
    )
    hours = [float(re.findall(r"([\d.]+) hours", line)[-1]) for line in (fast_line, slow_line)]
    assert hours[1] / hours[0] == pytest.approx(1 + 2 / 3, rel=0.01), "the forward pass waits for nothing"
    (warning,) = plan_run(replace(job, micro_batch=64), make_hardware(network_gbps=gigabytes_needed * 1.01))[1]
    assert warning.startswith("network: 2 times too slow"), "only the last micro batch hides it"
    lines = plan_run(make_job(8), make_hardware(network_gbps=1e-3))[0]
    assert any(line.startswith("network") and line.endswith("within the node") for line in lines)
    assert not any(line.startswith("network") for line in plan_run(make_job(1), AMPLE_HARDWARE)[0])


def test_a_small_batch_starves_and_the_cure_feeds():
    (warning,) = plan_run(make_job(512), AMPLE_HARDWARE)[1]
    assert warning.startswith("batch: 4.5 times too few images at once")
    (num_gpus,) = re.findall(r"or (\d+) GPUs", warning)
    assert warning_topics(make_job(int(num_gpus)), AMPLE_HARDWARE) == []
    assert warning_topics(make_job(2 * int(num_gpus)), AMPLE_HARDWARE) == ["batch"]
    assert plan_run(make_job(8, micro_batch=4), AMPLE_HARDWARE)[1][0].endswith("a larger micro_batch")


VIT_G = Vit(patch=14, width=1408, depth=40, heads=16, mlp=6144)


@pytest.mark.parametrize(
    ("encoder", "world"),
    [(Vit(), 1), pytest.param(Vit(size="L"), 8, marks=pytest.mark.process), (VIT_G, 8), (VIT_G, 64)],
)
def test_cures_of_too_little_memory(encoder: Vit, world: int):
    hardware = make_hardware(memory_gb=80 if world < 64 else 20)
    job = make_job(world, encoder)
    lines, (warning,) = plan_run(job, hardware)
    assert "take this" not in "".join(lines)
    assert warning.startswith("memory: ")
    (images, engine, gigabytes) = re.findall(r"micro_batch=(\d+) under (\w+), or .*\(([\d.]+) GB\)", warning)[0]
    fixed = replace(job, micro_batch=int(images))
    assert any(line.startswith(f"  {engine} ") and "take this" in line for line in plan_run(fixed, hardware)[0])
    assert job.memory(engine, 2 * int(images), False)[1] > 0.9e9 * hardware.gpu_memory_gb, "the largest is named"
    lines, warnings = plan_run(replace(job, activation_checkpointing=True), hardware)
    (chosen_line,) = (line for line in lines if "take this" in line)
    assert float(re.findall(r"= +([\d.]+) GB", chosen_line)[0]) == pytest.approx(float(gigabytes), rel=0.01)
    assert warnings == []


def test_the_first_engine_that_fits_is_taken():
    """g without images keeps 16.3 GB under ddp; the others less and less, but for the buckets of ZeRO-1 and 2."""
    job = make_job(64, VIT_G, batch=64)
    sizes = {engine: job.memory(engine, 1, False)[1] / 1e9 for engine in runtime.ENGINES}
    assert sizes["ddp"] > sizes["zero1"] > sizes["fsdp2"]
    for engine in ("ddp", "zero1", "fsdp2"):
        hardware = make_hardware(memory_gb=sizes[engine] * 1.001 / cluster.USABLE)
        (chosen,) = (line.split()[0] for line in plan_run(job, hardware)[0] if "take this" in line)
        assert chosen == engine
    single_lines = plan_run(replace(job, world=1, batch=1), AMPLE_HARDWARE)[0]
    assert [line.split()[0] for line in single_lines if line.startswith("  ")] == ["ddp"]


def test_memory_by_hand():
    """What cost.memory is told: images, bf16 copies, whether gradients are accumulated; a tenth is left free."""
    job = make_job(8)
    image_bytes = cost.activation_bytes(Vit(), True, False)
    between, peak = job.memory("ddp", 512, False)
    assert between == 16 * job.parameters
    assert peak == between + 2 * job.parameters + 512 * image_bytes
    assert replace(job, micro_batch=64).memory("ddp", 64, False)[1] == peak + 4 * job.parameters - 448 * image_bytes
    fp32 = replace(job, bf16=False).memory("ddp", 512, False)
    assert fp32[1] == between + 512 * cost.activation_bytes(Vit(), False, False)
    for gigabytes, fits in ((peak / 0.899e9, True), (peak / 0.901e9, False)):
        lines = plan_run(job, make_hardware(memory_gb=gigabytes))[0]
        assert lines[4].startswith("  ddp ")
        assert ("take this" in lines[4]) == fits


def test_the_cure_is_an_engine_under_which_enough_images_fit():
    """Where ddp has room for one image of g, another engine for more."""
    job = make_job(64, VIT_G, batch=64 * 256)
    memory_gb = job.memory("ddp", 1, False)[1] * 1.001 / cluster.USABLE / 1e9
    (warning,) = plan_run(job, make_hardware(memory_gb=memory_gb))[1]
    (images, engine) = re.findall(r"micro_batch=(\d+) under (\w+)", warning)[0]
    assert engine != "ddp"
    assert int(images) >= job.min_images(AMPLE_HARDWARE)


def test_what_the_run_would_refuse_and_lanes_where_shards_are_remote():
    with pytest.raises(
        ExitError, match="batch=4096 cannot be shared by 500 processes; these can: 32, 64, 128, 256, 512"
    ):
        plan_run(make_job(500), H100)
    (warning,) = plan_run(make_job(512, batch=512 * 64, lanes=16), AMPLE_HARDWARE)[1]
    assert warning.startswith("data.lanes=16: each shard is fetched by 4 nodes: data.lanes=64")
    assert warning_topics(make_job(512, batch=512 * 64, lanes=64), AMPLE_HARDWARE) == []
