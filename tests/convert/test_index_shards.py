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
from ssl_vit.convert.index_shards import IndexShards, VerifyShards, index_tars, verify_all_shards
from ssl_vit.convert.resolve import resolve_manifest
from ssl_vit.data import manifest
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.dataset import Data
from ssl_vit.data.loader import EvaluationStream, ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest
from tests.data import servers
from tests.data.damage import CPU, TAR_END, tar_member
from tests.data.pictures import build_shards, build_splits, contents, encode_pil, picture, write_pictures
from tests.processes import call_tool

KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "JPEG": "JPEG", "JPG": "JPEG"}
NAMES = ["tabby cat", "dog, ünï", "plant"]
COUNT, MAX_SAMPLES = 10, 4  # samples of a set, and of a shard
Sample = dict[str, Any]


def image_bytes(number: int, kind: str = "jpg") -> bytes:
    return encode_pil(picture(number, 10, 12), KINDS[kind])


def write_shards(folder: Path, samples: Iterable[Sample], max_samples: int = MAX_SAMPLES) -> Path:
    """A set of shards by webdataset's own writer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "%05d.tar"), maxcount=max_samples, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def add_shard(folder: Path, *samples: Sample) -> None:
    """One more shard."""
    with TarWriter(str(folder / "00003.tar"), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def number_samples(fields: Iterable[Sample]) -> list[Sample]:
    """Samples of these fields, with a number and an image each where they have no other."""
    return [{"__key__": str(number), "jpg": image_bytes(number)} | sample for number, sample in enumerate(fields)]


def index_folder(shards: Path | str, **options: Any) -> Manifest:
    return index_tars(IndexShards(shards=str(shards), **{"workers": 1, "quiet": True} | options))


def assert_refused(shards: Path | str, code: int, *texts: str, **options: Any) -> None:
    line = servers.assert_refused(lambda: index_folder(shards, **options), code)
    assert not [expected for expected in texts if expected not in line], line


def read_samples(dataset: Manifest) -> list[tuple[bytes, str | None]]:
    """Image bytes and name of the class of every sample in order, by manifest and indexes alone."""
    data = [dataset.tar(shard).read_bytes() for shard in range(len(dataset.shards))]
    names: list[str | None] = [*dataset.classes, None]  # -1: none
    rows = [(tar, row) for tar, index in zip(data, map(dataset.index, range(len(data))), strict=True) for row in index]
    return [(tar[row["offset"] :][: row["size"]], names[row["label"]]) for tar, row in rows]


def read_rejects(folder: Path) -> list[dict[str, str]]:
    file = folder / "rejects.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


Classes = Callable[[int], Any]


def class_cycle(*class_names: str | None) -> Classes:
    """Of samples that take turns in these classes."""
    return lambda number: class_names[number % len(class_names)]


class_name, class_of_three, class_of_two, mixed_class = (
    class_cycle(*NAMES),
    class_cycle(*"012"),
    class_cycle(*"01"),
    class_cycle("7", "seven", "12"),
)
IMG2DATASET: dict[str, Any] = {
    "caption": "a picture", "url": "https://example.org/1.jpg", "key": "000000001", "status": "success",
    "error_message": None, "width": 12, "height": 10, "original_width": 24, "exif": "{}", "sha256": "0" * 64,
}  # fmt: skip

STYLES: dict[str, tuple[Callable[[int], Sample], Classes]] = {
    "number in cls": (lambda i: {"jpg": image_bytes(i), "cls": i % 3}, class_of_three),
    "numbers with gaps": (lambda i: {"jpg": image_bytes(i), "cls": 5 * (i % 2)}, class_cycle("0", "5")),
    "text in cls": (lambda i: {"jpg": image_bytes(i), "cls": f"{class_name(i)}\n".encode()}, class_name),
    "number in JSON": (lambda i: {"png": image_bytes(i, "png"), "json": {"label": i % 2}}, class_of_two),
    "text in JSON": (
        lambda i: {"webp": image_bytes(i, "webp"), "json": {"class": class_name(i), "width": 1}},
        class_name,
    ),
    "a number as text": (lambda i: {"jpg": image_bytes(i), "json": {"cls": class_of_two(i)}}, class_of_two),
    "numbers and names": (lambda i: {"jpg": image_bytes(i), "cls": mixed_class(i).encode()}, mixed_class),
    "no labels": (lambda i: {"jpg": image_bytes(i)}, class_cycle(None)),
    "some labels": (
        lambda i: {"jpg": image_bytes(i)} | ({}, {"cls": 1}, {"cls": -1}, {"cls": 1})[i % 4],
        class_cycle(None, "1"),
    ),
    "empty labels": (lambda i: {"jpg": image_bytes(i), "cls": b" ", "json": {"label": "x"}}, class_cycle(None)),
    "img2dataset": (lambda i: {"jpg": image_bytes(i), "txt": "a picture", "json": IMG2DATASET}, class_cycle(None)),
    "timm": (
        lambda i: {"__key__": f"n0144{i}", "jpg": image_bytes(i), "cls": i % 3, "json": {"label": 9}},
        class_of_three,
    ),
    "ImageNet's names": (lambda i: {"__key__": f"val.{i:08d}", "JPEG": image_bytes(i), "cls": i % 3}, class_of_three),
    "dots in all names": (
        lambda i: {"__key__": f"a.b.{i}", "jpg": image_bytes(i), "cls": i % 2, "c.txt": "no"},
        class_of_two,
    ),
    "folders": (lambda i: {"__key__": f"n0{i % 3}.v1/x_{i}", "JPEG": image_bytes(i), "cls": i % 3}, class_of_three),
    "segmentation beside it": (
        lambda i: {"jpg": image_bytes(i), "seg.png": image_bytes(9, "png"), "cls": i % 2},
        class_of_two,
    ),
    "all kinds": (lambda i: {(k := list(KINDS)[i % len(KINDS)]): image_bytes(i, k), "cls": i % 2}, class_of_two),
}
CLASSES = {"no labels": [], "empty labels": [], "img2dataset": [], "some labels": ["0", "1"]}
CLASSES |= {"numbers with gaps": [*"012345"], "numbers and names": ["12", "7", "seven"]}
"""Of a style, where they are not just all that occur, sorted."""
NOT_IMAGES = {"__key__", "cls", "json", "txt", "seg.png", "c.txt"}


def styled_samples(style: str) -> list[Sample]:
    return [{"__key__": f"{number:05d}"} | STYLES[style][0](number) for number in range(COUNT)]


REPORTS = {"number in cls": ["10 samples, 3 classes, 3 shards"]}
REPORTS |= {"some labels": ["10 samples, 5 without a class, 2 classes, 3 shards"]}
REPORTS |= {"img2dataset": ["not read: 10 .txt", "10 samples, 0 classes, 3 shards"]}


@pytest.mark.parametrize("style", STYLES)
def test_every_sample_is_found_with_its_bytes_and_class(style: str, tmp_path: Path, capsys: Any):
    """In their order, by shards; what others wrote is not touched, and a second run changes nothing."""
    samples = styled_samples(style)
    folder = write_shards(tmp_path / "set", samples)
    before = contents(folder)
    dataset = index_folder(folder)
    output = capsys.readouterr().out.replace(f"{folder}: ", "").splitlines()
    assert output == REPORTS.get(style, output)
    class_of = STYLES[style][1]
    images = [next(data for name, data in sample.items() if name not in NOT_IMAGES) for sample in samples]
    assert read_samples(dataset) == [(data, class_of(number)) for number, data in enumerate(images)]
    assert dataset.classes == CLASSES.get(style, sorted({str(class_of(number)) for number in range(COUNT)}))
    assert [(s.name, s.samples) for s in dataset.shards] == [("00000.tar", 4), ("00001.tar", 4), ("00002.tar", 2)]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", *(f"0000{i}.npy" for i in range(3))}
    assert manifest.load(folder) == dataset
    dataset.check_shards(full=True)
    assert index_folder(folder) == dataset
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
    data = {"jpg": image_bytes(1), "PNG": image_bytes(2, "png"), "json": b'{"label": 3}', "txt": b"x", "seg.png": b"x"}
    members = [
        tar_member(f"{key}.{suffix}", str(number).encode() if suffix == "cls" else data[suffix])
        for number, (key, suffixes) in enumerate(entries)
        for suffix in suffixes
    ]
    tar.write_bytes(b"".join(members) + TAR_END)
    expected = []
    if any(set(suffixes) & {"jpg", "PNG"} for _, suffixes in entries):
        for sample in WebDataset(str(tar), shardshuffle=False, empty_check=False):
            kinds = sample.keys() & {"jpg", "png"}
            if len(kinds) == 1:
                label = int(sample["cls"]) if "cls" in sample else 3 if "json" in sample else None
                expected.append((sample[kinds.pop()], label))
    actual = [
        (tar.read_bytes()[start:][:size], label) for start, size, label, _ in index_shards.scan_tar(tar, tar.name).rows
    ]
    assert (
        actual == expected or not expected
    )  # without an image, or with "KEY.seg.png" alone, names end at the last dot


@pytest.mark.parametrize(
    ("label_key", "classes", "wanted"),
    [
        (None, ["0", "1"], class_of_two),
        ("fine", ["0", "1", "2"], class_of_three),
        ("name", sorted(NAMES), class_name),
        ("some", ["yes"], class_cycle(*["yes"] * 3, *[None] * 4)),
        ("nothing", [], class_cycle(None)),
    ],
)
def test_label_key_names_the_field(tmp_path: Path, label_key: str | None, classes: list[str], wanted: Classes):
    """Before cls, and before the fields that are looked at else."""
    notes: list[Sample] = [{"fine": i % 3, "name": class_name(i), "label": 8, "cls": 8} for i in range(7)]
    notes = [*({"some": "yes"} | note for note in notes[:3]), *notes[3:]]
    samples = number_samples({"cls": i % 2, "json": note} for i, note in enumerate(notes))
    dataset = index_folder(write_shards(tmp_path, samples), label_key=label_key)
    assert [label for _, label in read_samples(dataset)] == [wanted(i) for i in range(7)]
    assert dataset.classes == classes


def test_of_the_fields_of_json_the_first_known_one_counts(tmp_path: Path):
    texts = ['{"target": 4, "class": 3, "cls": 2, "label": 1}', '{"target": 4, "class": 3, "cls": 2}', "[1]", "null"]
    texts += ['{"target": 4, "class": null}', '{"label": ""}', '{"label": -1, "cls": 2}', '{"target": 4}', "{}"]
    folder = write_shards(tmp_path, number_samples({"json": text.encode()} for text in texts))
    assert [label for _, label in read_samples(index_folder(folder))] == [
        "1",
        "2",
        None,
        None,
        None,
        None,
        None,
        "4",
        None,
    ]


def write_text(path: Path, content: Any) -> Path:
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
        build_shards(write_pictures(tmp_path / "images", [f"{name}/0.png" for name in classes]), tmp_path / file)
    else:
        write_text(tmp_path / file, content)
    fields = [{"cls": NAMES[i].encode() if said == "names" else i} for i in range(3)]
    dataset = index_folder(
        write_shards(tmp_path / "set", number_samples([*fields, {}])), class_map=str(tmp_path / file)
    )
    assert dataset.classes == classes
    assert [label for _, label in read_samples(dataset)] == [*(NAMES if said == "names" else classes[:3]), None]


def test_a_class_map_may_know_the_numbers_themselves(tmp_path: Path):
    """Such as those of a set whose classes 3, 7 and 9 are to be 1, 0 and 0."""
    samples = number_samples({"cls": (3, 7, 9)[i % 3]} for i in range(6))
    file = write_text(tmp_path / "map.json", {"7": 0, "3": 1, "9": 0})
    dataset = index_folder(write_shards(tmp_path / "set", samples), class_map=str(file))
    assert (dataset.classes, dataset.labels.tolist()) == (["7", "3"], [1, 0, 0] * 2)


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
    folder = write_shards(tmp_path / "set", number_samples({"cls": label} for label in labels))
    options = {"class_map": str(write_text(tmp_path / "map.json", content))} if content else {}
    assert_refused(folder, errors.ExitCode.DATA, *says, **options)
    assert not (folder / "manifest.json").exists()


# which tars, and where their index lies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten samples of three numbered classes in three tars."""
    return write_shards(tmp_path / "set", styled_samples("number in cls"))


