"""The ways to compute self-attention, forward and backward, at the numbers of tokens that ViTs have.

Contestants are the kernels behind scaled_dot_product_attention that the device can have, each pinned, and attention
written out, softmax(q k^T / sqrt(d)) v. As in a block of ours, q, k and v are views of one tensor [B, T, 3, H, d], to
which gradients go back, and heads are put side by side again; no mask is ever passed. They take turns; milliseconds are
of a forward and a backward pass. TFLOP/s count two matrix products forward, 4 B H T^2 d FLOPs, and four backward, twice
that; what a kernel computes again is not counted. Errors are the largest difference from attention written out in
fp64, over the largest number there: of the output, and of the gradient to q, k or v that is worst. Whether output and
gradients are finite is looked at before the race and after it: at such lengths cuDNN's were not (pytorch#169849).

`python tools/benchmark.py attention` runs it; tokens=197 batch=1024 heads=16 asks for another case.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.runtime import Precision, on_gpu, uses_bf16
from tools.benchmarks.timing import Rounds, Row, format_spread, format_table, race, speed_stats

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
WRITTEN = "written out"
ON_CPU = ("flash", "math", WRITTEN)
PART = 16  # images that the reference takes at once: its logits are 8 bytes each

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps q, k and v [B, H, T, d] to [B, H, T, d]."""


class Options(Rounds):
    """Which attention is measured, and how."""

    tokens: tuple[int, ...] = Field(
        default=(), description="numbers of tokens T (none given: 196,197,200,208,256 on a GPU, 65,197 on a CPU)"
    )
    heads: int = Field(default=12, ge=1, description="heads H")
    head_width: int = Field(default=64, ge=1, description="width of a head d")
    batch: int | None = Field(default=None, ge=1, description="images B (none: 256 on a GPU, 8 on a CPU)")
    precision: Precision = Field(default="auto", description="of q, k and v: bf16, fp32; auto is bf16 on a GPU")
    ways: tuple[str, ...] = Field(
        default=(), description=f"of {', '.join((*KERNELS, WRITTEN))} (none given: all that the device can have)"
    )


def measure(options: Options) -> Iterator[Row]:
    """A row for every number of tokens and every way, also for one that refuses."""
    names = options.ways or ((*KERNELS, WRITTEN) if on_gpu() else ON_CPU)
    if unknown := [name for name in names if name not in (*KERNELS, WRITTEN)]:
        raise ExitError(ExitCode.USAGE, f"ways={unknown[0]}: there are {', '.join((*KERNELS, WRITTEN))}")
    if min(options.tokens, default=1) < 1:
        raise ExitError(ExitCode.USAGE, "tokens: give numbers above 0, such as 196,197")
    for tokens in options.tokens or ((196, 197, 200, 208, 256) if on_gpu() else (65, 197)):
        yield from compare(options, tokens, names)


def compare(options: Options, tokens: int, names: tuple[str, ...]) -> list[Row]:
    """The rows of one number of tokens."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    dtype = torch.bfloat16 if uses_bf16(options.precision) else torch.float32
    batch, heads, width = options.batch or (256 if on_gpu() else 8), options.heads, options.head_width
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, width, device=device).to(dtype).requires_grad_()
    grad_output = torch.randn(batch, tokens, heads * width, device=device).to(dtype)
    steps = {name: partial(forward_backward, attention_function(name), qkv, grad_output) for name in names}
    expected, results = reference(qkv, grad_output), {}
    for name in names:
        results[name] = compare_with_reference(steps[name], qkv, expected)
    runnable: dict[str, Callable[[], object]] = {name: steps[name] for name in names if "refused" not in results[name]}
    seconds = race(runnable, options.rounds, options.round_steps, device)
    flops = 12 * batch * heads * tokens**2 * width
    rows: list[Row] = []
    for name in names:
        row: Row = {"benchmark": "attention", "case": f"{tokens} tokens, {batch} x {heads} heads of {width}, {dtype}"}
        row |= {
            "who": name,
            "images_per_second": None,
            "ratio": None,
            "tokens": tokens,
            "fastest": False,
            **results[name],
        }
        if name in runnable:
            row |= speed_stats(seconds, name, batch, WRITTEN if WRITTEN in runnable else None)
            row["tflops"] = float(f"{flops / row['milliseconds'] / 1e9:.4g}")
            row["finite"] = row["finite"] and all_finite(steps[name](), qkv)  # once more, after the race
        rows.append(row)
    finite = [row for row in rows if row.get("finite")]
    if finite:
        min(finite, key=lambda row: row["milliseconds"])["fastest"] = True
    return rows


def attention_function(name: str) -> AttentionFunction:
    """A way by its name."""
    if name == WRITTEN:
        return written_out

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(KERNELS[name]):
            return F.scaled_dot_product_attention(q, k, v)

    return kernel


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its formula, with a softmax in fp32 at least, as autocast has it."""
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return logits.softmax(3, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def forward_backward(attention: AttentionFunction, qkv: Tensor, grad_output: Tensor) -> Tensor:
    """Forward and backward: the output [B, T, H d] of qkv [B, T, 3, H, d], whose gradient goes to qkv.grad."""
    qkv.grad = None
    out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).reshape(grad_output.shape)
    out.backward(grad_output)
    return out.detach()


