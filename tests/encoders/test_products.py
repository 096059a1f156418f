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
from ssl_vit.encoders.vit import PatchConv2d, Vit
from tests.train.children import fork, wait_for_exit

LARGE = 300  # rows of 96 numbers: more than the 20,480 from which on torch asks oneDNN for one image


@pytest.fixture(autouse=True)
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is too small for it to pay."""
    monkeypatch.setattr(module, "MIN_ROWS", 1)
    monkeypatch.setattr(module, "MIN_PRODUCTS", 1)


needs_onednn = pytest.mark.skipif(not module.ONEDNN, reason="no oneDNN on this machine")


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Callable[[], Tensor]] = {
    "one vector": lambda: random_tensor(96),
    "rows": lambda: random_tensor(7, 96),
    "many rows": lambda: random_tensor(LARGE, 96),
    "tokens": lambda: random_tensor(4, 80, 96),
    "one token an image": lambda: random_tensor(4, 1, 1, 96),
    "transposed": lambda: random_tensor(80, 4, 96).transpose(0, 1),
    "columns": lambda: random_tensor(4, 96, 80).transpose(1, 2),
    "every other": lambda: random_tensor(8, 80, 192)[::2, :, ::2],
    "of one image for all": lambda: random_tensor(1, 80, 96).expand(4, -1, -1),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda w: w,
    "slice": lambda w: w.split([40, 24])[1],
    "transposed": lambda w: w[:, :64].t() @ w,  # of another layout
}


def output_and_gradients(
    layer: Callable[..., Tensor], x: Tensor, weight: Tensor, part: str, bias: bool
) -> list[Tensor]:
    """The output, and the gradients of the input, the weight and the bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    layer_weight = WEIGHTS[part](leaves[1])
    biases = [random_tensor(len(layer_weight), seed=3).requires_grad_()] if bias else []
    output = layer(leaves[0], layer_weight, *(biases or [None]))
    output_gradient = random_tensor(*output.shape, seed=4)
    return [output.detach(), *torch.autograd.grad(output, [*leaves, *biases], output_gradient)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_torchs(shape: str, part: str, bias: bool):
    weight = random_tensor(64, 96, seed=1)
    results, references = (
        output_and_gradients(layer, SHAPES[shape](), weight, part, bias) for layer in (linear, F.linear)
    )
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        assert (result - reference).norm() <= 2e-6 * reference.norm()
        assert (result - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["rows", "many rows", "tokens"])
def test_the_same_bits_every_time(threads: int, shape: str):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *repeats = (
            output_and_gradients(linear, SHAPES[shape](), random_tensor(64, 96, seed=1), "whole", True)
            for _ in range(4)
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for repeat in repeats for a, b in zip(first, repeat, strict=True))


def count_convolutions(run: Callable[[], object]) -> int:
    """How many convolutions are computed while something runs."""
    count = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            count[0] += "convolution" in str(func)
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return count[0]


@needs_onednn
def test_large_fp32_products_are_convolutions_and_small_ones_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer = Linear(96, 64)
    assert count_convolutions(lambda: layer(random_tensor(LARGE, 96))) == 1
    grad_fn = str(layer(random_tensor(LARGE, 96).requires_grad_()).grad_fn)
    assert any(word in grad_fn for word in ("Permute", "View", "Reshape"))
    monkeypatch.undo()

    def product(rows: int, width: int, out: int) -> int:
        return count_convolutions(lambda: Linear(width, out)(random_tensor(rows, width)))

    assert product(1, 768, 3072) == product(8, 768, 768) == product(300, 96, 64) == product(255, 768, 768) == 0
    assert product(256, 192, 192) == product(1568, 192, 512) == 1
    # torch computes a convolution of one image of up to 20,480 numbers by a kernel that is far slower than MKL
    assert product(20_480 // 64, 64, 512) == 0


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer, x = Linear(96, 64), random_tensor(LARGE, 96)
    cases: dict[str, Callable[[], Tensor]] = {
        "fp64": lambda: copy.deepcopy(layer).double()(x.double()),
        "bf16": lambda: copy.deepcopy(layer).bfloat16()(x.bfloat16()),
        "meta": lambda: copy.deepcopy(layer).to("meta")(x.to("meta")),
        "empty": lambda: layer(x[:0]),
    }
    assert {name: count_convolutions(run) for name, run in cases.items()} == dict.fromkeys(cases, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert count_convolutions(lambda: layer(x)) == 0
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert layer(x[:0]).shape == (0, 64)
    assert layer(x[:0].view(0, 5, 96)).shape == (0, 5, 64)
    assert not torch.autograd.grad(layer(x[:0]).sum(), layer.weight)[0].any()
    monkeypatch.setattr(module, "ONEDNN", False)
    assert count_convolutions(lambda: layer(x)) == 0
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_copies_and_pickles_and_wrong_widths():
    layer, x = Linear(96, 64), random_tensor(LARGE, 96)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is Linear
        assert torch.equal(copied(x), layer(x))
    torch_linear = nn.Linear(96, 64)
    torch_linear.load_state_dict(layer.state_dict())
    torch.testing.assert_close(torch_linear(x), layer(x), atol=1e-5, rtol=1e-5)
    for rows in (7, LARGE):
        with pytest.raises(RuntimeError):
            layer(random_tensor(rows, 95))


def test_transforms_of_functions():
    """vmap, grad, and a derivative of a derivative."""
    weight, bias, x = random_tensor(64, 96, seed=1), random_tensor(64, seed=2), random_tensor(4, 80, 96)
    mapped = torch.vmap(linear, (0, None, None))(x, weight, bias)
    torch.testing.assert_close(mapped, F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)

    def loss(layer: Callable[..., Tensor], weight: Tensor) -> Tensor:
        return layer(x, weight, bias).square().mean()

    actual, expected = (torch.func.grad(loss, 1)(layer, weight) for layer in (linear, F.linear))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    def second_derivative(layer: Callable[..., Tensor]) -> Tensor:
        w = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(x, w, bias).tanh().sum(), w, create_graph=True)
        return torch.autograd.grad(slope.square().mean(), w)[0]

    torch.testing.assert_close(second_derivative(linear), second_derivative(F.linear), atol=1e-2, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
def test_compiles_whole_and_under_recomputation():
    layer, x = Linear(96, 64), random_tensor(LARGE, 96).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), layer.weight)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-5)
    checkpointed: Any = checkpoint(layer, x, use_reentrant=False)
    (actual,) = torch.autograd.grad(checkpointed.square().sum(), layer.weight)
    assert torch.equal(actual, expected)
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
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv" in name for name in targets) == 1  # the patch embedding's
    assert sum("linear" in name for name in targets) == 8
    torch.testing.assert_close(program.module()(image), encoder(image), atol=1e-4, rtol=1e-4)