NUMBERED = [(image_bytes(i), class_of_three(i)) for i in range(COUNT)]
"""What is held of them."""


def test_the_index_may_lie_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the tars cannot be written to; the manifest finds them, whatever the working folder is by then."""
    os.chmod(folder, 0o555)
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    assert read_samples(index_folder("set", output="made/index")) == NUMBERED
    assert contents(folder) == before
    monkeypatch.chdir("/")
    index_dir = tmp_path / "made" / "index"
    assert set(contents(index_dir)) == {"manifest.json", *(f"0000{i}.npy" for i in range(3))}
    dataset = manifest.load(index_dir)
    assert read_samples(dataset) == NUMBERED
    dataset.check_shards(full=True)
    assert dataset.describe_shard(1) == str(folder / "00001.tar")
    (state, *other_states) = verify_all_shards(VerifyShards(shards=(str(index_dir),), full=True, workers=1, quiet=True))
    assert (state.samples, state.fault, len(other_states)) == (4, None, 2)
    os.chmod(folder, 0o755)


FOLDERS = ["{here}/set/", "{here}/set/../set", ".", "./set", "./"]
PATTERNS = ["{here}/set/{{00000..00002}}.tar", "set/0000{{0,1,2}}.tar", "set/*.tar", "{here}/s?t/0000?.tar"]
LONG = "{here}/set/{{" + ",".join(f"{number:05d}" for number in range(100)) + "}}.tar"
"""Longer than any file name may be, as a script writes it."""


@pytest.mark.parametrize("pattern", [*FOLDERS, *PATTERNS, pytest.param(LONG, id="long list")])
def test_a_folder_and_patterns_name_the_same_set(folder: Path, pattern: str, monkeypatch: pytest.MonkeyPatch):
    tmp_path = folder.parent
    monkeypatch.chdir(folder if pattern in (".", "./") else tmp_path)
    dataset = index_folder(pattern.format(here=tmp_path), output=str(tmp_path / "index"))
    assert dataset.job["rejects"] == (97 if pattern == LONG else 0)
    assert [shard.name for shard in dataset.shards] == [f"0000{i}.tar" for i in range(3)]
    monkeypatch.chdir("/")
    assert read_samples(manifest.load(tmp_path / "index")) == NUMBERED


def test_a_pattern_in_the_working_folder_is_indexed_there(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """And an index beside its tars moves with them."""
    monkeypatch.chdir(folder)
    index_folder("{00000..00002}.tar")
    monkeypatch.chdir("/")
    assert read_samples(manifest.load(folder)) == NUMBERED
    folder.rename(folder.parent / "elsewhere")
    assert read_samples(manifest.load(folder.parent / "elsewhere")) == NUMBERED


@pytest.mark.parametrize(
    ("shards", "at"),
    [("sets/{a,b/deep}/{00000..00001}.tar", x) for x in ("sets", "index")] + [("sets", "sets"), ("sets", "index")],
)
def test_tars_below_two_folders_are_one_set(tmp_path: Path, shards: str, at: str):
    """Their tars have the same names; the manifest goes to the folder they share."""
    write_shards(tmp_path / "sets" / "a", styled_samples("number in cls")[:5])
    write_shards(tmp_path / "sets" / "b" / "deep", styled_samples("number in cls")[5:])
    (tmp_path / "sets" / "b" / "00001.tar.part").write_bytes(b"half of a download")
    if shards != "sets":
        write_shards(tmp_path / "sets" / "c", styled_samples("no labels"))
    dataset = index_folder(tmp_path / shards, **({"output": str(tmp_path / "index")} if at == "index" else {}))
    names = ["a/00000", "a/00001", "b/deep/00000", "b/deep/00001"]
    assert [shard.name for shard in dataset.shards] == [f"{name}.tar" for name in names]
    assert read_samples(dataset) == NUMBERED
    assert manifest.load(tmp_path / at) == dataset
    assert {name for name in contents(tmp_path / at) if name.endswith(".npy")} == {f"{name}.npy" for name in names}


@pytest.mark.parametrize(
    ("pattern", "code", "says"),
    [
        ("{here}/{{0..9999999999}}.tar", errors.ExitCode.USAGE, "more than 1,000,000 names"),
        ("{here}/" + "{{a,b}}" * 60 + ".tar", errors.ExitCode.USAGE, "more than 1,000,000 names"),
        ("{here}/nothing", errors.ExitCode.DATA, "nothing"),
        ("{here}/*.tar", errors.ExitCode.DATA, "finds no files"),
        ("{here}/empty", errors.ExitCode.DATA, "has no .tar files"),
        ("{here}/{{0..2}}.tar", errors.ExitCode.DATA, "not one sample can be used"),
        ("{here}/set/00000.tar.gz", errors.ExitCode.DATA, "unpack"),
        ("pipe:cat {here}/set/00000.tar", errors.ExitCode.USAGE, "is not taken"),
    ],
)
def test_names_that_mean_nothing_are_refused(folder: Path, tmp_path: Path, pattern: str, code: int, says: str):
    (tmp_path / "empty").mkdir()
    (folder / "00000.tar.gz").write_bytes(b"")
    assert_refused(pattern.format(here=tmp_path), code, says, output=str(tmp_path / "index"))
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_any_number_of_workers_writes_the_same_files(tmp_path: Path):
    folder = write_shards(tmp_path / "set", [*styled_samples("text in cls"), {"__key__": "x", "cls": 1}], max_samples=1)
    for workers in (1, 2, 3):
        index_folder(folder, output=str(tmp_path / str(workers)), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_shards_that_came_later_are_found_by_another_run(folder: Path):
    """Classes that are new among them, too; and shards that went are gone, with all that was said of them."""
    identity = index_folder(folder).identity
    clean = contents(folder)
    add_shard(
        folder,
        {"__key__": "new", "jpg": image_bytes(50), "cls": b"4"},
        {"__key__": "bad", "jpg": b"<html>", "cls": b"0"},
    )
    dataset = index_folder(folder)
    assert read_samples(dataset) == [*NUMBERED, (image_bytes(50), "4")]
    assert dataset.classes == ["0", "1", "2", "3", "4"]
    assert dataset.identity != identity
    assert dataset.job["rejects"] == 1
    (folder / "00003.tar").unlink()
    dataset = index_folder(folder)
    assert (dataset.identity, dataset.job["rejects"]) == (identity, 0)
    assert manifest.load(folder).samples == COUNT
    assert contents(folder) == clean


def test_a_set_of_ours_is_not_indexed_anew(tmp_path: Path):
    """Its manifest knows more; elsewhere it may be."""
    dataset = build_shards(write_pictures(tmp_path / "in", ["c/0.png", "d/1.png"]), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert_refused(tmp_path / "out", errors.ExitCode.CANNOT_CREATE, "make_shards", "name another output")
    assert contents(tmp_path / "out") == before
    reindexed = index_folder(tmp_path / "out", output=str(tmp_path / "index"))
    assert reindexed.labels.tolist() == dataset.labels.tolist()
    assert reindexed.identity == dataset.identity


def test_files_of_others_are_not_overwritten(folder: Path):
    """Such as features that somebody saved beside the shards under their names."""
    np.save(folder / "00001.npy", np.arange(5))
    with contextlib.suppress(errors.ExitError):
        index_folder(folder)
    assert np.load(folder / "00001.npy").tolist() == [0, 1, 2, 3, 4]


# what is reported


def test_what_cannot_be_used_is_reported_and_the_rest_is(folder: Path, capsys: Any):
    """Under webdataset's names; how a tar may be damaged is the matter of test_hostile_tars.py."""
    bad: dict[str, Sample] = {"b/html": {"jpg": b"<html>"}, "no-image": {"cls": b"3"}}
    bad |= {"gif": {"png": encode_pil(picture(), "GIF")}, "two": {"jpg": image_bytes(3), "png": image_bytes(4, "png")}}
    bad |= {
        "json": {"jpg": image_bytes(1), "json": b"{"},
        "list": {"jpg": image_bytes(2), "json": b'{"label": [1, 2]}'},
    }
    good = {"__key__": "pickle", "jpg": image_bytes(5), "pkl": b"\x80\x04.", "cls": b"1"}
    add_shard(folder, *({"__key__": key} | sample for key, sample in bad.items()), good)
    tar_bytes = (folder / "00000.tar").read_bytes()
    (folder / "00004.tar").write_bytes(tar_bytes[: tar_bytes.index(image_bytes(2)) + 9])
    (folder / "00005.tar").write_bytes(b"<html>not found</html>" * 50)
    (folder / "00006.tar").write_bytes(b"")
    (folder / "00007.tar").mkdir()
    dataset = index_folder(folder)
    assert [shard.samples for shard in dataset.shards] == [4, 4, 2, 1, 2]
    assert read_samples(dataset)[COUNT] == (image_bytes(5), "1")
    reasons = {(row["shard"], row["key"]): row["reason"] for row in read_rejects(folder)}
    assert {key for shard, key in reasons if shard == "00003.tar"} == bad.keys()
    assert "JPEG, PNG or WebP" in reasons["00003.tar", "b/html"]
    assert reasons["00003.tar", "no-image"] == "has no image"
    assert {shard for shard, _ in reasons} == {f"0000{i}.tar" for i in range(3, 8)}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("00003.tar: 1 of 7 samples can be used: ")
    assert re.match(r"00004\.tar: 2 of 3 samples can be used: at byte \d+: the file ends within 00002", lines[1])
    assert "00005.tar: 0 of 0 samples can be used: at byte 0: this is no tar file" in lines[2]
    assert lines[3].startswith("00006.tar: 0 of 0")
    assert lines[4] == "00007.tar: 0 of 0 samples can be used: cannot be read: not a regular file"
    assert lines[5] == "not read: 1 .pkl"
    num_rejects = dataset.job["rejects"]
    assert lines[6:] == [
        f"{folder}: 13 samples, 3 classes, 5 shards, {num_rejects} faults (see {folder}/rejects.jsonl)"
    ]
    assert num_rejects == len(read_rejects(folder))


