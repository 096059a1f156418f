"""Crops, flips and timm's augmentation are functions of the sample's seed; a crop stays within the image."""

import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_vit.data import augment, manifest
from ssl_vit.data.augment import RATIO, Box, central_box, crop_and_resize, random_box, should_flip
from ssl_vit.data.dataset import Data, SampleDataset
from tests.data.pictures import picture

SIDE, SEED = st.integers(1, 700), st.integers(0, 2**63 - 1)


def lies_inside(box: Box, height: int, width: int) -> bool:
    sides = box.height >= 1, box.top >= 0, box.top + box.height <= height
    return all((*sides, box.width >= 1, box.left >= 0, box.left + box.width <= width))


@given(SIDE, SIDE, SEED, st.sampled_from([(0.05, 1.0), (0.2, 0.3), (1.0, 1.0), (1e-6, 1e-5)]))
def test_a_random_box_lies_in_the_image(height: int, width: int, seed: int, area: tuple[float, float]):
    box = random_box(height, width, area, seed)
    assert lies_inside(box, height, width)
    assert lies_inside(box.halved(), (height + 1) // 2, (width + 1) // 2)
    assert box == random_box(height, width, area, seed)


def test_random_boxes_keep_to_their_area_and_ratio_and_fill_both():
    """The ratio is that of the paper, one over the other; narrow areas are kept too."""
    assert math.isclose(RATIO[0] * RATIO[1], 1)
    boxes = [random_box(300, 400, (0.05, 1.0), seed) for seed in range(1000)]
    shares = np.array([box.height * box.width / 120_000 for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.049 < shares.min() <= shares.max() <= 1
    assert RATIO[0] * 0.98 < ratios.min() <= ratios.max() < RATIO[1] * 1.02
    assert np.histogram(shares, bins=5, range=(0.05, 1))[0].min() > 30  # the largest fit seldom
    assert abs(np.log(ratios).mean()) < 0.05
    assert len({(box.top, box.left) for box in boxes}) > 900
    centers = np.array([[box.top + box.height / 2, box.left + box.width / 2] for box in boxes]).mean(0)
    assert np.abs(centers - [150, 200]).max() < 10
    narrow = [b.height * b.width / 90_000 for b in (random_box(300, 300, (0.2, 0.3), seed) for seed in range(300))]
    assert 0.195 < min(narrow) <= max(narrow) < 0.305


@pytest.mark.parametrize(("height", "width"), [(10, 500), (500, 10), (1, 1), (1, 300)])
def test_an_image_too_long_for_any_crop_gives_its_center(height: int, width: int):
    box = random_box(height, width, (0.9, 1.0), 3)
    assert lies_inside(box, height, width)
    assert abs((height - box.height) // 2 - box.top) <= 1
    assert abs((width - box.width) // 2 - box.left) <= 1


@given(SIDE, SIDE, st.floats(0.2, 5), st.floats(0.01, 1))
def test_the_central_box_is_central_and_as_large_as_asked(height: int, width: int, ratio: float, share: float):
    box = central_box(height, width, (ratio, ratio), share)
    assert lies_inside(box, height, width)
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1
    largest = min(width, height * ratio)
    assert box.width == pytest.approx(max(1, largest * share), abs=1)
    assert box.height == pytest.approx(max(1, largest / ratio * share), abs=1 + 0.5 / ratio)


def test_half_are_mirrored_whatever_the_crop():
    share = sum(map(should_flip, range(4000))) / 4000
    assert abs(share - 0.5) < 0.03  # 3.8 standard deviations
    assert should_flip(7) == should_flip(7)
    lefts = [(should_flip(seed), random_box(300, 400, (0.3, 0.5), seed).left) for seed in range(1000)]
    means = [np.mean([left for flip, left in lefts if flip == side]) for side in (False, True)]
    assert abs(means[0] - means[1]) < 15


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (7, 90)])
def test_resizing_agrees_with_pillow(size: tuple[int, int]):
    """A box of the right size is copied as it is."""
    image = picture(2, 61, 80)
    pixels, box = np.asarray(image).copy(), Box(5, 9, 50, 64)
    actual = crop_and_resize(pixels, box, size, flip=False)
    expected = image.crop((9, 5, 73, 55)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    assert actual.dtype == torch.uint8
    assert np.abs(actual.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1
    assert torch.equal(crop_and_resize(pixels, box, size, flip=True), actual.flip(2))
    copied = crop_and_resize(pixels, Box(2, 3, 16, 20), (16, 20), False).permute(1, 2, 0)
    assert np.array_equal(copied, pixels[2:18, 3:23])


def test_timms_augmentation_is_the_samples_own_and_leaves_other_draws_alone():
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment_image = lambda seed: augment.timm_augment(image, "rand-m9-mstd0.5-inc1", seed=seed)  # noqa: E731
    random_states = lambda: pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: E731
    before, augmented = random_states(), augment_image(3)
    assert random_states() == before
    assert torch.equal(augmented, augment_image(3))
    assert any(not torch.equal(augmented, augment_image(seed)) for seed in range(4, 8))
    assert (augmented.shape, augmented.dtype) == (image.shape, torch.uint8)


def test_augmentation_is_for_training_only(shards: Path):
    dataset = manifest.load(shards / "train")
    default, changed = Data(image_size=16), Data(image_size=16, auto_augment="rand-m15-n4")
    keys = [(0, i) for i in range(8)]
    for training in (False, True):
        default_image, changed_image = (
            SampleDataset(dataset, config, 0, training).batch(keys)[0]["image"] for config in (default, changed)
        )
        assert torch.equal(default_image, changed_image) == (not training)


def test_a_whole_image_is_squeezed_and_never_cut(shards: Path):
    dataset = manifest.load(shards / "train")
    for training in (True, False):
        samples = SampleDataset(dataset, Data(crop="none", crop_area=(0.1, 0.2), eval_crop=0.5), 0, training)
        assert samples.crop_box(30, 50, seed=7) == Box(0, 0, 30, 50)
