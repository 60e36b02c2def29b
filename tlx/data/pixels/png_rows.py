"""Whether a PNG holds all of its rows: Pillow leaves those black that the compressed stream ends before."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_START = 8  # bytes of the signature
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column, first row, columns and rows from one pixel of a pass to the next."""
_PIECE = 1 << 20


def rows_are_missing(data: bytes) -> bool:
    """Inflates what Pillow could read, and counts its bytes; keeps none of them."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, _START + 8)
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + -(-columns * bits * _SAMPLES[colour] // 8))
    inflate = zlib.decompressobj()
    for piece in _pixel_data(data):
        while not inflate.eof:
            if wanted <= 0:
                return False
            inflated = inflate.decompress(piece, min(wanted, _PIECE))  # never more: a small file may hold gigabytes
            wanted -= len(inflated)
            piece = inflate.unconsumed_tail
            if not piece and len(inflated) < min(wanted + len(inflated), _PIECE):  # nothing waits inside either
                break
    return wanted > 0


def _pixel_data(data: bytes) -> Iterator[bytes]:
    at = _START
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"IDAT":
            yield data[at + 8 : at + 8 + length]
        at += 12 + length
