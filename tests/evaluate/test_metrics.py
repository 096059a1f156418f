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

from ssl_vit.errors import DATA, Refusal
from ssl_vit.evaluate import metrics
from ssl_vit.evaluate.metrics import Predictions
from ssl_vit.report import format, page
from ssl_vit.report.page import Page, confused

theirs: Any = _theirs  # its types say that nan is no number

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
    scored = theirs.precision_recall_fscore_support(labels, first, labels=every, zero_division=np.nan)
    precision, recall, _, support = scored
    for number, row in enumerate(rows):
        assert row["samples"] == support[number]
        assert row["predicted"] == (first == number).sum()
        assert row["right"] == ((first == number) & (labels == number)).sum()
        for name, want in (("accuracy", recall[number]), ("precision", precision[number])):
            assert row[name] is None if np.isnan(want) else row[name] == pytest.approx(want)


def test_ties_are_counted_once_and_images_without_a_label_not():
    """Of equal scores the order of the predictions decides: the tie was broken when the best five were chosen."""
    found = predicted(np.full((4, 8), 0.125), np.array([0, 1, 4, 5]))
    assert metrics.accuracy(found, 8) == {"top1": 0.25, "top5": 0.75, "mean_per_class": 0.25, "samples": 4}
    scores, labels = drawn(20, 6, 0)
    some = np.where(np.arange(20) % 4 == 0, -1, labels)
    kept = some >= 0
    assert metrics.accuracy(predicted(scores, some), 6) == metrics.accuracy(predicted(scores[kept], some[kept]), 6)
    assert metrics.confusion(some, scores.argmax(1), 6).sum() == kept.sum()
    none = metrics.accuracy(predicted(scores, np.full(20, -1)), 6)
    assert none["samples"] == none["top1"] == 0


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
    rows = {"Natural": [95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9], "Specialized": [83.3, 96.7, 91.4, 76.6]}
    rows |= {"Structured": [91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2]}
    got = metrics.groups([(name, value) for name, values in rows.items() for value in values])
    assert {k: round(v, 2) for k, v in got.items()} == {"Natural": 86.69, "Specialized": 87.0, "Structured": 65.03}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_of_any_names_are_read_back(suffix: str, tmp_path: Path):
    """Names with commas, quotes, line ends of both kinds, other scripts: a row stays a row, a name a name."""
    scores, labels = drawn(12, len(CELLS), 0)
    labels[3] = -1
    found, keys = predicted(scores, labels), [f"{CELLS[i % len(CELLS)]}/{i}" for i in range(12)]
    path = tmp_path / f"predictions.{suffix}"
    metrics.write_predictions(found, keys, CELLS, path)
    if suffix == "csv":
        with path.open(newline="", encoding="utf-8") as text:
            columns, *rows = list(csv.reader(text))
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        columns, rows = table.column_names, [[str(v) for v in row.values()] for row in table.to_pylist()]
    assert columns == ["sample", "key", "label"] + [f"{n}{i}" for i in range(1, 6) for n in ("top", "score")]
    truth = ["" if i < 0 else CELLS[i] for i in labels.tolist()]
    top = [[CELLS[i] for i in row] for row in found.top.tolist()]
    assert [row[:3] + row[3::2] for row in rows] == [[str(i), keys[i], truth[i], *top[i]] for i in range(12)]
    assert (np.diff(np.array([row[4::2] for row in rows], float), axis=1) <= 0).all()
    name = NASTY[-1]  # any bytes, which Python holds as lone surrogates; UTF-8 has none
    metrics.write_predictions(predicted(np.eye(2)[:1], np.array([0])), [f"{name}/1.jpg"], [name, "b"], path)
    assert b"caf" in path.read_bytes()


def test_labels_that_do_not_fit_are_refused():
    """Those outside the classes, and an empty class where every class is learned."""
    metrics.check_labels(np.array([0, 2, -1]), ["a", "bee", "c"], "val", every=False)
    for labels, every, said in (([0, 1, 5, 7], False, "2 "), ([0, 1, 2, -2], False, "1 "), ([0, 2, -1], True, "bee")):
        with pytest.raises(Refusal, match=said) as refused:
            metrics.check_labels(np.array(labels), ["a", "bee", "c"], "flowers/val", every=every)
        assert refused.value.code == DATA
        assert "flowers/val" in refused.value.message


# --- pages: nothing of a name becomes markup, a cell or a line of its own


class Seen(HTMLParser):
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


def shown(name: str) -> str:
    """A name as a page shows it: white space is one space, lone surrogates are written out."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())


def page_of(folder: Path) -> tuple[str, Seen]:
    page = Page(NASTY[1])
    page.section(NASTY[2] + NASTY[14])
    page.table(["class", "images", "right"], [[name, i, 0.5] for i, name in enumerate(NASTY)])
    page.values({"x": NASTY[0], **{name: name for name in NASTY}, "none": None})
    page.text(f"Of {format.plain(NASTY[12])} and {format.plain(NASTY[15])}.")
    page.code(f"python tools/evaluate.py data.val='{NASTY[1]}'\n{NASTY[14]}")
    page.picture("confusion", NASTY[12], confused(np.eye(3, dtype=int), NASTY[:3]))
    page.write(folder)
    seen = Seen()
    seen.feed((folder / "report.html").read_text(encoding="utf-8"))
    return (folder / "report.md").read_text(encoding="utf-8"), seen


def test_names_become_no_markup_but_one_cell_each_that_reads_as_it_is(tmp_path: Path):
    """And in Markdown one line a row, without tags."""
    text, seen = page_of(tmp_path)
    assert seen.open == []
    assert seen.tags <= ALLOWED
    assert {name for name, _ in seen.attributes} <= {"charset", "src", "alt", "style"}
    assert all((value or "").startswith("data:image/png;base64,") for name, value in seen.attributes if name == "src")
    table = [row for row in seen.rows if len(row) == 3]
    assert [row[0] for row in table[1:]] == [shown(name) for name in NASTY]
    assert [row[1] for row in table[1:]] == [str(i) for i in range(len(NASTY))]
    values = [row for row in seen.rows if len(row) == 2]
    assert [row[1] for row in values[2:]] == [shown(name) for name in NASTY]
    assert len(seen.rows) == len(table) + len(values)
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
    page.confused(np.zeros((count, count), int), names).savefig("/dev/null", format="png")
    images = [(np.zeros((8, 8, 3), np.uint8), f"{name} 0.50\nis {name}", i % 2 == 0) for i, name in enumerate(names)]
    page.gallery(images).savefig("/dev/null", format="png")
    lines: Any = {name: ([1.0, 2.0], [0.5, float("nan")]) for name in names}
    page.curves(lines, "x", "y", log=True).savefig("/dev/null", format="png")


def test_numbers_are_shown_for_people():
    assert [page.shown(value) for value in (12345, 0.123456, True, None)] == ["12,345", "0.1235", "True", "&ndash;"]
    assert format.per_cent(0.12345) == "12.35"
    assert format.per_cent(0.5, 0.01) == "50.00 ± 1.00"
    assert format.per_cent(None) == "-"
