"""Batches: the same bits on any number of workers and processes, from any position."""

import hashlib
import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, make, one, picture
from PIL import Image
from pydantic import ValidationError

from ssl_vit.counter import sample_seed
from ssl_vit.data.augment import flips
from ssl_vit.data.manifest import Manifest
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream, parts
from ssl_vit.model import Batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has
CPU = torch.device("cpu")
COUNT = 30
SMALL: dict[str, Any] = {"image_size": 16, "workers": 0, "lanes": 3, "window": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """30 images of two classes in 8 shards: JPEG, of which some are large enough for half scale, and PNG."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(COUNT):
        path = folder / "in" / "ab"[number % 2] / f"{number}.{'png' if number % 3 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 90 if number % 5 == 0 else 20 + number
        path.write_bytes(encoded(picture(number, side, side + 7), "PNG" if path.suffix == ".png" else "JPEG"))
    return one(folder / "in", folder / "out", shard_samples=4)


def config(**options: Any) -> Data:
    return Data(**{**SMALL, **options})


def digest(batches: list[Batch]) -> str:
    """Of all pixels, labels, seeds and flags, in their order and wherever batches are cut."""
    names = ("image", "label", "seed", "valid")
    parts = [torch.cat([batch[name] for batch in batches]).numpy().tobytes() for name in names]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def train(shards: Manifest, first: int, steps: int, share: Share, batch: int = 8, **options) -> list[Batch]:
    """All micro batches of one process from step `first` on."""
    stream = TrainingStream(shards, config(**options), seed=5, batch=batch)
    micro_batches = steps * batch // share.world // share.micro_batch
    return list(itertools.islice(stream.batches(first * batch, share, CPU), micro_batches))


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def distance(got: torch.Tensor, wanted: Image.Image) -> float:
    return float((got.permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()).abs().float().mean())


def test_a_batch_is_what_the_contract_says(shards: Manifest):
    stream = TrainingStream(shards, config(image_size=(16, 24)), seed=5, batch=8)
    (keys,) = itertools.islice(stream.keys(0, Share(0, 1, 8)), 1)
    batch = next(stream.batches(0, Share(0, 1, 8), CPU))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "image": (torch.uint8, (8, 3, 16, 24)),
        "label": (torch.int64, (8,)),
        "seed": (torch.int64, (8,)),
        "valid": (torch.bool, (8,)),
    }
    assert keys == stream.plan.batch(0)
    assert batch["seed"].tolist() == [sample_seed(5, epoch, sample) for epoch, sample in keys]
    assert batch["label"].tolist() == [int(shards.labels[sample]) for _, sample in keys]
    assert batch["valid"].all()


def test_each_epoch_brings_each_sample_once_under_a_new_seed(shards: Manifest):
    batch = train(shards, 0, 1, Share(0, 1, 3 * COUNT), batch=3 * COUNT)[0]
    wanted = [sample_seed(5, epoch, sample) for epoch in range(3) for sample in range(COUNT)]
    assert sorted(batch["seed"].tolist()) == sorted(wanted)
    assert len(set(wanted)) == 3 * COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_processes_change_no_bit(shards: Manifest, workers: int):
    """8 steps of 8 pass the end of an epoch; world 2 in micro batches of 2 is concatenated step by step."""
    wanted = digest(train(shards, 0, 8, Share(0, 1, 8)))
    assert digest(train(shards, 0, 8, Share(0, 1, 8), workers=workers)) == wanted
    ranks = [train(shards, 0, 8, Share(rank, 2, 2), workers=workers) for rank in range(2)]
    together = [micro for step in range(8) for rank in ranks for micro in rank[2 * step : 2 * step + 2]]
    assert digest(together) == wanted


def test_resuming_at_any_step_changes_no_bit(shards: Manifest):
    whole = train(shards, 0, 10, Share(0, 1, 8))
    for step in range(1, 10):
        assert digest(train(shards, step, 10 - step, Share(0, 1, 8))) == digest(whole[step:])
    assert digest(train(shards, 9, 1, Share(0, 1, 8), workers=1)) == digest(whole[9:])


def test_another_batch_size_goes_on_with_the_same_samples(shards: Manifest):
    seeds = torch.cat([batch["seed"] for batch in train(shards, 0, 12, Share(0, 1, 8))]).tolist()
    half = [batch["seed"] for batch in train(shards, 12, 12, Share(0, 1, 4), batch=4)]
    assert sorted(torch.cat(half).tolist()) == sorted(seeds[48:])


def test_the_seed_alone_decides_crop_and_flip(shards: Manifest):
    images = [train(shards, 0, 4, Share(0, 1, 8), **options) for options in ({}, {"lanes": 1}, {"window": 3})]
    seen = [{int(s): i for b in run for s, i in zip(b["seed"], b["image"], strict=True)} for run in images]
    common = set.intersection(*map(set, seen))
    assert len(common) >= COUNT  # all of the first epoch
    assert all(torch.equal(seen[0][s], other[s]) for s in common for other in seen[1:])


def test_evaluation_takes_each_sample_once(shards: Manifest):
    stream = EvaluationStream(shards, config(), batch=4)
    for world in (1, 2, 3):
        ranks = [list(stream.batches(Share(rank, world, 4), CPU)) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {-(-COUNT // (4 * world))}
        batches = [batch for step in zip(*ranks, strict=True) for batch in step]
        valid = torch.cat([batch["valid"] for batch in batches])
        assert valid.sum() == COUNT
        assert torch.cat([batch["label"] for batch in batches])[valid].tolist() == shards.labels.tolist()
        assert (torch.cat([batch["label"] for batch in batches])[~valid] == -1).all()
        assert all(len(batch["image"]) == 4 for batch in batches)


def test_evaluation_sees_the_upright_centre_and_never_changes(shards: Manifest):
    samples = Samples(shards, config(eval_crop=0.5), seed=0, training=False)
    for sample in range(COUNT):
        data, _ = samples.read(sample)
        image = picture_of(data)
        side = round(min(image.size) * 0.5)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        centre = image.resize((16, 16), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        for seed in (0, 1):
            assert distance(samples.crop(data, seed), centre) < 6


@pytest.mark.parametrize(("size", "bound"), [((130, 150), 0.7), ((20, 24), 5)], ids=["full scale", "half scale"])
def test_a_crop_is_what_pillow_makes_of_the_same_box(size: tuple[int, int], bound: float):
    """A large JPEG is decoded at half its size, where the box is rounded by at most a pixel."""
    samples = Samples(Manifest(Path(), {}, [], []), config(image_size=size), seed=0, training=True)
    image = picture(1, 211, 303)
    data = encoded(image, "JPEG", quality=95)
    for seed in range(40):
        box = samples.box(211, 303, seed)
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        wanted = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, edges)
        if flips(seed):
            wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert distance(samples.crop(data, seed), wanted) < bound


@pytest.mark.parametrize("samples", [1, 2, 10, 1000])
def test_subsets_are_nested_and_of_the_right_size(samples: int):
    shares = [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]
    nested = [parts(samples, Data(subset=share))[0].tolist() for share in shares]
    assert [len(part) for part in nested] == [max(1, round(samples * share)) for share in shares]
    assert all(part == sorted(set(part)) for part in nested)
    assert all(set(small) <= set(large) for small, large in itertools.pairwise(nested))
    assert nested[-1] == list(range(samples))


def test_an_epoch_of_a_subset_is_the_subset(shards: Manifest):
    """Also where some shards have no sample in it."""
    for share in (0.1, 0.5):
        stream = TrainingStream(shards, config(subset=share), seed=5, batch=4)
        chosen = parts(COUNT, Data(subset=share))[0].tolist()
        assert stream.epoch_samples == len(chosen) == round(COUNT * share)
        taken = [pair for keys in itertools.islice(stream.keys(0, Share(0, 1, 4)), 3 * len(chosen)) for pair in keys]
        assert Counter(taken) == Counter((epoch, sample) for epoch in range(12) for sample in chosen)
        batch = next(stream.batches(0, Share(0, 1, 4), CPU))
        assert batch["seed"].tolist() == [sample_seed(5, *pair) for pair in taken[:4]]


def test_the_validation_split_is_as_the_training_split(tmp_path: Path):
    """From images to both streams, labels and all."""
    for number in range(40):
        path = tmp_path / "in" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (60 * (number % 4), 0, 0)).save(path)
    made = make(tmp_path / "in", tmp_path / "out", val_fraction=0.3)
    (trained,) = train(made["train"], 0, 1, Share(0, 1, made["train"].samples), batch=made["train"].samples)
    batches = list(EvaluationStream(made["val"], config(), batch=40).batches(Share(), CPU))
    seen = [(b["label"][b["valid"]], b["image"][b["valid"]]) for b in (trained, *batches)]
    for labels, images in seen:
        assert (images[:, 0] == (60 * labels)[:, None, None]).all()
        assert not images[:, 1:].any()
    assert sum(len(labels) for labels, _ in seen) == 40


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"image_size": (32, -1)},
        {"crop_area": (0.5, 0.1)},
        {"crop_area": (0.0, 0.0)},
        {"crop_area": (0.5, 2.0)},
        {"subset": 0},
        {"eval_crop": 0},
        {"workers": -1},
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Data(**options)
