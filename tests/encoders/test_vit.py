"""Encoders against timm and the papers: counts, dropout, order of patches, ResNets (C1.x, C3.1, C3.2, C3.5)."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit import config, recipes
from ssl_vit.encoders import layers
from ssl_vit.encoders.axial import Axial, AxialResnet
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import DropPath, Vit
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.estimate import cost
from ssl_vit.model import count_parameters
from ssl_vit.recipes import Pretrain
from ssl_vit.train.optim import is_kernel, learning_rate
from tests.encoders.kinds import FEATURES, TINY, VARIANTS, make_encoder, random_images

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
    assert [encoder.pos_embed.shape[1] for encoder in (small, large)] == TOKENS[patch]  # type: ignore[union-attr]
    assert count_parameters(small) == trunk
    assert count_parameters(small) + count_parameters(head) == with_head
    assert count_parameters(large) + count_parameters(head) == with_head_larger
    assert round(cost.encoder_macs(small.config) / 1e9, 3) == gmac
    decayed = sum(p.numel() for name, p in small.named_parameters() if is_kernel(name, p))
    assert decayed == 85_524_480 or (size, patch) != ("B", 16)  # C4.3: the kernels of the paper


def test_vit_b16_equals_timm_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    """Where both use one library; oneDNN, which ours uses on a CPU, rounds otherwise. Of twelve blocks it has two."""
    torch.manual_seed(0)
    timm_model: Any = timm.create_model("vit_base_patch16_224", num_classes=0, depth=2).eval()
    encoder = Vit(size="B", depth=2).build().eval()
    encoder.load_state_dict(timm_model.state_dict(), strict=True)
    image = random_images(encoder.config, 2)
    with torch.no_grad():
        expected = timm_model.forward_features(encoder.normalize(image))
        torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=0)
        monkeypatch.setattr(layers, "ONEDNN", False)
        assert torch.equal(encoder(image), expected)


def test_pixels_lie_between_minus_one_and_one_and_their_convolution_is_a_linear_layer_in_raster_order():
    encoder = SMALL.build()
    edges = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 24)
    assert encoder.normalize(edges).unique().tolist() == [-1.0, 1.0]
    pixels = encoder.normalize(random_images(SMALL))
    kernel: Any = encoder.patch_embed.proj
    flat = nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)  # C1.3
    expected = nn.functional.linear(flat, kernel.weight.flatten(1), kernel.bias)
    torch.testing.assert_close(encoder.patch_embed(pixels), expected, atol=1e-5, rtol=0)


def test_dropout_sits_at_the_papers_places():
    """C1.8: three a block and one after positions, none on the attention probabilities."""
    encoder = SMALL.model_copy(update={"dropout": 0.1}).build()
    dropout_names = [
        name for name, module in encoder.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.1
    ]
    assert dropout_names == ["pos_drop"] + [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("drop", "mlp.drop1", "mlp.drop2")
    ]


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
    output = drop.train()(x)
    is_kept = output[:, 0, 0] > 0
    assert torch.equal(output, is_kept[:, None, None] * x / 0.75)
    assert float(is_kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert drop.eval()(x) is x


def test_dropping_grows_with_depth_and_leaves_evaluation_alone():
    vit_config = Vit.model_validate(TINY | {"depth": 5, "image": 8})
    reference, dropping = (
        make_encoder(vit_config).eval(),
        make_encoder(vit_config.model_copy(update={"drop_path": 0.2})),
    )
    shares = [1 - float(getattr(block.drop_path, "keep_prob", 1)) for block in dropping.blocks]  # type: ignore[union-attr]
    assert shares == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    image = random_images(vit_config)
    assert torch.equal(dropping.eval()(image), reference(image))
    assert not torch.equal(dropping.train()(image), reference(image))


# axial


def changed_cells(
    encoder: Any, image: Tensor, rows: slice, columns: slice, forward: Callable[[Tensor], Tensor]
) -> Tensor:
    """Which cells of the grid tokens of differ once pixels of these cells do, bool [rows, columns]."""
    stride, inverted = encoder.stride, image.clone()
    height, width = (slice(s.start * stride, s.stop * stride) for s in (rows, columns))
    inverted[:, :, height, width] ^= 255
    with torch.no_grad():
        differ = (forward(image) != forward(inverted)).any(2)[0]
    return differ.unflatten(0, encoder.grid)


def make_axial(**update: Any) -> Any:
    return make_encoder(Axial(**TINY | {"depth": 1, "image": (20, 16)} | update)).eval()


@pytest.mark.parametrize("variant", ["1d-stem", "2d-every", "relative-every", "none-None"])
def test_rows_and_columns_do_not_mix(variant):
    """C3.5a, b: bit-identical outside of the row, or column, that was changed; both together reach every cell."""
    encoder = make_axial(**VARIANTS[variant])
    rows, columns = encoder.blocks
    image, cell = random_images(encoder.config, 1), (slice(2, 3), slice(1, 2))

    def expected_cells(across: Any, down: Any) -> Tensor:
        cells = torch.zeros(encoder.grid, dtype=torch.bool)
        cells[down, across] = True
        return cells

    for block, expected in ((rows, expected_cells(slice(None), 2)), (columns, expected_cells(1, slice(None)))):
        actual = changed_cells(encoder, image, *cell, lambda x, block=block: encoder.run_block(block, encoder.embed(x)))
        assert torch.equal(actual, expected)
    assert changed_cells(encoder, image, *cell, encoder).all()


@pytest.mark.parametrize("positions", ["none", "relative"])
def test_one_row_of_patches_is_ordinary_attention(positions):
    """C3.5d: the row block on a grid of one row is a ViT's block; the column block sees each patch alone."""
    sizes = TINY | {"image": (4, 24), "depth": 1, "positions": positions}
    axial_encoder, vit_encoder = (
        make_encoder(Axial(**sizes)).eval(),
        make_encoder(Vit(**sizes, class_token=False, pool="mean")).eval(),
    )
    block = {
        name.removeprefix("blocks.0."): v
        for name, v in axial_encoder.state_dict().items()
        if name.startswith("blocks.0.")
    }
    vit_encoder.blocks[0].load_state_dict(block)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(axial_encoder.blocks[0](x), vit_encoder.blocks[0](x))
        columns = axial_encoder.blocks[1].attn
        alone = columns.proj(columns.qkv(x)[2].transpose(1, 2).flatten(2))  # a patch alone attends to itself
        torch.testing.assert_close(columns(x), alone)


