"""The few-shot closed form against a plain solver in float64, and the checks C5.1 of the paper's protocol."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_vit.evaluate import few_shot
from ssl_vit.exits import DATA, Refusal
from tests import twins


def blobs(n: int, width: int, classes: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features around one centre a class, float32, and their labels: every class has its share."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return torch.tensor(centres[labels] + spread * random.normal(size=(n, width))).float(), torch.tensor(labels)


# N = D + 1 is where the primal gives way to the dual
@pytest.mark.parametrize("n", [4, 12, 16, 17, 18, 60])
@pytest.mark.parametrize("l2", [1024.0, 1.0])
def test_primal_and_dual_equal_a_plain_solver(n: int, l2: float):
    x, labels = blobs(n, 16, 4)
    test, _ = blobs(30, 16, 4, seed=1)
    found = few_shot.solve(x, labels, 4, l2)
    scores = found.scores(test)
    assert scores.dtype == torch.float64
    assert scores.shape == (30, 4)
    for dual in (False, True):
        want = twins.few_shot(x.numpy(), labels.numpy(), test.numpy(), 4, l2, dual)
        np.testing.assert_allclose(scores.numpy(), want, atol=1e-8, rtol=1e-8)
    assert found.predict(test).tolist() == scores.argmax(1).tolist()
    assert found.predict(test).dtype == torch.int64


def test_many_features_of_few_images_cost_little():
    """By the dual; the primal's matrix would have 320 GB."""
    x, labels = torch.randn(4, 200_000), torch.arange(4) % 2
    assert few_shot.solve(x, labels, 2).predict(x).tolist() == labels.tolist()


@pytest.mark.parametrize(
    "strange",
    [
        -1,
        3,
        7,
    ],
)
def test_a_label_outside_the_classes_is_no_other_class(strange: int):
    """-1 stands for no label; as an index it would be the last class."""
    x, labels = blobs(9, 4, 3)
    labels[2] = strange
    with pytest.raises((Refusal, ValueError, IndexError)):
        few_shot.solve(x, labels, 3)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 25),
    width=st.integers(1, 25),
    classes=st.integers(1, 6),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_scale_equals_the_plain_solver(
    n: int, width: int, classes: int, scale: float, offset: float, seed: int
):
    random = np.random.default_rng(seed)
    x, test = (random.normal(size=(m, width)) * scale + offset for m in (n, 7))
    labels = random.integers(0, classes, n)  # some classes may have no image
    got = few_shot.solve(torch.tensor(x), torch.tensor(labels), classes).scores(torch.tensor(test)).numpy()
    for dual in (False, True):
        np.testing.assert_allclose(got, twins.few_shot(x, labels, test, classes, 1024.0, dual), atol=1e-5)


@pytest.mark.parametrize(("n", "want"), [(40, -0.797957), (200, -0.799591), (1000, -0.799918)])
@pytest.mark.parametrize("width", [5, 60])
def test_the_intercept_is_the_closed_form(n: int, want: float, width: int):
    """C5.1b: at the support's mean the standardised features are 0, and what is left is the constant's share."""
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
    drawn, truth = (torch.randint(10, (m,), generator=random) for m in (400, 4000))
    right = (few_shot.solve(x, drawn, 10).predict(test) == truth).double().mean()
    assert float(right) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 4000) ** 0.5)


@pytest.mark.parametrize("n", [12, 80])
def test_the_scale_of_a_feature_changes_no_prediction(n: int):
    """C5.1d: constants from 0.1 to 1000; far below that the 1e-5 beside the deviation would begin to count."""
    x, labels = blobs(n, 20, 4, spread=3.0)
    test, _ = blobs(300, 20, 4, seed=1, spread=3.0)
    factor = torch.logspace(-1, 3, 20)
    plain = few_shot.solve(x, labels, 4).predict(test)
    assert few_shot.solve(x * factor, labels, 4).predict(test * factor).tolist() == plain.tolist()
    assert len(set(plain.tolist())) == 4


