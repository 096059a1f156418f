"""A page holds names of any kind as text: nothing of them becomes markup, a cell or a line of its own."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_vit.evaluate import report
from ssl_vit.evaluate.report import Page

NASTY = [
    *("a|b", "<script>alert(1)</script>", "two\nlines", "back\rspace", "a,b", 'say "x"', "it's", "Blüte 花 🌻", "\\|"),
    *("&lt;b&gt;", "&#60;i&#62;", "*bold* _it_ `code` ~~s~~", "[x](javascript:alert(1))", "![x](http://a/b.png)"),
    *(
        "<img src=x onerror=alert(1)>",
        "# title",
        "- item",
        "1. one",
        "    code",
        "$x^2$ \\frac{",
        "---",
        "| --- |",
        "x | y |",
    ),
    *("http://example.org", "<http://example.org>", "</td></table>", "]]>", "-->", "\x1b[31m", "\u202eright"),
    b"caf\xe9".decode(errors="surrogateescape"),
]
ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "code", "img", "strong"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td"}


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


def words(name: str) -> str:
    """A name as a page shows it: white space is one space, lone surrogates are written out."""
    return " ".join(name.encode(errors="backslashreplace").decode().split())


def made(folder: Path) -> tuple[str, Seen]:
    page = Page(NASTY[1])
    page.section(NASTY[2] + NASTY[14])
    page.table(["class", "images", "right"], [[name, i, 0.5] for i, name in enumerate(NASTY)])
    page.values({"x": NASTY[0], **{name: name for name in NASTY}, "none": None})
    page.text(f"Of {report.plain(NASTY[12])} and {report.plain(NASTY[15])}.")
    page.code(f"python tools/evaluate.py data.val='{NASTY[1]}'\n{NASTY[14]}")
    page.picture("confusion", NASTY[12], report.confused(np.eye(3, dtype=int), NASTY[:3]))
    page.write(folder)
    seen = Seen()
    seen.feed((folder / "report.html").read_text(encoding="utf-8"))
    return (folder / "report.md").read_text(encoding="utf-8"), seen


def test_names_become_no_markup_but_one_cell_each_that_reads_as_it_is(tmp_path: Path):
    _, seen = made(tmp_path)
    assert seen.open == []
    assert seen.tags <= ALLOWED
    assert {name for name, _ in seen.attributes} <= {"charset", "src", "alt", "style"}
    assert all((value or "").startswith("data:image/png;base64,") for name, value in seen.attributes if name == "src")
    table = [row for row in seen.rows if len(row) == 3]
    assert [row[0] for row in table[1:]] == [words(name) for name in NASTY]
    assert [row[1] for row in table[1:]] == [str(i) for i in range(len(NASTY))]
    values = [row for row in seen.rows if len(row) == 2]
    assert [row[1] for row in values[2:]] == [words(name) for name in NASTY]
    assert len(seen.rows) == len(table) + len(values)


def test_the_markdown_is_one_line_a_row_and_has_no_tags(tmp_path: Path):
    text, _ = made(tmp_path)
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
    report.confused(np.zeros((count, count), int), names).savefig("/dev/null", format="png")
    images = [(np.zeros((8, 8, 3), np.uint8), f"{name} 0.50\nis {name}", i % 2 == 0) for i, name in enumerate(names)]
    report.gallery(images).savefig("/dev/null", format="png")
    lines: Any = {name: ([1.0, 2.0], [0.5, float("nan")]) for name in names}
    report.curves(lines, "x", "y", log=True).savefig("/dev/null", format="png")


def test_numbers_are_shown_for_people():
    assert [report.shown(value) for value in (12345, 0.123456, True, None)] == ["12,345", "0.1235", "True", "&ndash;"]
    assert report.per_cent(0.12345) == "12.35"
    assert report.per_cent(0.5, 0.01) == "50.00 ± 1.00"
    assert report.per_cent(None) == "-"
