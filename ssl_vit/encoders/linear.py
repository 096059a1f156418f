"""Linear layers and convolutions of all encoders and heads: torch's, by what is fast on a CPU, and right there."""

import platform
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
ROWS, PRODUCTS = 256, 1 << 23  # below these, measured: what oneDNN spends on the order of a weight is not won back
LOW_PRECISION = (torch.bfloat16, torch.float16)
NUMBERS = 20_480  # up to so many in one image torch does not give its convolution to oneDNN


class Linear(nn.Linear):
    """[..., in] -> [..., out]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., in] times weight [out, in] plus bias [out] -> [..., out].

    torch multiplies fp32 matrices on a CPU by MKL, which uses AVX2 on processors that are not Intel's, and has oneDNN,
    which uses AVX-512 there, compute convolutions. So a large product is a convolution of one pixel: up to twice as
    fast, and equal but for rounding (docs/performance.md).
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # an image one pixel high, channels last: no copy
    # dilating one tap changes nothing, but on one thread torch asks oneDNN for few images only if it has to dilate
    made = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return made.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= ROWS and x.numel() > NUMBERS and rows * weight.numel() >= PRODUCTS


class Fp32Convolutions(TorchFunctionMode):
    """While active, 2-D convolutions on a CPU are computed in fp32; the result has the dtype that was asked for.

    In bf16 oneDNN's are wrong for some shapes on CPUs with AMX, by more than 100 % (torch 2.14.1, issue 17).
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.conv2d:
            return func(*args, **kwargs)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        with torch.autocast("cpu", enabled=False):
            return func(*map(_fp32, args), **{name: _fp32(value) for name, value in kwargs.items()}).to(dtype)


def _fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def convolve_in_fp32_on_cpu(encoder: nn.Module) -> None:
    """Have every convolution of an encoder compute in fp32 on a CPU, under autocast and with bf16 weights too.

    Layer by layer, so that it also holds where a layer is called by itself, or again by activation checkpointing: all
    layers with a 4-D kernel of their own, torch's Conv2d and timm's that call `F.conv2d` (StdConv2d, BlurPool2d).
    """
    for module in encoder.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.ndim == 4 for tensor in own) and not any(module.children()):
            module.forward = partial(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *module.parameters(recurse=False)) if isinstance(value, Tensor)]
    low = torch.is_autocast_enabled("cpu") or any(tensor.dtype in LOW_PRECISION for tensor in tensors)
    on_cpu = any(tensor.device.type == "cpu" for tensor in tensors)
    with Fp32Convolutions() if low and on_cpu else nullcontext():
        return type(module).forward(module, *args, **kwargs)
