"""``metrics.jsonl``: one JSON object per row, the truth about a run's numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlx.files import plain


class MetricsFile:
    """Appends rows to `path`, and takes back those that a checkpoint does not know.

    A number that is not finite is written as ``null``: strict JSON has no NaN, and pandas makes one of it again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row and hands it to the operating system, so that it survives the death of this process."""
        self._file.write(json.dumps(plain(row), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts everything written on the disk, so that it survives a power cut too."""
        os.fsync(self._file.fileno())

    def position(self) -> int:
        """Bytes so far; for a checkpoint, to be given to `cut` on resume."""
        return os.fstat(self._file.fileno()).st_size

    def cut(self, offset: int) -> None:
        """Drops everything from `offset` on, and a torn last line. A file that is shorter keeps its whole lines."""
        name = self._file.name
        with open(name, "rb") as file:
            kept = file.read(min(offset, self.position()))
        self._file.truncate(kept.rfind(b"\n") + 1)

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file that may be growing or torn; ``null`` becomes NaN."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a process that died while writing
            continue
        if isinstance(row, dict):
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows
