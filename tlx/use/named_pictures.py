"""Bytes of pictures by the names that tlx gives them: a file's path, or ``SHARD.tar: MEMBER``."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tlx.base.terminal import escaped

_BETWEEN = ".tar: "


def pictures_by_name(names: Iterable[str]) -> dict[str, bytes]:
    """Of those that are here; each tar is read once."""
    found: dict[str, bytes] = {}
    inside: dict[Path, set[str]] = {}
    for name in names:
        tar, between, member = name.rpartition(_BETWEEN)
        if between:
            inside.setdefault(Path(f"{tar}.tar"), set()).add(member)
            continue
        with suppress(OSError, ValueError):
            if Path(name).is_file():
                found[name] = Path(name).read_bytes()
    for shard, members in inside.items():
        with suppress(OSError, ValueError, tarfile.TarError):
            found |= {f"{shard}: {name}": content for name, content in _members(shard, members).items()}
    return found


def _members(shard: Path, wanted: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if not shard.is_file():
        return found
    with tarfile.open(shard) as tar:
        for member in tar:
            name = escaped(member.name)
            if name in wanted and member.isfile():
                file = tar.extractfile(member)
                found[name] = file.read() if file is not None else b""
            if len(found) == len(wanted):
                break
    return found
