"""The walk through a tar: all that the standard library finds in a whole one, and all that is left of a damaged one."""

import io
import itertools
import os
import random
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_vit.data.tar import LONGEST, Damage, Member, walk

BLOCK = 512
END = bytes(2 * BLOCK)
FORMATS: dict[str, Any] = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NO_FILES = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse file": tarfile.GNUTYPE_SPARSE,
}
USUAL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None, form: str = "gnu"
) -> bytes:
    """One member as it stands in a tar; `size` is what its header claims, where that is not so."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data) if size is None else size, "0.jpg"
    return info.tobuf(FORMATS[form], "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def pax(*records: bytes) -> bytes:
    """An extended header of hand-made records."""
    return member("pax", b"".join(records), tarfile.XHDTYPE)


def record(keyword: bytes, value: bytes) -> bytes:
    """One record of an extended header, its own length before it."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(str(length)) + len(rest):
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def items(path: Path, data: bytes) -> list[Member | Damage]:
    """What the walk finds in these bytes."""
    path.write_bytes(data)
    return list(walk(path))


def found(path: Path, data: bytes) -> tuple[list[Member], list[Damage]]:
    """The files in these bytes, and the damage."""
    seen = items(path, data)
    return [item for item in seen if isinstance(item, Member)], [item for item in seen if isinstance(item, Damage)]


