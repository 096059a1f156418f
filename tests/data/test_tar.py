"""The walk through a tar: all that the standard library finds in a whole one, and all that is left of a damaged one.

What hostile members cost is in test_hostile_tars.py.
"""

import io
import itertools
import os
import random
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_vit.data.tar import Damage, Member, iter_members
from tests.data.damage import FORMATS, SPECIAL_FILES, TAR_END, flip_bits, pax_header, pax_record, tar_member

BLOCK = 512
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def walk_tar(path: Path, data: bytes) -> tuple[list[Member], list[Damage]]:
    """What the walk finds in these bytes: the files, and the damage."""
    path.write_bytes(data)
    items = list(iter_members(path))
    return [item for item in items if isinstance(item, Member)], [item for item in items if isinstance(item, Damage)]


def read_with_tarfile(data: bytes) -> list[Member]:
    """The files of a whole tar, by the standard library."""
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        return [Member(info.name, info.offset_data, info.size) for info in archive if info.isreg()]


class WrittenMember(NamedTuple):
    """A member of a tar that was written, and from where to where its headers and data reach."""

    member: Member
    start: int
    end: int


def write_tar(names: list[str], sizes: list[int], form: str) -> tuple[bytes, list[WrittenMember]]:
    """A tar of files with random content, and where each of them is."""
    rng, buffer, ends = random.Random(0), io.BytesIO(), [0]
    options: Any = {"encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form], **options) as archive:
        for name, size in zip(names, sizes, strict=True):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(rng.randbytes(size)))
            ends.append(archive.offset)
    data = buffer.getvalue()
    return data, [
        WrittenMember(member, *edges)
        for member, edges in zip(read_with_tarfile(data), itertools.pairwise(ends), strict=True)
    ]


@pytest.fixture(params=FORMATS)
def small(request: pytest.FixtureRequest) -> tuple[bytes, list[WrittenMember]]:
    """A small tar of each format; the long name takes headers of its own where the format has such."""
    long = "folder/" * 12 + "image.jpg" if request.param == "ustar" else "folder/" * 20 + "image.jpg"
    return write_tar(["0.jpg", "0.cls", long, "1.cls", "2.jpg", "2.cls"], [700, 1, 1024, 1, 0, 2], request.param)


letters = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40)
paths = st.lists(letters, min_size=1, max_size=6).map("/".join).filter(lambda name: name.strip("/") == name)
non_unicode = st.binary(min_size=1, max_size=150).map(lambda b: b.replace(b"\0", b"").replace(b"/", b"")).filter(bool)
names = paths | non_unicode.map(lambda b: b.decode("utf-8", "surrogateescape"))
tar_contents = st.lists(st.tuples(names, st.integers(0, 2000) | st.sampled_from([511, 512, 513, 1024])), max_size=6)


@pytest.mark.parametrize("form", FORMATS)
@given(content=tar_contents)
@SETTINGS
def test_a_whole_tar_holds_what_the_standard_library_finds(tmp_path: Path, form: str, content: list[tuple[str, int]]):
    try:
        data, _ = write_tar([name for name, _ in content], [size for _, size in content], form)
    except ValueError:  # ustar takes no name of that length
        return
    assert walk_tar(tmp_path / "a.tar", data) == (read_with_tarfile(data), [])


@pytest.mark.parametrize("form", FORMATS)
def test_links_and_devices_are_named_and_folders_are_passed_over(tmp_path: Path, form: str):
    kinds = [kind for kind in SPECIAL_FILES.values() if kind != tarfile.GNUTYPE_SPARSE or form == "gnu"]
    odd = [tar_member(f"odd{number}.jpg", kind=kind, form=form) for number, kind in enumerate(kinds)]
    folders = [
        tar_member("folder", kind=tarfile.DIRTYPE, form=form),
        tar_member("v7/", kind=tarfile.AREGTYPE, form=form),
    ]
    data = b"".join(
        [tar_member("0.jpg", b"data", form=form), *odd, *folders, tar_member("1.jpg", b"more", form=form), TAR_END]
    )
    members, damage = walk_tar(tmp_path / "a.tar", data)
    assert members == [entry for entry in read_with_tarfile(data) if not entry.name.startswith("odd")]
    assert [entry.name for entry in members] == ["0.jpg", "1.jpg"]
    assert len(damage) == len(kinds)
    assert all(f"odd{number}.jpg" in fault.reason for number, fault in enumerate(damage))


@pytest.mark.parametrize("kind", [name for name in SPECIAL_FILES if name != "sparse file"] + ["folder"])
def test_a_link_that_claims_a_size_has_no_data_all_the_same(tmp_path: Path, kind: str):
    """Old tars give a hard link the size of its file; the standard library reads on behind the header."""
    for claimed in (1, 512, 1000, 8 << 30):
        odd = tar_member("odd", kind=SPECIAL_FILES.get(kind, tarfile.DIRTYPE), size=claimed)
        data = (
            tar_member("0.jpg", b"data") + odd + tar_member("1.jpg", b"more") + tar_member("2.jpg", b"most") + TAR_END
        )
        members, _ = walk_tar(tmp_path / "a.tar", data)
        assert (
            members
            == [Member("0.jpg", 512, 4), Member("1.jpg", 2048, 4), Member("2.jpg", 3072, 4)]
            == read_with_tarfile(data)
        )


