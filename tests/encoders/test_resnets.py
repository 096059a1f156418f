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
    assert tuple(features.shape) == (1, channels, *grid)
    assert tuple(tokens.shape) == (1, 1 + grid[0] * grid[1], 768)
    assert encoder.grid == grid
    assert encoder.patch_embed.proj.kernel_size == (1, 1)


def test_a_bottleneck_of_a_hybrid_starts_as_the_identity():
    """C3.1c: ReLU of what it is given, where no convolution projects its shortcut."""
    backbone = made(FEATURES["hybrid-16"]).patch_embed.backbone
    for stage, width, blocks in zip(backbone.stages, (256, 512, 1024), (3, 4, 9), strict=True):
        x = torch.randn(1, width, 6, 4, generator=torch.Generator().manual_seed(0))
        assert [torch.equal(block(x), x.relu()) for block in stage.blocks[1:]] == [True] * (blocks - 1)


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
    assert not any("BatchNorm" in type(module).__name__ for module in encoder.modules())
    assert {module.num_groups for module in encoder.modules() if isinstance(module, nn.GroupNorm)} == {32}
    assert list(dict(encoder.named_buffers())) == ["mean", "std"]
    encoder.double()  # sixteen blocks without training blow up rounding
    with torch.no_grad():
        torch.testing.assert_close(encoder(image)[:1], encoder(image[:1]), atol=1e-9, rtol=1e-9)


RESNETS = [(50, 2, [3, 4, 6, 3]), (101, 1, [3, 4, 23, 3]), (152, 1, [3, 8, 36, 3]), (200, 3, [3, 24, 36, 3])]


def test_resnets_are_the_papers_with_strides_on_the_3x3():
    for depth, widen, blocks in RESNETS:
        with torch.device("meta"):
            model: Any = Bit(depth=depth, widen=widen).create()
        assert [len(stage.blocks) for stage in model.stages] == blocks
        assert model.num_features == 2048 * widen
        layers = [(name.split(".")[-1], one) for name, one in model.stages.named_modules() if "downsample" not in name]
        strided = {name: one.kernel_size for name, one in layers if getattr(one, "stride", (1, 1)) != (1, 1)}
        assert strided == {"conv2": (3, 3)}


def test_the_hyper_rule_of_bit():
    """C3.2c, for less than 20,000 images: supports 100, 200, 300, 400, end at 500."""
    for step, want in {0: 0, 50: 0.0015, 100: 0.003, 250: 0.0003, 350: 3e-5, 400: 3e-6}.items():
        rate = learning_rate(step, 0.003, 500, 100, "step", (200, 300, 400))
        assert rate == pytest.approx(want, rel=1e-9, abs=1e-15), step


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
        assert (rows.columns, columns.columns, rows.grid) == (False, True, columns.grid)
        assert [2 * side - 1 for side in rows.grid] == [len(columns.offsets), len(rows.offsets)]
        sides.append(rows.grid)
    assert list(dict.fromkeys(sides)) == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(images(AxialResnet(image=(96, 64))))


def test_relative_positions_of_an_axial_resnet_act():
    """Without them its attention would not tell rows, or columns, apart: a permuted map gives a permuted map."""
    attention = made(FEATURES["axial_resnet"]).model.stages[0].blocks[1].conv2
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
