"""Position embeddings of every kind, their places, and their way to another resolution (C1.6, C1.7, C3.6)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from torch import Tensor, nn

from ssl_vit.encoders import layers, weights
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.vit import Vit
from ssl_vit.model import pool_tokens
from tests.encoders.kinds import CONFIGS, TINY, TRANSFORMERS, make_encoder, random_images

ORDER = torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 6, 4])


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if not name.startswith("axial")])
def test_only_positions_tell_patches_apart(name):
    """C1.6, C3.6a: without them what is read out does not see a permutation of the patches, with any it does."""
    encoder = make_encoder(CONFIGS[name]).eval()
    for key, parameter in encoder.named_parameters():
        if "pos" in key or "offsets" in key:
            nn.init.normal_(parameter, std=0.5)  # well above rounding
    image = random_images(CONFIGS[name])
    with torch.no_grad():
        original, permuted = encoder(image), encoder(image, edit=lambda patches: patches[:, ORDER])
    vectors = [pool_tokens(tokens, encoder.pool, encoder.prefix) for tokens in (original, permuted)]
    unchanged = torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert unchanged == ("none" in name)
    if "none" in name:
        torch.testing.assert_close(permuted[:, encoder.prefix :], original[:, encoder.prefix :][:, ORDER])


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if "-every" in name or "-shared" in name])
def test_positions_act_in_every_block(name):
    """Those of every layer and the shared ones still tell patches apart in the last block."""
    encoder = make_encoder(CONFIGS[name]).eval()
    block = encoder.blocks[-1]
    flat = torch.randn(1, encoder.prefix + 12, 16, generator=torch.Generator().manual_seed(1))
    flat[:, encoder.prefix :] = torch.randn(16) if encoder.config.positions != "relative" else flat[:, encoder.prefix :]
    with torch.no_grad():
        before = encoder.run_block(block, flat)
        for key, parameter in encoder.named_parameters():
            last = f"blocks.{len(encoder.blocks) - 1}"
            if key.startswith((f"{last}.pos", f"{last}.attn.offsets", "pos_embed", "offsets")):
                parameter.zero_()
        assert not torch.allclose(encoder.run_block(block, flat), before, atol=1e-6)


BOTH = 10_752 + 768  # X and Y, and the class token's row
TABLES: list[tuple[dict[str, Any], int, int]] = [
    ({}, 1, 151_296),
    ({"position_placement": "shared"}, 1, 151_296),
    ({"position_placement": "every"}, 12, 1_815_552),
    ({"positions": "2d"}, 3, BOTH),
    ({"positions": "2d", "class_token": False, "pool": "mean"}, 2, 10_752),
    ({"positions": "2d", "position_placement": "shared"}, 3, BOTH),
    ({"positions": "2d", "position_placement": "every"}, 36, 12 * BOTH),
    ({"positions": "relative"}, 12, 12 * 391 * 64),
    ({"positions": "relative", "position_placement": "shared"}, 1, 391 * 64),
    ({"positions": "none"}, 0, 0),
]


def test_tables_of_each_place():
    """C3.6e: one shared table, L tables of every layer; and the counts of reference 3.6 for B/16."""
    for settings, num_tables, num_parameters in TABLES:
        with torch.device("meta"):
            encoder = Vit(size="B", **settings).build()
        sizes = [p.numel() for name, p in encoder.named_parameters() if "pos" in name or "offsets" in name]
        assert (len(sizes), sum(sizes)) == (num_tables, num_parameters), settings
        assert len(set(sizes)) <= 1 or encoder.config.positions == "2d"


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize("token", [True, False])
def test_relative_positions_of_zero_are_none(at, token):
    """C3.6b"""
    sizes = TINY | {"class_token": token, "pool": "mean"}
    with_positions = make_encoder(Vit(**sizes, positions="relative", position_placement=at)).eval()
    without_positions = make_encoder(Vit(**sizes, positions="none")).eval()
    without_positions.load_state_dict({k: v for k, v in with_positions.state_dict().items() if "offsets" not in k})
    image = random_images(with_positions.config)
    with torch.no_grad():
        expected = without_positions(image)
        assert not torch.allclose(with_positions(image), expected, atol=1e-6)
        for name, parameter in with_positions.named_parameters():
            if "offsets" in name:
                parameter.zero_()
        torch.testing.assert_close(with_positions(image), expected, atol=1e-5, rtol=1e-5)


def test_relative_positions_are_a_second_key():
    """Written out over pairs; C3.6c: a constant added to all offsets changes nothing without class token."""
    for token in (True, False):
        encoder = make_encoder(Vit(**TINY, positions="relative", class_token=token, pool="mean")).eval()
        attention, p = encoder.blocks[0].attn, int(token)
        x = torch.randn(1, p + 12, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            nn.init.normal_(attention.offsets)
            q, k, v = (part[0] for part in attention.qkv(x))  # [heads, tokens, 8]
            logits, step = q @ k.transpose(1, 2), torch.arange(12)[:, None] - torch.arange(12)
            logits[:, p:, p:] += torch.einsum("hid,ijd->hij", q[:, p:], attention.offsets[step + 11])
            mixed = (logits / math.sqrt(8)).softmax(2) @ v
            expected = attention.proj(mixed.transpose(0, 1).reshape(1, p + 12, 16))
            torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)
            attention.offsets += torch.randn(8)
            assert torch.allclose(attention(x), expected, atol=1e-5) != token


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
def test_rows_of_a_2d_table_differ_alike_in_every_column(at):
    """C3.6d, and what a table holds: X and Y of half the width."""
    encoder = make_encoder(Vit(**TINY, positions="2d", position_placement=at))
    axes = encoder.blocks[1].pos if at == "every" else encoder.pos_embed
    table = axes()[0]
    assert torch.equal(table[:1], axes.prefix)
    grid = table[1:].unflatten(0, (3, 4))
    down, right = grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]
    assert torch.equal(down, down[:, :1].expand_as(down))
    assert torch.equal(right, right[:1].expand_as(right))
    assert (down[:, 0, :8] != 0).all()
    assert not torch.cat([down[:, 0, 8:], right[0, :, :8]]).any()


# in an image of another size, by the way that weights take (ssl_vit.encoders.weights.fill)


def zoom_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """What the authors' code makes of a table [N, D]."""
    grid = table.reshape(*old, -1).double().numpy()
    return np.asarray(zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)).reshape(new[0] * new[1], -1)


