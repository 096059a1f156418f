"""The ViT and the Axial-ViT against timm and the paper: counts, places of dropout, order of patches (C1.x, C3.5)."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_vit import cost
from ssl_vit.encoders import linear
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.vit import DropPath, Vit
from ssl_vit.model import count_parameters
from ssl_vit.train.optim import is_kernel
from tests.encoders.kinds import TINY, VARIANTS, images, made

SMALL = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=(16, 24))


TOKENS = {14: [257, 1370], 16: [197, 577], 32: [50, 145]}


# paper Table 1 and reference 1.2 (C1.1, C1.2): trunk without head, and with a 1000-way linear head at two resolutions
@pytest.mark.parametrize(
    ("size", "patch", "trunk", "with_head", "larger", "with_head_larger", "gmac"),
    [
        ("Ti", 16, 5_524_416, 5_717_416, 384, 5_790_376, 1.253),
        ("S", 16, 21_665_664, 22_050_664, 384, 22_196_584, 4.598),
        ("B", 32, 87_455_232, 88_224_232, 384, 88_297_192, 4.408),
        ("B", 16, 85_798_656, 86_567_656, 384, 86_859_496, 17.563),
        ("L", 32, 305_510_400, 306_535_400, 384, 306_632_680, 15.377),
        ("L", 16, 303_301_632, 304_326_632, 384, 304_715_752, 61.554),
        ("H", 14, 630_764_800, 632_045_800, 518, 633_470_440, 167.294),
    ],
)
def test_parameters_and_macs_are_the_papers(size, patch, trunk, with_head, larger, with_head_larger, gmac):
    with torch.device("meta"):
        small = Vit(size=size, patch=patch).build()
        large = Vit(size=size, patch=patch, image=larger).build()
        head = nn.Linear(small.width, 1000)
    assert [one.pos_embed.shape[1] for one in (small, large)] == TOKENS[patch]  # type: ignore[union-attr]
    assert count_parameters(small) == trunk
    assert count_parameters(small) + count_parameters(head) == with_head
    assert count_parameters(large) + count_parameters(head) == with_head_larger
    assert round(cost.encoder_macs(small.config) / 1e9, 3) == gmac
    decayed = sum(p.numel() for name, p in small.named_parameters() if is_kernel(name, p))
    assert decayed == 85_524_480 or (size, patch) != ("B", 16)  # C4.3: the kernels of the paper


def test_vit_b16_equals_timm_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    """Where both use one library; oneDNN, which ours uses on a CPU, rounds otherwise. Of twelve blocks it has two."""
    torch.manual_seed(0)
    theirs: Any = timm.create_model("vit_base_patch16_224", num_classes=0, depth=2).eval()
    ours = Vit(size="B", depth=2).build().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = images(ours.config, 2)
    with torch.no_grad():
        want = theirs.forward_features(ours.normalise(image))
        torch.testing.assert_close(ours(image), want, atol=1e-5, rtol=0)
        monkeypatch.setattr(linear, "ONEDNN", False)
        assert torch.equal(ours(image), want)


def test_pixels_lie_between_minus_one_and_one_and_their_convolution_is_a_linear_layer_in_raster_order():
    encoder = SMALL.build()
    edges = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 24)
    assert encoder.normalise(edges).unique().tolist() == [-1.0, 1.0]
    pixels = encoder.normalise(images(SMALL))
    kernel: Any = encoder.patch_embed.proj
    flat = nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)  # C1.3
    want = nn.functional.linear(flat, kernel.weight.flatten(1), kernel.bias)
    torch.testing.assert_close(encoder.patch_embed(pixels), want, atol=1e-5, rtol=0)


def test_dropout_sits_at_the_papers_places():
    """C1.8: three a block and one after positions, none on the attention probabilities."""
    encoder = SMALL.model_copy(update={"dropout": 0.1}).build()
    places = [name for name, module in encoder.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.1]
    assert places == ["pos_drop"] + [f"blocks.{i}.{at}" for i in (0, 1) for at in ("drop", "mlp.drop1", "mlp.drop2")]


def test_heads_change_neither_parameters_nor_macs_and_a_size_that_does_not_fit_is_refused():
    few, many = (SMALL.model_copy(update={"heads": heads}) for heads in (1, 8))
    assert count_parameters(few.build()) == count_parameters(many.build())
    assert cost.encoder_macs(few) == cost.encoder_macs(many)
    with pytest.raises(ValueError, match="patches of 16; 32 x 32 can"):
        Vit(image=30).build()


def test_dropped_paths_are_whole_images_and_the_rest_is_scaled():
    """As timm's: a share of the images skips the branch, the others' is divided by what is kept."""
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    found = drop.train()(x)
    kept = found[:, 0, 0] > 0
    assert torch.equal(found, kept[:, None, None] * x / 0.75)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert drop.eval()(x) is x


def test_dropping_grows_with_depth_and_leaves_evaluation_alone():
    given = Vit.model_validate(TINY | {"depth": 5, "image": 8})
    plain, dropping = made(given).eval(), made(given.model_copy(update={"drop_path": 0.2}))
    shares = [1 - float(getattr(block.drop_path, "kept", 1)) for block in dropping.blocks]  # type: ignore[union-attr]
    assert shares == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    image = images(given)
    assert torch.equal(dropping.eval()(image), plain(image))
    assert not torch.equal(dropping.train()(image), plain(image))


# axial


def changed(encoder: Any, image: Tensor, rows: slice, columns: slice, through: Callable[[Tensor], Tensor]) -> Tensor:
    """Which cells of the grid tokens of differ once pixels of these cells do, bool [rows, columns]."""
    side, other = encoder.stride, image.clone()
    height, width = (slice(s.start * side, s.stop * side) for s in (rows, columns))
    other[:, :, height, width] ^= 255
    with torch.no_grad():
        differ = (through(image) != through(other)).any(2)[0]
    return differ.unflatten(0, encoder.grid)


def axial(**update: Any) -> Any:
    return made(Axial(**TINY | {"depth": 1, "image": (20, 16)} | update)).eval()


@pytest.mark.parametrize("variant", ["1d-stem", "2d-every", "relative-every", "none-None"])
def test_rows_and_columns_do_not_mix(variant):
    """C3.5a, b: bit-identical outside of the row, or column, that was changed; both together reach every cell."""
    encoder = axial(**VARIANTS[variant])
    rows, columns = encoder.blocks
    image, cell = images(encoder.config, 1), (slice(2, 3), slice(1, 2))

    def want(across: Any, down: Any) -> Tensor:
        expected = torch.zeros(encoder.grid, dtype=torch.bool)
        expected[down, across] = True
        return expected

    for block, expected in ((rows, want(slice(None), 2)), (columns, want(1, slice(None)))):
        found = changed(encoder, image, *cell, lambda x, block=block: encoder.through(block, encoder.embed(x)))
        assert torch.equal(found, expected)
    assert changed(encoder, image, *cell, encoder).all()


def test_axial_attention_doubles_what_a_block_has():
    """C3.5c; the sums of the reference are in tests/test_models.py."""
    sizes: dict[str, Any] = {"size": "B", "pool": "mean"}
    with torch.device("meta"):
        plain, double = Vit(**sizes, class_token=False).build(), Axial(**sizes).build()
    for part in (".attn.", ".mlp."):
        one, two = (sum(p.numel() for name, p in m.named_parameters() if part in name) for m in (plain, double))
        assert two == 2 * one > 0


@pytest.mark.parametrize("positions", ["none", "relative"])
def test_one_row_of_patches_is_ordinary_attention(positions):
    """C3.5d: the row block on a grid of one row is a ViT's block; the column block sees each patch alone."""
    sizes = TINY | {"image": (4, 24), "depth": 1, "positions": positions}
    line, plain = made(Axial(**sizes)).eval(), made(Vit(**sizes, class_token=False, pool="mean")).eval()
    block = {name.removeprefix("blocks.0."): v for name, v in line.state_dict().items() if name.startswith("blocks.0.")}
    plain.blocks[0].load_state_dict(block)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(line.blocks[0](x), plain.blocks[0](x))
        columns = line.blocks[1].attn
        alone = columns.proj(columns.qkv(x)[2].transpose(1, 2).flatten(2))  # a patch alone attends to itself
        torch.testing.assert_close(columns(x), alone)
