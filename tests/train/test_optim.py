"""Schedules, parameter groups and skipped updates."""

from typing import Any

import pytest
import torch
from torch import nn

from ssl_vit.encoders.vit import Vit
from ssl_vit.train.engine import initial_state, prepare_engine
from ssl_vit.train.optim import AdamW, Sgd, learning_rate, param_groups, set_lr


def test_rates_of_the_papers_schedules():
    """C4.1: the cosine of masked patch prediction; C4.2: the linear decay ends where the authors end it.

    A constant rate stays after the warm-up.
    """
    for step, expected in {0: 0, 5_000: 1e-4, 10_000: 2e-4, 505_000: 1e-4, 1_000_000: 0}.items():
        rate = learning_rate(step, lr=2e-4, steps=1_000_000, warmup_steps=10_000, schedule="cosine")
        assert rate == pytest.approx(expected, abs=1e-12)
    rates = {step: learning_rate(step, 8e-4, 110, 10, "linear") for step in (5, 10, 60, 110)}
    assert rates == pytest.approx({5: 4e-4, 10: 8e-4, 60: 4.05e-4, 110: 1e-5})
    assert [learning_rate(step, 1.0, 8, 2, "constant") for step in range(5)] == [0, 0.5, 1, 1, 1]


def test_steps_divide_the_rate_by_ten_at_each_drop():
    """As torch's own schedule of that kind; a step is of the config, warm-up included. Only this schedule has drops."""
    config = Sgd(lr=0.3, schedule="step", drops=(4, 6), warmup_steps=2)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(reference, milestones=[4, 6], gamma=0.1)
    for step in range(9):
        expected = reference.param_groups[0]["lr"] * min(1, step / 2)
        assert config.lr_at(step, steps=9) == pytest.approx(expected, rel=1e-9)
        reference.step()
        scheduler.step()
    invalid: list[dict[str, Any]] = [{"schedule": "step"}, {"drops": (3,)}, {"schedule": "linear", "drops": (3,)}]
    for kwargs in invalid:
        with pytest.raises(ValueError, match="belong together"):
            AdamW(**kwargs)


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return Vit(size="Ti", width=32, depth=1, heads=2, patch=4, image=8).build()


@pytest.mark.parametrize(("lr", "decay", "relative"), [(3e-3, 0.3, 9e-4), (8e-4, 0.1, 8e-5), (1e-3, 0.03, 3e-5)])
def test_only_kernels_decay_and_by_the_rate_times_the_decay(lr: float, decay: float, relative: float):
    """C4.4: with zero gradients an AdamW step shrinks kernels by exactly 1 - lr * decay and leaves all else.

    As in the papers' recipes for ImageNet, B on JFT and ImageNet-21k; in double, where a step leaves no rounding.
    """
    model = make_encoder().double()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = AdamW(lr=lr, weight_decay=decay).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            expected = torch.full_like(value, relative)
            torch.testing.assert_close(1 - value / before[name], expected, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("norm", "clip", "scale"), [(10.0, 1.0, 0.1), (0.5, 1.0, 1.0), (10.0, None, 1.0), (3.0, 2.0, 2 / 3)]
)
def test_gradients_are_clipped_jointly(norm, clip, scale):
    """C4.5: one factor for all parameters, whatever the norm of each."""
    from accelerate import Accelerator

    model = make_encoder()
    before = [p.detach().clone() for p in model.parameters()]
    engine = prepare_engine(Accelerator(cpu=True), model, Sgd(lr=1.0, momentum=0.0))
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=random) * (i + 1) for i, p in enumerate(model.parameters())]
    total_norm = torch.cat([g.flatten() for g in gradients]).norm()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient * norm / total_norm
    assert float(engine.step(clip)) == pytest.approx(norm, rel=1e-5)
    for parameter, previous, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(previous - parameter, scale * gradient * norm / total_norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [AdamW(lr=0.1, weight_decay=0.1), Sgd(lr=0.1), Sgd(lr=0.1, weight_decay=0.1)])
def test_steps_equal_torchs_own_and_a_flagged_one_changes_nothing(config):
    """The twin is torch's plain (not fused) optimizer, with a decay for kernels only, that never sees the bad gradient.

    Torch's SGD decays before the momentum.
    """
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    optimizer = config.build(model)
    for parameter in model.parameters():
        optimizer.state[parameter] = initial_state(parameter, config.state)
    groups = [{"params": [reference.weight], "weight_decay": config.weight_decay}]
    groups += [{"params": [reference.bias], "weight_decay": 0.0}]
    optimizer_class: Any = torch.optim.SGD if config.kind == "sgd" else torch.optim.AdamW
    kwargs: dict[str, Any] = {"momentum": 0.9} if config.kind == "sgd" else {}
    reference_optimizer = optimizer_class(groups, lr=0.1, fused=False, foreach=False, **kwargs)
    parameter_pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    for step in range(5):
        bad = step in (0, 2)  # the very first one too: SGD's buffers are not there yet in torch
        for actual, expected in parameter_pairs:
            actual.grad = torch.full_like(actual, float("nan") if bad else 0.1 * (step + 1))
            expected.grad = actual.grad.clone()
        optimizer.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        optimizer.step()
        if not bad:
            reference_optimizer.step()
        for actual, expected in parameter_pairs:
            torch.testing.assert_close(actual, expected)


def test_layer_decay_is_that_of_timm():
    """Scales of the rate, and which parameters decay, against timm's groups for the same model."""
    import timm
    from timm.optim._param_groups import param_groups_layer_decay

    options: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    timm_model: Any = timm.create_model("vit_tiny_patch16_224", **options)
    model: Any = nn.Module()
    model.encoder = Vit(size="Ti", width=32, depth=3, heads=2, mlp=128, patch=4, image=8).build()
    groups = param_groups(model, 0.05, 0.7)

    def scales_by_name(module: nn.Module, optimizer_groups: Any, scale: str) -> dict[str, tuple[float, float]]:
        names = {id(p): name.removeprefix("encoder.") for name, p in module.named_parameters()}
        return {
            names[id(p)]: (group[scale], group["weight_decay"]) for group in optimizer_groups for p in group["params"]
        }

    options = {"layer_decay": 0.7, "no_weight_decay_list": timm_model.no_weight_decay()}
    expected = scales_by_name(
        timm_model, param_groups_layer_decay(timm_model, weight_decay=0.05, **options), "lr_scale"
    )
    actual = scales_by_name(model, groups, "scale")
    assert actual.keys() == {name for name in expected if not name.startswith("head.")}
    assert actual.pop("norm.weight") == (1.0, 0.0)  # with the head, as in BEiT and MAE; timm has it with the last block
    assert actual.pop("norm.bias") == (1.0, 0.0)
    for name, (scale, decay) in actual.items():
        assert (pytest.approx(scale), decay) == expected[name], name
    set_lr(groups, 0.5)
    assert {round(group["lr"], 9) for group in groups} == {round(0.5 * 0.7**i, 9) for i in range(5)}