# hybrids, ResNets


@pytest.mark.parametrize(
    ("patch", "blocks", "channels", "grid"), [(32, [3, 4, 6, 3], 2048, (7, 7)), (16, [3, 4, 9], 1024, (14, 14))]
)
def test_a_hybrid_takes_its_patches_from_a_feature_map(patch, blocks, channels, grid):
    """C3.1a, b"""
    with torch.device("meta"):
        encoder: Any = Vit(stem="r50", patch=patch).build()
        features = encoder.patch_embed.backbone(torch.empty(1, 3, 224, 224))
        tokens = encoder(torch.empty(1, 3, 224, 224, dtype=torch.uint8))
    features = features[-1] if isinstance(features, list) else features
    assert [len(stage.blocks) for stage in encoder.patch_embed.backbone.stages] == blocks
    assert tuple(features.shape) == (1, channels, *grid)
    assert tuple(tokens.shape) == (1, 1 + grid[0] * grid[1], 768)
    assert encoder.grid == grid
    assert encoder.patch_embed.proj.kernel_size == (1, 1)


def test_a_bottleneck_of_a_hybrid_starts_as_the_identity():
    """C3.1c: ReLU of what it is given, where no convolution projects its shortcut."""
    backbone = make_encoder(FEATURES["hybrid-16"]).patch_embed.backbone
    for stage, width, blocks in zip(backbone.stages, (256, 512, 1024), (3, 4, 9), strict=True):
        x = torch.randn(1, width, 6, 4, generator=torch.Generator().manual_seed(0))
        assert [torch.equal(block(x), x.relu()) for block in stage.blocks[1:]] == [True] * (blocks - 1)


