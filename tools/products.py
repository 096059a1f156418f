"""The matrix products of a training step and nothing else: what the step's rate is held against."""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from racing import Row, grid, race
from torch import Tensor

from ssl_vit import recipe
from ssl_vit.encoders import linear
from ssl_vit.encoders.vit import Vit
from ssl_vit.heads.masked import Masked

Step = Callable[[], object]


def products(made: recipe.Recipe, device: torch.device, half: bool) -> dict[str, Step]:
    """By torch.mm, and on a CPU by oneDNN too: forward, and both gradients of each."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    shapes, heads = layers(made), attention(made)
    pairs = [(draw(rows, given, device, dtype), draw(out, given, device, dtype)) for rows, given, out, _ in shapes]
    counts = [count for *_, count in shapes]
    queries, weights = draw(*heads[1:], device, dtype), None
    queries = queries.expand(heads[0], -1, -1).contiguous()
    weights = queries @ queries.transpose(1, 2)

    def attend() -> None:
        for _ in range(made.encoder.numbers[1]):  # type: ignore[union-attr]
            for _ in range(3):  # forward, and both gradients
                torch.bmm(queries, queries.transpose(1, 2), out=weights)
                torch.bmm(weights, queries)

    outs = [torch.empty(len(x), len(w), device=device, dtype=dtype) for x, w in pairs]
    first = [(torch.empty_like(x), torch.empty_like(w)) for x, w in pairs]

    def by_torch() -> None:
        for (x, w), count, made_, (dx, dw) in zip(pairs, counts, outs, first, strict=True):
            for _ in range(count):
                torch.mm(x, w.t(), out=made_)
                torch.mm(made_, w, out=dx)
                torch.mm(made_.t(), x, out=dw)
        attend()

    def by_onednn() -> None:
        for (x, w), count, made_ in zip(pairs, counts, outs, strict=True):
            for _ in range(count):
                linear.linear(x, w, None)
                linear.linear(made_, w.t(), None)
                linear.linear(made_.t(), x.t(), None)
        attend()

    found: dict[str, Step] = {"products": by_torch}
    return found | ({"products by oneDNN": by_onednn} if device.type == "cpu" and linear.ONEDNN else {})


def rates(made: recipe.Recipe, device: torch.device, half: bool, rounds: int, steps: int) -> Iterator[Row]:
    """TFLOP/s of each product of a step: forward, for what was given, for the weight."""
    dtype = torch.bfloat16 if half else torch.float32
    for rows, given, out, _ in layers(made):
        x, w, y = (draw(*shape, device, dtype) for shape in ((rows, given), (out, given), (rows, out)))
        ways: dict[str, Step] = {
            "forward": partial(torch.mm, x, w.t()),
            "gradient of the input": partial(torch.mm, y, w),
            "gradient of the weight": partial(torch.mm, y.t(), x),
        }
        for who, times in race(ways, rounds, steps, device).items():
            case = f"{rows} x {given} x {out} {dtype} {device.type}".replace("torch.", "")
            rate = 2 * rows * given * out / median(times) / 1e12
            spread = [round(2 * rows * given * out / one / 1e12, 4) for one in (max(times), min(times))]
            yield {"benchmark": "product", "case": case, "who": who, "tflops": round(rate, 4), "tflops_spread": spread}


def draw(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random matrix."""
    return torch.randn(rows, columns, device=device, dtype=dtype)


def layers(made: recipe.Recipe) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how often) of the linear layers of a ViT and of its head, on all tokens but for the head."""
    vit, head = made.encoder, made.head
    assert isinstance(vit, Vit)
    width, depth, _, mlp = vit.numbers
    patches = vit.grid[0] * vit.grid[1]
    tokens = made.batch * (vit.prefix + patches)
    shapes = [(made.batch * patches, vit.channels * vit.patch**2, width, 1)]
    shapes += [(tokens, width, 3 * width, depth), (tokens, width, width, depth)]
    shapes += [(tokens, width, mlp, depth), (tokens, mlp, width, depth)]
    if isinstance(head, Masked):
        shapes.append((made.batch * sum(head.counts(vit.grid)), width, 512, 1))
    return shapes


def attention(made: recipe.Recipe) -> tuple[int, int, int]:
    """Heads of all images, tokens, width of a head."""
    vit = made.encoder
    assert isinstance(vit, Vit)
    width, _, heads, _ = vit.numbers
    return made.batch * heads, vit.prefix + vit.grid[0] * vit.grid[1], width // heads


def table(rows: list[Row]) -> str:
    """The rows for reading."""
    lines = [
        [r["case"], r["who"], f"{r['tflops']:.3f}", "-".join(f"{one:.3f}" for one in r["tflops_spread"])] for r in rows
    ]
    return grid(["product of rows x in x out", "", "TFLOP/s", "spread"], lines)