OLD, NEW = (3, 4), (7, 6)


def resize_positions(
    settings: dict[str, Any], change: Callable[[str, nn.Parameter], Any], new: tuple[int, int] = NEW
) -> Any:
    """An encoder of the new grid with the positions of one of the old grid, whose tables `change` has made."""
    encoder = make_encoder(Vit(**TINY | settings))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "pos" in name or "offsets" in name:
                change(name, parameter)
    larger = encoder.config.model_copy(update={"image": (4 * new[0], 4 * new[1])}).build()
    report = weights.load_weights(larger, encoder.config, encoder.state_dict(), "here")
    assert report.fraction == 1
    for name, value in larger.state_dict().items():
        if "pos" not in name and "offsets" not in name:
            assert torch.equal(value, encoder.state_dict()[name])
    assert (report.resized != []) == (new != OLD)
    return encoder, larger


def tables_of(encoder: Any) -> list[Tensor]:
    """Its position tables, [1 + N, D]."""
    tables = (
        [block.pos for block in encoder.blocks] if encoder.config.resolved_placement == "every" else [encoder.pos_embed]
    )
    return [(table() if isinstance(table, nn.Module) else table)[0].detach() for table in tables]


@pytest.mark.parametrize("new", [OLD, NEW, (2, 3), (6, 2)])
@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_tables_are_resized_as_by_the_authors_code(kind, at, new):
    """C1.7 for each kind of table; of the same size not a bit, nor the class token's row of any."""
    before, after = resize_positions(
        {"positions": kind, "position_placement": at}, lambda _n, p: nn.init.normal_(p), new
    )
    for small, large in zip(tables_of(before), tables_of(after), strict=True):
        assert torch.equal(large[0], small[0])
        assert torch.equal(large, small) or new != OLD
        np.testing.assert_allclose(large[1:], zoom_table(small[1:], OLD, new), rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize("new", [NEW, (7, 7), (2, 3), (3, 9)])
def test_relative_positions_are_resized(at, new):
    """The longest steps, corner to corner, and none stay; what is linear in the step of rows and columns stays so."""

    def fill(_name: str, parameter: nn.Parameter) -> None:
        parameter.copy_(torch.arange(-11.0, 12)[:, None].expand_as(parameter))  # 4 down + right

    before, after = resize_positions({"positions": "relative", "position_placement": at}, fill, new)
    tables = {name: p.detach() for name, p in after.named_parameters() if "offsets" in name}
    assert len(tables) == {"stem": 1, "every": 2, "shared": 1}[at]
    for name, large in tables.items():
        small = before.get_parameter(name).detach()
        assert len(large) == 2 * new[0] * new[1] - 1
        for index in (0, len(large) // 2, -1):
            torch.testing.assert_close(large[index], small[len(small) // 2 if index > 0 else index])
        # a pair of patches one row apart, or one column apart, not at a border
        middle = new[0] * new[1] - 1
        down, right = (OLD[0] - 1) / (new[0] - 1), (OLD[1] - 1) / (new[1] - 1)
        torch.testing.assert_close(large[middle + new[1]], torch.full((8,), 4 * down))
        torch.testing.assert_close(large[middle + 1], torch.full((8,), right))
    offsets = torch.randn(23, 8)
    assert torch.equal(layers.resize_offsets(offsets, OLD, OLD), offsets)


def test_lines_of_an_axial_encoder_are_resized_along_themselves():
    """Rows have the offsets of columns and columns those of rows; each is a line, resized corner to corner."""
    config = Axial(**TINY | {"depth": 1, "positions": "relative", "image": (20, 16)})  # 5 x 4 patches
    small, large = make_encoder(config), make_encoder(config.model_copy(update={"image": (28, 40)}))
    weights.load_weights(large, small.config, small.state_dict(), "here")
    for number, (old, new) in enumerate([(4, 10), (5, 7)]):
        table, resized_table = (encoder.blocks[number].attn.offsets.detach().numpy() for encoder in (small, large))
        assert (len(table), len(resized_table)) == (2 * old - 1, 2 * new - 1)
        positions = np.linspace(0, 2 * old - 2, 2 * new - 1)
        expected = np.stack([np.interp(positions, np.arange(2 * old - 1), column) for column in table.T], 1)
        np.testing.assert_allclose(resized_table, expected, atol=1e-6)
