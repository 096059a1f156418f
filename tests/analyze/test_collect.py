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

SMALL: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": (12, 20)}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


# --- filters (3.8)


@pytest.mark.parametrize("shape", [(40, 3, 4, 4), (200, 3, 4, 6)])
def test_components_of_filters(shape):
    filters = numbers(*shape)
    components, variances = collect.principal_components(filters)
    flat = components.flatten(1).double().numpy()
    assert components.shape[1:] == filters.shape[1:]
    assert len(components) == len(variances) <= min(shape[0], shape[1] * shape[2] * shape[3])
    np.testing.assert_allclose(flat @ flat.T, np.eye(len(flat)), atol=1e-5)
    assert (variances[1:] <= variances[:-1]).all()
    assert (variances >= 0).all()
    rows = filters.flatten(1).double().numpy()
    centred = rows - rows.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred / len(rows))
    values = values[::-1][: len(variances)]
    ratio = variances.double().numpy() / values  # over D or over D - 1: both are variances
    np.testing.assert_allclose(ratio[values > 1e-6], ratio[0], rtol=1e-3)
    assert ratio[0] == pytest.approx(1, abs=2 / (len(rows) - 1))
    total = centred.var(0).sum() * ratio[0]
    assert float(variances.sum()) == pytest.approx(total, rel=1e-4)
    for one, wanted in zip(flat[:3], directions.T[::-1], strict=False):
        assert abs(one @ wanted) == pytest.approx(1, abs=1e-4)
        assert one[np.abs(one).argmax()] > 0


def test_mixtures_of_known_images_have_as_many_components():
    images, random = numbers(5, 3, 6, 6, seed=1), np.random.default_rng(2)
    shares = torch.from_numpy(random.normal(size=(100, 5))).float()
    components, variances = collect.principal_components(torch.einsum("fi,ichw->fchw", shares, images))
    assert int((variances > 1e-5 * variances[0]).sum()) == 5
    basis = components[:5].flatten(1).double()
    whole = images.flatten(1).double()
    left = whole - whole @ basis.T @ basis
    assert float((left.norm(dim=1) / whole.norm(dim=1)).max()) < 1e-5


def test_a_single_pixel_of_a_single_channel_stays_where_it_is():
    for channel, y, x in ((0, 0, 0), (2, 1, 4), (1, 3, 2)):
        filters = torch.zeros(20, 3, 4, 5)
        filters[:, channel, y, x] = torch.linspace(-1, 2, 20)
        components, variances = collect.principal_components(filters)
        assert float(variances[0]) > 0
        assert float(variances[1:].abs().max()) < 1e-9
        delta = torch.zeros(3, 4, 5)
        delta[channel, y, x] = 1
        torch.testing.assert_close(components[0].float(), delta, atol=1e-6, rtol=0)
        figure = figures.filter_tiles(components[:1].numpy(), ["first"])
        seen = np.asarray(next(axes.images[0] for axes in figure.axes if axes.images).get_array(), dtype=float)
        seen = seen / 255 if seen.max() > 1 else seen
        assert seen.shape == (4, 5, 3)
        lit = np.abs(seen - np.median(seen)) > 0.2
        assert np.argwhere(lit).tolist() == [[y, x, channel]]


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "axial": (Axial(**SMALL), (16, 3, 4, 4)),
    "hybrid": (Vit(size="Ti", width=16, depth=2, heads=2, patch=16, image=32, stem="r50"), (64, 3, 7, 7)),  # the root's
    "bit": (Bit(image=32), (64, 3, 7, 7)),
    "timm": (TimmZoo(name="vit_tiny_patch16_224", image=32), (192, 3, 16, 16)),
}


def test_the_first_convolution_of_every_kind():
    ours: Any = Vit(**SMALL).build()
    assert collect.first_convolution(ours) is ours.patch_embed.proj
    for kind, (config, shape) in CONVOLUTIONS.items():
        with torch.device("meta"):
            found = collect.first_convolution(config.build())
        assert found is not None, kind
        assert found.weight.shape == shape, kind


def test_what_is_all_alike_or_zero_makes_no_nan():
    """Filters, a row of positions, features."""
    components, variances = collect.principal_components(torch.ones(8, 3, 4, 4))
    assert components.isfinite().all()
    assert float(variances.abs().max()) < 1e-9
    table = numbers(4, 6)
    table[2] = 0
    assert collect.similarity(table).isfinite().all()
    places, shares = collect.two_dimensions(torch.ones(5, 4))
    assert places.isfinite().all()
    assert shares.isfinite().all()


# --- positions (3.9)


