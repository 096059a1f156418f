"""What every encoder promises (ssl_vit/model.py), and what the paper says of each kind (checks C1.6, C3.1 to C3.6)."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit import config, cost
from ssl_vit import recipe as recipes
from ssl_vit.encoders import Encoder, linear, positions, weights
from ssl_vit.encoders.axial import Axial, AxialResnet
from ssl_vit.encoders.timm_zoo import Bit, TimmZoo
from ssl_vit.encoders.vit import Vit
from ssl_vit.exits import USAGE, Refusal
from ssl_vit.heads import Head
from ssl_vit.heads.masked import Masked
from ssl_vit.model import count_parameters, read_out
from ssl_vit.recipe import Pretrain
from ssl_vit.train.optim import learning_rate

TINY: dict[str, Any] = {"size": "Ti", "width": 16, "depth": 2, "heads": 2, "patch": 4, "image": (12, 16)}
PLACES = [("1d", "stem"), ("1d", "every"), ("1d", "shared"), ("2d", "stem"), ("2d", "every"), ("2d", "shared")]
PLACES += [("relative", "stem"), ("relative", "every"), ("relative", "shared"), ("none", None)]
VARIANTS: dict[str, dict[str, Any]] = {f"{kind}-{at}": {"positions": kind, "positions_at": at} for kind, at in PLACES}

TRANSFORMERS: dict[str, Any] = {
    **{f"vit-{name}": Vit(**TINY, **variant) for name, variant in VARIANTS.items()},
    **{
        f"vit-{name}-mean": Vit(**TINY, **variant, class_token=False, pool="mean") for name, variant in VARIANTS.items()
    },
    **{f"axial-{name}": Axial(**TINY, **variant) for name, variant in VARIANTS.items() if name != "relative-shared"},
    "vit-class-mean": Vit(**TINY, pool="mean"),
    "vit-grey": Vit(**TINY, channels=1),
    "vit-four-channels": Vit(**TINY, channels=4, mean=(0.1, 0.2, 0.3, 0.4)),
}
FEATURES: dict[str, Any] = {
    "hybrid-16": Vit(size="Ti", width=16, depth=1, heads=2, patch=16, image=(32, 48), stem="r50"),
    "hybrid-32": Vit(size="Ti", width=16, depth=1, heads=2, patch=32, image=(64, 32), stem="r50", channels=1),
    "bit": Bit(image=(32, 64)),
    "axial_resnet": AxialResnet(image=(64, 96)),
    "timm-vit": TimmZoo(name="vit_tiny_patch16_224", image=(32, 48), channels=4),
    "timm-resnet": TimmZoo(name="test_resnet", image=(64, 32)),
}
CONFIGS = TRANSFORMERS | FEATURES
PREFIX = {name: 1 if name.startswith(("vit", "hybrid", "timm-vit")) else 0 for name in CONFIGS}
PREFIX |= {f"vit-{name}-mean": 0 for name in VARIANTS}

# at the start no gradient reaches what is behind a last norm whose scale starts at 0
UNREACHED = {"hybrid-16": "backbone", "hybrid-32": "backbone", "timm-resnet": "layer"}


def images(config: Any, count: int = 2, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, config.channels, *config.image_hw), dtype=torch.uint8, generator=random)


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return config.build()


@cache
def first(config: Any) -> Any:
    """Kept: to draw the weights of a ResNet takes a second."""
    return built(config)


def made(config: Any) -> Any:
    """An encoder of seed 0, a new one."""
    return copy.deepcopy(first(config)) if config in FEATURES.values() else built(config)


def test_every_kind_is_here():
    assert {type(one) for one in CONFIGS.values()} == set(get_args(get_args(Encoder)[0]))


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_prefix_and_grid(name):
    given = CONFIGS[name]
    encoder = made(given).eval()
    height, width = given.image_hw
    rows, columns = encoder.grid
    assert (rows * encoder.stride, columns * encoder.stride) == (height, width)
    assert encoder.prefix == PREFIX[name]
    image = images(given)
    with torch.no_grad():
        tokens = encoder(image)
        assert tokens.shape == (2, encoder.prefix + rows * columns, encoder.width)
        assert tokens.isfinite().all()
        assert torch.equal(encoder(image), tokens)
        select = torch.tensor([[0, 1, rows * columns - 1], [1, 1, 0]])
        some = encoder(image, select=select)
        want = torch.stack([tokens[b, select[b]] for b in range(2)])
        torch.testing.assert_close(some, want, atol=1e-6, rtol=1e-6)
        vectors = read_out(tokens, given.pool, encoder.prefix)
        patches = tokens[:, encoder.prefix :].mean(1)
        assert torch.equal(vectors, tokens[:, 0] if given.pool == "class" else patches)
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(image.transpose(2, 3))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_seed_makes_an_encoder(name):
    encoder, again, image = made(CONFIGS[name]).eval(), built(CONFIGS[name]).eval(), images(CONFIGS[name])
    tensors = encoder.state_dict()
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(value, tensors[key]) for key, value in again.state_dict().items())
    for value in again.state_dict().values():  # and a state dict holds all there is
        value.mul_(0)
    again.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(again(image), encoder(image))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gradient_reaches_every_parameter(name):
    encoder = made(CONFIGS[name])
    if name in UNREACHED:
        zeros = [
            module
            for key, module in encoder.named_modules()
            if UNREACHED[name] in key and getattr(module, "weight", None) is not None and not module.weight.any()
        ]
        assert zeros  # the last norm of each bottleneck
        for norm in zeros:
            nn.init.ones_(norm.weight)
    encoder(images(CONFIGS[name])).square().sum().backward()
    missed = {key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert missed == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_finite_and_near_fp32(name):
    encoder, image = made(CONFIGS[name]).eval(), images(CONFIGS[name])
    with torch.no_grad():
        want = encoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            got = encoder(image).float()
    assert got.isfinite().all()
    assert (got - want).norm() < (0.3 if name == "bit" else 0.1) * want.norm()  # fifty layers that nothing trained


COMPILED = [
    "vit-1d-stem",
    "vit-1d-every-mean",
    "vit-2d-every",
    "vit-2d-shared",
    "vit-relative-every",
    "vit-relative-shared",
]
COMPILED += ["axial-2d-every", "axial-relative-every", "timm-vit"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
@pytest.mark.parametrize("name", COMPILED)
def test_blocks_compile_without_a_graph_break(name):
    encoder, image = made(CONFIGS[name]), images(CONFIGS[name])
    want = encoder(image)
    torch._dynamo.reset()
    for block in encoder.blocks[:2]:  # of axial ones a row and a column
        block.compile(backend="aot_eager", fullgraph=True)
    got = encoder(image)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_changes_no_gradient(name):
    given = CONFIGS[name]
    given = given.model_copy(update={"dropout": 0.2}) if name in TRANSFORMERS else given
    found = []
    for wanted in (False, True):
        encoder = made(given).train()
        encoder.activation_checkpointing = wanted
        torch.manual_seed(1)
        tokens = encoder(images(given))
        tokens.square().sum().backward()
        found.append([tokens.detach(), *(p.grad for p in encoder.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_checkpointed_blocks_are_computed_again(name):
    encoder, calls = made(CONFIGS[name]).train(), []
    encoder.activation_checkpointing = True
    for block in encoder.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    encoder(images(CONFIGS[name])).square().sum().backward()
    assert len(calls) == 2 * len(encoder.blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_end_with_the_tokens(name):
    encoder, image = made(CONFIGS[name]).eval(), images(CONFIGS[name])
    numbers = {1, encoder.depth}
    with torch.no_grad():
        found, tokens = encoder.layers(image, numbers), encoder(image)
    assert found.keys() == numbers
    assert torch.equal(found[encoder.depth], tokens)
    assert all(one.shape == tokens.shape for one in found.values())
    if encoder.depth > 1:
        assert not torch.allclose(found[1], tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_can_be_edited_where_the_encoder_says_so(name):
    encoder, image = made(CONFIGS[name]).eval(), images(CONFIGS[name])
    assert encoder.maskable == (name.startswith(("vit", "axial-", "hybrid", "timm-vit")))
    if not encoder.maskable:
        with pytest.raises(ValueError, match="no patch embeddings"):
            encoder(image, edit=lambda patches: patches)
        return
    seen: list[Tensor] = []

    def edit(patches: Tensor) -> Tensor:
        seen.append(patches)
        return patches.zero_() if len(seen) > 1 else patches

    with torch.no_grad():
        tokens = encoder(image)
        assert torch.equal(encoder(image, edit=edit), tokens)
        blank = encoder(image, edit=edit)
        last = encoder.depth  # an edit is of one call
        assert torch.equal(encoder.layers(image, {last})[last], tokens)
    assert seen[0].shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert torch.equal(blank[0], blank[1])  # nothing of the images is left
    assert not torch.allclose(tokens[0], tokens[1])


MASKED = [kind for kind in get_args(get_args(Head)[0]) if issubclass(kind, Masked)]


@pytest.mark.parametrize("head", [kind.model_fields["kind"].default for kind in MASKED])
@pytest.mark.parametrize(
    "encoder",
    [["kind=bit"], ["kind=axial_resnet"], ["kind=timm", "name=test_resnet"], ["kind=timm", "name=levit_128s"]],
)
def test_masked_objectives_refuse_what_has_no_patches(head, encoder):
    side = 224 if "name=levit_128s" in encoder else 64  # a LeViT has patches that are not its tokens
    given = [f"encoder.{word}" for word in encoder] + [f"head.kind={head}", f"data.image_size={side}"]
    with pytest.raises(Refusal) as end:
        recipes.resolve(config.parse(Pretrain, given, recipes.FOLDER))
    assert end.value.code == USAGE
    said = str(end.value)
    assert f"head.kind={head} replaces patch embeddings, and this encoder has none" in said
    assert f"encoder.{encoder[0]}" in said
    assert "\n" not in said
    supervised = [*given[:-2], "head.kind=classifier", given[-1]]
    recipes.resolve(config.parse(Pretrain, supervised, recipes.FOLDER))


# what the paper says of each kind


def changed(encoder: Any, image: Tensor, rows: slice, columns: slice, through: Callable[[Tensor], Tensor]) -> Tensor:
    """Which cells of the grid tokens of differ once pixels of these cells do, bool [rows, columns]."""
    side, other = encoder.stride, image.clone()
    height, width = (slice(s.start * side, s.stop * side) for s in (rows, columns))
    other[:, :, height, width] ^= 255
    with torch.no_grad():
        differ = (through(image) != through(other)).any(2)[0]
    return differ.unflatten(0, encoder.grid)


def axial(**update: Any) -> Any:
    return made(Axial(**TINY | {"depth": 1, "image": (20, 16)} | update)).eval()


@pytest.mark.parametrize("variant", ["1d-stem", "2d-every", "relative-every", "none-None"])
def test_rows_and_columns_do_not_mix(variant):
    """C3.5a, b: bit-identical outside of the row, or column, that was changed; both together reach every cell."""
    encoder = axial(**VARIANTS[variant])
    rows, columns = encoder.blocks
    image, cell = images(encoder.config, 1), (slice(2, 3), slice(1, 2))

    def want(across: Any, down: Any) -> Tensor:
        expected = torch.zeros(encoder.grid, dtype=torch.bool)
        expected[down, across] = True
        return expected

    both = changed(encoder, image, *cell, lambda x: encoder.through(rows, encoder.embed(x)))
    assert torch.equal(both, want(slice(None), 2))
    assert torch.equal(
        changed(encoder, image, *cell, lambda x: encoder.through(columns, encoder.embed(x))), want(1, slice(None))
    )
    assert changed(encoder, image, *cell, encoder).all()


def test_axial_attention_doubles_what_a_block_has():
    """C3.5c, and the sums of the reference."""
    sizes: dict[str, Any] = {"size": "B", "pool": "mean"}
    with torch.device("meta"):
        plain, double = Vit(**sizes, class_token=False).build(), Axial(**sizes).build()
    for part in (".attn.", ".mlp."):
        count = [
            sum(p.numel() for name, p in encoder.named_parameters() if part in name) for encoder in (plain, double)
        ]
        assert count[1] == 2 * count[0] > 0
    assert count_parameters(double) == 170_851_584
    assert round(cost.encoder_macs(Axial(**sizes)) / 1e9, 3) == 33.511
    assert round(cost.encoder_macs(Axial(**sizes, patch=32)) / 1e9, 3) == 8.452
    assert cost.encoder_macs(Axial(**sizes)) == cost.counted_macs(Axial(**sizes))


@pytest.mark.parametrize("positions", ["none", "relative"])
def test_one_row_of_patches_is_ordinary_attention(positions):
    """C3.5d: the row block on a grid of one row is a ViT's block; the column block sees each patch alone."""
    sizes = TINY | {"image": (4, 24), "depth": 1, "positions": positions}
    line, plain = made(Axial(**sizes)).eval(), made(Vit(**sizes, class_token=False, pool="mean")).eval()
    block = {name.removeprefix("blocks.0."): v for name, v in line.state_dict().items() if name.startswith("blocks.0.")}
    plain.blocks[0].load_state_dict(block)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(line.blocks[0](x), plain.blocks[0](x))
        columns = line.blocks[1].attn
        alone = columns.proj(columns.qkv(x)[2].transpose(1, 2).flatten(2))  # a patch alone attends to itself
        torch.testing.assert_close(columns(x), alone)