def test_the_support_is_a_draw_for_each_class_and_nested_in_its_shots():
    """C5.1e."""
    labels = torch.tensor(np.random.default_rng(3).permutation(np.repeat(np.arange(6), 30)))
    drawn = {shots: few_shot.support(labels, 6, shots, seed=0) for shots in (1, 5, 10, 25)}
    for shots, ids in drawn.items():
        assert ids.dtype == torch.int64
        assert len(set(ids.tolist())) == 6 * shots
        assert torch.bincount(labels[ids], minlength=6).tolist() == [shots] * 6
    for few, more in [(1, 5), (5, 10), (10, 25)]:
        assert set(drawn[few].tolist()) < set(drawn[more].tolist())
    assert drawn[5].tolist() == few_shot.support(labels, 6, 5, seed=0).tolist()
    others = [set(few_shot.support(labels, 6, 5, seed=seed).tolist()) for seed in (1, 2)]
    assert others[0] != others[1] != set(drawn[5].tolist())


def test_the_support_reaches_every_image_of_a_class():
    """A permutation of all of a class's images, and not its first ones only."""
    labels = torch.arange(40) % 2
    seen = {int(i) for seed in range(60) for i in few_shot.support(labels, 2, 3, seed)}
    assert seen == set(range(40))
    assert sorted(few_shot.support(labels, 2, 20, seed=5).tolist()) == list(range(40))


def test_unlabelled_images_and_other_classes_are_not_drawn():
    labels = torch.tensor([0, -1, 1, -1, 0, 1, 2])
    assert set(few_shot.support(labels, 2, 2, seed=0).tolist()) == {0, 2, 4, 5}


@pytest.mark.parametrize("counts", [[5, 2, 5], [5, 0, 5]])
def test_a_class_with_too_few_images_is_refused(counts: list[int]):
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    with pytest.raises(Refusal) as refused:
        few_shot.support(labels, 3, 3, seed=0)
    assert refused.value.code == DATA
    assert "1" in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("n", [12, 80])
def test_test_images_enter_nothing(n: int):
    """C5.1f: an image scores the same alone, beside others, and beside one that would move any mean."""
    x, labels = blobs(n, 20, 4)
    test, _ = blobs(9, 20, 4, seed=1)
    found = few_shot.solve(x, labels, 4)
    together = found.scores(test)
    wild = found.scores(torch.cat([test, torch.full((1, 20), 1e6)]))[:-1]
    alone = torch.cat([found.scores(row[None]) for row in test])
    torch.testing.assert_close(together, wild, rtol=0, atol=1e-10)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [8, 40])
def test_a_constant_feature_and_one_that_is_zero_change_nothing(n: int):
    x, labels = blobs(n, 16, 4)
    test, _ = blobs(50, 16, 4, seed=1)
    still = torch.cat([x, torch.full((n, 1), 3.5), torch.zeros(n, 1)], 1)
    beside = torch.cat([test, torch.full((50, 1), 3.5), torch.zeros(50, 1)], 1)
    torch.testing.assert_close(
        few_shot.solve(still, labels, 4).scores(beside), few_shot.solve(x, labels, 4).scores(test), atol=1e-6, rtol=0
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_solved_in_float64(dtype: torch.dtype):
    x, labels = blobs(60, 16, 4)
    x, test = (x * 3 + 40).to(dtype), (blobs(9, 16, 4, seed=1)[0] * 3 + 40).to(dtype)
    want = twins.few_shot(x.double().numpy(), labels.numpy(), test.double().numpy(), 4, 1024.0, dual=False)
    np.testing.assert_allclose(few_shot.solve(x, labels, 4).scores(test).numpy(), want, atol=1e-8)


def test_the_paper_is_the_default():
    config = few_shot.FewShotConfig()
    assert (config.shots, config.seeds, config.l2) == ((1, 5, 10, 25), 3, 1024.0)
