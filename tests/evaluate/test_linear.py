"""The linear probe against scikit-learn's logistic regression; BatchNorm and SGD against their definition."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_vit.evaluate import linear
from ssl_vit.evaluate.linear import Linear, LinearProbe


def blobs(n: int, width: int, classes: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features around one centre a class, float32, overlapping, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return torch.tensor(centres[labels] + spread * random.normal(size=(n, width))).float(), torch.tensor(labels)


def objective(made: Linear, x: Tensor, labels: Tensor, l2: float) -> float:
    """Mean cross-entropy + l2 / 2 |W|^2 in float64."""
    loss = torch.nn.functional.cross_entropy(x.double() @ made.weight.double().T + made.bias.double(), labels)
    return float(loss + l2 / 2 * made.weight.double().square().sum())


def sklearn_fit(x: Tensor, labels: Tensor, l2: float) -> Linear:
    """The minimum of C * sum of losses + 0.5 |W|^2, which is ours divided by C N."""
    solver = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=5000)
    solver.fit(x.double().numpy(), labels.numpy())
    return Linear(torch.tensor(solver.coef_), torch.tensor(solver.intercept_))


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1e-1, 10.0])
@pytest.mark.parametrize(("n", "width"), [(200, 8), (30, 50)])
def test_equals_scikit_learn(l2: float, n: int, width: int):
    x, labels = blobs(n, width, 4)
    test, _ = blobs(300, width, 4, seed=1)
    mine, theirs = linear.fit(x.double(), labels, 4, l2, steps=2000), sklearn_fit(x, labels, l2)
    assert mine.weight.shape == (4, width)
    assert mine.bias.shape == (4,)
    np.testing.assert_allclose(mine.weight.numpy(), theirs.weight.numpy(), atol=1e-3 * float(theirs.weight.abs().max()))
    bias, wanted = mine.bias - mine.bias.mean(), theirs.bias - theirs.bias.mean()  # a shift of all changes nothing
    np.testing.assert_allclose(bias.numpy(), wanted.numpy(), atol=1e-3)
    assert objective(mine, x, labels, l2) == pytest.approx(objective(theirs, x, labels, l2), rel=1e-7)

    single = linear.fit(x, labels, 4, l2, steps=2000)  # float32 ends where its loss has no more digits
    assert objective(single, x, labels, l2) == pytest.approx(objective(theirs, x, labels, l2), rel=1e-5)
    same = single.scores(test).argmax(1) == (test.double() @ theirs.weight.T + theirs.bias).argmax(1)
    assert float(same.double().mean()) >= 0.99


def test_two_classes_equal_scikit_learns_sigmoid():
    """Softmax over two classes halves the penalty of w1 - w0: |W|^2 = |w1 - w0|^2 / 2."""
    x, labels = blobs(200, 8, 2)
    mine, theirs = linear.fit(x, labels, 2, 1e-2, steps=2000), sklearn_fit(x, labels, 1e-2 / 2)
    between = mine.weight[1] - mine.weight[0]
    np.testing.assert_allclose(between.numpy(), theirs.weight[0].numpy(), atol=2e-3)
    assert float(mine.bias[1] - mine.bias[0]) == pytest.approx(float(theirs.bias[0]), abs=2e-3)


def test_the_bias_is_not_penalised():
    """With a huge l2 only the bias is left, and it tells how frequent the classes are."""
    x, _ = blobs(100, 8, 4)
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    made = linear.fit(x - x.mean(0), labels, 3, l2=1e6, steps=2000)
    assert float(made.weight.abs().max()) < 1e-4
    np.testing.assert_allclose(made.bias.softmax(0).numpy(), [0.7, 0.2, 0.1], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 100, 999])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    x, labels = blobs(120, 8, 4)
    whole = linear.fit(x, labels, 4, 1e-2)
    monkeypatch.setattr(linear, "CHUNK", chunk)
    parts = linear.fit(x, labels, 4, 1e-2)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-2, atol=1e-3)


def test_scores_are_the_logits():
    made = Linear(torch.randn(3, 5), torch.randn(3))
    x = torch.randn(7, 5)
    torch.testing.assert_close(made.scores(x), x @ made.weight.T + made.bias)


def test_separable_and_degenerate_features_end():
    """Where the loss has no minimum but at infinity, or a feature nothing to say, the numbers stay finite."""
    one_hot, labels = torch.eye(5).repeat(4, 1), torch.arange(5).repeat(4)
    for x in (one_hot, one_hot * 1e4, torch.cat([one_hot, torch.full((20, 2), 7.0)], 1)):
        made = linear.fit(x, labels, 5, l2=1e-6)
        assert torch.isfinite(made.weight).all()
        assert made.scores(x).argmax(1).tolist() == labels.tolist()
    made = linear.fit(torch.ones(4, 3), torch.tensor([0, 1, 2, 2]), 3, l2=1e-3)
    assert torch.isfinite(made.scores(torch.ones(1, 3))).all()
    assert made.scores(torch.ones(1, 3)).argmax(1).tolist() == [2]


def test_a_class_without_images_is_never_the_answer():
    x, labels = blobs(60, 8, 3)
    made = linear.fit(x, labels, 4, 1e-2)
    assert (made.scores(x).argmax(1) != 3).all()


def plain_sgd(x: Tensor, labels: Tensor, classes: int, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """MAE's probe with the whole set as each batch: standardise, softmax, momentum 0.9, cosine to 0, in float64."""
    z = (x.double() - x.double().mean(0)) / x.double().var(0, correction=0).sqrt()
    weight, bias = torch.zeros(classes, x.shape[1]).double(), torch.zeros(classes).double()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(steps):
        wrong = ((z @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, classes)) / len(x)
        speed = [0.9 * speed[0] + wrong.T @ z, 0.9 * speed[1] + wrong.sum(0)]
        rate = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        weight, bias = weight - rate * speed[0], bias - rate * speed[1]
    return weight, bias


