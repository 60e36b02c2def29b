"""The one reader of a run folder: its files as they are, whatever state they are in. Reads, never writes.

`run_status` makes a few lines of them, `history` what a report draws; a training, `tlx submit` and `tlx track sync` ask
it too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlx.base.parsing import from_json, from_yaml
from tlx.runs.metrics_file import last_row, read_rows

_MOST = 1e100
"""Numbers from here on are taken for none, as those that are not finite: their squares and axes are not either."""


@dataclass(frozen=True)
class RunFiles:
    """Each property reads its file anew, and is empty where that is missing, torn or something else."""

    path: Path

    @property
    def status(self) -> dict[str, Any]:
        return self.read("status.json")

    @property
    def plan(self) -> dict[str, Any]:
        return self.read("plan.json")

    @property
    def result(self) -> dict[str, Any]:
        return self.read("result.json")

    @property
    def checkpoint(self) -> dict[str, Any]:
        """``state.json`` of the latest checkpoint."""
        return self.read("checkpoints/latest/state.json")

    @property
    def config_text(self) -> str:
        try:
            return (self.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    @property
    def config(self) -> dict[str, Any]:
        try:
            return mapping(from_yaml(self.config_text))
        except ValueError:
            return {}

    @property
    def last_row(self) -> dict[str, Any]:
        """Of metrics.jsonl, the newest with a step."""
        return last_row(self.path / "metrics.jsonl")

    def rows(self, *, most: int | None = None) -> list[dict[str, Any]]:
        """Of metrics.jsonl, those with a step; see :func:`tlx.runs.metrics_file.read_rows`."""
        found = read_rows(self.path / "metrics.jsonl", most=most)
        return [row for row in found if whole(row.get("step")) is not None]

    def read(self, name: str) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return mapping(from_json((self.path / name).read_bytes()))
        return {}


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def within(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects of a list in a file's content; what is something else is left out."""
    return [item for item in items(content.get(name)) if isinstance(item, dict)]


def number(value: Any) -> float:
    """A finite number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) < _MOST else math.nan


def test_values(result: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None, float | None]]:
    """What the look at data.test gave, of a result in memory or of result.json: value and both ends of its interval by
    metric; None for what is no finite number."""
    found = mapping(mapping(result.get("test")).get("metrics"))

    def of(metric: Any, name: str) -> float | None:
        value = number(mapping(metric).get(name))
        return value if math.isfinite(value) else None

    return {str(name): (of(m, "value"), of(m, "low"), of(m, "high")) for name, m in found.items()}


def whole(value: Any) -> int | None:
    """A finite number as an integer, or None for anything else."""
    found = number(value)
    return int(found) if math.isfinite(found) else None
