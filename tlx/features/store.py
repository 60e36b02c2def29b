"""Features of pictures on disk: ``[views, samples, ...]``, written in parts by all ranks, resumed after a kill, mapped
into memory by whoever trains from them, and shared by all runs in which they would be the same.

A folder's name is the hash of everything that its content depends on, so that it is never stale. Of a folder that is
written, ``parts`` has a byte for each part (a forward batch of one view) that is there whole. Nothing here is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.base.files import json_text, write_whole
from tlx.base.launcher import environment
from tlx.base.locks import locked
from tlx.base.parsing import from_json
from tlx.base.paths import expanded_path

SHARE = 0.8
"""Of the room that the disk would have free without features, what they may take where no limit is set."""

_ABOUT, _VALUES, _PARTS, _USED, _COSTS, _BAD = "about.json", "values", "parts", "used", "costs.json", "bad"
_WORDS: Mapping[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
    torch.bfloat16: np.dtype("<i2"),
}


def default_folder() -> Path:
    """TLX_FEATURES, or ``~/.cache/tlx/features``."""
    return expanded_path(environment().get("TLX_FEATURES") or "~/.cache/tlx/features", where="TLX_FEATURES")


class Costs(NamedTuple):
    """Seconds of a picture.

    Attributes:
        computed: its features, from its file.
        read: these, from the disk.
    """

    computed: float
    read: float


@dataclass(frozen=True)
class Layout:
    """What is in a store.

    Attributes:
        shape, dtype: of the features of one picture.
        part: pictures of a part.
    """

    views: int
    samples: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: int

    @property
    def parts(self) -> int:
        """Of one view."""
        return -(-self.samples // self.part)

    @property
    def row(self) -> int:
        """Bytes of a picture's features."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.views * self.samples * self.row

    def places(self, part: int) -> range:
        return range(part * self.part, min((part + 1) * self.part, self.samples))


