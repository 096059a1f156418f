"""The ViT against timm's, the paper's counts, and its own contract."""

from typing import Any

import pytest
import torch
from torch import nn

from ssl_vit import cost
from ssl_vit.encoders import linear
from ssl_vit.encoders.vit import Vit
from ssl_vit.model import count_parameters
from ssl_vit.train.optim import is_kernel

TINY = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=(16, 24))


def images(config: Vit, count: int = 3) -> torch.Tensor:
    shape = (count, config.channels, *config.image_hw)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


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
    assert count_parameters(small) == trunk
    assert count_parameters(small) + count_parameters(head) == with_head
    assert count_parameters(large) + count_parameters(head) == with_head_larger
    assert round(cost.encoder_macs(small.config) / 1e9, 3) == gmac


@pytest.mark.parametrize(("image", "patch", "tokens"), [(224, 16, 197), (224, 32, 50), (224, 14, 257), (518, 14, 1370)])
def test_sequence_lengths(image, patch, tokens):
    with torch.device("meta"):
        encoder = Vit(size="Ti", patch=patch, image=image).build()
    assert isinstance(encoder.pos_embed, nn.Parameter)
    assert encoder.pos_embed.shape[1] == tokens


def test_weight_decay_falls_on_the_kernels_of_the_paper():
    with torch.device("meta"):
        encoder = Vit(size="B").build()
    decayed = sum(p.numel() for name, p in encoder.named_parameters() if is_kernel(name, p))
    assert decayed == 85_524_480  # C4.3


def test_vit_b16_equals_timm_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    """Where both use one library; oneDNN, which ours uses on a CPU, rounds otherwise."""
    import timm

    torch.manual_seed(0)
    theirs: Any = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    ours = Vit(size="B").build().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = images(ours.config, 2)
    with torch.no_grad():
        want = theirs.forward_features(ours.normalise(image))
        torch.testing.assert_close(ours(image), want, atol=1e-5, rtol=0)
        monkeypatch.setattr(linear, "ONEDNN", False)
        assert torch.equal(ours(image), want)


def test_pixels_lie_between_minus_one_and_one():
    encoder = TINY.build()
    edges = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 24)
    assert encoder.normalise(edges).unique().tolist() == [-1.0, 1.0]


def test_the_convolution_is_unfold_and_a_linear_layer_in_raster_order():
    encoder = TINY.build()
    pixels = encoder.normalise(images(TINY))
    kernel: Any = encoder.patch_embed.proj
    flat = nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)  # C1.3
    want = nn.functional.linear(flat, kernel.weight.flatten(1), kernel.bias)
    torch.testing.assert_close(encoder.patch_embed(pixels), want, atol=1e-5, rtol=0)


def test_edit_acts_on_patches_before_positions():
    encoder = TINY.build().eval()
    image, seen = images(TINY), []

    def edit(patches: torch.Tensor) -> torch.Tensor:
        seen.append(patches)
        return torch.zeros_like(patches)

    blank = encoder(image, edit=edit)
    assert torch.equal(seen[0], encoder.patch_embed(encoder.normalise(image)))
    assert torch.equal(blank[0], blank[1])  # nothing of the images is left, only positions
    assert not torch.allclose(blank[0, 1], blank[0, 2])


def test_select_gives_the_tokens_asked_for():
    encoder = TINY.build().eval()
    image = images(TINY)
    select = torch.tensor([[0, 3, 24], [5, 5, 1], [24, 0, 2]])
    every, some = encoder(image), encoder(image, select=select)
    assert every.shape == (3, 25, 32)
    torch.testing.assert_close(some, every.gather(1, select[:, :, None].expand(-1, -1, 32)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "changes"), [("none", False), ("1d", True)])
def test_only_positions_tell_patches_apart(kind, changes):
    """C1.6: without them, the class token does not see a permutation of the patches."""
    encoder = TINY.model_copy(update={"positions": kind}).build().eval()
    image = images(TINY)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    plain, permuted = encoder(image)[:, 0], encoder(image, edit=lambda patches: patches[:, order])[:, 0]
    assert torch.allclose(plain, permuted, atol=1e-5) != changes


def test_dropout_sits_at_the_papers_places():
    """C1.8: three a block and one after positions, none on the attention probabilities."""
    encoder = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=16, dropout=0.1).build()
    places = [name for name, module in encoder.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.1]
    assert places == ["pos_drop"] + [f"blocks.{i}.{at}" for i in (0, 1) for at in ("drop", "mlp.drop1", "mlp.drop2")]


def test_heads_change_neither_parameters_nor_macs():
    few, many = (TINY.model_copy(update={"heads": heads}) for heads in (1, 8))
    assert count_parameters(few.build()) == count_parameters(many.build())
    assert cost.encoder_macs(few) == cost.encoder_macs(many)


def test_gradients_reach_every_parameter():
    encoder = TINY.build()
    encoder(images(TINY)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
def test_the_blocks_compile_without_a_graph_break():
    encoder = TINY.build()
    image = images(TINY)
    want = encoder(image)
    for block in encoder.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(encoder(image), want)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches of 16; 32 x 32 can"):
        Vit(image=30).build()
    with pytest.raises(ValueError, match="the encoder takes"):
        TINY.build()(torch.zeros(1, 3, 24, 16, dtype=torch.uint8))


def test_other_channel_counts_work():
    config = TINY.model_copy(update={"channels": 1})
    assert config.build()(images(config)).shape == (3, 25, 32)


def test_dropped_paths_are_whole_images_and_the_rest_is_scaled():
    """As timm's: a share of the images skips the branch, the others' is divided by what is kept."""
    from ssl_vit.encoders.vit import DropPath

    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    made = drop.train()(x)
    kept = made[:, 0, 0] > 0
    assert torch.equal(made, kept[:, None, None] * x / 0.75)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert drop.eval()(x) is x


def test_dropping_grows_with_depth_and_leaves_evaluation_alone():
    sizes = {"size": "Ti", "width": 16, "depth": 5, "heads": 2, "patch": 4, "image": 8}
    torch.manual_seed(0)
    plain = Vit(**sizes).build().eval()
    torch.manual_seed(0)
    dropping = Vit(**sizes, drop_path=0.2).build()
    shares = [1 - float(getattr(block.drop_path, "kept", 1)) for block in dropping.blocks]  # type: ignore[union-attr]
    assert shares == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(dropping.eval()(image), plain(image))
    assert not torch.equal(dropping.train()(image), plain(image))


def test_tokens_of_any_layer_are_what_the_blocks_give():
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=16, depth=3, heads=2, patch=4, image=8).build().eval()
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    seen = {}
    for number, block in enumerate(encoder.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.update({number: out}))
    whole = encoder(image)
    found = encoder.layers(image, {1, 3})
    assert found.keys() == {1, 3}
    assert torch.equal(found[3], whole)
    assert torch.equal(found[1], encoder.norm(seen[1]))
