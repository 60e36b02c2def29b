"""Where a run stands, from its folder alone: for a person, and for batch scripts."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.base.errors import Problems, UserError
from tlx.base.terminal import escaped
from tlx.plan import config as configs
from tlx.plan.config import Config
from tlx.runs.extend import earlier
from tlx.runs.run_files import RunFiles, whole
from tlx.runs.run_lock import holder

_OF_LIBRARIES = ("transforms", "head", "task", "objective", "optimizer", "track", "backbone")
"""Keys of parts that only a library knows."""


def folder_of(which: Path, overrides: Sequence[str], others: Sequence[str] = ()) -> Path:
    """The folder of a run: the one named, or that of a configuration file. Its keys and values are checked, its parts
    are left to the training: to look them up takes the libraries that have them, and seconds.

    Args:
        others: further overrides, of which each is tried alone. One that names a part is looked up.

    Raises:
        UserError: neither, or a configuration that is wrong; every wrong one of `others`, and every one that sets its
            key to what another one sets it to.
    """
    if which.is_dir():
        if overrides:
            raise UserError("a run's folder takes no key=value; a configuration does", where=str(which))
        return which
    folder, problems = configs.load(which, overrides, libraries=False).run, Problems()
    known: dict[str, dict[str, Config]] = {}
    for word in others:
        key = word.partition("=")[0]
        looked_up = key.partition(".")[0] in _OF_LIBRARIES
        made = problems.of(functools.partial(configs.load, which, [*overrides, word], libraries=looked_up))
        if made is None:
            continue
        same = next((other for other, config in known.get(key, {}).items() if config == made), None)
        if same is not None:
            what = f"{word} stands twice" if word == same else f"{word} is the same as {same}"
            problems.add(UserError(what, todo="leave one of them out"))
        known.setdefault(key, {})[word] = made
    problems.refuse()
    return folder


def status_text(folder: Path) -> str:
    """A few lines: what was said last, who trains here, how far it is, the best and the newest checkpoint."""
    files = RunFiles(folder)
    status, owner, row = files.status, holder(folder), files.last_row
    if not status:
        return f"{folder}: " + ("no training has begun here" if folder.is_dir() else "not there yet")
    lines = [f"{folder}: {status.get('status')} since {status.get('time')}"]
    if status.get("status") == "running" and owner is None:
        lines = [f"{folder}: was killed; it said that it runs at {status.get('time')}, and no process does"]
    if owner is not None:
        lines.append(f"  trained by {owner}")
    lines += [f"  {line}" for key in ("why", "message") if status.get(key) for line in str(status[key]).splitlines()]
    step = max((s["step"] for s in (row, status) if isinstance(s.get("step"), int)), default=None)
    steps = whole(status.get("steps", files.plan.get("steps"))) or 0
    if step is not None:
        lines.append(f"  step {step:,}" + (f" of {steps:,} ({step / steps:.0%})" if steps > 0 else "") + _about(row))
    lines += [f"  extended at step {step}: {before} -> {now} steps" for step, before, now in _extensions(folder)]
    lines += [f"  {name} checkpoint: {path}" for name in ("latest", "best") if (path := _checkpoint(folder, name))]
    if status.get("status") != "done" and owner is None:
        lines.append("  -> " + _what_next(folder, mend=status.get("status") == "user-error"))
    return "\n".join(map(escaped, lines))


def _what_next(folder: Path, *, mend: bool) -> str:
    kept = any((folder / "checkpoints").glob("step-*"))
    command = "the same command " + ("goes on from the latest checkpoint" if kept else "begins anew")
    return f"mend that; {command}" if mend else command


def _about(row: Mapping[str, Any]) -> str:
    if not row:
        return ""
    numbers = [f"{k} {v:.4g}" for k, v in row.items() if k.startswith(("train/loss", "val/")) and isinstance(v, float)]
    return ", ".join(["", f"phase {row.get('phase')}", *numbers])


def _extensions(folder: Path) -> list[tuple[int, int, int]]:
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
        return [(int(e["step"]), *map(int, e["steps"])) for e in earlier(folder)]  # type: ignore[misc]
    return []


def _checkpoint(folder: Path, name: str) -> str | None:
    link = folder / "checkpoints" / name
    with contextlib.suppress(OSError):
        return f"{os.readlink(link)}, {_ago(link.resolve(strict=True))}"
    return None


def _ago(path: Path) -> str:
    seconds = max(0.0, time.time() - path.stat().st_mtime)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
