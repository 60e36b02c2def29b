"""What the launcher above this process says in the environment."""

from __future__ import annotations

import os
from pathlib import Path

RESUMABLE = 75
"""The exit code of a training that was asked to stop and can go on."""


def launched() -> bool:
    """Whether a launcher that turns exit codes into banners and restarts stands over this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def ranked() -> bool:
    """Whether this process was started as a rank, by a launcher or by srun."""
    return "WORLD_SIZE" in os.environ


def relaunched() -> bool:
    """Whether the launcher above has started its ranks again, after one of them failed."""
    return _count("TORCHELASTIC_RESTART_COUNT") > 0


def requeued_job() -> str | None:
    """The number of the Slurm job that this is another start of; None of a first start, or without Slurm."""
    return os.environ.get("SLURM_JOB_ID") if _count("SLURM_RESTART_COUNT") > 0 else None


def rank() -> int:
    """Of all processes, before there is a process group; 0 where RANK is no number, so that mistakes can be told."""
    said = os.environ.get("RANK", "")
    return int(said) if said.isdecimal() else 0


def verdict_file() -> Path | None:
    """Where whoever started this process wants to read how it ended; see :mod:`tlx.verdict`."""
    said = os.environ.get("TLX_VERDICT")
    return Path(said) if said else None


def _count(name: str) -> int:
    said = os.environ.get(name, "")
    return int(said) if said.isdecimal() else 0
