"""How much memory a training takes, as its rows tell it."""

from __future__ import annotations

import psutil
import torch

PREFIX = "memory/"
_GIB = 2**30


def begin_phase(device: torch.device) -> None:
    """From here on the peak of a GPU is the phase's own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_row(device: torch.device) -> dict[str, float]:
    """In GiB: of a GPU the highest that tensors took since the phase began; of a process without one what it has
    resident now, of which its workers' is no part."""
    if device.type == "cuda":
        return {f"{PREFIX}peak_gib": _rounded(torch.cuda.max_memory_allocated(device))}
    return {f"{PREFIX}process_gib": _rounded(psutil.Process().memory_info().rss)}


def _rounded(size: int) -> float:
    return float(f"{size / _GIB:.4g}")
