"""k-NN, few-shot and linear probe against short, slow definitions and scikit-learn; the checks C5.1 of the paper."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import few_shot, knn, linear
from ssl_vit.evaluate.linear import Linear, LinearProbe
from tests import evaluate_cases

SEEDS = st.integers(0, 2**20)


def blobs(n: int, width: int, classes: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features around one center a class, float32, and their labels: every class has its share."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centers = np.random.default_rng(99).normal(size=(classes, width))
    return torch.tensor(centers[labels] + spread * random.normal(size=(n, width))).float(), torch.tensor(labels)


def random_features(
    n: int = 50, m: int = 30, width: int = 12, classes: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of no classes with labels, and others to judge."""
    random = np.random.default_rng(seed)
    train, test = (torch.tensor(random.normal(size=(count, width))).float() for count in (n, m))
    return train, torch.tensor(random.integers(0, classes, n)), test


# --- few shots: the closed form


# N = D + 1 is where the primal gives way to the dual
@pytest.mark.parametrize("n", [4, 12, 16, 17, 18, 60])
@pytest.mark.parametrize("l2", [1024.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_primal_and_dual_equal_a_plain_solver(n: int, l2: float, dtype: torch.dtype):
    """In float64, whatever the features are in."""
    (x, labels), (test, _) = blobs(n, 16, 4), blobs(30, 16, 4, seed=1)
    if dtype != torch.float32:
        x, test = (x * 3 + 40).to(dtype), (test * 3 + 40).to(dtype)
    model = few_shot.solve(x, labels, 4, l2)
    scores = model.scores(test)
    assert scores.dtype == torch.float64
    assert scores.shape == (30, 4)
    for dual in (False, True):
        expected = evaluate_cases.reference_few_shot(
            x.double().numpy(), labels.numpy(), test.double().numpy(), 4, l2, dual
        )
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-8, rtol=1e-8)
    assert model.predict(test).tolist() == scores.argmax(1).tolist()
    assert model.predict(test).dtype == torch.int64


def test_many_features_of_few_images_cost_little():
    """By the dual; the primal's matrix would have 320 GB."""
    x, labels = torch.randn(4, 200_000), torch.arange(4) % 2
    assert few_shot.solve(x, labels, 2).predict(x).tolist() == labels.tolist()


sizes = st.integers(1, 25)


@given(sizes, sizes, st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), SEEDS)
def test_any_shape_and_scale_equals_the_plain_solver(n, width, classes, scale, offset, seed):
    random = np.random.default_rng(seed)
    x, test = (random.normal(size=(m, width)) * scale + offset for m in (n, 7))
    labels = random.integers(0, classes, n)  # some classes may have no image
    scores = few_shot.solve(torch.tensor(x), torch.tensor(labels), classes).scores(torch.tensor(test)).numpy()
    for dual in (False, True):
        np.testing.assert_allclose(
            scores, evaluate_cases.reference_few_shot(x, labels, test, classes, 1024.0, dual), atol=1e-5
        )


@pytest.mark.parametrize(("n", "want"), [(40, -0.797957), (200, -0.799591), (1000, -0.799918)])
def test_the_intercept_is_the_closed_form(n: int, want: float):
    """C5.1b: at the support's mean the standardised features are 0, and what is left is the constant's share."""
    for width in (5, 60):
        x, labels = blobs(n, width, 10)
        at_mean = few_shot.solve(x, labels, 10).scores(x.double().mean(0, keepdim=True))
        assert at_mean.numpy() == pytest.approx(np.full((1, 10), want), abs=1e-6)


def test_one_hot_features_are_learned_and_random_labels_are_not():
    """C5.1c."""
    labels = torch.arange(100) % 10
    one_hot = torch.nn.functional.one_hot(labels, 10).float()
    assert few_shot.solve(one_hot, labels, 10).predict(one_hot).tolist() == labels.tolist()
    random = torch.Generator().manual_seed(0)
    x, test = torch.randn(400, 32, generator=random), torch.randn(4000, 32, generator=random)
    random_labels, truth = (torch.randint(10, (m,), generator=random) for m in (400, 4000))
    accuracy = (few_shot.solve(x, random_labels, 10).predict(test) == truth).double().mean()
    assert float(accuracy) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 4000) ** 0.5)


