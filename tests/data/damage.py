"""What may be wrong with a shard of ours, a tar of others or an image: one table of each, (kind, bytes, what it costs).

Every reader is run against the same tables: dataset and verifier, walk, indexer, webdataset's stream, decoder and
conversion.
"""

import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ssl_vit.data.decode import MAX_SIDE
from ssl_vit.data.tar import MAX_HEADER_BYTES
from tests.data.pictures import encode_pil, make_png, picture, png_chunk

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"image_size": 16, "workers": 0, "lanes": 3, "shuffle_window": 1}
MB = 1 << 20


class Payload:
    """Says that it was unpickled, by a file in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


@contextmanager
def time_limit(seconds: float = 60) -> Iterator[None]:
    """Break off what hangs or takes its time by the gigabyte; a BaseException stops it, past every handler."""

    def raise_timeout(*_: object) -> None:
        raise KeyboardInterrupt(f"{seconds} s were not enough")

    previous = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def memory_growth(work: Callable[[], object]) -> float:
    """Bytes by which a process grows at most while it does something."""

    def measure(connection: Any) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a bomb that goes off is to hurt nobody
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        connection.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return math.inf  # it died
    finally:
        process.join()


# shards of ours

SHARDS, SAMPLES = 4, 6  # of the set that is damaged, a shard
TOTAL = SHARDS * SAMPLES
CONTENT_DAMAGE: dict[
    str, Callable[[bytes, bytes, int, int], bytes]
] = {  # of own ones, another's, and where an image lies
    "cut to nothing": lambda own, other, start, end: b"",
    "cut in a header": lambda own, other, start, end: own[: start - 200],
    "cut in an image": lambda own, other, start, end: own[: start + 10],
    "cut behind an image": lambda own, other, start, end: own[:end],
    "cut in the end mark": lambda own, other, start, end: own[:-700],
    "a bit of a header": lambda own, other, start, end: flip_bits(own, start - 512 + 130),
    "a bit of an image": lambda own, other, start, end: flip_bits(own, (start + end) // 2),
    "the first bit of an image": lambda own, other, start, end: flip_bits(own, start),
    "the last bit of an image": lambda own, other, start, end: flip_bits(own, end - 1),
    "a bit of a class": lambda own, other, start, end: flip_bits(own, -(-end // 512) * 512 + 512),
    "a bit of the padding": lambda own, other, start, end: flip_bits(own, end),
    "grown": lambda own, other, start, end: own + b"more",
    "zeros in an image": lambda own, other, start, end: own[: start + 5] + bytes(45) + own[start + 50 :],
    "zeros to the end": lambda own, other, start, end: own[:start] + bytes(len(own) - start),
    "moved by a block": lambda own, other, start, end: bytes(512) + own,
    "a page of the right size": lambda own, other, start, end: b"<html>".ljust(len(own), b" "),
    "gzip": lambda own, other, start, end: gzip.compress(own),
    "another shard": lambda own, other, start, end: other,
}
MISSING_FILES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a dead link": lambda path: path.symlink_to("nowhere"),
}
INDEX_DAMAGE: dict[str, tuple[Callable[[Path, np.ndarray], object], str]] = {
    "no index": (lambda path, rows: path.unlink(), "its index is missing"),
    "a short index": (lambda path, rows: np.save(path, rows[:3]), "its index has 252 bytes"),
    "an index of garbage": (lambda path, rows: path.write_bytes(b"garbage"), "its index has 7 bytes"),
    "an index of other labels": (lambda path, rows: np.save(path, _relabel(rows)), "its index is altered"),
    "an empty index": (lambda path, rows: os.truncate(path, 0), "its index has 0 bytes"),
    "a pickled index": (lambda path, rows: np.save(path, np.array([Payload()] * 6, object)), "its index has {} bytes"),
}
KINDS = [*CONTENT_DAMAGE, *MISSING_FILES, *INDEX_DAMAGE]


def _relabel(rows: np.ndarray) -> np.ndarray:
    rows = np.array(rows)
    rows["label"] = rows["label"][::-1].copy() ^ 1
    return rows


def flip_bits(data: bytes, *spots: int, bit: int = 3) -> bytes:
    flipped = bytearray(data)
    for spot in spots:
        flipped[spot] ^= 1 << bit
    return bytes(flipped)


def flip_file_bits(path: Path, *spots: int) -> None:
    path.write_bytes(flip_bits(path.read_bytes(), *spots))


def damage_shard(kind: str, path: Path, rows: np.ndarray) -> tuple[set[int], str]:
    """Damage a shard; returns which of its samples cannot be had any more, and what the verifier is to say of it."""
    if kind in INDEX_DAMAGE:
        break_index, message = INDEX_DAMAGE[kind]
        break_index(index := path.with_suffix(".npy"), rows)
        return {*range(SAMPLES)}, message.format(index.exists() and index.stat().st_size)
    if kind in MISSING_FILES:
        path.unlink()
        MISSING_FILES[kind](path)
        return {*range(SAMPLES)}, "missing"
    own, other = path.read_bytes(), path.with_name("000002.tar").read_bytes()
    spans = [slice(int(row["offset"]), int(row["offset"]) + int(row["size"])) for row in rows]
    path.write_bytes(data := CONTENT_DAMAGE[kind](own, other, spans[3].start, spans[3].stop))
    message = "altered" if len(data) == len(own) else f"{len(data)} bytes, not {len(own)}"
    return {number for number, span in enumerate(spans) if data[span] != own[span]}, message


# tars of others

TAR_END = bytes(1024)
FORMATS: dict[str, Any] = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SPECIAL_FILES = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "character device": tarfile.CHRTYPE}
SPECIAL_FILES |= {"block device": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE, "sparse file": tarfile.GNUTYPE_SPARSE}


def tar_member(name: str, data: bytes = b"", kind: bytes = b"0", size: int | None = None, form: str = "gnu") -> bytes:
    """One member as it stands in a tar; `size` is what its header claims, where that is not so."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data) if size is None else size, "0.jpg"
    return info.tobuf(FORMATS[form], "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def pax_header(*records: bytes) -> bytes:
    """An extended header of hand-made records."""
    return tar_member("pax", b"".join(records), tarfile.XHDTYPE)


def pax_record(keyword: bytes, value: bytes) -> bytes:
    """One record of an extended header, its own length before it."""
    body = b" " + keyword + b"=" + value + b"\n"
    return next(b"%d%s" % (size, body) for size in range(len(body), 10**9) if size == len(str(size)) + len(body))


def sparse_bomb(size: int) -> bytes:
    """A member of 512 bytes that stands for a file with a hole."""
    header = bytearray(tar_member("000.jpg", kind=tarfile.GNUTYPE_SPARSE, size=512)[:512])
    header[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def gzip_that_says_ustar(data: bytes) -> bytes:
    """What gzip takes for its own, with a tar's mark where a tar has it."""
    packed, extra = gzip.compress(data), bytearray(300)
    extra[257 - 12 : 262 - 12] = b"ustar"
    return packed[:3] + bytes([packed[3] | 4]) + packed[4:10] + struct.pack("<H", 300) + bytes(extra) + packed[10:]


def _reddish(number: int) -> bytes:
    """A picture that any crop of it can be told by: its red is 40 times its number."""
    image = Image.merge("RGB", [Image.new("L", (24, 20), 40 * number), *picture(number).split()[1:]])
    return encode_pil(image, "PNG" if number % 2 else "JPEG")


SAMPLE_IMAGES = [_reddish(number) for number in range(6)]
SAMPLE_LABELS = {image: number % 3 for number, image in enumerate(SAMPLE_IMAGES)}
SAMPLE_MEMBERS = [
    (f"s/{n:03d}.{kind}", data)
    for n, image in enumerate(SAMPLE_IMAGES)
    for kind, data in (("jpg", image), ("cls", str(n % 3).encode()), ("json", json.dumps({"n": n}).encode()))
]
MEMBER_BYTES = [tar_member(name, data) for name, data in SAMPLE_MEMBERS]
MEMBER_STARTS = [0, *itertools.accumulate(map(len, MEMBER_BYTES))]
SAMPLE_TAR = b"".join(MEMBER_BYTES) + TAR_END
"""A tar of six good samples."""


def tar_sample(name: str, image: bytes | None = None, label: bytes = b"0") -> bytes:
    """A sample as others may write it."""
    return tar_member(f"{name}.jpg", encode_pil(picture(9), "JPEG") if image is None else image) + tar_member(
        f"{name}.cls", label
    )


class OddMember(NamedTuple):
    """Members among those of good samples; `good` samples are in them (-1: that is left open)."""

    name: str
    data: bytes
    good: int = 0
    damage: bool = False  # whether the walk calls any of it damage, else it is nothing, or a file


def odd_members() -> Iterator[OddMember]:
    """What hostile, careless or damaged tars may hold."""
    payload = pickle.dumps(Payload())
    for suffix in ("pyd", "pickle", "pth", "cls.pkl", "npy"):
        yield OddMember(f"a {suffix}", tar_member(f"s/002.{suffix}", payload))
    yield OddMember("a sample that is a pickle", tar_sample("x", payload))
    yield OddMember("a class that is a pickle", tar_sample("x", label=payload), -1)
    yield OddMember(
        "a gz member",
        tar_member("x.jpg.gz", gzip.compress(SAMPLE_IMAGES[0])) + tar_member("x.cls.gz", gzip.compress(b"1")),
    )
    for name, kind in SPECIAL_FILES.items():
        links = tar_member("s/000.jpg", kind=kind) + tar_member("x.jpg", kind=kind) + tar_member("x.cls", b"0")
        yield OddMember(f"a {name}", links, damage=True)
        yield OddMember(f"a {name} with a size", tar_member("x.jpg", kind=kind, size=1 << 33), damage=True)
    yield OddMember("a sparse file with a hole", sparse_bomb(4096), damage=True)
    yield OddMember("an unknown kind", tar_member("x", kind=b"Z"), damage=True)
    yield OddMember("a broken header", b"y" + tar_member("x.jpg", b"data")[1:], damage=True)
    for size in (-1024, -(256**11), 8 << 30, 1 << 60):
        yield OddMember(f"a size of {size}", tar_member("x.jpg", size=size), damage=True)
    for text in (b"-512", b"1e3", b"9" * 20, b"9" * 5000):
        odd = pax_header(pax_record(b"size", text)) + tar_member("x.jpg")
        yield OddMember(f"an extended size of {text[:21]!r}", odd, damage=len(text) == 20)
    path = b" path=odd\n"  # behind a length that is endless, negative, beyond the header, or of too many digits
    for text in (b"0" + path + b"00" + path, b"-5" + path, b"9999" + path, b"9" * 5000 + path, b"1" * 3000):
        yield OddMember(f"a record of length {text[:12]!r}", pax_header(text) + tar_member("x.jpg"))
    yield OddMember("an extended header of garbage", pax_header(b"\xff" * 5000) + tar_sample("x"), 1)
    yield OddMember(
        "an extended header of a megabyte", pax_header(pax_record(b"comment", bytes(MB))) + tar_sample("x"), 1, True
    )
    yield OddMember(
        "an extended header over the limit",
        pax_header(pax_record(b"comment", bytes(MAX_HEADER_BYTES))) + tar_member("x.jpg"),
        0,
        True,
    )
    yield OddMember(
        "extended headers in a row", b"".join([pax_header(pax_record(b"path", b"odd"))] * 50) + tar_member("0")
    )
    yield OddMember("a long name over the limit", tar_member("x" * (MAX_HEADER_BYTES + 1)), damage=True)
    yield OddMember("a name of 60 kB", tar_member("x/" * 30_000 + "x.jpg", b"data"))
    yield OddMember("an empty name", tar_member("", b"data"))
    for name in ("../../x", "/x", "..\\..\\x", "C:\\x", "$(touch canary)", "`touch canary`", "|touch canary"):
        yield OddMember(
            f"the name {name}", tar_sample(name), 0 if name.startswith("..\\") else 1
        )  # all behind its first dot
        yield OddMember(f"the name {name} of a bad image", tar_sample(name, b"no image"))
    for description, name in (
        ("a newline", "x\nreplaced by sample 0\n"),
        ("an escape", "x\x1b]0;title\x07\x1b[2J"),
        ("10 kB", "x/" * 5000 + "x"),
        ("right to left", "x\u202egpj"),
        ("a lone surrogate", "\udcff\udcfe"),
    ):
        yield OddMember(f"a name with {description}", tar_sample(name), 1)
        yield OddMember(f"a name with {description} of a bad image", tar_sample(name, b"no image"))
        yield OddMember(
            f"a name with {description} of a link", tar_member(f"{name}.jpg", kind=tarfile.SYMTYPE), damage=True
        )
        yield OddMember(f"a name with {description} of no member", tar_member(name, size=1 << 40), damage=True)
        yield OddMember(f"a name with {description} in a suffix", tar_member(f"x.{name}", b""))
    yield OddMember("a duplicate key", tar_sample("x") + tar_sample("x"))
    yield OddMember("a.JPG beside a.jpg", tar_member("x.JPG", SAMPLE_IMAGES[0]) + tar_sample("x"))
    yield OddMember("a.png beside a.jpg", tar_member("x.png", SAMPLE_IMAGES[1]) + tar_sample("x"))
    yield OddMember("img.v1.jpg", tar_sample("img.v1"))
    yield OddMember("a hidden file", tar_sample(".hidden"))
    yield OddMember("no suffix", tar_member("x", SAMPLE_IMAGES[0]))
    yield OddMember("nothing but a suffix", tar_member(".jpg", SAMPLE_IMAGES[0]), -1)
    pairs = (("x.jpg", SAMPLE_IMAGES[0]), ("y.jpg", SAMPLE_IMAGES[1]), ("x.cls", b"1"), ("y.cls", b"2"))
    yield OddMember("interleaved", b"".join(tar_member(*pair) for pair in pairs), 2)
    yield OddMember("a tar in an image", tar_sample("x", tar_member("inner.jpg", SAMPLE_IMAGES[5]) + TAR_END))
    behind = SAMPLE_IMAGES[0] + bytes(-len(SAMPLE_IMAGES[0]) % 512) + tar_member("inner.jpg", b"x")
    yield OddMember("a tar behind an image", tar_sample("x", behind), 1)
    yield OddMember("no image", tar_member("x.cls", b"1"))
    yield OddMember("a huge image", tar_sample("x", make_png(65_000, 65_000, 8, 2, b"\0")))
    yield OddMember("an EPS", tar_sample("x", b"%!PS-Adobe-3.0 EPSF-3.0\n(touch canary) system"))
    for description, label in (("of a megabyte", b"x" * MB), ("that is negative", b"-2"), ("beyond all", b"9" * 30)):
        yield OddMember(f"a class {description}", tar_sample("x", label=label), -1)
    notes = [b'{"label": %s}' % label for label in (b'"\xff"', b"9" * 5000, b"[1]", b"NaN")]
    for text in (*notes, b"[" * 100_000, b"[1, 2]", b'{"label": 1'):
        yield OddMember(f"a json {text[:15]!r}", tar_member("x.jpg", SAMPLE_IMAGES[0]) + tar_member("x.json", text), -1)


NOT_TARS = {
    "nothing": b"",
    "a page": b"<!DOCTYPE html>" * 100,
    "nearly a block": bytes(511),
    "gzip": gzip.compress(SAMPLE_TAR),
    "gzip that says it is a tar": gzip_that_says_ustar(SAMPLE_TAR),
    "noise": random.Random(0).randbytes(20_000),
    "text that says ustar": b"x" * 257 + b"ustar" + b"x" * 2000,
    "a broken header": b"x" + SAMPLE_TAR[1:700],
}
TARS_WITHOUT_IMAGES = {  # in what are tars
    "zeros": bytes(20_000),
    "no images": tar_member("x.txt", b"no image") + TAR_END,
    "bad images": b"".join(tar_member(f"{n}.jpg", b"bad") for n in range(9)) + TAR_END,
}

# images


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """One segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def make_exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x112] = orientation
    return block


def png_bomb(side: int, depth: int, color: int) -> bytes:
    """A PNG of zeros, which are next to nothing in the file."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    return make_png(side, side, depth, color, bytes((1 + side * channels * depth // 8) * side))


def lying_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = bytearray(encode_pil(picture(), "JPEG"))
    position = data.index(b"\xff\xc0") + 5
    data[position : position + 4] = struct.pack(">HH", height, width)
    return bytes(data)


class GoodImage(NamedTuple):
    """An odd image that is good, its pixels by the written rules, and how far from them a decoder may be."""

    data: bytes
    pixels: np.ndarray
    mean: float = 0  # absolute difference, levels of 255
    halved: bool = False  # whether it comes at half its size where that is asked for


def _rgb_pixels(data: bytes) -> np.ndarray:
    """As Pillow reads a JPEG, whose EXIF is not looked at."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _good_images() -> Iterator[tuple[str, GoodImage]]:
    image = picture(5, 40, 60)
    rgb, jpeg = np.asarray(image), encode_pil(image, "JPEG", quality=95, subsampling=0)
    yield from dict.fromkeys(("UPPER.JPEG", "jpeg-called.png"), GoodImage(jpeg, rgb, 3, True)).items()
    yield from dict.fromkeys(("plain.png", "png-called.jpg"), GoodImage(encode_pil(image, "PNG"), rgb)).items()
    yield "plain.webp", GoodImage(encode_pil(image, "WEBP", lossless=True), rgb)
    for name, kind, tolerance in (("gray.jpg", "JPEG", 1.5), ("gray.png", "PNG", 0)):
        gray = picture(4, channels=1)
        assert gray.mode == "L"
        yield (
            name,
            GoodImage(encode_pil(gray, kind), np.repeat(np.asarray(gray)[..., None], 3, 2), tolerance, kind == "JPEG"),
        )
    yield "cmyk.jpg", GoodImage(encode_pil(image.convert("CMYK"), "JPEG", quality=95), rgb, 3, True)

    yield "one-bit.png", GoodImage(make_png(8, 1, 1, 0, b"\0\xaa"), np.array([[[255] * 3, [0] * 3] * 4]))
    values = np.array([[[0], [255], [256], [30_000]], [[65_535], [511], [40_000], [1]]])
    gray16 = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    yield "gray16.png", GoodImage(make_png(4, 2, 16, 0, gray16), np.repeat(values >> 8, 3, 2))
    color16 = make_png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 255, 256, 511, 40_000, 65_535))
    yield "rgb16.png", GoodImage(color16, np.array([[[0, 0, 1], [1, 156, 255]]]))
    yield "one-pixel.png", GoodImage(make_png(1, 1, 8, 2, b"\0\1\2\3"), np.array([[[1, 2, 3]]]))

    for mode, channels in (("LA", 1), ("RGBA", 3)):
        transparent = picture(6, channels=channels)
        share = np.asarray(alpha := Image.linear_gradient("L").resize(transparent.size))[..., None] / 255
        on_white = np.asarray(transparent.convert("RGB")) * share + 255 * (1 - share)
        transparent.putalpha(alpha)
        assert transparent.mode == mode
        yield f"{mode}.png", GoodImage(encode_pil(transparent, "PNG"), on_white, 1)
        yield f"{mode}.webp", GoodImage(encode_pil(transparent, "WEBP", lossless=True, exact=True), on_white, 1)
    colors = png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])) + png_chunk(
        b"tRNS", b"\0"
    )  # the first one is transparent
    yield "palette.png", GoodImage(make_png(2, 1, 8, 3, b"\0\0\1", colors), np.array([[[255] * 3, [40, 50, 60]]]))
    gray_pixels = np.array([[[255] * 3, [7] * 3, [200] * 3]])
    for name, depth, color, row, key, expected in (  # a key color is transparent
        ("key-gray.png", 8, 0, struct.pack(">3B", 0, 7, 200), struct.pack(">H", 0), gray_pixels),
        ("key-gray16.png", 16, 0, struct.pack(">3H", 0, 1800, 51_200), struct.pack(">H", 0), gray_pixels),
        ("key-rgb.png", 8, 2, bytes(range(1, 10)), struct.pack(">3H", 1, 2, 3), [[[255] * 3, [4, 5, 6], [7, 8, 9]]]),
    ):
        yield name, GoodImage(make_png(3, 1, depth, color, b"\0" + row, png_chunk(b"tRNS", key)), np.array(expected))
    frames = [picture(number, 40, 60) for number in (6, 7)]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        animated = encode_pil(image, kind, save_all=True, append_images=frames, duration=50, **options)
        assert getattr(Image.open(io.BytesIO(animated)), "n_frames", 1) == 3
        yield f"animated.{kind.lower()}", GoodImage(animated, rgb)
    two_pictures = encode_pil(image, "MPO", quality=95, subsampling=0, save_all=True, append_images=frames)
    yield "twice.jpg", GoodImage(two_pictures, rgb, 3, True)
    broken = encode_pil(
        image, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage"
    )
    yield "broken-exif.jpg", GoodImage(broken, _rgb_pixels(jpeg), 0.5)

    turns = [lambda p: p, np.fliplr, lambda p: p[::-1, ::-1], np.flipud, lambda p: p.transpose(1, 0, 2)]
    turns += [lambda p: np.rot90(p, 3), lambda p: np.rot90(p.transpose(1, 0, 2), 2), np.rot90]
    for number, turn in enumerate(turns, start=1):
        turned = encode_pil(image, "JPEG", quality=95, subsampling=0, exif=make_exif(number))
        assert (turn(_rgb_pixels(turned)) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))).all()
        yield f"exif{number}.jpg", GoodImage(turned, turn(_rgb_pixels(jpeg)), 0.8, number == 1)
        yield f"exif{number}.png", GoodImage(encode_pil(image, "PNG", exif=make_exif(number)), turn(rgb))
    long = jpeg_segment(0xFE, b"a comment " * 600) + jpeg_segment(0xE1, make_exif(6).tobytes())
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for name, prefix in (("behind-comment.jpg", long), ("in-xmp.jpg", jpeg_segment(0xE1, xmp))):
        odd = b"\xff\xd8" + prefix + jpeg[2:]
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(odd))).size == (40, 60)
        yield name, GoodImage(odd, turns[5](_rgb_pixels(jpeg)), 0.8)


def _bad_images() -> Iterator[tuple[str, bytes]]:
    image = picture(3, 64, 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind, share in itertools.product(("JPEG", "PNG", "WEBP"), (0.2, 0.5, 0.9)):
        data = encode_pil(noise, kind, quality=90)
        yield f"cut-{kind}-{share}.jpg", data[: int(share * len(data))]
    for kind in ("GIF", "TIFF", "BMP", "PPM", "PDF", "EPS", "ICO", "TGA", "JPEG2000"):
        yield f"other-{kind}.jpg", encode_pil(image, kind)
    yield "other-animated-gif.webp", encode_pil(picture(3), "GIF", save_all=True, append_images=[picture(4)])
    yield "other-script.eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch canary) (w) file\n"
    scraps = [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" * 50, b"\x89PNG\r\n\x1a\n", bytes(99)]
    scraps += [b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", b"#!/bin/sh\ntouch canary\n"]
    scraps += [b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>']
    scraps += [b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000), pickle.dumps(Payload())]  # an FPX file
    yield from ((f"scrap{number}.jpg", scrap) for number, scrap in enumerate(scraps))
    for size in ((65_000, 65_000), (MAX_SIDE + 1, 1), (8001, 8000)):
        yield f"sides-{size[0]}.jpg", lying_jpeg(*size)
        yield f"sides-{size[0]}.png", make_png(*size, 8, 2, b"\0")
    yield "sides-long.png", make_png(1, 89_478_485, 8, 2, b"\0")
    yield "sides-wide.png", make_png(30_000, 1, 8, 0, bytes(30_001))
    yield "no-rows.png", make_png(10, 0, 8, 2, b"")
    progressive = encode_pil(
        image, "JPEG", progressive=True
    )  # each scan costs the time of a whole decoding: minutes for 100 kB
    yield "scans.jpg", progressive[:-2] + progressive[progressive.rfind(b"\xff\xda") : -2] * 1000 + b"\xff\xd9"


GOOD_IMAGES, BAD_IMAGES = dict(_good_images()), dict(_bad_images())


@cache
def decompression_bombs() -> dict[str, bytes]:
    """More that is refused: a few kB that would fill 80 MB each."""
    text_chunk = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MB - 1)))
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 * MB), 9))
    chunks_by_name = {"profile-bomb.png": [profile], "text-bomb.png": [text_chunk] * 80}
    return {name: make_png(2, 1, 8, 0, b"\0\1\2", *chunks) for name, chunks in chunks_by_name.items()}
