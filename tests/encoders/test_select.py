"""`select`: the last block computes fewer tokens, and loss and gradients are those of computing all and gathering."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.encoders.axial import Axial
from ssl_vit.encoders.vit import Vit
from tests.encoders.test_contract import CONFIGS, TINY, TRANSFORMERS, images, made
from tests.heads.test_masked import KINDS, WAYS, batch, make

SQUARE: dict[str, Any] = TINY | {"image": 16}


def gathered(tokens: Tensor, select: Tensor) -> Tensor:
    """Tokens [B, T, D] of select [B, S], by a plain loop."""
    return torch.stack([row[index] for row, index in zip(tokens, select, strict=True)])


def selections(encoder: Any, count: int) -> dict[str, Tensor]:
    """Tokens to ask for, of T."""
    whole = encoder.prefix + encoder.grid[0] * encoder.grid[1]
    random = torch.Generator().manual_seed(7)
    shuffled = torch.stack([torch.randperm(whole, generator=random) for _ in range(count)])
    return {
        "half": shuffled[:, : whole // 2],
        "one": shuffled[:, :1],
        "all, unordered": shuffled,
        "all": torch.arange(whole).expand(count, -1),
        "the first": torch.zeros(count, 1, dtype=torch.int64),
        "repeated": shuffled[:, [0, 1, 0, 0, 1]],
    }


def gradients(encoder: Any, tokens: Tensor) -> list[Tensor | None]:
    """Of every parameter, of a weighted sum of tokens."""
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2)).to(tokens.dtype)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    return list(torch.autograd.grad((tokens * weight).sum(), parameters, allow_unused=True))


def edit(patches: Tensor) -> Tensor:
    """Half of the patches blank, so that images differ in what is told from what."""
    return patches * (torch.arange(patches.shape[1]) % 2)[:, None]


def compare(encoder: Any, image: Tensor, select: Tensor, near: float) -> None:
    blank = edit if encoder.maskable else None
    torch.manual_seed(5)
    all_of_them = gathered(encoder(image, edit=blank), select)
    torch.manual_seed(5)
    some = encoder(image, edit=blank, select=select)
    assert some.shape == all_of_them.shape
    assert (some - all_of_them).abs().max() <= near * all_of_them.abs().max()
    pairs = list(zip(gradients(encoder, some), gradients(encoder, all_of_them), strict=True))
    whole = max(float(want.norm()) for _, want in pairs if want is not None)
    for mine, want in pairs:
        assert (mine is None) == (want is None)
        if mine is not None and want is not None:
            assert (mine - want).norm() <= near * (want.norm() + 0.1 * whole)


@pytest.mark.parametrize("which", ["half", "one", "all, unordered", "all", "the first", "repeated"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_and_gradients_are_those_of_all_in_fp64(name: str, which: str):
    encoder = made(CONFIGS[name]).double()
    for key, parameter in encoder.named_parameters():
        if "pos" in key or "offsets" in key or "cls" in key:
            nn.init.normal_(parameter, std=0.3)
    compare(encoder, images(CONFIGS[name]), selections(encoder, 2)[which], 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_gradients_are_those_of_all_in_fp32(name: str):
    encoder = made(CONFIGS[name]).eval()
    compare(encoder, images(CONFIGS[name]), selections(encoder, 2)["half"], 1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recomputation_changes_no_bit(name: str):
    found = []
    for wanted in (False, True):
        encoder = made(CONFIGS[name].model_copy(update={"dropout": 0.2, "drop_path": 0.2})).train()
        encoder.activation_checkpointing = wanted
        torch.manual_seed(1)
        tokens = encoder(images(CONFIGS[name]), edit=edit, select=selections(encoder, 2)["half"])
        found.append([tokens.detach(), *gradients(encoder, tokens)])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True) if plain is not None)


def test_dropout_and_dropped_paths_act_on_selected_tokens():
    config = Vit(**SQUARE, dropout=0.5)
    encoder, image, select = made(config).train(), images(config), torch.tensor([[3, 3, 9]] * 2)
    torch.manual_seed(0)
    tokens = encoder(image, select=select)
    assert tokens.isfinite().all()
    assert not torch.equal(tokens[:, 0], tokens[:, 1])  # of each selected token a mask of its own
    assert torch.equal(*(encoder.eval()(image, select=select)[:, i] for i in (0, 1)))
    config = Vit(**SQUARE, drop_path=0.999999)  # the last block is left out
    encoder = made(config).train()
    with torch.no_grad():
        skipped = encoder.norm(encoder.blocks[0](encoder.embed(image)))
        torch.testing.assert_close(encoder(image, select=select), gathered(skipped, select), atol=1e-5, rtol=1e-5)


class Everything(nn.Module):
    """An encoder that computes all tokens and gathers."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "encoder" else getattr(self.encoder, name)

    def forward(self, image: Tensor, edit: Any = None, select: Tensor | None = None) -> Tensor:
        tokens = self.encoder(image, edit=edit)
        return tokens if select is None else gathered(tokens, select)


