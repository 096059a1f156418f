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

from ssl_vit import config, recipes, runtime
from ssl_vit.data.loader import Share
from ssl_vit.encoders.vit import Vit
from ssl_vit.errors import USAGE, Refusal
from ssl_vit.estimate import cluster, cost, run_estimate, trial
from ssl_vit.estimate.cluster import LARGE, SMALL, Job, core_rate, plan
from ssl_vit.estimate.render import images, sketch
from ssl_vit.estimate.trial import LOOP, Trial, rehearse
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.heads.visualize import cells, grid
from ssl_vit.model import Batch, Model, count_parameters
from ssl_vit.recipes import Finetune, Pretrain, Recipe, resolve
from ssl_vit.report.format import human, span
from ssl_vit.runtime import uses_bf16
from ssl_vit.train.hardware import GPUS, Device
from tests.conftest import TINY
from tests.train.test_loop import refused, start

process = pytest.mark.process
IMAGES, CLASSES = 6, 5
H100 = Device()
MODEL = ["encoder.size=Ti", "encoder.width=64", "encoder.depth=3", "encoder.heads=2", "encoder.patch=8"]
MODEL += ["data.image_size=32,64"]


def made(schema: type[Recipe], *words: str) -> Recipe:
    return resolve(config.parse(schema, list(words), recipes.FOLDER))[0]


def model_of(of: Recipe, classes: int = 1) -> Model:
    encoder = of.encoder.build()
    return Model(encoder, of.head.build(encoder, classes))


def foretold(of: Recipe, classes: int = 1, images: int = IMAGES, device: str = "cpu", bf16: bool = False) -> Any:
    return run_estimate.memory_by_part(of, model_of(of, classes), classes, images, device, bf16)


def a_batch(of: Recipe, count: int = IMAGES) -> Batch:
    made = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 3, *of.data.image_hw), dtype=torch.uint8, generator=made),
        "label": torch.arange(count) % CLASSES,
        "seed": torch.arange(count),
        "valid": torch.ones(count, dtype=torch.bool),
    }


def real(of: Recipe) -> dict[str, int]:
    """Bytes that one real step on the CPU holds, by part."""
    model = model_of(of, CLASSES)
    model.encoder.activation_checkpointing = of.activation_checkpointing
    optimizer, kept = of.optim.build(model), {}
    whole = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(of.precision))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        loss = model(a_batch(of)).loss
    activations = sum(storage.nbytes() for address, storage in kept.items() if address not in whole)
    loss.backward()
    optimizer.step()
    return {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(value.nbytes for state in optimizer.state.values() for value in state.values()),
        "activations": activations,
    }


CASES: dict[str, tuple[type[Recipe], list[str]]] = {
    "mean colour": (Pretrain, MODEL),
    "sgd, no momentum": (Pretrain, [*MODEL, "optim.kind=sgd", "optim.momentum=0"]),
    "bf16": (Pretrain, [*MODEL, "precision=bf16"]),
    "computed again": (Pretrain, [*MODEL, "activation_checkpointing=true"]),
    "dropout": (Pretrain, [*MODEL, "encoder.dropout=0.1", "encoder.drop_path=0.2"]),
    "relative": (Pretrain, [*MODEL, "encoder.positions=relative"]),
    "pixels": (Pretrain, [*MODEL, "head.kind=patch_pixels"]),
    "cells": (Pretrain, [*MODEL, "head.kind=patch_colors", "head.unit=2"]),
    "large enough for oneDNN": (Pretrain, [*MODEL, "encoder.width=192"]),
    "transfer": (Finetune, MODEL),
    "mixup": (Finetune, [*MODEL, "head.mixup=0.8", "head.cutmix=1", "optim.kind=adamw"]),
    "hybrid": (Pretrain, [*MODEL, "encoder.stem=r50", "encoder.patch=32", "data.image_size=64"]),
    "BiT": (Pretrain, ["encoder.kind=bit", "head.kind=classifier", "data.image_size=64"]),
    "batch norms": (Pretrain, ["encoder.kind=timm", "encoder.name=test_resnet", "head.kind=classifier"]),
}
SLOW = ("hybrid", "BiT")


