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
from ssl_vit.convert.index_shards import IndexShards, Scan, index_tars, scan_tar
from ssl_vit.data import webdataset_stream as module
from ssl_vit.data.cache import CacheDir
from ssl_vit.data.dataset import Data, Faults
from ssl_vit.data.loader import EvaluationStream, ProcessShard, TrainingStream
from ssl_vit.data.manifest import Manifest, load
from ssl_vit.data.tar import Damage, Member, iter_members
from ssl_vit.data.webdataset_stream import BUFFER, SequentialStream, list_tars
from ssl_vit.model import Batch
from tests.data import damage
from tests.data.damage import (
    CPU,
    MB,
    MEMBER_BYTES,
    MEMBER_STARTS,
    SAMPLE_IMAGES,
    SAMPLE_LABELS,
    SAMPLE_TAR,
    SMALL,
    TAR_END,
    OddMember,
    tar_member,
    tar_sample,
    time_limit,
)
from tests.data.pictures import contents, encode_pil, picture

HALF = len(MEMBER_BYTES) // 2
IMAGES = MEMBER_BYTES[::3]


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


def scan_bytes(path: Path, data: bytes) -> tuple[dict[bytes, Any], Scan]:
    """Image -> class of the samples of a tar, and what else was seen in it."""
    path.write_bytes(data)
    scan = scan_tar(path, path.name)
    return {data[offset : offset + size]: label for offset, size, label, _ in scan.rows}, scan


def index_folder(folder: Path, workers: int = 1) -> Manifest | errors.ExitError:
    """The shards in a folder, or why they cannot be used, in one line."""
    try:
        with time_limit():
            return index_tars(IndexShards(shards=str(folder), workers=workers, quiet=True))
    except errors.ExitError as refusal:
        error = refusal
    assert str(error).isprintable()
    return error


def stream_folder(folder: Path, batches: int = 20) -> tuple[list[Batch], Faults]:
    """The first batches of four that webdataset gives of the tars in a folder."""
    gc.freeze()  # so that the collection below looks at what is new only
    try:
        with time_limit():
            stream = SequentialStream(list_tars((str(folder),), CacheDir()), Data(**SMALL), seed=0, batch=4)
            return list(itertools.islice(stream.batches(0, ProcessShard(0, 1, 4), CPU), batches)), stream.faults
    finally:
        gc.collect()  # webdataset leaves its files to it
        gc.unfreeze()


def image_numbers(batches: list[Batch]) -> set[int]:
    """Which of the good images came, told by their red."""
    red_means = [image[0].float().mean() for batch in batches for image in batch["image"][batch["valid"]]]
    return {round(float(mean) / 40) for mean in red_means}


