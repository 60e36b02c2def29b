"""The header of a safetensors file in one order: the library writes the keys of its metadata in another one each time,
and equal weights are equal files only where that is settled."""

from __future__ import annotations

import json
from pathlib import Path

_LENGTH = 8  # bytes, little-endian: how long the header is
METADATA = "__metadata__"


def settle(file: Path) -> None:
    """Of a file that the library has written just now; its size stays.

    Raises:
        OSError: it cannot be written.
    """
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        header = opened.read(length)
        opened.seek(_LENGTH)
        opened.write(_in_order(header))


def settled(content: bytes) -> bytes:
    """The same of a file's content."""
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    return content[:_LENGTH] + _in_order(content[_LENGTH:end]) + content[end:]


def _in_order(header: bytes) -> bytes:
    """As long as `header`: blanks at its end are part of the format."""
    said = json.loads(header)
    if METADATA in said:
        said[METADATA] = dict(sorted(said[METADATA].items()))
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(len(header)) if len(text) <= len(header) else header