ORDER = torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 6, 4])


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if not name.startswith("axial")])
def test_only_positions_tell_patches_apart(name):
    """C1.6, C3.6a: without them what is read out does not see a permutation of the patches, with any it does."""
    encoder = made(CONFIGS[name]).eval()
    for key, parameter in encoder.named_parameters():
        if "pos" in key or "offsets" in key:
            nn.init.normal_(parameter, std=0.5)  # well above rounding
    image = images(CONFIGS[name])
    with torch.no_grad():
        plain, permuted = encoder(image), encoder(image, edit=lambda patches: patches[:, ORDER])
    vectors = [read_out(tokens, encoder.pool, encoder.prefix) for tokens in (plain, permuted)]
    same = torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert same == ("none" in name)
    if "none" in name:
        torch.testing.assert_close(permuted[:, encoder.prefix :], plain[:, encoder.prefix :][:, ORDER])


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if "-every" in name or "-shared" in name])
def test_positions_act_in_every_block(name):
    """Those of every layer and the shared ones still tell patches apart in the last block."""
    encoder = made(CONFIGS[name]).eval()
    block = encoder.blocks[-1]
    flat = torch.randn(1, encoder.prefix + 12, 16, generator=torch.Generator().manual_seed(1))
    flat[:, encoder.prefix :] = torch.randn(16) if encoder.config.positions != "relative" else flat[:, encoder.prefix :]
    with torch.no_grad():
        before = encoder.through(block, flat)
        for key, parameter in encoder.named_parameters():
            if key.startswith((f"blocks.{len(encoder.blocks) - 1}.pos", "pos_embed", "offsets")) or (
                key == f"blocks.{len(encoder.blocks) - 1}.attn.offsets"
            ):
                parameter.zero_()
        assert not torch.allclose(encoder.through(block, flat), before, atol=1e-6)


