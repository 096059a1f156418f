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
from ssl_vit.convert.image_list import number_classes, read_class_map
from ssl_vit.data.manifest import Manifest
from tests.data import servers
from tests.data.pictures import (
    CLASSES,
    NAMES,
    build_shards,
    build_splits,
    contents,
    read_rejects,
    read_samples,
    tar_members,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("in_process")

LABELS = {name: name.rpartition("/")[0] for name in NAMES}


def assert_refused(source: Path, output: Path, code: int, *says: str, **options: Any) -> None:
    """The conversion is refused with this code, in one line that says all this."""
    line = servers.assert_refused(lambda: build_splits(source, output, **options), code)
    assert not [text for text in says if text not in line], line


def write_csv(folder: Path, *rows: tuple[str, ...], name: str = "list.csv", **options: Any) -> Path:
    with (folder / name).open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return folder / name


def write_parquet(folder: Path, /, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    return folder / "list.parquet"


def read_labels(manifest: Manifest) -> dict[str, str | None]:
    """Source path -> name of the class that the shards say."""
    return {
        path: manifest.classes[label] if label >= 0 else None for path, (_, _, label) in read_samples(manifest).items()
    }


HEADER, ROWS = ("path", "label"), list(LABELS.items())
TABLES: dict[str, Callable[[Path], Path]] = {
    "header": lambda folder: write_csv(folder, HEADER, *ROWS),
    "no header": lambda folder: write_csv(folder, *ROWS),
    "byte order mark": lambda folder: write_csv(folder, HEADER, *ROWS, encoding="utf-8-sig"),
    "mark, no header": lambda folder: write_csv(folder, *ROWS, encoding="utf-8-sig"),
    "all quoted": lambda folder: write_csv(folder, HEADER, *ROWS, quoting=csv.QUOTE_ALL),
    "Unix lines, blank ones": lambda folder: write_csv(folder, HEADER, (), *ROWS, (), lineterminator="\n"),
    "other columns": lambda folder: write_csv(
        folder, (" Label", "id", "PATH "), *((c, "7", f" {n} ") for n, c in ROWS), name="LIST.CSV"
    ),
    "parquet": lambda folder: write_parquet(folder, path=NAMES, score=[0.5] * len(NAMES), label=list(LABELS.values())),
    "parquet, categories": lambda folder: write_parquet(
        folder, path=NAMES, label=pyarrow.array(list(LABELS.values())).dictionary_encode()
    ),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_is_what_the_same_folder_is(source: Path, tmp_path: Path, table: Callable[[Path], Path]):
    """The same samples, classes and labels, though not the same order: a table is in its own."""
    manifest, expected = build_shards(table(source), tmp_path / "out"), build_shards(source, tmp_path / "plain")
    assert manifest.classes == expected.classes == CLASSES
    assert {p: s[1:] for p, s in read_samples(manifest).items()} == {
        p: s[1:] for p, s in read_samples(expected).items()
    }
    assert read_labels(manifest) == LABELS


def test_commas_quotes_and_other_signs_are_read_as_csv_says(tmp_path: Path):
    names = {'a, "b".jpg': 'ca"t, tame', "ünï/夏.png": "夏", "a\nb.jpg": "two lines"}
    source = write_pictures(tmp_path / "in", names)
    manifest = build_shards(write_csv(source, HEADER, *names.items()), tmp_path / "out")
    assert read_labels(manifest) == names
    assert manifest.classes == sorted(names.values())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_empty_label_is_no_class(source: Path, tmp_path: Path, kind: str):
    expected = dict.fromkeys(NAMES, "x") | {NAMES[0]: None, NAMES[5]: None}
    table = write_csv(source, HEADER, *((name, label or "") for name, label in expected.items()))
    if kind == "parquet":
        table = write_parquet(source, path=NAMES, label=list(expected.values()))
    manifest = build_shards(table, tmp_path / "out")
    assert (manifest.classes, read_labels(manifest)) == (["x"], expected)
    assert sum(name.endswith(".cls") for name in tar_members(manifest.tar(0))) == len(NAMES) - 2
    for number, header in enumerate(([], [("path",)])):  # of paths alone
        manifest = build_shards(write_csv(source, *header, *((n,) for n in NAMES)), tmp_path / f"out{number}")
        assert (manifest.classes, set(manifest.labels.tolist()), manifest.samples) == ([], {-1}, len(NAMES))


def test_a_split_column_makes_splits(source: Path, tmp_path: Path):
    """A path that begins like a split is a path here; the classes are those of all splits."""
    write_pictures(source, ["train/x.jpg"])
    split_of = {name: ("train", "val", "test")[i % 3] for i, name in enumerate([*NAMES, "train/x.jpg"])}
    rows = [(name, LABELS.get(name, "x"), split) for name, split in split_of.items()]
    columns = dict(zip((*HEADER, "split"), zip(*rows, strict=True), strict=True))
    for out, table in (("a", write_csv(source, tuple(columns), *rows)), ("b", write_parquet(source, **columns))):
        manifests = build_splits(table, tmp_path / out)
        assert {name: s for s, m in manifests.items() for name in read_samples(m)} == split_of
        assert {tuple(m.classes) for m in manifests.values()} == {(*CLASSES, "x")}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def split_rows(*values: str) -> list[tuple[str, ...]]:
    """Rows of a table with a split column, which holds these in turn."""
    return [("path", "label", "split"), *((name, "x", values[i % len(values)]) for i, name in enumerate(NAMES))]


@pytest.mark.parametrize(
    ("table", "says", "options"),
    [
        (split_rows("train", "dev"), ["split", "'dev'", "train", "val"], {}),
        (split_rows("train", ""), ["split", "''"], {}),
        (split_rows("train", "val"), ["split", "val_fraction"], {"val_fraction": 0.5}),
        ([HEADER, *ROWS, (NAMES[3], "other")], [NAMES[3], f"row {len(NAMES) + 1}"], {}),  # twice
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
    assert_refused(source / "list.csv", tmp_path / "out", errors.ExitCode.DATA, "list.csv", *says, **options)
    assert not (tmp_path / "out").exists()


def test_a_split_column_without_a_header_is_not_lost_in_silence(source: Path, tmp_path: Path):
    with contextlib.suppress(errors.ExitError):
        assert set(build_splits(write_csv(source, *split_rows("train", "val")[1:]), tmp_path / "out")) == {
            "train",
            "val",
        }


def test_val_fraction_splits_a_table_as_it_splits_the_folder(tmp_path: Path):
    names = [f"c{i % 3}/{i}.png" for i in range(40)]
    source = write_pictures(tmp_path / "in", names, height=2, width=2)
    folder_manifests = build_splits(source, tmp_path / "a", val_fraction=0.3)
    table = write_csv(source, *reversed([(name, name.split("/")[0]) for name in names]))
    table_manifests = build_splits(table, tmp_path / "b", val_fraction=0.3)
    assert {s: set(read_samples(m)) for s, m in table_manifests.items()} == {
        s: set(read_samples(m)) for s, m in folder_manifests.items()
    }


def test_a_missing_file_is_rejected_by_name_and_the_rest_converted(source: Path, tmp_path: Path):
    missing = ["gone.jpg", "animals", "no\0name.jpg", "x" * 5000 + ".jpg", "images"]
    table = write_csv(source, HEADER, *ROWS, *((name, "plants") for name in missing))
    manifest = build_shards(table, tmp_path / "out")
    assert set(read_samples(manifest)) == set(NAMES)
    assert set(read_rejects(tmp_path / "out")) == set(missing)
    assert all(read_rejects(tmp_path / "out").values())


def test_paths_are_relative_to_the_table_or_absolute(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pictures(tmp_path / "far", ["x.jpg", "y.png"])
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    expected = {str(tmp_path / "far" / "x.jpg"): "far", "../images/" + NAMES[0]: "near", "../far/y.png": "far"}
    manifest = build_shards(Path("lists") / write_csv(tmp_path / "lists", *expected.items()).name, tmp_path / "out")
    assert read_labels(manifest) == expected
    images = {path: (tmp_path / "lists" / path).read_bytes() for path in expected}
    assert {path: image for path, (_, image, _) in read_samples(manifest).items()} == images


def test_a_parquet_file_that_cannot_be_read_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (source / "list.parquet").write_bytes(b"PAR1 and no more")
    assert_refused(source / "list.parquet", tmp_path / "out", errors.ExitCode.DATA, "not a Parquet file")
    other = write_parquet(source, file=NAMES, label=["x"] * len(NAMES))
    assert_refused(
        other, tmp_path / "out", errors.ExitCode.DATA, "row 1 has no path", "columns are path, label and split"
    )
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert_refused(other, tmp_path / "out", errors.ExitCode.USAGE, "pyarrow is not installed", "pip install")


def test_a_table_that_changed_is_another_job(source: Path, tmp_path: Path):
    """A second run over the same table is none, also where its rows stand in another order of columns."""
    first = build_shards(write_csv(source, HEADER, *ROWS), tmp_path / "out")
    table = write_csv(source, ("label", "path"), *((label, name) for name, label in ROWS))
    assert build_shards(table, tmp_path / "out") == first
    files = contents(tmp_path / "out")
    for rows in (ROWS[:-1], [*ROWS[:-1], (ROWS[-1][0], CLASSES[0])], ROWS[::-1]):
        write_csv(source, HEADER, *rows)
        assert_refused(
            source / "list.csv", tmp_path / "out", errors.ExitCode.CANNOT_CREATE, "input", "name another output"
        )
    assert contents(tmp_path / "out") == files


def test_labels_that_are_numbers_are_in_the_order_of_their_values(source: Path, tmp_path: Path):
    """Of a CSV file, of a Parquet file's numbers, and of folders; mixed with names they are names.

    A column of whole numbers with a missing one is float64 in pandas, and so in the Parquet file it writes.
    """
    numbers = {name: (2, 10, 9, 100)[i % 4] for i, name in enumerate(NAMES)}
    text = {name: str(label) for name, label in numbers.items()}
    folders = {f"{label}/{i}.jpg": label for i, label in enumerate(text.values())}
    tables = {write_csv(source, HEADER, *text.items()): text, write_pictures(tmp_path / "folders", folders): folders}
    tables[write_parquet(source, path=list(numbers), label=list(numbers.values()))] = text
    for table, expected in tables.items():
        manifest = build_shards(table, tmp_path / f"out-{table.name}")
        assert (manifest.classes, read_labels(manifest)) == (["2", "9", "10", "100"], expected)
    floats = write_parquet(source, path=NAMES[:4], label=pyarrow.array([2.0, 10.0, 9.0, None], pyarrow.float64()))
    assert build_shards(floats, tmp_path / "floats").classes == ["2", "9", "10"]
    assert number_classes(["10", "9", "x", ""], None) == (["10", "9", "x"], {"10": 0, "9": 1, "x": 2})
    assert number_classes(["01", "1", "0"], None)[0] == ["0", "01", "1"]


def write_map(path: Path, content: Any, encoding: str = "utf-8") -> str:
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
        build_shards(write_pictures(tmp_path / "in", [f"{name}/0.png" for name in classes]), tmp_path / name)
    else:
        write_map(tmp_path / name, content)
    for number, images in enumerate((source, write_csv(source, *ROWS))):
        manifest = build_shards(images, tmp_path / f"out{number}", class_map=str(tmp_path / name))
        assert manifest.classes == classes
        assert read_labels(manifest) == {
            path: name if name in classes else "animals/cat" for path, name in LABELS.items()
        }


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
    file = write_map(tmp_path / name, content) if name else str(tmp_path / "gone.txt")
    assert_refused(source, tmp_path / "out", errors.ExitCode.DATA, f"class_map={file}", says, class_map=file)


def test_blank_lines_and_a_byte_order_mark_in_a_class_map_are_no_class(tmp_path: Path):
    """And not the class of images that have none, as those in no folder."""
    for name, content in (("map.json", '["cat", "dog"]'), ("map.txt", "cat\ndog\n\n")):
        file = write_map(tmp_path / name, content, "utf-8-sig")
        assert read_class_map(file) == {"cat": 0, "dog": 1}
    manifest = build_shards(write_pictures(tmp_path / "in", ["0.png", "cat/1.png"]), tmp_path / "out", class_map=file)
    assert (manifest.classes, read_labels(manifest)) == (["cat", "dog"], {"0.png": None, "cat/1.png": "cat"})


def test_another_class_map_is_another_job(source: Path, tmp_path: Path):
    """Also where it only adds a class at the end: what is made would differ."""
    more = write_map(tmp_path / "more.txt", "\n".join([*CLASSES, "stones"]))
    build_shards(source, tmp_path / "out")
    assert_refused(source, tmp_path / "out", errors.ExitCode.CANNOT_CREATE, "another job", class_map=more)


def add_links(source: Path, links: dict[str, Path | str]) -> Path:
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
    add_links(source / "plants", files | {"dead.jpg": "nowhere", "to itself.jpg": "to itself.jpg"})
    add_links(
        source, {"folder out": far, "folder in": source / "animals/dog", "animals/up": "..", "animals/top": source}
    )
    for follow, expected, message in ((False, {*INSIDE}, "5 were"), (True, {*INSIDE, *OUTSIDE, *TWICE}, "2 were")):
        manifest = build_shards(source, tmp_path / f"made{follow}", follow_links=follow)
        assert set(read_samples(manifest)) == {*NAMES, *expected}
        assert set(read_rejects(manifest.folder)) == DEAD
        output = capsys.readouterr().out
        assert f"{message} left out" in output
        assert "animals/top" in output or not follow
        assert read_samples(manifest)["plants/relative.jpg"][1] == (source / NAMES[0]).read_bytes()
        assert read_labels(manifest)["plants/relative.jpg"] == "plants"
    assert_refused(source, tmp_path / "madeTrue", errors.ExitCode.CANNOT_CREATE, "input")  # what is followed is the job


def test_loops_by_way_of_other_folders_are_walked_once(tmp_path: Path):
    """With two links in each of two folders, the walk would take 2^40 steps."""
    source = write_pictures(tmp_path / "in", ["a/0.png", "b/1.png"])
    other = write_pictures(tmp_path / "other", ["2.png"])
    add_links(source, {"a/to b": "../b", "b/to a": "../a", "there": other})
    add_links(other, {"back": source})
    manifest = build_shards(source, tmp_path / "out", follow_links=True)
    assert set(read_samples(manifest)) == {"a/0.png", "b/1.png", "a/to b/1.png", "b/to a/0.png", "there/2.png"}


def test_the_input_itself_may_be_a_link_and_one_of_links_alone_is_refused_with_the_cure(source: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    add_links(tmp_path, {"link": source, "in/x": source / "animals"})
    assert_refused(tmp_path / "in", tmp_path / "out", errors.ExitCode.DATA, "no images", "follow_links=true")
    manifest = build_shards(tmp_path / "in", tmp_path / "out", follow_links=True)
    assert read_labels(manifest) == {f"x{name[7:]}": f"x{name[7:11]}" for name in NAMES if name.startswith("animals")}
    manifest = build_shards(tmp_path / "link", tmp_path / "whole")
    assert set(read_samples(manifest)) == set(NAMES)
    assert build_shards(tmp_path / "link", tmp_path / "whole") == manifest


def test_two_names_of_one_file_are_two_images_with_their_bytes(source: Path, tmp_path: Path):
    """Hard links: `tar` would store the second as a link, which webdataset passes over without a word."""
    os.link(source / NAMES[0], source / "plants" / "again.jpg")
    write_pictures(source, ["plants/other.jpg"], height=30)
    manifest = build_shards(source, tmp_path / "out")
    assert read_samples(manifest)["plants/again.jpg"][1] == (source / NAMES[0]).read_bytes()
    assert manifest.job["duplicates"] == 1
