"""Attention from outside: the numbers of the paper's facts, plain loops, and what watching leaves as it was."""

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_vit.analyze import figures
from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.timm_encoder import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.evaluate import attention

QUERIES: tuple[attention.Query, ...] = ("class", "mean")
PIXELS = 1e-4  # tolerance of a distance
TABLE = [  # grid, stride; mean of uniform attention, self left out, to a corner, to the center; the largest: pixels
    ((14, 14), 16, 116.4922, 117.0896, 161.0302, 86.0189, 294.1564),
    ((7, 7), 32, 115.5029, 117.9092, 150.6005, 84.8799, 271.5290),
    ((28, 28), 8, 116.7216, 116.8707, 166.2204, 85.7835, 305.4701),
    ((37, 37), 14, 269.9919, 270.1892, 387.3013, 198.1278, 712.7636),
    ((4, 4), 8, 16.0641, 17.1351, 19.2465, 12.7148, 33.9411),
]
ROLLOUT = [  # tokens, layers; the class row's patch entry, class entry, sum over patches
    (197, 12, 0.005074903, 0.005319043, 0.994680957),
    (197, 24, 0.005076142, 0.005076201, 0.994923799),
    (50, 12, 0.019995117, 0.020239258, 0.979760742),
]


def random_attention(*shape: int, seed: int = 0) -> np.ndarray:
    """Random maps, rows of which add up to 1, of very unlike entries."""
    weights = np.random.default_rng(seed).random(shape) ** 4 + 1e-6
    return weights / weights.sum(-1, keepdims=True)