def test_an_extended_header_says_the_size_of_a_large_file(tmp_path: Path):
    """Its own header has no room for more than 8 GB; here it says 0."""
    large = pax_header(pax_record(b"size", b"600"), pax_record(b"path", "ä/0.jpg".encode())) + tar_member(
        "0", b"x" * 600, size=0
    )
    data = large + tar_member("1.jpg", b"more") + TAR_END
    assert read_with_tarfile(data) == [Member("ä/0.jpg", 1536, 600), Member("1.jpg", 3072, 4)]
    assert walk_tar(tmp_path / "a.tar", data) == (read_with_tarfile(data), [])


def test_tars_that_were_put_one_behind_the_other_are_all_read(tmp_path: Path):
    parts = [write_tar([f"{n}.jpg", f"{n}.cls"], [700 + n, 1], form) for n, form in enumerate(FORMATS)]
    members, damage = walk_tar(tmp_path / "a.tar", b"".join(part for part, _ in parts))
    expected = [(piece.member.name, piece.member.size) for _, pieces in parts for piece in pieces]
    assert ([(entry.name, entry.size) for entry in members], damage) == (expected, [])


def test_every_cut_keeps_all_members_before_it_and_is_named(tmp_path: Path, small: tuple[bytes, list[WrittenMember]]):
    data, pieces = small
    end = pieces[-1].end
    for cut in range(0, end + 2 * BLOCK, 128):
        members, damage = walk_tar(tmp_path / "a.tar", data[:cut])
        expected = [piece.member for piece in pieces if piece.member.offset + piece.member.size <= cut]
        assert members[: len(expected)] == expected
        # a member of no bytes is whole with its header; nothing else comes from behind the cut
        assert all(entry.size == 0 for entry in members[len(expected) :])
        assert len(damage) == 1, cut
    assert walk_tar(tmp_path / "a.tar", data[: end + 2 * BLOCK]) == ([piece.member for piece in pieces], [])


def test_a_flipped_bit_costs_no_member_but_its_own(tmp_path: Path, small: tuple[bytes, list[WrittenMember]]):
    """Also where it lies in a header: there the standard library takes it for the end and loses all that follows."""
    data, pieces = small
    lost = 0
    for piece in pieces:
        for spot in {*range(piece.start, piece.start + BLOCK, 37), *range(piece.start, piece.end, 101)}:
            members, damage = walk_tar(tmp_path / "a.tar", flip_bits(data, spot, bit=spot % 8))
            others = [other.member for other in pieces if other is not piece]
            assert [entry for entry in members if entry in others] == others
            in_header = spot < piece.member.offset
            assert piece.member in members or (in_header and (damage or len(members) == len(pieces)))
            lost += len(members) < len(pieces)
            assert len(damage) <= 1
    assert lost > 20


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 40))
@SETTINGS
def test_any_damage_at_all_is_survived(tmp_path: Path, small: tuple[bytes, list[WrittenMember]], seed: int, bits: int):
    (data, pieces), rng = small, random.Random(seed)
    truncated = data[: rng.randrange(len(data) + 1)]
    spots = [rng.randrange(len(truncated)) for _ in range(bits)] if truncated else []
    members, _ = walk_tar(tmp_path / "a.tar", flip_bits(truncated, *spots, bit=seed % 8))
    assert all(0 <= entry.offset <= entry.offset + entry.size <= len(truncated) for entry in members)
    intact = [
        p.member for p in pieces if p.end <= len(truncated) and not any(p.start <= spot < p.end for spot in spots)
    ]
    assert [entry for entry in members if entry in intact] == intact


@pytest.mark.parametrize("blocks", [3, 5])
def test_a_hole_of_zeros_is_named(tmp_path: Path, blocks: int):
    """What a disk or a broken download leaves; nothing else tells that members are gone. A tar of nothing is whole."""
    data = b"".join(tar_member(f"{n}.jpg", b"x" * 900) for n in range(5)) + TAR_END  # three blocks each
    hole = blocks * BLOCK
    members, damage = walk_tar(tmp_path / "a.tar", data[:1536] + bytes(hole) + data[1536 + hole :])
    assert [entry.name for entry in members] == ["0.jpg", *["2.jpg"] * (blocks == 3), "3.jpg", "4.jpg"]
    assert damage
    assert walk_tar(tmp_path / "a.tar", bytes(10240)) == (read_with_tarfile(bytes(10240)), []) == ([], [])


def test_a_walk_that_is_broken_off_closes_its_file(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(tar_member("0.jpg", b"data") + tar_member("1.jpg", b"data") + TAR_END)
    before = len(os.listdir("/proc/self/fd"))
    walk = iter_members(tmp_path / "a.tar")
    next(walk)
    del walk
    assert len(os.listdir("/proc/self/fd")) <= before
