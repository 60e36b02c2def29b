"""Keys that came after the first configurations that tlx wrote: what a configuration means that lacks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BEFORE_THEY_CAME: Mapping[str, tuple[str, Any]] = {
    "loop.ema.ramp": ("loop.ema.decay", False),
    "cache.mode": ("seed", "off"),
}
"""Keys whose default is not what tlx did before they came: a key of that time beside it, and what it did. A
configuration that tlx wrote says every key that there was."""

WRITTEN = frozenset(
    {
        *("run", "seed", "duration", "stop_after", "data", "input", "transforms", "mix", "backbone", "head"),
        *("unfreeze", "phases", "objective", "optimizer", "no_decay", "loop", "evaluate", "checkpoint", "track"),
        "world",
    }
)
"""Keys at the top of every configuration that any tlx has written. A person leaves some of them out."""


def is_written(raw: Mapping[Any, Any]) -> bool:
    """Whether tlx wrote a configuration: the config.yaml of a run, a copy of it, or that of a submitted job."""
    return raw.keys() >= WRITTEN


def lacking(written: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that came after a configuration that tlx wrote (flat), and what was done without them."""
    later = BEFORE_THEY_CAME.items()
    return {key: value for key, (needs, value) in later if needs in written and key not in written}


def completed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that tlx wrote, with such keys said."""
    made = dict(raw)
    for key, (needs, value) in BEFORE_THEY_CAME.items():
        if not _says(raw, needs) or _says(raw, key):
            continue
        *parents, last = key.split(".")
        node = made
        for parent in parents:
            node[parent] = dict(node.get(parent) or {})
            node = node[parent]
        node[last] = value
    return made


def _says(raw: Any, key: str) -> bool:
    for step in key.split("."):
        if not isinstance(raw, Mapping) or step not in raw:
            return False
        raw = raw[step]
    return True
