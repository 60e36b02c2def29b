"""Several machines at one build: each writes a part of its shards, into a folder that all of them see.

Which shards are written, and what is in them, does not depend on the parts; they only say who does what. A part that is
at work holds the lock of a file in the folder, ``.part-3-of-8``, which goes with its process. Where the file system has
no locks there are none, and two who do the same part do it twice: each writes into files of its own and renames them,
the same bytes to the same names.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tlx.base import locks
from tlx.base.errors import UserError

Task = TypeVar("Task")

FILES = ".part-*-of-*"
_FILE = re.compile(r"\.part-(\d{1,6})-of-(\d{1,6})")
_LOOK_S = 0.1
_PATIENCE_S = 2.0  # somebody may just be looking whether a part is at work


@dataclass(frozen=True)
class Part:
    """The `number`-th (from 1) of `of` parts.

    Raises:
        UserError: there is no such part.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UserError(f"there is no part {self}", where="--part", todo="the parts of 8 are 1/8 to 8/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @staticmethod
    def read(text: str) -> Part:
        """From ``3/8``.

        Raises:
            UserError: it says something else.
        """
        said = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if said is None:
            raise UserError(f'"{text}" is not a part', where="--part", todo="write 3/8, for the third of eight")
        return Part(int(said[1]), int(said[2]))

    def share(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Its own tasks: every `of`-th; none, where there are fewer tasks than parts."""
        return tasks[self.number - 1 :: self.of]


@contextmanager
def at_work_on(folder: Path, part: Part) -> Iterator[None]:
    """Holds a part's lock.

    Raises:
        UserError: somebody else does.
    """
    path = folder / f".part-{part.number}-of-{part.of}"
    lock = locks.acquire_within(path, _PATIENCE_S)
    if lock is None:
        who = locks.holder_of(path)
        raise UserError(f"part {part} is being built already, by {who}", where=str(folder), todo="wait for it")
    try:
        lock.sign()
        yield
    finally:
        lock.release()


def refuse_other_division(folder: Path, part: Part) -> None:
    """
    Raises:
        UserError: the build is just being divided into another number of parts.
    """
    others = [p for p, _ in at_work(folder) if p.of != part.of]
    if others:
        raise UserError(
            f"--part {part}, while others build part {', '.join(map(str, others))} here",
            where=str(folder),
            todo="say the same number of parts everywhere, or wait for these",
        )


def wait_for_parts(folder: Path) -> None:
    """
    Raises:
        UserError: there are still parts at work after `tlx.base.locks.PATIENCE` seconds.
    """
    end = time.monotonic() + locks.PATIENCE
    while busy := at_work(folder):
        if time.monotonic() > end:
            listed = "; ".join(f"part {part}, {who}" for part, who in busy[:20])
            raise UserError(
                f"parts of this build are at work: {listed}",
                where=str(folder),
                todo="run this again when they are done; it then finishes the build",
            )
        time.sleep(_LOOK_S)


def at_work(folder: Path) -> list[tuple[Part, str]]:
    """The parts whose locks are held, and by whom."""
    found = []
    for path in folder.glob(FILES):
        said = _FILE.fullmatch(path.name)
        if said and locks.is_held(path):
            found.append((Part(int(said[1]), int(said[2])), locks.holder_of(path)))
    return sorted(found, key=lambda f: (f[0].of, f[0].number))