@pytest.mark.parametrize("name", [pytest.param(name, marks=process if name in SLOW else ()) for name in CASES])
def test_memory_is_that_of_a_real_step_to_the_byte(name: str):
    schema, words = CASES[name]
    of = made(schema, *words)
    found = foretold(of, CLASSES, bf16=uses_bf16(of.precision))
    again = found.pop("computed again", 0)
    assert found.pop("sum") == sum(found.values()) + again
    assert found == real(of)
    assert (again > 0) == (name == "computed again")


def test_a_block_computed_again_is_what_a_block_keeps():
    others = ("activation_checkpointing=false", "activation_checkpointing=true", "encoder.depth=2")
    plain, again, less = (foretold(made(Pretrain, *MODEL, other)) for other in others)
    block = plain["activations"] - less["activations"]
    assert again["computed again"] == pytest.approx(block, rel=0.1)  # the last one computes fewer tokens


def test_on_a_gpu_weights_are_copied_to_bf16_and_activations_are_halves():
    of = made(Pretrain, *MODEL)
    cases = ((8, True), (16, True), (8, False))
    one, two, in_fp32 = (foretold(of, 1, images, "cuda", bf16)["activations"] for images, bf16 in cases)
    named = model_of(of).named_parameters()
    kernels = sum(2 * p.numel() for name, p in named if p.ndim > 1 and "embed" not in name)
    assert 2 * one - two == pytest.approx(kernels, rel=0.1)
    assert 1.2 < in_fp32 / one < 2


def train(run: Path, data: Path, *words: str) -> None:
    assert start(Pretrain, data, run, [*MODEL, *words]) == 0


def dry(run: Path, data: Path, *words: str) -> dict[str, Any]:
    train(run, data, *words, "dry_run=true")
    return json.loads((run / "dry_run.json").read_text())


def test_a_run_leaves_what_was_foretold_on_disk(shards: Path, tmp_path: Path):
    words = ["steps=5", "save_every=2", "average=0.99", "best=val_loss", "eval_every=2", "keep=1"]
    disk = dry(tmp_path, shards, *words)["disk"]
    train(tmp_path, shards, *words)

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    for one in tmp_path.glob("checkpoints/step-*"):
        assert disk["checkpoint"] == pytest.approx(size(one), rel=0.01)
    assert disk["encoder"] == pytest.approx(size(tmp_path / "encoder"), rel=0.01)
    assert (disk["kept"], disk["in_the_making"]) == (2, 1)  # the last and the best
    assert disk["sum"] == 3 * disk["checkpoint"] + disk["encoder"]
    assert size(tmp_path / "checkpoints") <= 2 * disk["checkpoint"] * 1.01


def test_no_more_checkpoints_are_counted_than_are_written():
    for words, kept, making in (
        ("save_every=1000", 1, 0),
        ("save_every=5 keep=2", 2, 0),
        ("save_every=3 keep=2", 2, 1),
        ("save_every=3 keep=2 best=val_loss", 3, 1),
        ("save_every=1000 keep=2 best=val_loss eval_every=9", 3, 0),
    ):
        of = made(Pretrain, *TINY, "steps=10", *words.split())
        disk = run_estimate.disk(of, model_of(of))
        assert (disk["kept"], disk["in_the_making"], disk["exports"]) == (kept, making, 1), words


