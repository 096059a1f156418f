"""Tars that others wrote, damaged or hostile: every good sample is had, the rest counted, and nothing is executed.

One table of odd members against the walk, the indexer and webdataset's stream.
"""

import gc
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssl_vit import errors
from ssl_vit.convert.index_shards import IndexShards, Scan, index, scan
from ssl_vit.data import webdataset_stream as module
from ssl_vit.data.cache import Store
from ssl_vit.data.dataset import Data, Faults
from ssl_vit.data.loader import EvaluationStream, Share, TrainingStream
from ssl_vit.data.manifest import Manifest, load
from ssl_vit.data.tar import Damage, Member, walk
from ssl_vit.data.webdataset_stream import BUFFER, SequentialStream, tars
from ssl_vit.model import Batch
from tests.data import damage
from tests.data.damage import ALL, CPU, END, GOOD, MB, PIECES, SMALL, STARTS, THEIRS, Odd, member, sample, within
from tests.data.pictures import contents, encoded, picture

HALF = len(PIECES) // 2
IMAGES = PIECES[::3]


@pytest.fixture(autouse=True)
def nothing_is_executed_or_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in an empty folder, and leaves it empty."""
    (tmp_path / "deep" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "here")
    monkeypatch.setattr(module, "BUFFER", 30)  # else tars of six would be read two hundred times for a first sample
    yield
    assert contents(tmp_path / "deep") == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For tars."""
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def kept(path: Path, data: bytes) -> tuple[dict[bytes, Any], Scan]:
    """Image -> class of the samples of a tar, and what else was seen in it."""
    path.write_bytes(data)
    found = scan(path, path.name)
    return {data[offset : offset + size]: label for offset, size, label, _ in found.rows}, found


def indexed(folder: Path, workers: int = 1) -> Manifest | errors.Refusal:
    """The shards in a folder, or why they cannot be used, in one line."""
    try:
        with within():
            return index(IndexShards(shards=str(folder), workers=workers, quiet=True))
    except errors.Refusal as refusal:
        said = refusal
    assert str(said).isprintable()
    return said


def sequential(folder: Path, batches: int = 20) -> tuple[list[Batch], Faults]:
    """The first batches of four that webdataset gives of the tars in a folder."""
    gc.freeze()  # so that the collection below looks at what is new only
    try:
        with within():
            stream = SequentialStream(tars((str(folder),), Store()), Data(**SMALL), seed=0, batch=4)
            return list(itertools.islice(stream.batches(0, Share(0, 1, 4), CPU), batches)), stream.faults
    finally:
        gc.collect()  # webdataset leaves its files to it
        gc.unfreeze()


def seen(batches: list[Batch]) -> set[int]:
    """Which of the good images came, told by their red."""
    red = [image[0].float().mean() for batch in batches for image in batch["image"][batch["valid"]]]
    return {round(float(mean) / 40) for mean in red}