@pytest.mark.parametrize("n", [12, 80])
def test_the_scale_of_a_feature_changes_no_prediction(n: int):
    """C5.1d: constants from 0.1 to 1000; far below that the 1e-5 beside the deviation would begin to count."""
    (x, labels), (test, _) = (blobs(count, 20, 4, seed, spread=3.0) for seed, count in enumerate((n, 300)))
    factor = torch.logspace(-1, 3, 20)
    expected = few_shot.solve(x, labels, 4).predict(test)
    assert few_shot.solve(x * factor, labels, 4).predict(test * factor).tolist() == expected.tolist()
    assert len(set(expected.tolist())) == 4


def test_the_support_is_a_draw_for_each_class_and_nested_in_its_shots():
    """C5.1e; of labeled images only, and in time of every image of a class, not of its first ones."""
    labels = torch.tensor(np.random.default_rng(3).permutation(np.repeat(np.arange(6), 30)))
    draws = {shots: few_shot.sample_support(labels, 6, shots, seed=0) for shots in (1, 5, 10, 25)}
    for shots, ids in draws.items():
        assert ids.dtype == torch.int64
        assert len(set(ids.tolist())) == 6 * shots
        assert torch.bincount(labels[ids], minlength=6).tolist() == [shots] * 6
    for few, more in [(1, 5), (5, 10), (10, 25)]:
        assert set(draws[few].tolist()) < set(draws[more].tolist())
    assert draws[5].tolist() == few_shot.sample_support(labels, 6, 5, seed=0).tolist()
    other_draws = [set(few_shot.sample_support(labels, 6, 5, seed=seed).tolist()) for seed in (1, 2)]
    assert other_draws[0] != other_draws[1] != set(draws[5].tolist())
    labels = torch.arange(40) % 2
    assert {int(i) for seed in range(60) for i in few_shot.sample_support(labels, 2, 3, seed)} == set(range(40))
    assert sorted(few_shot.sample_support(labels, 2, 20, seed=5).tolist()) == list(range(40))
    partial_labels = torch.tensor([0, -1, 1, -1, 0, 1, 2])
    assert set(few_shot.sample_support(partial_labels, 2, 2, seed=0).tolist()) == {0, 2, 4, 5}


def test_a_class_with_too_few_images_and_a_label_outside_the_classes_are_refused():
    """-1 stands for no label; as an index it would be the last class."""
    for few in (2, 0):
        with pytest.raises(ExitError, match="1") as error:
            few_shot.sample_support(torch.tensor([0] * 5 + [1] * few + [2] * 5), 3, 3, seed=0)
        assert error.value.code == ExitCode.DATA
        assert "\n" not in error.value.message
    x, labels = blobs(9, 4, 3)
    for bad_label in (-1, 3, 7):
        labels[2] = bad_label
        with pytest.raises((ExitError, ValueError, IndexError)):
            few_shot.solve(x, labels, 3)


@pytest.mark.parametrize("n", [8, 12, 80])
def test_neither_test_images_nor_a_constant_feature_enter_anything(n: int):
    """C5.1f: an image scores the same alone, beside others, and beside one that would move any mean."""
    (x, labels), (test, _) = blobs(n, 20, 4), blobs(9, 20, 4, seed=1)
    model = few_shot.solve(x, labels, 4)
    wild = model.scores(torch.cat([test, torch.full((1, 20), 1e6)]))[:-1]
    alone = torch.cat([model.scores(row[None]) for row in test])
    for scores in (wild, alone):
        torch.testing.assert_close(model.scores(test), scores, rtol=0, atol=1e-10)
    train_with_constant, test_with_constant = (
        torch.cat([part, torch.tensor([[3.5, 0]]).expand(len(part), 2)], 1) for part in (x, test)
    )
    torch.testing.assert_close(
        few_shot.solve(train_with_constant, labels, 4).scores(test_with_constant), model.scores(test), atol=1e-6, rtol=0
    )


def test_degenerate_supports_have_finite_scores():
    """One image; one an each class; only constant features; the same image under two classes."""
    for x, labels, classes in [
        (torch.ones(1, 3), [0], 1),
        (torch.ones(1, 3), [1], 3),
        (torch.eye(3), [0, 1, 2], 3),
        (torch.ones(6, 4), [0, 1, 2, 0, 1, 2], 3),
        (torch.randn(1, 4).expand(2, 4), [0, 1], 2),
    ]:
        scores = few_shot.solve(x, torch.tensor(labels), classes).scores(x)
        assert scores.shape == (len(x), classes)
        assert torch.isfinite(scores).all()
    assert few_shot.solve(torch.eye(3), torch.arange(3), 3).predict(torch.eye(3)).tolist() == [0, 1, 2]


