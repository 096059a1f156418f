"""Shards that others wrote: what webdataset, img2dataset and the rest put in a tar is found, named and trained on."""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter, TarWriter

from ssl_vit import errors
from ssl_vit.convert import index_shards
from ssl_vit.convert.index_shards import IndexShards, VerifyShards, index, verify
from ssl_vit.convert.resolve import sets
from ssl_vit.data import manifest
from ssl_vit.data.cache import Store
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import EvaluationStream, Share, TrainingStream
from ssl_vit.data.manifest import Manifest
from tests.data import servers
from tests.data.damage import CPU, END, member
from tests.data.pictures import contents, encoded, make, one, picture, write_pictures
from tests.starts import call

KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "JPEG": "JPEG", "JPG": "JPEG"}
NAMES = ["tabby cat", "dog, ünï", "plant"]
COUNT, MOST = 10, 4  # samples of a set, and of a shard
Sample = dict[str, Any]


def image(number: int, kind: str = "jpg") -> bytes:
    return encoded(picture(number, 10, 12), KINDS[kind])


def write(folder: Path, samples: Iterable[Sample], most: int = MOST) -> Path:
    """A set of shards by webdataset's own writer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "%05d.tar"), maxcount=most, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def add(folder: Path, *samples: Sample) -> None:
    """One more shard."""
    with TarWriter(str(folder / "00003.tar"), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def numbered(fields: Iterable[Sample]) -> list[Sample]:
    """Samples of these fields, with a number and an image each where they have no other."""
    return [{"__key__": str(number), "jpg": image(number)} | sample for number, sample in enumerate(fields)]


def indexed(shards: Path | str, **options: Any) -> Manifest:
    return index(IndexShards(shards=str(shards), **{"workers": 1, "quiet": True} | options))


def refused(shards: Path | str, code: int, *says: str, **options: Any) -> None:
    line = servers.refused(lambda: indexed(shards, **options), code)
    assert not [text for text in says if text not in line], line


def held(made: Manifest) -> list[tuple[bytes, str | None]]:
    """Image bytes and name of the class of every sample in order, by manifest and indexes alone."""
    data = [made.tar(shard).read_bytes() for shard in range(len(made.shards))]
    names: list[str | None] = [*made.classes, None]  # -1: none
    rows = [(tar, row) for tar, one in zip(data, map(made.index, range(len(data))), strict=True) for row in one]
    return [(tar[row["offset"] :][: row["size"]], names[row["label"]]) for tar, row in rows]


def rejects(folder: Path) -> list[dict[str, str]]:
    file = folder / "rejects.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


Classes = Callable[[int], Any]


def turns(*answers: str | None) -> Classes:
    """Of samples that take turns in these classes."""
    return lambda number: answers[number % len(answers)]


name, third, half, mixed = turns(*NAMES), turns(*"012"), turns(*"01"), turns("7", "seven", "12")
IMG2DATASET: dict[str, Any] = {
    "caption": "a picture", "url": "https://example.org/1.jpg", "key": "000000001", "status": "success",
    "error_message": None, "width": 12, "height": 10, "original_width": 24, "exif": "{}", "sha256": "0" * 64,
}  # fmt: skip

STYLES: dict[str, tuple[Callable[[int], Sample], Classes]] = {
    "number in cls": (lambda i: {"jpg": image(i), "cls": i % 3}, third),
    "numbers with gaps": (lambda i: {"jpg": image(i), "cls": 5 * (i % 2)}, turns("0", "5")),
    "text in cls": (lambda i: {"jpg": image(i), "cls": f"{name(i)}\n".encode()}, name),
    "number in JSON": (lambda i: {"png": image(i, "png"), "json": {"label": i % 2}}, half),
    "text in JSON": (lambda i: {"webp": image(i, "webp"), "json": {"class": name(i), "width": 1}}, name),
    "a number as text": (lambda i: {"jpg": image(i), "json": {"cls": half(i)}}, half),
    "numbers and names": (lambda i: {"jpg": image(i), "cls": mixed(i).encode()}, mixed),
    "no labels": (lambda i: {"jpg": image(i)}, turns(None)),
    "some labels": (lambda i: {"jpg": image(i)} | ({}, {"cls": 1}, {"cls": -1}, {"cls": 1})[i % 4], turns(None, "1")),
    "empty labels": (lambda i: {"jpg": image(i), "cls": b" ", "json": {"label": "x"}}, turns(None)),
    "img2dataset": (lambda i: {"jpg": image(i), "txt": "a picture", "json": IMG2DATASET}, turns(None)),
    "timm": (lambda i: {"__key__": f"n0144{i}", "jpg": image(i), "cls": i % 3, "json": {"label": 9}}, third),
    "ImageNet's names": (lambda i: {"__key__": f"val.{i:08d}", "JPEG": image(i), "cls": i % 3}, third),
    "dots in all names": (lambda i: {"__key__": f"a.b.{i}", "jpg": image(i), "cls": i % 2, "c.txt": "no"}, half),
    "folders": (lambda i: {"__key__": f"n0{i % 3}.v1/x_{i}", "JPEG": image(i), "cls": i % 3}, third),
    "segmentation beside it": (lambda i: {"jpg": image(i), "seg.png": image(9, "png"), "cls": i % 2}, half),
    "all kinds": (lambda i: {(k := list(KINDS)[i % len(KINDS)]): image(i, k), "cls": i % 2}, half),
}
CLASSES = {"no labels": [], "empty labels": [], "img2dataset": [], "some labels": ["0", "1"]}
CLASSES |= {"numbers with gaps": [*"012345"], "numbers and names": ["12", "7", "seven"]}
"""Of a style, where they are not just all that occur, sorted."""
NOT_IMAGES = {"__key__", "cls", "json", "txt", "seg.png", "c.txt"}


def styled(style: str) -> list[Sample]:
    return [{"__key__": f"{number:05d}"} | STYLES[style][0](number) for number in range(COUNT)]


REPORTS = {"number in cls": ["10 samples, 3 classes, 3 shards"]}
REPORTS |= {"some labels": ["10 samples, 5 without a class, 2 classes, 3 shards"]}
REPORTS |= {"img2dataset": ["not read: 10 .txt", "10 samples, 0 classes, 3 shards"]}


@pytest.mark.parametrize("style", STYLES)
def test_every_sample_is_found_with_its_bytes_and_class(style: str, tmp_path: Path, capsys: Any):
    """In their order, by shards; what others wrote is not touched, and a second run changes nothing."""
    samples = styled(style)
    folder = write(tmp_path / "set", samples)
    before = contents(folder)
    made = indexed(folder)
    said = capsys.readouterr().out.replace(f"{folder}: ", "").splitlines()
    assert said == REPORTS.get(style, said)
    class_of = STYLES[style][1]
    images = [next(data for name, data in sample.items() if name not in NOT_IMAGES) for sample in samples]
    assert held(made) == [(data, class_of(number)) for number, data in enumerate(images)]
    assert made.classes == CLASSES.get(style, sorted({str(class_of(number)) for number in range(COUNT)}))
    assert [(s.name, s.samples) for s in made.shards] == [("00000.tar", 4), ("00001.tar", 4), ("00002.tar", 2)]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", *(f"0000{i}.npy" for i in range(3))}
    assert manifest.load(folder) == made
    made.check(full=True)
    assert indexed(folder) == made
    assert contents(folder) == after


LETTERS = st.text("ab/é1 ", min_size=1, max_size=4).filter(lambda t: not t.startswith("/") and not t.endswith("/"))
MEMBERS = st.lists(
    st.tuples(LETTERS, st.lists(st.sampled_from(["jpg", "PNG", "cls", "json", "txt", "seg.png"]), unique=True)),
    max_size=6,
    unique_by=lambda entry: entry[0],
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MEMBERS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_samples_are_those_that_webdataset_sees(tmp_path: Path, entries: list[tuple[str, list[str]]]):
    """Whatever the names (of which one has no dot, or all have): the same keys, images and classes."""
    tar = tmp_path / "any.tar"
    data = {"jpg": image(1), "PNG": image(2, "png"), "json": b'{"label": 3}', "txt": b"x", "seg.png": b"x"}
    members = [
        member(f"{key}.{suffix}", str(number).encode() if suffix == "cls" else data[suffix])
        for number, (key, suffixes) in enumerate(entries)
        for suffix in suffixes
    ]
    tar.write_bytes(b"".join(members) + END)
    theirs = []
    if any(set(suffixes) & {"jpg", "PNG"} for _, suffixes in entries):
        for sample in WebDataset(str(tar), shardshuffle=False, empty_check=False):
            kinds = sample.keys() & {"jpg", "png"}
            if len(kinds) == 1:
                label = int(sample["cls"]) if "cls" in sample else 3 if "json" in sample else None
                theirs.append((sample[kinds.pop()], label))
    rows = [(tar.read_bytes()[start:][:size], label) for start, size, label, _ in index_shards.scan(tar, tar.name).rows]
    assert rows == theirs or not theirs  # without an image, or with "KEY.seg.png" alone, names end at the last dot


@pytest.mark.parametrize(
    ("label_key", "classes", "wanted"),
    [
        (None, ["0", "1"], half),
        ("fine", ["0", "1", "2"], third),
        ("name", sorted(NAMES), name),
        ("some", ["yes"], turns(*["yes"] * 3, *[None] * 4)),
        ("nothing", [], turns(None)),
    ],
)
def test_label_key_names_the_field(tmp_path: Path, label_key: str | None, classes: list[str], wanted: Classes):
    """Before cls, and before the fields that are looked at else."""
    notes: list[Sample] = [{"fine": i % 3, "name": name(i), "label": 8, "cls": 8} for i in range(7)]
    notes = [*({"some": "yes"} | note for note in notes[:3]), *notes[3:]]
    samples = numbered({"cls": i % 2, "json": note} for i, note in enumerate(notes))
    made = indexed(write(tmp_path, samples), label_key=label_key)
    assert [label for _, label in held(made)] == [wanted(i) for i in range(7)]
    assert made.classes == classes


def test_of_the_fields_of_json_the_first_known_one_counts(tmp_path: Path):
    texts = ['{"target": 4, "class": 3, "cls": 2, "label": 1}', '{"target": 4, "class": 3, "cls": 2}', "[1]", "null"]
    texts += ['{"target": 4, "class": null}', '{"label": ""}', '{"label": -1, "cls": 2}', '{"target": 4}', "{}"]
    folder = write(tmp_path, numbered({"json": text.encode()} for text in texts))
    assert [label for _, label in held(indexed(folder))] == ["1", "2", None, None, None, None, None, "4", None]


def text(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


MORE = [*NAMES[::-1], "more"]
MAPS: dict[str, tuple[Any, list[str]]] = {  # content, and the classes in their order
    "map.json": (MORE, MORE),
    "of numbers.json": ({NAMES[1]: 0, NAMES[0]: 1, NAMES[2]: 2}, [*NAMES[1::-1], NAMES[2]]),
    "shards": (None, sorted([*NAMES, "a"])),  # of ours
}


@pytest.mark.parametrize("file", MAPS)
@pytest.mark.parametrize("said", ["names", "numbers"])
def test_a_class_map_orders_names_and_names_numbers(file: str, said: str, tmp_path: Path):
    """A number is the class's number in the map; a name is looked up in it."""
    content, classes = MAPS[file]
    if content is None:
        one(write_pictures(tmp_path / "images", [f"{name}/0.png" for name in classes]), tmp_path / file)
    else:
        text(tmp_path / file, content)
    fields = [{"cls": NAMES[i].encode() if said == "names" else i} for i in range(3)]
    made = indexed(write(tmp_path / "set", numbered([*fields, {}])), class_map=str(tmp_path / file))
    assert made.classes == classes
    assert [label for _, label in held(made)] == [*(NAMES if said == "names" else classes[:3]), None]


