"""Where rank 0 tells what happens: metrics.jsonl first, then trackers, then the console. Other ranks keep silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx.base.console import Console
from tlx.runs.metrics_file import MetricsFile
from tlx.tracking.phase_end import PhaseEnd
from tlx.tracking.tracker import GuardedTracker
from tlx.tracking.trained import trained_models


@dataclass
class Journal:
    """`metrics` is None on every rank but the first; `make_trackers` is told whether a run goes on."""

    metrics: MetricsFile | None
    console: Console
    make_trackers: Callable[[bool], Sequence[GuardedTracker]]
    trackers: Sequence[GuardedTracker] = field(default=(), init=False)

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

    def phase_ended(self, end: PhaseEnd) -> None:
        """After the row of its last step."""
        for tracker in self.trackers:
            tracker.phase_ended(end)

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

    def pruned(self) -> str | None:
        """Why whoever is behind a tracker wants no more of this training; None where nobody says so."""
        asks = (getattr(tracker, "pruned", None) for tracker in self.trackers)
        return next((why for ask in asks if ask is not None and (why := ask())), None)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Closes everything, also after a fault: the terminal is given back, trackers send what they have."""
        self.console.close()
        done = result.get("finished") and self.metrics is not None and self.trackers
        models = trained_models(self.metrics.path.parent) if done and self.metrics is not None else ()
        for tracker in self.trackers:
            for model in models:
                tracker.model_trained(model)
            tracker.finish(result)
        self.trackers = ()
