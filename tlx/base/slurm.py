"""Slurm's own commands, started without a shell and with a limit of time to each, and the records that they print."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping


def present(command: str) -> bool:
    """Whether this machine has a command of Slurm's."""
    return shutil.which(command) is not None


def run(
    *words: str, patience_s: float, stdin: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Raises:
        OSError: the command cannot be started.
        subprocess.TimeoutExpired: it has not ended within `patience_s`; it was killed.
    """
    return subprocess.run(
        words, input=stdin, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=patience_s,
        check=False,
    )  # fmt: skip


def records(text: str) -> list[dict[str, str]]:
    """Records of `scontrol show job -o` or `show partition -o`, one a line of ``Key=value`` words; values hold no
    blanks where we read them."""
    lines = (line for line in text.splitlines() if "=" in line)
    # of two values the first: words of a job's command, which comes later, may look like keys
    return [dict(reversed(re.findall(r"([\w:/]+)=(\S*)", line))) for line in lines]