def test_a_class_map_may_know_the_numbers_themselves(tmp_path: Path):
    """Such as those of a set whose classes 3, 7 and 9 are to be 1, 0 and 0."""
    samples = numbered({"cls": (3, 7, 9)[i % 3]} for i in range(6))
    file = text(tmp_path / "map.json", {"7": 0, "3": 1, "9": 0})
    made = indexed(write(tmp_path / "set", samples), class_map=str(file))
    assert (made.classes, made.labels.tolist()) == (["7", "3"], [1, 0, 0] * 2)


@pytest.mark.parametrize(
    ("labels", "content", "says"),
    [
        ([0, 3], ["a", "b", "c"], ["has 3 classes", "number 3"]),
        ([b"a", b"x"], ["a", "b"], ["does not have 1 of the classes (first: x)"]),
        ([0], "{", ["cannot be read"]),
        ([1_000_000], None, ["class 1000000", "class_map="]),
    ],
)
def test_classes_that_a_map_does_not_know_are_refused(tmp_path: Path, labels: list, content: Any, says: list[str]):
    folder = write(tmp_path / "set", numbered({"cls": label} for label in labels))
    options = {"class_map": str(text(tmp_path / "map.json", content))} if content else {}
    refused(folder, errors.DATA, *says, **options)
    assert not (folder / "manifest.json").exists()


