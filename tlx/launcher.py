"""What the launcher above this process says in the environment."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher that turns exit codes into banners and restarts stands over this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def relaunched() -> bool:
    """Whether the launcher above has started its ranks again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) or 0) > 0


def rank() -> int:
    """Of all processes, before there is a process group; 0 where RANK is no number, so that mistakes can be told."""
    said = os.environ.get("RANK", "")
    return int(said) if said.isdecimal() else 0


def restarts() -> int:
    """How often this very command was started again, by torchrun or by Slurm."""
    return max(int(os.environ.get(name, 0) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
