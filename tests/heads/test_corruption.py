"""Which patches are corrupted and how: exact counts, no favorites, a function of the seed (C2.x, C8.x)."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from ssl_vit.encoders.axial import Axial
from ssl_vit.heads import corruption
from ssl_vit.heads.corruption import KEEP, MASK, SWAP, Corruption, block_shapes, counts, draw, draw_blocks, draw_units
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.rng import random_words
from tests.heads.masked import MASKINGS, SIZES, make_batch, make_encoder_and_head, vit

PAPER = (0.8, 0.1, 0.1)
FATES = (MASK, SWAP, KEEP)


def draw_corruption(
    masking: str, count: int, grid: tuple[int, int], ratio: float = 0.5, mix: tuple[float, float, float] = PAPER
) -> Corruption:
    seeds = torch.arange(count)
    if masking == "blocks":
        shapes = torch.tensor(block_shapes(grid, sum(counts(grid[0] * grid[1], ratio, mix))))
        return draw_blocks(seeds, grid, shapes, ratio, mix)
    return draw_units(seeds, grid, 2, ratio, mix) if masking == "units" else draw(seeds, grid[0] * grid[1], ratio, mix)


def check_plan(plan: Corruption, patches: int, fates: tuple[int, int, int]) -> None:
    """Exact counts, no patch twice, sources elsewhere."""
    assert plan.index.shape == plan.fate.shape == plan.source.shape == (len(plan.index), sum(fates))
    assert (plan.index.sort(1).values.diff(dim=1) > 0).all()
    for fate, count in zip(FATES, fates, strict=True):
        assert (plan.fate == fate).sum(1).unique().tolist() == [count]
    swapped = plan.fate == SWAP
    assert (plan.source != plan.index)[swapped].all()
    assert torch.equal(plan.source[~swapped], plan.index[~swapped])
    assert all(0 <= int(indices.min()) <= int(indices.max()) < patches for indices in (plan.index, plan.source))


COUNTS = [(16, (6, 1, 1), 2), (36, (14, 2, 2), 5), (49, (20, 3, 2), 7), (64, (26, 3, 3), 10), (144, (58, 7, 7), 22)]
COUNTS += [(196, (78, 10, 10), 29), (256, (102, 13, 13), 38), (576, (230, 29, 29), 86)]


@pytest.mark.parametrize(("patches", "want", "at_15"), COUNTS)
def test_counts_are_the_references(patches, want, at_15):
    """Masked, swapped and kept of 50 %, and all of 15 %."""
    assert counts(patches, 0.5, PAPER) == want
    assert sum(counts(patches, 0.15, PAPER)) == at_15
    check_plan(draw(torch.arange(500), patches), patches, want)


@pytest.mark.parametrize(("ratio", "grid"), [(0.4, (14, 14)), (0.9, (14, 14)), (0.5, (7, 12)), (0.5, (4, 4))])
def test_rectangles_cover_exactly_as_many(ratio, grid):
    check_plan(draw_corruption("blocks", 300, grid, ratio), grid[0] * grid[1], counts(grid[0] * grid[1], ratio, PAPER))


UNITS = [((14, 14), 2, 0.6, mix, 120) for mix in (PAPER, (1.0, 0.0, 0.0), (0.4, 0.4, 0.2))]
UNITS += [((8, 8), 2, 0.6, (1, 0, 0), 40), ((4, 6), 2, 0.5, (1, 0, 0), 12), ((6, 9), 3, 0.4, (1, 0, 0), 27)]


@pytest.mark.parametrize(("grid", "unit", "ratio", "mix", "want"), UNITS)
def test_units_are_corrupted_as_one(grid, unit, ratio, mix, want):
    """C8.3: as SimMIM's 30 of 49; all patches of a unit, or none; they share their fate and swap with one unit."""
    plan = draw_units(torch.arange(200), grid, unit, ratio, mix)
    patches, square, (rows, columns) = grid[0] * grid[1], unit**2, (side // unit for side in grid)
    fates = counts(rows * columns, ratio, mix, up=True)
    assert square * sum(fates) == want
    check_plan(plan, patches, (square * fates[0], square * fates[1], square * fates[2]))
    for values, fill in ((plan.fate, -1), (plan.source - plan.index, 0)):
        units = torch.full((200, patches), fill).scatter(1, plan.index, values)
        units = units.unflatten(1, (rows, unit, columns, unit)).transpose(2, 3).flatten(3)
        assert torch.equal(units, units[..., :1].expand_as(units))
    source = plan.source.unflatten(1, (-1, square))
    for coordinate in (source // grid[1], source % grid[1]):  # the row, the column
        assert (coordinate.amin(2) % unit == 0).all()
        assert (coordinate.amax(2) == coordinate.amin(2) + unit - 1).all()


@pytest.mark.parametrize(("way", "count", "grid"), [("single", 10_000, (4, 4)), ("units", 4000, (8, 8))])
def test_positions_are_uniform(way, count, grid):
    """C2.3: each position's frequency is within 5 standard errors."""
    plan, patches = draw_corruption(way, count, grid), grid[0] * grid[1]
    frequency = plan.index.flatten().bincount(minlength=patches) / count
    assert (frequency - 0.5).abs().max() < 5 * math.sqrt(0.25 / count)
    if way == "single":  # and so is how far away a source is
        offsets = ((plan.source - plan.index) % 16)[plan.fate == SWAP].bincount(minlength=16) / count
        assert offsets[0] == 0
        assert (offsets[1:] - 1 / 15).abs().max() < 5 * math.sqrt(1 / 15 / count)


@pytest.mark.parametrize("way", MASKINGS)
def test_a_draw_is_a_function_of_its_seed(way, tmp_path):
    _, head = make_encoder_and_head("mean_color", tmp_path, **MASKINGS[way])
    seeds = torch.tensor([5, 2**62 + 3, 9, -3])
    together = head.draw(seeds)
    for b, seed in enumerate(seeds):
        torch.manual_seed(b)
        alone = head.draw(seed[None])
        for name in ("index", "fate", "source"):
            assert torch.equal(getattr(together, name)[b], getattr(alone, name)[0])
    assert len({tuple(row) for row in together.index.tolist()}) == 4
    assert draw(torch.tensor([7]), 16).index.tolist() == [[15, 3, 14, 13, 2, 12, 11, 1]]  # golden


# rectangles


def test_fates_fall_alike_on_the_rectangle_that_was_cut():
    """Rows of 8 until 12 patches are covered: half of the second row; it is masked as often as the first.

    Of rectangles each place is masked as often, and sources are as often at each distance.
    """
    plan = draw_blocks(torch.arange(4000), (8, 8), torch.tensor([[1, 8]]), 12 / 64, (0.5, 0.25, 0.25))
    row = plan.index // 8
    covered = torch.nn.functional.one_hot(row, 8).sum(1)
    assert covered.sort(1).values.unique(dim=0).tolist() == [[0, 0, 0, 0, 0, 0, 4, 8]]
    cut = covered.gather(1, row) == 4
    assert float((plan.fate == MASK)[cut].float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((plan.fate == SWAP)[cut].float().mean()) == pytest.approx(0.25, abs=0.02)
    plan = draw_corruption("blocks", 4000, (14, 14))
    hits, masked = (index.bincount(minlength=196) for index in (plan.index.flatten(), plan.index[plan.fate == MASK]))
    assert (masked / hits - 78 / 98).abs().max() < 5 * math.sqrt(0.16 / float(hits.min()))
    step = ((plan.source - plan.index) % 196)[plan.fate == SWAP].bincount(minlength=196) / 40_000
    assert step[0] == 0
    assert (step[1:] - 1 / 195).abs().max() < 5 * math.sqrt(1 / 195 / 40_000)


def test_rectangles_are_beits():
    """C8.2: 16 patches or more, sides from 0.3 to 1/0.3 of one another to rounding, and of many kinds."""
    shapes = block_shapes((14, 14), 98)
    areas = [height * width for height, width in shapes]
    assert 16 <= min(areas) < 90 < max(areas) <= 98 + 14  # sides are rounded
    for height, width in shapes:
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 1 / 0.3
    assert sum(h > w for h, w in shapes) == pytest.approx(sum(h < w for h, w in shapes), abs=2)
    assert all(h <= 7 and w <= 12 and h * w >= 7 for h, w in block_shapes((7, 12), 42))


def test_rectangles_agree_with_a_plain_loop():
    """One after the other until K are covered, the last one cut at random; the same words of the counter."""
    grid, ratio, patches = (14, 14), 0.5, 196
    shapes, plan = block_shapes(grid, 98), draw_corruption("blocks", 25, grid, ratio)
    for b in range(25):
        random = random_words(b, 2 * patches + 3 * corruption.RECTANGLES_PER_IMAGE).astype(np.int64)
        shape_index, top, left = (random[2 * patches :] & (1 << 62) - 1).reshape(3, corruption.RECTANGLES_PER_IMAGE)
        covered: list[int] = []
        for number in range(corruption.RECTANGLES_PER_IMAGE):
            height, width = shapes[shape_index[number] % len(shapes)]
            assert height * width >= 16
            row, column = top[number] % (14 - height + 1), left[number] % (14 - width + 1)
            cells = {r * 14 + c for r in range(row, row + height) for c in range(column, column + width)}
            fresh = sorted(cells - set(covered), key=lambda cell: random[cell])
            covered += fresh[: 98 - len(covered)]
        assert len(covered) == 98
        assert sorted(plan.index[b].tolist()) == sorted(covered)


DISTANCES = [("single", 0.4, 5.15, 0.3), ("single", 0.6, 7.06, 0.3)]
DISTANCES += [("units", 0.4, 11.0, 1.0), ("units", 0.6, 14.9, 1.0), ("blocks", 0.36, 21, 4.0)]


@pytest.mark.parametrize(("way", "ratio", "want", "near"), DISTANCES)
def test_distance_to_what_can_be_seen(way, ratio, want, near):
    """C8.7: mean distance of a masked pixel to the nearest visible one, at 224 px; of rectangles the order of it."""
    plan, distances = draw_corruption(way, 40, (14, 14), ratio, (1, 0, 0)), []
    for index in plan.index.numpy():
        masked = np.zeros(196, dtype=bool)
        masked[index] = True
        masked = masked.reshape(14, 14).repeat(16, 0).repeat(16, 1)
        distances.append(np.asarray(distance_transform_edt(masked))[masked].mean())
    assert np.mean(distances) == pytest.approx(want, abs=near)


# in an encoder

ENCODERS = {
    "vit": vit(depth=1, positions="none"),
    "axial": Axial(**SIZES | {"depth": 1, "positions": "none"}),
    "hybrid": vit(depth=1, patch=16, image=64, stem="r50", positions="none"),
}


@pytest.mark.parametrize("way", MASKINGS)
@pytest.mark.parametrize("encoder", ["vit", "axial", pytest.param("hybrid", marks=pytest.mark.process)])
def test_what_enters_the_blocks(encoder, way, tmp_path):
    """C2.9: clean and kept patches bit for bit, the mask embedding, and clean patches from elsewhere."""
    encoder_config = ENCODERS[encoder]
    encoder_module, head = make_encoder_and_head("pixels", tmp_path, encoder_config, **MASKINGS[way])
    samples, block_inputs = make_batch(3, encoder_config.image), []
    encoder_module.pos_drop.register_forward_hook(lambda _module, x, _out: block_inputs.append(x[0]))
    with torch.no_grad():
        head(encoder_module, samples)
        clean = encoder_module.patch_embed(encoder_module.normalize(samples["image"]))
    plan, entered = head.draw(samples["seed"]), block_inputs[0][:, encoder_module.prefix :]
    assert set(plan.fate.unique().tolist()) >= {MASK, SWAP}
    assert plan.index.shape[1] < 16
    for b in range(3):
        expected = clean[b].clone()
        for i, fate, source in zip(plan.index[b].tolist(), plan.fate[b].tolist(), plan.source[b].tolist(), strict=True):
            expected[i] = {MASK: head.mask_token.detach(), SWAP: clean[b, source], KEEP: clean[b, i]}[fate]
        assert torch.equal(entered[b], expected)


@pytest.mark.parametrize(
    ("way", "message"),
    [({"mask_unit": 3}, "head.mask_unit=3 does not divide a grid of 4 x 4"), ({"ratio": 0.01}, "corrupts none")],
)
def test_a_corruption_that_does_not_fit_is_refused(way, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_encoder_and_head("mean_color", tmp_path, **way)
    with pytest.raises(ValueError, match="take one"):
        MeanColor(mask_unit=2, mask_blockwise=True)