def test_tables_of_each_place():
    """C3.6e: one shared table, L tables of every layer; and the counts of reference 3.6 for B/16."""

    def tables(**given: Any) -> dict[str, int]:
        with torch.device("meta"):
            encoder = Vit(size="B", **given).build()
        return {name: p.numel() for name, p in encoder.named_parameters() if "pos" in name or "offsets" in name}

    assert tables() == {"pos_embed": 151_296}
    assert tables(positions_at="shared") == {"pos_embed": 151_296}
    every = tables(positions_at="every")
    assert (len(every), sum(every.values())) == (12, 1_815_552)
    assert sum(tables(positions="2d").values()) == 10_752 + 768
    assert sum(tables(positions="2d", class_token=False, pool="mean").values()) == 10_752
    assert sum(tables(positions="2d", positions_at="shared").values()) == 10_752 + 768
    assert sum(tables(positions="2d", positions_at="every").values()) == 12 * (10_752 + 768)
    relative = tables(positions="relative")
    assert set(relative.values()) == {391 * 64}
    assert len(relative) == 12
    assert tables(positions="relative", positions_at="shared") == {"offsets": 391 * 64}
    assert tables(positions="none") == {}


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize("token", [True, False])
def test_relative_positions_of_zero_are_none(at, token):
    """C3.6b"""
    sizes = TINY | {"class_token": token, "pool": "mean"}
    with_, without = (
        made(Vit(**sizes, positions="relative", positions_at=at)).eval(),
        made(Vit(**sizes, positions="none")).eval(),
    )
    without.load_state_dict({k: v for k, v in with_.state_dict().items() if "offsets" not in k})
    image = images(with_.config)
    with torch.no_grad():
        want = without(image)
        assert not torch.allclose(with_(image), want, atol=1e-6)
        for name, parameter in with_.named_parameters():
            if "offsets" in name:
                parameter.zero_()
        torch.testing.assert_close(with_(image), want, atol=1e-5, rtol=1e-5)