def distance_by_loop(maps: np.ndarray, grid: tuple[int, int], stride: float) -> float:
    """Mean distance of one map [T, T], pixel by pixel; tokens before the grid's are dropped, rows add up to 1 again."""
    prefix, total = len(maps) - grid[0] * grid[1], 0.0
    for query in range(prefix, len(maps)):
        row = maps[query, prefix:] / maps[query, prefix:].sum()
        (y, x) = divmod(query - prefix, grid[1])
        distances = [math.hypot(key // grid[1] - y, key % grid[1] - x) * stride for key in range(len(row))]
        total += sum(weight * distance for weight, distance in zip(row, distances, strict=True))
    return total / (len(maps) - prefix)


def measure_distance(patches: np.ndarray, grid: tuple[int, int], stride: float) -> float:
    """What mean_distance makes of one map of patches [N, N]."""
    return float(attention.mean_distance(torch.from_numpy(patches)[None, None, None], grid, stride))


@pytest.mark.parametrize(("grid", "stride", "mean", "others", "corner", "center", "largest"), TABLE)
def test_distances_of_the_table(grid, stride, mean, others, corner, center, largest):
    count = grid[0] * grid[1]
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    assert measure_distance(np.full((count, count), 1 / count), grid, stride) == pytest.approx(mean, abs=PIXELS)
    alone = (1 - np.eye(count)) / (count - 1)
    assert measure_distance(alone, grid, stride) == pytest.approx(others, abs=PIXELS)
    for key, expected in ((0, corner), (count - 1, corner), (middle, center)):
        assert measure_distance(np.eye(count)[np.full(count, key)], grid, stride) == pytest.approx(expected, abs=PIXELS)
    assert measure_distance(np.eye(count), grid, stride) == 0
    far = measure_distance(np.eye(count)[::-1].copy(), grid, stride)  # the corners look at those across
    assert mean < far < largest


def test_the_class_token_is_left_out_and_rows_are_normalized():
    maps = torch.full((1, 1, 1, 197, 197), 1 / 197, dtype=torch.float64)
    assert attention.mean_distance(maps, (14, 14), 16).item() == pytest.approx(116.4922, abs=PIXELS)
    patches = random_attention(3, 2, 4, 12, 12)
    share = np.random.default_rng(1).random((3, 2, 4, 12, 1)) * 0.999
    maps = np.concatenate([share, patches * (1 - share)], -1)
    maps = np.concatenate([random_attention(3, 2, 4, 1, 13), maps], -2)
    full_maps, patch_maps = torch.from_numpy(maps), torch.from_numpy(patches)
    torch.testing.assert_close(
        attention.mean_distance(full_maps, (3, 4), 5), attention.mean_distance(patch_maps, (3, 4), 5)
    )
    alone = torch.zeros(1, 1, 1, 5, 5)  # rows that are the class token's alone are no NaN
    alone[..., 0] = 1
    result = attention.mean_distance(alone, (2, 2), 4)
    assert result.isfinite().all()
    assert 0 <= result.item() <= 4 * math.sqrt(2)


ATTENDS: dict[float, Callable[..., bool]] = {  # by the mean distance: whether a patch looks at another, at all the same
    74.2857: lambda a, b: a[0] == b[0],
    14.8571: lambda a, b: b == (a[0], min(a[1] + 1, 13)),
    16.6981: lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1,
}


def test_own_row_and_right_neighbor_and_the_window_of_nine():
    cells = [(y, x) for y in range(14) for x in range(14)]
    for value, attends in ATTENDS.items():
        shares = np.array([[float(attends(a, b)) for b in cells] for a in cells])
        assert measure_distance(shares / shares.sum(1, keepdims=True), (14, 14), 16) == pytest.approx(value, abs=PIXELS)


@pytest.mark.parametrize("grid", [(2, 6), (5, 3), (1, 4), (4, 1), (3, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_distances_are_those_of_a_plain_loop_on_any_grid(grid, prefix):
    count = prefix + grid[0] * grid[1]
    maps = random_attention(3, 2, 4, count, count)
    actual = attention.mean_distance(torch.from_numpy(maps), grid, 7)
    assert actual.shape == (3, 4)
    expected = [
        [np.mean([distance_by_loop(attention_map, grid, 7) for attention_map in head]) for head in layer.swapaxes(0, 1)]
        for layer in maps
    ]
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-9)
    single = attention.mean_distance(torch.from_numpy(maps).float(), grid, 7)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)
    assert actual.min() >= 0
    assert actual.max() <= 7 * math.hypot(grid[0] - 1, grid[1] - 1)
    torch.testing.assert_close(attention.mean_distance(torch.from_numpy(maps), grid, 14), 2 * actual)
    per_image = torch.stack([attention.attention_distances(layer, grid, 7) for layer in torch.from_numpy(maps)])
    assert per_image.shape == (3, 2, 4)
    torch.testing.assert_close(per_image.mean(1), actual)
    order = [*range(prefix), *(prefix + y * grid[1] + x for x in range(grid[1]) for y in range(grid[0]))]
    transposed = torch.from_numpy(maps[..., order, :][..., order].copy())
    torch.testing.assert_close(attention.mean_distance(transposed, (grid[1], grid[0]), 7), actual)


def rollouts_by_loop(maps: np.ndarray) -> list[np.ndarray]:
    """After each layer what every token has of each [T, T], of one image's maps [layers, heads, T, T]."""
    tokens, rollouts = range(maps.shape[-1]), []
    rollout = np.eye(len(tokens))
    for layer in maps:
        mixed = sum(head / len(layer) for head in layer) + np.eye(len(tokens))
        for row in tokens:
            mixed[row] /= mixed[row].sum()
        rollout = np.array([[sum(mixed[i, k] * rollout[k, j] for k in tokens) for j in tokens] for i in tokens])
        rollouts.append(rollout)
    return rollouts


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_rollout_is_a_plain_loop(prefix):
    """Twelve layers deep, in float64 and float32; rows of every partial product add up to one."""
    maps = random_attention(12, 2, 3, 9, 9)
    tensor_maps, incremental = torch.from_numpy(maps), attention.Rollout()
    images = [rollouts_by_loop(maps[:, image]) for image in range(2)]
    for depth in range(1, 13):
        incremental.add(tensor_maps[depth - 1])
        partial = np.stack([image[depth - 1] for image in images])
        np.testing.assert_allclose(partial.sum(2), 1, atol=1e-12)
        expected = {"class": partial[:, 0, prefix:], "mean": partial[:, prefix:, prefix:].mean(1)}
        for query in QUERIES if prefix else ("mean",):
            for actual in (
                attention.rollout(tensor_maps[:depth], prefix, query),
                incremental.to_patches(prefix, query),
            ):
                assert actual.shape == (2, 9 - prefix)
                assert (actual >= 0).all()
                np.testing.assert_allclose(actual.numpy(), expected[query], atol=1e-12)
            actual = attention.rollout(tensor_maps[:depth].float(), prefix, query)
            np.testing.assert_allclose(actual.numpy(), expected[query], atol=1e-6)


@pytest.mark.parametrize(("tokens", "layers", "patch", "own", "total"), ROLLOUT)
def test_rollout_of_uniform_attention(tokens, layers, patch, own, total):
    maps = torch.full((layers, 1, 2, tokens, tokens), 1 / tokens, dtype=torch.float64)
    rollout = attention.rollout(maps)  # prefix=1, query="class"
    assert rollout.shape == (1, tokens - 1)
    np.testing.assert_allclose(rollout[0].numpy(), patch, atol=1e-9)
    assert rollout.sum().item() == pytest.approx(total, abs=1e-9)
    assert 1 - rollout.sum().item() == pytest.approx(own, abs=1e-9)
    mean = attention.rollout(maps, query="mean")
    assert mean.sum().item() == pytest.approx(2.0**-layers + (1 - 2.0**-layers) * (tokens - 1) / tokens, abs=1e-9)


def test_rollout_of_identity_and_the_order_of_layers():
    identity = torch.eye(5).expand(3, 2, 4, 5, 5)
    assert torch.equal(attention.rollout(identity), torch.zeros(2, 4))
    assert torch.equal(attention.rollout(identity, query="mean"), torch.full((2, 4), 0.25))
    first = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 1]])
    second = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    rollout = attention.rollout(torch.stack([first, second])[:, None, None])
    assert rollout.tolist() == [[0.25, 0.5]]


