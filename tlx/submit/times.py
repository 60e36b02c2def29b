"""Time limits: as tlx writes them (``12h``, ``1d6h``) and as Slurm does (``12:00:00``, ``1-0``, ``90`` minutes)."""

from __future__ import annotations

import re

from tlx.base.durations import seconds

_SLURM = re.compile(
    r"(?:(?P<minutes>\d+)(?::(?P<sec>\d+))?"
    r"|(?P<hours>\d+):(?P<min>\d+):(?P<s>\d+)"
    r"|(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<ss>\d+))?)?)",
    flags=re.ASCII,
)
_SECONDS = {
    **dict.fromkeys(("sec", "s", "ss"), 1),
    **dict.fromkeys(("minutes", "min", "m"), 60),
    **dict.fromkeys(("hours", "h"), 3600),
    "days": 86400,
}


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
    found = sum(_SECONDS[name] * int(count) for name, count in match.groupdict().items() if count)
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
