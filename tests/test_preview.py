"""What dry_run foretells, beside what a real step on the CPU holds, what a real run leaves, and figures by hand."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_vit import config, forecast, recipe, rehearsal
from ssl_vit.data.stream import Share
from ssl_vit.exits import USAGE
from ssl_vit.gpus import GPUS, Device
from ssl_vit.heads.panel import cells, grid
from ssl_vit.model import Batch, Model
from ssl_vit.recipe import Finetune, Pretrain, Recipe, resolve
from ssl_vit.rehearsal import Trial, rehearse
from ssl_vit.sketch import images, sketch
from ssl_vit.train.environment import uses_bf16
from ssl_vit.wording import human, span
from tests.conftest import TINY
from tests.train.test_loop import refused, start

process = pytest.mark.process
IMAGES, CLASSES = 6, 5
H100 = Device()
SMALL = ["encoder.size=Ti", "encoder.width=64", "encoder.depth=3", "encoder.heads=2", "encoder.patch=8"]
SMALL += ["data.image_size=32,64"]


def made(schema: type[Recipe], *words: str) -> Recipe:
    return resolve(config.parse(schema, list(words), recipe.FOLDER))[0]


def model_of(of: Recipe, classes: int = 1) -> Model:
    encoder = of.encoder.build()
    return Model(encoder, of.head.build(encoder, classes))


def foretold(of: Recipe, classes: int = 1, images: int = IMAGES, device: str = "cpu", bf16: bool = False) -> Any:
    return forecast.memory(of, model_of(of, classes), classes, images, device, bf16)


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
    "mean colour": (Pretrain, SMALL),
    "sgd, no momentum": (Pretrain, [*SMALL, "optim.kind=sgd", "optim.momentum=0"]),
    "bf16": (Pretrain, [*SMALL, "precision=bf16"]),
    "computed again": (Pretrain, [*SMALL, "activation_checkpointing=true"]),
    "dropout": (Pretrain, [*SMALL, "encoder.dropout=0.1", "encoder.drop_path=0.2"]),
    "relative": (Pretrain, [*SMALL, "encoder.positions=relative"]),
    "pixels": (Pretrain, [*SMALL, "head.kind=patch_pixels"]),
    "cells": (Pretrain, [*SMALL, "head.kind=patch_colors", "head.unit=2"]),
    "large enough for oneDNN": (Pretrain, [*SMALL, "encoder.width=192"]),
    "transfer": (Finetune, SMALL),
    "mixup": (Finetune, [*SMALL, "head.mixup=0.8", "head.cutmix=1", "optim.kind=adamw"]),
    "hybrid": (Pretrain, [*SMALL, "encoder.stem=r50", "encoder.patch=32", "data.image_size=64"]),
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
    plain, again, less = (foretold(made(Pretrain, *SMALL, other)) for other in others)
    block = plain["activations"] - less["activations"]
    assert again["computed again"] == pytest.approx(block, rel=0.1)  # the last one computes fewer tokens


def test_on_a_gpu_weights_are_copied_to_bf16_and_activations_are_halves():
    of = made(Pretrain, *SMALL)
    cases = ((8, True), (16, True), (8, False))
    one, two, in_fp32 = (foretold(of, 1, images, "cuda", bf16)["activations"] for images, bf16 in cases)
    named = model_of(of).named_parameters()
    kernels = sum(2 * p.numel() for name, p in named if p.ndim > 1 and "embed" not in name)
    assert 2 * one - two == pytest.approx(kernels, rel=0.1)
    assert 1.2 < in_fp32 / one < 2


def train(run: Path, data: Path, *words: str) -> None:
    assert start(Pretrain, data, run, [*SMALL, *words]) == 0


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
        disk = forecast.disk(of, model_of(of))
        assert (disk["kept"], disk["in_the_making"], disk["exports"]) == (kept, making, 1), words


def test_hours_by_hand():
    """1e12 FLOPs an image: 1000 steps of 100 are 1e17, of which an A100 does 0.4 x 312e12 in a second."""
    words = [*TINY, "steps=1000", "batch=100"]
    of, alone = made(Pretrain, *words), Share(micro_batch=100)
    found = forecast.hours(Device(), 10**12, of, alone)
    assert next(iter(found)) == "H100"
    assert set(found) == set(forecast.SHOWN)

    def a100(of: Recipe = of, share: Share = alone, device: Device = H100) -> float:
        return forecast.hours(device, 10**12, of, share)["A100"]["hours"]

    once = 1e17 / (0.4 * 312e12) / 3600
    assert a100() == pytest.approx(once)
    assert a100(share=Share(0, 10, 10)) == pytest.approx(once / 10)
    known = forecast.hours(Device(gpu="a-100", tflops=100), 10**12, of, alone)
    assert next(iter(known)) == "A100"
    assert known["A100"]["hours"] == pytest.approx(1e17 / 100e12 / 3600)
    assert known["H100"]["hours"] == found["H100"]["hours"], "what was measured of one is not the other's"
    assert a100(device=Device(mfu=0.2)) == pytest.approx(2 * once)
    assert a100(made(Pretrain, *words, "activation_checkpointing=true")) == pytest.approx(4 / 3 * once)
    assert a100(made(Finetune, *words, "sweep.lr=0.1,0.2,0.3", "seeds=2")) == pytest.approx(5 * once)
    # small steps wait for their launches: two blocks at 0.8 ms, four times a step
    large, small = (forecast.hours(Device(), 10**n, of, Share(micro_batch=25))["H100"] for n in (12, 6))
    assert small["hours"] == pytest.approx(1000 * 4 * 2 * 0.8e-3 / 3600)
    assert small["launches"]
    assert not large["launches"]


def test_loaders_work_beside_the_step(monkeypatch: pytest.MonkeyPatch):
    """On two cores: one thread and a loader have one each; of two loaders one shares the training's."""
    monkeypatch.setattr(rehearsal.os, "sched_getaffinity", lambda _: {0, 1})
    cases = ((2, 1, 0, 3), (4, 1, 1, 4), (1, 4, 1, 4), (1, 4, 2, 2.5), (1.9, 0.3, 1, 1.9), (8, 4, 4, 8))
    for computed, data, workers, seconds in cases:
        assert rehearsal.together(computed, data, workers) == seconds


