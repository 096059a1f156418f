"""A linear layer by oneDNN is torch's but for rounding, wherever torch's can stand; so are patches cut by a product."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssl_vit.encoders import layers as module
from ssl_vit.encoders.layers import Linear, linear
from ssl_vit.encoders.vit import Cut, Vit
from tests.train.children import ended, fork

LARGE = 300  # rows of 96 numbers: more than the 20,480 from which on torch asks oneDNN for one image


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is too small for it to pay."""
    monkeypatch.setattr(module, "ROWS", 1)
    monkeypatch.setattr(module, "PRODUCTS", 1)


needs_onednn = pytest.mark.skipif(not module.ONEDNN, reason="no oneDNN on this machine")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Callable[[], Tensor]] = {
    "one vector": lambda: drawn(96),
    "rows": lambda: drawn(7, 96),
    "many rows": lambda: drawn(LARGE, 96),
    "tokens": lambda: drawn(4, 80, 96),
    "one token an image": lambda: drawn(4, 1, 1, 96),
    "transposed": lambda: drawn(80, 4, 96).transpose(0, 1),
    "columns": lambda: drawn(4, 96, 80).transpose(1, 2),
    "every other": lambda: drawn(8, 80, 192)[::2, :, ::2],
    "of one image for all": lambda: drawn(1, 80, 96).expand(4, -1, -1),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda w: w,
    "slice": lambda w: w.split([40, 24])[1],
    "transposed": lambda w: w[:, :64].t() @ w,  # of another layout
}


