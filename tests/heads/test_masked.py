"""The masked objectives beside mean colour, their corruption and their pictures, against plain loops (C2.x, C8.x)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_vit import codebook, config, recipe, session
from ssl_vit.codebook import FitClusters
from ssl_vit.counter import words
from ssl_vit.data.shards import MakeShards, convert
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import CANNOT_CREATE, DATA, MISMATCH, PREEMPTED, USAGE, Refusal
from ssl_vit.heads import clusters
from ssl_vit.heads.corruption import (
    BLOCKS,
    KEEP,
    MASK,
    SWAP,
    Corruption,
    block_shapes,
    counts,
    draw,
    draw_blocks,
    draw_units,
)
from ssl_vit.heads.masked import copying
from ssl_vit.heads.mean_color import MeanColor, colors, labels
from ssl_vit.heads.panel import LEGIBLE, cells, grid
from ssl_vit.heads.patch_colors import PatchColors
from ssl_vit.heads.patch_pixels import PatchPixels
from ssl_vit.recipe import Pretrain
from ssl_vit.train import loop
from tests.conftest import TINY
from tests.train.test_loop import StopAfter, fresh_accelerate, rows  # noqa: F401

PAPER = (0.8, 0.1, 0.1)
SIDE, PATCH = 16, 4  # a grid of 4 x 4
ROWS = (0.2, 0.5, 0.8)
WAYS: dict[str, dict[str, Any]] = {
    "single": {},
    "units": {"unit": 2, "mix": (0.5, 0.3, 0.2)},
    "blocks": {"blocks": True},
}
KINDS = ("mean_color", "patch_colors", "pixels", "normalised", "colors", "patches")


def codebook_of(folder: Path, space: str, patch: int = PATCH, count: int = 7, seed: int = 2) -> str:
    width = 3 if space == "color" else 3 * patch**2
    centers = torch.rand(count, width, generator=torch.Generator().manual_seed(seed))
    clusters.write(folder / f"{space}.safetensors", centers, {"space": space})
    return str(folder / f"{space}.safetensors")


def head_config(kind: str, folder: Path, **way: Any) -> Any:
    if kind in ("colors", "patches"):
        return clusters.Clusters(codebook=codebook_of(folder, {"colors": "color", "patches": "patch"}[kind]), **way)
    if kind in ("pixels", "normalised"):
        return PatchPixels(normalise=kind == "normalised", **way)
    return {"mean_color": MeanColor, "patch_colors": PatchColors}[kind](**way)


def make(kind: str, folder: Path, encoder: Any = None, **way: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    given = encoder or Vit(size="Ti", width=32, depth=2, heads=2, patch=PATCH, image=SIDE)
    made = given.build()
    return made, head_config(kind, folder, **way).build(made, classes=0)


def batch(count: int = 5, side: int = SIDE) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 64, (count, 3, side, side), generator=random)
    color = torch.randint(0, 192, (count, 3, side // 4, side // 4), generator=random)
    return {
        "image": (noise + color.repeat_interleave(4, 2).repeat_interleave(4, 3)).to(torch.uint8),
        "label": torch.full((count,), -1),
        "seed": torch.arange(count) * 977 + 5,
        "valid": torch.ones(count, dtype=torch.bool),
    }


def patches_of(image: Tensor, patch: int) -> np.ndarray:
    """[B, N, C, P, P] by a plain loop over rows and columns."""
    cut = []
    for picture in image.numpy():
        for top in range(0, picture.shape[1], patch):
            for left in range(0, picture.shape[2], patch):
                cut.append(picture[:, top : top + patch, left : left + patch])
    return np.stack(cut).reshape(len(image), -1, image.shape[1], patch, patch)


def color_class(cell: np.ndarray) -> int:
    """512-way, of [3, h, w]: in integers, as reference 2.4 has it."""
    red, green, blue = (min(7, 8 * int(channel.astype(int).sum()) // (255 * channel.size)) for channel in cell)
    return 64 * red + 8 * green + blue


def by_hand(kind: str, head: Any, encoder: Any, image: Tensor) -> np.ndarray:
    """The target of each patch, [B, N, ...]."""
    cut = patches_of(image, PATCH)
    if kind == "mean_color":
        return np.array([[[color_class(patch)] for patch in one] for one in cut])
    if kind == "patch_colors":
        cells = [[patch[:, r : r + 1, c : c + 1] for r in range(4) for c in range(4)] for one in cut for patch in one]
        return np.array([[color_class(cell) for cell in one] for one in cells]).reshape(*cut.shape[:2], 16)
    flat = cut.reshape(*cut.shape[:2], -1).astype(np.float64)
    if kind in ("pixels", "normalised"):
        flat = flat / 127.5 - 1
        if kind == "normalised":
            flat = (flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + 1e-6)
        return flat
    points = (flat if kind == "patches" else cut.reshape(*cut.shape[:3], -1).mean(3)) / 255
    distance = ((points[:, :, None] - head.centers.double().numpy()) ** 2).sum(3)
    return distance.argmin(2)[:, :, None]


@pytest.mark.parametrize("kind", KINDS)
def test_targets_agree_with_a_plain_loop(kind, tmp_path):
    encoder, head = make(kind, tmp_path)
    image = batch()["image"]
    got, want = head.target(encoder, image).numpy(), by_hand(kind, head, encoder, image)
    assert got.shape == want.shape
    if kind in ("pixels", "normalised"):
        np.testing.assert_allclose(got, want, atol=2e-5)
    else:
        assert len(np.unique(want)) > 3  # neither of them says the same of all
        np.testing.assert_array_equal(got, want)


def test_cells_of_a_patch_are_area_means_in_raster_order(tmp_path):
    """C2.12: 16 flat cells give their 16 labels, and the patch's mean colour the label of their mean."""
    encoder, head = make("patch_colors", tmp_path, Vit(size="Ti", width=32, depth=1, heads=2, patch=8, image=(8, 16)))
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (2, 16, 3))
    image = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    for patch in range(2):
        for cell in range(16):
            top, left = 2 * (cell // 4), 8 * patch + 2 * (cell % 4)
            image[0, :, top : top + 2, left : left + 2] = torch.from_numpy(cells[patch, cell])[:, None, None]
    want = [
        [64 * (r * 8 // 255) + 8 * (g * 8 // 255) + b * 8 // 255 for r, g, b in np.minimum(one, 254)] for one in cells
    ]
    assert head.target(encoder, image)[0].tolist() == want
    mean = [[min(7, int(s) * 8 // (16 * 255)) for s in one.sum(0)] for one in cells]
    assert labels(image, 8)[0].tolist() == [64 * r + 8 * g + b for r, g, b in mean]
    noise = image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8)  # a cell is its mean, not one of its pixels
    by_mean = [
        color_class(patch[:, r : r + 2, c : c + 2])
        for patch in patches_of(noise, 8)[0]
        for r in range(0, 8, 2)
        for c in range(0, 8, 2)
    ]
    assert head.target(encoder, noise)[0].flatten().tolist() == by_mean


def test_cells_want_patches_that_four_divides(tmp_path):
    with pytest.raises(ValueError, match="6 is no multiple"):
        make("patch_colors", tmp_path, Vit(size="Ti", width=32, depth=1, heads=2, patch=6, image=12))


@pytest.mark.parametrize("normalise", [False, True])
def test_predicting_the_pixels_costs_nothing(normalise, tmp_path):
    """C2.13, C8.5"""
    given = Vit(size="Ti", width=32, depth=1, heads=2, patch=16, image=32)
    encoder, head = make("normalised" if normalise else "pixels", tmp_path, given)
    assert head.linear.out_features == 768
    image = batch(3, side=32)["image"]
    image[0, :, :16, :16] = 77  # flat: nothing to divide by
    image[1, 0, 0, :2] = torch.tensor([0, 255])
    target = head.target(encoder, image)
    assert target.shape == (3, 4, 768)
    assert head.cost(target, target)[0].tolist() == [0, 0, 0]
    if normalise:
        assert target[0, 0].abs().max() < 1e-3
        rest = target.flatten(0, 1)[1:].double()
        assert rest.mean(1).abs().max() < 1e-6
        assert (rest.std(1, unbiased=False) - 1).abs().max() < 1e-5
    else:
        assert float(target.min()) == -1
        assert float(target.max()) == 1
    loss, _ = head.cost(target + 0.5, target)
    torch.testing.assert_close(loss, torch.full((3,), 0.25))


@pytest.mark.parametrize(
    ("kind", "classes"), [("mean_color", 512), ("patch_colors", 512), ("colors", 7), ("patches", 7)]
)
def test_the_first_loss_is_that_of_a_blind_guess(kind, classes, tmp_path):
    """C2.7, after averaging over cells; ln K of K clusters."""
    encoder, head = make(kind, tmp_path)
    output = head(encoder, batch())
    report = head.report(output.sums, float(output.weight))
    assert output.loss.item() == pytest.approx(math.log(classes), abs=1e-5)
    assert report["loss"] == pytest.approx(math.log(classes), abs=1e-5)
    assert report["uniform"] == math.log(classes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_report_by_hand(kind, way, tmp_path):
    """Over all corrupted patches of valid images: the loss, accuracy, and label entropy and top label by numpy."""
    encoder, head = make(kind, tmp_path, **WAYS[way])
    nn.init.normal_(head.linear.weight, std=0.3)
    given = batch()
    given["valid"][3] = False
    plan = head.draw(given["seed"])
    with torch.no_grad():
        output = head(encoder, given)
        made = encoder(given["image"], edit=lambda patches: plan.apply(patches, head.mask_token))
        made = head.linear(made[:, 1:]).double().numpy()
    target = by_hand(kind, head, encoder, given["image"])
    loss, right, found = [], [], []
    for b in (0, 1, 2, 4):
        for i in plan.index[b].tolist():
            if kind in ("pixels", "normalised"):
                loss.append(((made[b, i] - target[b, i]) ** 2).mean())
                found.extend(target[b, i].tolist())
                continue
            for logits, label in zip(made[b, i].reshape(target.shape[2], -1), target[b, i], strict=True):
                loss.append(np.log(np.exp(logits).sum()) - logits[label])
                right.append(logits.argmax() == label)
                found.append(label)
    report = head.report(output.sums, float(output.weight))
    assert output.weight == 4
    assert output.loss.item() == pytest.approx(np.mean(loss), rel=1e-5)
    assert report["loss"] == pytest.approx(np.mean(loss), rel=1e-5)
    if kind in ("pixels", "normalised"):
        assert report["variance"] == pytest.approx(np.var(found), rel=1e-4)
        return
    share = np.unique(found, return_counts=True)[1] / len(found)
    assert report["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)
    assert report["unigram_entropy"] == pytest.approx(-(share * np.log(share)).sum(), rel=1e-5)
    assert report["top_label"] == pytest.approx(share.max(), rel=1e-6)


def test_one_label_has_no_entropy(tmp_path):
    encoder, head = make("mean_color", tmp_path)
    output = head(encoder, batch() | {"image": torch.zeros(5, 3, SIDE, SIDE, dtype=torch.uint8)})
    report = head.report(output.sums, float(output.weight))
    assert report["top_label"] == 1
    assert report["unigram_entropy"] == 0


# corruption


def drawn(
    way: str, count: int, grid: tuple[int, int], ratio: float = 0.5, mix: tuple[float, float, float] = PAPER
) -> Corruption:
    seeds = torch.arange(count)
    if way == "blocks":
        shapes = torch.tensor(block_shapes(grid, sum(counts(grid[0] * grid[1], ratio, mix))))
        return draw_blocks(seeds, grid, shapes, ratio, mix)
    return draw_units(seeds, grid, 2, ratio, mix) if way == "units" else draw(seeds, grid[0] * grid[1], ratio, mix)


def check(plan: Corruption, patches: int, fates: tuple[int, int, int]) -> None:
    """Exact counts, no patch twice, sources elsewhere."""
    assert plan.index.shape == plan.fate.shape == plan.source.shape == (len(plan.index), sum(fates))
    assert (plan.index.sort(1).values.diff(dim=1) > 0).all()
    assert int(plan.index.min()) >= 0
    assert int(plan.index.max()) < patches
    for fate, count in zip((MASK, SWAP, KEEP), fates, strict=True):
        assert (plan.fate == fate).sum(1).unique().tolist() == [count]
    swapped = plan.fate == SWAP
    assert (plan.source != plan.index)[swapped].all()
    assert torch.equal(plan.source[~swapped], plan.index[~swapped])
    assert int(plan.source.min()) >= 0
    assert int(plan.source.max()) < patches


def test_fates_fall_alike_on_the_rectangle_that_was_cut():
    """Rows of 8 until 12 patches are covered: half of the second row; it is masked as often as the first."""
    plan = draw_blocks(torch.arange(4000), (8, 8), torch.tensor([[1, 8]]), 12 / 64, (0.5, 0.25, 0.25))
    row = plan.index // 8
    covered = torch.nn.functional.one_hot(row, 8).sum(1)
    assert covered.sort(1).values.unique(dim=0).tolist() == [[0, 0, 0, 0, 0, 0, 4, 8]]
    cut = covered.gather(1, row) == 4
    assert float((plan.fate == MASK)[cut].float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((plan.fate == SWAP)[cut].float().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("mix", [PAPER, (1.0, 0.0, 0.0), (0.4, 0.4, 0.2)])
def test_units_are_corrupted_as_one(mix):
    """C8.3: SimMIM's 30 of 49 units, 120 of 196 patches; a unit's patches share their fate and swap with one unit."""
    plan = drawn("units", 200, (14, 14), 0.6, mix)
    masked, swapped, kept = counts(49, 0.6, mix, up=True)
    assert masked + swapped + kept == 30
    check(plan, 196, (4 * masked, 4 * swapped, 4 * kept))
    fate = torch.full((200, 196), -1).scatter(1, plan.index, plan.fate)
    units = fate.unflatten(1, (7, 2, 7, 2)).transpose(2, 3).flatten(3)
    assert torch.equal(units, units[..., :1].expand_as(units))
    step = torch.zeros(200, 196, dtype=torch.long).scatter(1, plan.index, plan.source - plan.index)
    step = step.unflatten(1, (7, 2, 7, 2)).transpose(2, 3).flatten(3)
    assert torch.equal(step, step[..., :1].expand_as(step))
    source = plan.source.unflatten(1, (30, 4))
    row, column = source // 14, source % 14
    assert (row.amin(2) % 2 == 0).all()
    assert (column.amin(2) % 2 == 0).all()
    assert (row.amax(2) == row.amin(2) + 1).all()
    assert (column.amax(2) == column.amin(2) + 1).all()


@pytest.mark.parametrize(
    ("grid", "unit", "ratio", "want"), [((8, 8), 2, 0.6, 40), ((4, 6), 2, 0.5, 12), ((6, 9), 3, 0.4, 27)]
)
def test_units_of_other_grids(grid, unit, ratio, want):
    plan = draw_units(torch.arange(50), grid, unit, ratio, (1, 0, 0))
    check(plan, grid[0] * grid[1], (want, 0, 0))
    seen = torch.zeros(50, grid[0] * grid[1]).scatter(1, plan.index, 1.0)
    seen = seen.unflatten(1, (grid[0] // unit, unit, grid[1] // unit, unit))
    assert set(seen.mean((2, 4)).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("ratio", "grid"), [(0.4, (14, 14)), (0.5, (14, 14)), (0.9, (14, 14)), (0.5, (7, 12)), (0.5, (4, 4))]
)
def test_rectangles_cover_exactly_as_many(ratio, grid):
    check(drawn("blocks", 300, grid, ratio), grid[0] * grid[1], counts(grid[0] * grid[1], ratio, PAPER))


def test_rectangles_are_beits():
    """C8.2: 16 patches or more, sides from 0.3 to 1/0.3 of one another to rounding, and of many kinds."""
    shapes = block_shapes((14, 14), 98)
    areas = [height * width for height, width in shapes]
    assert min(areas) >= 16
    assert max(areas) <= 98 + 14  # sides are rounded
    assert max(areas) > 90
    for height, width in shapes:
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 1 / 0.3
    assert sum(h > w for h, w in shapes) == pytest.approx(sum(h < w for h, w in shapes), abs=2)
    assert all(h <= 7 and w <= 12 and h * w >= 7 for h, w in block_shapes((7, 12), 42))


def test_rectangles_agree_with_a_plain_loop():
    """One after the other until K are covered, the last one cut at random; the same words of the counter."""
    grid, ratio, patches = (14, 14), 0.5, 196
    shapes, plan = block_shapes(grid, 98), drawn("blocks", 25, grid, ratio)
    for b in range(25):
        random = words(b, 2 * patches + 3 * BLOCKS).astype(np.int64)
        which, top, left = (random[2 * patches :] & (1 << 62) - 1).reshape(3, BLOCKS)
        covered: list[int] = []
        for number in range(BLOCKS):
            height, width = shapes[which[number] % len(shapes)]
            assert height * width >= 16
            row, column = top[number] % (14 - height + 1), left[number] % (14 - width + 1)
            cells = {r * 14 + c for r in range(row, row + height) for c in range(column, column + width)}
            fresh = sorted(cells - set(covered), key=lambda cell: random[cell])
            covered += fresh[: 98 - len(covered)]
        assert len(covered) == 98
        assert sorted(plan.index[b].tolist()) == sorted(covered)


def test_rectangles_have_no_favourite_side():
    """Each position is as often corrupted as its mirror images, fates are uniform among them, and so are sources."""
    count = 4000
    plan = drawn("blocks", count, (14, 14))
    frequency = torch.zeros(196).scatter_add_(0, plan.index.flatten(), torch.ones(count * 98)).view(14, 14) / count
    error = 5 * math.sqrt(2 * 0.25 / count)
    for mirrored in (frequency.flip(0), frequency.flip(1), frequency.T, frequency.rot90()):
        assert (frequency - mirrored).abs().max() < error
    assert frequency.max() - frequency.min() > error  # the middle is in more rectangles, as in BEiT
    assert float(frequency.mean()) == pytest.approx(0.5)
    hit = plan.index.flatten()
    masked = torch.zeros(196).scatter_add_(0, hit, (plan.fate == MASK).float().flatten()) / hit.bincount(minlength=196)
    assert (masked - 78 / 98).abs().max() < 5 * math.sqrt(0.16 / (count * float(frequency.min())))
    step = ((plan.source - plan.index) % 196)[plan.fate == SWAP].bincount(minlength=196) / (10 * count)
    assert step[0] == 0
    assert (step[1:] - 1 / 195).abs().max() < 5 * math.sqrt(1 / 195 / (10 * count))


def test_units_are_uniform():
    count = 4000
    plan = drawn("units", count, (8, 8), 0.5)
    frequency = plan.index.flatten().bincount(minlength=64) / count
    assert (frequency - 0.5).abs().max() < 5 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("way", WAYS)
def test_a_draw_is_a_function_of_its_seed(way, tmp_path):
    _, head = make("mean_color", tmp_path, **WAYS[way])
    seeds = torch.tensor([5, 2**62 + 3, 9])
    together = head.draw(seeds)
    for b, seed in enumerate(seeds):
        torch.manual_seed(b)
        alone = head.draw(seed[None])
        for one, other in zip(
            (together.index, together.fate, together.source), (alone.index, alone.fate, alone.source), strict=True
        ):
            assert torch.equal(one[b], other[0])
    assert len({tuple(row) for row in together.index.tolist()}) == 3


ENCODERS = {
    "vit": Vit(size="Ti", width=32, depth=1, heads=2, patch=PATCH, image=SIDE, positions="none"),
    "axial": Axial(size="Ti", width=32, depth=1, heads=2, patch=PATCH, image=SIDE, positions="none"),
    "hybrid": Vit(size="Ti", width=32, depth=1, heads=2, patch=16, image=64, stem="r50", positions="none"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_enters_the_blocks(encoder, way, tmp_path):
    """Clean and kept patches bit for bit, the mask embedding, and clean patches from elsewhere."""
    given = ENCODERS[encoder]
    made, head = make("pixels", tmp_path, given, **WAYS[way])
    samples, seen = batch(3, given.image), []
    made.pos_drop.register_forward_hook(lambda _module, x, _out: seen.append(x[0]))
    with torch.no_grad():
        head(made, samples)
        clean = made.patch_embed(made.normalise(samples["image"]))
    plan, entered = head.draw(samples["seed"]), seen[0][:, made.prefix :]
    assert set(plan.fate.unique().tolist()) >= {MASK, SWAP}
    for b in range(3):
        want = clean[b].clone()
        for i, fate, source in zip(plan.index[b].tolist(), plan.fate[b].tolist(), plan.source[b].tolist(), strict=True):
            want[i] = {MASK: head.mask_token.detach(), SWAP: clean[b, source], KEEP: clean[b, i]}[fate]
        assert torch.equal(entered[b], want)
        untouched = sorted(set(range(16)) - set(plan.index[b].tolist()))
        assert untouched
        assert torch.equal(entered[b, untouched], clean[b, untouched])


@pytest.mark.parametrize(
    ("way", "ratio", "want", "near"),
    [
        ("single", 0.4, 5.15, 0.3),
        ("single", 0.5, 5.93, 0.3),
        ("single", 0.6, 7.06, 0.3),
        ("units", 0.4, 11.0, 1.0),
        ("units", 0.5, 12.5, 1.0),
        ("units", 0.6, 14.9, 1.0),
        ("blocks", 0.36, 21, 4.0),
    ],
)
def test_distance_to_what_can_be_seen(way, ratio, want, near):
    """C8.7: mean distance of a masked pixel to the nearest visible one, at 224 px; of rectangles the order of it."""
    from scipy.ndimage import distance_transform_edt

    plan, found = drawn(way, 40, (14, 14), ratio, (1, 0, 0)), []
    for index in plan.index.numpy():
        masked = np.zeros(196, dtype=bool)
        masked[index] = True
        masked = masked.reshape(14, 14).repeat(16, 0).repeat(16, 1)
        found.append(np.asarray(distance_transform_edt(masked))[masked].mean())
    assert np.mean(found) == pytest.approx(want, abs=near)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"unit": 3}, "head.unit=3 does not divide a grid of 4 x 4"),
        ({"ratio": 0.01}, "corrupts none"),
    ],
)
def test_a_corruption_that_does_not_fit_is_refused(way, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("mean_color", tmp_path, **way)
    with pytest.raises(ValueError, match="take one"):
        MeanColor(unit=2, blocks=True)


# pictures


def columns(panel: Tensor, count: int, side: int = SIDE) -> list[Tensor]:
    """Input, corrupted input, guess, truth and error, each uint8 [count, 3, side, side]."""
    assert panel.dtype == torch.uint8
    cell = side * (LEGIBLE // side) + 2
    assert panel.shape == (3, count * cell, 5 * cell)
    cells = panel.unflatten(2, (5, cell)).unflatten(1, (count, cell))[:, :, 2:, :, 2:]
    small = cells[:, :, :: LEGIBLE // side, :, :: LEGIBLE // side]
    again = small.repeat_interleave(LEGIBLE // side, 2).repeat_interleave(LEGIBLE // side, 4)
    assert torch.equal(again, cells)  # each pixel is a square
    return list(small.permute(3, 1, 0, 2, 4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_panel_shows_what_it_says(kind, way, tmp_path):
    encoder, head = make(kind, tmp_path, **WAYS[way])
    nn.init.normal_(head.linear.weight, std=0.1)
    given = batch(3)
    image, seen, guess, truth, error = columns(head.panel(encoder, given), 3)
    assert torch.equal(image, given["image"])
    cut = [torch.from_numpy(patches_of(one, PATCH)) for one in (image, seen, truth, guess)]
    target = by_hand(kind, head, encoder, image)
    for b in range(3):
        for i in range(16):
            want = {
                "mean_color": lambda t: colors(torch.tensor(t[0])).view(3, 1, 1).expand(3, 4, 4),
                "patch_colors": lambda t: colors(torch.tensor(t)).view(4, 4, 3).permute(2, 0, 1),
                "colors": lambda t: (255 * head.centers[t[0]]).round().view(3, 1, 1).expand(3, 4, 4),
                "patches": lambda t: (255 * head.centers[t[0]]).round().view(3, 4, 4),
            }.get(kind, lambda _, own=cut[0][b, i]: own)(target[b, i])
            assert torch.equal(cut[2][b, i], want.to(torch.uint8)), (b, i)
    plan = head.draw(given["seed"])
    edge = torch.ones(4, 4, dtype=torch.bool)
    edge[1:3, 1:3] = False
    for b in range(3):
        clean = sorted(set(range(16)) - set(plan.index[b].tolist()))
        assert torch.equal(cut[1][b, clean], cut[0][b, clean])
        assert torch.equal(cut[3][b, clean], cut[2][b, clean])
        for i, fate, source in zip(plan.index[b].tolist(), plan.fate[b].tolist(), plan.source[b].tolist(), strict=True):
            shown = cut[1][b, i]
            if fate == MASK:
                assert (shown == 128).all()
                continue
            assert torch.equal(shown[:, ~edge], cut[0][b, source][:, ~edge])
            frame = (255, 255, 255) if fate == KEEP else (255, 0, 0)
            assert torch.equal(shown[:, edge], torch.tensor(frame, dtype=torch.uint8)[:, None].expand(3, 12))
    assert not torch.equal(guess, truth)
    wanted = (guess.float() - truth.float()).abs().mean(1, keepdim=True).expand_as(error)
    assert (error.float() - wanted).abs().max() <= 1.0  # of pixels, which are rounded after the difference
    assert error.max() > 0


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (40, 12), (100, 30)])
def test_what_was_put_side_by_side_comes_apart_again(height: int, width: int):
    columns = [torch.randint(256, (2, 3, height, width), dtype=torch.uint8) for _ in range(3)]
    picture = grid(columns)
    times = max(1, LEGIBLE // max(height, width))
    assert picture.shape == (3, 2 * (2 + times * height), 3 * (2 + times * width))
    assert torch.equal(cells(picture, height, width), torch.stack(columns, dim=1))


# the baseline that copies


def copied_by_hand(image: np.ndarray, corrupted: set[int], rounds: int) -> np.ndarray:
    """[3, 4, 4]: of each corrupted patch the mean over the known ones around it, in so many rounds; else over all."""
    mean = image.astype(float).reshape(3, 4, PATCH, 4, PATCH).mean((2, 4))
    known = {(i // 4, i % 4): mean[:, i // 4, i % 4] for i in range(16) if i not in corrupted}
    visible = list(known.values())
    for _ in range(rounds):
        fresh = {}
        for row in range(4):
            for column in range(4):
                near = [(r, c) for r in range(row - 1, row + 2) for c in range(column - 1, column + 2)]
                if (row, column) not in known and any(place in known for place in near):
                    fresh[row, column] = np.mean([known[place] for place in near if place in known], axis=0)
        known |= fresh
    fallback = np.mean(visible, axis=0) if visible else np.full(3, 127.5)
    return np.stack([[known.get((r, c), fallback) for c in range(4)] for r in range(4)]).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("way", "rounds"),
    [({}, 1), ({"ratio": 0.9}, 1), ({"ratio": 1.0}, 1), ({"unit": 2}, 2), ({"blocks": True, "ratio": 0.9}, 2)],
)
def test_the_neighbours_of_a_corrupted_patch(way, rounds, tmp_path):
    _encoder, head = make("mean_color", tmp_path, **way)
    given = batch(6)
    index = head.draw(given["seed"]).index
    found = head.neighbours(given["image"], index)
    for b in range(6):
        hidden = set(index[b].tolist())
        wanted = copied_by_hand(given["image"][b].numpy(), hidden, rounds)
        for i in hidden:
            assert np.abs(found[b, :, i // 4, i % 4].numpy() - wanted[:, i // 4, i % 4]).max() <= 0.51, (b, i)


def test_what_copying_costs_is_the_best_mixture_with_frequencies():
    """A scan of ten thousand probabilities over single patches, and the two ends."""
    random = np.random.default_rng(0)
    label = random.integers(0, 5, 3000)
    guess = np.where(random.random(3000) < 0.6, label, random.integers(0, 5, 3000))
    share = np.bincount(label, minlength=5) / 3000
    right = np.bincount(label[guess == label], minlength=5) / 3000
    p = np.linspace(0, 0.9999, 10_000)[:, None]
    each = np.log(np.where(guess == label, p, 0) + (1 - p) * share[label])
    assert copying(torch.tensor(share), torch.tensor(right)) == pytest.approx(-each.mean(1).max(), abs=1e-4)
    entropy = -(share * np.log(share)).sum()
    assert copying(torch.tensor(share), torch.zeros(5)) == pytest.approx(entropy)
    assert copying(torch.tensor(share), torch.tensor(share)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_copying_is_perfect_on_flat_images_and_reported_by_every_target(kind, tmp_path):
    encoder, head = make(kind, tmp_path)
    given = batch(4)
    flat = {**given, "image": given["image"][:, :, :1, :1].expand_as(given["image"]).contiguous()}
    for one, perfect in ((flat, True), (given, False)):
        found = head(encoder, one)
        said = head.report(found.sums, float(found.weight))
        if "neighbour_accuracy" in said:
            assert (said["neighbour_accuracy"] == 1.0) == perfect
            assert said["neighbour_loss"] <= said["unigram_entropy"] + 1e-9
        else:
            plain = not head.normalise
            assert said["neighbour_loss"] == pytest.approx(0, abs=1e-3) or not perfect
            assert said["neighbour_loss"] > 0.01 or perfect, plain


@pytest.mark.parametrize("kind", KINDS)
def test_flat_patches_have_the_targets_of_flat_images(kind, tmp_path):
    """Each patch, at its own place, what an image of its colour alone would have."""
    encoder, head = make(kind, tmp_path, **({"bits": 2} if kind == "mean_color" else {}))
    color = torch.randint(256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    found = head.flat(encoder, color)
    for place in range(16):
        image = color[:, :, place // 4, place % 4, None, None].expand(-1, -1, SIDE, SIDE).contiguous()
        assert torch.equal(found[:, place], head.target(encoder, image)[:, place]), place


def test_rectangles_are_filled_up_to_their_middle(tmp_path):
    """A rectangle of 12 x 12 of 14 x 14 patches on a ramp: the copied colours rise from left to right, as it does."""
    given = Vit(size="Ti", width=32, depth=1, heads=2, patch=PATCH, image=14 * PATCH)
    _encoder, head = make("mean_color", tmp_path, given, blocks=True)
    ramp = torch.arange(14).mul(15).to(torch.uint8).repeat_interleave(PATCH).expand(1, 3, 14 * PATCH, -1)
    hidden = torch.arange(196).view(14, 14)[1:13, 1:13].reshape(1, -1)
    middle = head.neighbours(ramp, hidden)[0, 0, 6:8].float()
    assert (middle[:, 1:] >= middle[:, :-1]).all()
    assert middle[:, 5].max() < 97 < 99 < middle[:, 8].min()  # 97.5 is the mean of all that is seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_compared_with_its_own_patches(kind, tmp_path):
    """Images of padding do not count, nor do steps without a row, in which it is not tried; evaluation always tries."""
    encoder, head = make(kind, tmp_path)
    given = batch(4)
    half = {**given, "valid": torch.tensor([True, True, False, False])}
    first = {name: value[:2] for name, value in given.items()}
    want = head(encoder, first)
    want = head.report(want.sums, 2.0)["neighbour_loss"]
    found = head(encoder, half)
    assert head.report(found.sums, 2.0)["neighbour_loss"] == pytest.approx(want, rel=1e-5)
    head.told = False
    rest = head(encoder, given)
    assert found.sums.keys() - rest.sums.keys() == {"copied", "compared"}
    both = {name: value + rest.sums.get(name, 0) for name, value in found.sums.items()}
    assert head.report(both, 6.0)["neighbour_loss"] == pytest.approx(want, rel=1e-5)
    head.eval()
    assert head(encoder, given).sums.keys() == found.sums.keys()


# runs


def pretrain(data: Path, run: Path, *arguments: str) -> int:
    given = [*TINY, f"data.train={data}/train", f"run={run}", "tracker=none", "steps=6", "log_every=2", "save_every=3"]
    return session.run(config.parse(Pretrain, [*given, *arguments], recipe.FOLDER))


@pytest.fixture(scope="session")
def black(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images on which there is nothing to see."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("black")
    for number in range(12):
        place = folder / "images" / "all"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(place / f"{number:02d}.png")
    options = {"val_fraction": 0.3, "shard_samples": 7, "workers": 1, "quiet": True}
    convert(MakeShards(input=str(folder / "images"), output=str(folder / "shards"), **options))
    return folder / "shards"


def test_a_collapse_is_told_once(black: Path, shards: Path, tmp_path: Path, capsys):
    pretrain(black, tmp_path / "black")
    said = [line for line in capsys.readouterr().out.splitlines() if "the same label" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: step 2: 100% of the patches have the same label")
    assert [row["top_label"] for row in rows(tmp_path / "black")] == [1, 1, 1]


def test_no_collapse_is_told_of_colours(shards: Path, tmp_path: Path, capsys):
    pretrain(shards, tmp_path)
    assert "the same label" not in capsys.readouterr().out
    assert all(row["top_label"] < 0.9 for row in rows(tmp_path))


# clusters fitted to shards


def fit(shards: Path, output: Path, *arguments: str) -> str:
    given = [f"data.train={shards}/train", f"output={output}", "patch=4", "clusters=5", "data.image_size=16"]
    return codebook.fit(config.parse(FitClusters, [*given, "data.workers=0", *arguments], recipe.FOLDER))


@pytest.mark.parametrize("space", ["color", "patch"])
def test_clusters_are_fitted_to_shards(space, shards: Path, tmp_path: Path):
    """K centres that leave less of the variance than chance would, the same for a seed; the numbers it tells hold."""
    from safetensors import safe_open

    said = fit(shards, tmp_path / "a", f"space={space}")
    fit(shards, tmp_path / "b", f"space={space}")
    fit(shards, tmp_path / "c", f"space={space}", "seed=1")
    found = {}
    for name in "abc":
        with safe_open(str(tmp_path / name), framework="pt") as file:
            found[name] = file.get_tensor("centers"), file.metadata()
    centers, about = found["a"]
    assert torch.equal(centers, found["b"][0])
    assert not torch.equal(centers, found["c"][0])
    assert centers.shape == (5, 3 if space == "color" else 48)
    assert centers.isfinite().all()
    assert 0 <= float(centers.min()) <= float(centers.max()) <= 1
    manifest = json.loads((shards / "train" / "manifest.json").read_text())
    about = json.loads(about["codebook"])
    assert about["data"]
    assert {key: about[key] for key in ("space", "patch", "seed")} == {"space": space, "patch": "4", "seed": "0"}
    points = 16 * manifest["samples"]
    assert f"5 clusters of {points:,} {space} vectors" in said
    # squares of three colours: some centre is near each
    means = centers.unflatten(1, (3, -1)).mean(2)
    for color in ((20, 40, 220), (30, 200, 60), (220, 30, 40)):
        assert (means - torch.tensor(color) / 255).norm(dim=1).min() < 0.1


def test_centres_are_those_of_the_patches_themselves(shards: Path, tmp_path: Path):
    """Each is about the mean of the training patches that are nearest to it, seen as training sees them."""
    from ssl_vit.data.manifest import load
    from ssl_vit.data.samples import Data, Samples

    fit(shards, tmp_path / "file", "space=color", "clusters=3", "data.crop_area=1,1")
    head = make("mean_color", tmp_path)[0]
    centers = clusters.read(str(tmp_path / "file"), head)
    train = load(shards / "train")
    data = Data(train=(str(shards / "train"),), image_size=16, workers=0, crop_area=(1, 1))
    image = Samples(train, data, seed=0, training=True).batch([(0, i) for i in range(train.samples)])[0]["image"]
    points = patches_of(image.contiguous(), 4).mean((3, 4)).reshape(-1, 3) / 255
    nearest = ((points[:, None] - centers.numpy()) ** 2).sum(2).argmin(1)
    for number, center in enumerate(centers):
        np.testing.assert_allclose(points[nearest == number].mean(0), center, atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.train=none"], USAGE, "data.train: it must be given"),
        (["patch=5"], USAGE, "patch=5 does not divide data.image_size=16,16"),
        (["clusters=5000"], DATA, "clusters=5000: "),
        (["data.train=/nowhere"], DATA, "/nowhere: no such folder"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(arguments, code, message, shards: Path, tmp_path: Path):
    with pytest.raises(Refusal) as end:
        fit(shards, tmp_path / "file", *arguments)
    assert end.value.code == code
    assert message in str(end.value)
    assert "\n" not in str(end.value)
    assert not (tmp_path / "file").exists()


def test_a_codebook_fitted_again_is_the_same_file(tmp_path: Path):
    said = {"space": "patch", "patch": "4", "seed": "0", "data": "abc"}
    for number in range(6):
        clusters.write(tmp_path / str(number), torch.ones(2, 3), said)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(6)}) == 1


def test_a_file_that_cannot_be_written_is_refused(shards: Path, tmp_path: Path):
    for place in (Path("/proc/none/file"), tmp_path):
        with pytest.raises(Refusal, match="output=") as end:
            fit(shards, place)
        assert end.value.code == CANNOT_CREATE


def test_a_run_keeps_its_codebook(shards: Path, tmp_path: Path, monkeypatch):
    """It is copied into the run, which goes on bit for bit with it and with no other."""
    from accelerate.state import AcceleratorState, GradientState

    given, other = codebook_of(tmp_path / "a", "patch"), codebook_of(tmp_path / "b", "patch", seed=3)
    words_ = ["head.kind=clusters", f"head.codebook={given}"]
    pretrain(shards, tmp_path / "straight", *words_)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setattr(loop, "StopSignal", lambda accelerator: StopAfter(4))
    with pytest.raises(Refusal) as end:
        pretrain(shards, tmp_path / "run", *words_)
    assert end.value.code == PREEMPTED
    monkeypatch.undo()
    copy = tmp_path / "run" / "codebook.safetensors"
    assert copy.read_bytes() == Path(given).read_bytes()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    first = Path(given).read_bytes()
    Path(given).write_bytes(Path(other).read_bytes())  # the same name, other centres
    with pytest.raises(Refusal, match="not the one that the run was begun with") as end:
        pretrain(shards, tmp_path / "run", *words_)
    assert end.value.code == MISMATCH
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with pytest.raises(Refusal) as end:
        pretrain(shards, tmp_path / "run", "head.kind=clusters", f"head.codebook={other}")
    assert end.value.code == MISMATCH
    assert copy.read_bytes() == first
    Path(given).unlink()  # the copy does in its place
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    pretrain(shards, tmp_path / "run", "head.kind=clusters", f"head.codebook={copy}")
    ends = [rows(tmp_path / name)[-1]["loss"] for name in ("straight", "run")]
    assert ends[0] == ends[1]
    assert rows(tmp_path / "run")[-1]["uniform"] == math.log(7)


def test_a_fresh_start_may_have_another_codebook(shards: Path, tmp_path: Path):
    from accelerate.state import AcceleratorState, GradientState

    given, other = codebook_of(tmp_path / "a", "patch"), codebook_of(tmp_path / "b", "patch", seed=3)
    pretrain(shards, tmp_path / "run", "head.kind=clusters", f"head.codebook={given}")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    pretrain(shards, tmp_path / "run", "head.kind=clusters", f"head.codebook={other}", "fresh=true")
    assert (tmp_path / "run" / "codebook.safetensors").read_bytes() == Path(other).read_bytes()


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (lambda path: None, "cannot be read as a codebook"),
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read as a codebook"),
        (lambda path: clusters.write(path, torch.rand(7, 192), {}), "nor of patches of 4 pixels"),
        (lambda path: clusters.write(path, torch.full((7, 48), float("nan")), {}), "nor of patches of 4 pixels"),
    ],
)
def test_a_codebook_of_something_else_is_refused(make_file, message, shards: Path, tmp_path: Path):
    make_file(tmp_path / "file")
    with pytest.raises(Refusal, match=message) as end:
        pretrain(shards, tmp_path / "run", "head.kind=clusters", f"head.codebook={tmp_path / 'file'}")
    assert end.value.code == USAGE
    with pytest.raises(Refusal, match=r"head\.codebook: it must be given"):
        pretrain(shards, tmp_path / "run", "head.kind=clusters")
