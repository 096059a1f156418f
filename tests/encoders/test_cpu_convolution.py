"""On a CPU every convolution is computed in fp32, whatever precision is asked for (issue 17)."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.encoders.layers import convolve_in_fp32_on_cpu
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit

SHAPES = {  # channels, kernel, stride, padding, image: on CPUs with AMX all but the last are wrong in bf16
    "4 channels": (4, 16, 16, 0, (32, 32)),
    "16 channels, 4": (16, 4, 4, 0, (32, 32)),
    "16 channels, 8": (16, 8, 8, 0, (32, 32)),
    "16 channels, 16": (16, 16, 16, 0, (32, 32)),
    "512 channels": (512, 3, 2, 1, (4, 2)),
    "3 channels": (3, 16, 16, 0, (32, 32)),
}


def std_conv(*arguments: Any, **options: Any) -> nn.Module:
    from timm.layers.std_conv import StdConv2d

    return StdConv2d(*arguments, **options)


def std_conv_same(*arguments: Any, **options: Any) -> nn.Module:
    from timm.layers.std_conv import StdConv2dSame

    return StdConv2dSame(*arguments, **{**options, "padding": "same" if options["padding"] else 0})


@pytest.mark.parametrize("make", [nn.Conv2d, std_conv, std_conv_same])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half_weights", [False, True], ids=["autocast", "bf16 weights"])
def test_output_and_gradients_are_those_of_fp32(make: Callable[..., nn.Module], shape: str, half_weights: bool):
    """Rounded once, at the end: so much nearer than a convolution of bf16 products."""
    channels, kernel, stride, padding, size = SHAPES[shape]
    torch.manual_seed(0)
    layer = nn.Sequential(make(channels, 32, kernel, stride=stride, padding=padding))
    image = torch.randn(2, channels, *size).bfloat16().float()
    if half_weights:
        layer.bfloat16()
    exact = copy.deepcopy(layer).double()
    convolve_in_fp32_on_cpu(layer)
    expected = exact(image.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=not half_weights):
        actual = layer(image.bfloat16() if half_weights else image)
    assert actual.dtype == torch.bfloat16
    # weights that are standardized are so in their own precision
    coarse = half_weights and make is not nn.Conv2d
    assert relative_error(actual, expected) < (2e-2 if coarse else 3e-3)
    output_gradient = torch.randn_like(expected).bfloat16()
    expected.backward(output_gradient.double())
    actual.backward(output_gradient)
    for parameter, exact_parameter in zip(layer.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, exact_parameter.grad) < (3e-2 if coarse else 4e-3)


def relative_error(actual: Tensor, expected: Any) -> float:
    return float((actual.double() - expected).detach().norm() / expected.detach().norm())


ENCODERS = {
    "vit": Vit(width=16, depth=1, heads=2, patch=16, image=32, channels=4),
    "hybrid": Vit(width=16, depth=1, heads=2, patch=32, image=64, stem="r50"),
    "bit": Bit(image=32),
    "timm vit": TimmZoo(name="vit_tiny_patch16_224", image=32),
    "timm resnet with BlurPool2d": TimmZoo(name="resnetblur18", image=32),
    "timm convnext": TimmZoo(name="convnext_atto", image=32),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_no_encoder_convolves_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch):
    """Neither under autocast nor with bf16 weights, also where activation checkpointing computes a block again."""
    encoder = ENCODERS[name].build()
    image = torch.randint(0, 256, (2, encoder.channels, *encoder.config.image_hw), dtype=torch.uint8)
    dtypes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "convolution" in str(func):
                dtypes.extend(part.dtype for part in args if isinstance(part, Tensor))
            return func(*args, **(kwargs or {}))

    if name in ("bit", "hybrid"):
        encoder.activation_checkpointing = True
    with Watch(), torch.autocast("cpu", torch.bfloat16):
        encoder(image).float().sum().backward()
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    encoder.bfloat16()
    with Watch():
        encoder(image).float().sum().backward()
    assert set(dtypes) == {torch.float32}


def test_fp32_is_left_alone():
    """The same bits, and nothing in the way of copying and pickling."""
    reference = nn.Sequential(nn.Conv2d(3, 8, 4))
    layer = copy.deepcopy(reference)
    convolve_in_fp32_on_cpu(layer)
    image = torch.randn(2, 3, 16, 16)
    for candidate in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(candidate(image), reference(image))
        convolution: Any = candidate[0]
        assert convolution.forward.args[0] is convolution
