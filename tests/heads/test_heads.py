"""The contract of every head, and the supervised heads' own promises."""

import math
from typing import get_args

import pytest
import torch

from ssl_vit.encoders.vit import Vit
from ssl_vit.heads import Head, clusters
from ssl_vit.heads.classifier import Classifier
from ssl_vit.heads.transfer import Transfer
from ssl_vit.model import Model

CONFIGS = get_args(get_args(Head)[0])


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=random),
        "label": torch.arange(count) % 5,
        "seed": torch.arange(count),
        "valid": torch.ones(count, dtype=torch.bool),
    }


def model(config, pool: str = "class") -> Model:
    torch.manual_seed(0)
    encoder = Vit.model_validate(
        {"size": "Ti", "width": 32, "depth": 2, "heads": 2, "patch": 4, "image": 16, "pool": pool}
    ).build()
    return Model(encoder, config.build(encoder, 5))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_head_steps_and_reports(kind, tmp_path):
    """A finite loss with a gradient, sums that add over a split batch, and a report of plain numbers."""
    config = kind()
    if isinstance(config, clusters.Clusters):
        clusters.write(tmp_path / "codebook", torch.rand(7, 48, generator=torch.Generator().manual_seed(2)), {})
        config = clusters.Clusters(codebook=str(tmp_path / "codebook"))
    made = model(config)
    for parameter in made.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = batch()
    whole = made(given)
    parts = [made({name: value[half] for name, value in given.items()}) for half in (slice(0, 3), slice(3, 6))]
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, whole.loss)
    whole.loss.backward()
    assert all(p.grad is not None for p in made.head.parameters())
    report = made.head.report(whole.sums, float(whole.weight))
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert math.isclose(report["loss"], whole.loss.item(), rel_tol=1e-5)


def test_model_gives_tokens_through_its_own_call():
    made = model(Transfer())
    given = batch()
    assert torch.equal(made(given, tokens=True), made.encoder(given["image"]))


@pytest.mark.parametrize(("config", "want"), [(Transfer(), math.log(5)), (Classifier(), math.log(5))])
def test_a_fresh_head_guesses_uniformly(config, want):
    """C1.4"""
    assert math.isclose(model(config)(batch()).loss.item(), want, abs_tol=1e-6)


def test_the_sigmoid_loss_sums_over_classes():
    loss = model(Classifier(loss="sigmoid"))(batch()).loss.item()
    assert math.isclose(loss, 5 * math.log(2), abs_tol=1e-6)


@pytest.mark.parametrize(("loss", "want"), [("sigmoid", 10 + 5 * math.log1p(math.exp(-10))), ("softmax", math.log(5))])
def test_the_last_bias_starts_where_it_is_told(loss, want):
    """At -10 a sigmoid says no to all classes: the loss is what the one right class costs, and C1.4 of a softmax."""
    made = model(Classifier(loss=loss, bias=-10))
    assert made.head.layers[-1].bias.unique().tolist() == [-10]
    assert not made.head.layers[-1].weight.any()
    assert made.head.layers[0].bias.abs().max() < 1
    assert math.isclose(made(batch()).loss.item(), want, rel_tol=1e-6)


def test_a_zero_head_leaves_the_trunk_alone_in_its_first_step():
    """C1.5: bit-identical after one step of plain SGD."""
    made = model(Transfer())
    before = {name: value.clone() for name, value in made.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(batch()).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in made.encoder.state_dict().items())
    assert made.head.layers[0].weight.abs().sum() > 0


def test_top1_and_top5_count_like_a_sort():
    made = model(Transfer(), pool="mean")
    torch.nn.init.normal_(made.head.layers[0].weight)
    given = batch()
    logits = made.head.layers(made.encoder(given["image"])[:, 1:].mean(1))
    output = made(given)
    assert output.sums["top1"] == (logits.argmax(1) == given["label"]).sum()
    assert output.sums["top5"] == 6  # five classes
    assert output.weight == 6


def test_logits_that_are_no_numbers_are_right_for_none():
    made = model(Transfer())
    torch.nn.init.constant_(made.head.layers[0].bias, float("nan"))
    sums = made(batch()).sums
    assert sums["top1"] == sums["top5"] == 0


def test_unlabelled_images_carry_no_loss():
    made = model(Transfer())
    torch.nn.init.normal_(made.head.layers[0].weight)
    given = batch()
    given["label"][2:] = -1
    some = made({name: value[:2] for name, value in given.items()})
    output = made(given)
    torch.testing.assert_close(output.loss, some.loss)
    assert output.weight == 2


def test_the_classifier_has_one_tanh_layer():
    layers = list(model(Classifier(hidden=9)).head.layers)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Tanh", "Linear"]
    assert layers[0].out_features == 9
