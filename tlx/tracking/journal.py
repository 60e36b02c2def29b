"""Where rank 0 tells what happens: metrics.jsonl first, then trackers, then the console. Other ranks keep silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx.base.console import Console
from tlx.runs.metrics_file import MetricsFile
from tlx.tracking.tracker import Tracker


@dataclass
class Journal:
    """`metrics` is None on every rank but the first; `make_trackers` is told whether a run goes on."""

    metrics: MetricsFile | None
    console: Console
    make_trackers: Callable[[bool], Sequence[Tracker]]
    trackers: Sequence[Tracker] = field(default=(), init=False)

    def start(self, position: int, *, resumed: bool) -> None:
        """Takes back rows that the checkpoint does not know; only then do trackers look at what is there."""
        if self.metrics is not None:
            self.metrics.cut(position)
            self.trackers = self.make_trackers(resumed)
            self.console.begin()

    def row(self, row: Mapping[str, Any]) -> None:
        if self.metrics is None:
            return
        self.metrics.append(row)
        for tracker in self.trackers:
            tracker.log(row)
        self.console.row(row)

    def note(self, text: str) -> None:
        self.console.note(text)

    def sync(self) -> None:
        """Rows so far outlive a power cut."""
        if self.metrics is not None:
            self.metrics.sync()

    def follow(self, metrics: Path) -> None:
        """Rows go on under another path: the run folder was renamed, or removed.

        Raises:
            OSError: they cannot be written there.
        """
        if self.metrics is not None:
            self.metrics.follow(metrics)

    def position(self) -> int:
        return self.metrics.position() if self.metrics is not None else 0

    def finish(self, result: Mapping[str, Any]) -> None:
        """Closes everything, also after a fault: the terminal is given back, trackers send what they have."""
        self.console.close()
        for tracker in self.trackers:
            tracker.finish(result)
        self.trackers = ()