# --- maps that hooks take of real encoders

SMALL: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 3, "heads": 2, "patch": 4, "image": (12, 20)}


def randomize(encoder: Any, std: float = 0.3) -> Any:
    """Random weights at which no row of attention is uniform."""
    torch.manual_seed(3)
    for name, parameter in encoder.named_parameters():
        if "backbone" not in name and parameter.ndim > 0:
            nn.init.normal_(parameter, std=std)
    return encoder.eval()


def random_images(encoder: Any, count: int = 2) -> Tensor:
    shape = (count, encoder.channels, *encoder.config.image_hw)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run_with_capture(encoder: Any, image: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The encoder's output while it is watched, and the maps by layer."""
    maps: dict[str, Tensor] = {}

    def record(name: str, layer_map: Tensor) -> None:
        assert name not in maps
        maps[name] = layer_map.clone()

    with attention.capture_attention(encoder, record):
        output = encoder(image, **kwargs)
    return output, maps


@torch.no_grad()
def run_unwatched(encoder: Any, image: Tensor) -> Tensor:
    """What it gives when nobody looks; without gradients too, which choose other kernels."""
    return encoder(image)


def to_float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def affine(x: np.ndarray, part: Any) -> np.ndarray:
    return x @ to_float64(part.weight).T + to_float64(part.bias)


def attention_groups(encoder: Any, block_index: int) -> list[list[int]]:
    """The groups of tokens that attend to each other in a block: all, or the rows or the columns of patches."""
    height, width = encoder.grid
    if not isinstance(encoder.config, Axial):
        return [list(range(encoder.prefix + height * width))]
    if block_index % 2 == 0:
        return [[y * width + x for x in range(width)] for y in range(height)]
    return [[y * width + x for y in range(height)] for x in range(width)]


def attention_by_loop(block: Any, x: np.ndarray, groups: list[list[int]], offsets: Tensor | None, prefix: int) -> Any:
    """One image's maps [heads, T, T] and what the layer makes [T, D], head by head and group by group."""
    heads, (tokens, width) = block.attn.heads, x.shape
    side = width // heads
    q, k, v = np.split(affine(x, block.attn.qkv), 3, axis=1)
    maps, output = np.zeros((heads, tokens, tokens)), np.zeros((tokens, width))
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        for group in groups:
            logits, patch = q[group, part] @ k[group, part].T, np.arange(len(group) - prefix)
            if offsets is not None:
                relative_logits = q[group, part][prefix:] @ to_float64(offsets).T
                logits[prefix:, prefix:] += relative_logits[patch[:, None], patch[:, None] - patch + len(patch) - 1]
            probabilities = np.exp((logits - logits.max(1, keepdims=True)) / math.sqrt(side))
            probabilities /= probabilities.sum(1, keepdims=True)
            maps[head][np.ix_(group, group)], output[group, part] = probabilities, probabilities @ v[group, part]
    return maps, affine(output, block.attn.proj)


@torch.no_grad()
def attention_inputs_and_outputs(encoder: Any, image: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """What goes into the attention of each block, [B, T, D], and what comes out."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def record(_: nn.Module, inputs: Any, output: Tensor) -> None:
        pairs.append((to_float64(inputs[0]), to_float64(output)))

    handles = [block.attn.register_forward_hook(record) for block in encoder.blocks]
    encoder(image)
    for handle in handles:
        handle.remove()
    return pairs


OURS = {
    "class": Vit(**SMALL),
    "no class": Vit(**SMALL, class_token=False, pool="mean"),
    "2d every": Vit(**SMALL, positions="2d", position_placement="every"),
    "1d shared": Vit(**SMALL, position_placement="shared"),
    "relative stem": Vit(**SMALL, positions="relative", position_placement="stem"),
    "relative every": Vit(**SMALL, positions="relative", position_placement="every", class_token=False, pool="mean"),
    "relative shared": Vit(**SMALL, positions="relative", position_placement="shared"),
    "axial": Axial(**SMALL),
    "axial relative every": Axial(**SMALL, positions="relative", position_placement="every"),
    "axial 2d shared": Axial(**SMALL, positions="2d", position_placement="shared"),
    "hybrid": Vit(**(SMALL | {"image": (32, 64), "patch": 16}), stem="r50"),
}


@pytest.mark.parametrize("name", OURS)
def test_maps_of_our_encoders_are_those_of_their_weights(name, zoo):
    encoder = zoo(name)
    image = random_images(encoder)
    before = run_unwatched(encoder, image)
    output, maps = run_with_capture(encoder, image)
    assert torch.equal(output, before)
    assert list(maps) == [layer for layer, _ in attention.find_attention_layers(encoder)]
    assert [int(layer.split(".")[1]) for layer in maps] == list(range(len(encoder.blocks)))
    seen, spread = attention_inputs_and_outputs(encoder, image), 0.0
    for number, (block, layer_maps, (x, out)) in enumerate(zip(encoder.blocks, maps.values(), seen, strict=True)):
        offsets = encoder.offsets if encoder.config.resolved_placement == "shared" else block.attn.offsets
        references = [
            attention_by_loop(block, tokens, attention_groups(encoder, number), offsets, encoder.prefix) for tokens in x
        ]
        expected = np.stack([expected_map for expected_map, _ in references])
        np.testing.assert_allclose(
            out, np.stack([layer_output for _, layer_output in references]), atol=2e-4
        )  # so they are its own
        assert layer_maps.shape == expected.shape
        np.testing.assert_allclose(layer_maps.numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(layer_maps.sum(-1).numpy(), 1, atol=1e-5)
        spread = max(spread, float(expected.std(-1).mean()))
    assert spread > 0.008, "uniform attention would tell nothing"
    assert torch.equal(run_unwatched(encoder, image), before)


def test_maps_are_whole_where_only_some_tokens_are_wanted(zoo):
    encoder = zoo("class")
    image, select = random_images(encoder), torch.tensor([[0, 3], [5, 1]])
    _, all_maps = run_with_capture(encoder, image)
    output, maps = run_with_capture(encoder, image, select=select)
    assert torch.equal(output, encoder(image, select=select))
    for name in all_maps:
        torch.testing.assert_close(maps[name], all_maps[name])


ZOO = {
    "vit": ("vit_tiny_patch16_224", (32, 64)),
    "beit": ("beit_base_patch16_224", (32, 48)),
    "eva02": ("eva02_tiny_patch14_224", (28, 56)),
    "registers": ("vit_small_patch14_reg4_dinov2", (42, 28)),
}


@pytest.fixture(scope="module")
def zoo() -> Callable[[str], Any]:
    """Encoders of timm by their names in ZOO and ours by those in OURS, built once, whose attention is not uniform."""

    def build(name: str) -> Any:
        if name in OURS:
            return randomize(OURS[name].build())
        kind, image = ZOO[name]
        encoder: Any = TimmZoo(name=kind, image=image).build().eval()
        for part in encoder.modules():
            if hasattr(part, "qkv") and isinstance(part.qkv, nn.Linear):
                part.qkv.weight.data *= 6
        return encoder

    return cache(build)


def hook_state(encoder: nn.Module) -> list[tuple[Any, ...]]:
    """Of each part how attention is computed, how many hooks it has, and what was put over its methods."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    counts = [
        [*(len(getattr(part, kind)) for kind in kinds), sum(callable(value) for value in vars(part).values())]
        for part in encoder.modules()
    ]
    return [(getattr(part, "fused_attn", None), *count) for part, count in zip(encoder.modules(), counts, strict=True)]


@torch.no_grad()
def capture_softmaxes(encoder: nn.Module, image: Tensor) -> list[Tensor]:
    """Every softmax over four dimensions of a pass."""
    original, outputs = Tensor.softmax, []

    def record(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = original(self, *args, **kwargs)
        if output.ndim == 4:
            outputs.append(output.clone())
        return output

    with patch.object(Tensor, "softmax", record):
        encoder(image)
    return outputs


@pytest.mark.parametrize("name", ZOO)
def test_maps_of_timm_are_those_that_it_writes_out(name, zoo):
    encoder = zoo(name)
    image = random_images(encoder)
    before, state_before = run_unwatched(encoder, image), hook_state(encoder)
    output, maps = run_with_capture(encoder, image)
    assert torch.equal(output, before)
    assert hook_state(encoder) == state_before
    fused = [part for part in encoder.modules() if getattr(part, "fused_attn", False)]
    assert fused, "nothing would be shown"
    for part in fused:
        part.fused_attn = False
    expected_maps = capture_softmaxes(encoder, image)
    for part in fused:
        part.fused_attn = True
    tokens = encoder.prefix + encoder.grid[0] * encoder.grid[1]
    assert len(maps) == len(expected_maps) == len(encoder.blocks)
    for actual, expected in zip(maps.values(), expected_maps, strict=True):
        assert actual.shape == (2, expected.shape[1], tokens, tokens)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(actual.sum(-1), torch.ones(actual.shape[:-1]))
    assert max(float(attention_map.std(-1).mean()) for attention_map in expected_maps) > 0.008
    assert torch.equal(run_unwatched(encoder, image), before)


def test_what_has_no_attention_has_no_places():
    encoder = Bit(image=32).build().eval()
    output, maps = run_with_capture(encoder, random_images(encoder))
    assert attention.find_attention_layers(encoder) == [] == list(maps)
    assert torch.equal(output, run_unwatched(encoder, random_images(encoder)))


@pytest.mark.parametrize("name", ["class", "vit", "beit"])
@pytest.mark.parametrize("fault", ["forward", "take"])
def test_nothing_stays_after_a_failure(name, fault, zoo):
    encoder = zoo(name)
    image, state_before = random_images(encoder), hook_state(encoder)
    before = run_unwatched(encoder, image)

    def broken(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    handle = encoder.blocks[2].register_forward_pre_hook(broken if fault == "forward" else lambda *_: None)
    callback = broken if fault == "take" else lambda *_: None
    with pytest.raises(ArithmeticError, match="on purpose"), attention.capture_attention(encoder, callback):
        encoder(image)
    handle.remove()
    assert hook_state(encoder) == state_before
    assert torch.equal(run_unwatched(encoder, image), before)


@pytest.mark.parametrize("name", ["class", "axial", "vit"])
def test_none_of_this_runs_where_nobody_watches(name, zoo):
    encoder = zoo(name)
    image, calls = random_images(encoder), []

    def trace(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename == attention.__file__ or code.co_name in ("maps", "shares")):
            calls.append(code.co_name)

    def forward_calls() -> list[str]:
        calls.clear()
        sys.setprofile(trace)
        encoder(image)
        sys.setprofile(None)
        return list(calls)

    assert forward_calls() == []
    with attention.capture_attention(encoder, lambda *_: None):
        assert forward_calls()  # the counter counts
    assert forward_calls() == []


@pytest.mark.parametrize("kind", ["ours", "vit"])
def test_a_training_that_is_watched_draws_the_same_random_numbers(kind: str, zoo):
    encoder = randomize(Vit(**SMALL, dropout=0.2, drop_path=0.2).build()) if kind == "ours" else zoo("vit")
    image, outputs = random_images(encoder), []
    encoder.train()
    for watching in (False, True):
        torch.manual_seed(5)
        outputs.append(run_with_capture(encoder, image)[0] if watching else run_unwatched(encoder, image))
    encoder.eval()
    assert torch.equal(*outputs)


# --- attention planted through weights


def planted_encoder(target_patch: int, grid: tuple[int, int] = (3, 5), layers: int = 3) -> Any:
    """A ViT whose tokens attend to themselves, and in the last layer to patch `at` alone."""
    tokens = 1 + grid[0] * grid[1]
    width = 2 * tokens
    settings: dict[str, Any] = {"width": width, "depth": layers, "heads": 2, "mlp": 4, "patch": 8}
    encoder: Any = Vit(size="Ti", image=(8 * grid[0], 8 * grid[1]), **settings).build().eval()
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            nn.init.zeros_(parameter)
    identity = torch.eye(tokens)
    with torch.no_grad():
        encoder.pos_embed[0] = torch.cat([identity, identity], 1)  # each head sees all of it
        for number, block in enumerate(encoder.blocks):
            qkv = block.attn.qkv
            qkv.weight[width : 2 * width] = torch.eye(width)
            if number < layers - 1:
                qkv.weight[:width] = 100 * torch.eye(width)
            else:
                qkv.bias[:width] = 1000 * torch.cat([identity[1 + target_patch], identity[1 + target_patch]])
    return encoder


@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_planted_patch_is_lit(at):
    encoder = planted_encoder(at)
    _, maps = run_with_capture(encoder, random_images(encoder))
    *first_layers, last = maps.values()
    for layer_map in first_layers:
        torch.testing.assert_close(layer_map, torch.eye(16).expand_as(layer_map))
    torch.testing.assert_close(last, torch.eye(16)[1 + at].expand_as(last))
    for query in QUERIES:
        rollout = attention.rollout(torch.stack([*maps.values()]), 1, query)
        value = 0.5 if query == "class" else (1 + 1 / 15) / 2
        assert rollout.argmax(1).tolist() == [at, at]
        assert rollout[:, at].tolist() == pytest.approx([value] * 2)
        picture = figures.shaded(np.full((24, 40, 3), 200, np.uint8), rollout[0].reshape(3, 5).numpy(), 8)
        assert picture.shape == (24, 40, 3)
        brightness = np.asarray(picture, dtype=float).sum(2)
        y, x = np.unravel_index(brightness.argmax(), brightness.shape)
        assert (y // 8, x // 8) == divmod(at, 5)
        assert brightness.max() > 1.5 * np.median(brightness)


def test_a_map_is_lit_by_its_values_and_not_elsewhere():
    """Rows and columns as they lie in the image, also where that is not square; nothing where nothing is."""
    image = np.full((24, 64, 3), 250, np.uint8)
    values = np.zeros((3, 8), np.float32)
    values[2, 1], values[0, 6] = 0.2, 0.1
    light = np.asarray(figures.shaded(image, values, 8), dtype=float).sum(2)
    of_patches = light.reshape(3, 8, 8, 8).mean((1, 3))
    assert np.unravel_index(of_patches.argmax(), (3, 8)) == (2, 1)
    assert light.max() == pytest.approx(750, abs=6)
    assert 0.3 < of_patches[0, 6] / of_patches[2, 1] < 0.7
    assert of_patches[0, 3] < 0.1 * of_patches[2, 1]
    dark = np.asarray(figures.shaded(image, np.zeros((3, 8), np.float32), 8))  # no division by zero
    assert dark.shape == image.shape
    assert np.isfinite(dark).all()
    figures.distance_dots({1: [0.0, 0.0]}, 0.0)  # of a grid of one patch
