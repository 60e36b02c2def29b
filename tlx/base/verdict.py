"""The verdict of this start, for whoever started it: the file that the environment variable TLX_VERDICT names.

``RUN/status.json`` says where a run stands, and only a start that has claimed the run folder writes it. A start that is
refused before that has only this file to say so, since launchers turn a user's mistake into exit code 0. It holds one
JSON object that begins with ``{"status": "done"``, ``running``, ``resumable``, ``pruned`` (ended early by who chooses
among trainings; the same command would go on), ``user-error`` or ``fault``; where it is empty or absent, the start was
killed before it could say anything. Whoever sets the variable names a new file for each start.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any, Literal

from tlx.base.files import write_whole
from tlx.base.launcher import verdict_file
from tlx.base.parsing import from_json

Status = Literal["running", "done", "resumable", "pruned", "user-error", "fault"]

_given: list[Status] = []


def give(status: Status, **about: Any) -> None:
    """Writes the verdict; a later one of the same start takes its place. Where it cannot be written, the exit code is
    all that there is."""
    _given.append(status)
    file = verdict_file()
    if file is None:
        return
    said = {"status": status, **about, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps(said) + "\n")


def give_if_none(status: Status, **about: Any) -> None:
    """The same where neither this process nor another rank has said anything."""
    if not _given and read() is None:
        give(status, **about)


def read() -> Mapping[str, Any] | None:
    """What the file says so far; None where nobody has said anything."""
    file = verdict_file()
    if file is None:
        return None
    try:
        content = from_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
