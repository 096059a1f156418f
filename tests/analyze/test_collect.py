"""Filters, positions and features: the checks of the paper's facts, and plain numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_vit.analyze import collect, figures
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit

SMALL_VIT: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": (12, 20)}


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


# --- filters (3.8)


@pytest.mark.parametrize("shape", [(40, 3, 4, 4), (200, 3, 4, 6)])
def test_components_of_filters(shape):
    filters = random_tensor(*shape)
    components, variances = collect.principal_components(filters)
    flat = components.flatten(1).double().numpy()
    assert components.shape[1:] == filters.shape[1:]
    assert len(components) == len(variances) <= min(shape[0], shape[1] * shape[2] * shape[3])
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-5)
    assert (variances[1:] <= variances[:-1]).all()
    assert (variances >= 0).all()
    rows = filters.flatten(1).double().numpy()
    centered = rows - rows.mean(0)
    values, directions = np.linalg.eigh(centered.T @ centered / len(rows))
    values = values[::-1][: len(variances)]
    ratio = variances.double().numpy() / values  # over D or over D - 1: both are variances
    np.testing.assert_allclose(ratio[values > 1e-6], ratio[0], rtol=1e-3)
    assert ratio[0] == pytest.approx(1, abs=2 / (len(rows) - 1))
    total_variance = centered.var(0).sum() * ratio[0]
    assert float(variances.sum()) == pytest.approx(total_variance, rel=1e-4)
    for component, expected in zip(flat[:3], directions.T[::-1], strict=False):
        assert abs(component @ expected) == pytest.approx(1, abs=1e-4)
        assert component[np.abs(component).argmax()] > 0


def test_mixtures_of_known_images_have_as_many_components():
    images, rng = random_tensor(5, 3, 6, 6, seed=1), np.random.default_rng(2)
    weights = torch.from_numpy(rng.normal(size=(100, 5))).float()
    components, variances = collect.principal_components(torch.einsum("fi,ichw->fchw", weights, images))
    assert int((variances > 1e-5 * variances[0]).sum()) == 5
    basis = components[:5].flatten(1).double()
    flat_images = images.flatten(1).double()
    residual = flat_images - flat_images @ basis.T @ basis
    assert float((residual.norm(dim=1) / flat_images.norm(dim=1)).max()) < 1e-5


def test_a_single_pixel_of_a_single_channel_stays_where_it_is():
    for channel, y, x in ((0, 0, 0), (2, 1, 4), (1, 3, 2)):
        filters = torch.zeros(20, 3, 4, 5)
        filters[:, channel, y, x] = torch.linspace(-1, 2, 20)
        components, variances = collect.principal_components(filters)
        assert float(variances[0]) > 0
        assert float(variances[1:].abs().max()) < 1e-9
        expected = torch.zeros(3, 4, 5)
        expected[channel, y, x] = 1
        torch.testing.assert_close(components[0].float(), expected, atol=1e-6, rtol=0)
        figure = figures.filter_tiles(components[:1].numpy(), ["first"])
        pixels = np.asarray(next(axes.images[0] for axes in figure.axes if axes.images).get_array(), dtype=float)
        pixels = pixels / 255 if pixels.max() > 1 else pixels
        assert pixels.shape == (4, 5, 3)
        is_lit = np.abs(pixels - np.median(pixels)) > 0.2
        assert np.argwhere(is_lit).tolist() == [[y, x, channel]]


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "axial": (Axial(**SMALL_VIT), (16, 3, 4, 4)),
    "hybrid": (Vit(size="Ti", width=16, depth=2, heads=2, patch=16, image=32, stem="r50"), (64, 3, 7, 7)),  # the root's
    "bit": (Bit(image=32), (64, 3, 7, 7)),
    "timm": (TimmZoo(name="vit_tiny_patch16_224", image=32), (192, 3, 16, 16)),
}


def test_the_first_convolution_of_every_kind():
    encoder: Any = Vit(**SMALL_VIT).build()
    assert collect.first_convolution(encoder) is encoder.patch_embed.proj
    for kind, (config, shape) in CONVOLUTIONS.items():
        with torch.device("meta"):
            convolution = collect.first_convolution(config.build())
        assert convolution is not None, kind
        assert convolution.weight.shape == shape, kind


def test_what_is_all_alike_or_zero_makes_no_nan():
    """Filters, a row of positions, features."""
    components, variances = collect.principal_components(torch.ones(8, 3, 4, 4))
    assert components.isfinite().all()
    assert float(variances.abs().max()) < 1e-9
    table = random_tensor(4, 6)
    table[2] = 0
    assert collect.similarity(table).isfinite().all()
    coordinates, shares = collect.two_dimensions(torch.ones(5, 4))
    assert coordinates.isfinite().all()
    assert shares.isfinite().all()


# --- positions (3.9)


def test_similarity_is_numpys_and_scale_does_not_matter():
    table = random_tensor(15, 8)
    similarity = collect.similarity(table).float()
    rows = table.double().numpy()
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows]
    np.testing.assert_allclose(similarity.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(15))
    torch.testing.assert_close(similarity, similarity.T)
    assert similarity.min() >= -1
    assert similarity.max() <= 1
    for scale in (1e-4, 3.0, 1e4):
        torch.testing.assert_close(collect.similarity(scale * table).float(), similarity, atol=1e-5, rtol=0)


def test_planted_rows_and_columns_and_fresh_positions_that_resemble_nothing():
    positions = torch.cartesian_prod(torch.arange(14), torch.arange(14))
    table = torch.cat([torch.eye(14)[positions[:, 0]], torch.eye(14)[positions[:, 1]]], 1)
    for tile in collect.similarity(table):
        counts = [int(((tile - value).abs() < 1e-6).sum()) for value in (1.0, 0.5, 0.0)]
        assert counts == [1, 26, 169]
        assert float(tile.mean()) == pytest.approx(0.0714286, abs=1e-6)
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=768, depth=1, heads=12, patch=4, image=40).build()
    table = collect.position_table(encoder)
    assert table is not None
    similarity = collect.similarity(table)
    off_diagonal = similarity[~torch.eye(100, dtype=torch.bool)]
    assert abs(float(off_diagonal.mean())) < 0.003
    assert float(off_diagonal.std()) == pytest.approx(768**-0.5, rel=0.05)


@pytest.mark.parametrize("where", ["stem", "shared", "every"])
@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("class_token", [True, False])
def test_the_table_of_positions(where, kind, class_token):
    pool = "class" if class_token else "mean"
    encoder: Any = Vit(
        **SMALL_VIT, positions=kind, position_placement=where, class_token=class_token, pool=pool
    ).build()
    module = encoder.blocks[0].pos if where == "every" else encoder.pos_embed
    if kind == "2d":
        expected = torch.stack([torch.cat([row, column]) for row in module.rows for column in module.columns])
    else:
        table = module.table if where == "every" else module
        expected = table[0, int(class_token) :]
    actual = collect.position_table(encoder)
    assert actual is not None
    assert actual.shape == (15, 16)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


def test_the_tables_of_an_axial_vit_of_timm_and_of_none():
    """Registers, and DINOv2's class token, have no row; BEiT's are offsets in the attention."""
    encoder: Any = Axial(**SMALL_VIT).build()
    table = collect.position_table(encoder)
    assert table is not None
    assert torch.equal(table, encoder.pos_embed[0])
    no_table: list[Any] = [TimmZoo(name=name, image=32) for name in ("beit_base_patch16_224", "resnet18")]
    no_table.append(Bit(image=32))
    for options in (
        {"positions": "none"},
        {"positions": "relative"},
        {"positions": "relative", "position_placement": "stem"},
    ):
        no_table += [Vit(**dict(SMALL_VIT, **options)), Axial(**dict(SMALL_VIT, **options))]
    with torch.device("meta"):
        assert [collect.position_table(config.build()) for config in no_table] == [None] * 9
        for name, image, prefix in (("vit_tiny_patch16_224", (32, 64), 1), ("vit_small_patch14_reg4_dinov2", 28, 0)):
            encoder = TimmZoo(name=name, image=image).build()
            encoder.model.pos_embed = nn.Parameter(random_tensor(*encoder.model.pos_embed.shape).to("cpu"))
            table = collect.position_table(encoder)
            assert table is not None
            assert torch.equal(table, encoder.model.pos_embed[0, prefix:])


# --- features


def test_nearest_images_are_numpys():
    features = random_tensor(40, 6)
    features[7] = 3 * features[3]  # of the same direction: nearest, however long
    queries = torch.tensor([3, 0, 39, 12])
    nearest = collect.nearest(features, queries, 5)
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for query, indices in zip(queries.tolist(), nearest.tolist(), strict=True):
        similarities = [-np.inf if index == query else float(rows[query] @ rows[index]) for index in range(40)]
        assert indices == sorted(range(40), key=lambda index: -similarities[index])[:5]
    assert nearest[0, 0] == 7
    for query, indices in enumerate(collect.nearest(torch.ones(6, 4), torch.arange(6), 5).tolist()):
        assert sorted(indices) == [index for index in range(6) if index != query]  # not itself, also among copies


def test_two_dimensions_are_those_of_the_singular_values():
    features = random_tensor(30, 7) * torch.tensor([9.0, 4, 1, 1, 1, 1, 1]) + 50
    coordinates, shares = collect.two_dimensions(features)
    assert coordinates.shape == (30, 2)
    rows = features.double().numpy()
    rows = rows - rows.mean(0)
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(shares.numpy(), (values**2 / (values**2).sum())[:2], rtol=1e-4)
    for axis in (0, 1):
        expected = rows @ directions[axis]
        actual = coordinates[:, axis].numpy()
        np.testing.assert_allclose(actual * np.sign(actual @ expected), expected, atol=1e-3)