def test_the_papers_are_the_defaults():
    config = few_shot.FewShotConfig()
    assert (config.shots, config.seeds, config.l2) == ((1, 5, 10, 25), 3, 1024.0)
    assert (knn.Knn().k, knn.Knn().temperature) == (20, 0.07)
    train, labels, test = random_features()
    assert torch.equal(knn.knn_scores(train, labels, test, 4), knn.knn_scores(train, labels, test, 4, 20, 0.07))


# --- weighted k-NN


def vote_shares(scores: Any) -> np.ndarray:
    """Votes as shares of a row: a common factor, which keeps exp() in range, is nobody's concern."""
    scores = np.asarray(scores, np.float64)
    return scores / scores.sum(1, keepdims=True)


def votes_by_loop(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Any:
    """Those of a loop over all pairs."""
    return evaluate_cases.reference_knn(
        train.double().numpy(), labels.numpy(), test.double().numpy(), classes, k, temperature
    )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (7, 1.0), (50, 0.02)])
def test_votes_equal_a_loop_over_all_pairs_in_any_precision(k: int, temperature: float):
    train, labels, test = random_features()
    actual, expected = (scorer(train, labels, test, 4, k, temperature) for scorer in (knn.knn_scores, votes_by_loop))
    assert actual.shape == (30, 4)
    np.testing.assert_allclose(vote_shares(actual), vote_shares(expected), atol=2e-5)
    assert actual.argmax(1).tolist() == expected.argmax(1).tolist()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        args = (train.to(dtype), labels, test.to(dtype), 4, 50)
        np.testing.assert_allclose(
            vote_shares(knn.knn_scores(*args).double()), vote_shares(votes_by_loop(*args)), atol=1e-4
        )


@given(st.integers(1, 20), st.integers(1, 6), st.integers(2, 9), st.integers(1, 5), sizes, SEEDS)
def test_votes_of_any_shape_equal_the_loop(n: int, m: int, width: int, classes: int, k: int, seed: int):
    """k above N takes all there are."""
    args = (*random_features(n, m, width, classes, seed), classes, k)
    np.testing.assert_allclose(vote_shares(knn.knn_scores(*args)), vote_shares(votes_by_loop(*args)), atol=1e-4)


def test_chunks_change_neither_a_vote_nor_a_fit(monkeypatch: pytest.MonkeyPatch):
    args, (x, labels) = (*random_features(), 4), overlapping(120, 8, 4)
    expected_scores, expected_fit = knn.knn_scores(*args), linear.fit_lbfgs(x, labels, 4, 1e-2)
    for chunk in (1, 7, 50, 51, 100, 349, 999, 1 << 20):
        monkeypatch.setattr(knn, "CHUNK", chunk)
        torch.testing.assert_close(knn.knn_scores(*args), expected_scores, rtol=1e-4, atol=1e-6)
        if chunk in (1, 100, 999):
            monkeypatch.setattr(linear, "CHUNK", chunk)
            torch.testing.assert_close(
                linear.fit_lbfgs(x, labels, 4, 1e-2).weight, expected_fit.weight, rtol=1e-2, atol=1e-3
            )


def test_neither_length_nor_zeros_nor_a_small_temperature_spoil_the_votes():
    """exp(1 / 0.005) is beyond float32; the vote is the nearest neighbor's."""
    train, labels, test = random_features()
    long = knn.knn_scores(train * torch.logspace(-4, 4, 50)[:, None], labels, test * 1e3, 4)
    np.testing.assert_allclose(vote_shares(long), vote_shares(knn.knn_scores(train, labels, test, 4)), atol=1e-4)
    scores = knn.knn_scores(train, labels, test, 4, temperature=0.005)
    assert torch.isfinite(scores).all()
    assert scores.argmax(1).tolist() == votes_by_loop(train, labels, test, 4, temperature=0.005).argmax(1).tolist()
    train[4], test[1] = 0, 0
    assert torch.isfinite(knn.knn_scores(train[:10], labels[:10], test[:3], 4, k=10)).all()


