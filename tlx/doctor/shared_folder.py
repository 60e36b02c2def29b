"""The run's folder, which all nodes must see, with its locks."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.doctor.place import Place
from tlx.doctor.storage import nearest
from tlx.doctor.wire import Wire


@contextmanager
def shared_folder(wire: Wire, place: Place, run: Path | None) -> Iterator[Callable[[], str]]:
    """Rank 0 leaves a locked file where the run folder is, or would be made; whoever calls looks for it: ``same``,
    ``absent``, or ``unlocked`` where the lock does not hold here; ``""`` where nobody needs to look."""
    if run is None:
        yield lambda: ""
        return
    probe, token, handle = None, secrets.token_hex(8), -1
    if place.rank == 0:
        probe = nearest(run) / f".doctor-{token}.tmp"
        try:
            handle = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(handle, token.encode())
            os.fsync(handle)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            probe = None  # the finding on the run folder says why
    try:
        told = wire.from_main("probe", [str(probe) if probe else None, token, place.host])
        yield lambda: look(place, *told)
    finally:
        if handle >= 0:
            os.close(handle)
        if probe is not None:
            with suppress(OSError):
                probe.unlink()


def look(place: Place, probe: str | None, token: str, host: str) -> str:
    """What one rank sees of the file that rank 0, on `host`, has left; a word of :func:`shared_folder`."""
    if probe is None or place.host == host or place.local != 0:
        return ""
    try:
        handle = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "absent"
    try:
        if os.read(handle, 64).decode(errors="replace") != token:
            return "absent"
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "unlocked"
    except OSError:
        return "same"
    finally:
        os.close(handle)


def judge_seen(everybody: Sequence[Mapping[str, Any]], hosts: Mapping[int, str]) -> Iterator[Finding]:
    """
    Args:
        everybody: by rank, with the word under ``seen``.
    """
    name, by = "run folder of all", {rank: one["seen"] for rank, one in enumerate(everybody) if one["seen"]}
    absent = [hosts[rank] for rank, seen in by.items() if seen == "absent"]
    unlocked = [hosts[rank] for rank, seen in by.items() if seen == "unlocked"]
    if absent:
        said = f"what rank 0 ({hosts[0]}) writes there is not seen on {', '.join(absent[:8])}"
        yield fault(name, said, "set run to a folder that all nodes share")
    elif unlocked:
        yield warning(
            name,
            f"all nodes see it, and a lock of {hosts[0]} does not hold on {', '.join(unlocked[:8])}",
            "mount it with locks (NFS 4; Lustre with -o flock): else a second job is noticed only at a checkpoint",
        )
    elif by:
        yield ok(name, f"{len(by) + 1} nodes see the same, and its locks")
