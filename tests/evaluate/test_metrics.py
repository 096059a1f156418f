"""Metrics against scikit-learn, on predictions of any kind; the interval against a bootstrap loop; tables read back.

And the pages that show them, which hold names of any kind as text.
"""

import csv
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as _theirs

from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.report import format, page
from ssl_vit.report.page import Page, plot_confusion

sklearn_metrics: Any = _theirs  # its types say that nan is no number

NASTY = [
    *("a|b", "<script>alert(1)</script>", "two\nlines", "back\rspace", "a,b", 'say "x"', "it's", "Blüte 花 🌻", "\\|"),
    *("&lt;b&gt;", "&#60;i&#62;", "*bold* _it_ `code` ~~s~~", "[x](javascript:alert(1))", "![x](http://a/b.png)"),
    *("<img src=x onerror=alert(1)>", "# title", "- item", "1. one", "    code", "$x^2$ \\frac{", "---"),
    *("| --- |", "x | y |", "http://example.org", "<http://example.org>", "</td></table>", "]]>", "-->"),
    *("\x1b[31m", "\u202eright", b"caf\xe9".decode(errors="surrogateescape")),
]
CELLS = [*NASTY[:9], "=1+1", " x "]
ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "code", "img", "strong"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td"}


def make_predictions(scores: np.ndarray, labels: np.ndarray) -> Predictions:
    """What an evaluation keeps: the best five, the best first."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    best = np.take_along_axis(scores, top, 1).astype(np.float32)
    return Predictions(np.arange(len(labels)), labels, top, best)


def random_scores(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    scores = random.random((n, classes))
    scores[np.arange(n), labels] += random.random(n) * 0.5
    return scores, labels


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn's, of one image
@given(n=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 2**20))
def test_equal_scikit_learns(n: int, classes: int, seed: int):
    """Also where classes have no image, or no image was taken for one of them."""
    scores, labels = random_scores(n, classes, seed)
    predictions, class_ids = make_predictions(scores, labels), np.arange(classes)
    accuracies, predicted_labels = metrics.accuracy(predictions, classes), scores.argmax(1)
    assert accuracies["samples"] == n
    assert accuracies["top1"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted_labels))
    best_five = sklearn_metrics.top_k_accuracy_score(labels, scores, k=5, labels=class_ids) if classes > 5 else 1.0
    assert accuracies["top5"] == pytest.approx(best_five)
    present = np.unique(labels)
    recall = sklearn_metrics.recall_score(labels, predicted_labels, labels=present, average=None, zero_division=0)
    assert accuracies["mean_per_class"] == pytest.approx(recall.mean())
    if set(predicted_labels) <= set(present):  # else scikit-learn warns
        assert accuracies["mean_per_class"] == pytest.approx(
            sklearn_metrics.balanced_accuracy_score(labels, predicted_labels)
        )

    matrix = metrics.confusion_matrix(labels, predicted_labels, classes)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, sklearn_metrics.confusion_matrix(labels, predicted_labels, labels=class_ids))
    rows = metrics.per_class_metrics(matrix)
    scored = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted_labels, labels=class_ids, zero_division=np.nan
    )
    precision, recall, _, support = scored
    for number, row in enumerate(rows):
        assert row["samples"] == support[number]
        assert row["predicted"] == (predicted_labels == number).sum()
        assert row["right"] == ((predicted_labels == number) & (labels == number)).sum()
        for name, expected in (("accuracy", recall[number]), ("precision", precision[number])):
            assert row[name] is None if np.isnan(expected) else row[name] == pytest.approx(expected)


def test_ties_are_counted_once_and_images_without_a_label_not():
    """Of equal scores the order of the predictions decides: the tie was broken when the best five were chosen."""
    predictions = make_predictions(np.full((4, 8), 0.125), np.array([0, 1, 4, 5]))
    assert metrics.accuracy(predictions, 8) == {"top1": 0.25, "top5": 0.75, "mean_per_class": 0.25, "samples": 4}
    scores, labels = random_scores(20, 6, 0)
    partial_labels = np.where(np.arange(20) % 4 == 0, -1, labels)
    is_labeled = partial_labels >= 0
    assert metrics.accuracy(make_predictions(scores, partial_labels), 6) == metrics.accuracy(
        make_predictions(scores[is_labeled], partial_labels[is_labeled]), 6
    )
    assert metrics.confusion_matrix(partial_labels, scores.argmax(1), 6).sum() == is_labeled.sum()
    unlabeled = metrics.accuracy(make_predictions(scores, np.full(20, -1)), 6)
    assert unlabeled["samples"] == unlabeled["top1"] == 0


def test_hits_are_of_one_label_or_of_a_set():
    top = np.array([[3, 1], [0, 2], [2, 4], [4, 0]])
    assert metrics.is_correct(top, np.array([1, 0, 0, 3])).tolist() == [True, True, False, False]
    assert metrics.is_correct(top[:, :1], np.array([1, 0, 0, 3])).tolist() == [False, True, False, False]
    for accepted in ([{1, 9}, {5}, {4, 2}, set()], [[1, 9], [5], [4, 2], []]):
        correct = metrics.is_correct(top, accepted)
        assert correct.dtype == bool
        assert correct.tolist() == [True, False, True, False]


@pytest.mark.parametrize("share", [0.0, 0.07, 0.5, 1.0])
def test_the_interval_is_the_bootstraps(share: float):
    correct = np.arange(400) < share * 400
    random = np.random.default_rng(1)
    means = [random.choice(correct, 400).mean() for _ in range(4000)]
    low, high = metrics.bootstrap_interval(correct, seed=0, resamples=4000)
    expected = np.quantile(means, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.008)
    assert low <= share <= high
    narrow = metrics.bootstrap_interval(correct, resamples=4000, level=0.5)
    assert low <= narrow[0] <= narrow[1] <= high
    if 0 < share < 1:
        assert high - low > narrow[1] - narrow[0] > 0


def test_the_interval_covers_the_truth_as_often_as_it_says_and_repeats():
    random = np.random.default_rng(0)
    intervals = [metrics.bootstrap_interval(random.random(300) < 0.3, seed=i) for i in range(300)]
    assert np.mean([low <= 0.3 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.04)
    correct = random.random(50) < 0.5
    assert (
        metrics.bootstrap_interval(correct, seed=1)
        == metrics.bootstrap_interval(correct, seed=1)
        != metrics.bootstrap_interval(correct, seed=2)
    )


def test_mean_and_deviation_and_the_groups_of_vtab():
    """C5.3c with the rows of the paper's Table 9 for H/14."""
    assert metrics.mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert metrics.mean_std([0.5]) == (0.5, None)
    rows = {"Natural": [95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9], "Specialized": [83.3, 96.7, 91.4, 76.6]}
    rows |= {"Structured": [91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2]}
    means = metrics.group_means([(name, value) for name, values in rows.items() for value in values])
    assert {k: round(v, 2) for k, v in means.items()} == {"Natural": 86.69, "Specialized": 87.0, "Structured": 65.03}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_of_any_names_are_read_back(suffix: str, tmp_path: Path):
    """Names with commas, quotes, line ends of both kinds, other scripts: a row stays a row, a name a name."""
    scores, labels = random_scores(12, len(CELLS), 0)
    labels[3] = -1
    predictions, keys = make_predictions(scores, labels), [f"{CELLS[i % len(CELLS)]}/{i}" for i in range(12)]
    path = tmp_path / f"predictions.{suffix}"
    metrics.write_predictions(predictions, keys, CELLS, path)
    if suffix == "csv":
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = list(csv.reader(file))
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        columns, rows = table.column_names, [[str(v) for v in row.values()] for row in table.to_pylist()]
    assert columns == ["sample", "key", "label"] + [f"{n}{i}" for i in range(1, 6) for n in ("top", "score")]
    truth = ["" if i < 0 else CELLS[i] for i in labels.tolist()]
    top = [[CELLS[i] for i in row] for row in predictions.top.tolist()]
    assert [row[:3] + row[3::2] for row in rows] == [[str(i), keys[i], truth[i], *top[i]] for i in range(12)]
    assert (np.diff(np.array([row[4::2] for row in rows], float), axis=1) <= 0).all()
    name = NASTY[-1]  # any bytes, which Python holds as lone surrogates; UTF-8 has none
    metrics.write_predictions(make_predictions(np.eye(2)[:1], np.array([0])), [f"{name}/1.jpg"], [name, "b"], path)
    assert b"caf" in path.read_bytes()


