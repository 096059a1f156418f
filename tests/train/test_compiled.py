"""compile=true: few graphs, of which each is made once. By dynamo alone, which is what decides on it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ssl_vit.encoders.vit import Vit
from ssl_vit.heads.mean_color import MeanColor
from ssl_vit.model import Batch, Model
from ssl_vit.train.prepare import compile_blocks

COMPILE = torch.compile
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo


@pytest.fixture(autouse=True)
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No code is generated, which would take minutes."""

    def compiled(module: nn.Module) -> None:
        module._compiled_call_impl = COMPILE(module._call_impl, backend="eager")  # type: ignore[assignment]

    monkeypatch.setattr(torch, "compile", lambda function: COMPILE(function, backend="eager"))
    monkeypatch.setattr(nn.Module, "compile", compiled)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def batch(count: int = 4, first: int = 0) -> Batch:
    random = torch.Generator().manual_seed(first)
    return {
        "image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random),
        "label": torch.full((count,), -1),
        "seed": torch.arange(count) + first,
        "valid": torch.ones(count, dtype=torch.bool),
    }


def model(**more: Any) -> Model:
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=16, heads=2, patch=4, image=16, **more).build()
    return Model(encoder, MeanColor().build(encoder, 0))


VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "drop_path": {"drop_path": 0.1}}
VARIANTS |= {"dropout": {"dropout": 0.1}, "every": {"positions_at": "every"}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.process if n > 1 else ()) for n, name in enumerate(VARIANTS)]
)
def test_a_run_needs_few_graphs_and_makes_them_once(name: str):
    """Training, evaluation of both kinds, a last smaller batch and a panel; then all of it again."""
    made, found = model(depth=12, **VARIANTS[name]), []
    compile_blocks(made)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        made.train()
        for step in range(4):
            made(batch(first=step)).loss.backward()
        found.append(counters["stats"]["unique_graphs"])
        made.eval()
        with torch.no_grad():
            made(batch())
            made(batch(6), tokens=True)
            made(batch(4), tokens=True)
            made(batch(2), panel=True)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == (4 if name == "drop_path" else 3)  # before the blocks, a block, the last; one that drops
    assert found[1] == found[2] == found[3] <= 12 + found[0]
    assert not counters["graph_break"]


def test_a_compiled_model_is_the_model_and_a_copy_is_of_its_own():
    plain, made = model(depth=2), model(depth=2)
    compile_blocks(made)
    made.load_state_dict(plain.state_dict())
    assert made.state_dict().keys() == plain.state_dict().keys()
    losses = [one(batch()).loss for one in (plain, made)]
    torch.testing.assert_close(*losses)
    mine, theirs = (
        torch.autograd.grad(loss, [*one.parameters()]) for loss, one in zip(losses, (plain, made), strict=True)
    )
    torch.testing.assert_close(mine, theirs)
    other = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in (*other.encoder.patch_embed.parameters(), other.encoder.pos_embed):
            parameter.zero_()
        assert not other.encoder.embed(batch()["image"]).any()