def test_relative_positions_are_a_second_key():
    """Against a plain loop over pairs; C3.6c: a constant added to all offsets changes nothing without class token."""
    for token in (True, False):
        encoder = made(Vit(**TINY, positions="relative", class_token=token, pool="mean")).eval()
        attention, p = encoder.blocks[0].attn, int(token)
        x = torch.randn(1, p + 12, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            nn.init.normal_(attention.offsets)
            q, k, v = (part[0] for part in attention.qkv(x))
            mixed = torch.zeros(p + 12, 2, 8)
            for head in range(2):
                for i in range(p + 12):
                    logits = torch.zeros(p + 12)
                    for j in range(p + 12):
                        key = k[head, j]
                        if i >= p and j >= p:
                            key = key + attention.offsets[i - j + 11]
                        logits[j] = q[head, i] @ key / math.sqrt(8)
                    mixed[i, head] = logits.softmax(0) @ v[head]
            want = attention.proj(mixed.reshape(1, p + 12, 16))
            torch.testing.assert_close(attention(x), want, atol=1e-5, rtol=1e-4)
            attention.offsets += torch.randn(8)
            assert torch.allclose(attention(x), want, atol=1e-5) != token


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
def test_rows_of_a_2d_table_differ_alike_in_every_column(at):
    """C3.6d, and what a table holds: X and Y of half the width."""
    encoder = made(Vit(**TINY, positions="2d", positions_at=at))
    axes = encoder.blocks[1].pos if at == "every" else encoder.pos_embed
    table = axes()[0]
    assert torch.equal(table[:1], axes.prefix)
    grid = table[1:].unflatten(0, (3, 4))
    down, right = grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]
    assert torch.equal(down, down[:, :1].expand_as(down))
    assert torch.equal(right, right[:1].expand_as(right))
    assert (down[:, 0, :8] != 0).all()
    assert not down[:, 0, 8:].any()
    assert not right[0, :, :8].any()


