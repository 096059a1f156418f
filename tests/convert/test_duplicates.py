"""Equal images: between splits they are listed, within one they are counted, those of another set are left out."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.writer import TarWriter

from ssl_vit import errors
from ssl_vit.convert import make_shards
from ssl_vit.convert.index_shards import IndexShards, index_tars
from ssl_vit.convert.make_shards import MakeShards, convert_images
from ssl_vit.convert.shard_writer import DIGEST, contains_digest
from ssl_vit.data.manifest import Manifest, Shard
from tests.data.pictures import (
    build_shards,
    build_splits,
    contents,
    encode_pil,
    picture,
    read_rejects,
    read_samples,
    write_pictures,
)
from tests.data.servers import assert_refused

pytestmark = pytest.mark.usefixtures("in_process")

REASON = "it is in what exclude= names"


def copy_images(source: Path, names: dict[str, str]) -> None:
    """Copy images within a folder, to new names from old ones."""
    for new, old in names.items():
        (source / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / old, source / new)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Three splits of 4 images each, of which some are equal."""
    source = tmp_path / "in"
    write_pictures(source, [f"{split}/c/{i}.png" for split in ("train", "val", "test") for i in range(4)])
    copies = {
        "train/c/8.png": "train/c/0.png",  # within
        "train/d/9.png": "train/c/0.png",  # within, as another class
        "val/c/7.png": "val/c/1.png",
        "val/leak.png": "train/c/0.png",  # across, and twice
        "val/c/leak.png": "train/c/0.png",
        "test/c/leak.png": "train/c/0.png",
        "test/c/other.jpg": "val/c/2.png",  # under another suffix
    }
    copy_images(source, copies)
    for name in ("train/bad.png", "val/bad.png", "test/bad.png"):
        (source / name).write_bytes(b"no image")  # equal, but in no split after all
    return source


@pytest.mark.parametrize("options", [{}, {"shard_samples": 2, "workers": 2}, {"resize": 8, "quality": 50}])
def test_those_of_two_splits_are_listed_those_of_one_counted(splits: Path, tmp_path: Path, capsys: Any, options: dict):
    """By the bytes of the files, whatever is made of them."""
    manifests = build_splits(splits, tmp_path / "out", **options)
    first, second, duplicates = sha256(splits / "train/c/0.png"), sha256(splits / "val/c/2.png"), []
    for row in read_rows(tmp_path / "out" / "duplicates.jsonl"):
        digest = row.pop("sha256")
        assert {sha256(splits / path) for path in row.values()} == {digest}  # whatever path is named, it is that image
        assert all(path.startswith(f"{split}/") for split, path in row.items())
        duplicates.append((digest, *sorted(row)))
    expected = [(first, "train", "val"), (first, "test", "train"), (first, "test", "val"), (second, "test", "val")]
    assert sorted(duplicates) == sorted(expected)
    assert {split: m.job["duplicates"] for split, m in manifests.items()} == {"train": 2, "val": 2, "test": 0}
    assert {split: m.samples for split, m in manifests.items()} == {
        "train": 6,
        "val": 7,
        "test": 6,
    }  # nothing is dropped
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 images stand in two splits" in line
    assert "duplicates.jsonl" in line


def test_splits_that_share_nothing_have_no_list_and_a_set_without_splits_counts_too(tmp_path: Path, capsys: Any):
    source = write_pictures(tmp_path / "in", ["train/0.png", "val/0.png"])
    copy_images(source, {"train/1.png": "train/0.png", "train/2.png": "train/0.png"})
    manifests = build_splits(source, tmp_path / "out")
    assert not (tmp_path / "out" / "duplicates.jsonl").exists()
    assert capsys.readouterr().out == ""
    assert manifests["train"].job["duplicates"] == 2
    assert build_shards(source / "train", tmp_path / "one", shard_samples=2).job["duplicates"] == 2


# Digests as numpy sees them: it takes no zeros at the end of a string for part of it.
DIGESTS = st.lists(st.sampled_from([bytes([i]) * n + bytes(32 - n) for i in (1, 2, 255) for n in (1, 2, 31, 32)]))


@given(DIGESTS, DIGESTS, st.integers(0, 2))
def test_digests_that_end_in_zeros_are_digests(first: list[bytes], second: list[bytes], num_missing: int):
    """`none` images of each were rejected and have no digest."""
    sets = {}
    for name, digests in (("a", first), ("b", second)):
        paths = [f"{name}{i}" for i in range(len(digests) + num_missing)]
        sets[name] = (np.array([*digests, *[bytes(32)] * num_missing], DIGEST), paths)
    rows = {row["sha256"]: (row["a"], row["b"]) for row in make_shards.duplicates_across(sets)}
    assert rows == {d.hex(): (f"a{first.index(d)}", f"b{second.index(d)}") for d in set(first) & set(second)}
    assert make_shards.duplicates_within(sets["a"][0]) == len(first) - len(set(first))
    unique_digests = np.unique(np.array(first, DIGEST))
    assert all(
        contains_digest(unique_digests, digest) == (digest in first) for digest in {*first, *second, bytes([7]) * 32}
    )


