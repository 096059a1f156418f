"""Schedules, parameter groups and skipped updates."""

from typing import Any

import pytest
import torch
from torch import nn

from ssl_vit.encoders.vit import Vit
from ssl_vit.train.engine import prepare, zeros
from ssl_vit.train.optim import AdamW, Sgd, groups, learning_rate, set_rate


def test_rates_of_the_papers_schedules():
    """C4.1: the cosine of masked patch prediction; C4.2: the linear decay ends where the authors end it.

    A constant rate stays after the warm-up.
    """
    for step, want in {0: 0, 5_000: 1e-4, 10_000: 2e-4, 505_000: 1e-4, 1_000_000: 0}.items():
        rate = learning_rate(step, lr=2e-4, steps=1_000_000, warmup_steps=10_000, schedule="cosine")
        assert rate == pytest.approx(want, abs=1e-12)
    rates = {step: learning_rate(step, 8e-4, 110, 10, "linear") for step in (5, 10, 60, 110)}
    assert rates == pytest.approx({5: 4e-4, 10: 8e-4, 60: 4.05e-4, 110: 1e-5})
    assert [learning_rate(step, 1.0, 8, 2, "constant") for step in range(5)] == [0, 0.5, 1, 1, 1]


def test_steps_divide_the_rate_by_ten_at_each_drop():
    """As torch's own schedule of that kind; a step is of the config, warm-up included. Only this schedule has drops."""
    config = Sgd(lr=0.3, schedule="step", drops=(4, 6), warmup_steps=2)
    twin = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    decay = torch.optim.lr_scheduler.MultiStepLR(twin, milestones=[4, 6], gamma=0.1)
    for step in range(9):
        want = twin.param_groups[0]["lr"] * min(1, step / 2)
        assert config.rate(step, steps=9) == pytest.approx(want, rel=1e-9)
        twin.step()
        decay.step()
    wrong: list[dict[str, Any]] = [{"schedule": "step"}, {"drops": (3,)}, {"schedule": "linear", "drops": (3,)}]
    for given in wrong:
        with pytest.raises(ValueError, match="belong together"):
            AdamW(**given)


def small() -> nn.Module:
    torch.manual_seed(0)
    return Vit(size="Ti", width=32, depth=1, heads=2, patch=4, image=8).build()


@pytest.mark.parametrize(("lr", "decay", "relative"), [(3e-3, 0.3, 9e-4), (8e-4, 0.1, 8e-5), (1e-3, 0.03, 3e-5)])
def test_only_kernels_decay_and_by_the_rate_times_the_decay(lr: float, decay: float, relative: float):
    """C4.4: with zero gradients an AdamW step shrinks kernels by exactly 1 - lr * decay and leaves all else.

    As in the papers' recipes for ImageNet, B on JFT and ImageNet-21k; in double, where a step leaves no rounding.
    """
    model = small().double()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = AdamW(lr=lr, weight_decay=decay).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            want = torch.full_like(value, relative)
            torch.testing.assert_close(1 - value / before[name], want, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("norm", "clip", "scale"), [(10.0, 1.0, 0.1), (0.5, 1.0, 1.0), (10.0, None, 1.0), (3.0, 2.0, 2 / 3)]
)
def test_gradients_are_clipped_jointly(norm, clip, scale):
    """C4.5: one factor for all parameters, whatever the norm of each."""
    from accelerate import Accelerator

    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    engine = prepare(Accelerator(cpu=True), model, Sgd(lr=1.0, momentum=0.0), {})
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=random) * (i + 1) for i, p in enumerate(model.parameters())]
    whole = torch.cat([g.flatten() for g in gradients]).norm()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient * norm / whole
    assert float(engine.step(clip)) == pytest.approx(norm, rel=1e-5)
    for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - parameter, scale * gradient * norm / whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [AdamW(lr=0.1, weight_decay=0.1), Sgd(lr=0.1), Sgd(lr=0.1, weight_decay=0.1)])
def test_steps_equal_torchs_own_and_a_flagged_one_changes_nothing(config):
    """The twin is torch's plain (not fused) optimizer, with a decay for kernels only, that never sees the bad gradient.

    Torch's SGD decays before the momentum.
    """
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    ours = config.build(model)
    for parameter in model.parameters():
        ours.state[parameter] = zeros(parameter, config.state)
    parts = [{"params": [twin.weight], "weight_decay": config.weight_decay}]
    parts += [{"params": [twin.bias], "weight_decay": 0.0}]
    kind: Any = torch.optim.SGD if config.kind == "sgd" else torch.optim.AdamW
    own: dict[str, Any] = {"momentum": 0.9} if config.kind == "sgd" else {}
    theirs = kind(parts, lr=0.1, fused=False, foreach=False, **own)
    both = list(zip(model.parameters(), twin.parameters(), strict=True))
    for step in range(5):
        bad = step in (0, 2)  # the very first one too: SGD's buffers are not there yet in torch
        for mine, other in both:
            mine.grad = torch.full_like(mine, float("nan") if bad else 0.1 * (step + 1))
            other.grad = mine.grad.clone()
        ours.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        ours.step()
        if not bad:
            theirs.step()
        for mine, other in both:
            torch.testing.assert_close(mine, other)


def test_layer_decay_is_that_of_timm():
    """Scales of the rate, and which parameters decay, against timm's groups for the same model."""
    import timm
    from timm.optim._param_groups import param_groups_layer_decay

    options: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    theirs: Any = timm.create_model("vit_tiny_patch16_224", **options)
    model: Any = nn.Module()
    model.encoder = Vit(size="Ti", width=32, depth=3, heads=2, mlp=128, patch=4, image=8).build()
    made = groups(model, 0.05, 0.7)

    def by_name(module: nn.Module, found: Any, scale: str) -> dict[str, tuple[float, float]]:
        names = {id(p): name.removeprefix("encoder.") for name, p in module.named_parameters()}
        return {names[id(p)]: (group[scale], group["weight_decay"]) for group in found for p in group["params"]}

    options = {"layer_decay": 0.7, "no_weight_decay_list": theirs.no_weight_decay()}
    want = by_name(theirs, param_groups_layer_decay(theirs, weight_decay=0.05, **options), "lr_scale")
    got = by_name(model, made, "scale")
    assert got.keys() == {name for name in want if not name.startswith("head.")}
    assert got.pop("norm.weight") == (1.0, 0.0)  # with the head, as in BEiT and MAE; timm has it with the last block
    assert got.pop("norm.bias") == (1.0, 0.0)
    for name, (scale, decay) in got.items():
        assert (pytest.approx(scale), decay) == want[name], name
    set_rate(made, 0.5)
    assert {round(group["lr"], 9) for group in made} == {round(0.5 * 0.7**i, 9) for i in range(5)}