def test_hours_by_hand():
    """1e12 FLOPs an image: 1000 steps of 100 are 1e17, of which an A100 does 0.4 x 312e12 in a second."""
    words = [*TINY, "steps=1000", "batch=100"]
    of, alone = made(Pretrain, *words), Share(micro_batch=100)
    found = run_estimate.hours(Device(), 10**12, of, alone)
    assert next(iter(found)) == "H100"
    assert set(found) == set(run_estimate.SHOWN)

    def a100(of: Recipe = of, share: Share = alone, device: Device = H100) -> float:
        return run_estimate.hours(device, 10**12, of, share)["A100"]["hours"]

    once = 1e17 / (0.4 * 312e12) / 3600
    assert a100() == pytest.approx(once)
    assert a100(share=Share(0, 10, 10)) == pytest.approx(once / 10)
    known = run_estimate.hours(Device(gpu="a-100", tflops=100), 10**12, of, alone)
    assert next(iter(known)) == "A100"
    assert known["A100"]["hours"] == pytest.approx(1e17 / 100e12 / 3600)
    assert known["H100"]["hours"] == found["H100"]["hours"], "what was measured of one is not the other's"
    assert a100(device=Device(mfu=0.2)) == pytest.approx(2 * once)
    assert a100(made(Pretrain, *words, "activation_checkpointing=true")) == pytest.approx(4 / 3 * once)
    assert a100(made(Finetune, *words, "sweep.lr=0.1,0.2,0.3", "seeds=2")) == pytest.approx(5 * once)
    # small steps wait for their launches: two blocks at 0.8 ms, four times a step
    large, small = (run_estimate.hours(Device(), 10**n, of, Share(micro_batch=25))["H100"] for n in (12, 6))
    assert small["hours"] == pytest.approx(1000 * 4 * 2 * 0.8e-3 / 3600)
    assert small["launches"]
    assert not large["launches"]


def test_loaders_work_beside_the_step(monkeypatch: pytest.MonkeyPatch):
    """On two cores: one thread and a loader have one each; of two loaders one shares the training's."""
    monkeypatch.setattr(trial.os, "sched_getaffinity", lambda _: {0, 1})
    cases = ((2, 1, 0, 3), (4, 1, 1, 4), (1, 4, 1, 4), (1, 4, 2, 2.5), (1.9, 0.3, 1, 1.9), (8, 4, 4, 8))
    for computed, data, workers, seconds in cases:
        assert trial.together(computed, data, workers) == seconds


def test_a_gpu_is_known_whatever_its_capitals_and_another_is_refused_with_those_there_are():
    for name, known in GPUS.items():
        for written in (name, name.lower(), name.replace(" ", ""), name.replace(" ", "_")):
            assert Device(gpu=written).gpu == name
        assert (Device(gpu=name).gigabytes, Device(gpu=name, memory_gb=40).gigabytes) == (known.memory_gb, 40)
    refused(USAGE, r"device.gpu: 'H900' is not in the table.*H100 PCIe, .*RTX 3090", made, Pretrain, "device.gpu=H900")


def test_what_fits_is_said_with_the_largest_that_does():
    parts = {"weights": 100, "activations": 800, "sum": 900}  # 100 an image
    assert [run_estimate.at_once(parts, 8, 24, room) for room in (2500, 2499, 500, 199)] == [24, 12, 4, 0]
    assert run_estimate.fits(parts, 8, 24, 1001e-9) == "fits"  # of which a tenth is left free
    assert run_estimate.fits(parts, 8, 24, 999e-9) == "fits with micro_batch=6"
    assert run_estimate.fits(parts, 8, 24, 100e-9) == "too small"


class Clocked(Trial):
    """Takes 3 ms and 2 ms an image, and 5 ms for an update."""

    def __init__(self, micro: int):
        self.device, self.tried, self.micro = torch.device("cpu"), [], micro

    def once(self, images: int) -> tuple[float, float]:
        self.tried.append(images)
        return 0.003 + 0.002 * images, 0.005


def test_a_step_is_a_straight_line_in_its_images():
    for micro, most, tried in ((1, 50, 1), (64, 1000, 64), (100, 50, 50), (100_000, 5000, 128)):
        trial = Clocked(micro)
        found = trial.timed(most)
        assert found.images == tried
        assert max(trial.tried) <= max(2, most)
        assert found.step(3) == pytest.approx(3 * (0.003 + 0.002 * micro) + 0.005 + LOOP)