# positions in an image of another size, by the way that weights take (ssl_vit.encoders.weights.fill)

OLD, NEW = (3, 4), (7, 6)


def resized(given: dict[str, Any], change: Callable[[str, nn.Parameter], Any], new: tuple[int, int] = NEW) -> Any:
    """An encoder of the new grid with the positions of one of the old grid, whose tables `change` has made."""
    encoder = made(Vit(**TINY | given))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "pos" in name or "offsets" in name:
                change(name, parameter)
    larger = encoder.config.model_copy(update={"image": (4 * new[0], 4 * new[1])}).build()
    report = weights.fill(larger, encoder.config, encoder.state_dict(), "here")
    assert report.share == 1
    for name, value in larger.state_dict().items():
        if "pos" not in name and "offsets" not in name:
            assert torch.equal(value, encoder.state_dict()[name])
    assert (report.resized != []) == (new != OLD)
    return encoder, larger


def whole(table: Any) -> Tensor:
    """A position table [1 + N, D]."""
    return (table() if isinstance(table, nn.Module) else table)[0].detach()


def tables_of(encoder: Any) -> list[Any]:
    return [block.pos for block in encoder.blocks] if encoder.config.where == "every" else [encoder.pos_embed]


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_tables_are_resized_corner_to_corner(kind, at):
    """C1.7 for each kind of table: identity, corners, class row, and a linear table stays linear."""
    given = {"positions": kind, "positions_at": at}
    before, after = resized(given, lambda _n, p: nn.init.normal_(p), OLD)
    for one, other in zip(tables_of(before), tables_of(after), strict=True):
        assert torch.equal(whole(one), whole(other))
    before, after = resized(given, lambda _n, p: nn.init.normal_(p))
    for one, other in zip(tables_of(before), tables_of(after), strict=True):
        small, large = whole(one), whole(other)
        assert torch.equal(large[0], small[0])
        small, large = small[1:].unflatten(0, OLD), large[1:].unflatten(0, NEW)
        torch.testing.assert_close(large[[0, 0, -1, -1], [0, -1, 0, -1]], small[[0, 0, -1, -1], [0, -1, 0, -1]])

    def linear(grid: tuple[int, int]) -> Tensor:
        rows, columns = torch.meshgrid(torch.linspace(0, 2, grid[0]), torch.linspace(0, 3, grid[1]), indexing="ij")
        return torch.cat([rows[..., None].expand(-1, -1, 8), columns[..., None].expand(-1, -1, 8)], 2).flatten(0, 1)

    def fill(name: str, parameter: nn.Parameter) -> None:
        if name.endswith("rows"):
            parameter.copy_(torch.arange(3.0)[:, None].expand_as(parameter))
        elif name.endswith("columns"):
            parameter.copy_(torch.arange(4.0)[:, None].expand_as(parameter))
        elif not name.endswith("prefix"):
            parameter[0, 1:] = linear(OLD)

    _, after = resized(given, fill)
    for table in tables_of(after):
        torch.testing.assert_close(whole(table)[1:], linear(NEW))


