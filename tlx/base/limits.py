"""What the system lets this process have: cores, memory, limits; from cgroups of both versions too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_LIMITS = ("memory.max", "memory.limit_in_bytes")


def cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's control groups allow; None without a quota."""
    found = []
    for folder in _groups("cpu", root):
        words = _text(folder / "cpu.max").split()
        if not words:
            words = [_text(folder / f"cpu.cfs_{what}_us") for what in ("quota", "period")]
        if len(words) == 2 and all(w.lstrip("-").isdigit() for w in words) and int(words[0]) > 0 < int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this machine has, or that this process's control groups allow where that is less."""
    limits = [_text(folder / most) for folder in _groups("memory", root) for most in _LIMITS]
    total: int = psutil.virtual_memory().total
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of a controller that apply to this process: its own group and all above."""
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = base if (base / "cgroup.controllers").exists() else base / "unified"
        elif controller in controllers.split(","):
            top = base / controller if (base / controller).exists() else base / controllers
        else:
            continue
        folder = top / path.lstrip("/")
        yield from (f for f in (folder, *folder.parents) if f == top or top in f.parents)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
