"""Time limits: as tlx writes them (``12h``, ``1d6h``) and as Slurm does (``12:00:00``, ``1-0``, ``90`` minutes)."""

from __future__ import annotations

import re

from tlx.base.durations import seconds

_SLURM = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", flags=re.ASCII)


def read(text: str) -> int:
    """Seconds of a time limit.

    Raises:
        ValueError: in neither form, or no time at all.
    """
    match = _SLURM.fullmatch(text.strip())
    if match is None:
        try:
            return seconds(text)
        except ValueError:
            raise ValueError(
                f"{text[:100]!r} is not a time limit; write 12h, 1d6h, or as Slurm does: 12:00:00, 1-0, 90 (minutes)"
            ) from None
    days, *clock = (None if part is None else int(part) for part in match.groups())
    counts = [count for count in clock if count is not None]
    units = (3600, 60, 1) if days is not None or len(counts) == 3 else (60, 1)
    found = 86400 * (days or 0) + sum(count * unit for count, unit in zip(counts, units, strict=False))
    if not found:
        raise ValueError("a time limit of nothing; a job needs one")
    return found


def limit(text: str) -> int | None:
    """Seconds of a limit that Slurm prints; None for no limit, and for ``0`` and ``N/A``, which say nothing of one."""
    try:
        return read(text)
    except ValueError:
        return None


def written(count: int) -> str:
    """Seconds in Slurm's form, ``1-06:00:00``."""
    minutes, rest = divmod(count, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes:02d}:{rest:02d}"