def test_every_broken_header_costs_its_own_sample_only(tmp_path: Path):
    """The standard library, and so webdataset, takes it for the end, without a word.

    A sample that lost its class is not kept without one: it would train, and be judged, on nothing.
    """
    labels, scan = scan_bytes(tmp_path / "a.tar", SAMPLE_TAR)
    assert (labels, scan.rejects) == (SAMPLE_LABELS, [])
    for position, (name, _) in enumerate(damage.SAMPLE_MEMBERS):
        expected = {image: label for image, label in SAMPLE_LABELS.items() if image != SAMPLE_IMAGES[position // 3]}
        for spot in (0, 124, 148, 257):
            actual, scan = scan_bytes(
                tmp_path / "a.tar", damage.flip_bits(SAMPLE_TAR, MEMBER_STARTS[position] + spot, bit=0)
            )
            assert expected.items() <= actual.items(), name
            assert actual.keys() <= SAMPLE_LABELS.keys()
            assert scan.rejects[0]["reason"].startswith(f"at byte {MEMBER_STARTS[position]}: a damaged header")
            if (
                not name.endswith(".json") and position != 1
            ):  # a tar of one sample could be one of a set without classes
                assert actual == expected
            if name.endswith(".cls") and position > 1:
                assert len(scan.rows) + sum(bool(reject["key"]) for reject in scan.rejects) == len(SAMPLE_IMAGES)
                truncated = scan_bytes(tmp_path / "a.tar", SAMPLE_TAR[: MEMBER_STARTS[position]])[0]
                assert truncated == {
                    image: label for image, label in SAMPLE_LABELS.items() if image in SAMPLE_IMAGES[: position // 3]
                }


def test_a_flipped_bit_of_one_class_leaves_the_numbers_of_the_others(folder: Path):
    """Text among numbers must not turn all of them into names, which are sorted as names are."""
    labels = [str(number).encode() for number in range(12)]
    labels[5] = bytes([labels[5][0] ^ 64])
    parts = [
        tar_sample(f"{number:03d}", encode_pil(picture(number), "PNG"), label) for number, label in enumerate(labels)
    ]
    (folder / "a.tar").write_bytes(b"".join(parts) + TAR_END)
    manifest = index_folder(folder)
    assert isinstance(manifest, Manifest) or manifest.code == errors.ExitCode.DATA
    if isinstance(manifest, Manifest):
        assert [label for label in manifest.labels.tolist() if label >= 0] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("odd", [pytest.param(odd, id=odd.name) for odd in damage.odd_members()])
def test_odd_members_cost_no_good_sample_and_are_counted(
    folder: Path, capsys: pytest.CaptureFixture[str], odd: OddMember
):
    """Neither in the walk, nor in the index and what trains on it, nor in webdataset's stream."""
    with time_limit():
        labels, scan = scan_bytes(
            folder / "a.tar", b"".join([*MEMBER_BYTES[:HALF], odd.data, *MEMBER_BYTES[HALF:], TAR_END])
        )
        items = list(iter_members(folder / "a.tar"))
    starts = [*MEMBER_STARTS[:HALF], *(start + len(odd.data) for start in MEMBER_STARTS[HALF:-1])]
    expected = [
        Member(name, start + 512, len(data)) for (name, data), start in zip(damage.SAMPLE_MEMBERS, starts, strict=True)
    ]
    assert [item for item in items if item in expected] == expected
    assert not [item for item in items if isinstance(item, Member) and item.name == "inner.jpg"]
    assert any(isinstance(item, Damage) for item in items) == odd.damage

    assert SAMPLE_LABELS.keys() <= labels.keys()
    assert len(scan.rows) - len(SAMPLE_LABELS) == odd.good or odd.good < 0
    assert len(scan.rejects) + scan.ignored.total() + len(scan.rows) > len(SAMPLE_LABELS), "it is not counted"
    assert all(len(reject["key"]) <= 210 for reject in scan.rejects)
    manifest = index_folder(folder)
    assert isinstance(manifest, Manifest)
    assert manifest.samples == sum(not isinstance(label, str) for _, _, label, _ in scan.rows)  # among numbers
    output = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in output)
    assert all(line.startswith(("a.tar: ", "not read: ", f"{folder}: ")) for line in output.splitlines())
    assert len(output) < 1000
    stream = TrainingStream(manifest, Data(**SMALL), seed=0, batch=manifest.samples)
    batch = next(stream.batches(0, ProcessShard(0, 1, manifest.samples), CPU))
    assert stream.faults.drain() == []
    assert bool(batch["valid"].all())
    files = sorted(path.name for path in folder.iterdir() if path.name != "rejects.jsonl")
    assert files == ["a.npy", "a.tar", "manifest.json"]

    batches, faults = stream_folder(folder, batches=12)
    assert all(bool(batch["valid"].all()) for batch in batches)
    assert image_numbers(batches) >= set(range(6))
    assert faults.fatal is None
    assert all(f.reason.startswith(f"{folder}/a.tar: ") and f.reason.isprintable() for f in faults.drain())

    if "name with" in odd.name:
        (folder / "a.tar").write_bytes(odd.data + TAR_END)
        index_folder(folder)  # which may refuse it, in one line


@pytest.mark.parametrize("name", ["caf\udce9.tar", "a\nb.tar", "-x.tar", "$(touch canary).tar", "ä ö.tar"])
def test_a_shard_of_an_odd_name_is_indexed_or_refused_in_one_line(folder: Path, name: str):
    (folder / name).write_bytes(SAMPLE_TAR)
    manifest = index_folder(folder)
    if isinstance(manifest, Manifest):
        assert load(folder).samples == manifest.samples == 6
        stream = EvaluationStream(load(folder), Data(**SMALL), batch=6)
        assert all(bool(batch["valid"].all()) for batch in stream.batches(ProcessShard(), CPU))
        assert stream.faults.drain() == []


def test_webdataset_names_the_tar_in_which_a_bad_image_lies(folder: Path):
    """Not the one that is being read when the image's turn comes."""
    for name, bad in (("a", tar_member("x.jpg", b"bad")), ("b", b""), ("c", b"")):
        (folder / f"{name}.tar").write_bytes(b"".join([*IMAGES, bad]) + TAR_END)
    _, faults = stream_folder(folder)
    assert faults.pending
    assert all("a.tar" in fault.reason for fault in faults.pending)


def test_webdataset_streams_every_image_of_tars_whose_keys_have_dots(folder: Path):
    """As in ImageNet's val.00001.JPEG, which webdataset takes for one sample of many images."""
    parts = [tar_member(f"val.{n:05d}.JPEG", image) for n, image in enumerate(SAMPLE_IMAGES)]
    (folder / "a.tar").write_bytes(b"".join(parts) + TAR_END)
    assert image_numbers(stream_folder(folder)[0]) == set(range(6))


def test_what_is_no_tar_among_shards_is_named_and_costs_no_other(folder: Path, capsys: pytest.CaptureFixture[str]):
    for kind, data in damage.NOT_TARS.items():
        (folder / f"{kind}.tar").write_bytes(data)
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    (folder / "link.tar").symlink_to("nowhere")
    bad = {path.name for path in folder.glob("*.tar")}
    (folder / "zeros.tar").write_bytes(damage.TARS_WITHOUT_IMAGES["zeros"])  # a tar of nothing
    (folder / "a.tar").write_bytes(SAMPLE_TAR)
    manifest = index_folder(folder, workers=2)
    assert isinstance(manifest, Manifest)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a.tar", 6)]
    rejected = {json.loads(line)["shard"] for line in (folder / "rejects.jsonl").read_text().splitlines()}
    output = capsys.readouterr().out
    assert bad <= rejected
    assert all(f"{name}: 0 of 0 samples can be used: " in output for name in bad)

    batches, faults = stream_folder(folder, batches=12)
    assert image_numbers(batches) == set(range(6))
    assert faults.fatal is None
    output = capsys.readouterr().out + "".join(fault.reason for fault in faults.drain())
    assert all(f"{name}: " in output for name in bad)

    (folder / "a.tar").unlink()
    refusal = index_folder(folder, workers=2)
    assert isinstance(refusal, errors.ExitError)
    assert refusal.code == errors.ExitCode.DATA
    assert "not one sample can be used" in str(refusal)


@pytest.mark.parametrize("kind", [*damage.NOT_TARS, *damage.TARS_WITHOUT_IMAGES, "images without a key"])
def test_where_there_is_nothing_to_stream_or_index_it_ends(folder: Path, kind: str):
    """Never an endless loop: one line, and the code of bad data."""
    tables = {
        **damage.NOT_TARS,
        **damage.TARS_WITHOUT_IMAGES,
        "images without a key": tar_member(".png", SAMPLE_IMAGES[1]) + TAR_END,
    }
    for name in "ab":
        (folder / f"{name}.tar").write_bytes(tables[kind])
    _, faults = stream_folder(folder, batches=1)
    assert faults.fatal is not None
    assert faults.fatal.code == errors.ExitCode.DATA
    assert "\n" not in str(faults.fatal)
    manifest = index_folder(folder)
    assert kind == "images without a key" or (
        isinstance(manifest, errors.ExitError) and manifest.code == errors.ExitCode.DATA
    )


def write_heavy_tar(path: Path, kind: str, size: int) -> None:
    """A tar of little on this disk with good images and members of this size, which are holes."""
    types = {"an extended header": tarfile.XHDTYPE, "a long name": tarfile.GNUTYPE_LONGNAME}
    with path.open("wb") as file:
        file.write(b"".join(MEMBER_BYTES) + tar_member("y.jpg", SAMPLE_IMAGES[0]))
        for name in ("x0.jpg", "x1.jpg") if kind == "large images" else (kind,):
            file.write(tar_member(name, kind=types.get(kind, tarfile.REGTYPE), size=size))
            file.truncate(file.seek(size, os.SEEK_CUR))
        file.write(TAR_END)
    if kind == "a gzip":
        path.write_bytes(damage.gzip_that_says_ustar(b"".join(IMAGES) + tar_member("x.jpg", bytes(size)) + TAR_END))
    elif kind == "a sparse file":
        path.write_bytes(b"".join([*IMAGES[:3], damage.sparse_bomb(size), *IMAGES[3:], TAR_END]))


@pytest.mark.parametrize("kind", ["y.cls", "y.json", "large images", "an extended header", "a long name", "a gzip"])
def test_the_memory_of_a_scan_is_bounded(tmp_path: Path, kind: str):
    write_heavy_tar(tmp_path / "a.tar", kind, (300 if kind == "large images" else 120) * MB)
    assert damage.memory_growth(lambda: scan_tar(tmp_path / "a.tar", "a.tar")) < 60 * MB


@pytest.mark.parametrize("kind", ["a gzip", "a sparse file", "large images"])
def test_the_memory_of_webdataset_is_bounded(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """It keeps a thousand samples to shuffle, of whatever size."""
    monkeypatch.setattr(module, "BUFFER", BUFFER)
    write_heavy_tar(folder / "a.tar", kind, 50 * MB)
    assert damage.memory_growth(lambda: stream_folder(folder, batches=4)) < 400 * MB
