"""Weighted k-NN against a loop over every pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.evaluate import knn
from tests import twins


def shares(scores) -> np.ndarray:
    """Votes as shares of a row: a common factor, which keeps exp() in range, is nobody's concern."""
    scores = np.asarray(scores, np.float64)
    return scores / scores.sum(1, keepdims=True)


def drawn(n: int, m: int, width: int, classes: int, seed: int = 0):
    random = np.random.default_rng(seed)
    train, test = (torch.tensor(random.normal(size=(count, width))).float() for count in (n, m))
    return train, torch.tensor(random.integers(0, classes, n)), test


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (7, 1.0), (50, 0.02)])
def test_equals_a_loop_over_all_pairs(k: int, temperature: float):
    train, labels, test = drawn(50, 30, 12, 4)
    found = knn.scores(train, labels, test, 4, k, temperature)
    assert found.shape == (30, 4)
    want = twins.knn(train.numpy(), labels.numpy(), test.numpy(), 4, k, temperature)
    np.testing.assert_allclose(shares(found), shares(want), atol=2e-5)
    assert found.argmax(1).tolist() == want.argmax(1).tolist()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 6),
    width=st.integers(2, 9),
    classes=st.integers(1, 5),
    k=st.integers(1, 25),
    seed=st.integers(0, 2**20),
)
def test_any_shape_equals_the_loop(n: int, m: int, width: int, classes: int, k: int, seed: int):
    """k above N takes all there are."""
    train, labels, test = drawn(n, m, width, classes, seed)
    found = knn.scores(train, labels, test, classes, k)
    want = twins.knn(train.numpy(), labels.numpy(), test.numpy(), classes, k, 0.07)
    np.testing.assert_allclose(shares(found), shares(want), atol=1e-4)


def test_the_papers_of_the_method_are_the_default():
    assert (knn.Knn().k, knn.Knn().temperature) == (20, 0.07)
    train, labels, test = drawn(50, 30, 12, 4)
    assert torch.equal(knn.scores(train, labels, test, 4), knn.scores(train, labels, test, 4, 20, 0.07))


@pytest.mark.parametrize("chunk", [1, 7, 50, 51, 349, 1 << 20])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    train, labels, test = drawn(50, 30, 12, 4)
    whole = knn.scores(train, labels, test, 4)
    monkeypatch.setattr(knn, "CHUNK", chunk)
    torch.testing.assert_close(knn.scores(train, labels, test, 4), whole, rtol=1e-4, atol=1e-6)


def test_the_length_of_a_feature_does_not_count():
    train, labels, test = drawn(50, 30, 12, 4)
    length = torch.logspace(-4, 4, 50)[:, None]
    np.testing.assert_allclose(
        shares(knn.scores(train * length, labels, test * 1e3, 4)), shares(knn.scores(train, labels, test, 4)), atol=1e-4
    )


def test_the_nearest_wins_with_one_neighbour_and_finds_itself():
    train, labels, _ = drawn(40, 1, 12, 40)
    labels = torch.arange(40)
    assert knn.scores(train, labels, train, 40, k=1).argmax(1).tolist() == labels.tolist()


def test_many_far_neighbours_do_not_outvote_a_close_one():
    train = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 9)
    labels = torch.tensor([0] + [1] * 9)
    assert knn.scores(train, labels, torch.tensor([[1.0, 0.1]]), 2, k=10).argmax(1).tolist() == [0]
    assert knn.scores(train, labels, torch.tensor([[1.0, 0.1]]), 2, k=10, temperature=9.0).argmax(1).tolist() == [1]


def test_a_small_temperature_does_not_overflow():
    """exp(1 / 0.005) is beyond float32; the vote is the nearest neighbour's."""
    train, labels, test = drawn(50, 30, 12, 4)
    found = knn.scores(train, labels, test, 4, temperature=0.005)
    assert torch.isfinite(found).all()
    want = twins.knn(train.numpy(), labels.numpy(), test.numpy(), 4, 20, 0.005)
    assert found.argmax(1).tolist() == want.argmax(1).tolist()


def test_a_feature_of_zeros_gives_no_nan():
    train, labels, test = drawn(10, 3, 12, 3)
    train[4], test[1] = 0, 0
    assert torch.isfinite(knn.scores(train, labels, test, 3, k=10)).all()


def test_images_that_are_there_twice_are_a_tie_and_vote_both():
    """The same image under two labels: equal votes, whichever comes first."""
    train = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.0]])
    votes = knn.scores(train, torch.tensor([1, 0, 2]), train[:1], 3, k=2)
    assert votes[0, 0] == votes[0, 1] > 0
    assert votes[0, 2] == 0


def test_a_class_without_images_gets_no_vote():
    train, labels, test = drawn(50, 30, 12, 4)
    assert (knn.scores(train, labels, test, 6)[:, 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype: torch.dtype):
    train, labels, test = drawn(50, 30, 12, 4)
    train, test = train.to(dtype), test.to(dtype)
    want = twins.knn(train.double().numpy(), labels.numpy(), test.double().numpy(), 4, 50, 0.07)
    found = knn.scores(train, labels, test, 4, 50)
    np.testing.assert_allclose(shares(found.double()), shares(want), atol=1e-4)
