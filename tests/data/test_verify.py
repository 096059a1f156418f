"""Shards against their manifest: every bad one named, and of each how many samples can still be read."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import make, one, write_pictures

from ssl_vit import exits
from ssl_vit.data import verify as module
from ssl_vit.data.foreign import IndexShards, index
from ssl_vit.data.manifest import Manifest, join, load
from ssl_vit.data.verify import Found, VerifyShards, readable, verify

SAMPLES = 10  # a shard
USUAL = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three shards of ten samples in two classes."""
    folder = tmp_path_factory.mktemp("whole")
    names = [f"{'ab'[number % 2]}/{number}.{'png' if number % 3 else 'jpg'}" for number in range(3 * SAMPLES)]
    return one(write_pictures(folder / "in", names), folder / "out", shard_samples=SAMPLES)


@pytest.fixture
def made(whole: Manifest, tmp_path: Path) -> Manifest:
    """A copy of them, to break."""
    shutil.copytree(whole.folder, tmp_path / "set")
    return load(tmp_path / "set")


def tar(made: Manifest, shard: int = 1) -> Path:
    return made.folder / made.shards[shard].name


def states(made: Manifest, full: bool = True, **options: object) -> list[Found]:
    return verify(VerifyShards(shards=(str(made.folder),), full=full, quiet=True, **options))  # type: ignore[arg-type]


def bad(made: Manifest, full: bool = True) -> list[tuple[str, int, str | None]]:
    """Name, readable samples and fault of the shards that are not whole."""
    return [(Path(one.shard).name, one.readable, one.fault) for one in states(made, full) if one.fault]


def spoil(made: Manifest, shard: int, samples: list[int]) -> None:
    """Flip a bit in the image of each of these samples."""
    data = bytearray(tar(made, shard).read_bytes())
    for row in made.index(shard)[samples]:
        data[int(row["offset"]) + int(row["size"]) // 2] ^= 4
    tar(made, shard).write_bytes(data)


@pytest.mark.parametrize("full", [False, True])
def test_whole_shards_are_found_whole(made: Manifest, full: bool):
    wanted = [Found(str(made.folder / f"00000{n}.tar"), SAMPLES, SAMPLES, None) for n in range(3)]
    assert states(made, full) == wanted


def test_five_of_ten_are_readable(made: Manifest):
    spoil(made, 1, [0, 3, 4, 7, 9])
    assert bad(made, full=False) == []  # the size is right: only the digest tells
    assert bad(made) == [("000001.tar", 5, "altered")]


def test_every_kind_of_bad_shard_is_named_in_order(made: Manifest):
    row = made.index(0)[6]
    os.truncate(tar(made, 0), int(row["offset"]) + 10)
    tar(made, 1).unlink()
    with tar(made, 2).open("ab") as file:
        file.write(b"more")
    sizes = [shard.bytes for shard in made.shards]
    wanted = [
        ("000000.tar", 6, f"{row['offset'] + 10} bytes, not {sizes[0]}"),
        ("000001.tar", 0, "missing"),
        ("000002.tar", 10, f"{sizes[2] + 4} bytes, not {sizes[2]}"),
    ]
    assert bad(made, full=False) == bad(made, full=True) == wanted
    assert states(made, workers=1) == states(made, workers=2)


@pytest.mark.parametrize("kind", ["folder", "pipe", "dead link", "nothing in it"])
def test_what_is_no_file_is_named_and_does_not_block(made: Manifest, kind: str):
    tar(made).unlink()
    match kind:
        case "folder":
            tar(made).mkdir()
        case "pipe":
            os.mkfifo(tar(made))
        case "dead link":
            tar(made).symlink_to("nowhere")
        case _:
            tar(made).touch()
    ((name, left, fault),) = bad(made)
    assert (name, left) == ("000001.tar", 0)
    assert fault == (f"0 bytes, not {made.shards[1].bytes}" if kind == "nothing in it" else "missing")


def test_another_shard_in_its_place_is_named(made: Manifest):
    tar(made).write_bytes(tar(made, 0).read_bytes().ljust(made.shards[1].bytes, b"\0")[: made.shards[1].bytes])
    ((name, left, fault),) = bad(made)
    assert (name, fault) == ("000001.tar", "altered")
    assert left == 0


@pytest.mark.parametrize("kind", ["gone", "of other labels", "short", "garbage"])
def test_a_bad_index_is_named(made: Manifest, kind: str):
    path = tar(made).with_suffix(".npy")
    rows = np.load(path)
    match kind:
        case "gone":
            path.unlink()
        case "of other labels":
            rows["label"] = rows["label"][::-1].copy() ^ 1
            np.save(path, rows)
        case "short":
            np.save(path, rows[:5])
        case _:
            path.write_bytes(b"garbage")
    ((name, left, fault),) = bad(made)
    assert (name, left) == ("000001.tar", 0)  # nothing says any more where its samples are
    says = {"gone": "its index is missing", "short": "its index has 292 bytes", "garbage": "its index has 7 bytes"}
    assert fault == says.get(kind, "its index is altered")


@pytest.mark.parametrize("kept", [0, 100, 300])
def test_a_cut_index_is_named_by_its_size(made: Manifest, kept: int):
    os.truncate(tar(made).with_suffix(".npy"), kept)
    ((name, left, _),) = bad(made, full=False)
    assert (name, left) == ("000001.tar", 0)
    with pytest.raises(exits.Refusal, match="000001"):
        made.check()


@given(data=st.data())
@USUAL
def test_wherever_it_is_cut_what_stands_before_the_cut_is_readable(
    whole: Manifest, tmp_path: Path, data: st.DataObject
):
    shutil.copytree(whole.folder, tmp_path / "set", dirs_exist_ok=True)
    cut = data.draw(st.integers(0, whole.shards[1].bytes))
    os.truncate(tmp_path / "set" / "000001.tar", cut)
    wanted = sum(int(row["offset"]) + int(row["size"]) <= cut for row in whole.index(1))
    assert readable(load(tmp_path / "set"), 1) == wanted


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 30))
@USUAL
def test_flipped_bits_cost_exactly_the_samples_that_they_hit(whole: Manifest, tmp_path: Path, seed: int, bits: int):
    shutil.copytree(whole.folder, tmp_path / "set", dirs_exist_ok=True)
    drawn, broken = random.Random(seed), bytearray(tar(whole).read_bytes())
    spots = drawn.sample(range(len(broken)), bits)
    for spot in spots:
        broken[spot] ^= 1 << drawn.randrange(8)
    (tmp_path / "set" / "000001.tar").write_bytes(broken)
    ends = [(int(row["offset"]), int(row["offset"]) + int(row["size"])) for row in whole.index(1)]
    hit = sum(any(start <= spot < end for spot in spots) for start, end in ends)
    assert readable(load(tmp_path / "set"), 1) == SAMPLES - hit


