"""What a start of a training ran in: versions, devices, commit; kept in the run folder, to be told later, too."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from tlx.base.files import write_whole
from tlx.base.invocation import commit
from tlx.runs.run_files import RunFiles

FILE = "environment.json"
PATCH = "code.patch"

Code = Literal["none", "commit", "diff"]
"""What a tracker is told of the working folder's repository: nothing, its commit and whether files differ from it, or
also how they differ, which may show what is secret."""

MOST = 1 << 20
"""Bytes of a difference; of a larger one nothing is kept."""


def record(folder: Path, code: Code = "commit") -> None:
    """Writes what this process runs in; of the newest start, by each tracker that tells of it. A folder that cannot be
    written stays as it is.

    Args:
        code: the difference from the commit is kept for `diff`.
    """
    from tlx.runs.run_folder import versions  # with the configuration, which takes numpy

    said: dict[str, Any] = {"versions": versions(), "platform": platform.platform(), "cpus": os.cpu_count()}
    said |= {"gpus": _gpus()}
    if (at := commit()) is not None:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        said |= {"commit": at, "modified": bool(changed)}
    with contextlib.suppress(OSError):
        write_whole(folder / FILE, json.dumps(said, indent=2) + "\n")
        if code == "diff":  # of one tracker; the others let it be
            difference = _git("diff", "HEAD") or ""
            write_whole(folder / PATCH, difference if len(difference.encode()) <= MOST else "")


def read(folder: Path) -> dict[str, Any]:
    """What :func:`record` has written; empty where nothing was."""
    return RunFiles(folder).read(FILE)


def patch(folder: Path) -> Path | None:
    """The file with the difference from the commit; None where nothing differs, or it was not kept."""
    file = folder / PATCH
    return file if file.is_file() and file.stat().st_size else None


def _gpus() -> list[str]:
    """Names of those that torch sees; it is asked only where the training has loaded it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")
