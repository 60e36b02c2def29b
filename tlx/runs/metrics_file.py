"""``metrics.jsonl``: one JSON object per row, the truth about a run's numbers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.base.files import plain
from tlx.base.parsing import from_json


class MetricsFile:
    """Appends rows to `path`, and takes back those that a checkpoint does not know.

    A number that is not finite is written as ``null``: strict JSON has no NaN, and pandas makes one of it again. Rows
    that the disk has no room for wait in memory, and are written before the next one. Where the file was replaced or
    removed in the meantime, its rows are written anew under its name.

    Args:
        path: opened, or made, by the first call; its folder must be there by then.
        warn: hears once that rows wait, and once that they are written.
        is_displaced: whether the folder at its path is another one by now, which gets no file of ours.
    """

    def __init__(
        self, path: Path, warn: Callable[[str], None] = lambda _: None, is_displaced: Callable[[], bool] = lambda: False
    ) -> None:
        self.path, self._warn, self._is_displaced = path, warn, is_displaced
        self._handle: int | None = None
        self._written = 0
        self._waiting = b""
        self._warned = False
        self._turn = threading.Lock()  # a thread that saves a checkpoint syncs while rows come

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row and hands it to the operating system, so that it survives the death of this process."""
        line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
        with self._turn:
            self._waiting += line
            try:
                self._write()
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    self._warn(
                        f"WARNING: {self.path} cannot be written ({error}): its rows wait in memory. "
                        "Make room, or mend that"
                    )

    def follow(self, path: Path) -> None:
        """Goes on under another path, where the folder of the file is now.

        Raises:
            OSError: the file was removed, and cannot be written anew there.
        """
        with self._turn:
            if path != self.path and self._handle is not None:
                self.path, self._is_displaced = path, lambda: False
                self._keep_name()
            self.path = path

    def sync(self) -> None:
        """Puts everything on the disk, so that it survives a power cut too.

        Raises:
            OSError: it cannot be written.
        """
        with self._turn:
            self._write()
            os.fsync(self._opened())

    def position(self) -> int:
        """Bytes so far, with rows that wait; for a checkpoint, to be given to `cut` on resume."""
        with self._turn:
            self._opened()
            return self._written + len(self._waiting)

    def cut(self, offset: int) -> None:
        """Drops everything from `offset` on, and a torn last line. A file that is shorter keeps its whole lines, and
        that is told."""
        file = self._opened()
        if self._written < offset:
            self._warn(
                f"WARNING: {self.path} has lost {offset - self._written:,} bytes since the checkpoint: rows are missing"
            )
        with self._turn:
            kept = os.pread(file, min(offset, self._written), 0)
            self._written = kept.rfind(b"\n") + 1
            os.ftruncate(file, self._written)
            self._waiting = b""

    def close(self) -> None:
        """Writes what waits.

        Raises:
            OSError: it cannot be written.
        """
        with self._turn:
            try:
                self._write()
            finally:
                os.close(self._opened())
                self._handle = None

    def _opened(self) -> int:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._written = os.fstat(self._handle).st_size
        return self._handle

    def _keep_name(self) -> None:
        """What is open is what the name leads to; where it is not, all rows are copied."""
        try:
            if os.path.samestat(os.fstat(self._opened()), os.stat(self.path)):
                return
        except FileNotFoundError:
            pass
        if self._is_displaced() or not self.path.parent.is_dir():  # whoever writes the next checkpoint follows
            return
        rows = os.pread(self._opened(), self._written, 0)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        count = 0
        while count < len(rows):
            count += os.pwrite(handle, rows[count:], count)
        os.close(self._opened())
        self._handle = handle

    def _write(self) -> None:
        self._keep_name()
        while self._waiting:  # a row of which only a part had room is finished later, from where it broke off
            count = os.pwrite(self._opened(), self._waiting, self._written)
            self._written += count
            self._waiting = self._waiting[count:]
        if self._warned:
            self._warned = False
            self._warn(f"{self.path}: the rows that waited are written")


def read_rows(path: Path, *, most: int | None = None) -> list[dict[str, Any]]:
    """All whole rows of a file that may be growing or torn; ``null`` becomes NaN.

    Args:
        most: about so many rows of training alone, evenly; those of evaluations all, and each phase's first and last.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for line in lines if most is None else _thinned(lines, most):
        try:
            row = from_json(line)
        except ValueError:  # the last line of a process that died while writing
            continue
        if isinstance(row, dict):
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row with a step, without reading all of the file; empty where there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                row = from_json(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    return row
    return {}


_TAIL = 1 << 16  # bytes
_PHASE = re.compile(rb'"phase": ("(?:[^"\\]|\\.)*")')


def _thinned(lines: Sequence[bytes], most: int) -> list[bytes]:
    """Before they are parsed, which takes the longest."""
    apart = -(-len(lines) // most)
    found = [_PHASE.search(line) for line in lines]
    phases = [match[1] if match else b"" for match in found]
    return [
        line
        for i, line in enumerate(lines)
        if i % apart == 0
        or b'"train/lr' not in line
        or b'"val/' in line
        or b'"ema/val/' in line
        or i + 2 >= len(lines)  # of which the last may be torn
        or not phases[i - 1] == phases[i] == phases[i + 1]
    ]
