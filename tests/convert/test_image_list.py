"""What is to be converted: tables of paths and labels, maps of classes, and links in folders."""

import contextlib
import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ssl_vit import errors
from ssl_vit.convert.image_list import numbers, read_map
from ssl_vit.data.manifest import Manifest
from tests.data import servers
from tests.data.pictures import CLASSES, NAMES, contents, make, members, one, rejected, samples, write_pictures

pytestmark = pytest.mark.usefixtures("in_process")

LABELS = {name: name.rpartition("/")[0] for name in NAMES}


def refused(source: Path, output: Path, code: int, *says: str, **options: Any) -> None:
    """The conversion is refused with this code, in one line that says all this."""
    line = servers.refused(lambda: make(source, output, **options), code)
    assert not [text for text in says if text not in line], line


def write_csv(folder: Path, *rows: tuple[str, ...], name: str = "list.csv", **options: Any) -> Path:
    with (folder / name).open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return folder / name


def write_parquet(folder: Path, /, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    return folder / "list.parquet"


def labels(made: Manifest) -> dict[str, str | None]:
    """Source path -> name of the class that the shards say."""
    return {path: made.classes[label] if label >= 0 else None for path, (_, _, label) in samples(made).items()}


HEAD, PLAIN = ("path", "label"), list(LABELS.items())
TABLES: dict[str, Callable[[Path], Path]] = {
    "header": lambda folder: write_csv(folder, HEAD, *PLAIN),
    "no header": lambda folder: write_csv(folder, *PLAIN),
    "byte order mark": lambda folder: write_csv(folder, HEAD, *PLAIN, encoding="utf-8-sig"),
    "mark, no header": lambda folder: write_csv(folder, *PLAIN, encoding="utf-8-sig"),
    "all quoted": lambda folder: write_csv(folder, HEAD, *PLAIN, quoting=csv.QUOTE_ALL),
    "Unix lines, blank ones": lambda folder: write_csv(folder, HEAD, (), *PLAIN, (), lineterminator="\n"),
    "other columns": lambda folder: write_csv(
        folder, (" Label", "id", "PATH "), *((c, "7", f" {n} ") for n, c in PLAIN), name="LIST.CSV"
    ),
    "parquet": lambda folder: write_parquet(folder, path=NAMES, score=[0.5] * len(NAMES), label=list(LABELS.values())),
    "parquet, categories": lambda folder: write_parquet(
        folder, path=NAMES, label=pyarrow.array(list(LABELS.values())).dictionary_encode()
    ),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_is_what_the_same_folder_is(source: Path, tmp_path: Path, table: Callable[[Path], Path]):
    """The same samples, classes and labels, though not the same order: a table is in its own."""
    made, plain = one(table(source), tmp_path / "out"), one(source, tmp_path / "plain")
    assert made.classes == plain.classes == CLASSES
    assert {p: s[1:] for p, s in samples(made).items()} == {p: s[1:] for p, s in samples(plain).items()}
    assert labels(made) == LABELS


def test_commas_quotes_and_other_signs_are_read_as_csv_says(tmp_path: Path):
    names = {'a, "b".jpg': 'ca"t, tame', "ünï/夏.png": "夏", "a\nb.jpg": "two lines"}
    source = write_pictures(tmp_path / "in", names)
    made = one(write_csv(source, HEAD, *names.items()), tmp_path / "out")
    assert labels(made) == names
    assert made.classes == sorted(names.values())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_empty_label_is_no_class(source: Path, tmp_path: Path, kind: str):
    said = dict.fromkeys(NAMES, "x") | {NAMES[0]: None, NAMES[5]: None}
    table = write_csv(source, HEAD, *((name, label or "") for name, label in said.items()))
    if kind == "parquet":
        table = write_parquet(source, path=NAMES, label=list(said.values()))
    made = one(table, tmp_path / "out")
    assert (made.classes, labels(made)) == (["x"], said)
    assert sum(name.endswith(".cls") for name in members(made.tar(0))) == len(NAMES) - 2
    for number, head in enumerate(([], [("path",)])):  # of paths alone
        made = one(write_csv(source, *head, *((n,) for n in NAMES)), tmp_path / f"out{number}")
        assert (made.classes, set(made.labels.tolist()), made.samples) == ([], {-1}, len(NAMES))


def test_a_split_column_makes_splits(source: Path, tmp_path: Path):
    """A path that begins like a split is a path here; the classes are those of all splits."""
    write_pictures(source, ["train/x.jpg"])
    split_of = {name: ("train", "val", "test")[i % 3] for i, name in enumerate([*NAMES, "train/x.jpg"])}
    rows = [(name, LABELS.get(name, "x"), split) for name, split in split_of.items()]
    columns = dict(zip((*HEAD, "split"), zip(*rows, strict=True), strict=True))
    for out, table in (("a", write_csv(source, tuple(columns), *rows)), ("b", write_parquet(source, **columns))):
        made = make(table, tmp_path / out)
        assert {name: s for s, m in made.items() for name in samples(m)} == split_of
        assert {tuple(m.classes) for m in made.values()} == {(*CLASSES, "x")}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def splits(*values: str) -> list[tuple[str, ...]]:
    """Rows of a table with a split column, which holds these in turn."""
    return [("path", "label", "split"), *((name, "x", values[i % len(values)]) for i, name in enumerate(NAMES))]


@pytest.mark.parametrize(
    ("table", "says", "options"),
    [
        (splits("train", "dev"), ["split", "'dev'", "train", "val"], {}),
        (splits("train", ""), ["split", "''"], {}),
        (splits("train", "val"), ["split", "val_fraction"], {"val_fraction": 0.5}),
        ([HEAD, *PLAIN, (NAMES[3], "other")], [NAMES[3], f"row {len(NAMES) + 1}"], {}),  # twice
        (b"path,label\n", ["lists no images"], {}),
        (b"path,label\na.jpg,x\n,y\n", ["row 2"], {}),
        (b"path,label\ncaf\xe9.jpg,x\n", ["UTF-8"], {}),
        (b"path,label\n" + b'"' + b"a" * 200_000, ["CSV"], {}),
        (None, [], {}),  # it is not there
    ],
)
def test_a_csv_file_of_no_sense_is_refused(source: Path, tmp_path: Path, table: Any, says: list[str], options: dict):
    if isinstance(table, bytes):
        (source / "list.csv").write_bytes(table)
    elif table is not None:
        write_csv(source, *table)
    refused(source / "list.csv", tmp_path / "out", errors.DATA, "list.csv", *says, **options)
    assert not (tmp_path / "out").exists()


def test_a_split_column_without_a_header_is_not_lost_in_silence(source: Path, tmp_path: Path):
    with contextlib.suppress(errors.Refusal):
        assert set(make(write_csv(source, *splits("train", "val")[1:]), tmp_path / "out")) == {"train", "val"}


def test_val_fraction_splits_a_table_as_it_splits_the_folder(tmp_path: Path):
    names = [f"c{i % 3}/{i}.png" for i in range(40)]
    source = write_pictures(tmp_path / "in", names, height=2, width=2)
    folder = make(source, tmp_path / "a", val_fraction=0.3)
    table = write_csv(source, *reversed([(name, name.split("/")[0]) for name in names]))
    listed = make(table, tmp_path / "b", val_fraction=0.3)
    assert {s: set(samples(m)) for s, m in listed.items()} == {s: set(samples(m)) for s, m in folder.items()}


def test_a_missing_file_is_rejected_by_name_and_the_rest_converted(source: Path, tmp_path: Path):
    odd = ["gone.jpg", "animals", "no\0name.jpg", "x" * 5000 + ".jpg", "images"]
    table = write_csv(source, HEAD, *PLAIN, *((name, "plants") for name in odd))
    made = one(table, tmp_path / "out")
    assert set(samples(made)) == set(NAMES)
    assert set(rejected(tmp_path / "out")) == set(odd)
    assert all(rejected(tmp_path / "out").values())


def test_paths_are_relative_to_the_table_or_absolute(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path / "far", ["x.jpg", "y.png"])
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    said = {str(tmp_path / "far" / "x.jpg"): "far", "../images/" + NAMES[0]: "near", "../far/y.png": "far"}
    made = one(Path("lists") / write_csv(tmp_path / "lists", *said.items()).name, tmp_path / "out")
    assert labels(made) == said
    images = {path: (tmp_path / "lists" / path).read_bytes() for path in said}
    assert {path: image for path, (_, image, _) in samples(made).items()} == images


def test_a_parquet_file_that_cannot_be_read_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (source / "list.parquet").write_bytes(b"PAR1 and no more")
    refused(source / "list.parquet", tmp_path / "out", errors.DATA, "not a Parquet file")
    other = write_parquet(source, file=NAMES, label=["x"] * len(NAMES))
    refused(other, tmp_path / "out", errors.DATA, "row 1 has no path", "columns are path, label and split")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    refused(other, tmp_path / "out", errors.USAGE, "pyarrow is not installed", "pip install")


def test_a_table_that_changed_is_another_job(source: Path, tmp_path: Path):
    """A second run over the same table is none, also where its rows stand in another order of columns."""
    first = one(write_csv(source, HEAD, *PLAIN), tmp_path / "out")
    table = write_csv(source, ("label", "path"), *((label, name) for name, label in PLAIN))
    assert one(table, tmp_path / "out") == first
    kept = contents(tmp_path / "out")
    for rows in (PLAIN[:-1], [*PLAIN[:-1], (PLAIN[-1][0], CLASSES[0])], PLAIN[::-1]):
        write_csv(source, HEAD, *rows)
        refused(source / "list.csv", tmp_path / "out", errors.CANNOT_CREATE, "input", "name another output")
    assert contents(tmp_path / "out") == kept


def test_labels_that_are_numbers_are_in_the_order_of_their_values(source: Path, tmp_path: Path):
    """Of a CSV file, of a Parquet file's numbers, and of folders; mixed with names they are names.

    A column of whole numbers with a missing one is float64 in pandas, and so in the Parquet file it writes.
    """
    said = {name: (2, 10, 9, 100)[i % 4] for i, name in enumerate(NAMES)}
    text = {name: str(label) for name, label in said.items()}
    folders = {f"{label}/{i}.jpg": label for i, label in enumerate(text.values())}
    tables = {write_csv(source, HEAD, *text.items()): text, write_pictures(tmp_path / "folders", folders): folders}
    tables[write_parquet(source, path=list(said), label=list(said.values()))] = text
    for table, wanted in tables.items():
        made = one(table, tmp_path / f"out-{table.name}")
        assert (made.classes, labels(made)) == (["2", "9", "10", "100"], wanted)
    floats = write_parquet(source, path=NAMES[:4], label=pyarrow.array([2.0, 10.0, 9.0, None], pyarrow.float64()))
    assert one(floats, tmp_path / "floats").classes == ["2", "9", "10"]
    assert numbers(["10", "9", "x", ""], None) == (["10", "9", "x"], {"10": 0, "9": 1, "x": 2})
    assert numbers(["01", "1", "0"], None)[0] == ["0", "01", "1"]


def write(path: Path, content: Any, encoding: str = "utf-8") -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return str(path)


MAPS: dict[str, tuple[str, Any, list[str]]] = {
    "text": ("map.txt", "plants\nanimals/dog\nanimals/cat\nstones\n", [*CLASSES[::-1], "stones"]),
    "text, Windows": ("map.txt", "plants\r\nanimals/dog\r\nanimals/cat", CLASSES[::-1]),
    "JSON list": ("map.json", [*CLASSES[::-1], "stones"], [*CLASSES[::-1], "stones"]),
    "JSON object": ("map.json", {"animals/cat": 1, "plants": 0, "animals/dog": 2}, [CLASSES[2], *CLASSES[:2]]),
    "together": ("map.json", {"animals/cat": 1, "animals/dog": 1, "plants": 0}, ["plants", "animals/cat"]),
    "shards": ("map", None, ["a first one", *CLASSES]),
}


@pytest.mark.parametrize(("name", "content", "classes"), MAPS.values(), ids=MAPS)
def test_a_class_map_gives_the_numbers(source: Path, tmp_path: Path, name: str, content: Any, classes: list[str]):
    """Also to classes that no image has, so that numbers stay what they are elsewhere; or one to two of them."""
    if name == "map":  # shards, whose manifest has these classes
        one(write_pictures(tmp_path / "in", [f"{name}/0.png" for name in classes]), tmp_path / name)
    else:
        write(tmp_path / name, content)
    for number, images in enumerate((source, write_csv(source, *PLAIN))):
        made = one(images, tmp_path / f"out{number}", class_map=str(tmp_path / name))
        assert made.classes == classes
        assert labels(made) == {path: name if name in classes else "animals/cat" for path, name in LABELS.items()}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("map.txt", "plants\nanimals/cat\n", "1 of the classes (first: animals/dog)"),
        ("map.txt", "plants\nplants\nanimals/cat\nanimals/dog\n", "give class names"),
        ("map.json", {"plants": 0, "animals/cat": 1, "animals/dog": 3}, "without gaps"),
        ("map.json", {"plants": "0", "animals/cat": 1, "animals/dog": 2}, "without gaps"),
        ("map.json", {"plants": True, "animals/cat": 0, "animals/dog": 2}, "without gaps"),
        ("map.json", "3", "give class names"),
        ("map.json", "{", "cannot be read"),
        ("map.csv", "\xff", "class"),
        (None, None, "cannot be read"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(source: Path, tmp_path: Path, name: Any, content: Any, says: str):
    file = write(tmp_path / name, content) if name else str(tmp_path / "gone.txt")
    refused(source, tmp_path / "out", errors.DATA, f"class_map={file}", says, class_map=file)


def test_blank_lines_and_a_byte_order_mark_in_a_class_map_are_no_class(tmp_path: Path):
    """And not the class of images that have none, as those in no folder."""
    for name, content in (("map.json", '["cat", "dog"]'), ("map.txt", "cat\ndog\n\n")):
        file = write(tmp_path / name, content, "utf-8-sig")
        assert read_map(file) == {"cat": 0, "dog": 1}
    made = one(write_pictures(tmp_path / "in", ["0.png", "cat/1.png"]), tmp_path / "out", class_map=file)
    assert (made.classes, labels(made)) == (["cat", "dog"], {"0.png": None, "cat/1.png": "cat"})


def test_another_class_map_is_another_job(source: Path, tmp_path: Path):
    """Also where it only adds a class at the end: what is made would differ."""
    more = write(tmp_path / "more.txt", "\n".join([*CLASSES, "stones"]))
    one(source, tmp_path / "out")
    refused(source, tmp_path / "out", errors.CANNOT_CREATE, "another job", class_map=more)


def link(source: Path, links: dict[str, Path | str]) -> Path:
    for name, target in links.items():
        os.symlink(target, source / name)
    return source


INSIDE = {"plants/to a file.jpg", "plants/relative.jpg"}
OUTSIDE = {"plants/out.png", "folder out/1.png", "folder out/far/0.png"}
TWICE = {name.replace("animals/dog", "folder in") for name in NAMES if "dog" in name}
DEAD = {"plants/dead.jpg", "plants/to itself.jpg"}


def test_links_out_of_the_input_and_to_folders_are_followed_on_demand(source: Path, tmp_path: Path, capsys: Any):
    """A link to a file within the input is that file once more; the others are told, and loops are not followed."""
    far = write_pictures(tmp_path / "out of it", ["far/0.png", "1.png"])
    files = {"to a file.jpg": source / NAMES[0], "relative.jpg": "../animals/cat/0.jpg", "out.png": far / "1.png"}
    link(source / "plants", files | {"dead.jpg": "nowhere", "to itself.jpg": "to itself.jpg"})
    link(source, {"folder out": far, "folder in": source / "animals/dog", "animals/up": "..", "animals/top": source})
    for follow, wanted, left_out in ((False, {*INSIDE}, "5 were"), (True, {*INSIDE, *OUTSIDE, *TWICE}, "2 were")):
        made = one(source, tmp_path / f"made{follow}", follow_links=follow)
        assert set(samples(made)) == {*NAMES, *wanted}
        assert set(rejected(made.folder)) == DEAD
        said = capsys.readouterr().out
        assert f"{left_out} left out" in said
        assert "animals/top" in said or not follow
        assert samples(made)["plants/relative.jpg"][1] == (source / NAMES[0]).read_bytes()
        assert labels(made)["plants/relative.jpg"] == "plants"
    refused(source, tmp_path / "madeTrue", errors.CANNOT_CREATE, "input")  # what is followed is the job


def test_loops_by_way_of_other_folders_are_walked_once(tmp_path: Path):
    """With two links in each of two folders, the walk would take 2^40 steps."""
    source = write_pictures(tmp_path / "in", ["a/0.png", "b/1.png"])
    other = write_pictures(tmp_path / "other", ["2.png"])
    link(source, {"a/to b": "../b", "b/to a": "../a", "there": other})
    link(other, {"back": source})
    made = one(source, tmp_path / "out", follow_links=True)
    assert set(samples(made)) == {"a/0.png", "b/1.png", "a/to b/1.png", "b/to a/0.png", "there/2.png"}


def test_the_input_itself_may_be_a_link_and_one_of_links_alone_is_refused_with_the_cure(source: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    link(tmp_path, {"link": source, "in/x": source / "animals"})
    refused(tmp_path / "in", tmp_path / "out", errors.DATA, "no images", "follow_links=true")
    made = one(tmp_path / "in", tmp_path / "out", follow_links=True)
    assert labels(made) == {f"x{name[7:]}": f"x{name[7:11]}" for name in NAMES if name.startswith("animals")}
    made = one(tmp_path / "link", tmp_path / "whole")
    assert set(samples(made)) == set(NAMES)
    assert one(tmp_path / "link", tmp_path / "whole") == made


def test_two_names_of_one_file_are_two_images_with_their_bytes(source: Path, tmp_path: Path):
    """Hard links: `tar` would store the second as a link, which webdataset passes over without a word."""
    os.link(source / NAMES[0], source / "plants" / "again.jpg")
    write_pictures(source, ["plants/other.jpg"], height=30)
    made = one(source, tmp_path / "out")
    assert samples(made)["plants/again.jpg"][1] == (source / NAMES[0]).read_bytes()
    assert made.job["duplicates"] == 1
