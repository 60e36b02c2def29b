"""The segments of a JPEG file, read without decoding it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

_START, _SCAN, _END = 0xD8, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of these markers, three are no frame
_NOTES = frozenset([*range(0xE0, 0xF0), 0xFE])  # APPn and comments
_ALONE = frozenset([0, 0x01, *range(0xD0, 0xD8)])  # no segment follows: a stuffed zero, TEM, restart markers
_AMONG_SCANS = frozenset([_SCAN, 0xC4, 0xDB])
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

Coding = Literal["baseline", "progressive", "other"]


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment before the first scan, in order; stops at one that is cut off. What stands
    between two is passed over, as libjpeg and Pillow do."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (_SCAN, _END) or stop > len(data) or stop < at + 4:
            return
        yield marker, at, stop
        at = stop


def coding(data: bytes) -> Coding | None:
    """How a JPEG is coded: "other" is arithmetic, lossless or 12 bits; None if this is no JPEG or has no frame."""
    if data[:2] != bytes((0xFF, _START)):
        return None
    for marker, start, _ in segments(data):
        if marker in _FRAMES:
            if data[start + 4] != 8 or marker > 0xC2:
                return "other"
            return "progressive" if marker == 0xC2 else "baseline"
    return None


def scans_are_plain(data: bytes) -> bool:
    """Whether the scans of a JPEG hold only markers that belong there (tables, further scans), up to the end marker.

    What libjpeg makes of others that damage has put there depends on the program that calls it.
    """
    start = 2
    for _, _, stop in segments(data):
        start = stop
    # in coded data 0xff is followed by a zero, a restart marker, or (as filling) another 0xff
    for found in _MARKER.finditer(data, start):
        marker = found.group()[1]
        if marker not in _AMONG_SCANS:
            return marker == _END
    return False


def without_notes(data: bytes) -> list[memoryview]:
    """What decides the pixels, as pieces: a JPEG's segments without what a camera or program wrote beside (APPn,
    comments), and everything from its first scan on. Other files: all of it."""
    view = memoryview(data)
    if coding(data) is None:
        return [view]
    pieces, rest = [], 2
    for marker, start, stop in segments(data):
        if marker not in _NOTES:
            pieces.append(view[start:stop])
        rest = stop
    return [*pieces, view[rest:]]
