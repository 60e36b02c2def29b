"""A file about any number of pictures, computed on any number of ranks, and on after a kill.

The work is cut into parts of some thousand pictures. A part is written whole, as ``OUT.parts/000012.part``, by
whichever rank has computed it; when all are there, rank 0 joins them into ``OUT``, by rename, and removes the folder.
Whoever starts the same command again computes the parts that are missing, on as many ranks as there are then.
``OUT.parts/begun.json`` says what the parts are of.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from tlx.base.errors import UserError
from tlx.base.files import json_text, scratch, write_whole
from tlx.base.locks import locked_folder
from tlx.base.parsing import from_json
from tlx.base.terminal import remark
from tlx.ranks.sharing import Sharing
from tlx.ranks.together import by_main, together
from tlx.use.asked import Asked, Part
from tlx.use.inputs import digest
from tlx.use.row_text import written

_SAY_S = 10.0
_BEGUN = "begun.json"


class Work(Protocol):
    """What is computed, and how it is written."""

    @property
    def asked(self) -> Asked: ...

    def content(self) -> Mapping[str, Any]:
        """What it depends on beside pictures, batch and device, as JSON has it. Rank 0 asks."""

    def batches(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Any], bool]]:
        """Of each batch of these parts, in order: the part, what was found, whether it is the part's last."""

    def written(self, found: Sequence[Any]) -> bytes:
        """A part, of what its batches have found."""

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        """One file of all parts, in their order; some of them at a time are in memory."""


@dataclass(frozen=True)
class PartedFile:
    """The file `out` of a work."""

    work: Work
    out: Path

    def write(self, world: Sharing) -> None:
        """Computes what is missing, on all ranks, and joins it.

        Raises:
            UserError: a picture that cannot be read; parts of something else; another process is at it; the disk.
        """
        out, began = self.out, time.monotonic()
        with ExitStack() as stack:
            parts = by_main(world, lambda: self._begin(world.size, stack))
            missing = by_main(world, lambda: [n for n in range(len(parts)) if not self.part(n).exists()])
            if world.main and len(missing) < len(parts):
                remark(f"{out}: going on, {len(parts) - len(missing)} of {len(parts)} parts are there")
            together(world, lambda: self.compute(parts, missing[world.rank :: world.size], world))
            by_main(world, lambda: self.join(parts))
        if world.main:
            seconds = time.monotonic() - began
            remark(f"{out}: {self.work.asked.pictures:,} pictures in {seconds:.1f} s")

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    def part(self, number: int) -> Path:
        return self.folder / f"{number:06d}.part"

    def _begin(self, ranks: int, stack: ExitStack) -> list[Part]:
        """Makes the folder of parts this command's, or finds that it is; what its parts are.

        Args:
            stack: holds the folder's lock.
        """
        folder = self.folder
        with written(self.out):
            folder.mkdir(exist_ok=True)
            stack.enter_context(
                locked_folder(folder, "another command writes here", todo="wait for it, or another --out")
            )
        stack.callback(self.sweep)
        content = self._content()
        wanted = json.loads(json_text(content))
        with suppress(FileNotFoundError):
            said = _read(folder / _BEGUN)
            changed = [name for name, value in wanted.items() if said.get(name) != value]
            if changed:
                raise UserError(
                    f"it was begun with other {', '.join(changed)}",
                    where=str(folder),
                    todo="the same command as before goes on with it; else remove this folder, or name another --out",
                )
            return [Part(*numbers) for numbers in said["parts"]]
        if any(folder.glob("*.part")):
            raise UserError("it holds parts, and nothing says what of", where=str(folder), todo="remove it")
        parts = self.work.asked.parts(ranks)
        numbers = [[part.source, part.first, part.last] for part in parts]
        with written(self.out):
            write_whole(folder / _BEGUN, json_text({**content, "parts": numbers}))
        return parts

    def _content(self) -> dict[str, Any]:
        """A bad picture may be skipped from now on, without computing the others again."""
        asked = self.work.asked
        said = {"pictures": digest(asked.sources), "batch": asked.batch, "device": asked.forward.device.type}
        return {**self.work.content(), **said}

    def compute(self, parts: Sequence[Part], own: Sequence[int], world: Sharing) -> None:
        """Some of the parts, by number."""
        said, found = time.monotonic(), list[Any]()
        numbers = {parts[number]: number for number in own}
        try:
            for part, more, is_last in self.work.batches([parts[number] for number in own]):
                found += more
                if world.stops():
                    return
                if not is_last:
                    continue
                with written(self.out):
                    write_whole(self.part(numbers[part]), self.work.written(found))
                found = []
                if world.main and time.monotonic() - said > _SAY_S:
                    said = time.monotonic()
                    there = sum(1 for _ in self.folder.glob("*.part"))
                    remark(f"{self.out}: {there:,} of {len(parts):,} parts")
        except UserError:
            world.ask_to_stop()
            raise

    def join(self, parts: Sequence[Part]) -> None:
        """
        Raises:
            UserError: a part of another rank is not seen here.
        """
        files = [self.part(number) for number in range(len(parts))]
        gone = [file for file in files if not file.exists()]
        if gone:
            todo = "ranks on several machines need a folder that all of them see"
            raise UserError("a part that another rank has written is not here", where=str(gone[0]), todo=todo)
        if not self.out.exists():
            with written(self.out), scratch(self.out) as beside:
                with beside.open("w+b") as file:
                    self.work.join(files, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, self.out)
        self._remove()

    def sweep(self) -> None:
        """A command that comes to nothing before its first part leaves no folder; what was being written when another
        was killed goes."""
        for left in self.out.parent.glob(f".{glob.escape(self.out.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        if not any(self.folder.glob("*.part")):
            self._remove()

    def _remove(self) -> None:
        """What was written there, and then the folder, if that was all."""
        for pattern in ("*.part", ".*.part.*.tmp", _BEGUN, ".lock"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def is_begun(out: Path) -> bool:
    """Whether a command has begun to write it."""
    return (out.with_name(f"{out.name}.parts") / _BEGUN).exists()


def _read(file: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = from_json(file.read_bytes())
        [Part(*map(int, numbers)) for numbers in said["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("it is damaged", where=str(file), todo="remove its folder") from error
    return said