@dataclass(frozen=True)
class FeatureStore:
    """One folder of features."""

    folder: Path
    layout: Layout

    @classmethod
    def of(cls, root: Path, depends_on: Mapping[str, Any], layout: Layout) -> FeatureStore:
        """
        Args:
            depends_on: everything that features depend on, as JSON has it.
        """
        said = json.dumps([depends_on, layout.views, layout.shape, str(layout.dtype)], sort_keys=True)
        return cls(root / hashlib.sha256(said.encode()).hexdigest()[:32], layout)

    def make(self, about: Mapping[str, Any], limit: int | None) -> None:
        """The folder with room for everything; what was used least recently makes room. One rank does it.

        Raises:
            UserError: neither limit nor disk have room for it.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hold()
        os.utime(self.folder / _USED)
        with locked(self.folder.parent / ".making"):  # one at a time: of two trainings that begin, too
            if (self.folder / _PARTS).exists():
                return
            _make_room(self.folder, self.layout.bytes, limit)
            with (self.folder / _VALUES).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(self.layout.bytes, 1))
            write_whole(self.folder / _ABOUT, json_text(about))
            write_whole(self.folder / _PARTS, bytes(self.layout.views * self.layout.parts))

    def hold(self) -> None:
        """Keeps it from leaving for others, as long as this process lives."""
        handle = os.open(self.folder / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        _held.append(handle)

    def missing(self, *, anew: bool = False) -> list[tuple[int, int]]:
        """(view, part) of those that are not there.

        Args:
            anew: and of those with pictures that could not be read, which may have been mended since.
        """
        there = np.frombuffer((self.folder / _PARTS).read_bytes(), np.uint8).reshape(self.layout.views, -1)
        found = {(int(view), int(part)) for view, part in np.argwhere(there == 0)}
        if anew:
            found |= {_part_of(file) for file in self.folder.glob(f"{_BAD}-*.json")}
        return sorted(found)

    @property
    def whole(self) -> bool:
        """Whether everything is there."""
        return (self.folder / _PARTS).is_file() and not self.missing(anew=True)

    def forget(self) -> None:
        """Whatever is there counts as missing."""
        write_whole(self.folder / _PARTS, bytes(self.layout.views * self.layout.parts))

    def write(self, view: int, part: int, features: Tensor, bad: Mapping[int, str]) -> None:
        """A part.

        Args:
            features: [places of the part, *shape]; of a picture that cannot be read anything.
            bad: such pictures, by place, and why.

        Raises:
            OSError: the disk.
        """
        places = self.layout.places(part)
        if bad:
            text = json_text({str(place): reason for place, reason in bad.items()})
            write_whole(self.folder / f"{_BAD}-{view}-{part}.json", text)
        else:
            (self.folder / f"{_BAD}-{view}-{part}.json").unlink(missing_ok=True)
        content = _numpy(features.to("cpu", self.layout.dtype).contiguous()).tobytes()
        with (self.folder / _VALUES).open("r+b") as file:
            _write_at(file.fileno(), content, (view * self.layout.samples + places.start) * self.layout.row)
            os.fdatasync(file.fileno())
        with (self.folder / _PARTS).open("r+b") as file:
            _write_at(file.fileno(), b"\1", view * self.layout.parts + part)

    @property
    def costs(self) -> Costs | None:
        """As they were measured first."""
        try:
            found = from_json((self.folder / _COSTS).read_bytes())
            return Costs(float(found["computed"]), float(found["read"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, costs: Costs) -> None:
        write_whole(self.folder / _COSTS, json_text(costs._asdict()))

    def read(self, view: int, part: int, *, cold: bool) -> None:
        """Reads a part, to measure it.

        Args:
            cold: from the disk, not from what the system keeps of it in memory.
        """
        places = self.layout.places(part)
        start, size = (view * self.layout.samples + places.start) * self.layout.row, len(places) * self.layout.row
        with (self.folder / _VALUES).open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), size, start)

    def rows(self, view: int) -> NDArray[Any]:
        """[samples, *shape] of a view; bfloat16 as int16, which `tensor` undoes."""
        rows: NDArray[Any] = self._values[view]
        return rows

    def tensor(self, rows: NDArray[Any]) -> Tensor:
        found = torch.from_numpy(rows)
        return found.view(torch.bfloat16) if self.layout.dtype is torch.bfloat16 else found

    @cached_property
    def _values(self) -> NDArray[Any]:
        layout = self.layout
        shape = (layout.views, layout.samples, *layout.shape)
        return np.memmap(str(self.folder / _VALUES), dtype=_WORDS[layout.dtype], mode="r", shape=shape)

    @cached_property
    def bad(self) -> Mapping[tuple[int, int], str]:
        """Why a picture of a view could not be read, by view and place."""
        found: dict[tuple[int, int], str] = {}
        for file in self.folder.glob(f"{_BAD}-*.json"):
            view, _ = _part_of(file)
            found |= {(view, int(place)): str(why) for place, why in from_json(file.read_bytes()).items()}
        return found


_held: list[int] = []


def _part_of(file: Path) -> tuple[int, int]:
    _, view, part = file.stem.split("-")
    return int(view), int(part)


def _numpy(features: Tensor) -> NDArray[Any]:
    return (features.view(torch.int16) if features.dtype is torch.bfloat16 else features).numpy()


def _write_at(handle: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written


def _make_room(folder: Path, size: int, limit: int | None) -> None:
    """Removes stores of others, the one used least recently first, until there is room.

    Raises:
        UserError: there is not enough.
    """
    others = sorted(_stores(folder.parent, without=folder), key=lambda store: store[0])
    held = sum(size for _, size, _ in others)
    free = shutil.disk_usage(folder).free
    most = limit if limit is not None else int(SHARE * (free + held))
    if size > most:
        raise UserError(
            f"features take {size / 1e9:.2f} GB, and may take {most / 1e9:.2f} GB",
            where=str(folder.parent),
            todo="cache: {folder: PLACE, limit: 500GB}, or cache: {dtype: fp16}, or cache: off",
        )
    if size >= free + held:
        what = f"features take {size / 1e9:.2f} GB, and the disk has {(free + held) / 1e9:.2f} GB for them"
        raise UserError(what, where=str(folder.parent), todo="make room, cache: {folder: PLACE}, or cache: off")
    for _, bytes_, other in others:
        if held + size <= most and free > size:
            return
        if _remove(other):
            held, free = held - bytes_, free + bytes_
    if free <= size or held + size > most:
        what = f"features take {size / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB"
        raise UserError(what, where=str(folder.parent), todo="make room, cache: {folder: PLACE}, or cache: off")


def _stores(root: Path, *, without: Path) -> Iterator[tuple[float, int, Path]]:
    """When each was used, its bytes, its folder."""
    for folder in root.iterdir():
        with suppress(OSError):
            if folder != without and (folder / _USED).is_file():
                yield (folder / _USED).stat().st_mtime, (folder / _VALUES).stat().st_size, folder


def _remove(folder: Path) -> bool:
    """A store with what we have put there, and nothing else, unless somebody holds it."""
    handle = os.open(folder / _USED, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    (folder / _PARTS).unlink(missing_ok=True)  # first: what is half gone holds nothing
    for name in (_VALUES, _ABOUT, _COSTS, _USED):
        (folder / name).unlink(missing_ok=True)
    for file in folder.glob(f"{_BAD}-*.json"):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
        return True
    return False