def test_similarity_is_numpys_and_scale_does_not_matter():
    table = numbers(15, 8)
    found = collect.similarity(table).float()
    rows = table.double().numpy()
    wanted = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    torch.testing.assert_close(found.diagonal(), torch.ones(15))
    torch.testing.assert_close(found, found.T)
    assert found.min() >= -1
    assert found.max() <= 1
    for scale in (1e-4, 3.0, 1e4):
        torch.testing.assert_close(collect.similarity(scale * table).float(), found, atol=1e-5, rtol=0)


def test_planted_rows_and_columns_and_fresh_positions_that_resemble_nothing():
    place = torch.cartesian_prod(torch.arange(14), torch.arange(14))
    table = torch.cat([torch.eye(14)[place[:, 0]], torch.eye(14)[place[:, 1]]], 1)
    for tile in collect.similarity(table):
        close = [int(((tile - value).abs() < 1e-6).sum()) for value in (1.0, 0.5, 0.0)]
        assert close == [1, 26, 169]
        assert float(tile.mean()) == pytest.approx(0.0714286, abs=1e-6)
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=768, depth=1, heads=12, patch=4, image=40).build()
    table = collect.position_table(encoder)
    assert table is not None
    found = collect.similarity(table)
    others = found[~torch.eye(100, dtype=torch.bool)]
    assert abs(float(others.mean())) < 0.003
    assert float(others.std()) == pytest.approx(768**-0.5, rel=0.05)


@pytest.mark.parametrize("where", ["stem", "shared", "every"])
@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("class_token", [True, False])
def test_the_table_of_positions(where, kind, class_token):
    pool = "class" if class_token else "mean"
    encoder: Any = Vit(**SMALL, positions=kind, positions_at=where, class_token=class_token, pool=pool).build()
    module = encoder.blocks[0].pos if where == "every" else encoder.pos_embed
    if kind == "2d":
        wanted = torch.stack([torch.cat([row, column]) for row in module.rows for column in module.columns])
    else:
        whole = module.table if where == "every" else module
        wanted = whole[0, int(class_token) :]
    found = collect.position_table(encoder)
    assert found is not None
    assert found.shape == (15, 16)
    assert torch.equal(found, wanted)
    assert not found.requires_grad


def test_the_tables_of_an_axial_vit_of_timm_and_of_none():
    """Registers, and DINOv2's class token, have no row; BEiT's are offsets in the attention."""
    encoder: Any = Axial(**SMALL).build()
    found = collect.position_table(encoder)
    assert found is not None
    assert torch.equal(found, encoder.pos_embed[0])
    without: list[Any] = [TimmZoo(name=name, image=32) for name in ("beit_base_patch16_224", "resnet18")]
    without.append(Bit(image=32))
    for more in ({"positions": "none"}, {"positions": "relative"}, {"positions": "relative", "positions_at": "stem"}):
        without += [Vit(**dict(SMALL, **more)), Axial(**dict(SMALL, **more))]
    with torch.device("meta"):
        assert [collect.position_table(config.build()) for config in without] == [None] * 9
        for name, image, prefix in (("vit_tiny_patch16_224", (32, 64), 1), ("vit_small_patch14_reg4_dinov2", 28, 0)):
            encoder = TimmZoo(name=name, image=image).build()
            encoder.model.pos_embed = nn.Parameter(numbers(*encoder.model.pos_embed.shape).to("cpu"))
            found = collect.position_table(encoder)
            assert found is not None
            assert torch.equal(found, encoder.model.pos_embed[0, prefix:])


# --- features


def test_nearest_images_are_numpys():
    features = numbers(40, 6)
    features[7] = 3 * features[3]  # of the same direction: nearest, however long
    asked = torch.tensor([3, 0, 39, 12])
    found = collect.nearest(features, asked, 5)
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for one, neighbours in zip(asked.tolist(), found.tolist(), strict=True):
        similar = [-np.inf if other == one else float(rows[one] @ rows[other]) for other in range(40)]
        assert neighbours == sorted(range(40), key=lambda other: -similar[other])[:5]
    assert found[0, 0] == 7
    for one, neighbours in enumerate(collect.nearest(torch.ones(6, 4), torch.arange(6), 5).tolist()):
        assert sorted(neighbours) == [other for other in range(6) if other != one]  # not itself, also among copies


def test_two_dimensions_are_those_of_the_singular_values():
    features = numbers(30, 7) * torch.tensor([9.0, 4, 1, 1, 1, 1, 1]) + 50
    places, shares = collect.two_dimensions(features)
    assert places.shape == (30, 2)
    rows = features.double().numpy()
    rows = rows - rows.mean(0)
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(shares.numpy(), (values**2 / (values**2).sum())[:2], rtol=1e-4)
    for axis in (0, 1):
        wanted = rows @ directions[axis]
        found = places[:, axis].numpy()
        np.testing.assert_allclose(found * np.sign(found @ wanted), wanted, atol=1e-3)
