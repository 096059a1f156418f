"""Position embeddings (paper 3.1 and D.4) and the matrix products and convolutions of every encoder."""

import platform
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Grid = tuple[int, int]


def learned_table(*shape: int) -> nn.Parameter:
    """A learned table, normal(0.02): it knows nothing of 2-D and must learn it (paper 3.1)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


class Position1d(nn.Module):
    """1-D: a row for each of T tokens, in raster order."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.table = learned_table(1, tokens, width)

    def forward(self) -> Tensor:
        """The table [1, T, D]."""
        return self.table


class Position2d(nn.Module):
    """2-D: half of the width tells the row, half the column; prefix tokens have rows of their own (our choice)."""

    def __init__(self, grid: Grid, width: int, prefix: int):
        super().__init__()
        self.rows = learned_table(grid[0], width // 2)
        self.columns = learned_table(grid[1], width - width // 2)
        self.prefix = learned_table(prefix, width) if prefix else None

    def forward(self) -> Tensor:
        """The table [1, P + N, D]."""
        (h, a), (w, b) = self.rows.shape, self.columns.shape
        halves = [self.rows[:, None].expand(h, w, a), self.columns[None].expand(h, w, b)]
        table = torch.cat(halves, dim=2).flatten(0, 1)
        return (table if self.prefix is None else torch.cat([self.prefix, table]))[None]


def relative_logits(q: Tensor, offsets: Tensor, prefix: int) -> Tensor:
    """What relative positions add to q k^T: q [B, heads, P + N, d], offsets [2N - 1, d] -> [B, heads, P + N, P + N].

    The embedding of p_q - p_k, 1-D offsets in raster order, is a second key for the query (paper D.4). The table is
    shared by heads, and pairs with a prefix token get nothing: the paper leaves both open.
    """
    position = torch.arange(q.shape[2] - prefix, device=q.device)
    keys = offsets[position[:, None] - position + len(position) - 1]  # [N, N, d]
    logits = torch.einsum("bhqd,qkd->bhqk", q[:, :, prefix:], keys.to(q.dtype))
    return F.pad(logits, (prefix, 0, prefix, 0))


def resize(table: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """A position table [1, P + h*w, D] for another grid (rows, columns), interpolated in 2-D (paper 3.2).

    Bilinear and corner-aligned, as the authors' released code does it: new index i sits at i * (old - 1) / (new - 1).
    The first `prefix` rows (class token) are kept as they are.
    """
    if old == new:
        return table
    rows = table[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    rows = F.interpolate(rows.float(), size=new, mode="bilinear", align_corners=True)
    rows = rows.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], rows], dim=1)


def resize_axis(table: Tensor, new: int) -> Tensor:
    """One axis of a 2-D table [n, D/2] for another number of rows or columns, by the same rule."""
    if len(table) == new:
        return table
    return F.interpolate(table.float().T[None], size=new, mode="linear", align_corners=True)[0].T.to(table.dtype)


def resize_offsets(offsets: Tensor, old: Grid, new: Grid) -> Tensor:
    """Relative offsets [2 h*w - 1, d] for another grid, by the same rule (our choice; the paper did not need it).

    A raster offset is taken for its nearest step of rows and columns; that step is scaled, and what the old offsets
    around it say is interpolated.
    """
    if old == new:
        return offsets
    (h, w), (rows, columns) = old, new
    offset = torch.arange(-(rows * columns - 1), rows * columns)
    row_offset = torch.div(2 * offset + columns, 2 * columns, rounding_mode="floor").clamp(1 - rows, rows - 1)
    column_offset = (
        offset - row_offset * columns
    )  # from -columns / 2 to columns / 2, on to the corners beyond the first and last row
    y = row_offset * (h - 1) / max(1, rows - 1)
    x = column_offset * (w - 1) / max(1, columns - 1)
    resized = torch.zeros(len(offset), offsets.shape[1])
    for ahead_y in (0, 1):
        for ahead_x in (0, 1):
            at_y, at_x = y.floor() + ahead_y, x.floor() + ahead_x
            weight = (1 - (y - at_y).abs()).clamp(min=0) * (1 - (x - at_x).abs()).clamp(min=0)
            index = (at_y * w + at_x).long().clamp(-(h * w - 1), h * w - 1) + h * w - 1
            resized += weight[:, None] * offsets.float()[index]
    return resized.to(offsets.dtype)


ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
MIN_ROWS, MIN_PRODUCTS = (
    256,
    1 << 23,
)  # below these, measured: what oneDNN spends on the order of a weight is not won back
LOW_PRECISION = (torch.bfloat16, torch.float16)
MIN_NUMEL = 20_480  # up to so many in one image torch does not give its convolution to oneDNN


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
    if not _uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # an image one pixel high, channels last: no copy
    # dilating one tap changes nothing, but on one thread torch asks oneDNN for few images only if it has to dilate
    output = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return output.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
        return False
    rows = x.numel() // max(1, x.shape[-1])
    return rows >= MIN_ROWS and x.numel() > MIN_NUMEL and rows * weight.numel() >= MIN_PRODUCTS


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
            return func(*map(_to_fp32, args), **{name: _to_fp32(value) for name, value in kwargs.items()}).to(dtype)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def convolve_in_fp32_on_cpu(encoder: nn.Module) -> None:
    """Have every convolution of an encoder compute in fp32 on a CPU, under autocast and with bf16 weights too.

    Layer by layer, so that it also holds where a layer is called by itself, or again by activation checkpointing: all
    layers with a 4-D kernel of their own, torch's Conv2d and timm's that call `F.conv2d` (StdConv2d, BlurPool2d).
    """
    for module in encoder.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.ndim == 4 for tensor in tensors) and not any(module.children()):
            module.forward = partial(_forward_in_fp32_on_cpu, module)


def _forward_in_fp32_on_cpu(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in (*args, *module.parameters(recurse=False)) if isinstance(value, Tensor)]
    low_precision = torch.is_autocast_enabled("cpu") or any(tensor.dtype in LOW_PRECISION for tensor in tensors)
    on_cpu = any(tensor.device.type == "cpu" for tensor in tensors)
    with Fp32Convolutions() if low_precision and on_cpu else nullcontext():
        return type(module).forward(module, *args, **kwargs)