# which tars, and where their index lies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples of three numbered classes in three tars."""
    return write(tmp_path / "set", styled("number in cls"))


NUMBERED = [(image(i), third(i)) for i in range(COUNT)]
"""What is held of them."""


def test_the_index_may_lie_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the tars cannot be written to; the manifest finds them, whatever the working folder is by then."""
    os.chmod(folder, 0o555)
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    assert held(indexed("set", output="made/index")) == NUMBERED
    assert contents(folder) == before
    monkeypatch.chdir("/")
    at = tmp_path / "made" / "index"
    assert set(contents(at)) == {"manifest.json", *(f"0000{i}.npy" for i in range(3))}
    made = manifest.load(at)
    assert held(made) == NUMBERED
    made.check(full=True)
    assert made.where(1) == str(folder / "00001.tar")
    (state, *others) = verify(VerifyShards(shards=(str(at),), full=True, workers=1, quiet=True))
    assert (state.samples, state.fault, len(others)) == (4, None, 2)
    os.chmod(folder, 0o755)


FOLDERS = ["{here}/set/", "{here}/set/../set", ".", "./set", "./"]
PATTERNS = ["{here}/set/{{00000..00002}}.tar", "set/0000{{0,1,2}}.tar", "set/*.tar", "{here}/s?t/0000?.tar"]
LONG = "{here}/set/{{" + ",".join(f"{number:05d}" for number in range(100)) + "}}.tar"
"""Longer than any file name may be, as a script writes it."""


@pytest.mark.parametrize("pattern", [*FOLDERS, *PATTERNS, pytest.param(LONG, id="long list")])
def test_a_folder_and_patterns_name_the_same_set(folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch):
    tmp_path = folder.parent
    monkeypatch.chdir(folder if pattern in (".", "./") else tmp_path)
    made = indexed(pattern.format(here=tmp_path), output=str(tmp_path / "index"))
    assert made.job["rejects"] == (97 if pattern == LONG else 0)
    assert [shard.name for shard in made.shards] == [f"0000{i}.tar" for i in range(3)]
    monkeypatch.chdir("/")
    assert held(manifest.load(tmp_path / "index")) == NUMBERED


def test_a_pattern_in_the_working_folder_is_indexed_there(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """And an index beside its tars moves with them."""
    monkeypatch.chdir(folder)
    indexed("{00000..00002}.tar")
    monkeypatch.chdir("/")
    assert held(manifest.load(folder)) == NUMBERED
    folder.rename(folder.parent / "elsewhere")
    assert held(manifest.load(folder.parent / "elsewhere")) == NUMBERED


@pytest.mark.parametrize(
    ("shards", "at"),
    [("sets/{a,b/deep}/{00000..00001}.tar", x) for x in ("sets", "index")] + [("sets", "sets"), ("sets", "index")],
)
def test_tars_below_two_folders_are_one_set(tmp_path: Path, shards: str, at: str):
    """Their tars have the same names; the manifest goes to the folder they share."""
    write(tmp_path / "sets" / "a", styled("number in cls")[:5])
    write(tmp_path / "sets" / "b" / "deep", styled("number in cls")[5:])
    (tmp_path / "sets" / "b" / "00001.tar.part").write_bytes(b"half of a download")
    if shards != "sets":
        write(tmp_path / "sets" / "c", styled("no labels"))
    made = indexed(tmp_path / shards, **({"output": str(tmp_path / "index")} if at == "index" else {}))
    names = ["a/00000", "a/00001", "b/deep/00000", "b/deep/00001"]
    assert [shard.name for shard in made.shards] == [f"{name}.tar" for name in names]
    assert held(made) == NUMBERED
    assert manifest.load(tmp_path / at) == made
    assert {name for name in contents(tmp_path / at) if name.endswith(".npy")} == {f"{name}.npy" for name in names}


@pytest.mark.parametrize(
    ("pattern", "code", "says"),
    [
        ("{here}/{{0..9999999999}}.tar", errors.USAGE, "more than 1,000,000 names"),
        ("{here}/" + "{{a,b}}" * 60 + ".tar", errors.USAGE, "more than 1,000,000 names"),
        ("{here}/nothing", errors.DATA, "nothing"),
        ("{here}/*.tar", errors.DATA, "finds no files"),
        ("{here}/empty", errors.DATA, "has no .tar files"),
        ("{here}/{{0..2}}.tar", errors.DATA, "not one sample can be used"),
        ("{here}/set/00000.tar.gz", errors.DATA, "unpack"),
        ("pipe:cat {here}/set/00000.tar", errors.USAGE, "is not taken"),
    ],
)
def test_names_that_mean_nothing_are_refused(folder: Path, tmp_path: Path, pattern: str, code: int, says: str):
    (tmp_path / "empty").mkdir()
    (folder / "00000.tar.gz").write_bytes(b"")
    refused(pattern.format(here=tmp_path), code, says, output=str(tmp_path / "index"))
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_any_number_of_workers_writes_the_same_files(tmp_path: Path):
    folder = write(tmp_path / "set", [*styled("text in cls"), {"__key__": "x", "cls": 1}], most=1)
    for workers in (1, 2, 3):
        indexed(folder, output=str(tmp_path / str(workers)), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_shards_that_came_later_are_found_by_another_run(folder: Path):
    """Classes that are new among them, too; and shards that went are gone, with all that was said of them."""
    identity = indexed(folder).identity
    clean = contents(folder)
    add(folder, {"__key__": "new", "jpg": image(50), "cls": b"4"}, {"__key__": "bad", "jpg": b"<html>", "cls": b"0"})
    made = indexed(folder)
    assert held(made) == [*NUMBERED, (image(50), "4")]
    assert made.classes == ["0", "1", "2", "3", "4"]
    assert made.identity != identity
    assert made.job["rejects"] == 1
    (folder / "00003.tar").unlink()
    made = indexed(folder)
    assert (made.identity, made.job["rejects"]) == (identity, 0)
    assert manifest.load(folder).samples == COUNT
    assert contents(folder) == clean


def test_a_set_of_ours_is_not_indexed_anew(tmp_path: Path):
    """Its manifest knows more; elsewhere it may be."""
    made = one(write_pictures(tmp_path / "in", ["c/0.png", "d/1.png"]), tmp_path / "out")
    before = contents(tmp_path / "out")
    refused(tmp_path / "out", errors.CANNOT_CREATE, "make_shards", "name another output")
    assert contents(tmp_path / "out") == before
    again = indexed(tmp_path / "out", output=str(tmp_path / "index"))
    assert again.labels.tolist() == made.labels.tolist()
    assert again.identity == made.identity


def test_files_of_others_are_not_overwritten(folder: Path):
    """Such as features that somebody saved beside the shards under their names."""
    np.save(folder / "00001.npy", np.arange(5))
    with contextlib.suppress(errors.Refusal):
        indexed(folder)
    assert np.load(folder / "00001.npy").tolist() == [0, 1, 2, 3, 4]


# what is reported


def test_what_cannot_be_used_is_reported_and_the_rest_is(folder: Path, capsys: Any):
    """Under webdataset's names; how a tar may be damaged is the matter of test_hostile_tars.py."""
    bad: dict[str, Sample] = {"b/html": {"jpg": b"<html>"}, "no-image": {"cls": b"3"}}
    bad |= {"gif": {"png": encoded(picture(), "GIF")}, "two": {"jpg": image(3), "png": image(4, "png")}}
    bad |= {"json": {"jpg": image(1), "json": b"{"}, "list": {"jpg": image(2), "json": b'{"label": [1, 2]}'}}
    good = {"__key__": "pickle", "jpg": image(5), "pkl": b"\x80\x04.", "cls": b"1"}
    add(folder, *({"__key__": key} | sample for key, sample in bad.items()), good)
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00004.tar").write_bytes(whole[: whole.index(image(2)) + 9])
    (folder / "00005.tar").write_bytes(b"<html>not found</html>" * 50)
    (folder / "00006.tar").write_bytes(b"")
    (folder / "00007.tar").mkdir()
    made = indexed(folder)
    assert [shard.samples for shard in made.shards] == [4, 4, 2, 1, 2]
    assert held(made)[COUNT] == (image(5), "1")
    found = {(row["shard"], row["key"]): row["reason"] for row in rejects(folder)}
    assert {key for shard, key in found if shard == "00003.tar"} == bad.keys()
    assert "JPEG, PNG or WebP" in found["00003.tar", "b/html"]
    assert found["00003.tar", "no-image"] == "has no image"
    assert {shard for shard, _ in found} == {f"0000{i}.tar" for i in range(3, 8)}
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("00003.tar: 1 of 7 samples can be used: ")
    assert re.match(r"00004\.tar: 2 of 3 samples can be used: at byte \d+: the file ends within 00002", said[1])
    assert "00005.tar: 0 of 0 samples can be used: at byte 0: this is no tar file" in said[2]
    assert said[3].startswith("00006.tar: 0 of 0")
    assert said[4] == "00007.tar: 0 of 0 samples can be used: cannot be read: not a regular file"
    assert said[5] == "not read: 1 .pkl"
    lost = made.job["rejects"]
    assert said[6:] == [f"{folder}: 13 samples, 3 classes, 5 shards, {lost} faults (see {folder}/rejects.jsonl)"]
    assert lost == len(rejects(folder))


