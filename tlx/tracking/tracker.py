"""What a tracker is, and the guard that keeps its failures away from training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tlx.errors import UserError


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told about the run.

    Attributes:
        folder: the run folder; ``metrics.jsonl`` in it holds all rows before the one that is logged next.
        name: for people; run_id: the same for every start of one run.
        config: the complete configuration.
        resumed: the run goes on from a checkpoint.
    """

    folder: Path
    name: str
    run_id: str
    config: Mapping[str, Any]
    resumed: bool = False


class Tracker(Protocol):
    """Receives every row of ``metrics.jsonl`` after it was written, on rank 0 only."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...


def guarded(name: str, make: Callable[[], Tracker]) -> Tracker:
    """Makes a tracker that cannot stop training: whatever it raises is said once on stderr, then it stays silent.

    Raises:
        UserError: from `make`, for what the user must mend (a package that is not installed).
    """
    guard = _Guarded(name)
    guard.attempt(lambda: setattr(guard, "tracker", make()))
    return guard


class _Guarded:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tracker: Tracker | None = None

    def log(self, row: Mapping[str, Any]) -> None:
        if self.tracker is not None:
            self.attempt(lambda: self.tracker.log(row))  # type: ignore[union-attr]

    def finish(self, result: Mapping[str, Any]) -> None:
        if self.tracker is not None:
            self.attempt(lambda: self.tracker.finish(result))  # type: ignore[union-attr]
        self.tracker = None

    def attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except UserError:
            raise
        except Exception as error:  # trackers raise anything: a dead service gives ConnectionResetError
            self.tracker = None
            why = str(error).splitlines()[0] if str(error) else ""
            print(
                f'warning: the tracker "{self.name}" failed ({type(error).__name__}: {why}) and is left alone from '
                "here on; training goes on, and metrics.jsonl has everything",
                file=sys.stderr,
                flush=True,
            )
