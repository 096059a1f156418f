"""What every encoder promises (ssl_vit/model.py), over all kinds and variants, whole and with `select`."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.encoders import Encoder
from ssl_vit.encoders.vit import Vit
from ssl_vit.model import pool_tokens
from tests.encoders.kinds import (
    CONFIGS,
    PREFIX,
    TINY,
    TRANSFORMERS,
    build_fresh,
    gather_tokens,
    make_encoder,
    random_images,
    selections,
)

# at the start no gradient reaches what is behind a last norm whose scale starts at 0
UNREACHED = {"hybrid-16": "backbone", "hybrid-32": "backbone", "timm-resnet": "layer"}
COMPILED = ["vit-1d-every-mean", "vit-2d-every", "vit-2d-shared", "vit-relative-every", "vit-relative-shared"]
COMPILED += ["axial-2d-every", "timm-vit"]


def in_process_tier(name: str) -> Any:
    """In the `process` tier: another kind stands for it in the default one."""
    return pytest.param(name, marks=pytest.mark.process)


LIGHT = [in_process_tier(name) if name == "hybrid-32" else name for name in CONFIGS]
SQUARE: dict[str, Any] = TINY | {"image": 16}


def gradients(encoder: Any, tokens: Tensor) -> list[Tensor | None]:
    """Of every parameter, of a weighted sum of tokens."""
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)).to(tokens.dtype)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    return list(torch.autograd.grad((tokens * weight).sum(), parameters, allow_unused=True))


def edit(patches: Tensor) -> Tensor:
    """Half of the patches blank, so that images differ in what is told from what."""
    return patches * (torch.arange(patches.shape[1]) % 2)[:, None]


def test_every_kind_is_here():
    assert {type(config) for config in CONFIGS.values()} == set(get_args(get_args(Encoder)[0]))


@pytest.mark.parametrize("name", LIGHT)
def test_tokens_are_prefix_and_grid_and_the_last_of_the_layers(name):
    config = CONFIGS[name]
    encoder, image = make_encoder(config).eval(), random_images(config)
    rows, columns = encoder.grid
    assert (rows * encoder.stride, columns * encoder.stride) == config.image_hw
    assert encoder.prefix == PREFIX[name]
    block_outputs: list[Tensor] = []
    select = torch.tensor([[0, 1, rows * columns - 1], [1, 1, 0]])
    with torch.no_grad():
        tokens = encoder(image)
        assert tokens.shape == (2, encoder.prefix + rows * columns, encoder.width)
        assert tokens.isfinite().all()
        assert torch.equal(encoder(image), tokens)
        torch.testing.assert_close(encoder(image, select=select), gather_tokens(tokens, select), atol=1e-6, rtol=1e-6)
        for block in encoder.blocks[:1]:
            block.register_forward_hook(lambda _m, _args, out: block_outputs.append(out))
        layers = encoder.layers(image, {1, encoder.depth})
    vectors = pool_tokens(tokens, config.pool, encoder.prefix)
    assert torch.equal(vectors, tokens[:, 0] if config.pool == "class" else tokens[:, encoder.prefix :].mean(1))
    assert layers.keys() == {1, encoder.depth}
    assert torch.equal(layers[encoder.depth], tokens)
    assert all(layer.shape == tokens.shape for layer in layers.values())
    assert encoder.depth == 1 or not torch.allclose(layers[1], tokens)
    if name in TRANSFORMERS and not name.startswith("axial"):
        assert torch.equal(layers[1], encoder.norm(block_outputs[0]))
    with pytest.raises(ValueError, match="the encoder takes"):
        encoder(image.transpose(2, 3))


@pytest.mark.parametrize("name", LIGHT)
def test_a_seed_makes_an_encoder(name):
    encoder, rebuilt, image = (
        make_encoder(CONFIGS[name]).eval(),
        build_fresh(CONFIGS[name]).eval(),
        random_images(CONFIGS[name]),
    )
    tensors = encoder.state_dict()
    assert tensors.keys() == rebuilt.state_dict().keys()
    assert all(torch.equal(value, tensors[key]) for key, value in rebuilt.state_dict().items())
    for value in rebuilt.state_dict().values():  # and a state dict holds all there is
        value.mul_(0)
    rebuilt.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(rebuilt(image), encoder(image))


@pytest.mark.parametrize("name", LIGHT)
def test_a_gradient_reaches_every_parameter(name):
    encoder = make_encoder(CONFIGS[name])
    if name in UNREACHED:
        weights = [p for key, p in encoder.named_parameters() if UNREACHED[name] in key and key.endswith("weight")]
        zeros = [weight for weight in weights if not weight.any()]
        assert zeros  # the last norm of each bottleneck
        for weight in zeros:
            nn.init.ones_(weight)
    encoder(random_images(CONFIGS[name])).square().sum().backward()
    missed = {key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert missed == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_finite_and_near_fp32(name):
    encoder, image = make_encoder(CONFIGS[name]).eval(), random_images(CONFIGS[name])
    with torch.no_grad():
        expected = encoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            actual = encoder(image).float()
    assert actual.isfinite().all()
    assert (actual - expected).norm() < (
        0.3 if name == "bit" else 0.1
    ) * expected.norm()  # fifty layers that nothing trained


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
@pytest.mark.parametrize("name", ["vit-1d-stem", "axial-relative-every", *map(in_process_tier, COMPILED)])
def test_blocks_compile_without_a_graph_break(name):
    """Nor has the last one a break where only some tokens are asked for."""
    encoder, image = make_encoder(CONFIGS[name]), random_images(CONFIGS[name])
    variants = [{}, {"select": selections(encoder, 2)["half"]}]
    expected_outputs = [encoder(image, **kwargs) for kwargs in variants]
    torch._dynamo.reset()
    for block in {*encoder.blocks[:2], encoder.blocks[-1]}:  # of axial ones a row and a column
        block.compile(backend="aot_eager", fullgraph=True)
    for kwargs, expected in zip(variants, expected_outputs, strict=True):
        actual = encoder(image, **kwargs)
        torch.testing.assert_close(actual, expected)
        actual.square().sum().backward()


@pytest.mark.parametrize("name", LIGHT)
def test_recomputation_changes_no_gradient(name):
    """Of our transformers not a bit, with dropout and where only some tokens are asked for; attention runs twice."""
    is_transformer = name in TRANSFORMERS
    config = CONFIGS[name].model_copy(update={"dropout": 0.2, "drop_path": 0.2}) if is_transformer else CONFIGS[name]
    results, calls = [], []
    for checkpointing in (False, True):
        encoder = make_encoder(config).train()
        encoder.activation_checkpointing = checkpointing
        for block in encoder.blocks if is_transformer else ():
            block.attn.register_forward_hook(lambda *_, enabled=checkpointing: calls.append(enabled))
        edit_kwargs = {"edit": edit, "select": selections(encoder, 2)["half"]}
        for kwargs in ({}, edit_kwargs) if is_transformer else ({},):
            torch.manual_seed(1)
            tokens = encoder(random_images(config), **kwargs)
            results.append([tokens.detach(), *gradients(encoder, tokens)])
    for reference_run, recomputed_run in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        for reference, recomputed in zip(reference_run, recomputed_run, strict=True):
            assert (reference is None) == (recomputed is None)
            if reference is not None and recomputed is not None:
                torch.testing.assert_close(
                    recomputed, reference, atol=0 if is_transformer else 1e-5, rtol=0 if is_transformer else 1.3e-6
                )
    assert calls.count(True) == 2 * calls.count(False) >= (4 if is_transformer else 0)


@pytest.mark.parametrize("name", LIGHT)
def test_patches_can_be_edited_where_the_encoder_says_so(name):
    encoder, image = make_encoder(CONFIGS[name]).eval(), random_images(CONFIGS[name])
    assert encoder.maskable == (name.startswith(("vit", "axial-", "hybrid", "timm-vit")))
    if not encoder.maskable:
        with pytest.raises(ValueError, match="no patch embeddings"):
            encoder(image, edit=lambda patches: patches)
        return
    received: list[Tensor] = []

    def edit(patches: Tensor) -> Tensor:
        received.append(patches)
        return patches.zero_() if len(received) > 1 else patches

    with torch.no_grad():
        tokens = encoder(image)
        assert torch.equal(encoder(image, edit=edit), tokens)
        blank = encoder(image, edit=edit)
        last = encoder.depth  # an edit is of one call
        assert torch.equal(encoder.layers(image, {last})[last], tokens)
    assert received[0].shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    if not name.startswith("timm"):
        assert torch.equal(received[0], encoder.patch_embed(encoder.normalize(image)))
    assert torch.equal(blank[0], blank[1])  # nothing of the images is left
    assert not torch.allclose(tokens[0], tokens[1])


# select


def check_selected_tokens(encoder: Any, image: Tensor, select: Tensor, tolerance: float) -> None:
    blank = edit if encoder.maskable else None
    torch.manual_seed(5)
    expected = gather_tokens(encoder(image, edit=blank), select)
    torch.manual_seed(5)
    selected = encoder(image, edit=blank, select=select)
    assert selected.shape == expected.shape
    assert (selected - expected).abs().max() <= tolerance * expected.abs().max()
    pairs = list(zip(gradients(encoder, selected), gradients(encoder, expected), strict=True))
    max_norm = max(float(gradient.norm()) for _, gradient in pairs if gradient is not None)
    for gradient, expected_gradient in pairs:
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None and expected_gradient is not None:
            assert (gradient - expected_gradient).norm() <= tolerance * (expected_gradient.norm() + 0.1 * max_norm)


@pytest.mark.parametrize("which", ["half", "one", "all, unordered", "all", "the first", "repeated"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_and_gradients_are_those_of_all_in_fp64(name: str, which: str):
    encoder = make_encoder(CONFIGS[name]).double()
    for key, parameter in encoder.named_parameters():
        if "pos" in key or "offsets" in key or "cls" in key:
            nn.init.normal_(parameter, std=0.3)
    check_selected_tokens(encoder, random_images(CONFIGS[name]), selections(encoder, 2)[which], 1e-10)


@pytest.mark.parametrize("name", LIGHT)
def test_tokens_and_gradients_are_those_of_all_in_fp32(name: str):
    encoder = make_encoder(CONFIGS[name]).eval()
    check_selected_tokens(encoder, random_images(CONFIGS[name]), selections(encoder, 2)["half"], 1e-5)


def test_dropout_and_dropped_paths_act_on_selected_tokens():
    config = Vit(**SQUARE, dropout=0.5)
    encoder, image, select = make_encoder(config).train(), random_images(config), torch.tensor([[3, 3, 9]] * 2)
    torch.manual_seed(0)
    tokens = encoder(image, select=select)
    assert tokens.isfinite().all()
    assert not torch.equal(tokens[:, 0], tokens[:, 1])  # of each selected token a mask of its own
    assert torch.equal(*(encoder.eval()(image, select=select)[:, i] for i in (0, 1)))
    config = Vit(**SQUARE, drop_path=0.999999)  # the last block is left out
    encoder = make_encoder(config).train()
    with torch.no_grad():
        skipped = encoder.norm(encoder.blocks[0](encoder.embed(image)))
        torch.testing.assert_close(encoder(image, select=select), gather_tokens(skipped, select), atol=1e-5, rtol=1e-5)


def test_the_last_block_of_b16_works_for_98_rows_only():
    """41.7 % of that block and 3.5 % of the encoder (reference: peers 6.2); attention answers with all."""
    flops = []
    with torch.device("meta"), torch.no_grad():
        encoder, image = Vit(size="B").build(), torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
        for select in (None, torch.zeros(1, 98, dtype=torch.int64)):
            with FlopCounterMode(display=False) as counter:
                encoder(image, select=select)
            flops.append(counter.get_total_flops())
    all_flops, selected_flops = flops
    assert all_flops == pytest.approx(35.13e9, rel=1e-3)
    assert (all_flops - selected_flops) / all_flops == pytest.approx(0.035, abs=0.0005)
    d, t, num_skipped = 768, 197, 197 - 98
    assert all_flops - selected_flops == 2 * num_skipped * (
        2 * d * d + 2 * d * 3072 + 2 * t * d
    )  # q, projection, MLP; both of attention


def test_the_last_block_asks_for_the_selected_tokens_only_and_no_mask_is_passed(monkeypatch: pytest.MonkeyPatch):
    attend, calls = F.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2], v.shape[2], len(args) + len(options)))
        return attend(q, k, v, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    encoder = make_encoder(Vit(**SQUARE))
    encoder(random_images(encoder.config), select=torch.tensor([[1, 2, 5]] * 2))
    assert calls == [(17, 17, 17, 0), (3, 17, 17, 0)]


# what blocks add to


def tokens_under_autocast(encoder: Any, image: Tensor, residual: torch.dtype | None) -> tuple[Tensor, set[torch.dtype]]:
    """The tokens under bf16 autocast, and the types of what blocks give."""
    encoder.residual, dtypes = residual, set()
    for block in encoder.blocks:
        block.register_forward_hook(lambda _m, _args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        return encoder(image), dtypes


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_add_in_fp32_under_autocast_and_in_bf16_where_that_is_said(name: str):
    image, encoder = random_images(TRANSFORMERS[name]), make_encoder(TRANSFORMERS[name])
    fp32, dtypes = tokens_under_autocast(make_encoder(TRANSFORMERS[name]), image, None)
    assert dtypes == {torch.float32}
    bf16, dtypes = tokens_under_autocast(encoder, image, torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    assert (bf16 - fp32).norm() < 0.02 * fp32.norm()
    bf16.float().square().sum().backward()
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all()) for p in encoder.parameters())


def test_gradients_of_a_bf16_residual_are_near_those_of_autocast():
    config = Vit(size="Ti", width=32, depth=4, heads=2, patch=4, image=16)
    image, flat_gradients = random_images(config, 4), []
    weight = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(0))
    for dtype in (None, torch.bfloat16):
        encoder = make_encoder(config)
        (tokens_under_autocast(encoder, image, dtype)[0].float() * weight).sum().backward()
        flat_gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert F.cosine_similarity(*flat_gradients, dim=0) > 0.999