@pytest.mark.parametrize("name", ["bit", "hybrid-16", "axial_resnet"])
def test_convolutions_are_standardised(name, monkeypatch):
    """C3.2a: seen where they are applied, each filter has mean 0 and deviation 1, but for the embedding of a hybrid."""
    encoder, seen_weights = make_encoder(FEATURES[name]).eval(), []
    conv2d = F.conv2d

    def spy(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        seen_weights.append(weight.detach())
        return conv2d(x, weight, *args)

    monkeypatch.setattr(layers, "ONEDNN", False)  # which makes convolutions of linear layers
    monkeypatch.setattr(F, "conv2d", spy)
    with torch.no_grad():
        encoder(random_images(encoder.config, 1))
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    unstandardized = [
        weight for weight in seen_weights if any(weight.data_ptr() == conv.weight.data_ptr() for conv in convolutions)
    ]
    assert len(unstandardized) == ("hybrid" in name)
    standardized = [weight for weight in seen_weights if all(weight is not excluded for excluded in unstandardized)]
    assert len(standardized) == len(convolutions) - len(unstandardized) > 30
    for weight in standardized:
        assert weight.mean((1, 2, 3)).abs().max() < 1e-6
        assert (weight.std((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["bit", "axial_resnet", "hybrid-16"])
def test_an_image_does_not_see_the_others(name):
    """C3.2b: no batch statistics, in training neither."""
    encoder, image = make_encoder(FEATURES[name]).train(), random_images(FEATURES[name], 3)
    assert not any("BatchNorm" in type(module).__name__ for module in encoder.modules())
    assert {module.num_groups for module in encoder.modules() if isinstance(module, nn.GroupNorm)} == {32}
    assert list(dict(encoder.named_buffers())) == ["mean", "std"]
    encoder.double()  # sixteen blocks without training blow up rounding
    with torch.no_grad():
        torch.testing.assert_close(encoder(image)[:1], encoder(image[:1]), atol=1e-9, rtol=1e-9)


RESNETS: list[Any] = [(50, 2, [3, 4, 6, 3]), (101, 1, [3, 4, 23, 3]), (152, 1, [3, 8, 36, 3]), (200, 3, [3, 24, 36, 3])]


def test_resnets_are_the_papers_with_strides_on_the_3x3():
    for depth, widen, blocks in RESNETS:
        with torch.device("meta"):
            model: Any = Bit(depth=depth, widen=widen).create()
        assert [len(stage.blocks) for stage in model.stages] == blocks
        assert model.num_features == 2048 * widen
        named_layers = [
            (name.split(".")[-1], module) for name, module in model.stages.named_modules() if "downsample" not in name
        ]
        strided = {
            name: layer.kernel_size for name, layer in named_layers if getattr(layer, "stride", (1, 1)) != (1, 1)
        }
        assert strided == {"conv2": (3, 3)}


def test_the_hyper_rule_of_bit():
    """C3.2c, for less than 20,000 images: supports 100, 200, 300, 400, end at 500."""
    for step, expected in {0: 0, 50: 0.0015, 100: 0.003, 250: 0.0003, 350: 3e-5, 400: 3e-6}.items():
        rate = learning_rate(step, 0.003, 500, 100, "step", (200, 300, 400))
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_an_axial_resnet_has_attention_for_3x3_convolutions():
    encoder = make_encoder(FEATURES["axial_resnet"]).eval()
    kernels = {module.kernel_size for module in encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kernels == {(7, 7), (1, 1)}
    blocks = [block for stage in encoder.model.stages for block in stage.blocks]
    assert len(blocks) == 16
    sides = []
    for block in blocks:
        rows, columns = block.conv2.rows, block.conv2.columns
        assert (rows.columns, columns.columns, rows.grid) == (False, True, columns.grid)
        assert [2 * side - 1 for side in rows.grid] == [len(columns.offsets), len(rows.offsets)]
        sides.append(rows.grid)
    assert list(dict.fromkeys(sides)) == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(random_images(AxialResnet(image=(96, 64))))


def test_relative_positions_of_an_axial_resnet_act():
    """Without them its attention would not tell rows, or columns, apart: a permuted map gives a permuted map."""
    attention = make_encoder(FEATURES["axial_resnet"]).model.stages[0].blocks[1].conv2
    rows, columns = attention.rows.grid
    x = torch.randn(1, 64, rows, columns, generator=torch.Generator().manual_seed(0))
    swap = torch.tensor([5, *range(1, 5), 0, *range(6, rows)])
    with torch.no_grad():
        assert not torch.allclose(attention(x[:, :, swap]), attention(x)[:, :, swap], atol=1e-5)
        for part, order in ((attention.columns, swap), (attention.rows, torch.arange(columns).flip(0))):
            part.offsets.zero_()
            axis = 2 if part is attention.columns else 3
            moved = attention(x.index_select(axis, order))
            torch.testing.assert_close(moved, attention(x).index_select(axis, order), atol=1e-5, rtol=1e-4)


# of timm's models, what its own forward pass does behind the tokens


@pytest.mark.parametrize(
    ("name", "part"),
    [("test_vit3", "attn_pool"), ("vit_relpos_small_patch16_224", "fc_norm"), ("test_convnext", "norm")],
)
def test_no_part_of_timms_head_is_left_to_train(name, part):
    encoder = make_encoder(TimmZoo(name=name, image=32))
    encoder(random_images(encoder.config)).square().sum().backward()
    missed = {key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert missed == set(), part


def test_a_size_that_timm_cannot_cut_is_refused():
    args = ["encoder.kind=timm", "encoder.name=test_vit", "data.image_size=56", "head.kind=classifier"]
    with pytest.raises(ExitError) as error:
        recipes.resolve_recipe(config.parse(Pretrain, args))
    assert error.value.code == ExitCode.USAGE


def test_timms_models_recompute_or_say_that_they_cannot():
    with torch.device("meta"):
        able, unable = Bit(image=64).build(), TimmZoo(name="dla34", image=64).build()
    for enabled in (True, False):
        able.activation_checkpointing = enabled
        assert able.activation_checkpointing == enabled
        assert {stage.grad_checkpointing for stage in able.model.stages} == {enabled}
    unable.activation_checkpointing = False
    with pytest.raises(ExitError, match="dla34 has none"):
        unable.activation_checkpointing = True