def test_who_votes_and_how_much():
    train, labels, test = random_features()
    ids = torch.arange(50)
    assert knn.knn_scores(train, ids, train, 50, k=1).argmax(1).tolist() == ids.tolist(), "the nearest is itself"
    assert (knn.knn_scores(train, labels, test, 6)[:, 4:] == 0).all(), "a class without images has no vote"
    near, far, query = [[1.0, 0.0]], [[0.0, 1.0]] * 9, torch.tensor([[1.0, 0.1]])
    close_neighbor_votes = partial(
        knn.knn_scores, torch.tensor(near + far), torch.tensor([0] + [1] * 9), query, 2, k=10
    )
    assert close_neighbor_votes().argmax(1).tolist() == [0], "many far neighbors do not outvote a close one"
    assert close_neighbor_votes(temperature=9.0).argmax(1).tolist() == [1]
    duplicated = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.0]])
    tie = knn.knn_scores(duplicated, torch.tensor([1, 0, 2]), duplicated[:1], 3, k=2)
    assert tie[0, 0] == tie[0, 1] > 0, "the same image under two labels: equal votes, whichever comes first"
    assert tie[0, 2] == 0


# --- the linear probe

overlapping = partial(blobs, spread=2.0)


def objective(probe: Linear, x: Tensor, labels: Tensor, l2: float) -> float:
    """Mean cross-entropy + l2 / 2 |W|^2 in float64."""
    loss = torch.nn.functional.cross_entropy(x.double() @ probe.weight.double().T + probe.bias.double(), labels)
    return float(loss + l2 / 2 * probe.weight.double().square().sum())


def sklearn_fit(x: Tensor, labels: Tensor, l2: float) -> Linear:
    """The minimum of C * sum of losses + 0.5 |W|^2, which is ours divided by C N."""
    solver = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=5000)
    solver.fit(x.double().numpy(), labels.numpy())
    return Linear(torch.tensor(solver.coef_), torch.tensor(solver.intercept_))


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1e-1, 10.0])
@pytest.mark.parametrize(("n", "width"), [(200, 8), (30, 50)])
def test_the_fit_equals_scikit_learns(l2: float, n: int, width: int):
    (x, labels), (test, _) = overlapping(n, width, 4), overlapping(300, width, 4, seed=1)
    probe, reference = linear.fit_lbfgs(x.double(), labels, 4, l2, steps=2000), sklearn_fit(x, labels, l2)
    assert probe.weight.shape == (4, width)
    assert probe.bias.shape == (4,)
    np.testing.assert_allclose(
        probe.weight.numpy(), reference.weight.numpy(), atol=1e-3 * float(reference.weight.abs().max())
    )
    bias, expected_bias = (
        probe.bias - probe.bias.mean(),
        reference.bias - reference.bias.mean(),
    )  # a shift of all changes nothing
    np.testing.assert_allclose(bias.numpy(), expected_bias.numpy(), atol=1e-3)
    assert objective(probe, x, labels, l2) == pytest.approx(objective(reference, x, labels, l2), rel=1e-7)
    single = linear.fit_lbfgs(x, labels, 4, l2, steps=2000)  # float32 ends where its loss has no more digits
    assert objective(single, x, labels, l2) == pytest.approx(objective(reference, x, labels, l2), rel=1e-5)
    agreement = single.scores(test).argmax(1) == (test.double() @ reference.weight.T + reference.bias).argmax(1)
    assert float(agreement.double().mean()) >= 0.99


def test_the_bias_is_not_penalised_and_an_empty_class_is_never_the_answer():
    """With a huge l2 only the bias is left, and it tells how frequent the classes are. Scores are the logits."""
    x, _ = overlapping(100, 8, 4)
    probe = linear.fit_lbfgs(x - x.mean(0), torch.tensor([0] * 70 + [1] * 20 + [2] * 10), 3, l2=1e6, steps=2000)
    assert float(probe.weight.abs().max()) < 1e-4
    np.testing.assert_allclose(probe.bias.softmax(0).numpy(), [0.7, 0.2, 0.1], atol=1e-3)
    probe, x = Linear(torch.randn(3, 5), torch.randn(3)), torch.randn(7, 5)
    torch.testing.assert_close(probe.scores(x), x @ probe.weight.T + probe.bias)
    x, labels = overlapping(60, 8, 3)
    assert (linear.fit_lbfgs(x, labels, 4, 1e-2).scores(x).argmax(1) != 3).all()


