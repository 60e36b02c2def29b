"""Checkpoints written beside training: the loop hands over a snapshot and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tlx.runs.checkpoint import Checkpoints, Snapshot


@dataclass
class Saver:
    """Writes one checkpoint at a time, in a thread unless `background` is false.

    Attributes:
        place: called by who saves: the folder of checkpoints, where it is now; raises where it is another training's.
        before: called before a checkpoint is written: metrics that it counts must be on the disk.
        say: hears when one cannot be written; training goes on.
        written: the step of the newest on the disk.
    """

    checkpoints: Checkpoints
    place: Callable[[], Path]
    before: Callable[[], None]
    say: Callable[[str], None]
    background: bool = True
    written: int = 0
    _thread: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _under_way: Future[None] | None = field(default=None, init=False, repr=False)

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Begins to write, once the one before is written; raises what that one raised, but for OSError."""
        self.settle()
        self.follow()
        if not self.background:
            self._write(step, snapshot)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way = self._thread.submit(self._write, step, snapshot)

    def follow(self) -> None:
        """Checkpoints are where the run folder is now."""
        self.checkpoints = replace(self.checkpoints, folder=self.place())

    def settle(self) -> None:
        """Waits until what was handed over is on the disk, or has failed."""
        under_way = self._under_way
        if under_way is None:
            return
        try:
            under_way.result()
        finally:
            if self._under_way is under_way:  # the watch may wait for it beside the main thread
                self._under_way = None

    def close(self) -> None:
        """The same, for the last time; safe after a fault."""
        try:
            self.settle()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _write(self, step: int, snapshot: Snapshot) -> None:
        try:
            self.before()
            path = self.checkpoints.write(step, snapshot)
        except OSError as error:
            self.say(
                f"WARNING: the checkpoint of step {step} could not be written ({error}).\n"
                f"  Training goes on; {self._left()} Mend that, or make room: {self._room(snapshot)}"
            )
            return
        self.written = step
        try:
            self.checkpoints.supersede(path)
        except OSError as error:
            self.say(
                f"WARNING: {path} is written, but not the links to it, or older ones could not be removed ({error})"
            )

    def _left(self) -> str:
        return f"the one of step {self.written} is untouched." if self.written else "there is none before it."

    def _room(self, snapshot: Snapshot) -> str:
        needed = f"it takes {snapshot.bytes / 2**20:,.1f} MiB"
        try:
            free = shutil.disk_usage(self.checkpoints.folder.parent).free
        except OSError:
            return needed
        return f"{needed}, and {free / 2**20:,.1f} MiB are free in {self.checkpoints.folder.parent}"