SOURCE = [f"c{i % 2}/{i}.jpg" for i in range(12)]
TESTED = SOURCE[::3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """12 images, each of its own bytes."""
    return write_pictures(tmp_path / "in", SOURCE, height=40, width=50)


@pytest.fixture
def tested(source: Path, tmp_path: Path) -> Path:
    """A third of the images under other names, and others, as a downstream test set."""
    (tmp_path / "test-in").mkdir()
    (tmp_path / "test-in" / "other.png").write_bytes(encode_pil(picture(77), "PNG"))
    for number, name in enumerate(TESTED):
        shutil.copy(source / name, tmp_path / "test-in" / f"{number}.jpeg")
    return tmp_path / "test-in"


@pytest.fixture
def theirs(tested: Path, tmp_path: Path) -> str:
    """Its shards."""
    build_shards(tested, tmp_path / "test")
    return str(tmp_path / "test")


def check_left_out(manifest: Manifest) -> set[str]:
    """The images that were left out, and nothing else was."""
    assert set(read_samples(manifest)) | set(read_rejects(manifest.folder)) == set(SOURCE)
    assert manifest.samples + int(str(manifest.job["rejects"])) == len(SOURCE)
    assert set(read_rejects(manifest.folder).values()) <= {REASON}
    assert not list(manifest.folder.glob(".*"))
    return set(read_rejects(manifest.folder))


@pytest.mark.parametrize("first", [{}, {"resize": 16}], ids=["original bytes", "shrunk"])
@pytest.mark.parametrize("then", [{}, {"resize": 20, "shard_samples": 4, "workers": 2}])
def test_what_a_set_of_ours_holds_is_left_out(source: Path, tested: Path, tmp_path: Path, first: dict, then: dict):
    """Also where both were shrunk in different ways: the JSON members say which files they were made from."""
    build_shards(tested, tmp_path / "test", shard_samples=2, **first)
    assert check_left_out(build_shards(source, tmp_path / "out", exclude=(str(tmp_path / "test"),), **then)) == set(
        TESTED
    )


def test_several_test_sets_are_left_out_together(source: Path, theirs: str, tmp_path: Path):
    """One of them an original of which the input is a copy that we shrank: it is found by its own bytes."""
    write_pictures(tmp_path / "b-in", ["x.png"])
    shutil.copy(source / SOURCE[1], tmp_path / "b-in" / "y.jpg")
    build_shards(tmp_path / "b-in", tmp_path / "b", resize=16)
    manifest = build_shards(source, tmp_path / "out", exclude=(theirs, str(tmp_path / "b")))
    assert check_left_out(manifest) == {*TESTED, SOURCE[1]}


@pytest.mark.parametrize("style", ["webdataset", "img2dataset"])
def test_what_foreign_shards_hold_is_left_out(source: Path, tested: Path, tmp_path: Path, style: str):
    """By the images' bytes; or, where img2dataset shrank them, by the sha256 of the download in its JSON."""
    (tmp_path / "test").mkdir()
    with TarWriter(str(tmp_path / "test" / "00000.tar")) as writer:
        for number, path in enumerate(sorted(tested.iterdir())):
            fields: dict[str, Any] = {path.suffix[1:]: path.read_bytes(), "cls": number}
            if style == "img2dataset":
                small = encode_pil(Image.open(path).convert("RGB").resize((8, 8)), "JPEG")
                fields = {"jpg": small, "json": {"key": f"{number:09d}", "sha256": sha256(path)}}
            writer.write({"__key__": f"{number:09d}", "txt": "a picture", **fields})
    index_tars(IndexShards(shards=str(tmp_path / "test"), quiet=True, workers=1))
    assert check_left_out(build_shards(source, tmp_path / "out", exclude=(str(tmp_path / "test"),))) == set(TESTED)


def test_an_image_with_json_that_says_nonsense_is_found_by_its_bytes(source: Path, tmp_path: Path):
    """Not a dictionary, not hexadecimal, too short, too long: none of it is a digest, and none stops the work."""
    (tmp_path / "test").mkdir()
    json_texts = [
        b"[1]",
        b'{"sha256": 3}',
        b'{"sha256": "xyz"}',
        b'{"sha256": "abcd"}',
        b"{",
        b'{"sha256": "' + b"0" * 66,
    ]
    with TarWriter(str(tmp_path / "test" / "0.tar"), encoder=False) as writer:
        for number, text in enumerate(json_texts):
            data = (source / SOURCE[number]).read_bytes()
            writer.write({"__key__": str(number), "jpg": data, "json": text})
    shard = Shard(name="0.tar", samples=len(json_texts), bytes=0, sha256="", index_sha256="")
    assert len(make_shards.content_digests([Manifest(tmp_path / "test", {}, [], [shard])], 1)) == len(json_texts)


def test_another_exclude_is_another_job(source: Path, tested: Path, theirs: str, tmp_path: Path):
    """A finished output is kept; the same images in other shards, or in splits, are the same job."""
    manifest = build_shards(source, tmp_path / "out", exclude=(theirs,))
    files = contents(tmp_path / "out")
    again, splits, more = (str(tmp_path / name) for name in ("again", "splits", "more"))
    build_shards(tested, Path(again), seed=3, shard_samples=1)
    build_splits(tested, Path(splits), val_fraction=0.5)
    build_shards(write_pictures(tmp_path / "more-in", ["z.png"]), Path(more))
    for equal_exclude in ((theirs,), (again,), (again, theirs), (splits,)):
        assert build_shards(source, tmp_path / "out", exclude=equal_exclude) == manifest
        assert contents(tmp_path / "out") == files
    for other_exclude in ((), (more,), (theirs, more)):
        line = assert_refused(
            lambda other_exclude=other_exclude: build_shards(source, tmp_path / "out", exclude=other_exclude),
            errors.ExitCode.CANNOT_CREATE,
        )
        assert "exclude" in line.partition("another job")[2]
    after = contents(tmp_path / "out")
    assert {name: data for name, data in after.items() if not name.startswith(".exclude-")} == files


def test_a_refused_exclude_leaves_nothing_behind(source: Path, theirs: str, tmp_path: Path):
    """In an output of another job, of another use, and of a job that has begun, which it does not go on with."""
    build_shards(source, tmp_path / "another job")
    (tmp_path / "use").mkdir()
    (tmp_path / "use" / "thesis.tex").write_text("precious")
    for output in (tmp_path / "another job", tmp_path / "use"):
        files = contents(output)
        with pytest.raises(errors.ExitError, match="name another output"):
            build_shards(source, output, exclude=(theirs,))
        assert contents(output) == files

    options = {"input": str(source), "output": str(tmp_path / "out"), "shard_samples": 4, "workers": 1, "quiet": True}
    assert convert_images(MakeShards(**options), 0, 2) == {}
    for exclude in (theirs, str(tmp_path / "gone")):
        with pytest.raises(errors.ExitError):
            convert_images(MakeShards(**options, exclude=(exclude,)), 1, 2)
    assert convert_images(MakeShards(**options), 1, 2)[""].samples == len(SOURCE)
    assert not [name for name in contents(tmp_path / "out") if "exclude" in name]


def test_several_processes_and_splits_leave_out_the_same(source: Path, theirs: str, tmp_path: Path):
    manifests = build_splits(source, tmp_path / "splits", val_fraction=0.4, exclude=(theirs,))
    assert {*read_rejects(manifests["train"].folder), *read_rejects(manifests["val"].folder)} == set(TESTED)
    assert sum(m.samples for m in manifests.values()) == len(SOURCE) - len(TESTED)
    assert not [name for name in contents(tmp_path / "splits") if "exclude" in name]

    options: dict[str, Any] = {"shard_samples": 3, "exclude": (theirs,)}
    build_shards(source, tmp_path / "whole", **options)
    job = MakeShards(input=str(source), output=str(tmp_path / "out"), workers=1, quiet=True, **options)
    results = [convert_images(job, rank, 3) for rank in (2, 0, 1)]
    assert results[:2] == [{}, {}]
    assert check_left_out(results[2][""]) == set(TESTED)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("gone", "no such folder"),
        ("images", "convert the images"),
        ("cut", "000000.tar"),  # else its images would be trained on, and nobody would know
        ("without a tar", "000000.tar"),
        ("all", REASON),
    ],
)
def test_a_set_that_cannot_be_left_out_is_refused(source: Path, theirs: str, tmp_path: Path, what: str, says: str):
    if what == "cut":
        os.truncate(Path(theirs) / "000000.tar", 5000)
    elif what == "without a tar":
        (Path(theirs) / "000000.tar").unlink()
    build_shards(source, tmp_path / "all", resize=8)
    exclude = {"gone": str(tmp_path / "gone"), "images": str(source), "all": str(tmp_path / "all")}.get(what, theirs)
    assert says in assert_refused(
        lambda: build_shards(source, tmp_path / "out", exclude=(exclude,)), errors.ExitCode.DATA
    )
    assert not (tmp_path / "out" / "manifest.json").exists()
