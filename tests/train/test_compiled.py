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

TORCH_COMPILE = torch.compile
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside dynamo


@pytest.fixture(autouse=True)
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No code is generated, which would take minutes."""

    def compile_module(module: nn.Module) -> None:
        module._compiled_call_impl = TORCH_COMPILE(module._call_impl, backend="eager")  # type: ignore[assignment]

    monkeypatch.setattr(torch, "compile", lambda function: TORCH_COMPILE(function, backend="eager"))
    monkeypatch.setattr(nn.Module, "compile", compile_module)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def make_batch(count: int = 4, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    return {
        "image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "label": torch.full((count,), -1),
        "seed": torch.arange(count) + first,
        "valid": torch.ones(count, dtype=torch.bool),
    }


def make_model(**kwargs: Any) -> Model:
    torch.manual_seed(0)
    encoder = Vit(size="Ti", width=16, heads=2, patch=4, image=16, **kwargs).build()
    return Model(encoder, MeanColor().build(encoder, 0))


VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "drop_path": {"drop_path": 0.1}}
VARIANTS |= {"dropout": {"dropout": 0.1}, "every": {"position_placement": "every"}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.process if n > 1 else ()) for n, name in enumerate(VARIANTS)]
)
def test_a_run_needs_few_graphs_and_makes_them_once(name: str):
    """Training, evaluation of both kinds, a last smaller batch and a panel; then all of it again."""
    compiled_model, num_graphs = make_model(depth=12, **VARIANTS[name]), []
    compile_blocks(compiled_model)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        compiled_model.train()
        for step in range(4):
            compiled_model(make_batch(first=step)).loss.backward()
        num_graphs.append(counters["stats"]["unique_graphs"])
        compiled_model.eval()
        with torch.no_grad():
            compiled_model(make_batch())
            compiled_model(make_batch(6), tokens=True)
            compiled_model(make_batch(4), tokens=True)
            compiled_model(make_batch(2), visualize=True)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] == (4 if name == "drop_path" else 3)  # before the blocks, a block, the last; one that drops
    assert num_graphs[1] == num_graphs[2] == num_graphs[3] <= 12 + num_graphs[0]
    assert not counters["graph_break"]


def test_a_compiled_model_is_the_model_and_a_copy_is_of_its_own():
    eager_model, compiled_model = make_model(depth=2), make_model(depth=2)
    compile_blocks(compiled_model)
    compiled_model.load_state_dict(eager_model.state_dict())
    assert compiled_model.state_dict().keys() == eager_model.state_dict().keys()
    losses = [module(make_batch()).loss for module in (eager_model, compiled_model)]
    torch.testing.assert_close(*losses)
    eager_grads, compiled_grads = (
        torch.autograd.grad(loss, [*module.parameters()])
        for loss, module in zip(losses, (eager_model, compiled_model), strict=True)
    )
    torch.testing.assert_close(eager_grads, compiled_grads)
    model_copy = copy.deepcopy(compiled_model)
    with torch.no_grad():
        for parameter in (*model_copy.encoder.patch_embed.parameters(), model_copy.encoder.pos_embed):
            parameter.zero_()
        assert not model_copy.encoder.embed(make_batch()["image"]).any()
