"""Where rank 0 tells what happens: metrics.jsonl first, then trackers, then the console. Other ranks keep silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlx.console import Console
from tlx.tracking.metrics import MetricsFile
from tlx.tracking.tracker import Tracker


@dataclass(frozen=True)
class Journal:
    """`metrics` is None on every rank but the first."""

    metrics: MetricsFile | None
    trackers: Sequence[Tracker]
    console: Console

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

    def position(self) -> int:
        return self.metrics.position() if self.metrics is not None else 0

    def cut(self, position: int) -> None:
        """Takes back rows that the checkpoint does not know."""
        if self.metrics is not None:
            self.metrics.cut(position)

    def finish(self, result: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.finish(result)
        self.console.close()
