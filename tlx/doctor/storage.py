"""The folders of runs and shards: there, writable, with locks. How fast a disk is tells `fio`."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tlx.doctor.findings import Finding, fault, of_error, ok, warning
from tlx.doctor.hardware import gib

if TYPE_CHECKING:
    from tlx.plan.config import Config


def nearest(path: Path) -> Path:
    """The folder itself, or where it would be made."""
    path = path.absolute()
    return next((p for p in (path, *path.parents) if p.exists() or p.is_symlink()), path)


def _probe(folder: Path) -> Path:
    """A name that :meth:`tlx.runs.run_folder.RunFolder.prepare` removes, should this process not come to it."""
    return folder / f".doctor-{socket.gethostname()}-{os.getpid()}.tmp"


def writable(folder: Path, name: str, what: str) -> Finding | None:
    """A fault where no file can be made in a folder, or where it would be made.

    Args:
        what: the setting that names another folder.
    """
    here = nearest(folder)
    if not here.is_dir():
        said = "a link that leads nowhere" if here.is_symlink() else "a file, not a folder"
        return fault(name, f"{here} is {said}", f"remove it, or set {what} to another folder")
    probe = _probe(here)
    try:
        with probe.open("wb") as file:
            file.write(b"tlx doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        todo = f"make it writable, or set {what} to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = f"free some room, or set {what} to another disk"
        return fault(name, f"{here} cannot be written: {error.strerror}", todo)
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def run_folder(folder: Path) -> Iterator[Finding]:
    broken = writable(folder, "run folder", "run")
    if broken is not None:
        yield broken
        return
    here = nearest(folder)
    free = gib(shutil.disk_usage(here).free)
    yield ok("run folder", f"{folder} can be written; {free} free (a quota may be smaller)")
    yield from locks(here)


def locks(folder: Path) -> Iterator[Finding]:
    """Whether flock keeps a second training out."""
    probe = _probe(folder)
    works = False
    try:
        with probe.open("wb") as first, probe.open("wb") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                works = True
    except OSError:
        pass
    finally:
        with suppress(OSError):
            probe.unlink()
    if works:
        yield ok("locks", "flock works in the run folder")
    else:
        yield warning(
            "locks",
            "flock does not work in the run folder: a second training there is noticed only at a checkpoint",
            "mount it with locks (NFS 4; Lustre with -o flock), or see to it that one job at a time has the folder",
        )


def shards(config: Config) -> Iterator[Finding]:
    """Opened as training opens them, which compares them with each other and with what the configuration expects, and
    whether they hold what is to be learned."""
    from tlx.base.errors import UserError
    from tlx.train.components import task_of
    from tlx.train.data import open_sets

    try:
        sets = open_sets(config, staged=False)
        task_of(config, sets.samples)
    except UserError as error:
        yield of_error("shards", error, "tlx shards build, or tlx shards index")
        return
    for key, manifest in sets.manifests.items():
        yield ok(key, f"{manifest.location}: {len(manifest):,} samples in {len(manifest.shards)} shards")
