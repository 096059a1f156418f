"""Hybrids, ResNets and models of timm: what the paper and timm say of each (C3.1, C3.2, C3.5)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit import config, recipe
from ssl_vit.encoders import linear
from ssl_vit.encoders.axial import AxialResnet
from ssl_vit.encoders.timm_zoo import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.recipe import Pretrain
from ssl_vit.train.optim import learning_rate
from tests.encoders.kinds import FEATURES, images, made


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
    assert sum(blocks) == 16
    assert tuple(features.shape) == (1, channels, *grid)
    assert tuple(tokens.shape) == (1, 1 + grid[0] * grid[1], 768)
    assert encoder.grid == grid
    assert encoder.patch_embed.proj.kernel_size == (1, 1)


def test_a_bottleneck_of_a_hybrid_starts_as_the_identity():
    """C3.1c: ReLU of what it is given, where no convolution projects its shortcut."""
    backbone = made(FEATURES["hybrid-16"]).patch_embed.backbone
    checked = 0
    for stage, width in zip(backbone.stages, (256, 512, 1024), strict=True):
        x = torch.randn(1, width, 6, 4, generator=torch.Generator().manual_seed(0))
        for block in stage.blocks[1:]:
            assert torch.equal(block(x), x.relu())
            checked += 1
    assert checked == 13


@pytest.mark.parametrize("name", ["bit", "hybrid-16", "axial_resnet"])
def test_convolutions_are_standardised(name, monkeypatch):
    """C3.2a: seen where they are applied, each filter has mean 0 and deviation 1, but for the embedding of a hybrid."""
    encoder, seen = made(FEATURES[name]).eval(), []
    conv2d = F.conv2d

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight.detach())
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(linear, "ONEDNN", False)  # which makes convolutions of linear layers

    monkeypatch.setattr(F, "conv2d", spy)
    with torch.no_grad():
        encoder(images(encoder.config, 1))
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    plain = [weight for weight in seen if any(weight.data_ptr() == conv.weight.data_ptr() for conv in convolutions)]
    assert len(plain) == ("hybrid" in name)
    rest = [weight for weight in seen if all(weight is not one for one in plain)]
    assert len(rest) == len(convolutions) - len(plain) > 30
    for weight in rest:
        assert weight.mean((1, 2, 3)).abs().max() < 1e-6
        assert (weight.std((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["bit", "axial_resnet", "hybrid-16"])
def test_an_image_does_not_see_the_others(name):
    """C3.2b: no batch statistics, in training neither."""
    encoder, image = made(FEATURES[name]).train(), images(FEATURES[name], 3)
    kinds = {type(module).__name__ for module in encoder.modules()}
    assert not any("BatchNorm" in kind for kind in kinds)
    groups = {module.num_groups for module in encoder.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {32}
    assert list(dict(encoder.named_buffers())) == ["mean", "std"]
    encoder.double()  # sixteen blocks without training blow up rounding
    with torch.no_grad():
        torch.testing.assert_close(encoder(image)[:1], encoder(image[:1]), atol=1e-9, rtol=1e-9)


RESNETS = [(50, 2, [3, 4, 6, 3]), (101, 1, [3, 4, 23, 3]), (152, 1, [3, 8, 36, 3]), (200, 3, [3, 24, 36, 3])]


@pytest.mark.parametrize(("depth", "widen", "blocks"), RESNETS)
def test_resnets_are_the_papers(depth, widen, blocks):
    with torch.device("meta"):
        model: Any = Bit(depth=depth, widen=widen).create()
    assert [len(stage.blocks) for stage in model.stages] == blocks
    assert model.num_features == 2048 * widen


def test_strides_of_a_bit_sit_on_the_3x3():
    encoder: Any = made(FEATURES["bit"])
    strided = {
        name.split(".")[-1]: module.kernel_size
        for name, module in encoder.model.stages.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1) and "downsample" not in name
    }
    assert strided == {"conv2": (3, 3)}


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0), (50, 0.0015), (100, 0.003), (250, 0.0003), (350, 3e-5), (400, 3e-6)]
)
def test_the_hyper_rule_of_bit(step, want):
    """C3.2c, for less than 20,000 images: supports 100, 200, 300, 400, end at 500."""
    rate = learning_rate(step, 0.003, 500, 100, "step", (200, 300, 400))
    assert rate == pytest.approx(want, rel=1e-9, abs=1e-15)


# axial


def test_an_axial_resnet_has_attention_for_3x3_convolutions():
    encoder = made(FEATURES["axial_resnet"]).eval()
    kernels = {module.kernel_size for module in encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kernels == {(7, 7), (1, 1)}
    blocks = [block for stage in encoder.model.stages for block in stage.blocks]
    assert len(blocks) == 16
    sides = []
    for block in blocks:
        rows, columns = block.conv2.rows, block.conv2.columns
        assert not rows.columns
        assert columns.columns
        assert rows.grid == columns.grid
        assert rows.offsets.shape[0] == 2 * rows.grid[1] - 1
        assert columns.offsets.shape[0] == 2 * rows.grid[0] - 1
        sides.append(rows.grid)
    assert list(dict.fromkeys(sides)) == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(images(AxialResnet(image=(96, 64))))


def test_relative_positions_of_an_axial_resnet_act():
    """Without them its attention would not tell rows, or columns, apart: a permuted map gives a permuted map."""
    attention = made(FEATURES["axial_resnet"]).model.stages[0].blocks[1].conv2
    rows, columns = attention.rows.grid
    x = torch.randn(1, 64, rows, columns, generator=torch.Generator().manual_seed(0))
    swap = torch.arange(rows)
    swap[0], swap[5] = 5, 0
    with torch.no_grad():
        assert not torch.allclose(attention(x[:, :, swap]), attention(x)[:, :, swap], atol=1e-5)
        for part, order in ((attention.columns, swap), (attention.rows, torch.arange(columns).flip(0))):
            part.offsets.zero_()
            given = x[:, :, order] if part is attention.columns else x[:, :, :, order]
            whole_, moved = attention(x), attention(given)
            moved_back = whole_[:, :, order] if part is attention.columns else whole_[:, :, :, order]
            torch.testing.assert_close(moved, moved_back, atol=1e-5, rtol=1e-4)


# of timm's models, what its own forward pass does behind the tokens


@pytest.mark.parametrize(
    ("name", "part"),
    [("test_vit3", "attn_pool"), ("vit_relpos_small_patch16_224", "fc_norm"), ("test_convnext", "norm")],
)
def test_no_part_of_timms_head_is_left_to_train(name, part):
    encoder = made(TimmZoo(name=name, image=32))
    encoder(images(encoder.config)).square().sum().backward()
    missed = {key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert missed == set(), part


@pytest.mark.parametrize("name", ["test_vit", "test_vit4"])
def test_timms_vits_with_patches_as_a_map_are_maskable(name):
    encoder = made(TimmZoo(name=name, image=(32, 48))).eval()
    assert encoder.maskable
    assert encoder.depth > 1
    blank = encoder(images(encoder.config), edit=torch.zeros_like)
    assert torch.equal(blank[0], blank[1])


def test_a_size_that_timm_cannot_cut_is_refused():
    given = ["encoder.kind=timm", "encoder.name=test_vit", "data.image_size=56", "head.kind=classifier"]
    with pytest.raises(Refusal) as end:
        recipe.resolve(config.parse(Pretrain, given, recipe.FOLDER))
    assert end.value.code == USAGE


def test_timms_models_recompute_or_say_that_they_cannot():
    with torch.device("meta"):
        able, unable = Bit(image=64).build(), TimmZoo(name="dla34", image=64).build()
    for wanted in (True, False):
        able.activation_checkpointing = wanted
        assert able.activation_checkpointing == wanted
        assert {stage.grad_checkpointing for stage in able.model.stages} == {wanted}
    unable.activation_checkpointing = False
    with pytest.raises(Refusal, match="dla34 has none"):
        unable.activation_checkpointing = True