def test_every_broken_header_costs_its_own_sample_only(tmp_path: Path):
    """The standard library, and so webdataset, takes it for the end, without a word.

    A sample that lost its class is not kept without one: it would train, and be judged, on nothing.
    """
    whole, found = kept(tmp_path / "a.tar", THEIRS)
    assert (whole, found.rejects) == (ALL, [])
    for place, (name, _) in enumerate(damage.NAMED):
        others = {image: label for image, label in ALL.items() if image != GOOD[place // 3]}
        for spot in (0, 124, 148, 257):
            left, found = kept(tmp_path / "a.tar", damage.flipped(THEIRS, STARTS[place] + spot, bit=0))
            assert others.items() <= left.items(), name
            assert left.keys() <= ALL.keys()
            assert found.rejects[0]["reason"].startswith(f"at byte {STARTS[place]}: a damaged header")
            if not name.endswith(".json") and place != 1:  # a tar of one sample could be one of a set without classes
                assert left == others
            if name.endswith(".cls") and place > 1:
                assert len(found.rows) + sum(bool(reject["key"]) for reject in found.rejects) == len(GOOD)
                cut = kept(tmp_path / "a.tar", THEIRS[: STARTS[place]])[0]
                assert cut == {image: label for image, label in ALL.items() if image in GOOD[: place // 3]}


def test_a_flipped_bit_of_one_class_leaves_the_numbers_of_the_others(folder: Path):
    """Text among numbers must not turn all of them into names, which are sorted as names are."""
    labels = [str(number).encode() for number in range(12)]
    labels[5] = bytes([labels[5][0] ^ 64])
    parts = [sample(f"{number:03d}", encoded(picture(number), "PNG"), label) for number, label in enumerate(labels)]
    (folder / "a.tar").write_bytes(b"".join(parts) + END)
    theirs = indexed(folder)
    assert isinstance(theirs, Manifest) or theirs.code == errors.DATA
    if isinstance(theirs, Manifest):
        assert [label for label in theirs.labels.tolist() if label >= 0] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("odd", [pytest.param(odd, id=odd.name) for odd in damage.odd_members()])
def test_odd_members_cost_no_good_sample_and_are_counted(folder: Path, capsys: pytest.CaptureFixture[str], odd: Odd):
    """Neither in the walk, nor in the index and what trains on it, nor in webdataset's stream."""
    with within():
        left, found = kept(folder / "a.tar", b"".join([*PIECES[:HALF], odd.data, *PIECES[HALF:], END]))
        walked = list(walk(folder / "a.tar"))
    starts = [*STARTS[:HALF], *(start + len(odd.data) for start in STARTS[HALF:-1])]
    wanted = [Member(name, start + 512, len(data)) for (name, data), start in zip(damage.NAMED, starts, strict=True)]
    assert [item for item in walked if item in wanted] == wanted
    assert not [item for item in walked if isinstance(item, Member) and item.name == "inner.jpg"]
    assert any(isinstance(item, Damage) for item in walked) == odd.damage

    assert ALL.keys() <= left.keys()
    assert len(found.rows) - len(ALL) == odd.good or odd.good < 0
    assert len(found.rejects) + found.ignored.total() + len(found.rows) > len(ALL), "it is not counted"
    assert all(len(reject["key"]) <= 210 for reject in found.rejects)
    theirs = indexed(folder)
    assert isinstance(theirs, Manifest)
    assert theirs.samples == sum(not isinstance(label, str) for _, _, label, _ in found.rows)  # among numbers
    said = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert all(line.startswith(("a.tar: ", "not read: ", f"{folder}: ")) for line in said.splitlines())
    assert len(said) < 1000
    stream = TrainingStream(theirs, Data(**SMALL), seed=0, batch=theirs.samples)
    batch = next(stream.batches(0, Share(0, 1, theirs.samples), CPU))
    assert stream.faults.take() == []
    assert bool(batch["valid"].all())
    files = sorted(path.name for path in folder.iterdir() if path.name != "rejects.jsonl")
    assert files == ["a.npy", "a.tar", "manifest.json"]

    batches, faults = sequential(folder, batches=12)
    assert all(bool(batch["valid"].all()) for batch in batches)
    assert seen(batches) >= set(range(6))
    assert faults.fatal is None
    assert all(f.reason.startswith(f"{folder}/a.tar: ") and f.reason.isprintable() for f in faults.take())

    if "name with" in odd.name:
        (folder / "a.tar").write_bytes(odd.data + END)
        indexed(folder)  # which may refuse it, in one line


@pytest.mark.parametrize("name", ["caf\udce9.tar", "a\nb.tar", "-x.tar", "$(touch canary).tar", "ä ö.tar"])
def test_a_shard_of_an_odd_name_is_indexed_or_refused_in_one_line(folder: Path, name: str):
    (folder / name).write_bytes(THEIRS)
    theirs = indexed(folder)
    if isinstance(theirs, Manifest):
        assert load(folder).samples == theirs.samples == 6
        stream = EvaluationStream(load(folder), Data(**SMALL), batch=6)
        assert all(bool(batch["valid"].all()) for batch in stream.batches(Share(), CPU))
        assert stream.faults.take() == []


def test_webdataset_names_the_tar_in_which_a_bad_image_lies(folder: Path):
    """Not the one that is being read when the image's turn comes."""
    for name, bad in (("a", member("x.jpg", b"bad")), ("b", b""), ("c", b"")):
        (folder / f"{name}.tar").write_bytes(b"".join([*IMAGES, bad]) + END)
    _, faults = sequential(folder)
    assert faults.fresh
    assert all("a.tar" in fault.reason for fault in faults.fresh)


def test_webdataset_streams_every_image_of_tars_whose_keys_have_dots(folder: Path):
    """As in ImageNet's val.00001.JPEG, which webdataset takes for one sample of many images."""
    parts = [member(f"val.{n:05d}.JPEG", image) for n, image in enumerate(GOOD)]
    (folder / "a.tar").write_bytes(b"".join(parts) + END)
    assert seen(sequential(folder)[0]) == set(range(6))


def test_what_is_no_tar_among_shards_is_named_and_costs_no_other(folder: Path, capsys: pytest.CaptureFixture[str]):
    for kind, data in damage.NO_TARS.items():
        (folder / f"{kind}.tar").write_bytes(data)
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    (folder / "link.tar").symlink_to("nowhere")
    bad = {path.name for path in folder.glob("*.tar")}
    (folder / "zeros.tar").write_bytes(damage.NO_IMAGES["zeros"])  # a tar of nothing
    (folder / "a.tar").write_bytes(THEIRS)
    theirs = indexed(folder, workers=2)
    assert isinstance(theirs, Manifest)
    assert [(shard.name, shard.samples) for shard in theirs.shards] == [("a.tar", 6)]
    named = {json.loads(line)["shard"] for line in (folder / "rejects.jsonl").read_text().splitlines()}
    said = capsys.readouterr().out
    assert bad <= named
    assert all(f"{name}: 0 of 0 samples can be used: " in said for name in bad)

    batches, faults = sequential(folder, batches=12)
    assert seen(batches) == set(range(6))
    assert faults.fatal is None
    said = capsys.readouterr().out + "".join(fault.reason for fault in faults.take())
    assert all(f"{name}: " in said for name in bad)

    (folder / "a.tar").unlink()
    refusal = indexed(folder, workers=2)
    assert isinstance(refusal, errors.Refusal)
    assert refusal.code == errors.DATA
    assert "not one sample can be used" in str(refusal)


@pytest.mark.parametrize("kind", [*damage.NO_TARS, *damage.NO_IMAGES, "images without a key"])
def test_where_there_is_nothing_to_stream_or_index_it_ends(folder: Path, kind: str):
    """Never an endless loop: one line, and the code of bad data."""
    tables = {**damage.NO_TARS, **damage.NO_IMAGES, "images without a key": member(".png", GOOD[1]) + END}
    for name in "ab":
        (folder / f"{name}.tar").write_bytes(tables[kind])
    _, faults = sequential(folder, batches=1)
    assert faults.fatal is not None
    assert faults.fatal.code == errors.DATA
    assert "\n" not in str(faults.fatal)
    theirs = indexed(folder)
    assert kind == "images without a key" or (isinstance(theirs, errors.Refusal) and theirs.code == errors.DATA)


def heavy(path: Path, kind: str, size: int) -> None:
    """A tar of little on this disk with good images and members of this size, which are holes."""
    types = {"an extended header": tarfile.XHDTYPE, "a long name": tarfile.GNUTYPE_LONGNAME}
    with path.open("wb") as file:
        file.write(b"".join(PIECES) + member("y.jpg", GOOD[0]))
        for name in ("x0.jpg", "x1.jpg") if kind == "large images" else (kind,):
            file.write(member(name, kind=types.get(kind, tarfile.REGTYPE), size=size))
            file.truncate(file.seek(size, os.SEEK_CUR))
        file.write(END)
    if kind == "a gzip":
        path.write_bytes(damage.gzip_that_says_ustar(b"".join(IMAGES) + member("x.jpg", bytes(size)) + END))
    elif kind == "a sparse file":
        path.write_bytes(b"".join([*IMAGES[:3], damage.sparse_bomb(size), *IMAGES[3:], END]))


@pytest.mark.parametrize("kind", ["y.cls", "y.json", "large images", "an extended header", "a long name", "a gzip"])
def test_the_memory_of_a_scan_is_bounded(tmp_path: Path, kind: str):
    heavy(tmp_path / "a.tar", kind, (300 if kind == "large images" else 120) * MB)
    assert damage.growth(lambda: scan(tmp_path / "a.tar", "a.tar")) < 60 * MB


@pytest.mark.parametrize("kind", ["a gzip", "a sparse file", "large images"])
def test_the_memory_of_webdataset_is_bounded(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """It keeps a thousand samples to shuffle, of whatever size."""
    monkeypatch.setattr(module, "BUFFER", BUFFER)
    heavy(folder / "a.tar", kind, 50 * MB)
    assert damage.growth(lambda: sequential(folder, batches=4)) < 400 * MB