def test_labels_that_do_not_fit_are_refused():
    """Those outside the classes, and an empty class where every class is learned."""
    metrics.check_labels(np.array([0, 2, -1]), ["a", "bee", "c"], "val", require_all=False)
    for labels, require_all, message in (
        ([0, 1, 5, 7], False, "2 "),
        ([0, 1, 2, -2], False, "1 "),
        ([0, 2, -1], True, "bee"),
    ):
        with pytest.raises(ExitError, match=message) as error:
            metrics.check_labels(np.array(labels), ["a", "bee", "c"], "flowers/val", require_all=require_all)
        assert error.value.code == ExitCode.DATA
        assert "flowers/val" in error.value.message


# --- pages: nothing of a name becomes markup, a cell or a line of its own


class PageParser(HTMLParser):
    """The tags of a page, whether they are closed in order, and the text of each table's cells."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def display_name(name: str) -> str:
    """A name as a page shows it: white space is one space, lone surrogates are written out."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())


def write_page(folder: Path) -> tuple[str, PageParser]:
    report = Page(NASTY[1])
    report.section(NASTY[2] + NASTY[14])
    report.table(["class", "images", "right"], [[name, i, 0.5] for i, name in enumerate(NASTY)])
    report.values({"x": NASTY[0], **{name: name for name in NASTY}, "none": None})
    report.text(f"Of {format.escape(NASTY[12])} and {format.escape(NASTY[15])}.")
    report.code(f"python tools/evaluate.py data.val='{NASTY[1]}'\n{NASTY[14]}")
    report.picture("confusion", NASTY[12], plot_confusion(np.eye(3, dtype=int), NASTY[:3]))
    report.write(folder)
    parser = PageParser()
    parser.feed((folder / "report.html").read_text(encoding="utf-8"))
    return (folder / "report.md").read_text(encoding="utf-8"), parser