def check_ddp_gradients(rank: int, world: int, init_file: Path) -> None:
    """Gradients of DDP are those of the whole batch, computed by torch."""
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        encoder = Vit(size="Ti", width=64, depth=2, heads=2, patch=4, image=32).build()
        model = nn.parallel.DistributedDataParallel(encoder, gradient_as_bucket_view=True)
        image, weight = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.randn(64)
        select = torch.stack([torch.randperm(65)[:30] for _ in range(8)])
        shard = slice(8 // world * rank, 8 // world * (rank + 1))
        for _ in range(2):
            model.zero_grad()
            (model(image[shard], select=select[shard]) * weight).mean().backward()
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    finally:
        dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ONEDNN", False)
        expected_gradients = torch.autograd.grad(
            (encoder(image, select=select) * weight).mean(), list(encoder.parameters())
        )
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected).abs().max() < 1e-4 * (1e-6 + expected.abs().max())


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=[pytest.mark.process, pytest.mark.ranks])])
def test_processes_average_gradients_without_a_word(world: int, tmp_path: Path):
    """DDP warns, which is an error here, and copies, where a gradient is laid out otherwise than its parameter."""
    if world == 1:
        check_ddp_gradients(0, 1, tmp_path / "meet")
        return
    logs = [tmp_path / f"{rank}" for rank in range(world)]
    pids = [fork(partial(check_ddp_gradients, rank, world, tmp_path / "meet"), logs[rank]) for rank in range(world)]
    codes, output = [wait_for_exit(pid) for pid in pids], "".join(log.read_text() for log in logs)
    assert codes == [0] * world, output
    assert "stride" not in output.lower()


# patches

SIDES = [(1, 4, 4), (3, 16, 16), (3, 12, 20), (4, 8, 24), (7, 36, 4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize(("channels", "height", "width"), SIDES)
def test_the_product_is_the_convolution(channels: int, height: int, width: int, patch: int, bias: bool):
    torch.manual_seed(0)
    conv = PatchConv2d(channels, 24, kernel_size=patch, stride=patch, bias=bias).double()
    pixels = torch.randn(2, channels, height, width, dtype=torch.float64)
    for laid_out in (pixels, pixels.contiguous(memory_format=torch.channels_last), pixels.flip(0)[::2]):
        x = laid_out.detach().requires_grad_()
        actual, expected = conv.as_matmul(x), F.conv2d(x, conv.weight, conv.bias, stride=patch)
        assert actual.shape == expected.shape == (len(x), 24, height // patch, width // patch)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
        assert actual.flatten(2).transpose(1, 2).is_contiguous()  # as the next layer wants tokens
        output_gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        inputs = [x, *conv.parameters()]
        gradients, expected_gradients = (
            torch.autograd.grad(output, inputs, output_gradient) for output in (actual, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-11, rtol=1e-11)
