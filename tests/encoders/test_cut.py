"""The patch embedding as a matrix product is the convolution; a bf16 residual is near an fp32 one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.encoders.vit import Cut, Vit
from tests.encoders.test_contract import TRANSFORMERS, images, made

SIDES = [(1, 4, 4), (3, 16, 16), (3, 12, 20), (4, 8, 24), (7, 36, 4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize(("channels", "height", "width"), SIDES)
def test_the_product_is_the_convolution(channels: int, height: int, width: int, patch: int, bias: bool):
    torch.manual_seed(0)
    cut = Cut(channels, 24, kernel_size=patch, stride=patch, bias=bias).double()
    pixels = torch.randn(2, channels, height, width, dtype=torch.float64)
    for laid_out in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.flip(0)[::2]):
        x = laid_out.detach().requires_grad_()
        mine, theirs = cut.product(x), F.conv2d(x, cut.weight, cut.bias, stride=patch)
        assert mine.shape == theirs.shape == (len(x), 24, height // patch, width // patch)
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
        back = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given = [x, *cut.parameters()]
        pairs = zip(torch.autograd.grad(mine, given, back), torch.autograd.grad(theirs, given, back), strict=True)
        for got, want in pairs:
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["vit-1d-stem", "vit-grey", "vit-four-channels", "axial-2d-every"])
def test_an_encoder_by_products_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    encoder, image = made(TRANSFORMERS[name]).eval(), images(TRANSFORMERS[name])
    with torch.no_grad():
        want = encoder(image)
        monkeypatch.setattr(Cut, "forward", Cut.product)
        torch.testing.assert_close(encoder(image), want, atol=1e-5, rtol=1e-5)


def test_patches_of_a_product_lie_as_the_next_layer_wants_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cut, "forward", Cut.product)
    encoder = made(TRANSFORMERS["vit-1d-stem"])
    assert encoder.patch_embed(torch.zeros(2, 3, 12, 16)).is_contiguous()


def streams(encoder: Any, image: Tensor, residual: torch.dtype | None) -> tuple[Tensor, set[torch.dtype]]:
    """The tokens under bf16 autocast, and the types of what blocks give."""
    encoder.residual, kinds = residual, set()
    hooks = [block.register_forward_hook(lambda _m, _given, out: kinds.add(out.dtype)) for block in encoder.blocks]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(image)
    for hook in hooks:
        hook.remove()
    return tokens, kinds


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_add_in_fp32_under_autocast(name: str):
    _, kinds = streams(made(TRANSFORMERS[name]), images(TRANSFORMERS[name]), None)
    assert kinds == {torch.float32}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_add_in_bf16_where_that_is_said(name: str):
    encoder, image = made(TRANSFORMERS[name]), images(TRANSFORMERS[name])
    plain, _ = streams(encoder, image, None)
    bf16, kinds = streams(encoder, image, torch.bfloat16)
    assert kinds == {torch.bfloat16}
    assert (bf16 - plain).norm() < 0.02 * plain.norm()
    bf16.float().square().sum().backward()
    for parameter in encoder.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_gradients_of_a_bf16_residual_are_near_those_of_autocast():
    config = Vit(size="Ti", width=32, depth=4, heads=2, patch=4, image=16)
    image, found = images(config, 4), []
    weight = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(0))
    for kind in (None, torch.bfloat16):
        encoder = made(config)
        tokens, _ = streams(encoder, image, kind)
        (tokens.float() * weight).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert F.cosine_similarity(*found, dim=0) > 0.999
