"""Data held out of training, timm's augmentation, whole images, names of samples."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_vit.data import augment, manifest
from ssl_vit.data.names import names
from ssl_vit.data.samples import Data, Samples
from ssl_vit.data.stream import EvaluationStream, Share, TrainingStream, parts
from ssl_vit.exits import DATA, Refusal
from tests.conftest import COLORS

CPU = torch.device("cpu")


@given(st.integers(200, 3000), st.floats(0.05, 0.95), st.floats(0.1, 1))
def test_what_is_held_out_and_what_is_trained_on_are_all_and_disjoint(samples: int, hold_out: float, share: float):
    """C5.2a"""
    trained, held = parts(samples, Data(hold_out=hold_out, subset=share))
    chosen = parts(samples, Data(subset=share))[0]
    assert sorted([*trained, *held]) == chosen.tolist()
    assert len(held) == round(len(chosen) * hold_out)
    assert not set(trained) & set(held)


def test_a_stream_trains_on_the_one_part_and_is_judged_on_the_other(shards: Path):
    made = manifest.load(shards / "train")
    config = Data(image_size=16, workers=0, hold_out=0.3)
    stream = TrainingStream(made, config, seed=1, batch=4)
    epoch = [next(stream.keys(4 * i, Share(micro_batch=4))) for i in range(stream.epoch_samples // 4 + 1)]
    trained = {sample for keys in epoch for _, sample in keys}
    judged = EvaluationStream(made, config, 4, parts(made.samples, config)[1])
    held = {sample for keys in judged.keys(Share(micro_batch=4)) for _, sample in keys} - {-1}
    assert trained | held == set(range(made.samples))
    assert not trained & held
    assert sum(int(batch["valid"].sum()) for batch in judged.batches(Share(micro_batch=4), CPU)) == len(held)
    two = [EvaluationStream(made, config, 2, parts(made.samples, config)[1]).keys(Share(r, 2, 2)) for r in range(2)]
    assert sorted(s for rank in two for keys in rank for _, s in keys if s >= 0) == sorted(held)


@pytest.mark.parametrize(("samples", "hold_out"), [(4, 0.1), (1, 0.5), (3, 0.9)])
def test_a_part_that_would_be_empty_is_refused(samples: int, hold_out: float):
    with pytest.raises(Refusal) as end:
        parts(samples, Data(hold_out=hold_out))
    assert end.value.code == DATA


def test_timms_augmentation_is_the_samples_own_and_leaves_other_draws_alone():
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random.seed(5)
    np.random.seed(5)
    want = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    once = augment.by_timm(image, "rand-m9-mstd0.5-inc1", seed=3)
    assert (random.random(), np.random.rand()) == want
    assert torch.equal(once, augment.by_timm(image, "rand-m9-mstd0.5-inc1", seed=3))
    assert any(not torch.equal(once, augment.by_timm(image, "rand-m9-mstd0.5-inc1", seed=s)) for s in range(4, 8))
    assert once.shape == image.shape
    assert once.dtype == torch.uint8


def test_augmentation_is_for_training_only(shards: Path):
    made = manifest.load(shards / "train")
    plain, changed = Data(image_size=16), Data(image_size=16, auto_augment="rand-m15-n4")
    keys = [(0, i) for i in range(8)]
    judged = [Samples(made, config, 0, training=False).batch(keys)[0]["image"] for config in (plain, changed)]
    assert torch.equal(*judged)
    trained = [Samples(made, config, 0, training=True).batch(keys)[0]["image"] for config in (plain, changed)]
    assert not torch.equal(*trained)


def test_a_whole_image_is_squeezed_and_never_cut(shards: Path):
    made = manifest.load(shards / "train")
    for training in (True, False):
        samples = Samples(made, Data(whole=True, crop_area=(0.1, 0.2), eval_crop=0.5), 0, training)
        assert samples.box(30, 50, seed=7) == augment.Box(0, 0, 30, 50)


def test_samples_are_called_what_their_images_were(shards: Path):
    made = manifest.load(shards / "val")
    found = names(made)
    assert len(found) == len(set(found)) == made.samples
    colors = sorted(COLORS)
    assert [name.split("/")[0] for name in found] == [colors[label] for label in made.labels]
    joined = manifest.join([made, manifest.load(shards / "train")])
    assert names(joined)[: made.samples] == found
    assert len(set(names(joined))) == joined.samples
