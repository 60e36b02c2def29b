"""The members of a tar that anybody may have made: headers only; nothing is extracted, no name becomes a path.

Python's tarfile believes what a header says of itself: where one claims 8 GB of records it takes 8 GB, a member of
negative length leads it round in circles, and numbers in records end in errors of many kinds. Here these are
`tarfile.ReadError`.
"""

from __future__ import annotations

import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_HEADER = 32 << 10
"""Bytes of one header that are read: pax records are some hundred, and a path has at most 4096."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, where its bytes begin, how many there are."""

    name: str
    offset_data: int
    size: int


def open_regular(path: Path) -> IO[bytes]:
    """A file, opened for reading; a named pipe is not waited for.

    Raises:
        OSError: it cannot be opened, or is something else than a file.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("this is no file")
    return os.fdopen(file, "rb")


def read_members(path: Path) -> tuple[list[Member], int]:
    """The files in a tar, in its order, and where reading ended: at the end mark, if the tar is whole.

    Raises:
        tarfile.TarError: it is no tar, or a damaged one.
        OSError: it cannot be read.
    """
    found: list[Member] = []
    with open_regular(path) as file:
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
                last = -1
                while (member := tar.next()) is not None:
                    if member.offset <= last or member.size < 0:
                        raise tarfile.ReadError(f"it is damaged at byte {max(last, 0)}")
                    last = member.offset
                    tar.members.clear()  # each may hold a copy of all that a global header says
                    if member.isreg():
                        if member.sparse is not None:
                            raise tarfile.ReadError(f"{ascii(member.name)[:200]} is a sparse file")
                        found.append(Member(member.name, member.offset_data, member.size))
                return found, tar.offset
        except (tarfile.TarError, OSError, MemoryError):
            raise
        except Exception as error:
            raise tarfile.ReadError(f"a header cannot be read: {error}") from error


class _Headers:
    """A file as far as tarfile needs it for headers, of which little is read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: Any = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