def twin(data: bytes) -> list[Member]:
    """The files of a whole tar, by the standard library."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        return [Member(info.name, info.offset_data, info.size) for info in archive if info.isreg()]


@dataclass(frozen=True)
class Piece:
    """A member of a tar that was written, and from where to where its headers and data reach."""

    member: Member
    start: int
    end: int


def written(names: list[str], sizes: list[int], form: str) -> tuple[bytes, list[Piece]]:
    """A tar of files with random content, and where each of them is."""
    noise, buffer, ends = random.Random(0), io.BytesIO(), [0]
    with tarfile.open(
        fileobj=buffer, mode="w", format=FORMATS[form], encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name, size in zip(names, sizes, strict=True):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(noise.randbytes(size)))
            ends.append(archive.offset)
    data = buffer.getvalue()
    pieces = [Piece(one, *edges) for one, edges in zip(twin(data), itertools.pairwise(ends), strict=True)]
    return data, pieces


@pytest.fixture(params=FORMATS)
def small(request: pytest.FixtureRequest) -> tuple[bytes, list[Piece]]:
    """A small tar of each format; the long name takes headers of its own where the format has such."""
    long = "folder/" * 12 + "image.jpg" if request.param == "ustar" else "folder/" * 20 + "image.jpg"
    names = ["0.jpg", "0.cls", long, "1.cls", "2.jpg", "2.cls"]
    return written(names, [700, 1, 1024, 1, 0, 2], request.param)


letters = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40)
paths = st.lists(letters, min_size=1, max_size=6).map("/".join).filter(lambda name: name.strip("/") == name)
non_unicode = st.binary(min_size=1, max_size=150).map(lambda b: b.replace(b"\0", b"").replace(b"/", b"")).filter(bool)
names = paths | non_unicode.map(lambda b: b.decode("utf-8", "surrogateescape"))
whole = st.lists(st.tuples(names, st.integers(0, 2000) | st.sampled_from([511, 512, 513, 1024])), max_size=6)


@pytest.mark.parametrize("form", FORMATS)
@given(content=whole)
@USUAL
def test_a_whole_tar_holds_what_the_standard_library_finds(tmp_path: Path, form: str, content: list[tuple[str, int]]):
    try:
        data, _ = written([name for name, _ in content], [size for _, size in content], form)
    except ValueError:  # ustar takes no name of that length
        return
    assert items(tmp_path / "a.tar", data) == twin(data)


@pytest.mark.parametrize("form", FORMATS)
def test_links_and_devices_are_named_and_folders_are_passed_over(tmp_path: Path, form: str):
    kinds = [kind for kind in NO_FILES.values() if kind != tarfile.GNUTYPE_SPARSE or form == "gnu"]
    odd = [member(f"odd{number}.jpg", kind=kind, form=form) for number, kind in enumerate(kinds)]
    folders = [member("folder", kind=tarfile.DIRTYPE, form=form), member("v7/", kind=tarfile.AREGTYPE, form=form)]
    data = b"".join([member("0.jpg", b"data", form=form), *odd, *folders, member("1.jpg", b"more", form=form), END])
    members, damage = found(tmp_path / "a.tar", data)
    assert members == [one for one in twin(data) if not one.name.startswith("odd")]
    assert [one.name for one in members] == ["0.jpg", "1.jpg"]
    assert len(damage) == len(kinds)
    assert all(f"odd{number}.jpg" in one.reason for number, one in enumerate(damage))


@pytest.mark.parametrize("kind", [name for name in NO_FILES if name != "sparse file"] + ["folder"])
def test_a_link_that_claims_a_size_has_no_data_all_the_same(tmp_path: Path, kind: str):
    """Old tars give a hard link the size of its file; the standard library reads on behind the header."""
    for claimed in (1, 512, 1000, 8 << 30):
        odd = member("odd", kind=NO_FILES.get(kind, tarfile.DIRTYPE), size=claimed)
        data = member("0.jpg", b"data") + odd + member("1.jpg", b"more") + member("2.jpg", b"most") + END
        members, _ = found(tmp_path / "a.tar", data)
        assert members == [Member("0.jpg", 512, 4), Member("1.jpg", 2048, 4), Member("2.jpg", 3072, 4)] == twin(data)


def test_an_extended_header_says_the_size_of_a_large_file(tmp_path: Path):
    """Its own header has no room for more than 8 GB; here it says 0."""
    large = pax(record(b"size", b"600"), record(b"path", "ä/0.jpg".encode())) + member("0", b"x" * 600, size=0)
    data = large + member("1.jpg", b"more") + END
    assert items(tmp_path / "a.tar", data) == twin(data) == [Member("ä/0.jpg", 1536, 600), Member("1.jpg", 3072, 4)]


def test_tars_that_were_put_one_behind_the_other_are_all_read(tmp_path: Path):
    parts = [written([f"{n}.jpg", f"{n}.cls"], [700 + n, 1], form) for n, form in enumerate(FORMATS)]
    data = b"".join(part for part, _ in parts)
    members, damage = found(tmp_path / "a.tar", data)
    assert [one.name for one in members] == [f"{n}.{kind}" for n in range(3) for kind in ("jpg", "cls")]
    sizes = [piece.member.size for _, pieces in parts for piece in pieces]
    assert [one.size for one in members] == sizes
    assert damage == []


def test_every_cut_keeps_all_members_before_it_and_is_named(tmp_path: Path, small: tuple[bytes, list[Piece]]):
    data, pieces = small
    end = pieces[-1].end
    for cut in range(0, end + 2 * BLOCK, 128):
        members, damage = found(tmp_path / "a.tar", data[:cut])
        there = [piece.member for piece in pieces if piece.member.offset + piece.member.size <= cut]
        assert members[: len(there)] == there
        # a member of no bytes is whole with its header; nothing else comes from behind the cut
        assert all(one.size == 0 for one in members[len(there) :])
        assert len(damage) == 1, cut
    assert found(tmp_path / "a.tar", data[: end + 2 * BLOCK]) == ([piece.member for piece in pieces], [])


def test_a_flipped_bit_costs_no_member_but_its_own(tmp_path: Path, small: tuple[bytes, list[Piece]]):
    """Also where it lies in a header: there the standard library takes it for the end and loses all that follows."""
    data, pieces = small
    lost = 0
    for piece in pieces:
        spots = {*range(piece.start, piece.start + BLOCK, 37), *range(piece.start, piece.end, 101)}
        for spot in spots:
            broken = bytearray(data)
            broken[spot] ^= 1 << spot % 8
            members, damage = found(tmp_path / "a.tar", bytes(broken))
            others = [other.member for other in pieces if other is not piece]
            assert [one for one in members if one in others] == others
            in_header = spot < piece.member.offset
            assert piece.member in members or (in_header and (damage or len(members) == len(pieces)))
            lost += len(members) < len(pieces)
            assert len(damage) <= 1
    assert lost > 20


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 40))
@USUAL
def test_any_damage_at_all_is_survived(tmp_path: Path, small: tuple[bytes, list[Piece]], seed: int, bits: int):
    data, pieces = small
    random_ = random.Random(seed)
    broken = bytearray(data[: random_.randrange(len(data) + 1)])
    spots = [random_.randrange(len(broken)) for _ in range(bits)] if broken else []
    for spot in spots:
        broken[spot] ^= 1 << random_.randrange(8)
    members, _ = found(tmp_path / "a.tar", bytes(broken))
    assert all(0 <= one.offset <= one.offset + one.size <= len(broken) for one in members)
    untouched = [p for p in pieces if p.end <= len(broken) and not any(p.start <= spot < p.end for spot in spots)]
    assert [one for one in members if one in {p.member for p in untouched}] == [p.member for p in untouched]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>" * 200, bytes(100), bytes(511), b"\x1f\x8b\x08" + bytes(3000), os.urandom(5000)],
    ids=["nothing", "a page", "a few zeros", "nearly a block", "gzip", "noise"],
)
def test_what_is_no_tar_gives_no_member_and_one_damage(tmp_path: Path, data: bytes):
    members, damage = found(tmp_path / "a.tar", data)
    assert (members, len(damage)) == ([], 1)


def test_a_tar_of_nothing_is_whole(tmp_path: Path):
    assert items(tmp_path / "a.tar", bytes(10240)) == twin(bytes(10240)) == []


@pytest.mark.parametrize("blocks", [3, 5])
def test_a_hole_of_zeros_is_named(tmp_path: Path, blocks: int):
    """What a disk or a broken download leaves; nothing else tells that members are gone."""
    parts = [member(f"{n}.jpg", b"x" * 900) for n in range(5)]  # three blocks each
    data = bytearray(b"".join(parts) + END)
    data[1536 : 1536 + blocks * BLOCK] = bytes(blocks * BLOCK)
    members, damage = found(tmp_path / "a.tar", bytes(data))
    left = ["0.jpg", "2.jpg", "3.jpg", "4.jpg"] if blocks == 3 else ["0.jpg", "3.jpg", "4.jpg"]
    assert [one.name for one in members] == left
    assert damage


def hostile() -> Iterator[tuple[str, bytes, bool]]:
    """Name, members, and whether they are damage (else they are nothing, or a file)."""
    yield "a negative size", member("odd", size=-BLOCK), True
    yield "the least size", member("odd", size=-(256**11)), True
    yield "a negative size in an extended header", pax(record(b"size", b"-512")) + member("odd.jpg"), False
    yield "a size that is no number", pax(record(b"size", b"1e3")) + member("odd.jpg"), False
    yield "an endless record", pax(b"0 path=odd\n", b"00 path=odd\n") + member("odd.jpg"), False
    yield "a negative record", pax(b"-5 path=odd\n") + member("odd.jpg"), False
    yield "a record longer than its header", pax(b"9999 path=odd\n") + member("odd.jpg"), False
    yield "records of one byte", pax(b"1" * 3000) + member("odd.jpg"), False
    yield "an extended header over the limit", pax(record(b"comment", bytes(LONGEST))) + member("odd.jpg"), True
    yield "a long name over the limit", member("x" * (LONGEST + 1)), True
    yield "extended headers in a row", b"".join([pax(record(b"path", b"odd"))] * 50) + member("0"), False
    yield "a name of 60 kB", member("odd/" * 15_000 + "odd.jpg", b"data"), False
    yield "a name that leads out", member("../../../odd.jpg", b"data"), False
    yield "an absolute name", member("/odd.jpg", b"data"), False
    yield "an empty name", member("", b"data"), False
    yield "an unknown kind", member("odd", kind=b"Z"), True
    yield "a sparse file", member("odd.jpg", b"data", tarfile.GNUTYPE_SPARSE), True
    yield "a tar inside a file", member("odd.jpg", member("inner.jpg", b"data") + END), False


def keeps_the_others(path: Path, odd: bytes) -> list[Damage]:
    """That files before and behind odd members are found, quickly, and nothing from within them."""
    before, behind = member("before.jpg", b"data"), member("behind.jpg", b"data")
    began = time.process_time()
    members, damage = found(path, before + odd + behind + END)
    assert time.process_time() - began < 1
    assert [one for one in members if one.name in ("before.jpg", "behind.jpg", "inner.jpg")] == [
        Member("before.jpg", 512, 4),
        Member("behind.jpg", len(before) + len(odd) + 512, 4),
    ]
    assert len(members) <= 3
    return damage


@pytest.mark.parametrize(("odd", "damaging"), [pytest.param(*case[1:], id=case[0]) for case in hostile()])
def test_hostile_members_cost_no_other_and_no_time(tmp_path: Path, odd: bytes, damaging: bool):
    assert bool(keeps_the_others(tmp_path / "a.tar", odd)) == damaging


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(member("odd.jpg", size=8 << 30), id="8 GB"),
        pytest.param(member("odd.jpg", size=1 << 60), id="an exabyte"),
        pytest.param(pax(record(b"size", b"9" * 20)) + member("odd.jpg"), id="in an extended header"),
    ],
)
def test_a_member_that_claims_more_than_there_is_costs_no_other(tmp_path: Path, odd: bytes):
    assert keeps_the_others(tmp_path / "a.tar", odd)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(pax(b"9" * 5000 + b" path=odd\n"), id="of a record"),
        pytest.param(pax(record(b"size", b"9" * 5000)), id="of a size"),
    ],
)
def test_a_number_of_thousands_of_digits_is_survived(tmp_path: Path, odd: bytes):
    keeps_the_others(tmp_path / "a.tar", odd + member("odd.jpg"))


def test_a_pipe_in_the_place_of_a_tar_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "a.tar")
    assert all(isinstance(item, Damage) for item in walk(tmp_path / "a.tar"))


def test_a_walk_that_is_broken_off_closes_its_file(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(member("0.jpg", b"data") + member("1.jpg", b"data") + END)
    before = len(os.listdir("/proc/self/fd"))
    walking = walk(tmp_path / "a.tar")
    next(walking)
    del walking
    assert len(os.listdir("/proc/self/fd")) <= before