def test_a_trial_steps_as_a_training_does():
    of = made(Pretrain, *MODEL, "optim.clip=0.5", "optim.lr=0.1")
    torch.manual_seed(0)
    model = model_of(of)
    before = {name: value.clone() for name, value in model.named_parameters()}
    clip = torch.nn.utils.clip_grad_norm_
    with patch.object(trial.nn.utils, "clip_grad_norm_", side_effect=clip) as clipped:
        found = rehearse(of, model, 8, 1, 1e5)
    assert not isinstance(found, str)
    assert (found.images, found.peak) == (8, None)
    assert min(found.update, found.passes) > 0
    assert {call.args[1] for call in clipped.call_args_list} == {0.5}
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_too_large_to_try_is_not_tried(monkeypatch: pytest.MonkeyPatch):
    of = made(Pretrain, *MODEL)
    monkeypatch.setattr(trial, "free", lambda: 1000)
    assert "more than half of the free memory" in str(rehearse(of, None, 8, 501, 1))  # type: ignore[arg-type]
    monkeypatch.setattr(trial, "Trial", Mock(side_effect=MemoryError))
    said = rehearse(of, model_of(of), 8, 500, 1)
    assert said == "out of memory here with 8 images at once"


@pytest.mark.parametrize(("height", "width"), [(32, 32), pytest.param(224, 224, marks=process), (64, 128), (448, 112)])
def test_each_image_stands_beside_its_corruption(height: int, width: int):
    size = ["encoder.size=Ti", "encoder.width=8", "encoder.depth=1", "encoder.heads=1", "encoder.patch=16"]
    of = made(Pretrain, *size, f"data.image_size={height},{width}")
    model, batch = model_of(of), a_batch(of, 16)
    columns = cells(model.head.panel(model.encoder, batch), height, width)
    assert torch.equal(columns[:, 0], batch["image"])
    assert torch.equal(cells(grid(list(columns.unbind(1))), height, width), columns)
    shown, text = images(model, batch)
    assert "grey is masked" in text
    if max(height, width) <= 224:
        scale = max(1, round(160 / max(height, width)))
        both = torch.nn.functional.interpolate(columns[0, :2].float(), scale_factor=scale)
        h, w = both.shape[2:]
        assert torch.equal(shown[:, :h, 8 : 8 + w].float(), both[0])
        assert torch.equal(shown[:, :h, 12 + w : 12 + 2 * w].float(), both[1])
    picture = np.asarray(Image.open(io.BytesIO(sketch(of, model, batch))).convert("RGB"))
    assert max(picture.shape) < 3500
    rows, across = shown.shape[1:]
    below = picture[picture.shape[0] - 20 - rows : picture.shape[0] - 20, 20 : 20 + across]
    assert np.array_equal(below, shown.permute(1, 2, 0).numpy()), "pixels are drawn as they are"


def test_a_dry_run_tells_all_and_trains_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["steps=30", "batch=16", "micro_batch=4", "keep=1", "save_every=10", "world=2", "device.gpu=l4"]
    found = dry(tmp_path / "run", shards, *words)
    said = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"dry_run.png", "dry_run.json"}
    train = found["length"]["epoch_samples"]
    expected = {"steps": 30, "batch": 16, "samples": 480, "epochs": 480 / train, "epoch_samples": train, "trainings": 1}
    assert found["length"] == expected
    assert found["step"] == {"processes": 2, "micro_batches": 2, "micro_batch": 4}
    assert found["data"]["shards"] == len(list((shards / "train").glob("*.tar")))
    assert found["flops"]["run"] == 480 * found["flops"]["image"]
    here, parts = found["here"], found["here"]["bytes"]
    assert parts["sum"] == sum(size for name, size in parts.items() if name != "sum")
    assert here["data"] == pytest.approx(8 / here["loader"]["images_per_second"])
    assert here["seconds_a_step"] == here["computed"] + here["data"], "there are no loader processes"
    assert here["hours"] == pytest.approx(30 * here["seconds_a_step"] / 3600)
    assert here["images_per_second"] == pytest.approx(16 / here["seconds_a_step"])
    assert f"\n  sum           {human(parts['sum']):>9} of " in said
    for name in ("weights", "gradients", "optimizer", "activations", "L4", "H200", "2 of this one", "picture", "disk"):
        assert f"\n{name:<16}" in said or f"\n  {name:<14}" in said, name
    for text in ("parameters      encoder ", "FLOPs an image", "30 steps of 16 images", "head:\n  kind: mean_color"):
        assert text in said
    assert "\nGPUs        2 on 1 node" in said
    assert max(len(line) for line in said.split("\nmodel ")[1].splitlines() if str(tmp_path) not in line) <= 120
    assert "warning" not in said.split("\nGPUs")[0]


