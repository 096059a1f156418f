"""Metrics against scikit-learn, on predictions of any kind; the interval against a bootstrap loop; tables read back."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as _theirs

from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.exits import DATA, Refusal

theirs: Any = _theirs  # its types say that nan is no number

NASTY = ["a|b", "<script>alert(1)</script>", "two\nlines", "a,b", 'say "x"', "Blüte 花", "=1+1", "back\rspace", " x "]


def predicted(scores: np.ndarray, labels: np.ndarray) -> Predictions:
    """What an evaluation keeps: the best five, the best first."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    best = np.take_along_axis(scores, top, 1).astype(np.float32)
    return Predictions(np.arange(len(labels)), labels, top, best)


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    scores = random.random((n, classes))
    scores[np.arange(n), labels] += random.random(n) * 0.5
    return scores, labels


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn's, of one image
@given(n=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 2**20))
def test_equal_scikit_learns(n: int, classes: int, seed: int):
    """Also where classes have no image, or no image was taken for one of them."""
    scores, labels = drawn(n, classes, seed)
    found, every = predicted(scores, labels), np.arange(classes)
    got, first = metrics.accuracy(found, classes), scores.argmax(1)
    assert got["samples"] == n
    assert got["top1"] == pytest.approx(theirs.accuracy_score(labels, first))
    best_five = theirs.top_k_accuracy_score(labels, scores, k=5, labels=every) if classes > 5 else 1.0
    assert got["top5"] == pytest.approx(best_five)
    seen = np.unique(labels)
    recall = theirs.recall_score(labels, first, labels=seen, average=None, zero_division=0)
    assert got["mean_per_class"] == pytest.approx(recall.mean())
    if set(first) <= set(seen):  # else scikit-learn warns
        assert got["mean_per_class"] == pytest.approx(theirs.balanced_accuracy_score(labels, first))

    matrix = metrics.confusion(labels, first, classes)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, theirs.confusion_matrix(labels, first, labels=every))
    rows = metrics.per_class(matrix)
    precision, recall, _, support = theirs.precision_recall_fscore_support(
        labels, first, labels=every, zero_division=np.nan
    )
    for number, row in enumerate(rows):
        assert row["samples"] == support[number]
        assert row["predicted"] == (first == number).sum()
        assert row["right"] == ((first == number) & (labels == number)).sum()
        for name, want in (("accuracy", recall[number]), ("precision", precision[number])):
            assert row[name] is None if np.isnan(want) else row[name] == pytest.approx(want)


def test_of_equal_scores_the_order_of_the_predictions_decides():
    """The tie was broken when the best five were chosen; nobody counts it twice."""
    found = predicted(np.full((4, 8), 0.125), np.array([0, 1, 4, 5]))
    assert metrics.accuracy(found, 8) == {"top1": 0.25, "top5": 0.75, "mean_per_class": 0.25, "samples": 4}


def test_images_without_a_label_do_not_count():
    scores, labels = drawn(20, 6, 0)
    some = np.where(np.arange(20) % 4 == 0, -1, labels)
    kept = some >= 0
    assert metrics.accuracy(predicted(scores, some), 6) == metrics.accuracy(predicted(scores[kept], some[kept]), 6)
    assert metrics.confusion(some, scores.argmax(1), 6).sum() == kept.sum()
    none = metrics.accuracy(predicted(scores, np.full(20, -1)), 6)
    assert none["samples"] == 0
    assert none["top1"] == 0


def test_hits_are_of_one_label_or_of_a_set():
    top = np.array([[3, 1], [0, 2], [2, 4], [4, 0]])
    assert metrics.hits(top, np.array([1, 0, 0, 3])).tolist() == [True, True, False, False]
    assert metrics.hits(top[:, :1], np.array([1, 0, 0, 3])).tolist() == [False, True, False, False]
    for accepted in ([{1, 9}, {5}, {4, 2}, set()], [[1, 9], [5], [4, 2], []]):
        got = metrics.hits(top, accepted)
        assert got.dtype == bool
        assert got.tolist() == [True, False, True, False]