@pytest.mark.parametrize("at", ["stem", "every", "shared"])
@pytest.mark.parametrize(
    "new",
    [
        NEW,
        (7, 7),
        (2, 3),
        (3, 9),
    ],
)
def test_relative_positions_are_resized(at, new):
    """The longest steps, corner to corner, and none stay; what is linear in the step of rows and columns stays so."""

    def fill(_name: str, parameter: nn.Parameter) -> None:
        parameter.copy_(torch.arange(-11.0, 12)[:, None].expand_as(parameter))  # 4 down + right

    before, after = resized({"positions": "relative", "positions_at": at}, fill, new)
    count = 0
    for name, large in after.named_parameters():
        if "offsets" not in name:
            continue
        count += 1
        small = before.get_parameter(name).detach()
        large = large.detach()
        assert len(large) == 2 * new[0] * new[1] - 1
        for place in (0, len(large) // 2, -1):
            torch.testing.assert_close(large[place], small[len(small) // 2 if place > 0 else place])
        # a pair of patches one row apart, or one column apart, not at a border
        middle = new[0] * new[1] - 1
        down, right = (OLD[0] - 1) / (new[0] - 1), (OLD[1] - 1) / (new[1] - 1)
        torch.testing.assert_close(large[middle + new[1]], torch.full((8,), 4 * down))
        torch.testing.assert_close(large[middle + 1], torch.full((8,), right))
    assert count == {"stem": 1, "every": 2, "shared": 1}[at]
    same = torch.randn(23, 8)
    assert torch.equal(positions.resize_offsets(same, OLD, OLD), same)


def test_lines_of_an_axial_encoder_are_resized_along_themselves():
    """Rows have the offsets of columns and columns those of rows; each is a line, resized corner to corner."""
    small, large = axial(positions="relative"), axial(positions="relative", image=(28, 40))  # 5 x 4 and 7 x 10
    weights.fill(large, small.config, small.state_dict(), "here")
    for number, (old, new) in enumerate([(4, 10), (5, 7)]):
        table, made_ = (one.blocks[number].attn.offsets.detach().numpy() for one in (small, large))
        assert (len(table), len(made_)) == (2 * old - 1, 2 * new - 1)
        at = np.linspace(0, 2 * old - 2, 2 * new - 1)
        want = np.stack([np.interp(at, np.arange(2 * old - 1), one) for one in table.T], 1)
        np.testing.assert_allclose(made_, want, atol=1e-6)


# hybrids and ResNets


@pytest.mark.parametrize(
    ("patch", "blocks", "channels", "grid"), [(32, [3, 4, 6, 3], 2048, (7, 7)), (16, [3, 4, 9], 1024, (14, 14))]
)
def test_a_hybrid_takes_its_patches_from_a_feature_map(patch, blocks, channels, grid):
    """C3.1a, b"""
    with torch.device("meta"):
        encoder: Any = Vit(stem="r50", patch=patch).build()
        features = encoder.patch_embed.backbone(torch.empty(1, 3, 224, 224))
        tokens = encoder(torch.empty(1, 3, 224, 224, dtype=torch.uint8))
    features = features[-1] if isinstance(features, list) else features
    assert [len(stage.blocks) for stage in encoder.patch_embed.backbone.stages] == blocks
    assert sum(blocks) == 16
    assert tuple(features.shape) == (1, channels, *grid)
    assert tuple(tokens.shape) == (1, 1 + grid[0] * grid[1], 768)
    assert encoder.grid == grid
    assert encoder.patch_embed.proj.kernel_size == (1, 1)


def test_a_bottleneck_of_a_hybrid_starts_as_the_identity():
    """C3.1c: ReLU of what it is given, where no convolution projects its shortcut."""
    backbone = made(FEATURES["hybrid-16"]).patch_embed.backbone
    checked = 0
    for stage, width in zip(backbone.stages, (256, 512, 1024), strict=True):
        x = torch.randn(1, width, 6, 4, generator=torch.Generator().manual_seed(0))
        for block in stage.blocks[1:]:
            assert torch.equal(block(x), x.relu())
            checked += 1
    assert checked == 13


@pytest.mark.parametrize(("patch", "gmac"), [(32, 8.46), (16, 21.53)])
def test_flops_of_a_hybrid_are_the_references(patch, gmac):
    """C3.1d"""
    assert round(cost.encoder_macs(Vit(stem="r50", patch=patch)) / 1e9, 2) == gmac


@pytest.mark.parametrize("name", ["bit", "hybrid-16", "axial_resnet"])
def test_convolutions_are_standardised(name, monkeypatch):
    """C3.2a: seen where they are applied, each filter has mean 0 and deviation 1, but for the embedding of a hybrid."""
    encoder, seen = made(FEATURES[name]).eval(), []
    conv2d = F.conv2d

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        seen.append(weight.detach())
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(linear, "ONEDNN", False)  # which makes convolutions of linear layers

    monkeypatch.setattr(F, "conv2d", spy)
    with torch.no_grad():
        encoder(images(encoder.config, 1))
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    plain = [weight for weight in seen if any(weight.data_ptr() == conv.weight.data_ptr() for conv in convolutions)]
    assert len(plain) == ("hybrid" in name)
    rest = [weight for weight in seen if all(weight is not one for one in plain)]
    assert len(rest) == len(convolutions) - len(plain) > 30
    for weight in rest:
        assert weight.mean((1, 2, 3)).abs().max() < 1e-6
        assert (weight.std((1, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["bit", "axial_resnet", "hybrid-16"])
def test_an_image_does_not_see_the_others(name):
    """C3.2b: no batch statistics, in training neither."""
    encoder, image = made(FEATURES[name]).train(), images(FEATURES[name], 3)
    kinds = {type(module).__name__ for module in encoder.modules()}
    assert not any("BatchNorm" in kind for kind in kinds)
    groups = {module.num_groups for module in encoder.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {32}
    assert list(dict(encoder.named_buffers())) == ["mean", "std"]
    encoder.double()  # sixteen blocks without training blow up rounding
    with torch.no_grad():
        torch.testing.assert_close(encoder(image)[:1], encoder(image[:1]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("depth", "widen", "blocks", "gmac"),
    [
        (50, 2, [3, 4, 6, 3], 16.11),
        (101, 1, [3, 4, 23, 3], 7.80),
        (152, 1, [3, 8, 36, 3], None),
        (200, 3, [3, 24, 36, 3], None),
    ],
)
def test_resnets_are_the_papers(depth, widen, blocks, gmac):
    given = Bit(depth=depth, widen=widen)
    with torch.device("meta"):
        model: Any = given.create()
    assert [len(stage.blocks) for stage in model.stages] == blocks
    assert model.num_features == 2048 * widen
    assert gmac is None or round(cost.encoder_macs(given) / 1e9, 2) == gmac


# of timm's models, what its own forward pass does behind the tokens


@pytest.mark.parametrize(
    ("name", "part"),
    [("test_vit3", "attn_pool"), ("vit_relpos_small_patch16_224", "fc_norm"), ("test_convnext", "norm")],
)
def test_no_part_of_timms_head_is_left_to_train(name, part):
    encoder = made(TimmZoo(name=name, image=32))
    encoder(images(encoder.config)).square().sum().backward()
    missed = {key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert missed == set(), part


@pytest.mark.parametrize("name", ["test_vit", "test_vit4"])
def test_timms_vits_with_patches_as_a_map_are_maskable(name):
    encoder = made(TimmZoo(name=name, image=(32, 48))).eval()
    assert encoder.maskable
    assert encoder.depth > 1
    blank = encoder(images(encoder.config), edit=torch.zeros_like)
    assert torch.equal(blank[0], blank[1])


def test_a_size_that_timm_cannot_cut_is_refused():
    given = ["encoder.kind=timm", "encoder.name=test_vit", "data.image_size=56", "head.kind=classifier"]
    with pytest.raises(Refusal) as end:
        recipes.resolve(config.parse(Pretrain, given, recipes.FOLDER))
    assert end.value.code == USAGE


def test_strides_of_a_bit_sit_on_the_3x3():
    encoder: Any = made(FEATURES["bit"])
    strided = {
        name.split(".")[-1]: module.kernel_size
        for name, module in encoder.model.stages.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1) and "downsample" not in name
    }
    assert strided == {"conv2": (3, 3)}


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0), (50, 0.0015), (100, 0.003), (250, 0.0003), (350, 3e-5), (400, 3e-6)]
)
def test_the_hyper_rule_of_bit(step, want):
    """C3.2c, for less than 20,000 images: supports 100, 200, 300, 400, end at 500."""
    rate = learning_rate(step, 0.003, 500, 100, "step", (200, 300, 400))
    assert rate == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_an_axial_resnet_has_attention_for_3x3_convolutions():
    encoder = made(FEATURES["axial_resnet"]).eval()
    kernels = {module.kernel_size for module in encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kernels == {(7, 7), (1, 1)}
    blocks = [block for stage in encoder.model.stages for block in stage.blocks]
    assert len(blocks) == 16
    sides = []
    for block in blocks:
        rows, columns = block.conv2.rows, block.conv2.columns
        assert not rows.columns
        assert columns.columns
        assert rows.grid == columns.grid
        assert rows.offsets.shape[0] == 2 * rows.grid[1] - 1
        assert columns.offsets.shape[0] == 2 * rows.grid[0] - 1
        sides.append(rows.grid)
    assert list(dict.fromkeys(sides)) == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(images(AxialResnet(image=(96, 64))))


def test_relative_positions_of_an_axial_resnet_act():
    """Without them its attention would not tell rows, or columns, apart: a permuted map gives a permuted map."""
    attention = made(FEATURES["axial_resnet"]).model.stages[0].blocks[1].conv2
    rows, columns = attention.rows.grid
    x = torch.randn(1, 64, rows, columns, generator=torch.Generator().manual_seed(0))
    swap = torch.arange(rows)
    swap[0], swap[5] = 5, 0
    with torch.no_grad():
        assert not torch.allclose(attention(x[:, :, swap]), attention(x)[:, :, swap], atol=1e-5)
        for part, order in ((attention.columns, swap), (attention.rows, torch.arange(columns).flip(0))):
            part.offsets.zero_()
            given = x[:, :, order] if part is attention.columns else x[:, :, :, order]
            whole_, moved = attention(x), attention(given)
            moved_back = whole_[:, :, order] if part is attention.columns else whole_[:, :, :, order]
            torch.testing.assert_close(moved, moved_back, atol=1e-5, rtol=1e-4)


def test_timms_models_recompute_or_say_that_they_cannot():
    with torch.device("meta"):
        able, unable = Bit(image=64).build(), TimmZoo(name="dla34", image=64).build()
    for wanted in (True, False):
        able.activation_checkpointing = wanted
        assert able.activation_checkpointing == wanted
        assert {stage.grad_checkpointing for stage in able.model.stages} == {wanted}
    unable.activation_checkpointing = False
    with pytest.raises(Refusal, match="dla34 has none"):
        unable.activation_checkpointing = True
