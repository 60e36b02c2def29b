"""Pictures as a command line names them: files, folders, patterns, lists, standard input, shards."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from tlx.base.errors import UserError, did_you_mean
from tlx.base.location import is_remote, shown
from tlx.base.paths import expanded
from tlx.data.build.sources import EXTENSIONS
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.passed_over import kind_of_name
from tlx.data.stream.file_list import FileList

Listing: TypeAlias = "list[str | list[str]]"
"""In order: the location of shards, or paths of pictures."""

_INDEX = "index.json"


def pictures_of(path: Path) -> Iterator[str]:
    """A file itself, whatever it is called; of a folder its pictures, and those in folders below, sorted by name."""
    if not path.is_dir():
        yield str(path)
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if kind_of_name(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from pictures_of(Path(entry.path))
        elif os.path.splitext(entry.name)[1].lower().removeprefix(".") in EXTENSIONS:
            yield entry.path


def listed(words: Sequence[str]) -> Listing:
    """What the words stand for; pictures that follow each other are one list.

    Args:
        words: a file; a folder of pictures, or of shards; a pattern (``'photos/*/*.jpg'``); ``@FILE`` with a path on
            each line, or ``-`` with them on standard input (``find -print0`` works, too); the URL of shards.

    Raises:
        UserError: one of them stands for nothing.
    """
    found: Listing = []
    for word in words:
        for one in _meant(word):
            if isinstance(one, list) and found and isinstance(found[-1], list):
                found[-1] += one
            else:
                found.append(one)
    return found


def opened(listing: Listing) -> list[Manifest | FileList]:
    """
    Raises:
        UserError: shards that cannot be opened.
    """
    sources: list[Manifest | FileList] = []
    for one in listing:
        sources.append(Manifest.open(one) if isinstance(one, str) else FileList(one, one[0]))
    return sources


def digest(sources: Iterable[Manifest | FileList], *, below: str = "") -> str:
    """The same for the same pictures by name, size and time of their last change; bytes of files are not looked at.

    Args:
        below: names are taken from this folder on.
    """
    found = hashlib.sha256()
    for source in sources:
        names = [source.digest] if isinstance(source, Manifest) else (_known(path, below) for path in source.paths)
        for name in names:
            found.update(os.fsencode(name) + b"\0")
        found.update(b"\0")
    return found.hexdigest()


def _known(path: str, below: str) -> str:
    """Of a file that cannot be looked at, its name alone."""
    name = path.removeprefix(f"{below.rstrip('/')}/") if below else path
    try:
        of = os.stat(path)
    except (OSError, ValueError):
        return name
    return f"{name}\0{of.st_size} {of.st_mtime_ns}"


def _meant(word: str) -> Listing:
    if word == "-":
        return [_lines(sys.stdin.buffer.read(), "standard input")]
    if is_remote(word):
        _refuse_picture(word)
        return [word]
    path = word if os.path.lexists(word) else expanded(word)  # a shell's own pattern may give names with a dollar
    if os.path.isdir(path):
        return [path if os.path.exists(os.path.join(path, _INDEX)) else _of_folder(Path(path))]
    if os.path.lexists(path):
        return [[path]]
    if path.startswith("@"):
        return [_lines(_read(path[1:]), path[1:])]
    if glob.has_magic(path):
        fits = [file for one in sorted(glob.glob(path, recursive=True)) for file in pictures_of(Path(one))]
        if not fits:
            raise UserError("no picture has such a name", where=word)
        return [list(dict.fromkeys(fits))]
    parent = Path(path).parent
    near = did_you_mean(Path(path).name, os.listdir(parent)) if parent.is_dir() else ""
    near = near if "did you mean" in near else ""  # not all that lies there
    raise UserError(f"there is no such file or folder{near}", where=word)


def _refuse_picture(url: str) -> None:
    """
    Raises:
        UserError: it is a picture's URL.
    """
    if "://" in url and os.path.splitext(urlsplit(url).path)[1].lower().removeprefix(".") in EXTENSIONS:
        raise UserError("a URL is that of a folder of shards, not of a picture", where=shown(url), todo="download it")


def _of_folder(folder: Path) -> list[str]:
    found = list(pictures_of(folder))
    if not found:
        below = sorted(index.parent.name for index in folder.glob(f"*/{_INDEX}"))
        todo = f"these are shards: name {' or '.join(str(folder / name) for name in below)}" if below else None
        raise UserError("there are no pictures in this folder", where=str(folder), todo=todo)
    return found


def _read(path: str) -> bytes:
    try:
        return Path(expanded(path)).read_bytes()
    except OSError as error:
        raise UserError(f"the list cannot be read: {error.strerror}", where=path) from error


def _lines(content: bytes, where: str) -> list[str]:
    """Paths, one a line, or with a zero byte after each."""
    lines = content.split(b"\0" if b"\0" in content else b"\n")
    found = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
    if not found:
        raise UserError("there are no paths in it", where=where)
    return found