ENCODERS: dict[str, Any] = {
    "vit": Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=16),
    "vit without class token": Vit(
        size="Ti", width=32, depth=2, heads=2, patch=4, image=16, class_token=False, pool="mean", positions_at="every"
    ),
    "relative": Vit(size="Ti", width=32, depth=2, heads=2, patch=4, image=16, positions="relative"),
    "axial": Axial(size="Ti", width=32, depth=1, heads=2, patch=4, image=16),
}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_masked_objective_learns_the_same(kind: str, name: str, recomputed: bool, tmp_path: Path):
    encoder, head = make(kind, tmp_path, ENCODERS[name], **WAYS["single"])
    encoder.activation_checkpointing = recomputed
    nn.init.normal_(head.linear.weight, std=0.1)
    given = batch()
    parameters = [*encoder.parameters(), *head.parameters()]
    some = head(encoder, given)
    mine = torch.autograd.grad(some.loss, parameters, allow_unused=True)
    every = head(Everything(encoder), given)
    wanted = torch.autograd.grad(every.loss, parameters, allow_unused=True)
    torch.testing.assert_close(some.loss, every.loss, atol=1e-6, rtol=1e-6)
    whole = max(float(want.norm()) for want in wanted if want is not None)
    for got, want in zip(mine, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert (got - want).norm() <= 1e-5 * (want.norm() + 0.1 * whole)
    assert torch.equal(head.panel(encoder, given), head.panel(Everything(encoder), given))


def flops(encoder: Any, image: Tensor, select: Tensor | None) -> int:
    """FLOPs of a forward pass, as torch counts them."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(image.to("meta"), select=None if select is None else select.to("meta"))
    return counter.get_total_flops()


def test_the_last_block_of_b16_works_for_98_rows_only():
    """41.7 % of that block and 3.5 % of the encoder (reference: peers 6.2)."""
    with torch.device("meta"):
        encoder = Vit(size="B").build()
    image, select = torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.zeros(1, 98, dtype=torch.int64)
    whole, less = flops(encoder, image, None), flops(encoder, image, select)
    assert whole == pytest.approx(35.13e9, rel=1e-3)
    assert (whole - less) / whole == pytest.approx(0.035, abs=0.0005)
    d, t, left = 768, 197, 197 - 98
    assert whole - less == 2 * left * (2 * d * d + 2 * d * 3072 + 2 * t * d)  # q, projection, MLP; both of attention


def test_each_part_of_the_last_block_sees_only_what_is_asked_for():
    config = Vit(**SQUARE)
    encoder, image = made(config).eval(), images(config)
    rows: dict[str, int] = {}
    for name in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        part = encoder.blocks[-1].get_submodule(name)
        part.register_forward_hook(lambda _m, given, _o, name=name: rows.__setitem__(name, given[0].shape[1]))
    encoder(image, select=torch.tensor([[1, 2, 5]] * 2))
    assert set(rows.values()) == {3}
    assert len(rows) == 4


def test_attention_is_asked_by_the_selected_and_answered_by_all(monkeypatch: pytest.MonkeyPatch):
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((q.shape[2], k.shape[2], v.shape[2], len(rest) + len(options)))
        return attend(q, k, v, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    config = Vit(**SQUARE)
    made(config)(images(config), select=torch.tensor([[1, 2, 5]] * 2))
    assert seen == [(17, 17, 17, 0), (3, 17, 17, 0)]  # and no mask


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo
@pytest.mark.parametrize("name", ["vit-1d-stem", "vit-relative-every", "axial-2d-every"])
def test_the_last_block_compiles_whole(name: str):
    encoder, image = made(CONFIGS[name]), images(CONFIGS[name])
    select = selections(encoder, 2)["half"]
    want = encoder(image, select=select)
    torch._dynamo.reset()
    encoder.blocks[-1].compile(backend="aot_eager", fullgraph=True)
    got = encoder(image, select=select)
    torch.testing.assert_close(got, want)
    got.sum().backward()
