"""Where a photograph was taken is taken out of it: a data set is passed on, and a phone writes down somebody's home.

Only those bytes are blanked, in their place, so that nothing else of the file changes.
"""

import re
import struct
import zlib

GPS = 0x8825  # the EXIF tag that points to the directory of the location
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of EXIF's types
BLOCKS = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", re.DOTALL)  # as JPEG, PNG and WebP hold them
PACKET = re.compile(rb"<x:xmpmeta.*?</x:xmpmeta>", re.DOTALL)


def without_location(data: bytes) -> bytes:
    """An image file's bytes with the location in its EXIF and XMP blanked; the very same bytes where there is none."""
    if not any(mark in data for mark in (b"Exif\0\0", b"eXIf", b"EXIF", b"x:xmpmeta")):
        return data
    blanked = bytearray(data)
    for found in BLOCKS.finditer(data):
        _blank_directory(blanked, found.end())
    for found in PACKET.finditer(data):
        if b"GPS" in found[0]:
            blanked[found.start() : found.end()] = b" " * len(found[0])
    if blanked == data:
        return data
    return bytes(_with_checksums(blanked)) if data.startswith(b"\x89PNG\r\n\x1a\n") else bytes(blanked)


def _blank_directory(data: bytearray, start: int) -> None:
    """Blank the location in the EXIF that begins at `start`; damaged EXIF is left as it is."""
    order = "<" if data[start : start + 2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", data, start + 4)
        for tag, _, _, pointer in _entries(data, start + first, order):
            if tag != GPS:
                continue
            entries = _entries(data, start + pointer, order)
            for _, kind, count, where in entries:
                length = SIZES.get(kind, 1) * count
                if 4 < length <= len(data) - start - where:
                    data[start + where : start + where + length] = bytes(length)
            length = 2 + 12 * len(entries)
            data[start + pointer : start + pointer + length] = bytes(length)
    except struct.error:
        return


def _entries(data: bytearray, at: int, order: str) -> list[tuple[int, int, int, int]]:
    """Tag, type, count and value or offset of every entry of an EXIF directory."""
    (count,) = struct.unpack_from(order + "H", data, at)
    return [struct.unpack_from(order + "HHII", data, at + 2 + 12 * i) for i in range(count)]


def _with_checksums(data: bytearray) -> bytearray:
    """A PNG whose chunks were changed, with checksums that fit."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return data