@pytest.mark.parametrize(
    "epochs",
    [
        60,
        200,
    ],
)
def test_sgd_on_the_whole_set_equals_its_definition(epochs: int):
    x, labels = blobs(60, 8, 3)
    x = x * torch.logspace(-2, 2, 8) + 5
    made = linear.sgd(
        x, labels, 3, lr=0.01 if epochs < 100 else 0.3, config=LinearProbe(solver="sgd", epochs=epochs, batch=60)
    )
    weight, bias = plain_sgd(x, labels, 3, 0.01 if epochs < 100 else 0.3, epochs)
    z = (x.double() - x.double().mean(0)) / x.double().var(0).sqrt()  # torch's running variance is the unbiased one
    np.testing.assert_allclose(made.scores(x).numpy(), (z @ weight.T + bias).numpy(), atol=2e-3)


def test_sgd_is_decided_by_its_seed_and_learns():
    x, labels = blobs(200, 16, 4, spread=0.7)
    config = LinearProbe(solver="sgd", epochs=20, batch=32)
    first, same = (linear.sgd(x, labels, 4, 0.1, config, seed=3) for _ in range(2))
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, linear.sgd(x, labels, 4, 0.1, config, seed=4).weight)
    test, truth = blobs(200, 16, 4, seed=1, spread=0.7)
    assert float((first.scores(test).argmax(1) == truth).double().mean()) > 0.9


def test_sgd_does_not_see_the_scale_of_a_feature():
    x, labels = blobs(100, 8, 4)
    factor, config = torch.logspace(-1, 2, 8), LinearProbe(solver="sgd", epochs=60, batch=32)
    plain, scaled = linear.sgd(x, labels, 4, 0.1, config), linear.sgd(x * factor, labels, 4, 0.1, config)
    assert (plain.scores(x).argmax(1) == scaled.scores(x * factor).argmax(1)).double().mean() > 0.98


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_constant_feature_and_a_set_that_is_no_multiple_of_the_batch_are_taken(solver: Any):
    x, labels = blobs(101, 8, 4, spread=0.5)
    x = torch.cat([x, torch.full((101, 1), 3.0), torch.zeros(101, 1)], 1)
    made, _ = linear.probe(x, labels, 4, LinearProbe(solver=solver, epochs=30, batch=25))
    scores = made.scores(x)
    assert torch.isfinite(scores).all()
    assert float((scores.argmax(1) == labels).double().mean()) > 0.95


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_one_image_a_class_is_enough(solver: Any, n: int):
    """Nothing can be held out of so few; the probe is fitted all the same."""
    x, labels = blobs(n, 8, 3, spread=0.1)
    made, value = linear.probe(x, labels, 3, LinearProbe(solver=solver, epochs=50))
    assert made.scores(x).argmax(1).tolist() == labels.tolist()
    assert value in (LinearProbe().l2 if solver == "lbfgs" else LinearProbe().lr)


@pytest.mark.parametrize("values", [(1e-7, 1.0), (1.0, 1e-7), (1e-7, 1e-6, 1.0)])
def test_the_value_is_chosen_on_held_out_images_and_fitted_to_all(values: tuple[float, ...]):
    """Noise in 100 dimensions: a large l2 is 7 % better than tiny ones, which fit every image."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 100, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, 100)
    config = LinearProbe(l2=values, fraction=0.4)
    made, value = linear.probe(x, labels, 3, config)
    assert value == 1.0
    assert torch.equal(made.weight, linear.probe(x, labels, 3, config)[0].weight)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    whole = linear.fit(z, labels, 3, 1.0)
    np.testing.assert_allclose(made.scores(x).numpy(), whole.scores(z).numpy(), atol=1e-2)