def test_separable_and_degenerate_features_end():
    """Where the loss has no minimum but at infinity, or a feature nothing to say, the numbers stay finite."""
    one_hot, labels = torch.eye(5).repeat(4, 1), torch.arange(5).repeat(4)
    for x in (one_hot, one_hot * 1e4, torch.cat([one_hot, torch.full((20, 2), 7.0)], 1)):
        probe = linear.fit_lbfgs(x, labels, 5, l2=1e-6)
        assert torch.isfinite(probe.weight).all()
        assert probe.scores(x).argmax(1).tolist() == labels.tolist()
    scores = linear.fit_lbfgs(torch.ones(4, 3), torch.tensor([0, 1, 2, 2]), 3, l2=1e-3).scores(torch.ones(1, 3))
    assert torch.isfinite(scores).all()
    assert scores.argmax(1).tolist() == [2]


def plain_sgd(x: Tensor, labels: Tensor, classes: int, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """MAE's probe with the whole set as each batch: standardise, softmax, momentum 0.9, cosine to 0, in float64."""
    z = (x.double() - x.double().mean(0)) / x.double().var(0, correction=0).sqrt()
    weight, bias = torch.zeros(classes, x.shape[1]).double(), torch.zeros(classes).double()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(steps):
        residual = ((z @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, classes)) / len(x)
        velocity = [0.9 * velocity[0] + residual.T @ z, 0.9 * velocity[1] + residual.sum(0)]
        rate = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    return weight, bias


@pytest.mark.parametrize(("epochs", "lr"), [(60, 0.01), (200, 0.3)])
def test_sgd_on_the_whole_set_equals_its_definition(epochs: int, lr: float):
    x, labels = overlapping(60, 8, 3)
    x = x * torch.logspace(-2, 2, 8) + 5
    probe = linear.fit_sgd(x, labels, 3, lr=lr, config=LinearProbe(solver="sgd", epochs=epochs, batch=60))
    weight, bias = plain_sgd(x, labels, 3, lr, epochs)
    z = (x.double() - x.double().mean(0)) / x.double().var(0).sqrt()  # torch's running variance is the unbiased one
    np.testing.assert_allclose(probe.scores(x).numpy(), (z @ weight.T + bias).numpy(), atol=2e-3)


def test_sgd_is_decided_by_its_seed_and_learns():
    (x, labels), (test, truth) = (blobs(200, 16, 4, seed, spread=0.7) for seed in (0, 1))
    fit = partial(linear.fit_sgd, x, labels, 4, 0.1, LinearProbe(solver="sgd", epochs=20, batch=32))
    first = fit(seed=3)
    assert torch.equal(first.weight, fit(seed=3).weight)
    assert not torch.equal(first.weight, fit(seed=4).weight)
    assert float((first.scores(test).argmax(1) == truth).double().mean()) > 0.9


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_constant_feature_a_set_that_is_no_multiple_of_the_batch_and_one_image_a_class_are_taken(solver: Any):
    """Nothing can be held out of so few; the probe is fitted all the same."""
    x, labels = blobs(101, 8, 4, spread=0.5)
    x = torch.cat([x, torch.full((101, 1), 3.0), torch.zeros(101, 1)], 1)
    scores = linear.fit_probe(x, labels, 4, LinearProbe(solver=solver, epochs=30, batch=25))[0].scores(x)
    assert torch.isfinite(scores).all()
    assert float((scores.argmax(1) == labels).double().mean()) > 0.95
    for n in (3, 4, 7):
        x, labels = blobs(n, 8, 3, spread=0.1)
        probe, value = linear.fit_probe(x, labels, 3, LinearProbe(solver=solver, epochs=50))
        assert probe.scores(x).argmax(1).tolist() == labels.tolist()
        assert value in (LinearProbe().l2 if solver == "lbfgs" else LinearProbe().lr)


@pytest.mark.parametrize("values", [(1e-7, 1.0), (1.0, 1e-7), (1e-7, 1e-6, 1.0)])
def test_the_value_is_chosen_on_held_out_images_and_fitted_to_all(values: tuple[float, ...]):
    """Noise in 100 dimensions: a large l2 is 7 % better than tiny ones, which fit every image."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 100, generator=random) + 1.5 * torch.nn.functional.one_hot(labels, 100)
    config = LinearProbe(l2=values, fraction=0.4)
    probe, value = linear.fit_probe(x, labels, 3, config)
    assert value == 1.0
    assert torch.equal(probe.weight, linear.fit_probe(x, labels, 3, config)[0].weight)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    full_fit = linear.fit_lbfgs(z, labels, 3, 1.0)
    np.testing.assert_allclose(probe.scores(x).numpy(), full_fit.scores(z).numpy(), atol=1e-2)