def test_a_report_stays_short(tmp_path: Path, capsys: Any):
    """Of 30 shards with faults 20 are shown, and all are in the file."""
    samples = number_samples({"jpg": image_bytes(i % 5) if i % 2 else b"x" * 9, f"x{i}": b""} for i in range(60))
    dataset = index_folder(write_shards(tmp_path / "set", samples, max_samples=2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 23
    assert lines[20] == "... and 10 more shards"
    assert lines[21].startswith("not read: 1 .x")
    assert lines[22].startswith(f"{tmp_path / 'set'}: 30 samples, 0 classes, 30 shards, 30 faults")
    assert all(len(line) < 400 for line in lines)
    assert dataset.samples == len(read_rejects(tmp_path / "set")) == 30


def test_full_decodes_what_a_header_hides(tmp_path: Path):
    jpeg = encode_pil(picture(1, 300, 300), "JPEG")
    samples = [{"__key__": "good", "jpg": jpeg}, {"__key__": "cut", "jpg": jpeg[: len(jpeg) // 2]}]
    folder = write_shards(tmp_path / "set", samples)
    assert index_folder(folder, output=str(tmp_path / "quick")).samples == 2
    dataset = index_folder(folder, output=str(tmp_path / "full"), full=True)
    assert (dataset.samples, dataset.job["full"]) == (1, True)
    assert [row["key"] for row in read_rejects(tmp_path / "full")] == ["cut"]


def test_nothing_usable_is_refused_with_the_first_reason(tmp_path: Path):
    folder = write_shards(tmp_path / "set", [{"__key__": "a", "jpg": b"no"}, {"__key__": "b", "txt": "no"}])
    assert_refused(folder, errors.ExitCode.DATA, "not one sample can be used", "00000.tar", "JPEG, PNG or WebP")
    assert not (folder / "manifest.json").exists()
    assert len(read_rejects(folder)) == 1
    assert_refused(write_shards(tmp_path / "texts", [{"__key__": "b", "txt": "no"}]), errors.ExitCode.DATA, "no images")


TINY: dict[str, Any] = {"image_size": 8, "workers": 0, "lanes": 2, "shuffle_window": 2}


def color_of(number: int) -> tuple[int, int, int]:
    return 10 * number, 255 - 10 * number, number


def plain_png(color: tuple[int, int, int]) -> bytes:
    """A PNG of one color, which it keeps in any crop."""
    return encode_pil(Image.new("RGB", (9, 8), color), "PNG")


def count_trained(dataset: Manifest) -> Counter[tuple[tuple[int, ...], str | None]]:
    """How often each (color, class) came in two epochs."""
    stream = TrainingStream(dataset, Data(**TINY), seed=3, batch=dataset.samples)
    counts = Counter()
    for batch in islice(stream.batches(0, ProcessShard(0, 1, dataset.samples), CPU), 2):
        assert batch["valid"].all()
        for pixels, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            assert (pixels == pixels[:, :1, :1]).all()
            counts[tuple(pixels[:, 0, 0].tolist()), dataset.classes[label] if label >= 0 else None] += 1
    assert not stream.faults.drain()
    return counts


def resolve_sets(tmp_path: Path, *paths: Path) -> Manifest:
    """As data.train finds it."""
    return resolve_manifest(tuple(map(str, paths)), "train", tmp_path / "converted", CacheDir(tmp_path / "cache"))


def test_sets_of_different_classes_are_joined_by_name_and_trained_on(tmp_path: Path):
    """Of theirs, ours and one without classes: each sample once an epoch, under its own class's name."""
    foreign, own, bare, index_dir = (tmp_path / name for name in ("theirs", "ours", "bare", "bare-index"))
    write_shards(
        foreign,
        [{"__key__": f"k/{i}", "png": plain_png(color_of(i)), "cls": class_name(i).encode()} for i in range(COUNT)],
    )
    with pytest.raises(errors.ExitError, match=r"index them first: tools/index_shards\.py"):
        resolve_sets(tmp_path, foreign)
    index_folder(foreign)
    index_folder(
        write_shards(bare, [{"__key__": str(i), "png": plain_png((i, i, i))} for i in range(3)]), output=str(index_dir)
    )
    class_of = class_cycle(NAMES[2], "an emu", NAMES[0])
    for i in range(10, 20):
        path = tmp_path / "our-images" / class_of(i) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain_png(color_of(i)))
    build_splits(tmp_path / "our-images", own, shard_samples=3)
    expected = {(color_of(i), class_name(i)): 2 for i in range(COUNT)} | {((i, i, i), None): 2 for i in range(3)}
    expected |= {(color_of(i), class_of(i)): 2 for i in range(10, 20)}
    for paths in ((foreign, own, index_dir), (index_dir, own, foreign)):
        dataset = resolve_sets(tmp_path, *paths)
        assert dataset.classes == sorted({*NAMES, "an emu"})
        assert dataset.samples == 23
        assert count_trained(dataset) == expected
        dataset.check_shards(full=True)
        batches = EvaluationStream(dataset, Data(**TINY), batch=4).batches(ProcessShard(), CPU)
        assert sum(int(batch["valid"].sum()) for batch in batches) == 23
    tars = [*(foreign / f"0000{i}.tar" for i in range(3)), *(own / f"00000{i}.tar" for i in range(4))]
    assert {dataset.describe_shard(s) for s in range(len(dataset.shards))} == {
        str(tar) for tar in [*tars, bare / "00000.tar"]
    }
    (foreign / "00001.tar").unlink()
    with pytest.raises(errors.ExitError, match=r"1 of 8 shards are bad: 00001\.tar \(missing\)"):
        resolve_sets(tmp_path, foreign, own, index_dir).check_shards()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["shards=set"], 0, "set: 10 samples, 3 classes, 3 shards"),
        (["shards=set", "output=index", "workers=2", "full=true"], 0, "index: 10 samples, 3 classes, 3 shards"),
        (["shards=set/{00001..00003}.tar"], 0, "00003.tar: 0 of 0 samples can be used: cannot be read"),
        ([], errors.ExitCode.USAGE, "shards"),
        (["shards=set", "worker=2"], errors.ExitCode.USAGE, "workers"),
        (["shards=nowhere"], errors.ExitCode.DATA, "nowhere"),
        (["shards=set", "output=set/00000.tar"], errors.ExitCode.CANNOT_CREATE, "00000.tar"),
        (["shards=set", "output=http://127.0.0.1/x"], errors.ExitCode.USAGE, "give output=FOLDER"),
        (["--help"], 0, "label_key"),
    ],
)
def test_the_command_ends_with_its_code(folder: Path, arguments: list[str], code: int, says: str, monkeypatch: Any):
    monkeypatch.chdir(folder.parent)
    result = call_tool("index_shards", [*arguments, *(["quiet=true"] if arguments else [])])
    assert result.code == code
    assert says in (result.last_line if code else result.output)
    assert result.output.count("index_shards.py: ") == (code != 0), "one closing line"