def test_a_full_disk_and_too_little_memory_are_warned_of(shards: Path, tmp_path: Path, capsys, monkeypatch: Any):
    monkeypatch.setattr(run_estimate.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("ssl_vit.runtime.memory", lambda: (0, 6_000_000))
    dry(tmp_path, shards, "batch=16")
    memory, disk = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "micro_batch=4 fits" in memory
    assert "1 kB are free" in disk


def test_bytes_and_hours_are_written_for_people():
    sizes = [human(size) for size in (0, 999, 1000, 85_600_000, 999_600_000, 3.21e12)]
    assert sizes == ["0 B", "999 B", "1 kB", "85.6 MB", "1 GB", "3.21 TB"]
    spans = [span(hours) for hours in (1e-5 / 3.6, 1 / 3600, 0.5, 3.76, 26_321)]
    assert spans == ["10 ms", "1 s", "30 minutes", "3.76 hours", "26,321 hours"]


# --- the plan of a run: each figure by hand, each warning where its limit is, each cure a cure

ROOT = Path(__file__).parents[2]
RICH = Device(storage_gbs=1e6, cores=10**6, network_gbps=1e9, memory_gb=1e6)


def a_job(world: int, encoder: Vit | None = None, **changes: object) -> Job:
    """The paper's run on full-size shards, with changes."""
    encoder = encoder or Vit()
    with torch.device("meta"):
        made = encoder.build()
        head = MeanColor().build(made, 1)
    parameters = count_parameters(made) + count_parameters(head)
    job = Job(encoder, head.macs, parameters, 2, 4096, None, 100_000, world, False, True, LARGE[0], 1_281_167, None)
    return replace(job, **changes)  # type: ignore[arg-type]


def device(**changes: float) -> Device:
    """One that is short of nothing but these."""
    return RICH.model_copy(update=changes)


def named(job: Job, there: Device) -> list[str]:
    """What is warned of."""
    return [warning.split(":")[0] for warning in plan(job, there)[1]]


def test_time_is_flops_by_the_rate():
    """B/16 takes 17.563 GMAC forward (paper's formula), and the head 98 x 768 x 512; pixels need no gradient.

    An H100 promises 989 TFLOP/s, of which 0.4 are assumed.
    """
    flops = (6 * (17.563e9 + 98 * 768 * 512) - 2 * 196 * 768 * 768) * 512
    lines, warnings = plan(a_job(8), RICH)
    assert a_job(8).seconds(H100) == pytest.approx(flops / (0.4 * 989e12), rel=1e-4)
    assert lines[1] == "step        136 ms of computation at 396 TFLOP/s a GPU (assumed): 30,033 images/s"
    assert lines[2] == "run         100,000 steps, 320 epochs: 3.79 hours, 30.3 GPU-hours"
    assert warnings == []
    again = replace(a_job(8), activation_checkpointing=True)
    assert again.seconds(H100) == pytest.approx(4 / 3 * a_job(8).seconds(H100))
    measured = Device(tflops=0.2 * 989)
    assert a_job(8).seconds(measured) == 2 * a_job(8).seconds(H100)
    assert "(assumed)" not in plan(a_job(8), measured)[0][1]


def test_a_plan_is_short():
    for world in (1, 8, 64, 512, 4096):
        lines, warnings = plan(a_job(world, lanes=16), H100)
        assert len(lines) + len(warnings) <= 20
        assert max(map(len, lines)) <= 120
        assert all(warning.count(":") >= 2 for warning in warnings), "what: by what factor: what to change"


def test_rates_of_a_core_are_the_benchmarks():
    rows = json.loads((ROOT / "docs" / "benchmark_loader_cpu.json").read_text())["rows"]
    for case, (sample_bytes, rate) in {"full size": LARGE, "short side 256": SMALL}.items():
        (row,) = (r for r in rows if (r["benchmark"], r["case"], r["who"]) == ("loader", case, "ssl_vit"))
        assert rate == pytest.approx(row["images_per_second"], abs=0.5)
        assert core_rate(sample_bytes) == pytest.approx(rate)
    assert SMALL[1] < core_rate(0) < 10_000
    between = core_rate((SMALL[0] + LARGE[0]) / 2)
    assert 1 / between == pytest.approx((1 / SMALL[1] + 1 / LARGE[1]) / 2)


def test_loader_and_storage_by_hand():
    job = a_job(8)
    images = 512 / job.seconds(H100)
    cores, gigabytes = images / LARGE[1], 8 * images * LARGE[0] / 1e9
    for factor, expected in ((1.01, []), (0.99, ["loader", "storage"])):
        assert named(job, device(cores=cores * factor, storage_gbs=gigabytes * factor)) == expected
    slow = device(storage_gbs=gigabytes / 3)
    lines, warnings = plan(job, slow)
    assert warnings == ["storage: 3 times too slow: shards made with resize=256, or a copy on each node's own disk"]
    assert lines[2].endswith("11.4 hours with the worst of the limits below")
    shrunk = replace(job, sample_bytes=SMALL[0])
    assert named(shrunk, slow) == []
    assert "resize" not in plan(shrunk, H100.model_copy(update={"cores": 1}))[1][0]


def test_network_by_hand():
    """All-reduce of 4 bytes a parameter over a ring, behind 2/3 of the computation; a node's cards share it."""
    job = a_job(512, batch=65536)
    sent = 2 * 511 / 512 * 4 * job.parameters
    need = 8 * sent / (2 / 3 * job.seconds(H100)) / 8 / 1e9
    for factor, expected in ((1.01, []), (0.99, ["network"])):
        assert named(job, device(network_gbps=need * factor)) == expected
    fast, slow = (plan(job, device(network_gbps=need * factor))[0][2] for factor in (1, 0.5))
    hours = [float(re.findall(r"([\d.]+) hours", line)[-1]) for line in (fast, slow)]
    assert hours[1] / hours[0] == pytest.approx(1 + 2 / 3, rel=0.01), "the forward pass waits for nothing"
    (warning,) = plan(replace(job, micro_batch=64), device(network_gbps=need * 1.01))[1]
    assert warning.startswith("network: 2 times too slow"), "only the last micro batch hides it"
    lines = plan(a_job(8), device(network_gbps=1e-3))[0]
    assert any(line.startswith("network") and line.endswith("within the node") for line in lines)
    assert not any(line.startswith("network") for line in plan(a_job(1), RICH)[0])


def test_a_small_batch_starves_and_the_cure_feeds():
    (warning,) = plan(a_job(512), RICH)[1]
    assert warning.startswith("batch: 4.5 times too few images at once")
    (cure,) = re.findall(r"or (\d+) GPUs", warning)
    assert named(a_job(int(cure)), RICH) == []
    assert named(a_job(2 * int(cure)), RICH) == ["batch"]
    assert plan(a_job(8, micro_batch=4), RICH)[1][0].endswith("a larger micro_batch")


G = Vit(patch=14, width=1408, depth=40, heads=16, mlp=6144)


@pytest.mark.parametrize(
    ("encoder", "world"), [(Vit(), 1), pytest.param(Vit(size="L"), 8, marks=pytest.mark.process), (G, 8), (G, 64)]
)
def test_cures_of_too_little_memory(encoder: Vit, world: int):
    there = device(memory_gb=80 if world < 64 else 20)
    job = a_job(world, encoder)
    lines, (warning,) = plan(job, there)
    assert "take this" not in "".join(lines)
    assert warning.startswith("memory: ")
    (images, engine, gigabytes) = re.findall(r"micro_batch=(\d+) under (\w+), or .*\(([\d.]+) GB\)", warning)[0]
    cured = replace(job, micro_batch=int(images))
    assert any(line.startswith(f"  {engine} ") and "take this" in line for line in plan(cured, there)[0])
    assert job.memory(engine, 2 * int(images), False)[1] > 0.9e9 * there.gigabytes, "the largest is named"
    lines, warnings = plan(replace(job, activation_checkpointing=True), there)
    (taken,) = (line for line in lines if "take this" in line)
    assert float(re.findall(r"= +([\d.]+) GB", taken)[0]) == pytest.approx(float(gigabytes), rel=0.01)
    assert warnings == []


def test_the_first_engine_that_fits_is_taken():
    """g without images keeps 16.3 GB under ddp; the others less and less, but for the buckets of ZeRO-1 and 2."""
    job = a_job(64, G, batch=64)
    sizes = {engine: job.memory(engine, 1, False)[1] / 1e9 for engine in runtime.ENGINES}
    assert sizes["ddp"] > sizes["zero1"] > sizes["fsdp2"]
    for engine in ("ddp", "zero1", "fsdp2"):
        there = device(memory_gb=sizes[engine] * 1.001 / cluster.USABLE)
        (taken,) = (line.split()[0] for line in plan(job, there)[0] if "take this" in line)
        assert taken == engine
    alone = plan(replace(job, world=1, batch=1), RICH)[0]
    assert [line.split()[0] for line in alone if line.startswith("  ")] == ["ddp"]


def test_memory_by_hand():
    """What cost.memory is told: images, bf16 copies, whether gradients are accumulated; a tenth is left free."""
    job = a_job(8)
    images = cost.activation_bytes(Vit(), True, False)
    between, peak = job.memory("ddp", 512, False)
    assert between == 16 * job.parameters
    assert peak == between + 2 * job.parameters + 512 * images
    assert replace(job, micro_batch=64).memory("ddp", 64, False)[1] == peak + 4 * job.parameters - 448 * images
    in_fp32 = replace(job, bf16=False).memory("ddp", 512, False)
    assert in_fp32[1] == between + 512 * cost.activation_bytes(Vit(), False, False)
    for gigabytes, fits in ((peak / 0.899e9, True), (peak / 0.901e9, False)):
        lines = plan(job, device(memory_gb=gigabytes))[0]
        assert lines[4].startswith("  ddp ")
        assert ("take this" in lines[4]) == fits


def test_the_cure_is_an_engine_under_which_enough_images_fit():
    """Where ddp has room for one image of g, another engine for more."""
    job = a_job(64, G, batch=64 * 256)
    room = job.memory("ddp", 1, False)[1] * 1.001 / cluster.USABLE / 1e9
    (warning,) = plan(job, device(memory_gb=room))[1]
    (images, engine) = re.findall(r"micro_batch=(\d+) under (\w+)", warning)[0]
    assert engine != "ddp"
    assert int(images) >= job.enough(RICH)


def test_what_the_run_would_refuse_and_lanes_where_shards_are_remote():
    with pytest.raises(Refusal, match="batch=4096 cannot be shared by 500 processes; these can: 32, 64, 128, 256, 512"):
        plan(a_job(500), H100)
    (warning,) = plan(a_job(512, batch=512 * 64, lanes=16), RICH)[1]
    assert warning.startswith("data.lanes=16: each shard is fetched by 4 nodes: data.lanes=64")
    assert named(a_job(512, batch=512 * 64, lanes=64), RICH) == []
