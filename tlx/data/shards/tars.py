"""The members of a tar that anybody may have made: headers only; nothing is extracted, no name becomes a path.

Python's tarfile believes what a header says of itself: where one claims 8 GB of records it takes 8 GB, a member of
negative length leads it round in circles, and numbers in records end in errors of many kinds. Here these are
`tarfile.ReadError`.

A link, hard or symbolic, to a file in the tar stands for that file's bytes. One that leads elsewhere is not followed.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tlx.data.shards.passed_over import DANGLING, SPECIAL, PassedOver

_HEADER = 32 << 10
"""Bytes of one header that are read: pax records are some hundred, and a path has at most 4096."""

_LINKS = 40  # that lead to a file, one by another; as many as Linux follows


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, where its bytes begin, how many there are; of a link, those of its target."""

    name: str
    offset_data: int
    size: int


@dataclass(frozen=True)
class Contents:
    """What a tar holds.

    Attributes:
        members: its files, and links to files in it, in its order.
        end: where reading ended: at the end mark, if the tar is whole.
        passed_over: links that lead to no file in it, and what is neither a file, a folder nor a link.
    """

    members: tuple[Member, ...]
    end: int
    passed_over: tuple[PassedOver, ...] = ()


@dataclass(frozen=True, slots=True)
class _Link:
    """A member that stands for another, whose name is `target`: an earlier one, if it is a hard link."""

    name: str
    target: str
    hard: bool


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


def read_members(path: Path) -> Contents:
    """What a tar holds, from its headers.

    Raises:
        tarfile.TarError: it is no tar, or a damaged one.
        OSError: it cannot be read.
    """
    found: list[Member | _Link] = []
    special: list[PassedOver] = []
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
                    elif member.islnk() or member.issym():
                        found.append(_Link(member.name, member.linkname, member.islnk()))
                    elif not member.isdir():
                        special.append(PassedOver(SPECIAL, member.name))
                members, dangling = _resolved(found)
                return Contents(members, tar.offset, (*special, *dangling))
        except (tarfile.TarError, OSError, MemoryError):
            raise
        except Exception as error:
            raise tarfile.ReadError(f"a header cannot be read: {error}") from error


def _resolved(found: Iterable[Member | _Link]) -> tuple[tuple[Member, ...], list[PassedOver]]:
    """Each link as the member that it leads to, by whatever number of links; and those that lead to none."""
    found = tuple(found)
    if not any(isinstance(member, _Link) for member in found):
        return tuple(m for m in found if isinstance(m, Member)), []
    latest: dict[str, int] = {}  # a tar may hold a name twice; unpacked, the last one stays
    target: dict[int, int | str] = {}
    for place, member in enumerate(found):
        if isinstance(member, _Link):
            folder = "" if member.hard else posixpath.dirname(member.name)
            name = _normal(posixpath.join(folder, member.target))
            target[place] = latest.get(name, -1) if member.hard else name
        latest[_normal(member.name)] = place
    members, dangling = [], []
    for place, member in enumerate(found):
        at, steps = place, 0
        while at in target and steps < _LINKS:
            one = target[at]
            at, steps = latest.get(one, -1) if isinstance(one, str) else one, steps + 1
        end = found[at] if at >= 0 else None
        if isinstance(end, Member):
            members.append(Member(member.name, end.offset_data, end.size))
        elif isinstance(member, _Link):
            dangling.append(PassedOver(DANGLING, f"{member.name} -> {member.target}"))
    return tuple(members), dangling


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Writes one sample as webdataset's TarWriter does, byte for byte; importing that one imports torch.

    Args:
        members: extension -> content.
    """
    for extension in sorted(members):
        about = tarfile.TarInfo(f"{key}.{extension}")
        about.size, about.mode, about.uname, about.gname = len(members[extension]), 0o444, "bigdata", "bigdata"
        tar.addfile(about, io.BytesIO(members[extension]))


def _normal(name: str) -> str:
    """A member's name as others may refer to it: ``./a``, ``/a`` and ``b/../a`` are ``a``."""
    return posixpath.normpath(name).lstrip("/")


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