def step(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, part: str, bias: bool) -> list[Tensor]:
    """The output, and the gradients of the input, the weight and the bias."""
    given = [one.detach().requires_grad_() for one in (x, weight)]
    used = WEIGHTS[part](given[1])
    rest = [drawn(len(used), seed=3).requires_grad_()] if bias else []
    made = layer(given[0], used, *(rest or [None]))
    back = drawn(*made.shape, seed=4)
    return [made.detach(), *torch.autograd.grad(made, [*given, *rest], back)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_torchs(shape: str, part: str, bias: bool):
    weight = drawn(64, 96, seed=1)
    found, wanted = (step(layer, SHAPES[shape](), weight, part, bias) for layer in (linear, F.linear))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).norm() <= 2e-6 * theirs.norm()
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["rows", "many rows", "tokens"])
def test_the_same_bits_every_time(threads: int, shape: str):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *rest = (step(linear, SHAPES[shape](), drawn(64, 96, seed=1), "whole", True) for _ in range(4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


def convolutions(run: Callable[[], object]) -> int:
    """How many convolutions are computed while something runs."""
    found = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            found[0] += "convolution" in str(func)
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return found[0]


@needs_onednn
def test_large_fp32_products_are_convolutions_and_small_ones_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer = Linear(96, 64)
    assert convolutions(lambda: layer(drawn(LARGE, 96))) == 1
    kept = str(layer(drawn(LARGE, 96).requires_grad_()).grad_fn)
    assert any(word in kept for word in ("Permute", "View", "Reshape"))
    monkeypatch.undo()

    def product(rows: int, width: int, out: int) -> int:
        return convolutions(lambda: Linear(width, out)(drawn(rows, width)))

    assert product(1, 768, 3072) == product(8, 768, 768) == product(300, 96, 64) == product(255, 768, 768) == 0
    assert product(256, 192, 192) == product(1568, 192, 512) == 1
    # torch computes a convolution of one image of up to 20,480 numbers by a kernel that is far slower than MKL
    assert product(20_480 // 64, 64, 512) == 0


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer, x = Linear(96, 64), drawn(LARGE, 96)
    others: dict[str, Callable[[], Tensor]] = {
        "fp64": lambda: copy.deepcopy(layer).double()(x.double()),
        "bf16": lambda: copy.deepcopy(layer).bfloat16()(x.bfloat16()),
        "meta": lambda: copy.deepcopy(layer).to("meta")(x.to("meta")),
        "empty": lambda: layer(x[:0]),
    }
    assert {name: convolutions(run) for name, run in others.items()} == dict.fromkeys(others, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions(lambda: layer(x)) == 0
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert layer(x[:0]).shape == (0, 64)
    assert layer(x[:0].view(0, 5, 96)).shape == (0, 5, 64)
    assert not torch.autograd.grad(layer(x[:0]).sum(), layer.weight)[0].any()
    monkeypatch.setattr(module, "ONEDNN", False)
    assert convolutions(lambda: layer(x)) == 0
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_copies_and_pickles_and_wrong_widths():
    layer, x = Linear(96, 64), drawn(LARGE, 96)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is Linear
        assert torch.equal(other(x), layer(x))
    theirs = nn.Linear(96, 64)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs(x), layer(x), atol=1e-5, rtol=1e-5)
    for rows in (7, LARGE):
        with pytest.raises(RuntimeError):
            layer(drawn(rows, 95))


def test_transforms_of_functions():
    """vmap, grad, and a derivative of a derivative."""
    weight, bias, x = drawn(64, 96, seed=1), drawn(64, seed=2), drawn(4, 80, 96)
    mapped = torch.vmap(linear, (0, None, None))(x, weight, bias)
    torch.testing.assert_close(mapped, F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)

    def cost(layer: Callable[..., Tensor], weight: Tensor) -> Tensor:
        return layer(x, weight, bias).square().mean()

    mine, theirs = (torch.func.grad(cost, 1)(layer, weight) for layer in (linear, F.linear))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)

    def bent(layer: Callable[..., Tensor]) -> Tensor:
        w = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(x, w, bias).tanh().sum(), w, create_graph=True)
        return torch.autograd.grad(slope.square().mean(), w)[0]

    torch.testing.assert_close(bent(linear), bent(F.linear), atol=1e-2, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
def test_compiles_whole_and_under_recomputation():
    layer, x = Linear(96, 64), drawn(LARGE, 96).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    (want,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), layer.weight)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    again: Any = checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(again.square().sum(), layer.weight)
    assert torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):  # a graph that was made for fp32 is not taken
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [True, False])
def test_exports_as_matrix_products(strict: bool):
    """And not as convolutions, which other runtimes know no better than torch."""
    encoder = Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=48).build().eval()  # 145 tokens an image
    image = torch.zeros(8, 3, 48, 48, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it will change
        program = torch.export.export(encoder, (image,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv" in name for name in called) == 1  # the patch embedding's
    assert sum("linear" in name for name in called) == 8
    torch.testing.assert_close(program.module()(image), encoder(image), atol=1e-4, rtol=1e-4)


def average(rank: int, world: int, place: Path) -> None:
    """Gradients of DDP are those of the whole batch, computed by torch."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        encoder = Vit(size="Ti", width=64, depth=2, heads=2, patch=4, image=32).build()
        model = nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
        image, weight = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.randn(64)
        select = torch.stack([torch.randperm(65)[:30] for _ in range(8)])
        mine = slice(8 // world * rank, 8 // world * (rank + 1))
        for _ in range(2):
            model.zero_grad()
            (model(image[mine], select=select[mine]) * weight).mean().backward()
        found = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    finally:
        dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ONEDNN", False)
        wanted = torch.autograd.grad((encoder(image, select=select) * weight).mean(), list(encoder.parameters()))
    for mine_, want in zip(found, wanted, strict=True):
        assert (mine_ - want).abs().max() < 1e-4 * (1e-6 + want.abs().max())


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=[pytest.mark.process, pytest.mark.ranks])])
def test_processes_average_gradients_without_a_word(world: int, tmp_path: Path):
    """DDP warns, which is an error here, and copies, where a gradient is laid out otherwise than its parameter."""
    if world == 1:
        average(0, 1, tmp_path / "meet")
        return
    screens = [tmp_path / f"{rank}" for rank in range(world)]
    pids = [fork(partial(average, rank, world, tmp_path / "meet"), screens[rank]) for rank in range(world)]
    codes, said = [ended(pid) for pid in pids], "".join(screen.read_text() for screen in screens)
    assert codes == [0] * world, said
    assert "stride" not in said.lower()


# patches

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
        assert mine.flatten(2).transpose(1, 2).is_contiguous()  # as the next layer wants tokens
        back = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        given = [x, *cut.parameters()]
        found, wanted = (torch.autograd.grad(one, given, back) for one in (mine, theirs))
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)