@pytest.mark.parametrize("share", [0.0, 0.07, 0.5, 1.0])
def test_the_interval_is_the_bootstraps(share: float):
    right = np.arange(400) < share * 400
    random = np.random.default_rng(1)
    means = [random.choice(right, 400).mean() for _ in range(4000)]
    low, high = metrics.interval(right, seed=0, resamples=4000)
    want = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(want), abs=0.008)
    assert low <= share <= high
    narrow = metrics.interval(right, resamples=4000, level=0.5)
    assert low <= narrow[0] <= narrow[1] <= high
    if 0 < share < 1:
        assert high - low > narrow[1] - narrow[0] > 0


def test_the_interval_covers_the_truth_as_often_as_it_says_and_repeats():
    random = np.random.default_rng(0)
    intervals = [metrics.interval(random.random(300) < 0.3, seed=i) for i in range(300)]
    assert np.mean([low <= 0.3 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.04)
    right = random.random(50) < 0.5
    assert metrics.interval(right, seed=1) == metrics.interval(right, seed=1) != metrics.interval(right, seed=2)


def test_mean_and_deviation_and_the_groups_of_vtab():
    """C5.3c with the rows of the paper's Table 9 for H/14."""
    assert metrics.spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert metrics.spread([0.5]) == (0.5, None)
    natural = [95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9]
    special = [83.3, 96.7, 91.4, 76.6]
    structured = [91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2]
    tasks = [("Natural", v) for v in natural] + [("Specialized", v) for v in special]
    got = metrics.groups(tasks + [("Structured", v) for v in structured])
    assert {k: round(v, 2) for k, v in got.items()} == {"Natural": 86.69, "Specialized": 87.0, "Structured": 65.03}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_of_any_names_are_read_back(suffix: str, tmp_path: Path):
    """Names with commas, quotes, line ends of both kinds, other scripts: a row stays a row, a name a name."""
    scores, labels = drawn(12, len(NASTY), 0)
    labels[3] = -1
    found, keys = predicted(scores, labels), [f"{NASTY[i % len(NASTY)]}/{i}" for i in range(12)]
    path = tmp_path / f"predictions.{suffix}"
    metrics.write_predictions(found, keys, NASTY, path)
    if suffix == "csv":
        with path.open(newline="", encoding="utf-8") as text:
            columns, *rows = list(csv.reader(text))
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        columns, rows = table.column_names, [[str(v) for v in row.values()] for row in table.to_pylist()]
    assert columns == ["sample", "key", "label"] + [f"{n}{i}" for i in range(1, 6) for n in ("top", "score")]
    truth = ["" if i < 0 else NASTY[i] for i in labels.tolist()]
    top = [[NASTY[i] for i in row] for row in found.top.tolist()]
    assert [row[:3] + row[3::2] for row in rows] == [[str(i), keys[i], truth[i], *top[i]] for i in range(12)]
    assert (np.diff(np.array([row[4::2] for row in rows], float), axis=1) <= 0).all()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_that_are_not_unicode_can_be_written(suffix: str, tmp_path: Path):
    """A folder's name may be any bytes; Python holds them as lone surrogates, which UTF-8 has not."""
    name = b"caf\xe9".decode(errors="surrogateescape")
    found = predicted(np.array([[1.0, 0.0]]), np.array([0]))
    metrics.write_predictions(found, [f"{name}/1.jpg"], [name, "b"], tmp_path / f"p.{suffix}")
    assert b"caf" in (tmp_path / f"p.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("labels", "every", "said"),
    [
        ([0, 1, 5, 7], False, "2 "),  # labels outside the classes
        ([0, 1, 2, -2], False, "1 "),
        ([0, 2, -1], True, "bee"),  # an empty class, where every class is learned
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list[int], every: bool, said: str):
    metrics.check_labels(np.array([0, 2, -1]), ["a", "bee", "c"], "val", every=False)
    with pytest.raises(Refusal, match=said) as refused:
        metrics.check_labels(np.array(labels), ["a", "bee", "c"], "flowers/val", every=every)
    assert refused.value.code == DATA
    assert "flowers/val" in refused.value.message