def reference(qkv: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in fp64, of the same numbers."""
    parts = []
    for qkv_part, grad_part in zip(qkv.detach().split(PART), grad_output.split(PART), strict=True):
        leaf = qkv_part.double().requires_grad_()
        out = forward_backward(written_out, leaf, grad_part.double())
        assert leaf.grad is not None
        parts.append((out, leaf.grad))
    return torch.cat([out for out, _ in parts]), torch.cat([grad for _, grad in parts])


def compare_with_reference(run: Callable[[], Tensor], qkv: Tensor, expected: tuple[Tensor, Tensor]) -> Row:
    """How far a way is from the reference, and whether it is finite; or why it is refused."""
    with warnings.catch_warnings(record=True) as caught:  # torch says there what each kernel objects to
        warnings.simplefilter("always")
        try:
            out = run()
        except RuntimeError as error:
            reasons = [str(error), *(str(warning.message) for warning in caught)]
            return {"refused": " ".join(" ".join(reasons).split())[:500]}
    assert qkv.grad is not None
    gradients = list(zip(qkv.grad.unbind(2), expected[1].unbind(2), strict=True))
    return {
        "finite": all_finite(out, qkv),
        "output_error": max_relative_error([(out, expected[0])]),
        "gradient_error": max_relative_error(gradients),
    }


def all_finite(out: Tensor, qkv: Tensor) -> bool:
    """Whether the output and the gradient that went back are."""
    assert qkv.grad is not None
    return bool(out.isfinite().all() and qkv.grad.isfinite().all())


def max_relative_error(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Of found and expected: the largest difference over the largest number expected; None where that is no number."""
    errors = [(actual.double() - expected).abs().max() / expected.abs().max() for actual, expected in pairs]
    error = float(torch.stack(errors).max())
    return error if math.isfinite(error) else None


def table(rows: list[Row]) -> str:
    """The rows for reading; what was refused says why below."""
    heads = ["tokens", "way", "ms", "TFLOP/s", "speed", "spread", "output error", "gradient error", ""]
    lines, refused = [], []
    for row in rows:
        first_cells = [str(row["tokens"]), row["who"]]
        if "refused" in row:
            refused.append(f"{row['tokens']} tokens, {row['who']}: {row['refused']}")
            lines.append([*first_cells, "refused", *[""] * 6])
            continue
        numbers = [f"{row['milliseconds']:.3f}", f"{row['tflops']:.2f}"]
        numbers += [f"{row['ratio']:.2f}" if row["ratio"] else ""]
        errors = ["" if row[name] is None else f"{row[name]:.1e}" for name in ("output_error", "gradient_error")]
        verdict = "fastest" if row["fastest"] else "" if row["finite"] else "NOT FINITE"
        lines.append([*first_cells, *numbers, format_spread(row["ratio_spread"]), *errors, verdict])
    _, _, case = rows[0]["case"].partition(", ")
    legend = "forward and backward; speed: of attention written out = 1; errors: against fp64"
    return "\n".join([f"{case}: {legend}", format_table(heads, lines), *refused])
