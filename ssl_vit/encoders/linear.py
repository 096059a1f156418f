"""The linear layer of all encoders and heads: torch's, but by the library that is fastest on a CPU."""

import platform

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
ROWS, PRODUCTS = 256, 1 << 23  # below these, measured: what oneDNN spends on the order of a weight is not won back
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