def test_names_become_no_markup_but_one_cell_each_that_reads_as_it_is(tmp_path: Path):
    """And in Markdown one line a row, without tags."""
    text, parser = write_page(tmp_path)
    assert parser.open == []
    assert parser.tags <= ALLOWED
    assert {name for name, _ in parser.attributes} <= {"charset", "src", "alt", "style"}
    assert all((value or "").startswith("data:image/png;base64,") for name, value in parser.attributes if name == "src")
    table = [row for row in parser.rows if len(row) == 3]
    assert [row[0] for row in table[1:]] == [display_name(name) for name in NASTY]
    assert [row[1] for row in table[1:]] == [str(i) for i in range(len(NASTY))]
    values = [row for row in parser.rows if len(row) == 2]
    assert [row[1] for row in values[2:]] == [display_name(name) for name in NASTY]
    assert len(parser.rows) == len(table) + len(values)
    outside = [line for line in text.splitlines() if not line.startswith("    ")]
    rows = [line for line in outside if line.startswith("|")]
    assert len(rows) == (2 + len(NASTY)) + (2 + 1 + len(NASTY))
    assert {line.count("|") for line in rows} == {4, 3}
    assert not re.search(r"<\w", "\n".join(outside))
    assert html.unescape(rows[2]).startswith("| a|b |")
    assert (tmp_path / "report" / "confusion.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count", [1, 15, 40])
def test_pictures_take_any_name(count: int):
    """Warnings are errors here: a sign that the font has not, or a formula that is none, would be one."""
    names = (NASTY * 2)[:count]
    page.plot_confusion(np.zeros((count, count), int), names).savefig("/dev/null", format="png")
    images = [(np.zeros((8, 8, 3), np.uint8), f"{name} 0.50\nis {name}", i % 2 == 0) for i, name in enumerate(names)]
    page.plot_gallery(images).savefig("/dev/null", format="png")
    lines: Any = {name: ([1.0, 2.0], [0.5, float("nan")]) for name in names}
    page.plot_curves(lines, "x", "y", log=True).savefig("/dev/null", format="png")


def test_numbers_are_shown_for_people():
    assert [page.format_cell(value) for value in (12345, 0.123456, True, None)] == [
        "12,345",
        "0.1235",
        "True",
        "&ndash;",
    ]
    assert format.format_percent(0.12345) == "12.35"
    assert format.format_percent(0.5, 0.01) == "50.00 ± 1.00"
    assert format.format_percent(None) == "-"