def test_a_report_stays_short(tmp_path: Path, capsys: Any):
    """Of 30 shards with faults 20 are shown, and all are in the file."""
    samples = numbered({"jpg": image(i % 5) if i % 2 else b"x" * 9, f"x{i}": b""} for i in range(60))
    made = indexed(write(tmp_path / "set", samples, most=2))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 23
    assert said[20] == "... and 10 more shards"
    assert said[21].startswith("not read: 1 .x")
    assert said[22].startswith(f"{tmp_path / 'set'}: 30 samples, 0 classes, 30 shards, 30 faults")
    assert all(len(line) < 400 for line in said)
    assert made.samples == len(rejects(tmp_path / "set")) == 30


def test_full_decodes_what_a_header_hides(tmp_path: Path):
    whole = encoded(picture(1, 300, 300), "JPEG")
    samples = [{"__key__": "good", "jpg": whole}, {"__key__": "cut", "jpg": whole[: len(whole) // 2]}]
    folder = write(tmp_path / "set", samples)
    assert indexed(folder, output=str(tmp_path / "quick")).samples == 2
    made = indexed(folder, output=str(tmp_path / "full"), full=True)
    assert (made.samples, made.job["full"]) == (1, True)
    assert [row["key"] for row in rejects(tmp_path / "full")] == ["cut"]


def test_nothing_usable_is_refused_with_the_first_reason(tmp_path: Path):
    folder = write(tmp_path / "set", [{"__key__": "a", "jpg": b"no"}, {"__key__": "b", "txt": "no"}])
    refused(folder, errors.DATA, "not one sample can be used", "00000.tar", "JPEG, PNG or WebP")
    assert not (folder / "manifest.json").exists()
    assert len(rejects(folder)) == 1
    refused(write(tmp_path / "texts", [{"__key__": "b", "txt": "no"}]), errors.DATA, "no images")


TINY: dict[str, Any] = {"image_size": 8, "workers": 0, "lanes": 2, "window": 2}


def color(number: int) -> tuple[int, int, int]:
    return 10 * number, 255 - 10 * number, number


def plain(color: tuple[int, int, int]) -> bytes:
    """A PNG of one colour, which it keeps in any crop."""
    return encoded(Image.new("RGB", (9, 8), color), "PNG")


def trained(made: Manifest) -> Counter[tuple[tuple[int, ...], str | None]]:
    """How often each (colour, class) came in two epochs."""
    stream = TrainingStream(made, Data(**TINY), seed=3, batch=made.samples)
    found = Counter()
    for batch in islice(stream.batches(0, Share(0, 1, made.samples), CPU), 2):
        assert batch["valid"].all()
        for pixels, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            assert (pixels == pixels[:, :1, :1]).all()
            found[tuple(pixels[:, 0, 0].tolist()), made.classes[label] if label >= 0 else None] += 1
    assert not stream.faults.take()
    return found


def found(tmp_path: Path, *paths: Path) -> Manifest:
    """As data.train finds it."""
    return sets(tuple(map(str, paths)), "train", tmp_path / "converted", Store(tmp_path / "cache"))


def test_sets_of_different_classes_are_joined_by_name_and_trained_on(tmp_path: Path):
    """Of theirs, ours and one without classes: each sample once an epoch, under its own class's name."""
    theirs, mine, bare, at = (tmp_path / name for name in ("theirs", "ours", "bare", "bare-index"))
    write(theirs, [{"__key__": f"k/{i}", "png": plain(color(i)), "cls": name(i).encode()} for i in range(COUNT)])
    with pytest.raises(errors.Refusal, match=r"index them first: tools/index_shards\.py"):
        found(tmp_path, theirs)
    indexed(theirs)
    indexed(write(bare, [{"__key__": str(i), "png": plain((i, i, i))} for i in range(3)]), output=str(at))
    class_of = turns(NAMES[2], "an emu", NAMES[0])
    for i in range(10, 20):
        path = tmp_path / "our-images" / class_of(i) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain(color(i)))
    make(tmp_path / "our-images", mine, shard_samples=3)
    wanted = {(color(i), name(i)): 2 for i in range(COUNT)} | {((i, i, i), None): 2 for i in range(3)}
    wanted |= {(color(i), class_of(i)): 2 for i in range(10, 20)}
    for paths in ((theirs, mine, at), (at, mine, theirs)):
        made = found(tmp_path, *paths)
        assert made.classes == sorted({*NAMES, "an emu"})
        assert made.samples == 23
        assert trained(made) == wanted
        made.check(full=True)
        batches = EvaluationStream(made, Data(**TINY), batch=4).batches(Share(), CPU)
        assert sum(int(batch["valid"].sum()) for batch in batches) == 23
    tars = [*(theirs / f"0000{i}.tar" for i in range(3)), *(mine / f"00000{i}.tar" for i in range(4))]
    assert {made.where(s) for s in range(len(made.shards))} == {str(tar) for tar in [*tars, bare / "00000.tar"]}
    (theirs / "00001.tar").unlink()
    with pytest.raises(errors.Refusal, match=r"1 of 8 shards are bad: 00001\.tar \(missing\)"):
        found(tmp_path, theirs, mine, at).check()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["shards=set"], 0, "set: 10 samples, 3 classes, 3 shards"),
        (["shards=set", "output=index", "workers=2", "full=true"], 0, "index: 10 samples, 3 classes, 3 shards"),
        (["shards=set/{00001..00003}.tar"], 0, "00003.tar: 0 of 0 samples can be used: cannot be read"),
        ([], errors.USAGE, "shards"),
        (["shards=set", "worker=2"], errors.USAGE, "workers"),
        (["shards=nowhere"], errors.DATA, "nowhere"),
        (["shards=set", "output=set/00000.tar"], errors.CANNOT_CREATE, "00000.tar"),
        (["shards=set", "output=http://127.0.0.1/x"], errors.USAGE, "give output=FOLDER"),
        (["--help"], 0, "label_key"),
    ],
)
def test_the_command_ends_with_its_code(folder: Path, arguments: list[str], code: int, says: str, monkeypatch: Any):
    monkeypatch.chdir(folder.parent)
    ended = call("index_shards", [*arguments, *(["quiet=true"] if arguments else [])])
    assert ended.code == code
    assert says in (ended.line if code else ended.said)
    assert ended.said.count("index_shards.py: ") == (code != 0), "one closing line"