def test_a_gpu_is_known_whatever_its_capitals_and_another_is_refused_with_those_there_are():
    for name, known in GPUS.items():
        for written in (name, name.lower(), name.replace(" ", ""), name.replace(" ", "_")):
            assert Device(gpu=written).gpu == name
        assert Device(gpu=name).gigabytes == known.memory_gb
        assert Device(gpu=name, memory_gb=40).gigabytes == 40
    refused(USAGE, r"device.gpu: 'H900' is not in the table.*H100 PCIe, .*RTX 3090", made, Pretrain, "device.gpu=H900")


def test_what_fits_is_said_with_the_largest_that_does():
    parts = {"weights": 100, "activations": 800, "sum": 900}  # 100 an image
    assert [forecast.at_once(parts, 8, 24, room) for room in (2500, 2499, 500, 199)] == [24, 12, 4, 0]
    assert forecast.fits(parts, 8, 24, 1001e-9) == "fits"  # of which a tenth is left free
    assert forecast.fits(parts, 8, 24, 999e-9) == "fits with micro_batch=6"
    assert forecast.fits(parts, 8, 24, 100e-9) == "too small"


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
        assert found.step(3) == pytest.approx(3 * (0.003 + 0.002 * micro) + 0.005 + rehearsal.LOOP)


def test_a_trial_steps_as_a_training_does():
    of = made(Pretrain, *SMALL, "optim.clip=0.5", "optim.lr=0.1")
    torch.manual_seed(0)
    model = model_of(of)
    before = {name: value.clone() for name, value in model.named_parameters()}
    clip = torch.nn.utils.clip_grad_norm_
    with patch.object(rehearsal.nn.utils, "clip_grad_norm_", side_effect=clip) as clipped:
        found = rehearse(of, model, 8, 1, 1e5)
    assert not isinstance(found, str)
    assert (found.images, found.peak) == (8, None)
    assert min(found.update, found.passes) > 0
    assert {call.args[1] for call in clipped.call_args_list} == {0.5}
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_too_large_to_try_is_not_tried(monkeypatch: pytest.MonkeyPatch):
    of = made(Pretrain, *SMALL)
    monkeypatch.setattr(rehearsal, "free", lambda: 1000)
    assert "more than half of the free memory" in str(rehearse(of, None, 8, 501, 1))  # type: ignore[arg-type]
    monkeypatch.setattr(rehearsal, "Trial", Mock(side_effect=MemoryError))
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


def test_a_full_disk_and_too_little_memory_are_warned_of(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("ssl_vit.train.environment.memory", lambda: (0, 6_000_000))
    dry(tmp_path, shards, "batch=16")
    memory, disk = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "micro_batch=4 fits" in memory
    assert "1 kB are free" in disk


def test_bytes_and_hours_are_written_for_people():
    sizes = [human(size) for size in (0, 999, 1000, 85_600_000, 999_600_000, 3.21e12)]
    assert sizes == ["0 B", "999 B", "1 kB", "85.6 MB", "1 GB", "3.21 TB"]
    spans = [span(hours) for hours in (1e-5 / 3.6, 1 / 3600, 0.5, 3.76, 26_321)]
    assert spans == ["10 ms", "1 s", "30 minutes", "3.76 hours", "26,321 hours"]