def test_all_splits_and_all_sets_are_looked_at(made: Manifest, tmp_path: Path):
    names = [f"{split}/{n}.png" for split in ("train", "val") for n in range(4)]
    parts = make(write_pictures(tmp_path / "in", names), tmp_path / "split", shard_samples=2)
    spoil(parts["val"], 1, [0])
    found = verify(VerifyShards(shards=(str(tmp_path / "split"), str(made.folder)), full=True, quiet=True))
    assert [str(Path(one.shard).relative_to(tmp_path)) for one in found] == [
        *(f"split/{split}/00000{n}.tar" for split in ("train", "val") for n in range(2)),
        *(f"set/00000{n}.tar" for n in range(3)),
    ]
    assert [(one.samples, one.readable) for one in found if one.fault] == [(2, 1)]


def test_shards_of_others_are_verified_where_they_lie(made: Manifest, tmp_path: Path):
    (tmp_path / "none").mkdir()
    with pytest.raises(exits.Refusal, match=r"has no manifest\.json"):
        verify(VerifyShards(shards=(str(tmp_path / "none"),), quiet=True))
    (made.folder / "manifest.json").unlink()
    theirs = index(IndexShards(shards=str(made.folder), output=str(tmp_path / "index"), workers=1, quiet=True))
    assert states(theirs) == [Found(str(tar(made, n)), SAMPLES, SAMPLES, None) for n in range(3)]
    os.truncate(tar(made, 2), int(theirs.index(2)[5]["offset"]))
    assert [(one.shard, one.readable) for one in states(theirs) if one.fault] == [(str(tar(made, 2)), 5)]


def test_the_check_before_training_names_all_bad_shards_at_once(made: Manifest, whole: Manifest):
    spoil(made, 0, [1])
    os.truncate(tar(made, 1), 100)
    tar(made, 2).unlink()
    short = f"000001.tar (100 bytes, not {made.shards[1].bytes}), 000002.tar (missing)"
    for full, text in (
        (False, f"2 of 3 shards are bad: {short}"),
        (True, f"3 of 3 shards are bad: 000000.tar (altered), {short}"),
    ):
        with pytest.raises(exits.Refusal) as caught:
            made.check(full)
        assert (caught.value.code, str(caught.value)) == (exits.DATA, f"{made.folder}: {text}")
    with pytest.raises(exits.Refusal, match="2 of 6 shards are bad"):
        join([whole, made]).check()
    whole.check(full=True)


def test_a_disk_that_fails_costs_the_samples_it_cannot_read(made: Manifest, monkeypatch: pytest.MonkeyPatch):
    rows, pread = made.index(1), os.pread

    def failing(handle: int, size: int, offset: int) -> bytes:
        if offset == rows[3]["offset"]:
            raise OSError(5, "Input/output error")
        return pread(handle, size, offset)

    monkeypatch.setattr(module.os, "pread", failing)
    assert readable(made, 1) == SAMPLES - 1


def test_the_tool_says_so_in_lines_and_in_its_exit_code(made: Manifest):
    def tool(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(module.__file__).parents[2] / "tools" / "verify_shards.py")]
        return subprocess.run([*command, f"shards={made.folder}", *words], capture_output=True, text=True, timeout=60)

    spoil(made, 1, [0, 1, 2, 3, 4])
    done = tool("quiet=true")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "3 of 3 shards are whole by size (full=true compares every byte), 30 of 30 samples readable\n"
    done = tool("full=true", "quiet=true")
    assert done.returncode == exits.DATA
    assert done.stdout == f"{tar(made)}: altered: 5 of 10 samples readable\n"
    counted = "2 of 3 shards are whole by sha256, 25 of 30 samples readable"
    assert done.stderr == f"verify_shards.py: {counted}; make or fetch the 1 others again\n"
